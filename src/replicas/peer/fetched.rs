//! Whether another replica and this one know the same purged names and blocks.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// Whether the purged names of another replica are known here, and ours there.
#[derive(Debug, Default)]
pub(in super::super) struct PeerNames {
    /// A [`Fetched`].
    fetched: AtomicU8,
    /// It has asked for ours.
    given: AtomicBool,
    /// Its journal; 0 until that is known.
    journal: AtomicU64,
}

/// Whether the names of another replica are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(in super::super) enum Fetched {
    /// Not yet.
    NotYet,
    /// They are.
    Yes,
    /// It does not seal answers.
    Never,
}

impl PeerNames {
    /// Whether its names are here.
    pub(in super::super) fn fetched(&self) -> Fetched {
        let state = self.fetched.load(Ordering::SeqCst);
        [Fetched::Yes, Fetched::Never].into_iter().find(|known| *known as u8 == state).unwrap_or(Fetched::NotYet)
    }

    /// Records that.
    pub(in super::super) fn set_fetched(&self, fetched: Fetched) {
        self.fetched.store(fetched as u8, Ordering::SeqCst);
    }

    /// Records that it asks for our names.
    pub(in super::super) fn set_given(&self) {
        self.given.store(true, Ordering::SeqCst);
    }

    /// Its journal, once known.
    pub(in super::super) fn journal(&self) -> Option<u64> {
        Some(self.journal.load(Ordering::SeqCst)).filter(|journal| *journal > 0)
    }

    /// Records its journal.
    pub(in super::super) fn set_journal(&self, journal: u64) {
        self.journal.store(journal, Ordering::SeqCst);
    }

    /// Whether it may rely on being told of each block.
    pub(in super::super) fn may_rely_on_us(&self) -> bool {
        self.fetched() == Fetched::Yes || self.given.load(Ordering::SeqCst)
    }
}
