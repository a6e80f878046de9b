//! Unsealable tags: tags that may be missing from the seal of an answer that they concern.
//!
//! A cache assembles a page from blocks (ESI), but the answer has only the seal of the page itself. So a purge of a tag
//! on a block must wait for every cache, as it would without seals. The origin learns such tags from the answers that
//! pass it: they are durable before the head of the block passes, and are never removed. A tag is unsealable from the
//! moment it is known; but each block with it waits until it is durable and known to all clearcoats, not only the first one.
//! Otherwise a second block would be stored while the first still waits for the disk, or after that write has failed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use super::Name;

/// The maximum number of tags kept. If there are more, every tag counts as unsealable.
const MAX_NAMES: usize = 100_000;

/// How far it is known that a tag is unsealable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TagState {
    /// In memory.
    Noted,
    /// In the journal.
    Durable,
    /// By all clearcoats.
    Settled,
}

/// The tags of blocks, and of answers that cannot be sealed.
#[derive(Debug, Default)]
pub struct UnsealableTags {
    names: RwLock<HashMap<Name, TagState>>,
    /// Whether there were more tags than `MAX_NAMES`.
    is_full: AtomicBool,
    /// Whether more of them than `MAX_NAMES` are durable.
    is_full_on_disk: AtomicBool,
    /// Whether more of them than `MAX_NAMES` are settled.
    is_full_for_all: AtomicBool,
}

impl UnsealableTags {
    /// A set with these names, which are settled.
    pub(super) fn new(names: impl IntoIterator<Item = Name>) -> Self {
        let tags = UnsealableTags::default();
        tags.settle(&names.into_iter().collect::<Vec<_>>());
        tags
    }

    /// Whether any of these names is unsealable.
    pub fn has_any(&self, names: &[Name]) -> bool {
        self.is_full.load(Ordering::SeqCst) || {
            let known = self.names.read();
            names.iter().any(|name| known.contains_key(name))
        }
    }

    /// Those of these names that are not in the set, or not settled yet.
    pub fn missing(&self, names: impl IntoIterator<Item = Name>) -> Vec<Name> {
        if self.is_full_for_all.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let known = self.names.read();
        names.into_iter().filter(|name| known.get(name) != Some(&TagState::Settled)).collect()
    }

    /// Those of these names that are not in the set, or not durable yet.
    pub fn not_durable(&self, names: &[Name]) -> Vec<Name> {
        if self.is_full_on_disk.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let known = self.names.read();
        names.iter().filter(|name| known.get(name).is_none_or(|state| *state < TagState::Durable)).copied().collect()
    }

    /// Counts no tag as known to all clearcoats any more.
    pub fn unsettle(&self) {
        self.names.write().values_mut().for_each(|state| *state = TagState::Durable.min(*state));
        self.is_full_for_all.store(false, Ordering::SeqCst);
    }

    /// Adds names. From then on purges of them wait.
    pub fn insert(&self, names: &[Name]) {
        self.enter(names, TagState::Noted);
    }

    /// Records that names are durable.
    pub fn record_durable(&self, names: &[Name]) {
        self.enter(names, TagState::Durable);
    }

    /// Records that names are durable, and known to all clearcoats.
    pub fn settle(&self, names: &[Name]) {
        self.enter(names, TagState::Settled);
    }

    fn enter(&self, names: &[Name], state: TagState) {
        let mut known = self.names.write();
        for name in names {
            // Beyond the limit every tag counts as unsealable, so only durable ones are added: a failing disk must not
            // make the map grow.
            if state > TagState::Noted || known.len() <= MAX_NAMES {
                let known = known.entry(*name).or_insert(state);
                *known = state.max(*known);
            }
        }
        if known.len() > MAX_NAMES {
            self.is_full.store(true, Ordering::SeqCst);
            let is_full = |least: TagState| known.values().filter(|state| **state >= least).count() > MAX_NAMES;
            if state >= TagState::Durable && is_full(TagState::Durable) {
                self.is_full_on_disk.store(true, Ordering::SeqCst);
            }
            if state == TagState::Settled && is_full(TagState::Settled) {
                self.is_full_for_all.store(true, Ordering::SeqCst);
            }
        }
    }

    /// All known tags, in no order.
    pub fn all(&self) -> Vec<Name> {
        self.names.read().keys().copied().collect()
    }

    /// The number of known tags. With more than 100,000 every tag counts as unsealable.
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
    fn a_tag_is_written_once_and_missing_until_all_know_it() {
        let tags = UnsealableTags::default();
        tags.insert(&names(0..3));
        assert!(tags.has_any(&names(0..1)) && tags.missing(names(0..3)) == names(0..3));
        tags.record_durable(&names(0..2));
        tags.settle(&names(0..1));
        tags.insert(&names(0..3));
        assert_eq!((tags.not_durable(&names(0..3)), tags.missing(names(0..3))), (names(2..3), names(1..3)));
        tags.unsettle();
        assert_eq!((tags.not_durable(&names(0..3)), tags.missing(names(0..3))), (names(2..3), names(0..3)));
    }

    #[test]
    fn more_tags_than_are_remembered_are_missing_until_as_many_are_settled() {
        let tags = UnsealableTags::default();
        tags.insert(&names(0..MAX_NAMES + 9));
        assert!(tags.has_any(&names(MAX_NAMES + 9..MAX_NAMES + 10)));
        assert_eq!((tags.names.read().len(), tags.missing(names(0..1))), (MAX_NAMES + 1, names(0..1)));
        tags.record_durable(&names(0..MAX_NAMES + 1));
        let other = names(MAX_NAMES + 9..MAX_NAMES + 10);
        assert_eq!((tags.not_durable(&other), tags.missing(names(0..1))), (vec![], names(0..1)));
        tags.settle(&names(0..MAX_NAMES + 1));
        assert_eq!(tags.missing(other), vec![]);
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
