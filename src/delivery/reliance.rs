//! Caches that rely on seals, and what becomes of them when seals cease.
//!
//! A purge that a seal shows is told once, whatever is on its way to the Varnish ([`super`]). A page that lands after its ban stays
//! in the cache, and only its seal keeps it from readers. From then on that cache *relies on seals*. It does not matter how they
//! cease: a VCL begins to drop them, `edge.seal`, `purge.wait_for` or the trial is switched off, clearcoat is restarted in
//! between. The page is there still, nobody sees its age any more, and no ban will come for it.
//!
//! **So what a cache that relies on seals answers without one passes only while a trial of this process has shown that its node
//! returns them** ([`Live::may_hide_seals`](crate::fleet::Live::may_hide_seals)). That is no event that somebody has to notice,
//! but what is looked at with each answer: a new process, a node registered anew, a trial that proves nothing are all the
//! same. What it answers with a seal is judged by that as ever, so a restart costs no cache. Where a trial has shown that it
//! returns none, or several in a row said nothing of seals, or nobody judges them in this process, the node is out until it has
//! been flushed ([`Live::must_be_flushed`](crate::fleet::Live::must_be_flushed)), whatever is seen of it meanwhile.
//!
//! **A flush counts** in the way of a purge that no seal shows: it is sent again when the pages that were on their way to the
//! node have landed. It does not count of a node that was seen not to carry purges out.
//!
//! That a cache relies on seals is saved with its cursor, by one write, here and in etcd. An older cursor that does not say
//! so, after a crash, has the purges behind it told again, in the way of a process that knows nothing of what is on its way.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Deliveries, Delivery};
use crate::fleet::{Node, NodeId, Reliance, ReturnsSeals, TrialState, is_another_life};

/// The caches that rely on seals, by the names of their nodes, so that one that is registered anew meanwhile is known.
#[derive(Debug, Default)]
pub(super) struct RelyingCaches(Mutex<HashMap<NodeId, RelyingCache>>);

/// A cache that relies on seals.
#[derive(Debug)]
struct RelyingCache {
    epoch: Option<Arc<str>>,
    /// How often it was told purges once in this process.
    told: u64,
    /// It must be flushed ([`Reliance::OwesFlush`]).
    owes_flush: bool,
}

impl RelyingCaches {
    /// Records that this cache relies on seals, and was told purges once `more` often.
    fn note(&self, node: &Node, more: u64) {
        let mut caches = self.0.lock();
        match caches.get_mut(node.id()).filter(|cache| is_of(cache, node)) {
            Some(cache) => cache.told += more,
            None => {
                let epoch = node.spec.epoch().cloned();
                caches.insert(node.id().clone(), RelyingCache { epoch, told: more, owes_flush: false });
            }
        }
    }

    /// How often this cache was told purges once; `None` if it does not rely on seals.
    pub(super) fn told(&self, node: &Node) -> Option<u64> {
        self.0.lock().get(node.id()).filter(|cache| is_of(cache, node)).map(|cache| cache.told)
    }

    /// Records that this cache must be flushed, so that a node that is registered anew meanwhile owes it still.
    fn owe(&self, node: &Node) {
        if let Some(cache) = self.0.lock().get_mut(node.id()).filter(|cache| is_of(cache, node)) {
            cache.owes_flush = true;
        }
    }

    /// Records that it was flushed. It relies on seals still if it was told more purges once meanwhile.
    fn pay(&self, node: &Node) {
        if let Some(cache) = self.0.lock().get_mut(node.id()).filter(|cache| is_of(cache, node)) {
            cache.owes_flush = false;
        }
    }

    fn owes_flush(&self, node: &Node) -> bool {
        self.0.lock().get(node.id()).is_some_and(|cache| is_of(cache, node) && cache.owes_flush)
    }

    /// Forgets this cache if it was not told a purge once since.
    fn end(&self, node: &Node, told: Option<u64>) -> bool {
        let mut caches = self.0.lock();
        let is_over = caches.get(node.id()).filter(|cache| is_of(cache, node)).map(|cache| cache.told) == told;
        if is_over {
            caches.remove(node.id());
        }
        is_over
    }
}

/// Whether this is the cache that the node has now.
fn is_of(cache: &RelyingCache, node: &Node) -> bool {
    !is_another_life(cache.epoch.as_deref(), node.spec.epoch().map(|epoch| &**epoch))
}

/// A flush of a node that is wanted: its cache must not serve without, or becomes a sealed one by it.
#[derive(Debug, Default)]
pub(super) struct WantedFlush {
    state: Mutex<FlushDue>,
    ring: Notify,
}

#[derive(Debug, Default)]
struct FlushDue {
    /// When it is to be sent.
    due: Option<Instant>,
    /// How often it was wanted.
    times: u64,
}

