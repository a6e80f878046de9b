//! The newest entries, in memory, within limits: all that readers ever see of a journal.
//!
//! The entries and the head change together under one lock, and the entries held are always the ones directly before
//! the head. So the first position held is arithmetic instead of a second fact that could disagree.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::watch;

use super::{Entry, Limits, Missed, Position};
use crate::purge::{Guard, Purge, Target};

/// The newest entries of a journal. Any number of readers, one writer at a time.
pub(super) struct Tail {
    limits: Limits,
    guard: Arc<Guard>,
    held: RwLock<Held>,
    // Changes only while `held` is locked for writing.
    head: watch::Sender<Position>,
}

#[derive(Default)]
struct Held {
    entries: VecDeque<Arc<Entry>>,
    bytes: usize,
}

impl Tail {
    /// A tail that ends at `head` and holds of `entries` (in order, without holes, the last one at `head`) what the
    /// limits allow at `now_ms`. Those are no news to the guard: no request that it watches over is older.
    pub(super) fn new(
        limits: Limits,
        guard: Arc<Guard>,
        head: Position,
        entries: Vec<Arc<Entry>>,
        now_ms: u64,
    ) -> Self {
        let mut held = Held::default();
        held.extend(entries);
        held.trim(&limits, now_ms);
        Tail { limits, guard, held: RwLock::new(held), head: watch::Sender::new(head) }
    }

    /// The last position.
    pub(super) fn head(&self) -> Position {
        *self.head.borrow()
    }

    /// The last position, for waiting.
    pub(super) fn watch(&self) -> watch::Receiver<Position> {
        self.head.subscribe()
    }

    /// The position of the oldest entry held; one past the head when there is none.
    pub(super) fn first(&self) -> Position {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.first(self.head())
    }

    /// The last position that was given longer ago than this; the one before the oldest held where all are younger.
    pub(super) fn older_than(&self, age: Duration, now_ms: u64) -> Position {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        // From the end, where it is: the clock may have been set back, so the times need not be in order.
        let younger = held
            .entries
            .iter()
            .rev()
            .take_while(|entry| u128::from(now_ms.saturating_sub(entry.at_ms)) <= age.as_millis())
            .count();
        self.head() - younger as Position
    }

    /// What lies after `cursor`.
    pub(super) fn since(&self, cursor: Position) -> Missed {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        let head = self.head();
        let first = held.first(head);
        if cursor > head || cursor + 1 < first {
            return Missed::Gap;
        }
        // No more than the number of entries, which is a usize.
        let known = (cursor + 1 - first) as usize;
        Missed::Entries(held.entries.range(known..).cloned().collect())
    }

    /// Makes entries readable and moves the head to the last one. They follow the head without a hole, and they are
    /// durable already: whoever sees the head move may rely on them, and on the guard's knowing them.
    pub(super) fn publish(&self, entries: Vec<Arc<Entry>>, now_ms: u64) {
        let Some(head) = entries.last().map(|entry| entry.position) else { return };
        // Before anybody can read them, and so before any Varnish is told.
        entries.iter().for_each(|entry| self.guard.note(&entry.purge));
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        held.extend(entries);
        held.trim(&self.limits, now_ms);
        self.head.send_replace(head);
    }
}

impl Held {
    fn first(&self, head: Position) -> Position {
        head + 1 - self.entries.len() as Position
    }

    fn extend(&mut self, entries: Vec<Arc<Entry>>) {
        self.bytes += entries.iter().map(|entry| footprint(&entry.purge)).sum::<usize>();
        self.entries.extend(entries);
    }

    fn trim(&mut self, limits: &Limits, now_ms: u64) {
        while let Some(oldest) = self.entries.front() {
            let fits = self.entries.len() <= limits.max_entries && self.bytes <= limits.max_bytes;
            if fits && !limits.retires(oldest.at_ms, now_ms) {
                return;
            }
            self.bytes -= footprint(&oldest.purge);
            self.entries.pop_front();
        }
    }
}

/// About how many bytes of memory an entry takes. A string counts with its pointer, its length and its share of the
/// allocator, a set of tags is one string.
fn footprint(purge: &Purge) -> usize {
    const STRING: usize = 40;
    let string = |text: &str| STRING + text.len();
    let target = |target: &Target| match target {
        Target::Everything => 0,
        Target::Tags(tags) => string(tags.as_str()),
        Target::Pattern(pattern) | Target::Pool(pattern) => string(pattern.as_str()),
        Target::Forward(forward) => {
            let headers = forward.headers.iter().map(|(name, value)| string(name) + string(value));
            string(&forward.method) + string(&forward.target) + headers.sum::<usize>()
        }
    };
    size_of::<Entry>() + purge.targets.iter().map(|one| size_of::<Target>() + target(one)).sum::<usize>()
}
