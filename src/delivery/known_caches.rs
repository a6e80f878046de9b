//! In which caches everything is sealed, as an earlier process saved and as other clearcoats say.
//!
//! **What was saved** counts only when it is known what other clearcoats passed since. Until then it is kept aside, and saved
//! again, so that a process that ends before it knows that leaves it to the next one. It never counts again once one was there
//! that does not seal: that one may have filled caches of which nothing is known here.
//!
//! **What others say** comes once from each that is met. One that knows says of caches that they are *not* sealed, too, and that
//! outweighs whatever is saved here and said by anybody else: silence would be taken for ignorance.
//!
//! **What others see while they run** ([`SeenCaches`]) is said again with each change. A cache in which one of them has seen
//! something without a seal is a sealed one for nobody, until that one has seen it empty. Each says only what it has seen
//! itself, so that no two wait for each other. If it ends before, nobody knows when the cache is sealed again: then it counts as
//! seen here.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::fleet::NodeId;

/// Caches by their nodes, each with its epoch, if it has one.
type Epochs = HashMap<NodeId, Option<Arc<str>>>;

/// A cache: its node and its epoch.
type CacheOf<'a> = (&'a NodeId, Option<&'a Arc<str>>);

/// What a clearcoat knows of caches, each with its epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownCaches {
    /// Those in which everything is sealed.
    pub sealed: Vec<(NodeId, Option<Arc<str>>)>,
    /// Those in which something may not be. What is in neither list is not known.
    #[serde(default)]
    pub unsealed: Vec<(NodeId, Option<Arc<str>>)>,
}

/// The caches that a clearcoat has seen, for those that run beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenCaches {
    /// Grows with each change. 0: nothing was seen yet.
    pub serial: u64,
    /// Those in which there may be something without a seal.
    pub unsealed: Vec<(NodeId, Option<Arc<str>>)>,
    /// Those that were emptied, and in which everything is sealed since. What is in neither list stays as it was said last.
    pub sealed: Vec<(NodeId, Option<Arc<str>>)>,
}

/// What another process of a clearcoat has said that it sees.
#[derive(Debug, Default)]
struct SeenElsewhere {
    serial: u64,
    /// The caches in which there may be something without a seal.
    unsealed: Epochs,
}

/// What the last process saved.
#[derive(Debug)]
enum SavedCaches {
    /// It is not known yet what other clearcoats passed since: those of nodes that came.
    Unproven(Epochs),
    /// It counts.
    Believed,
    /// It does not.
    Void,
}

/// What was saved and said of caches.
#[derive(Debug)]
pub(super) struct SealedCaches {
    saved: SavedCaches,
    said_sealed: Epochs,
    said_unsealed: Epochs,
    /// By the `boot` of each process that runs beside this one.
    seen_elsewhere: BTreeMap<String, SeenElsewhere>,
}

fn has(caches: &Epochs, (node, epoch): CacheOf<'_>) -> bool {
    caches.get(node).is_some_and(|known| known.as_ref() == epoch)
}

impl SealedCaches {
    /// Nothing yet. `has_others`: there are other clearcoats, or may be.
    pub(super) fn new(has_others: bool) -> Self {
        let saved = if has_others { SavedCaches::Unproven(Epochs::new()) } else { SavedCaches::Believed };
        SealedCaches {
            saved,
            said_sealed: Epochs::new(),
            said_unsealed: Epochs::new(),
            seen_elsewhere: BTreeMap::new(),
        }
    }

    /// Whether a cache that does not count as sealed is known not to be: it does not wait for a proof.
    pub(super) fn are_proven(&self) -> bool {
        !matches!(self.saved, SavedCaches::Unproven(_))
    }

    /// One that does not seal is there, or was.
    pub(super) fn doubt_all(&mut self) {
        self.saved = SavedCaches::Void;
        self.said_sealed.clear();
    }

    /// This one is known not to be sealed.
    pub(super) fn doubt(&mut self, node: &NodeId) {
        self.said_sealed.remove(node);
        if let SavedCaches::Unproven(saved) = &mut self.saved {
            saved.remove(node);
        }
    }

