//! Purges that a seal shows: nobody waits for a Varnish to have them, and they are sent lazily.
//!
//! A purge of tags is *sealed* if each of its tags is seen in the seal of every answer that it concerns: then the edge
//! catches an answer that is older, and the Varnish may get the ban later. Bans gather for a while, so that a storm of purges
//! is a few of them; a reader who meets a stale answer hurries them.
//!
//! Which purges are sealed is decided in the journal's writer, when the guard has noted the purge and before anybody can see
//! it. A tag that is seen on a block of a page is added to the set before the block's head is checked by the guard. So
//! either the purge is decided after that, and waits; or the guard knows the purge when the block passes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::Deliveries;
use crate::fleet::{Health, Live, NodeId, TrialState};
use crate::journal::{Entry, Missed, Position};
use crate::seal::{Name, PurgedNames, StaleBecause, StalePage, sealed_by};
use crate::telemetry::causes;

/// The positions of purges that no seal shows, of which each is known. All before these count as such.
const MAX_UNSEALED: usize = 4_096;

/// Tells purges that a seal shows from others.
pub struct SealedPurges {
    purged: Arc<PurgedNames>,
    /// How long such purges gather.
    pub(super) gather: Duration,
    unsealed: Mutex<Unsealed>,
    /// The last position of a purge that no seal shows.
    last_unsealed: watch::Sender<Position>,
}

#[derive(Debug)]
struct Unsealed {
    /// Everything up to here.
    up_to: Position,
    /// Those after it.
    since: BTreeSet<Position>,
}

impl SealedPurges {
    /// None of the purges up to the head is sealed: nobody knows whom they were answered without. `gather`: for how long
    /// sealed purges wait before they are sent.
    pub fn new(purged: Arc<PurgedNames>, gather: Duration) -> Self {
        let head = purged.head();
        let unsealed = Mutex::new(Unsealed { up_to: head, since: BTreeSet::new() });
        SealedPurges { purged, gather, unsealed, last_unsealed: watch::Sender::new(head) }
    }

    /// Decides about a purge that is durable, before anybody sees it.
    pub fn note(&self, entry: &Entry) {
        let is_sealed = sealed_by(&entry.purge).is_some_and(|names| !self.purged.unsealable().has_any(&names));
        if !is_sealed {
            self.unseal(entry.position);
        }
    }

    /// Whether the purge at this position is sealed.
    pub fn is_sealed(&self, position: Position) -> bool {
        let unsealed = self.unsealed.lock();
        position > unsealed.up_to && !unsealed.since.contains(&position)
    }

    /// Whether every purge after this position is.
    pub(super) fn all_sealed_after(&self, position: Position) -> bool {
        *self.last_unsealed.borrow() <= position
    }

    /// Returns when a purge after this position is not sealed.
    pub(super) async fn unsealed_after(&self, position: Position) {
        // The sender lives as long as this.
        _ = self.last_unsealed.subscribe().wait_for(|last| *last > position).await;
    }

    fn unseal(&self, position: Position) {
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
    /// Whether nobody waits for a Varnish to have the purge at this position: of those that return seals.
    pub(super) fn is_sealed(&self, position: Position) -> bool {
        self.context.sealed.as_ref().is_some_and(|sealed| sealed.is_sealed(position))
    }

    /// Why all purges wait for this node, though those that a seal shows wait for others; `None` if they do not, or that is not
    /// known yet.
    pub fn why_not_sealing(&self, node: &Live) -> Option<&'static str> {
        self.context.sealed.as_ref()?;
        match node.trial() {
            TrialState::Passed if !node.returns_seals() => Some(
                "purges wait for it: its VCL does not keep X-Clearcoat-Seal on answers, or X-Clearcoat-Asked on requests",
            ),
            TrialState::Passed if !node.cache_is_sealed() => Some(
                "purges wait for it until it is restarted or flushed (clearcoat purge --all): it has pages without a seal",
            ),
            _ => None,
        }
    }

    /// Notes tags that no seal shows: from now on purges of them wait. Purges of them that are still to be sent are sent at
    /// once, and count as not sealed. Returns whether it is durable: if not, what has these tags must not be stored.
    pub async fn note_unsealable(&self, names: Vec<Name>) -> bool {
        let Some(sealed) = &self.context.sealed else { return true };
        sealed.purged.unsealable().insert(&names);
        self.show_unsealable();
        self.unseal_pending(sealed, &names);
        let noted = self.context.journal.note_unsealable(names.clone());
        match tokio::time::timeout(self.context.pace.longest_wait, noted).await {
            Ok(Ok(())) => {
                sealed.purged.unsealable().settle(&names);
                true
            }
            Ok(Err(error)) => {
                tracing::warn!(error = %causes(&error), "tags of a block could not be noted: it is not stored");
                false
            }
            Err(_elapsed) => {
                tracing::warn!("tags of a block are not noted in time: it is not stored");
                false
            }
        }
    }

    /// Shows how many tags no seal shows.
    pub fn show_unsealable(&self) {
        if let Some(sealed) = &self.context.sealed {
            let count = i64::try_from(sealed.purged.unsealable().count()).unwrap_or(i64::MAX);
            self.context.metrics.seal.unsealable.set(count);
        }
    }

    /// Purges of these tags that a node which serves has not acknowledged are not sealed any more.
    fn unseal_pending(&self, sealed: &SealedPurges, names: &[Name]) {
        let fleet = self.context.fleet.load();
        let serving = fleet.varnish.members().iter().filter(|member| member.health != Health::Down);
        let Some(least) = serving.map(|member| member.node.live.cursor()).min() else { return };
        let last = match self.context.journal.since(least) {
            Missed::Entries(entries) => {
                let concerned = |entry: &&Arc<Entry>| {
                    sealed_by(&entry.purge).is_some_and(|purged| purged.iter().any(|name| names.contains(name)))
                };
                entries.iter().filter(concerned).map(|entry| entry.position).max()
            }
            Missed::Truncated => Some(self.context.journal.head()),
        };
        if let Some(last) = last {
            sealed.unseal(last);
            self.context.fence.raise(last);
        }
    }

    /// Has a node drop everything.
    pub fn empty(&self, node: &NodeId) {
        if let Some(delivery) = self.nodes.get(node) {
            delivery.node.live.set_cache_is_sealed(false);
            delivery.state.caught.drop_everything();
        }
    }

    /// Has a node get what was purged of this page, which it still had. Returns whether it has acknowledged that within
    /// `patience`: then it can be asked again.
    pub async fn refresh(&self, node: &NodeId, page: StalePage, patience: Duration) -> bool {
        let Some((live, state)) =
            self.nodes.get(node).map(|delivery| (Arc::clone(&delivery.node.live), Arc::clone(&delivery.state)))
        else {
            return false;
        };
        // Whoever waits for a node that takes no purges at present waits in vain.
        if state.late.is_late() || state.error.lock().is_some() {
            return false;
        }
        let wanted = match page.because {
            StaleBecause::Purged(position) | StaleBecause::Unsealed(position) => Some(position),
            StaleBecause::Foreign | StaleBecause::Forgotten => None,
        };
        let refreshed = async {
            match wanted {
                // It was asked before it had the purge.
                Some(position) if page.asked_at < position => {
                    state.hurry.notify_one();
                    self.progress.until(|| live.cursor() >= position).await;
                    true
                }
                _ => state.caught.tell(page).await,
            }
        };
        tokio::time::timeout(patience, refreshed).await.unwrap_or(false)
    }

    /// A node still has a page that it was told to drop, has acknowledged that, and was asked again.
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
        SealedPurges::new(Arc::new(purged), Duration::ZERO)
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
