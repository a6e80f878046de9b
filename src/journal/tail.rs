//! The newest entries in memory, within limits: all that readers see of a journal.
//!
//! The entries, the head and the floor change together under one lock: all entries after the floor up to the head are held,
//! and none up to the floor. Positions have gaps (those of a shared journal are etcd revisions), so the backlog of a cursor
//! is found by search and not by subtraction.
//!
//! One position outlives its entry: the newest dropped purge that a flush may not cover ([`Tail::uncovered`]). One is
//! enough, because the doubt is the same for a node that missed any of them. A refused purge promised nothing, so it leaves
//! no doubt.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;

use super::{Entry, Lag, Limits, Missed, Position, PurgeObserver};
use crate::purge::{Purge, Target};
use crate::seal::PurgedNames;

/// The newest entries of a journal. Any number of readers, one writer at a time.
pub(super) struct Tail {
    limits: Limits,
    observer: PurgeObserver,
    purged: Option<Arc<PurgedNames>>,
    held: RwLock<Held>,
    // Changes only under the write lock of `held`.
    head: watch::Sender<Position>,
}

/// The initial content of a tail.
#[derive(Default)]
pub(super) struct Past {
    /// All entries after this position are held, and none up to it.
    pub(super) floor: Position,
    pub(super) head: Position,
    pub(super) entries: Vec<Arc<Entry>>,
    /// Those of them that were refused.
    pub(super) refused: BTreeSet<Position>,
    /// The newest purge up to the floor that a flush may not cover; 0 if there is none.
    pub(super) uncovered: Position,
    /// What seals are judged by; `None` if answers cannot be sealed.
    pub(super) purged: Option<Arc<PurgedNames>>,
}

#[derive(Default)]
struct Held {
    entries: VecDeque<Arc<Entry>>,
    bytes: usize,
    /// No entry up to here is held.
    floor: Position,
    /// When the newest of those was accepted at the latest, in milliseconds since 1970; `None` if that is not known.
    dropped_ms: Option<u64>,
    refused: BTreeSet<Position>,
    uncovered: Position,
    /// The newest purge ever held that a flush may not cover, whether or not it was refused.
    newest_handed_on: Position,
}

impl Tail {
    /// A tail with the part of this content that is within the limits at `now_ms`. The observer is not called with these
    /// entries.
    pub(super) fn new(limits: Limits, observer: PurgeObserver, past: Past, now_ms: u64) -> Self {
        let Past { floor, head, entries, refused, uncovered, purged } = past;
        let is_floor_unknown = floor > 0 && entries.is_empty();
        let mut held = Held { floor, refused, uncovered, ..Held::default() };
        held.extend(entries);
        // Where there is room, an earlier process has dropped only what was too old.
        let has_room = held.entries.len() < limits.max_entries && held.bytes <= limits.max_bytes / 2;
        let retention_ms = u64::try_from(limits.retention.as_millis()).unwrap_or(u64::MAX);
        held.dropped_ms = match (floor, is_floor_unknown) {
            (0, _) => Some(0),
            (_, true) => None,
            (_, false) => Some(if has_room { now_ms.saturating_sub(retention_ms) } else { now_ms }),
        };
        held.trim(&limits, now_ms);
        Tail { limits, observer, purged, held: RwLock::new(held), head: watch::Sender::new(head) }
    }

    /// What seals are judged by; `None` if answers cannot be sealed.
    pub(super) fn purged(&self) -> Option<&Arc<PurgedNames>> {
        self.purged.as_ref()
    }

    pub(super) fn head(&self) -> Position {
        *self.head.borrow()
    }

    /// The head, to wait for its moves.
    pub(super) fn watch(&self) -> watch::Receiver<Position> {
        self.head.subscribe()
    }

    /// All entries after this position are held, and none up to it.
    pub(super) fn floor(&self) -> Position {
        self.held.read().floor
    }

    /// Marks these purges as refused to their senders.
    pub(super) fn refuse(&self, positions: &[Position]) {
        let mut held = self.held.write();
        let floor = held.floor;
        held.refused.extend(positions.iter().filter(|position| **position > floor));
    }

    /// Whether this purge was refused to its sender.
    pub(super) fn is_refused(&self, position: Position) -> bool {
        self.held.read().refused.contains(&position)
    }

    /// The newest dropped purge that a flush may not cover; 0 if there is none.
    pub(super) fn uncovered(&self) -> Position {
        self.held.read().uncovered
    }

    /// The same if all held entries were dropped, and no refusal were known.
    pub(super) fn uncovered_by_nothing(&self) -> Position {
        let held = self.held.read();
        held.uncovered.max(held.newest_handed_on)
    }

    /// The same once all entries up to this position are dropped.
    pub(super) fn uncovered_at(&self, floor: Position) -> Position {
        let held = self.held.read();
        let retiring = held.entries.iter().take_while(|entry| entry.position <= floor);
        retiring.filter(|entry| held.leaves_doubt(entry)).map(|entry| entry.position).max().unwrap_or(held.uncovered)
    }

    /// The last position that is older than this; if all held entries are younger, the position before the oldest.
    pub(super) fn older_than(&self, age: Duration, now_ms: u64) -> Position {
        let held = self.held.read();
        // Searched from the end: the clock may have been set back, so the times need not be in order.
        let younger = held
            .entries
            .iter()
            .rev()
            .take_while(|entry| u128::from(now_ms.saturating_sub(entry.at_ms)) <= age.as_millis())
            .count();
        match held.entries.len() - younger {
            _ if younger == 0 => self.head(),
            0 => held.floor,
            older => held.entries[older - 1].position,
        }
    }

