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

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::known_caches::{KnownCaches, SealedCaches};
use super::{Deliveries, DeliveryContext, on_a_thread};
use crate::fleet::{Live, Node, NodeId, ReturnsSeals, TrialState};
use crate::journal::{CursorState, Entry, Journal, Missed, Position};
use crate::mutants::Mutant;
use crate::seal::{Name, PurgedNames, StalePage, sealed_by};
use crate::telemetry::causes;

/// The number of unsealed purges whose positions are kept. All purges before the oldest of them count as unsealed.
const MAX_UNSEALED: usize = 4_096;

/// Distinguishes sealed purges from unsealed ones.
pub struct SealedPurges {
    purged: Arc<PurgedNames>,
    /// How long sealed purges are collected before they are sent.
    pub(super) gather: Duration,
    unsealed: Mutex<Unsealed>,
    /// The position of the last unsealed purge.
    last_unsealed: watch::Sender<Position>,
    /// There are, or may be, other clearcoats.
    has_others: bool,
    /// Every tag of a block that passed any clearcoat is known here.
    knows_blocks: AtomicBool,
    /// Each clearcoat seals answers.
    do_all_seal: AtomicBool,
    caches: Mutex<SealedCaches>,
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
            gather,
            unsealed: Mutex::new(Unsealed { up_to: head, since: BTreeSet::new() }),
            last_unsealed: watch::Sender::new(head),
            has_others,
            knows_blocks: AtomicBool::new(!has_others),
            do_all_seal: AtomicBool::new(true),
            caches: Mutex::new(SealedCaches::new(has_others)),
        }
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
    /// Whether the purge at this position is sealed, so that nobody waits until a Varnish that returns seals has it.
    pub fn is_sealed(&self, position: Position) -> bool {
        self.context.sealed.as_ref().is_some_and(|sealed| sealed.is_sealed(position))
    }

    /// Why even sealed purges wait for this node; `None` if they do not, or if that is not known yet.
    pub fn why_not_sealing(&self, node: &Live) -> Option<&'static str> {
        self.context.sealed.as_ref()?;
        match node.trial() {
            TrialState::Passed if node.seals.returned() != ReturnsSeals::Yes => Some(
                "purges wait for it: its VCL does not keep X-Clearcoat-Seal on answers, or X-Clearcoat-Asked on requests",
            ),
            TrialState::Passed if !node.seals.cache_is_sealed() => Some(
                "purges wait for it until it is restarted or flushed (clearcoat purge --all): it has pages without a seal",
            ),
            _ => None,
        }
    }

    /// Whether other clearcoats fill the same caches with answers that count as sealed.
    pub(super) fn has_other_origins(&self) -> bool {
        self.context.sealed.as_ref().is_some_and(|sealed| sealed.has_others)
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

    /// Whether everything that a cache stores from now on is sealed, as far as is known: what turns out to have been stored
    /// otherwise is distrusted.
    pub(super) fn are_answers_sealed(&self) -> bool {
        self.context.sealed.as_ref().is_some_and(|sealed| sealed.do_all_seal.load(Ordering::SeqCst))
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

    /// Records whether each clearcoat seals answers. If one does not, it may fill any cache with answers that have no seal, so
    /// no cache counts as sealed any more: until a flush that is sent when that one is gone.
    pub fn set_do_all_seal(&self, do_all: bool) {
        let Some(sealed) = &self.context.sealed else { return };
        let before = sealed.do_all_seal.swap(do_all, Ordering::SeqCst);
        if !(before && do_all) {
            let mut caches = sealed.caches.lock();
            caches.doubt_all();
            self.nodes.iter().for_each(|delivery| delivery.node.live.seals.doubt());
        }
    }

    /// What is known of caches, for a clearcoat that joins.
    pub fn known_caches(&self) -> KnownCaches {
        let Some(sealed) = &self.context.sealed else { return KnownCaches::default() };
        // Held, so that nothing counts as unsealed that is about to be believed.
        let caches = sealed.caches.lock();
        let fleet = self.context.fleet.load();
        let members = fleet.varnish.members();
        let mut known = KnownCaches::default();
        for member in members {
            let (node, seals) = (&member.node, &member.node.live.seals);
            let one = (node.id().clone(), node.spec.epoch().cloned());
            if seals.cache_is_sealed() {
                known.sealed.push(one);
            } else if caches.are_proven() || seals.is_in_doubt() {
                known.unsealed.push(one);
            }
        }
        if caches.are_proven() {
            let saved = self.context.journal.cursors();
            let away = saved.into_iter().filter(|(id, cursor)| !cursor.is_sealed && fleet.varnish.get(id).is_none());
            known.unsealed.extend(away.map(|(id, cursor)| (id, cursor.epoch)));
        }
        known
    }

    /// Takes over what another clearcoat says of caches; the tags of the blocks in those that are sealed are known here. It knows
    /// of those that it calls unsealed: what anybody else says of them, or the last process has saved, does not count.
    pub fn adopt_known_caches(&self, said: KnownCaches) {
        let Some(sealed) = self.context.sealed.as_ref().filter(|sealed| sealed.do_all_seal.load(Ordering::SeqCst))
        else {
            return;
        };
        let mut caches = sealed.caches.lock();
        caches.hear(said);
        for delivery in &self.nodes {
            let (seals, cache) = (&delivery.node.live.seals, (delivery.node.id(), delivery.node.spec.epoch()));
            if caches.is_said_unsealed(cache) {
                seals.hear_unsealed();
            } else if caches.is_said_sealed(cache) {
                seals.hear_sealed();
            }
        }
    }

    /// Believes what the last process saved of caches: all that other clearcoats passed meanwhile is known.
    pub fn trust_saved_caches(&self) {
        let Some(sealed) = &self.context.sealed else { return };
        let mut caches = sealed.caches.lock();
        let Some(saved) = caches.believe_saved() else { return };
        for delivery in &self.nodes {
            let node = &delivery.node;
            if saved.get(node.id()).is_some_and(|epoch| epoch.as_ref() == node.spec.epoch()) {
                node.live.seals.hear_sealed();
            }
        }
    }

    /// Begins with a cache whose delivery begins. With other clearcoats what was saved of it counts only when it is known what
    /// they did meanwhile.
    pub(super) fn begin_cache(&self, node: &Node, remembered: CursorState) {
        let Some(sealed) = &self.context.sealed else { return };
        let (seals, cache) = (&node.live.seals, (node.id(), node.spec.epoch()));
        let mut caches = sealed.caches.lock();
        match remembered {
            CursorState::CacheRestarted if !sealed.has_others => seals.record_emptied(seals.doubts()),
            // Others may have filled it since, and one that does not seal may be gone again.
            CursorState::CacheRestarted | CursorState::Unknown => seals.forget_cache(),
            CursorState::At(_) => {
                let is_saved = self.context.journal.cursors().get(cache.0).is_some_and(|cursor| cursor.is_sealed);
                if is_saved && sealed.do_all_seal.load(Ordering::SeqCst) && caches.is_saved_believed(cache) {
                    seals.hear_sealed();
                }
            }
        }
        if caches.is_said_sealed(cache) {
            seals.hear_sealed();
        }
    }

    /// Records that unsealable tags are durable, and known to all clearcoats.
    pub fn settle_unsealable(&self, names: &[Name]) {
        if let Some(sealed) = &self.context.sealed {
            sealed.purged.unsealable().settle(names);
        }
    }

    /// Records unsealable tags: from now on purges of them are not sealed. Pending purges of them are sent at once, and
    /// count as unsealed. Returns whether the record is durable: if not, answers with these tags must not be stored.
    pub async fn note_unsealable(&self, names: Vec<Name>) -> bool {
        let Some(sealed) = &self.context.sealed else { return true };
        sealed.purged.unsealable().insert(&names);
        self.show_unsealable();
        self.unseal_pending(sealed, &names).await;
        let noted = self.context.journal.note_unsealable(names);
        match tokio::time::timeout(self.context.pace.longest_wait, noted).await {
            Ok(Ok(())) => true,
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

    /// Updates the metric of unsealable tags.
    pub fn show_unsealable(&self) {
        if let Some(sealed) = &self.context.sealed {
            let count = i64::try_from(sealed.purged.unsealable().count()).unwrap_or(i64::MAX);
            self.context.metrics.seal.unsealable.set(count);
        }
    }

    /// Treats a purge as one that waits for every Varnish, since it does at another clearcoat.
    pub fn unseal(&self, position: Position) {
        if let Some(sealed) = &self.context.sealed {
            sealed.unseal(position);
        }
    }

    /// Marks purges of these tags as unsealed if a node has not acknowledged them yet. The caller is a worker, and
    /// they may be many: they are looked through on another thread.
    async fn unseal_pending(&self, sealed: &Arc<SealedPurges>, names: &[Name]) {
        let _turn = self.unsealing.lock().await;
        let DeliveryContext { journal, fence, fleet, .. } = &self.context;
        let fleet = fleet.load_full();
        // Also of nodes that are down: one may be up before it has its bans.
        let Some(least) = fleet.varnish.members().iter().map(|member| member.node.live.cursor()).min() else { return };
        if least >= journal.head() {
            return;
        }
        let (journal, fence, sealed) = (Arc::clone(journal), Arc::clone(fence), Arc::clone(sealed));
        let names = names.to_vec();
        on_a_thread(move || {
            if let Some(last) = last_of(&*journal, least, &names) {
                sealed.unseal(last);
                fence.raise(last);
            }
        })
        .await;
    }

    /// Counts a node's cache as one that may have something without a seal, whatever was saved or said of it.
    pub fn distrust(&self, node: &NodeId) {
        if let Some(sealed) = &self.context.sealed {
            sealed.caches.lock().doubt(node);
        }
        if let Some(delivery) = self.nodes.get(node) {
            delivery.node.live.seals.doubt();
        }
    }

    /// Distrusts a node's cache, and flushes it.
    pub fn empty(&self, node: &NodeId) {
        self.distrust(node);
        if let Some(delivery) = self.nodes.get(node) {
            delivery.state.caught.drop_everything();
        }
    }

    /// Sends a node the purges of a page that it still had. Returns whether the node has acknowledged them within
    /// `patience`: if so, it can be asked again.
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

/// The last purge after `after` of any of these tags; the head, if the journal does not hold them all.
fn last_of(journal: &dyn Journal, after: Position, names: &[Name]) -> Option<Position> {
    let Missed::Entries(entries) = journal.since(after) else { return Some(journal.head()) };
    // There may be as many as there are blocks.
    let names: HashSet<&Name> = names.iter().collect();
    let concerns = |entry: &&Arc<Entry>| {
        sealed_by(&entry.purge).is_some_and(|purged| purged.iter().any(|name| names.contains(name)))
    };
    entries.iter().rfind(concerns).map(|entry| entry.position)
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
