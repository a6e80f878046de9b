//! An index of recently purged names (tags, paths): a fixed table that workers read without a lock.
//!
//! A bucket is one cache line: seven entries, each the sequence of a purge with a fingerprint of the name, and the
//! **floor**, the newest sequence that was ever evicted. A query about a time before the floor is answered "purged",
//! because the evicted entry may have been that name. So memory is fixed, and errors go to one side only.
//!
//! A page has some thirty names, and each is in another bucket of a table that is larger than any cache of the processor.
//! Most buckets are empty all the same: a bit for each says so, and all bits together fit into its second level.
//!
//! There is one writer at a time. It raises the floor before it overwrites an entry (release), and a reader reads the
//! floor after the entries (acquire): a reader that finds an entry replaced also sees its floor.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::mutants::Mutant;

/// Entries of a bucket: what fits into a cache line beside the floor.
pub(crate) const WAYS: usize = 7;

/// Bits of an entry that distinguish names of one bucket: a false match happens once in 150,000 times. The remaining
/// bits count purges, enough for 10,000 a second for half a century.
const FINGERPRINT: u32 = 20;

/// Recently purged names, by hash.
pub(crate) struct Index {
    /// The number of buckets is a power of two.
    buckets: Box<[Bucket]>,
    /// A bit for each bucket, set before its first entry.
    used: Box<[AtomicU64]>,
}

#[derive(Default)]
#[repr(align(64))]
struct Bucket {
    floor: AtomicU64,
    entries: [AtomicU64; WAYS],
}

