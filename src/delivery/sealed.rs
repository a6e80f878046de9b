//! Sealed purges: nobody waits until a Varnish has them, so they are sent lazily.
//!
//! A purge of tags is *sealed* if every answer with one of its tags has that tag in its seal. The edge then detects an
//! older answer by itself, so the Varnish may get the ban later. Bans are collected for a while, so that a storm of
//! purges becomes a few bans; a stale answer to a reader triggers them at once.
//!
//! The journal's writer decides whether a purge is sealed, after the guard has recorded it and before it is visible to
//! anybody. A tag on a block of a page is added to the unsealable tags before the guard checks the block's head. So
//! either the purge is decided after that, and is not sealed; or the guard knows the purge when the block passes.
//!
//! With several clearcoats that holds for each of them, since whoever sees a block tells all others of its tags before it
//! passes ([`crate::replicas`]). While one of them may know tags that are not known here, no purge is sealed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::Deliveries;
use super::known_caches::{SealedCaches, SeenCaches};
use crate::fleet::{Live, NodeId};
use crate::journal::{Entry, Position};
use crate::mutants::Mutant;
use crate::seal::{Name, PurgedNames, StaleBecause, StalePage, sealed_by};

/// The number of unsealed purges whose positions are kept. All purges before the oldest of them count as unsealed.
const MAX_UNSEALED: usize = 4_096;

/// Distinguishes sealed purges from unsealed ones.
pub struct SealedPurges {
    pub(super) purged: Arc<PurgedNames>,
    /// How long sealed purges are collected before they are sent.
    gather: Mutex<Duration>,
    unsealed: Mutex<Unsealed>,
    /// The position of the last unsealed purge.
    last_unsealed: watch::Sender<Position>,
    /// There are, or may be, other clearcoats.
    pub(super) has_others: bool,
    /// Every tag of a block that passed any clearcoat is known here.
    knows_blocks: AtomicBool,
    /// Each clearcoat seals answers.
    pub(super) do_all_seal: AtomicBool,
    pub(super) caches: Mutex<SealedCaches>,
    /// What is seen of caches here.
    pub(super) seen: watch::Sender<SeenCaches>,
}

#[derive(Debug)]
struct Unsealed {
    /// All purges up to this position count as unsealed.
    up_to: Position,
    /// The positions of the unsealed purges after it.
    since: BTreeSet<Position>,
}

impl SealedPurges {
    /// Purges up to the head count as unsealed: it is unknown which nodes lacked them when they were answered.
    /// `gather`: how long sealed purges are collected before they are sent. `has_others`: there are other clearcoats, and no
    /// purge is sealed until it is [known](Deliveries::set_knows_blocks) what they know.
    pub fn new(purged: Arc<PurgedNames>, gather: Duration, has_others: bool) -> Self {
        let head = purged.head();
        if has_others {
            // They are durable here, and it is not known whether all others have them.
            purged.unsealable().unsettle();
        }
        SealedPurges {
            purged,
            gather: Mutex::new(gather),
            unsealed: Mutex::new(Unsealed { up_to: head, since: BTreeSet::new() }),
            last_unsealed: watch::Sender::new(head),
            has_others,
            knows_blocks: AtomicBool::new(!has_others),
            do_all_seal: AtomicBool::new(true),
            caches: Mutex::new(SealedCaches::new(has_others)),
            seen: watch::Sender::default(),
        }
    }

    pub(super) fn gather(&self) -> Duration {
        *self.gather.lock()
    }

    /// Purges that come from now on gather this long.
    pub fn set_gather(&self, gather: Duration) {
        *self.gather.lock() = gather;
    }

    fn knows_blocks(&self) -> bool {
        self.knows_blocks.load(Ordering::SeqCst)
    }