impl WantedFlush {
    /// Has it sent soon. One that was begun before does not do.
    pub(super) fn want(&self) {
        let mut state = self.state.lock();
        let now = Instant::now();
        state.due = Some(state.due.map_or(now, |due| due.min(now)));
        state.times += 1;
        drop(state);
        self.ring.notify_one();
    }

    /// Whether it is to be sent, now or later.
    fn is_wanted(&self) -> bool {
        self.state.lock().due.is_some()
    }

    /// Returns when it is to be sent.
    pub(super) async fn due(&self) {
        loop {
            let due = self.state.lock().due;
            match due {
                Some(due) if due <= Instant::now() => return,
                // One that is wanted meanwhile is due at once.
                Some(due) => _ = tokio::time::timeout_at(due.into(), self.ring.notified()).await,
                None => self.ring.notified().await,
            }
        }
    }

    /// It is to be sent then, or earlier if it is wanted again.
    pub(super) fn postpone(&self, due: Instant) {
        self.state.lock().due = Some(due);
    }

    pub(super) fn times(&self) -> u64 {
        self.state.lock().times
    }

    /// It was sent and counts, unless it was wanted again since.
    fn settle(&self, times: u64) -> bool {
        let mut state = self.state.lock();
        let is_settled = state.times == times;
        if is_settled {
            state.due = None;
        }
        is_settled
    }
}

impl Deliveries {
    /// Begins with what an earlier delivery of the node, or an earlier process, has left.
    pub(super) fn begin_reliance(&self, node: &Node, flush: &WantedFlush) {
        if self.context.journal.relies_on_seals(node.id(), node.spec.epoch().map(|epoch| &**epoch)) {
            self.relying.note(node, 0);
        }
        if self.relying.told(node).is_some() {
            self.show_reliance(node);
            self.flush_if_it_must_be(node, flush);
        }
    }

    /// Records that a cache was told a purge once. Before its cursor says that it has the purge.
    pub(super) fn note_told_once(&self, node: &Node, flush: &WantedFlush) {
        self.relying.note(node, 1);
        self.show_reliance(node);
        // A trial may have shown meanwhile that it returns no seals.
        self.flush_if_it_must_be(node, flush);
    }

    fn show_reliance(&self, node: &Node) {
        // What it owes, only its flush ends.
        if !node.live.must_be_flushed() {
            let judges = self.context.sealed.is_some() && self.context.has_trials;
            let judged = judges && !self.relying.owes_flush(node);
            node.live.set_reliance(if judged { Reliance::OnSeals } else { Reliance::OwesFlush });
        }
    }

    /// Takes into account that trials of a node in a row said nothing of seals: if its cache relies on them, nobody can judge it.
    pub fn give_up_on_seals(&self, node: &NodeId) {
        if let Some(Delivery { node, state, .. }) = self.nodes.get(node).as_deref()
            && node.live.relies_on_seals()
            && node.live.seals.returned() == ReturnsSeals::Unknown
            && !node.live.must_be_flushed()
        {
            node.live.set_reliance(Reliance::OwesFlush);
            self.flush_if_it_must_be(node, &state.wanted_flush);
        }
    }

    /// Has a node flushed that relies on seals, and of which a verdict says that they do not show what it has.
    pub(super) fn flush_if_it_must_be(&self, node: &Node, flush: &WantedFlush) {
        if !node.live.must_be_flushed() {
            return;
        }
        node.live.set_reliance(Reliance::OwesFlush);
        self.relying.owe(node);
        // Whoever waits for a trial has heard enough.
        self.notify_progress();
        // One that would not count is sent again in its time, however often its node is tried meanwhile.
        if flush.is_wanted() && keeps_pages(node) {
            return;
        }
        if flush.times() == 0 {
            tracing::warn!(
                node = %node.id(),
                "what this Varnish has was kept in order by seals, which it is not seen to return, or which are not judged any \
                 more: it gets no traffic until its cache is dropped"
            );
        }
        flush.want();
    }

    /// Records that a node has acknowledged a flush that was wanted so often when it was begun; its cache had been told purges once
    /// so often then. Returns whether it counts.
    pub(super) fn settle_flush(&self, node: &Node, flush: &WantedFlush, (times, told): (u64, Option<u64>)) -> bool {
        let returns = node.live.seals.returned() == ReturnsSeals::Yes;
        if keeps_pages(node) && !returns {
            return false;
        }
        // What was told once since is shown by seals if the node returns them again.
        let is_over = self.relying.end(node, told);
        if !(is_over || returns && self.context.sealed.is_some()) || !flush.settle(times) {
            return false;
        }
        if node.live.must_be_flushed() {
            self.context.slow_start.begin(node);
        }
        self.relying.pay(node);
        node.live.set_reliance(if is_over { Reliance::No } else { Reliance::OnSeals });
        self.notify_progress();
        true
    }
}

/// Whether a trial has shown that the node does not carry purges out.
fn keeps_pages(node: &Node) -> bool {
    matches!(node.live.trial(), TrialState::Failed | TrialState::WithoutTags)
}
