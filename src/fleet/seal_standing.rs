//! Whether a Varnish returns the seals of answers, and whether everything in its cache was stored with one.
//!
//! Both are one word, because they depend on each other. What a Varnish stores while its VCL drops seals has none, or was
//! fetched without what tells a block from a page. So as long as a trial shows that, nothing makes its cache a sealed one, a
//! flush neither. And when it returns seals again, only a flush does that was sent after this was shown. Such a flush is told
//! from an earlier one by the number of doubts when it was sent.
//!
//! What is known by hearsay (what an earlier process saved, what another clearcoat says) is weaker: it counts only as long as
//! nothing here ever spoke against it.

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

/// How often a cache was doubted before a flush of it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheDoubts(u64);

/// What is in a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CacheContent {
    /// There may be something without a seal.
    Unsealed,
    /// Everything is sealed, as was said by an earlier process or another clearcoat.
    SaidSealed,
    /// Everything is sealed: it was seen to be empty.
    Sealed,
}

/// Whether purges that a seal shows need not wait for a Varnish.
#[derive(Debug, Default)]
pub struct SealStanding(AtomicU64);

/// The word as its parts: two bits, two bits, and the number of doubts.
#[derive(Clone, Copy)]
struct Parts {
    returns: ReturnsSeals,
    content: CacheContent,
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
            0 => CacheContent::Unsealed,
            1 => CacheContent::SaidSealed,
            _ => CacheContent::Sealed,
        };
        Parts { returns, content, doubts: word >> 4 }
    }

    fn word(self) -> u64 {
        self.doubts << 4 | (self.content as u64) << 2 | self.returns as u64
    }

    fn doubted(self) -> Self {
        Parts { content: CacheContent::Unsealed, doubts: self.doubts + 1, ..self }
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
        let Parts { returns, content, .. } = self.parts();
        returns == ReturnsSeals::Yes && content != CacheContent::Unsealed
    }

    /// What trials have shown last.
    pub fn returned(&self) -> ReturnsSeals {
        self.parts().returns
    }

    /// Whether everything in its cache was stored since answers are sealed, and so since the blocks of pages are known.
    pub fn cache_is_sealed(&self) -> bool {
        self.parts().content != CacheContent::Unsealed
    }

    /// How often its cache was doubted.
    pub fn doubts(&self) -> CacheDoubts {
        CacheDoubts(self.parts().doubts)
    }

    /// Whether its cache was doubted in this process, and was not emptied since.
    pub fn is_in_doubt(&self) -> bool {
        let Parts { content, doubts, .. } = self.parts();
        content == CacheContent::Unsealed && doubts > 0
    }

    /// Records whether a trial showed that the node returns seals, and returns what was known before. If it does not, or did
    /// not until now, its cache is in doubt.
    pub fn record_trial(&self, returns_seals: bool) -> ReturnsSeals {
        let change = |parts: Parts| match returns_seals {
            false => Parts { returns: ReturnsSeals::No, ..parts.doubted() },
            true if parts.returns == ReturnsSeals::No => Parts { returns: ReturnsSeals::Yes, ..parts.doubted() },
            true => Parts { returns: ReturnsSeals::Yes, ..parts },
        };
        self.change(change).returns
    }

    /// Records that there may be something without a seal in its cache. Only a later flush makes it a sealed one.
    pub fn doubt(&self) {
        self.change(Parts::doubted);
    }

    /// Records that its cache is another one, of which nothing is known.
    pub fn forget_cache(&self) {
        self.change(|parts| Parts { content: CacheContent::Unsealed, ..parts });
    }

    /// Records that everything in its cache is sealed, as somebody says. Does not count if the cache was ever doubted here.
    pub fn hear_sealed(&self) {
        self.change(|parts| match parts {
            Parts { doubts: 0, content: CacheContent::Unsealed, .. } => {
                Parts { content: CacheContent::SaidSealed, ..parts }
            }
            parts => parts,
        });
    }

    /// Records that somebody who knows says the contrary. What was seen here stays.
    pub fn hear_unsealed(&self) {
        self.change(|parts| match parts.content {
            CacheContent::SaidSealed => Parts { content: CacheContent::Unsealed, ..parts },
            CacheContent::Unsealed | CacheContent::Sealed => parts,
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
    use super::*;

    fn emptied(seals: &SealStanding) {
        seals.record_emptied(seals.doubts());
    }

    #[test]
    fn the_first_trial_leaves_the_cache_as_it_is() {
        let seals = SealStanding::default();
        emptied(&seals);
        assert_eq!((seals.returned(), seals.is_sealing()), (ReturnsSeals::Unknown, false));
        assert_eq!(seals.record_trial(true), ReturnsSeals::Unknown);
        assert!(seals.is_sealing() && !seals.is_in_doubt());
        assert_eq!(seals.record_trial(true), ReturnsSeals::Yes);
        assert!(seals.is_sealing());
    }

    #[test]
    fn what_is_stored_while_no_seals_are_returned_goes_with_a_later_flush() {
        // From the start, or after it had returned them.
        for before in [None, Some(true)] {
            let seals = SealStanding::default();
            emptied(&seals);
            before.map(|returns| seals.record_trial(returns));
            seals.record_trial(false);
            assert!(!seals.cache_is_sealed() && seals.is_in_doubt());
            emptied(&seals);
            assert!(!seals.cache_is_sealed(), "a flush while it still drops seals");
            let early = seals.doubts();
            seals.record_trial(false);
            assert_eq!(seals.record_trial(true), ReturnsSeals::No);
            seals.record_emptied(early);
            assert!(!seals.is_sealing(), "a flush that was sent before it was shown to return them");
            seals.hear_sealed();
            assert!(!seals.is_sealing(), "whoever says so has not seen that");
            emptied(&seals);
            assert!(seals.is_sealing() && !seals.is_in_doubt());
        }
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
