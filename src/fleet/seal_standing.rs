//! Whether a Varnish returns the seals of answers, and whether everything in its cache was stored with one.
//!
//! Both are one word, because they depend on each other. What a Varnish stores while its VCL drops seals has none, or was
//! fetched without what tells a block from a page. So as long as a trial shows that, nothing makes its cache a sealed one, a
//! flush neither. And when it returns seals again, only a flush does that was sent after this was shown. Such a flush is told
//! from an earlier one by the number of doubts when it was sent.
//!
//! What is known by hearsay (what an earlier process saved, what another clearcoat says) is weaker: it counts only as long as
//! nothing here ever spoke against it. But that another clearcoat *sees* something without a seal in a cache counts against
//! whatever is known here, until that one has seen the cache empty.

use std::sync::atomic::{AtomicU64, Ordering};

/// What trials have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReturnsSeals {
    /// Nothing yet.
    Unknown,
    /// The node does not return seals, or not pass on what the edge says of a reader.
    No,
    /// It does both.
    Yes,
}

/// What one trial shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealsShown {
    /// The node returns seals, and passes on what the edge says of a reader.
    Returned,
    /// It does not.
    NotReturned,
    /// Purges take nothing out of it, as far as is seen from here: it counts as one that returns none. What is in its cache
    /// may be sealed all the same.
    NotPurged,
}

/// How often a cache was doubted before a flush of it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheDoubts(u64);

/// What is in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CacheContent {
    /// Nothing is known.
    Unknown,
    /// There may be something without a seal, as was seen here.
    Unsealed,
    /// Everything is sealed, as was said by an earlier process or another clearcoat.
    SaidSealed,
    /// Everything is sealed: it was seen to be empty.
    Sealed,
}

/// Whether purges that a seal shows need not wait for a Varnish.
#[derive(Debug, Default)]
pub struct SealStanding(AtomicU64);

/// The word as its parts: two bits, two bits, one bit, and the number of doubts.
#[derive(Clone, Copy)]
struct Parts {
    returns: ReturnsSeals,
    content: CacheContent,
    /// Another clearcoat has seen that there may be something without a seal.
    is_doubted_elsewhere: bool,
    doubts: u64,
}

impl Parts {
    fn of(word: u64) -> Self {
        let returns = match word & 3 {
            0 => ReturnsSeals::Unknown,
            1 => ReturnsSeals::No,
            _ => ReturnsSeals::Yes,
        };
        let content = match word >> 2 & 3 {
            0 => CacheContent::Unknown,
            1 => CacheContent::Unsealed,
            2 => CacheContent::SaidSealed,
            _ => CacheContent::Sealed,
        };
        Parts { returns, content, is_doubted_elsewhere: word >> 4 & 1 == 1, doubts: word >> 5 }
    }

    fn word(self) -> u64 {
        self.doubts << 5 | u64::from(self.is_doubted_elsewhere) << 4 | (self.content as u64) << 2 | self.returns as u64
    }

    /// Whether everything is sealed, as far as is known here.
    fn has_sealed_content(self) -> bool {
        matches!(self.content, CacheContent::SaidSealed | CacheContent::Sealed)
    }

    fn is_sealed(self) -> bool {
        self.has_sealed_content() && !self.is_doubted_elsewhere
    }

    /// There may be something without a seal.
    fn doubted(self) -> Self {
        Parts { content: CacheContent::Unsealed, doubts: self.doubts + 1, ..self }
    }

    /// Whether everything is sealed is not known any more.
    fn distrusted(self) -> Self {
        let content = if self.has_sealed_content() { CacheContent::Unknown } else { self.content };
        Parts { content, doubts: self.doubts + 1, ..self }
    }
}

impl SealStanding {
    fn parts(&self) -> Parts {
        Parts::of(self.0.load(Ordering::SeqCst))
    }

    /// Changes the parts, and returns what they were.
    fn change(&self, change: impl Fn(Parts) -> Parts) -> Parts {
        let mut before = self.0.load(Ordering::SeqCst);
        loop {
            let after = change(Parts::of(before)).word();
            match self.0.compare_exchange_weak(before, after, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Parts::of(before),
                Err(now) => before = now,
            }
        }
    }