impl Index {
    /// An empty index of `buckets` buckets of 64 bytes, rounded up to a power of two.
    pub(crate) fn new(buckets: usize) -> Self {
        let buckets = buckets.next_power_of_two();
        let words = buckets.div_ceil(u64::BITS as usize);
        Index {
            buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            used: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Records that a name is purged with this sequence. Sequences do not decrease, and there is one caller at a time.
    pub(crate) fn insert(&self, hash: u64, sequence: u64) {
        if Mutant::LostName.lives() && hash.is_multiple_of(2) {
            return;
        }
        let number = self.number(hash);
        let (bucket, (word, bit)) = (&self.buckets[number], used_bit(number));
        self.used[word].fetch_or(bit, Ordering::Relaxed);
        let entries = || bucket.entries.iter();
        let same = entries().find(|entry| fingerprint(entry.load(Ordering::Relaxed)) == fingerprint_of(hash));
        // The sequence is in the high bits, so the smallest entry is the oldest (or empty).
        let Some(entry) = same.or_else(|| entries().min_by_key(|entry| entry.load(Ordering::Relaxed))) else { return };
        if same.is_none() && !Mutant::LostFloor.lives() {
            // The floor never falls: entries still in the bucket are newer than evicted ones.
            bucket.floor.store(sequence_of(entry.load(Ordering::Relaxed)), Ordering::Relaxed);
        }
        entry.store(sequence << FINGERPRINT | fingerprint_of(hash), Ordering::Release);
    }

    /// Whether this name may have been purged with a sequence after `began`.
    pub(crate) fn has_since(&self, hash: u64, began: u64) -> bool {
        self.last(hash) > began
    }

    /// The highest sequence with which this name may have been purged; 0 if it cannot have been.
    pub(crate) fn last(&self, hash: u64) -> u64 {
        let number = self.number(hash);
        let (bucket, (word, bit)) = (&self.buckets[number], used_bit(number));
        // A reader that must know of a purge has loaded what was stored after it, and so sees the bit.
        if self.used[word].load(Ordering::Relaxed) & bit == 0 {
            return 0;
        }
        let of_name = |entry: &AtomicU64| {
            let entry = entry.load(Ordering::Acquire);
            if fingerprint(entry) == fingerprint_of(hash) { sequence_of(entry) } else { 0 }
        };
        let known = bucket.entries.iter().map(of_name).max().unwrap_or(0);
        known.max(bucket.floor.load(Ordering::Relaxed))
    }

    /// The number of buckets.
    pub(crate) fn buckets(&self) -> usize {
        self.buckets.len()
    }

    /// Each bucket that is not empty, by its number: the floor and the entries.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (usize, [u64; 1 + WAYS])> {
        let rows = self.buckets.iter().map(|bucket| {
            let mut row = [0; 1 + WAYS];
            for (value, entry) in row[1..].iter_mut().zip(&bucket.entries) {
                *value = entry.load(Ordering::Acquire);
            }
            // Last: whoever finds an entry replaced also finds its floor.
            row[0] = bucket.floor.load(Ordering::Relaxed);
            row
        });
        rows.enumerate().filter(|(_, row)| row.iter().any(|value| *value > 0))
    }

    /// Puts a [row](Index::rows) of an index of the same size into this one, which is not shared yet. Returns whether there is
    /// a bucket with this number.
    pub(crate) fn set_row(&mut self, number: usize, row: [u64; 1 + WAYS]) -> bool {
        let Some(bucket) = self.buckets.get_mut(number) else { return false };
        let (word, bit) = used_bit(number);
        *self.used[word].get_mut() |= bit;
        *bucket.floor.get_mut() = row[0];
        for (entry, value) in bucket.entries.iter_mut().zip(&row[1..]) {
            *entry.get_mut() = *value;
        }
        true
    }

    /// The bucket of a name.
    fn number(&self, hash: u64) -> usize {
        // A power of two, so the mask is within the table.
        hash as usize & (self.buckets.len() - 1)
    }
}

/// Where the bit of a bucket is: the number of the word, and the word with this bit alone.
fn used_bit(bucket: usize) -> (usize, u64) {
    let bits = u64::BITS as usize;
    (bucket / bits, 1 << (bucket % bits))
}

/// The high bits of the hash; the low ones chose the bucket.
fn fingerprint_of(hash: u64) -> u64 {
    hash >> (u64::BITS - FINGERPRINT)
}

fn fingerprint(entry: u64) -> u64 {
    entry & ((1 << FINGERPRINT) - 1)
}

fn sequence_of(entry: u64) -> u64 {
    entry >> FINGERPRINT
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    fn hash(name: u64) -> u64 {
        xxh3_64(&name.to_le_bytes())
    }

    proptest! {
        #[test]
        fn what_was_purged_since_is_found_and_little_else(
            purged in prop::collection::vec(0..200_u64, 1..300),
            asked in 0..200_u64,
            age in 0..300_u64,
            buckets in 1..16_usize,
        ) {
            let index = Index::new(buckets);
            let mut model = HashMap::new();
            for (sequence, name) in (1..).zip(&purged) {
                index.insert(hash(*name), sequence);
                model.insert(*name, sequence);
            }
            let began = (purged.len() as u64).saturating_sub(age);
            let since: BTreeSet<u64> = purged.iter().skip(began as usize).copied().collect();
            let found = index.has_since(hash(asked), began);
            if model.get(&asked).is_some_and(|&sequence| sequence > began) {
                prop_assert!(found);
            } else if since.len() <= WAYS {
                // Up to WAYS names fit into any bucket without evicting each other.
                prop_assert!(!found);
            }
        }
    }

    #[test]
    fn a_query_before_the_floor_is_answered_purged_and_one_after_it_is_not() {
        let index = Index::new(1);
        (1..=8).for_each(|sequence| index.insert(hash(sequence), sequence));
        assert!(index.has_since(hash(99), 0), "purge 1 was pushed out");
        assert!(!index.has_since(hash(99), 1));
        assert!(index.has_since(hash(8), 7) && !index.has_since(hash(8), 8));
    }

    #[test]
    fn a_name_that_is_purged_again_takes_no_second_place() {
        let index = Index::new(1);
        (1..=1000).for_each(|sequence| index.insert(hash(sequence % 7), sequence));
        assert!(!index.has_since(hash(99), 0));
    }

    /// A reader that queries while the writer evicts names must find the name or the floor.
    #[test]
    fn readers_miss_nothing_while_the_table_turns_over() {
        let index = Index::new(1);
        let newest = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        // The next name to be evicted.
                        let sequence = newest.load(Ordering::Acquire).saturating_sub(WAYS as u64 - 1);
                        assert!(sequence == 0 || index.has_since(hash(sequence), sequence - 1), "purge {sequence}");
                    }
                });
            }
            for sequence in 1..=300_000 {
                index.insert(hash(sequence), sequence);
                newest.store(sequence, Ordering::Release);
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
