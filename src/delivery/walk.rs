//! What a node misses, cut into batches that it is sent one after the other.
//!
//! A walk leads from where a node is to where it shall be. It is cut so that no step is without bound: a backlog that
//! nobody would replay (too many bans, too many tags to be worth their compilation) is one ban of everything, and that it
//! is one is seen from the weight of what was missed, before anything is compiled.
//!
//! A ban of everything is one of everything that has tags or a pool, and no more unless the VCL says so. So requests that
//! were handed on as they came (`PURGE <url>`, `BAN`) are replayed one by one behind it, as long as they are held. What a
//! flush stands for beyond that is written down in [`Batch::gap`]: whoever sends it decides whether it was enough.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::refusal::{Owed, Refused, fingerprint};
use crate::fleet::VarnishSettings;
use crate::journal::{Entry, Journal, Missed, Position};
use crate::purge::{Ban, CompiledBans, Guard, Purge, Target, compile};

/// Bans in one batch; more become one ban of everything: each costs the node a comparison per object.
const MAX_BANS: usize = 64;

/// Bytes of tags that are worth their compilation: some 300,000 tags. More become one ban of everything.
const MAX_TAG_BYTES: usize = 4 << 20;

/// Requests that are handed on in one batch. Whatever is more goes into the next one.
const MAX_REQUESTS: usize = 1_000;

/// What is compiled where it stands, without a thread of its own: less takes no longer than the hop to one.
const SHORT_ENTRIES: usize = 64;
const SHORT_BYTES: usize = 64 << 10;

/// What batches are made from.
#[derive(Clone)]
pub(super) struct Sources {
    pub(super) journal: Arc<dyn Journal>,
    pub(super) guard: Arc<Guard>,
    /// Where the node listens.
    pub(super) address: SocketAddr,
    pub(super) settings: VarnishSettings,
}

/// The way from what a node has to what it shall have.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    /// The node has everything up to here. `None`: nobody knows what it has.
    after: Option<Position>,
    /// Where the walk ends.
    last: Position,
    /// Up to here a ban of everything covers all but requests that are handed on.
    flushed: Position,
    /// What this node does not take.
    refused: Vec<Refused>,
}

/// One step of a walk.
#[derive(Debug)]
pub(super) struct Batch {
    /// What is left to send. Those that failed before come first.
    pub(super) left: VecDeque<Item>,
    /// Where the node is when all of it was carried out.
    reaches: Option<Position>,
    /// It is one ban of everything instead of a replay.
    pub(super) is_flush: bool,
    /// What the ban of everything stands for and nobody can replay: what follows the first position up to the second.
    pub(super) gap: Option<(Position, Position)>,
    /// What has to be done for those of it that the node does not take.
    pub(super) owed: Owed,
    /// The tags that uniting saved.
    pub(super) folded: u64,
    /// When a page that it concerns last passed the origin.
    pub(super) last_passed: Option<Instant>,
}

/// One request of a batch.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) ban: Ban,
    /// It was not answered well: it goes alone from now on, each time just after the node was seen to obey.
    pub(super) is_suspect: bool,
    /// How often it failed so.
    pub(super) strikes: u32,
}

impl Item {
    pub(super) fn new(ban: Ban) -> Self {
        Item { ban, is_suspect: false, strikes: 0 }
    }
}

impl Walk {
    /// The way from `after` (`None`: nobody knows what the node has) to `last`, past what the node refuses.
    pub(super) fn new(after: Option<Position>, last: Position, refused: Vec<Refused>) -> Self {
        Walk { after, last, flushed: 0, refused }
    }

    /// Where it ends.
    pub(super) fn last(&self) -> Position {
        self.last
    }

