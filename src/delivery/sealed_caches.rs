//! Which caches count as sealed: everything in them was stored with a seal, so that sealed purges need not wait for them.
//!
//! It is known by what was seen here (a flush, or that a trial speaks against it), by what was saved, and by what other
//! clearcoats say ([`super::known_caches`]; how that is weighed: [`SealStanding`](crate::fleet::SealStanding)).

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::known_caches::{KnownCaches, SealedCaches, SeenCaches};
use super::{Deliveries, Delivery, SealedPurges};
use crate::fleet::{CacheDoubts, Live, Node, NodeId, ReturnsSeals, TrialState};
use crate::journal::CursorState;

impl Deliveries {
    /// Whether other clearcoats fill the same caches with answers that count as sealed.
    pub(super) fn has_other_origins(&self) -> bool {
        self.context.sealed.as_ref().is_some_and(|sealed| sealed.has_others)
    }

    /// Whether everything that a cache stores from now on is sealed, as far as is known: what turns out to have been stored
    /// otherwise is distrusted.
    pub(super) fn are_answers_sealed(&self) -> bool {
        self.context.sealed.as_ref().is_some_and(|sealed| sealed.do_all_seal.load(Ordering::SeqCst))
    }

    /// Why even sealed purges wait for this node; `None` if they do not, or if that is not known yet.
    pub fn why_not_sealing(&self, node: &Live) -> Option<&'static str> {
        self.context.sealed.as_ref()?;
        match node.trial() {
            TrialState::Passed if node.seals.returned() != ReturnsSeals::Yes => Some(
                "purges wait for it: its VCL does not keep X-Clearcoat-Seal on answers, or X-Clearcoat-Asked on requests",
            ),
            TrialState::Passed if node.seals.is_doubted_elsewhere() => Some(
                "purges wait for it until another clearcoat has seen it flushed: that one has seen that it may have pages without a seal",
            ),
            TrialState::Passed if !node.seals.cache_is_sealed() => Some(
                "purges wait for it until it is restarted or flushed (clearcoat purge --all): it has pages without a seal",
            ),
            _ => None,
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
            self.show_seen(sealed);
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
            } else if caches.are_proven() || seals.is_in_doubt() || seals.is_doubted_elsewhere() {
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

    /// Whether to save that everything in a node's cache is sealed: it is, or the last process has saved that, and what speaks
    /// for or against it is not known yet.
    pub(super) fn is_saved_as_sealed(&self, node: &Node) -> bool {
        let (seals, cache) = (&node.live.seals, (node.id(), node.spec.epoch()));
        let keeps = |sealed: &Arc<SealedPurges>| sealed.caches.lock().keeps_saved(cache);
        seals.cache_is_sealed() || (!seals.is_doubted_elsewhere() && self.context.sealed.as_ref().is_some_and(keeps))
    }

    /// Whether any cache is saved as a sealed one, and this process does not say so itself: then the next one, too, has to meet
    /// the replicas of before.
    pub fn relies_on_last_process(&self) -> bool {
        let fleet = self.context.fleet.load();
        let is_own = |id: &NodeId| fleet.varnish.get(id).is_some_and(|member| member.node.live.seals.cache_is_sealed());
        self.context.journal.cursors().iter().any(|(id, cursor)| cursor.is_sealed && !is_own(id))
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

    /// Begins with a node whose delivery was just entered, by what other clearcoats see of its cache.
    pub(super) fn begin_doubts(&self, node: &NodeId) {
        let Some(sealed) = &self.context.sealed else { return };
        // Always locked before the nodes.
        let caches = sealed.caches.lock();
        if let Some(delivery) = self.nodes.get(node) {
            self.show_doubts_elsewhere(&caches, &delivery);
        }
    }

    /// Records that a node has acknowledged a flush, before which its cache was doubted so often.
    pub(super) fn record_emptied(&self, node: &Node, doubts: CacheDoubts) {
        if let Some(sealed) = self.context.sealed.as_ref().filter(|_| self.are_answers_sealed()) {
            node.live.seals.record_emptied(doubts);
            let _caches = sealed.caches.lock();
            self.show_seen(sealed);
        }
    }

    /// Takes into account that a trial has put a node's cache in doubt: whatever was saved or said of it does not count.
    pub fn distrust(&self, node: &NodeId) {
        let Some(sealed) = &self.context.sealed else { return };
        let mut caches = sealed.caches.lock();
        caches.doubt(node);
        self.show_seen(sealed);
        drop(caches);
        if let Some(Delivery { node, state, .. }) = self.nodes.get(node).as_deref() {
            // It gets no traffic until it has what gathers.
            state.hurry(self.context.journal.head());
            self.flush_if_it_must_be(node, &state.wanted_flush);
        }
    }

    /// The same for one that returns seals now: a flush makes its cache a sealed one.
    pub fn empty(&self, node: &NodeId) {
        self.distrust(node);
        if let Some(delivery) = self.nodes.get(node).filter(|_| self.context.sealed.is_some()) {
            delivery.state.wanted_flush.want();
        }
    }

    /// What is seen of caches in this process, for other clearcoats, to wait for changes. `None` if no purge is ever sealed.
    pub fn watch_seen_caches(&self) -> Option<watch::Receiver<SeenCaches>> {
        self.context.sealed.as_ref().map(|sealed| sealed.seen.subscribe())
    }

    /// Takes over what another process (its `boot`) sees of caches. Returns the serial of what counts.
    pub fn hear_seen_caches(&self, boot: &str, seen: SeenCaches) -> u64 {
        let Some(sealed) = &self.context.sealed else { return seen.serial };
        let saved = self.context.journal.cursors();
        let mut caches = sealed.caches.lock();
        let is_known = |node: &NodeId| self.nodes.contains_key(node) || saved.contains_key(node);
        let serial = caches.hear_seen(boot, seen, is_known);
        self.nodes.iter().for_each(|delivery| self.show_doubts_elsewhere(&caches, &delivery));
        serial
    }

    /// Forgets the processes that are none of these. The caches in which they had seen something without a seal are in doubt
    /// here from now on: nobody can say when they are sealed again.
    pub fn forget_processes_but(&self, boots: &HashSet<&str>) {
        let Some(sealed) = &self.context.sealed else { return };
        let mut caches = sealed.caches.lock();
        let unsealed = caches.forget_processes_but(boots);
        if unsealed.is_empty() {
            return;
        }
        for delivery in &self.nodes {
            if unsealed.get(delivery.node.id()).is_some_and(|epoch| epoch.as_ref() == delivery.node.spec.epoch()) {
                delivery.node.live.seals.doubt();
            }
            self.show_doubts_elsewhere(&caches, &delivery);
        }
        self.show_seen(sealed);
    }

    /// Has a node count as what other processes see of its cache. What is news is worth a trial of our own: its VCL may have ceased to
    /// return seals, or returns them again.
    fn show_doubts_elsewhere(&self, caches: &SealedCaches, Delivery { node, state, .. }: &Delivery) {
        let is_doubted = caches.is_seen_unsealed_elsewhere((node.id(), node.spec.epoch()));
        if !node.live.seals.set_doubted_elsewhere(is_doubted) {
            return;
        }
        if is_doubted {
            tracing::warn!(node = %node.id(), "another clearcoat has seen that this Varnish may have pages without a seal: purges wait for it");
            state.hurry(self.context.journal.head());
        }
        if let Some(treat) = self.on_seen_elsewhere.get() {
            treat(node.id());
        }
    }

    /// Says to other clearcoats what is seen here. The caller holds the lock of what is known of caches.
    fn show_seen(&self, sealed: &SealedPurges) {
        let (mut unsealed, mut emptied) = (Vec::new(), Vec::new());
        for delivery in &self.nodes {
            let (node, seals) = (&delivery.node, &delivery.node.live.seals);
            let one = || (node.id().clone(), node.spec.epoch().cloned());
            if seals.is_seen_unsealed() {
                unsealed.push(one());
            } else if seals.is_seen_sealed() {
                emptied.push(one());
            }
        }
        unsealed.sort_unstable();
        emptied.sort_unstable();
        sealed.seen.send_if_modified(|seen| {
            let is_news = (&seen.unsealed, &seen.sealed) != (&unsealed, &emptied);
            if is_news {
                *seen = SeenCaches { serial: seen.serial + 1, unsealed, sealed: emptied };
            }
            is_news
        });
    }
}