    /// Takes over what another clearcoat says.
    pub(super) fn hear(&mut self, said: KnownCaches) {
        for (node, epoch) in &said.unsealed {
            self.hear_unsealed(node, epoch.as_ref());
        }
        let said_unsealed = &self.said_unsealed;
        let sealed = said.sealed.into_iter().filter(|(node, epoch)| !has(said_unsealed, (node, epoch.as_ref())));
        self.said_sealed.extend(sealed);
    }

    /// One that knows says that this cache is not sealed.
    fn hear_unsealed(&mut self, node: &NodeId, epoch: Option<&Arc<str>>) {
        if has(&self.said_sealed, (node, epoch)) {
            self.said_sealed.remove(node);
        }
        if let SavedCaches::Unproven(saved) = &mut self.saved
            && has(saved, (node, epoch))
        {
            saved.remove(node);
        }
        self.said_unsealed.insert(node.clone(), epoch.cloned());
    }

    /// Takes over what another process sees. Returns the serial of what counts. `is_known`: whether anything of a node is, or
    /// was saved, here.
    pub(super) fn hear_seen(&mut self, boot: &str, seen: SeenCaches, is_known: impl Fn(&NodeId) -> bool) -> u64 {
        let heard = self.seen_elsewhere.entry(boot.to_owned()).or_default();
        // What was said before may come later.
        if seen.serial > heard.serial {
            heard.serial = seen.serial;
            for (node, epoch) in &seen.sealed {
                if has(&heard.unsealed, (node, epoch.as_ref())) {
                    heard.unsealed.remove(node);
                }
            }
            // One that it does not have any more, and of which nothing is known here, counts as unsealed if it comes back.
            heard.unsealed.retain(|node, _| is_known(node));
            heard.unsealed.extend(seen.unsealed);
        }
        heard.serial
    }

    /// Whether another process has seen that there may be something without a seal in this cache.
    pub(super) fn is_seen_unsealed_elsewhere(&self, cache: CacheOf<'_>) -> bool {
        self.seen_elsewhere.values().any(|seen| has(&seen.unsealed, cache))
    }

    /// Forgets the processes that are none of these. Returns the caches in which they had seen something without a seal, and of
    /// which nothing counts any more that was saved or is said.
    pub(super) fn forget_processes_but(&mut self, boots: &HashSet<&str>) -> Epochs {
        let mut unsealed = Epochs::new();
        self.seen_elsewhere.retain(|boot, seen| {
            let is_there = boots.contains(boot.as_str());
            if !is_there {
                unsealed.extend(std::mem::take(&mut seen.unsealed));
            }
            is_there
        });
        for (node, epoch) in &unsealed {
            self.hear_unsealed(node, epoch.as_ref());
        }
        unsealed
    }

    pub(super) fn is_said_sealed(&self, cache: CacheOf<'_>) -> bool {
        has(&self.said_sealed, cache)
    }

    pub(super) fn is_said_unsealed(&self, cache: CacheOf<'_>) -> bool {
        has(&self.said_unsealed, cache)
    }

    /// Whether it counts that this cache was saved as a sealed one. If that is not known yet, it is kept for later.
    pub(super) fn is_saved_believed(&mut self, cache: CacheOf<'_>) -> bool {
        if self.is_said_unsealed(cache) {
            return false;
        }
        match &mut self.saved {
            SavedCaches::Unproven(saved) => {
                saved.insert(cache.0.clone(), cache.1.cloned());
                false
            }
            SavedCaches::Believed => true,
            SavedCaches::Void => false,
        }
    }

    /// Whether it is kept aside that this cache was saved as a sealed one.
    pub(super) fn keeps_saved(&self, cache: CacheOf<'_>) -> bool {
        matches!(&self.saved, SavedCaches::Unproven(saved) if has(saved, cache))
    }

