//! Whether this replica knows the purged names and blocks of another one.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Whether the purged names of another replica are known here.
#[derive(Debug, Default)]
pub(in super::super) struct PeerNames {
    /// A [`Fetched`].
    fetched: AtomicU8,
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

    /// Its journal, once known.
    pub(in super::super) fn journal(&self) -> Option<u64> {
        Some(self.journal.load(Ordering::SeqCst)).filter(|journal| *journal > 0)
    }

    /// Records its journal.
    pub(in super::super) fn set_journal(&self, journal: u64) {
        self.journal.store(journal, Ordering::SeqCst);
    }

    /// Whether it has to be told of each block: it seals answers, or may. Whether it has met us, or met this process under another
    /// address, is not known here.
    pub(in super::super) fn may_rely_on_us(&self) -> bool {
        self.fetched() != Fetched::Never
    }
}
