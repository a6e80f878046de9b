//! When a page with a name was last passed on, for the purges that come a moment after it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Names share a slot once in so many times: then a purge takes the time of another page for that of its own.
const SLOTS: usize = 1 << 16;

/// Times of pages, by the hashes of their names. A time is any number that grows; 0 is never.
pub(super) struct Passed {
    slots: Box<[NameSlot]>,
    any: AtomicU64,
    nameless: AtomicU64,
}

/// What is known of the names that share a slot.
#[derive(Default)]
struct NameSlot {
    /// When a page with one of them was last passed on.
    last: AtomicU64,
    /// How often one of them is in an answer that may be under way.
    open: AtomicU32,
}

impl Default for Passed {
    fn default() -> Self {
        let slots = (0..SLOTS).map(|_| NameSlot::default()).collect();
        Passed { slots, any: AtomicU64::new(0), nameless: AtomicU64::new(0) }
    }
}

impl Passed {
    /// Some page is passed on.
    pub(super) fn stamp_any(&self, at: u64) {
        self.any.fetch_max(at, Ordering::Relaxed);
    }

    /// A page whose names nobody can see is passed on: every purge may concern it.
    pub(super) fn stamp_nameless(&self, at: u64) {
        self.nameless.fetch_max(at, Ordering::Relaxed);
    }

    /// A page with this name is passed on. The greater time stays: a worker that was interrupted before it came here
    /// must not set the time back.
    pub(super) fn stamp(&self, hash: u64, at: u64) {
        self.slot(hash).last.fetch_max(at, Ordering::Relaxed);
    }

    /// An answer with this name is under way from now on.
    pub(super) fn open(&self, hash: u64) {
        self.slot(hash).open.fetch_add(1, Ordering::Release);
    }

    /// One is not any more.
    pub(super) fn close(&self, hash: u64) {
        self.slot(hash).open.fetch_sub(1, Ordering::Release);
    }

    /// Whether an answer that may have this name may be under way.
    pub(super) fn is_open(&self, hash: u64) -> bool {
        self.slot(hash).open.load(Ordering::Acquire) > 0
    }

    /// When a page that may have this name was last passed on.
    pub(super) fn last(&self, hash: u64) -> u64 {
        self.slot(hash).last.load(Ordering::Relaxed).max(self.nameless.load(Ordering::Relaxed))
    }

    /// When any page was last passed on.
    pub(super) fn last_any(&self) -> u64 {
        self.any.load(Ordering::Relaxed)
    }

    /// By bits that neither the index's bucket nor its fingerprint comes from.
    fn slot(&self, hash: u64) -> &NameSlot {
        &self.slots[(hash >> 24) as usize % SLOTS]
    }
}
