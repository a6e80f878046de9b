//! What is remembered of the ranks of nodes for a page: which are its first few, so that a page that is asked for again
//! costs no look at all nodes.
//!
//! A table that is computed in advance (Maglev, a ring) is as quick, but gives away what makes rendezvous hashing good:
//! with Maglev twice as many pages move as must, a ring spreads them unevenly, and either decides with a number of
//! slots, fixed for ever, how even the spread of how many nodes can be. This is a memo of an exact result: nothing depends on its size, and
//! losing all of it moves no page.
//!
//! One slot for each hash of a page, the last one asked for wins. Workers share it without a lock: a slot has two words,
//! `key ^ ranks` and `ranks`, and counts only if they belong together, so that a slot that two workers write at once is
//! nobody's (Hyatt and Mann, "A lock-less transposition table implementation", ICGA Journal 25(1), 2002).

use std::sync::atomic::{AtomicU64, Ordering};

/// How many nodes of a page are remembered: the word of 64 bits holds so many indices.
pub const REMEMBERED: usize = 4;

/// So many pages are remembered, in 1 MiB.
const SLOTS: usize = 1 << 16;

/// With fewer nodes a look at all of them is about as quick as one into memory, and for a new page quicker.
const WORTH_FROM: usize = 65;

/// Slots that are written while they are read.
#[derive(Debug)]
pub struct RankMemo {
    slots: Box<[Slot]>,
}

#[derive(Debug, Default)]
struct Slot {
    check: AtomicU64,
    ranks: AtomicU64,
}

/// The indices of the first nodes of a page among the members, the first one first.
pub type Ranks = [u16; REMEMBERED];

impl RankMemo {
    /// One for so many candidates, if they are neither too few nor too many for it.
    pub(super) fn for_nodes(candidates: usize) -> Option<Self> {
        let is_worth_it = (WORTH_FROM..=usize::from(u16::MAX)).contains(&candidates);
        is_worth_it.then(|| RankMemo { slots: (0..SLOTS).map(|_| Slot::default()).collect() })
    }

    /// What is remembered for this key.
    pub fn get(&self, key: u64) -> Option<Ranks> {
        let slot = self.slot(key);
        let (check, ranks) = (slot.check.load(Ordering::Relaxed), slot.ranks.load(Ordering::Relaxed));
        // Empty: no page has the same node four times.
        (check ^ ranks == key && ranks != 0).then(|| unpack(ranks))
    }

    /// Remembers it.
    pub fn put(&self, key: u64, ranks: Ranks) {
        let (slot, ranks) = (self.slot(key), pack(ranks));
        slot.check.store(key ^ ranks, Ordering::Relaxed);
        slot.ranks.store(ranks, Ordering::Relaxed);
    }

    fn slot(&self, key: u64) -> &Slot {
        &self.slots[key as usize % SLOTS]
    }
}

fn pack(ranks: Ranks) -> u64 {
    ranks.iter().fold(0, |word, &rank| word << 16 | u64::from(rank))
}

fn unpack(word: u64) -> Ranks {
    [word >> 48, word >> 32, word >> 16, word].map(|word| word as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_is_got_and_nothing_else() {
        let memo = RankMemo::for_nodes(1000).unwrap();
        assert_eq!([0, 1, u64::MAX].map(|key| memo.get(key)), [None; 3]);
        memo.put(5, [3, 65_535, 0, 7]);
        assert_eq!(memo.get(5), Some([3, 65_535, 0, 7]));
        let other = 5 + SLOTS as u64;
        assert_eq!(memo.get(other), None);
        memo.put(other, [1, 2, 3, 4]);
        assert_eq!((memo.get(5), memo.get(other)), (None, Some([1, 2, 3, 4])));
    }

    #[test]
    fn a_slot_that_two_have_written_is_nobodys() {
        let memo = RankMemo::for_nodes(1000).unwrap();
        memo.put(5, [1, 2, 3, 4]);
        let (check, ranks) = (memo.slot(5).check.load(Ordering::Relaxed), pack([5, 6, 7, 8]));
        // The second word of another page came between.
        memo.slot(5).ranks.store(ranks, Ordering::Relaxed);
        assert_eq!((memo.get(5), memo.slot(5).check.load(Ordering::Relaxed)), (None, check));
        assert_eq!(memo.get(5 + SLOTS as u64), None);
    }

    #[test]
    fn few_nodes_and_more_than_an_index_can_name_need_none() {
        assert!([0, 1, 64, 65_536].iter().all(|&nodes| RankMemo::for_nodes(nodes).is_none()));
        assert!([65, 65_535].iter().all(|&nodes| RankMemo::for_nodes(nodes).is_some()));
    }
}
