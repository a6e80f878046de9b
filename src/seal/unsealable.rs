//! Tags that no seal shows.
//!
//! A page is put together by a cache that fills in blocks (ESI), and only the seal of the page itself comes with the answer. So a
//! purge of a tag that is on a block of some page must wait for every cache, as it would without seals. Such tags are
//! known by what passes the origin: the set is durable before the head of a block passes, and only ever grows. A tag counts
//! from the moment it is known; but each block that has it waits until it is durable, not only the first one. Otherwise the
//! second would be stored while the first still waits for a disk, or after that has failed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use super::Name;

/// The most tags that are remembered. Beyond it every tag is one.
const MAX_NAMES: usize = 100_000;

/// The tags of blocks, and of answers that cannot be sealed.
#[derive(Debug, Default)]
pub struct UnsealableTags {
    /// Each with whether it is durable.
    names: RwLock<HashMap<Name, bool>>,
    /// There were too many.
    is_full: AtomicBool,
    /// There are too many of those that are durable.
    is_full_for_good: AtomicBool,
}

impl UnsealableTags {
    /// A set with these names, which are durable.
    pub(super) fn new(names: impl IntoIterator<Item = Name>) -> Self {
        let tags = UnsealableTags::default();
        tags.settle(&names.into_iter().collect::<Vec<_>>());
        tags
    }

    /// Whether any of these is in it.
    pub fn has_any(&self, names: &[Name]) -> bool {
        self.is_full.load(Ordering::SeqCst) || {
            let known = self.names.read();
            names.iter().any(|name| known.contains_key(name))
        }
    }

    /// Those of these names that are not in it, or not durable yet.
    pub fn missing(&self, names: impl IntoIterator<Item = Name>) -> Vec<Name> {
        if self.is_full_for_good.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let known = self.names.read();
        names.into_iter().filter(|name| known.get(name) != Some(&true)).collect()
    }

    /// Adds names. From then on purges of them wait.
    pub fn insert(&self, names: &[Name]) {
        self.enter(names, false);
    }

    /// Adds names that are durable, or are now.
    pub fn settle(&self, names: &[Name]) {
        self.enter(names, true);
    }

    fn enter(&self, names: &[Name], durable: bool) {
        let mut known = self.names.write();
        for name in names {
            // Beyond the limit every tag counts, so only durable ones are of use: no disk that fails makes this grow.
            if durable || known.len() <= MAX_NAMES {
                *known.entry(*name).or_insert(false) |= durable;
            }
        }
        if known.len() > MAX_NAMES {
            self.is_full.store(true, Ordering::SeqCst);
            if durable && known.values().filter(|durable| **durable).count() > MAX_NAMES {
                self.is_full_for_good.store(true, Ordering::SeqCst);
            }
        }
    }

    /// How many are known. With more than 100,000 every tag is one.
    pub fn count(&self) -> usize {
        self.names.read().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(range: std::ops::Range<usize>) -> Vec<Name> {
        range.map(|n| Name::of_tag(n.to_string().as_bytes())).collect()
    }

    #[test]
    fn a_tag_of_a_block_stays_one() {
        let tags = UnsealableTags::new(names(0..2));
        assert!(tags.has_any(&names(1..9)) && !tags.has_any(&names(2..9)));
        assert_eq!(tags.missing(names(0..4)), names(2..4));
        tags.insert(&names(2..3));
        assert!(tags.has_any(&names(2..3)));
        assert_eq!(tags.count(), 3);
    }

    #[test]
    fn a_tag_is_missing_until_it_is_durable() {
        let tags = UnsealableTags::default();
        tags.insert(&names(0..2));
        assert!(tags.has_any(&names(0..1)) && tags.missing(names(0..2)) == names(0..2));
        tags.settle(&names(0..1));
        tags.insert(&names(0..1));
        assert_eq!(tags.missing(names(0..2)), names(1..2));
    }

    #[test]
    fn more_tags_than_are_remembered_are_missing_until_as_many_are_durable() {
        let tags = UnsealableTags::default();
        tags.insert(&names(0..MAX_NAMES + 9));
        assert!(tags.has_any(&names(MAX_NAMES + 9..MAX_NAMES + 10)));
        assert_eq!((tags.names.read().len(), tags.missing(names(0..1))), (MAX_NAMES + 1, names(0..1)));
        tags.settle(&names(0..MAX_NAMES + 1));
        assert_eq!(tags.missing(names(0..1)), vec![]);
    }

    #[test]
    fn beyond_what_is_remembered_every_tag_is_one() {
        let tags = UnsealableTags::new(names(0..MAX_NAMES));
        assert!(!tags.has_any(&names(MAX_NAMES..MAX_NAMES + 1)));
        tags.settle(&names(MAX_NAMES..MAX_NAMES + 1));
        assert!(tags.has_any(&names(MAX_NAMES + 1..MAX_NAMES + 2)));
        assert_eq!(tags.missing(names(MAX_NAMES + 1..MAX_NAMES + 2)), []);
    }
}