    /// Whether purges that a seal shows need not wait for this Varnish: it returns the seals of answers, and everything in its
    /// cache was stored with one.
    pub fn is_sealing(&self) -> bool {
        let parts = self.parts();
        parts.returns == ReturnsSeals::Yes && parts.is_sealed()
    }

    /// What trials have shown last.
    pub fn returned(&self) -> ReturnsSeals {
        self.parts().returns
    }

    /// Whether everything in its cache was stored since answers are sealed, and so since the blocks of pages are known.
    pub fn cache_is_sealed(&self) -> bool {
        self.parts().is_sealed()
    }

    /// How often its cache was doubted.
    pub fn doubts(&self) -> CacheDoubts {
        CacheDoubts(self.parts().doubts)
    }

    /// Whether its cache was doubted in this process, and was not emptied since.
    pub fn is_in_doubt(&self) -> bool {
        let parts = self.parts();
        !parts.has_sealed_content() && parts.doubts > 0
    }

    /// Whether there may be something without a seal in its cache, as was seen in this process.
    pub fn is_seen_unsealed(&self) -> bool {
        self.parts().content == CacheContent::Unsealed
    }

    /// Whether everything in its cache is sealed, as was seen in this process, whatever others have seen.
    pub fn is_seen_sealed(&self) -> bool {
        self.parts().content == CacheContent::Sealed
    }

    /// Whether another clearcoat has seen that there may be something without a seal in its cache.
    pub fn is_doubted_elsewhere(&self) -> bool {
        self.parts().is_doubted_elsewhere
    }

    /// Records what a trial showed, and returns what was known before. If the node does not return seals, or did not until now,
    /// its cache is in doubt.
    pub fn record_trial(&self, shown: SealsShown) -> ReturnsSeals {
        let change = |parts: Parts| match shown {
            SealsShown::NotReturned => Parts { returns: ReturnsSeals::No, ..parts.doubted() },
            SealsShown::NotPurged => Parts { returns: ReturnsSeals::No, ..parts.distrusted() },
            SealsShown::Returned if parts.returns == ReturnsSeals::No => {
                Parts { returns: ReturnsSeals::Yes, ..parts.distrusted() }
            }
            SealsShown::Returned => Parts { returns: ReturnsSeals::Yes, ..parts },
        };
        self.change(change).returns
    }

    /// Records whether another clearcoat has seen that there may be something without a seal in its cache, and has not seen it
    /// empty since. Returns whether that is news.
    pub fn set_doubted_elsewhere(&self, is_doubted: bool) -> bool {
        let before = self.change(|parts| Parts { is_doubted_elsewhere: is_doubted, ..parts });
        before.is_doubted_elsewhere != is_doubted
    }

    /// Records that there may be something without a seal in its cache. Only a later flush makes it a sealed one.
    pub fn doubt(&self) {
        self.change(Parts::doubted);
    }

    /// Records that its cache is another one, of which nothing is known. If the node was seen not to return seals, that one may
    /// have something without a seal, too.
    pub fn forget_cache(&self) {
        self.change(|parts| match parts {
            Parts { returns: ReturnsSeals::No, content: CacheContent::Unsealed, .. } => parts,
            parts => Parts { content: CacheContent::Unknown, ..parts },
        });
    }

    /// Records that everything in its cache is sealed, as somebody says. Does not count if the cache was ever doubted here.
    pub fn hear_sealed(&self) {
        self.change(|parts| match parts {
            Parts { doubts: 0, content: CacheContent::Unknown, .. } => {
                Parts { content: CacheContent::SaidSealed, ..parts }
            }
            parts => parts,
        });
    }

    /// Records that somebody who knows says the contrary. What was seen here stays.
    pub fn hear_unsealed(&self) {
        self.change(|parts| match parts.content {
            CacheContent::SaidSealed => Parts { content: CacheContent::Unknown, ..parts },
            CacheContent::Unknown | CacheContent::Unsealed | CacheContent::Sealed => parts,
        });
    }