    /// Decides whether a durable purge is sealed, before it is visible to anybody.
    pub fn note(&self, entry: &Entry) {
        let names = sealed_by(&entry.purge).or_else(|| Mutant::SealedPattern.lives().then(Vec::new));
        let has_unsealable = |names: &[Name]| !Mutant::SealedBlock.lives() && self.purged.unsealable().has_any(names);
        let is_sealed = names.is_some_and(|names| !has_unsealable(&names));
        if !is_sealed || !self.knows_blocks() {
            self.unseal(entry.position);
        }
    }

    /// Counts the purges up to this position as unsealed: they came before anybody decided about them.
    pub fn count_as_unsealed(&self, position: Position) {
        let mut unsealed = self.unsealed.lock();
        unsealed.up_to = position.max(unsealed.up_to);
        drop(unsealed);
        self.last_unsealed.send_modify(|last| *last = position.max(*last));
    }

    /// Whether the purge at this position is sealed.
    pub fn is_sealed(&self, position: Position) -> bool {
        let unsealed = self.unsealed.lock();
        position > unsealed.up_to && !unsealed.since.contains(&position)
    }

    /// The last purge up to this position that is not sealed, or a later position that counts as one.
    fn last_unsealed_up_to(&self, position: Position) -> Position {
        let unsealed = self.unsealed.lock();
        unsealed.since.range(..=position).next_back().copied().unwrap_or_else(|| unsealed.up_to.min(position))
    }

    /// Whether every purge after this position is sealed.
    pub(super) fn all_sealed_after(&self, position: Position) -> bool {
        *self.last_unsealed.borrow() <= position
    }

    /// Returns once there is an unsealed purge after this position.
    pub(super) async fn unsealed_after(&self, position: Position) {
        // Cannot fail: `self` owns the sender.
        _ = self.last_unsealed.subscribe().wait_for(|last| *last > position).await;
    }

    pub(super) fn unseal(&self, position: Position) {
        {
            let mut unsealed = self.unsealed.lock();
            if position > unsealed.up_to {
                unsealed.since.insert(position);
            }
            if unsealed.since.len() > MAX_UNSEALED {
                unsealed.up_to = unsealed.since.pop_first().unwrap_or(unsealed.up_to);
            }
        }
        self.last_unsealed.send_if_modified(|last| {
            let moves = *last < position;
            *last = position.max(*last);
            moves
        });
    }
}

impl Deliveries {
    /// Whether the purge at this position is sealed, so that nobody waits until a Varnish that returns seals has it.
    pub fn is_sealed(&self, position: Position) -> bool {
        self.context.sealed.as_ref().is_some_and(|sealed| sealed.is_sealed(position))
    }

    /// Whether the answers of this node show by their seals that they are older than the purge at this position: then nobody
    /// waits until it has that purge, and no page in flight to it matters.
    pub(super) fn is_shown_by(&self, node: &Live, position: Position) -> bool {
        node.seals.is_sealing() && self.is_sealed(position)
    }

    /// Whether any purge is sealed, or would be if all clearcoats knew the same.
    pub fn has_sealed_purges(&self) -> bool {
        self.context.sealed.is_some()
    }

    /// The last purge up to this position that is not sealed.
    pub fn last_unsealed_up_to(&self, position: Position) -> Position {
        self.context.sealed.as_ref().map_or(position, |sealed| sealed.last_unsealed_up_to(position))
    }

    /// Treats the purges up to this position as answered.
    pub(super) fn count_as_answered(&self, position: Position) {
        self.context.fence.raise_sealed(position);
        self.context.fence.raise(self.last_unsealed_up_to(position));
    }

    /// Records whether every tag of a block that passed any clearcoat is known here.
    pub fn set_knows_blocks(&self, knows: bool) {
        let Some(sealed) = &self.context.sealed else { return };
        if sealed.knows_blocks.swap(knows, Ordering::SeqCst) == knows {
            return;
        }
        if knows {
            tracing::info!("all replicas know the same blocks: purges that seals show wait for no Varnish");
        } else {
            tracing::info!("not every replica is known to know the same blocks: purges wait for every Varnish");
        }
    }

    /// Treats a purge as one that waits for every Varnish, since it does at another clearcoat.
    pub fn unseal(&self, position: Position) {
        if let Some(sealed) = &self.context.sealed {
            sealed.unseal(position);
        }
    }