    /// Whether an entry that is no longer held may be younger than this.
    pub(super) fn may_have_dropped(&self, age: Duration, now_ms: u64) -> bool {
        let (before, head) = (self.older_than(age, now_ms), self.head());
        let held = self.held.read();
        if before != held.floor || before == 0 {
            return false;
        }
        match held.dropped_ms {
            Some(dropped_ms) => u128::from(now_ms.saturating_sub(dropped_ms)) <= age.as_millis(),
            None => before < head,
        }
    }

    /// The entries after `cursor`.
    pub(super) fn since(&self, cursor: Position) -> Missed {
        let held = self.held.read();
        if cursor > self.head() || cursor < held.floor {
            return Missed::Truncated;
        }
        Missed::Entries(held.entries.range(held.known_to(cursor)..).cloned().collect())
    }

    /// The backlog of `cursor`.
    pub(super) fn lag(&self, cursor: Position) -> Lag {
        let held = self.held.read();
        let known = held.known_to(cursor);
        let missed = held.entries.len() - known;
        if cursor > self.head() || cursor < held.floor {
            // At least one entry, whose time is no longer known.
            return Lag { entries: missed.max(1), oldest_ms: None };
        }
        Lag { entries: missed, oldest_ms: held.entries.get(known).map(|entry| entry.at_ms) }
    }

    /// Makes entries readable, and moves the head to the last one. They follow the head and are durable: readers that see
    /// the head move may rely on both, and on the observer having been called.
    pub(super) fn publish(&self, entries: Vec<Arc<Entry>>, now_ms: u64) {
        let Some(head) = entries.last().map(|entry| entry.position) else { return };
        // Before any reader sees them, and so before any delivery.
        for entry in &entries {
            if let Some(purged) = &self.purged {
                purged.note(entry.position, &entry.purge);
            }
            (self.observer)(entry);
        }
        let mut held = self.held.write();
        held.extend(entries);
        held.trim(&self.limits, now_ms);
        self.head.send_replace(head);
    }

    /// Drops entries that are past their retention at `now_ms`.
    pub(super) fn retire(&self, now_ms: u64) {
        self.held.write().trim(&self.limits, now_ms);
    }

    /// Drops everything up to `position`, which may be incomplete, and moves the head there at least.
    pub(super) fn forget_up_to(&self, position: Position) {
        if let Some(purged) = &self.purged {
            purged.forget_up_to(position);
        }
        let mut held = self.held.write();
        while held.entries.front().is_some_and(|oldest| oldest.position <= position) {
            held.drop_oldest();
        }
        if held.floor < position {
            (held.floor, held.dropped_ms) = (position, None);
        }
        self.head.send_if_modified(|head| {
            let moves = *head < position;
            *head = position.max(*head);
            moves
        });
    }
}

impl Held {
    /// The number of entries up to `cursor`.
    fn known_to(&self, cursor: Position) -> usize {
        self.entries.partition_point(|entry| entry.position <= cursor)
    }

    fn extend(&mut self, entries: Vec<Arc<Entry>>) {
        self.bytes += entries.iter().map(|entry| footprint(&entry.purge)).sum::<usize>();
        let newest = entries.iter().rev().find(|entry| entry.purge.is_handed_on());
        self.newest_handed_on = newest.map_or(self.newest_handed_on, |entry| entry.position);
        self.entries.extend(entries);
    }

    fn trim(&mut self, limits: &Limits, now_ms: u64) {
        while let Some(oldest) = self.entries.front() {
            let fits = self.entries.len() <= limits.max_entries && self.bytes <= limits.max_bytes;
            if fits && !limits.retires(oldest.at_ms, now_ms) {
                return;
            }
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.entries.pop_front() {
            self.bytes -= footprint(&oldest.purge);
            self.floor = oldest.position;
            self.dropped_ms = self.dropped_ms.max(Some(oldest.at_ms));
            if self.leaves_doubt(&oldest) {
                self.uncovered = oldest.position;
            }
            self.refused.remove(&oldest.position);
        }
    }

    /// Whether a node that missed it may still have pages that a flush leaves.
    fn leaves_doubt(&self, entry: &Entry) -> bool {
        entry.purge.is_handed_on() && !self.refused.contains(&entry.position)
    }
}

/// The approximate size of an entry in memory, in bytes. A string includes its pointer, its length and its share of the
/// allocator; a set of tags is one string.
pub(super) fn footprint(purge: &Purge) -> usize {
    const STRING: usize = 40;
    let string = |text: &str| STRING + text.len();
    let target = |target: &Target| match target {
        Target::All | Target::Everything => 0,
        Target::Tags(tags) => string(tags.as_str()),
        Target::Pattern(pattern) | Target::Pool(pattern) => string(pattern.as_str()),
        Target::Forward(forward) => {
            let headers = forward.headers.iter().map(|(name, value)| string(name) + string(value));
            string(&forward.method) + string(&forward.target) + headers.sum::<usize>()
        }
    };
    size_of::<Entry>() + purge.targets.iter().map(|one| size_of::<Target>() + target(one)).sum::<usize>()
}
