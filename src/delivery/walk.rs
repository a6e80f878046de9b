//! The backlog of a node, cut into batches.
//!
//! A walk leads from the cursor of a node to a target position. Its steps are bounded: a backlog that is not worth a replay
//! (too many bans, or too many tags to compile) becomes one ban of everything. That is decided by the size of the backlog,
//! before anything is compiled.
//!
//! Unless the VCL says otherwise, a ban of everything covers only pages with tags or a pool. So forwarded requests (`PURGE
//! <url>`, `BAN`) are replayed one by one behind it, as long as the journal holds them. What a flush must cover beyond that
//! is recorded in [`Batch::gap`], and the sender of the batch decides whether it was enough.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::refusal::{Owed, Refused, fingerprint};
use crate::fleet::VarnishSettings;
use crate::journal::{Entry, Journal, Missed, Position};
use crate::purge::{Ban, CompiledBans, Guard, Purge, Target, compile};

/// The maximum number of bans in a batch, because each costs the node a comparison per object. More become one ban of
/// everything.
const MAX_BANS: usize = 64;

/// The maximum number of bytes of tags to compile: about 300,000 tags. More become one ban of everything.
const MAX_TAG_BYTES: usize = 4 << 20;

/// The maximum number of forwarded requests in a batch. The rest follow in later batches.
const MAX_REQUESTS: usize = 1_000;

/// Up to this number of entries and bytes, a step is compiled in place: a hop to another thread would take longer.
const SHORT_ENTRIES: usize = 64;
const SHORT_BYTES: usize = 64 << 10;

#[derive(Clone)]
pub(super) struct Sources {
    pub(super) journal: Arc<dyn Journal>,
    pub(super) guard: Arc<Guard>,
    pub(super) address: SocketAddr,
    pub(super) settings: VarnishSettings,
}

/// The way from a node's cursor to a target position.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    /// The node has everything up to here. `None`: unknown.
    after: Option<Position>,
    last: Position,
    /// Up to here a ban of everything covers all but forwarded requests.
    flushed: Position,
    /// It begins with a ban of everything, whatever the node has.
    begins_with_flush: bool,
    refused: Vec<Refused>,
}

/// One step of a walk.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The requests that are left to send. Failed ones come first.
    pub(super) left: VecDeque<Item>,
    /// The node's position once the batch is carried out.
    reaches: Option<Position>,
    /// It contains a ban of everything.
    pub(super) is_flush: bool,
    /// The range that the ban of everything replaces and that cannot be replayed: after the first position, up to the
    /// second.
    pub(super) gap: Option<(Position, Position)>,
    /// What the node owes for requests that it refused.
    pub(super) owed: Owed,
    /// The number of tags saved by merging equal ones.
    pub(super) folded: u64,
}

#[derive(Debug)]
pub(super) struct Item {
    pub(super) ban: Ban,
    /// It failed once: it is sent alone from now on, each time just after the node has obeyed a test request.
    pub(super) is_suspect: bool,
    /// The number of failures as a suspect.
    pub(super) strikes: u32,
}

impl Item {
    pub(super) fn new(ban: Ban) -> Self {
        Item { ban, is_suspect: false, strikes: 0 }
    }
}

impl Walk {
    /// A walk from `after` (`None`: unknown) to `last` that leaves out refused requests.
    pub(super) fn new(after: Option<Position>, last: Position, refused: Vec<Refused>) -> Self {
        Walk { after, last, flushed: 0, begins_with_flush: false, refused }
    }

    /// The same, beginning with a ban of everything.
    pub(super) fn with_flush(self) -> Self {
        Walk { begins_with_flush: true, ..self }
    }

    pub(super) fn last(&self) -> Position {
        self.last
    }

    /// The positions that a step is for.
    pub(super) fn positions(&self, batch: &Batch) -> RangeInclusive<Position> {
        let last = batch.reaches.filter(|_| !batch.is_flush).unwrap_or(self.last);
        self.after.map_or(0, |after| after + 1)..=last
    }

    /// Whether compiling the next step takes less time than a hop to another thread.
    pub(super) fn is_short(&self, sources: &Sources) -> bool {
        let Some(after) = self.after else { return true };
        if sources.journal.lag(after).entries > SHORT_ENTRIES {
            return false;
        }
        match sources.journal.since(after) {
            Missed::Entries(entries) => entries.iter().map(|entry| weight(&entry.purge)).sum::<usize>() <= SHORT_BYTES,
            Missed::Truncated => true,
        }
    }

    /// The next step; `None` at the end.
    pub(super) fn next(&self, sources: &Sources) -> Option<Batch> {
        if self.begins_with_flush && self.after.is_some() {
            return Some(flush(self.after));
        }
        if self.after.is_some_and(|after| after >= self.last) {
            return None;
        }
        let Some((after, Missed::Entries(mut entries))) = self.after.map(|after| (after, sources.journal.since(after)))
        else {
            let held_from = sources.journal.floor().min(self.last);
            let gap = Some((self.after.unwrap_or(0), held_from));
            // The flush was sent after all of these purges were accepted. It is only left to decide whether it covers them.
            let is_flushed = self.flushed == self.last;
            let reaches = Some(held_from);
            let step = if is_flushed { Batch { reaches, ..Batch::default() } } else { flush(reaches) };
            return Some(Batch { gap, ..step });
        };
        entries.truncate(entries.partition_point(|entry| entry.position <= self.last));
        let reaches = cut_after_requests(&mut entries).unwrap_or(self.last);
        if is_beyond_a_replay(entries.iter().filter(|entry| entry.position > self.flushed)) {
            return Some(flush(Some(after)));
        }
        let purges: Vec<Purge> = entries.iter().filter_map(|entry| self.remaining(entry)).collect();
        let untouched = entries.iter().filter(|entry| self.is_untouched(entry)).map(|entry| &entry.purge);
        let VarnishSettings { delivery, header_limit, .. } = sources.settings;
        let CompiledBans { bans, folded } = compile(untouched.chain(&purges), delivery, header_limit);
        if listed(&bans) > MAX_BANS {
            return Some(flush(Some(after)));
        }
        Some(Batch {
            left: bans.into_iter().map(Item::new).collect(),
            reaches: Some(reaches),
            folded,
            ..Batch::default()
        })
    }

