//! The newest entries, in memory, within limits: all that readers ever see of a journal.
//!
//! The entries, the head and the floor change together under one lock: every entry after the floor up to the head is
//! held, and none up to the floor. Positions have holes (a shared journal's are revisions of etcd), so what a cursor
//! misses is searched for and not counted.
//!
//! Of what retires one position stays: the newest purge that a flush may leave ([`Tail::uncovered`]). One is enough, as a
//! node that missed any of them is in the same doubt. A purge that was refused to its sender promised nothing, and leaves
//! none.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;

use super::{Entry, Lag, Limits, Missed, Position, PurgeObserver};
use crate::purge::{Purge, Target};

/// The newest entries of a journal. Any number of readers, one writer at a time.
pub(super) struct Tail {
    limits: Limits,
    observer: PurgeObserver,
    held: RwLock<Held>,
    // Changes only while `held` is locked for writing.
    head: watch::Sender<Position>,
}

/// What a tail begins with.
#[derive(Default)]
pub(super) struct Past {
    /// Nothing up to here is held, and all that there is after it.
    pub(super) floor: Position,
    pub(super) head: Position,
    /// In order.
    pub(super) entries: Vec<Arc<Entry>>,
    /// Those of them that were refused to their senders.
    pub(super) refused: BTreeSet<Position>,
    /// The newest purge up to the floor that a flush may leave; 0 if there is none.
    pub(super) uncovered: Position,
}

#[derive(Default)]
struct Held {
    entries: VecDeque<Arc<Entry>>,
    bytes: usize,
    /// Nothing up to here is held.
    floor: Position,
    refused: BTreeSet<Position>,
    uncovered: Position,
    /// The newest that a flush may leave of what was ever held, also if it was refused.
    newest_handed_on: Position,
}

impl Tail {
    /// A tail that holds of this past what the limits allow at `now_ms`. The observer is not told of
    /// its entries.
    pub(super) fn new(limits: Limits, observer: PurgeObserver, past: Past, now_ms: u64) -> Self {
        let Past { floor, head, entries, refused, uncovered } = past;
        let mut held = Held { floor, refused, uncovered, ..Held::default() };
        held.extend(entries);
        held.trim(&limits, now_ms);
        Tail { limits, observer, held: RwLock::new(held), head: watch::Sender::new(head) }
    }

    /// The last position.
    pub(super) fn head(&self) -> Position {
        *self.head.borrow()
    }

    /// The last position, for waiting.
    pub(super) fn watch(&self) -> watch::Receiver<Position> {
        self.head.subscribe()
    }

    /// Everything after this is held, and nothing before.
    pub(super) fn floor(&self) -> Position {
        self.held.read().floor
    }

    /// The senders of these purges were told that nodes do not take them.
    pub(super) fn refuse(&self, positions: &[Position]) {
        let mut held = self.held.write();
        let floor = held.floor;
        held.refused.extend(positions.iter().filter(|position| **position > floor));
    }

    /// Whether the sender of this purge was told so.
    pub(super) fn is_refused(&self, position: Position) -> bool {
        self.held.read().refused.contains(&position)
    }

    /// The newest purge that is not held any more and that a flush may leave; 0 if there is none.
    pub(super) fn uncovered(&self) -> Position {
        self.held.read().uncovered
    }

    /// The same if nothing of what is held were, and nobody knew what was refused.
    pub(super) fn uncovered_by_nothing(&self) -> Position {
        let held = self.held.read();
        held.uncovered.max(held.newest_handed_on)
    }

    /// The same once nothing up to this position is held.
    pub(super) fn uncovered_at(&self, floor: Position) -> Position {
        let held = self.held.read();
        let retiring = held.entries.iter().take_while(|entry| entry.position <= floor);
        retiring.filter(|entry| held.leaves_doubt(entry)).map(|entry| entry.position).max().unwrap_or(held.uncovered)
    }

    /// The last position that was given longer ago than this; the one before the oldest held where all are younger.
    pub(super) fn older_than(&self, age: Duration, now_ms: u64) -> Position {
        let held = self.held.read();
        // From the end, where it is: the clock may have been set back, so the times need not be in order.
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

    /// What lies after `cursor`.
    pub(super) fn since(&self, cursor: Position) -> Missed {
        let held = self.held.read();
        if cursor > self.head() || cursor < held.floor {
            return Missed::Truncated;
        }
        Missed::Entries(held.entries.range(held.known_to(cursor)..).cloned().collect())
    }

    /// How much lies after `cursor`.
    pub(super) fn lag(&self, cursor: Position) -> Lag {
        let held = self.held.read();
        let known = held.known_to(cursor);
        let missed = held.entries.len() - known;
        if cursor > self.head() || cursor < held.floor {
            // One at least, of which nobody knows any more when it was accepted.
            return Lag { entries: missed.max(1), oldest_ms: None };
        }
        Lag { entries: missed, oldest_ms: held.entries.get(known).map(|entry| entry.at_ms) }
    }

    /// Makes entries readable and moves the head to the last one. They follow the head, and they are durable already:
    /// whoever sees the head move may rely on them, and on the observer's knowing them.
    pub(super) fn publish(&self, entries: Vec<Arc<Entry>>, now_ms: u64) {
        let Some(head) = entries.last().map(|entry| entry.position) else { return };
        // Before anybody can read them, and so before any Varnish is told.
        entries.iter().for_each(|entry| (self.observer)(entry));
        let mut held = self.held.write();
        held.extend(entries);
        held.trim(&self.limits, now_ms);
        self.head.send_replace(head);
    }

    /// Lets go of what is too old at `now_ms`, where nothing new comes.
    pub(super) fn retire(&self, now_ms: u64) {
        self.held.write().trim(&self.limits, now_ms);
    }

    /// What lies before `position` is not known, or not all of it: nothing up to there is held any more, and the head is
    /// there at least.
    pub(super) fn forget_up_to(&self, position: Position) {
        let mut held = self.held.write();
        while held.entries.front().is_some_and(|oldest| oldest.position <= position) {
            held.drop_oldest();
        }
        held.floor = held.floor.max(position);
        self.head.send_if_modified(|head| {
            let moves = *head < position;
            *head = position.max(*head);
            moves
        });
    }
}

impl Held {
    /// How many of the entries are not after `cursor`.
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
            if self.leaves_doubt(&oldest) {
                self.uncovered = oldest.position;
            }
            self.refused.remove(&oldest.position);
        }
    }

    /// Whether a node that missed it may hold what a flush leaves.
    fn leaves_doubt(&self, entry: &Entry) -> bool {
        entry.purge.is_handed_on() && !self.refused.contains(&entry.position)
    }
}

/// About how many bytes of memory an entry takes. A string counts with its pointer, its length and its share of the
/// allocator, a set of tags is one string.
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