    /// Whether the next step is made faster than a thread is found for it.
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
        if self.after.is_some_and(|after| after >= self.last) {
            return None;
        }
        let Some((after, Missed::Entries(mut entries))) = self.after.map(|after| (after, sources.journal.since(after)))
        else {
            let held_from = sources.journal.floor().min(self.last);
            let gap = Some((self.after.unwrap_or(0), held_from));
            // The flush was sent after all of these were accepted: only what it may have left is still to be asked.
            let is_flushed = self.flushed == self.last;
            let step = if is_flushed { Batch::nothing(held_from) } else { self.flush(Some(held_from), sources) };
            return Some(Batch { gap, ..step });
        };
        entries.truncate(entries.partition_point(|entry| entry.position <= self.last));
        let reaches = cut_after_requests(&mut entries).unwrap_or(self.last);
        if is_beyond_a_replay(entries.iter().filter(|entry| entry.position > self.flushed)) {
            return Some(self.flush(Some(after), sources));
        }
        let purges: Vec<Purge> = entries.iter().filter_map(|entry| self.remaining(entry)).collect();
        let untouched = entries.iter().filter(|entry| self.is_untouched(entry)).map(|entry| &entry.purge);
        let purges = || untouched.clone().chain(&purges);
        let VarnishSettings { delivery, header_limit, .. } = sources.settings;
        let CompiledBans { bans, folded } = compile(purges(), delivery, header_limit);
        if listed(&bans) > MAX_BANS {
            return Some(self.flush(Some(after), sources));
        }
        Some(Batch {
            left: bans.into_iter().map(Item::new).collect(),
            reaches: Some(reaches),
            is_flush: false,
            gap: None,
            owed: Owed::Nothing,
            folded,
            last_passed: purges().filter_map(|purge| sources.guard.last_passed(purge)).max(),
        })
    }

    /// This step was carried out.
    pub(super) fn advance(&mut self, batch: &Batch) {
        self.after = batch.reaches;
        if batch.is_flush {
            self.flushed = self.last;
        }
    }

    /// A flush in it was not enough: nothing counts as flushed, so that whoever tries again sends another.
    pub(super) fn forget_flush(&mut self) {
        self.flushed = 0;
    }

    /// What is left of the way, for a target that the node does not take.
    pub(super) fn refuses(&self, fingerprint: u64) -> Refused {
        Refused { fingerprint, after: self.after.unwrap_or(0), last: self.last }
    }

    /// The node does not take these.
    pub(super) fn pass_over(&mut self, refused: Refused) {
        self.refused.push(refused);
    }

    fn flush(&self, reaches: Option<Position>, sources: &Sources) -> Batch {
        Batch {
            left: [Item::new(Ban::Everything)].into(),
            reaches,
            is_flush: true,
            gap: None,
            owed: Owed::Nothing,
            folded: 0,
            last_passed: sources.guard.last_passed(&Purge::everything()),
        }
    }

    /// Whether all of this purge is to be sent.
    fn is_untouched(&self, entry: &Entry) -> bool {
        entry.position > self.flushed && !entry.purge.targets.iter().any(|target| self.is_refused(entry, target))
    }

    fn is_refused(&self, entry: &Entry, target: &Target) -> bool {
        !self.refused.is_empty()
            && fingerprint(target)
                .is_some_and(|target| self.refused.iter().any(|refused| refused.includes(target, entry.position)))
    }

    /// What is left of a purge of which a flush covers a part, or the node refuses one; `None` for all others.
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

impl Batch {
    /// A step to `reaches` with nothing to send.
    fn nothing(reaches: Position) -> Self {
        Batch {
            left: VecDeque::new(),
            reaches: Some(reaches),
            is_flush: false,
            gap: None,
            owed: Owed::Nothing,
            folded: 0,
            last_passed: None,
        }
    }

    /// How many of those that are left make the node's list of bans longer.
    pub(super) fn listed(&self) -> usize {
        self.left.iter().filter(|item| item.ban.is_listed()).count()
    }

    /// Has a ban of everything sent behind what it sent.
    pub(super) fn flush_too(&mut self) {
        self.left.push_back(Item::new(Ban::Everything));
        self.is_flush = true;
    }

    /// Does the same as one ban of everything would.
    pub(super) fn widen(&mut self) {
        self.left.retain(|item| matches!(item.ban, Ban::Forward(_)));
        self.left.push_front(Item::new(Ban::Everything));
    }
}

/// How many of them are bans.
fn listed(bans: &[Ban]) -> usize {
    bans.iter().filter(|ban| ban.is_listed()).count()
}

/// Keeps so many entries that no more requests than allowed are handed on, and says where they end if that is early.
fn cut_after_requests(entries: &mut Vec<Arc<Entry>>) -> Option<Position> {
    let mut requests = 0;
    let full = entries.iter().position(|entry| {
        requests += entry.purge.targets.iter().filter(|target| matches!(target, Target::Forward(_))).count();
        requests >= MAX_REQUESTS
    })?;
    entries.truncate(full + 1);
    entries.last().map(|entry| entry.position)
}

/// Whether nobody would replay this: told without compiling any of it.
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

/// About how many bytes there are to compile.
fn weight(purge: &Purge) -> usize {
    let bytes = |target: &Target| match target {
        Target::Tags(tags) => tags.as_str().len(),
        Target::Pattern(pattern) | Target::Pool(pattern) => pattern.as_str().len(),
        Target::All | Target::Everything | Target::Forward(_) => 0,
    };
    purge.targets.iter().map(bytes).sum()
}