    /// Records that a step was carried out.
    pub(super) fn advance(&mut self, batch: &Batch) {
        self.after = batch.reaches;
        if batch.is_flush {
            (self.flushed, self.begins_with_flush) = (self.last, false);
        }
    }

    /// Forgets a flush that was not enough, so that the next attempt sends another.
    pub(super) fn forget_flush(&mut self) {
        self.flushed = 0;
    }

    /// The rest of the walk, for a request that the node refuses.
    pub(super) fn refuses(&self, fingerprint: u64) -> Refused {
        Refused { fingerprint, after: self.after.unwrap_or(0), last: self.last }
    }

    /// Leaves these requests out from now on.
    pub(super) fn pass_over(&mut self, refused: Refused) {
        self.refused.push(refused);
    }

    /// Whether this purge is sent as a whole.
    fn is_untouched(&self, entry: &Entry) -> bool {
        entry.position > self.flushed && !entry.purge.targets.iter().any(|target| self.is_refused(entry, target))
    }

    fn is_refused(&self, entry: &Entry, target: &Target) -> bool {
        !self.refused.is_empty()
            && fingerprint(target)
                .is_some_and(|target| self.refused.iter().any(|refused| refused.includes(target, entry.position)))
    }

    /// The rest of a purge if a flush covers a part of it or the node refuses a part; `None` if the whole purge is sent.
    fn remaining(&self, entry: &Entry) -> Option<Purge> {
        if self.is_untouched(entry) {
            return None;
        }
        let is_covered = |target: &Target| entry.position <= self.flushed && !matches!(target, Target::Forward(_));
        let is_left = |target: &&Target| !is_covered(target) && !self.is_refused(entry, target);
        let targets = entry.purge.targets.iter().filter(is_left).cloned().collect();
        Some(Purge { targets, soft: entry.purge.soft })
    }
}

/// A ban of everything, after which the node is at this position.
fn flush(reaches: Option<Position>) -> Batch {
    Batch { left: [Item::new(Ban::Everything)].into(), reaches, is_flush: true, ..Batch::default() }
}

impl Batch {
    /// This purge alone, wherever the node is: at the end of a walk.
    pub(super) fn of(purge: &Purge, at: Position, sources: &Sources) -> Self {
        let VarnishSettings { delivery, header_limit, .. } = sources.settings;
        let CompiledBans { bans, folded } = compile([purge], delivery, header_limit);
        Batch { left: bans.into_iter().map(Item::new).collect(), reaches: Some(at), folded, ..Batch::default() }
    }

    /// The number of requests left that add an entry to the node's ban list.
    pub(super) fn listed(&self) -> usize {
        self.left.iter().filter(|item| item.ban.is_listed()).count()
    }

    /// Appends a ban of everything.
    pub(super) fn flush_too(&mut self) {
        self.left.push_back(Item::new(Ban::Everything));
        self.is_flush = true;
    }

    /// Replaces its bans by one ban of everything.
    pub(super) fn widen(&mut self) {
        self.left.retain(|item| matches!(item.ban, Ban::Forward(_)));
        self.left.push_front(Item::new(Ban::Everything));
    }
}

fn listed(bans: &[Ban]) -> usize {
    bans.iter().filter(|ban| ban.is_listed()).count()
}

/// Truncates the entries to the maximum of forwarded requests. Returns the last position if that cuts any.
fn cut_after_requests(entries: &mut Vec<Arc<Entry>>) -> Option<Position> {
    let mut requests = 0;
    let full = entries.iter().position(|entry| {
        requests += entry.purge.targets.iter().filter(|target| matches!(target, Target::Forward(_))).count();
        requests >= MAX_REQUESTS
    })?;
    entries.truncate(full + 1);
    entries.last().map(|entry| entry.position)
}

/// Whether this backlog is not worth a replay, decided without compiling it.
fn is_beyond_a_replay<'e>(entries: impl Iterator<Item = &'e Arc<Entry>>) -> bool {
    let mut bytes = 0;
    let mut patterns = BTreeSet::new();
    for target in entries.flat_map(|entry| &entry.purge.targets) {
        match target {
            Target::Tags(tags) => bytes += tags.as_str().len(),
            Target::Pattern(pattern) | Target::Pool(pattern) => _ = patterns.insert(pattern),
            Target::All | Target::Everything | Target::Forward(_) => {}
        }
        if bytes > MAX_TAG_BYTES || patterns.len() > MAX_BANS {
            return true;
        }
    }
    false
}

/// The approximate number of bytes to compile.
fn weight(purge: &Purge) -> usize {
    let bytes = |target: &Target| match target {
        Target::Tags(tags) => tags.as_str().len(),
        Target::Pattern(pattern) | Target::Pool(pattern) => pattern.as_str().len(),
        Target::All | Target::Everything | Target::Forward(_) => 0,
    };
    purge.targets.iter().map(bytes).sum()
}