    /// Records that its cache has acknowledged a flush, before which it was doubted so often, or began empty then. It is a sealed
    /// one from now on, unless it was doubted since or the node does not return seals.
    pub fn record_emptied(&self, before: CacheDoubts) {
        self.change(|parts| match parts {
            Parts { returns: ReturnsSeals::Unknown | ReturnsSeals::Yes, doubts, .. } if doubts == before.0 => {
                Parts { content: CacheContent::Sealed, ..parts }
            }
            parts => parts,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::SealsShown::{NotPurged, NotReturned, Returned};
    use super::*;

    fn emptied(seals: &SealStanding) {
        seals.record_emptied(seals.doubts());
    }

    #[test]
    fn the_first_trial_leaves_the_cache_as_it_is() {
        let seals = SealStanding::default();
        emptied(&seals);
        assert_eq!((seals.returned(), seals.is_sealing()), (ReturnsSeals::Unknown, false));
        assert_eq!(seals.record_trial(Returned), ReturnsSeals::Unknown);
        assert!(seals.is_sealing() && !seals.is_in_doubt());
        assert_eq!(seals.record_trial(Returned), ReturnsSeals::Yes);
        assert!(seals.is_sealing());
    }

    #[test]
    fn what_is_stored_while_no_seals_are_returned_goes_with_a_later_flush() {
        // From the start, or after it had returned them.
        for (before, shown) in [(None, NotReturned), (Some(Returned), NotReturned), (Some(Returned), NotPurged)] {
            let seals = SealStanding::default();
            emptied(&seals);
            before.map(|before| seals.record_trial(before));
            seals.record_trial(shown);
            assert!(!seals.cache_is_sealed() && seals.is_in_doubt());
            // That it cannot be purged from here says nothing of what it has.
            assert_eq!(seals.is_seen_unsealed(), shown == NotReturned);
            emptied(&seals);
            assert!(!seals.cache_is_sealed(), "a flush while it still drops seals");
            let early = seals.doubts();
            seals.record_trial(shown);
            assert_eq!(seals.record_trial(Returned), ReturnsSeals::No);
            assert_eq!(seals.is_seen_unsealed(), shown == NotReturned);
            seals.record_emptied(early);
            assert!(!seals.is_sealing(), "a flush that was sent before it was shown to return them");
            seals.hear_sealed();
            assert!(!seals.is_sealing(), "whoever says so has not seen that");
            emptied(&seals);
            assert!(seals.is_sealing() && !seals.is_in_doubt());
        }
    }

    #[test]
    fn what_another_clearcoat_sees_counts_against_all_that_is_known_here() {
        let seals = SealStanding::default();
        seals.record_trial(Returned);
        emptied(&seals);
        assert!(seals.set_doubted_elsewhere(true) && !seals.set_doubted_elsewhere(true));
        assert!(!seals.is_sealing() && !seals.cache_is_sealed() && seals.is_seen_sealed());
        emptied(&seals);
        seals.hear_sealed();
        assert!(!seals.is_sealing(), "that one has not seen it empty");
        let doubts = seals.doubts();
        assert!(seals.set_doubted_elsewhere(false) && seals.is_sealing() && seals.doubts() == doubts);
        // Nothing here is doubted for that, so that no two clearcoats wait for each other.
        assert!(!seals.is_in_doubt());
    }

    #[test]
    fn what_is_said_of_a_cache_counts_until_somebody_knows_better() {
        let seals = SealStanding::default();
        seals.hear_sealed();
        assert!(seals.cache_is_sealed());
        seals.hear_unsealed();
        assert!(!seals.cache_is_sealed() && !seals.is_in_doubt());
        emptied(&seals);
        seals.hear_unsealed();
        assert!(seals.cache_is_sealed(), "what was seen here stays");
        seals.doubt();
        seals.hear_sealed();
        assert!(!seals.cache_is_sealed() && seals.is_in_doubt());
        seals.forget_cache();
        assert!(!seals.cache_is_sealed());
    }
}
