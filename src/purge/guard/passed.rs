//! When a page with a name last passed, for purges that arrive a moment later.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Two names share a slot once in this many times: a purge then takes another page's time for that of its own.
const SLOTS: usize = 1 << 16;

/// Times of pages, by the hashes of their names. A time is any increasing number; 0 is never.
pub(super) struct Passed {
    slots: Box<[NameSlot]>,
    any: AtomicU64,
    nameless: AtomicU64,
}

/// The state of the names that share a slot.
#[derive(Default)]
struct NameSlot {
    /// When a page with one of them last passed.
    last: AtomicU64,
    /// The number of answers with one of them that may be under way.
    open: AtomicU32,
}

impl Default for Passed {
    fn default() -> Self {
        let slots = (0..SLOTS).map(|_| NameSlot::default()).collect();
        Passed { slots, any: AtomicU64::new(0), nameless: AtomicU64::new(0) }
    }
}

impl Passed {
    /// Records that any page passes.
    pub(super) fn stamp_any(&self, at: u64) {
        self.any.fetch_max(at, Ordering::Relaxed);
    }

    /// Records that a page with unknown names passes: every purge may concern it.
    pub(super) fn stamp_nameless(&self, at: u64) {
        self.nameless.fetch_max(at, Ordering::Relaxed);
    }

    /// Records that a page with this name passes. The larger time wins: a worker that was preempted before this call
    /// must not set the time back.
    pub(super) fn stamp(&self, hash: u64, at: u64) {
        self.slot(hash).last.fetch_max(at, Ordering::Relaxed);
    }

    /// Records that an answer with this name is under way.
    pub(super) fn open(&self, hash: u64) {
        self.slot(hash).open.fetch_add(1, Ordering::Release);
    }

    /// Records that one is no longer under way.
    pub(super) fn close(&self, hash: u64) {
        self.slot(hash).open.fetch_sub(1, Ordering::Release);
    }

    /// Whether an answer that may have this name may be under way.
    pub(super) fn is_open(&self, hash: u64) -> bool {
        self.slot(hash).open.load(Ordering::Acquire) > 0
    }

    /// When a page that may have this name last passed.
    pub(super) fn last(&self, hash: u64) -> u64 {
        self.slot(hash).last.load(Ordering::Relaxed).max(self.nameless.load(Ordering::Relaxed))
    }

    /// When any page last passed.
    pub(super) fn last_any(&self) -> u64 {
        self.any.load(Ordering::Relaxed)
    }

    /// Uses other bits of the hash than the index's bucket and fingerprint.
    fn slot(&self, hash: u64) -> &NameSlot {
        &self.slots[(hash >> 24) as usize % SLOTS]
    }
}