    /// Sends a node the purges of a page that it still had. Returns whether the node has acknowledged them within
    /// `patience`: if so, it can be asked again. Of an answer without a seal whose node has every purge, only a trial of the node
    /// can tell, which has been asked for: it is waited for as long.
    pub async fn refresh(&self, node: &NodeId, page: StalePage, patience: Duration) -> bool {
        let Some((live, state)) =
            self.nodes.get(node).map(|delivery| (Arc::clone(&delivery.node.live), Arc::clone(&delivery.state)))
        else {
            return false;
        };
        // A node that accepts no purges at present would not acknowledge them in time.
        if state.late.is_late() || state.fault.lock().is_some() {
            return false;
        }
        let refreshed = async {
            match page.awaited_delivery() {
                Some(position) => {
                    state.hurry(position);
                    self.progress.until(|| live.cursor() >= position).await;
                    true
                }
                None if matches!(page.because, StaleBecause::Unsealed(_)) => {
                    self.progress.until(|| live.must_be_flushed() || !live.may_hide_seals()).await;
                    !live.must_be_flushed()
                }
                None => state.caught.tell(page).await,
            }
        };
        tokio::time::timeout(patience, refreshed).await.unwrap_or(false)
    }

    /// Records that a node still returns this page after acknowledging its ban.
    pub fn record_kept(&self, node: &NodeId, page: &StalePage) {
        let Some(state) = self.nodes.get(node).map(|delivery| Arc::clone(&delivery.state)) else { return };
        if state.caught.record_kept(page.id) {
            let path = String::from_utf8_lossy(&page.target);
            let text = format!("it keeps pages that it said it had dropped ({path}): its VCL does not purge them");
            tracing::warn!(%node, "{text}; no reader gets them from it");
            *state.kept.lock() = Some(text.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::{Purge, TagSet, Target};
    use crate::seal::{Lineage, PastNames, Run};

    fn entry(position: Position, purge: Purge) -> Entry {
        Entry { position, at_ms: 0, purge, origin: None }
    }

    fn of_tags(tags: &[&str]) -> Purge {
        Purge { targets: vec![Target::Tags(tags.iter().copied().collect::<TagSet>())], soft: false }
    }

    fn sealed(head: Position) -> SealedPurges {
        let past = PastNames { head, ..PastNames::default() };
        let purged = PurgedNames::new(Lineage::new(1, Run(1), vec![]), 100, &past);
        SealedPurges::new(Arc::new(purged), Duration::ZERO, false)
    }

    #[test]
    fn purges_of_tags_that_no_block_has_are_sealed_and_all_others_are_not() {
        let sealed = sealed(2);
        sealed.purged.unsealable().insert(&[Name::of_tag(b"block")]);
        let soft = Purge { soft: true, ..of_tags(&["a"]) };
        let mixed = Purge { targets: vec![Target::Tags(["a"].into_iter().collect()), Target::All], soft: false };
        for (position, purge, is_sealed) in [
            (3, of_tags(&["a", "b"]), true),
            (4, of_tags(&["a", "block"]), false),
            (5, soft, false),
            (6, mixed, false),
            (7, Purge::everything(), false),
            (8, of_tags(&["b"]), true),
        ] {
            sealed.note(&entry(position, purge));
            assert_eq!(sealed.is_sealed(position), is_sealed, "{position}");
            assert_eq!(sealed.all_sealed_after(position - 1), is_sealed, "{position}");
        }
        assert!(!sealed.is_sealed(2) && sealed.is_sealed(3), "what was there at the start is not sealed");
    }

    #[test]
    fn what_is_forgotten_of_old_purges_counts_as_unsealed() {
        let sealed = sealed(0);
        sealed.note(&entry(1, of_tags(&["a"])));
        (2..=MAX_UNSEALED as Position + 3).for_each(|position| sealed.note(&entry(position, Purge::everything())));
        assert!(!sealed.is_sealed(1));
    }
}