    /// From now on what was saved counts. Returns what was kept for this moment; `None` if there is no such moment any more.
    pub(super) fn believe_saved(&mut self) -> Option<Epochs> {
        match std::mem::replace(&mut self.saved, SavedCaches::Believed) {
            SavedCaches::Unproven(saved) => Some(saved),
            before @ (SavedCaches::Believed | SavedCaches::Void) => {
                self.saved = before;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> NodeId {
        NodeId::try_from(id).unwrap()
    }

    fn caches(sealed: &[&str], unsealed: &[&str]) -> KnownCaches {
        let named = |ids: &[&str]| ids.iter().map(|id| (node(id), None)).collect();
        KnownCaches { sealed: named(sealed), unsealed: named(unsealed) }
    }

    #[test]
    fn what_was_saved_counts_when_proven_but_for_what_somebody_knows_better() {
        let mut known = SealedCaches::new(true);
        for id in ["a", "b", "c"] {
            assert!(!known.is_saved_believed((&node(id), None)));
        }
        let is_kept = |known: &SealedCaches| ["a", "b", "c", "d"].map(|id| known.keeps_saved((&node(id), None)));
        assert_eq!(is_kept(&known), [true, true, true, false]);
        known.hear(caches(&["d"], &["a"]));
        known.doubt(&node("b"));
        assert_eq!(is_kept(&known), [false, false, true, false]);
        let saved = known.believe_saved().unwrap();
        assert_eq!(saved.into_keys().collect::<Vec<_>>(), [node("c")]);
        let is_believed = ["a", "c", "e"].map(|id| known.is_saved_believed((&node(id), None)));
        assert_eq!((is_believed, known.believe_saved()), ([false, true, true], None));
        // Another life of that cache.
        assert!(known.is_saved_believed((&node("a"), Some(&"2".into()))));
    }

    #[test]
    fn nobody_is_believed_against_one_who_knows_whoever_comes_first() {
        let (sealed, unsealed) = (caches(&["a", "b"], &[]), caches(&[], &["a"]));
        for order in [[sealed.clone(), unsealed.clone()], [unsealed, sealed]] {
            let mut known = SealedCaches::new(true);
            order.into_iter().for_each(|said| known.hear(said));
            let is_said = ["a", "b", "c"].map(|id| known.is_said_sealed((&node(id), None)));
            assert_eq!(is_said, [false, true, false]);
            assert!(known.is_said_unsealed((&node("a"), None)) && !known.is_said_unsealed((&node("b"), None)));
        }
    }

    #[test]
    fn what_a_process_sees_counts_until_it_says_otherwise_or_is_gone() {
        let mut known = SealedCaches::new(true);
        let seen = |serial, unsealed: &[&str], sealed: &[&str]| {
            let KnownCaches { sealed, unsealed } = caches(sealed, unsealed);
            SeenCaches { serial, unsealed, sealed }
        };
        let count = |known: &SealedCaches| ["a", "b"].map(|id| known.is_seen_unsealed_elsewhere((&node(id), None)));
        assert_eq!(known.hear_seen("1", seen(2, &["a", "b"], &[]), |_| true), 2);
        assert_eq!(known.hear_seen("2", seen(1, &["a"], &[]), |_| true), 1);
        assert_eq!(known.hear_seen("1", seen(1, &[], &["a", "b"]), |_| true), 2, "it comes late");
        assert_eq!(count(&known), [true, true]);
        assert!(!known.is_seen_unsealed_elsewhere((&node("a"), Some(&"another life".into()))));
        known.hear_seen("1", seen(3, &[], &["a"]), |_| true);
        assert_eq!(count(&known), [true, true], "the other one has not seen it empty, and of b nothing was said");
        assert!(known.forget_processes_but(&["1", "2"].into()).is_empty());
        assert_eq!(known.forget_processes_but(&["1"].into()).into_keys().collect::<Vec<_>>(), [node("a")]);
        assert_eq!(count(&known), [false, true]);
        // Nobody has it any more.
        known.hear_seen("1", seen(4, &[], &[]), |id| id.as_str() != "b");
        assert_eq!(count(&known), [false, false]);
    }

    #[test]
    fn after_one_that_does_not_seal_nothing_saved_or_said_before_counts() {
        let mut known = SealedCaches::new(true);
        assert!(!known.is_saved_believed((&node("a"), None)) && !known.are_proven());
        known.hear(caches(&["b"], &[]));
        known.doubt_all();
        assert!(!known.is_said_sealed((&node("b"), None)) && known.believe_saved().is_none());
        assert!(!known.is_saved_believed((&node("c"), None)) && known.are_proven());
    }
}
