//! Caches that rely on seals, and the flush that they owe when seals cease.
//!
//! A purge that a seal shows is told once, whatever is on its way to the Varnish ([`super`]). A page that lands after its ban stays
//! in the cache, and only its seal keeps it from readers. From then on that cache *relies on seals*. It does not matter how they
//! cease: a VCL begins to drop them, `edge.seal` or `purge.wait_for` is changed, a clearcoat is restarted in between. The page is
//! there still, nobody sees its age any more, and no ban will come for it. So the cache has to be emptied before it serves
//! again, and after what is on its way to it has landed: it *owes a flush*.
//!
//! That a cache relies on seals is saved with its cursor, by one write. An older cursor that does not say so, after a crash,
//! has the purges behind it told again, in the way of a process that knows nothing of what is on its way. Here it is known by
//! the name of the node, so that a node that is registered anew meanwhile owes what it owed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Deliveries;
use crate::fleet::{Node, NodeId, ReturnsSeals, is_another_life};
use crate::journal::Cursor;

/// The caches that rely on seals.
#[derive(Debug, Default)]
pub(super) struct Reliance(Mutex<HashMap<NodeId, ReliantCache>>);

/// A cache that relies on seals.
#[derive(Debug, Default)]
struct ReliantCache {
    epoch: Option<Arc<str>>,
    /// It must not serve before it has been flushed.
    owes_flush: bool,
    /// How often it was told purges once.
    told: u64,
}

impl Reliance {
    /// As an earlier process has saved it.
    pub(super) fn saved(cursors: HashMap<NodeId, Cursor>) -> Self {
        let relying = cursors.into_iter().filter(|(_, cursor)| cursor.relies_on_seals);
        let of = |cursor: Cursor| ReliantCache { epoch: cursor.epoch, ..ReliantCache::default() };
        Reliance(Mutex::new(relying.map(|(node, cursor)| (node, of(cursor))).collect()))
    }

    /// The cache of this node, if it relies on seals.
    fn with<T>(&self, node: &Node, look: impl FnOnce(&mut ReliantCache) -> T) -> Option<T> {
        let mut caches = self.0.lock();
        let cache = caches.get_mut(node.id())?;
        let now = node.spec.epoch().map(|epoch| &**epoch);
        (!is_another_life(cache.epoch.as_deref(), now)).then(|| look(cache))
    }

    /// Records that this cache was told a purge once. Before its cursor says that it has the purge.
    pub(super) fn note(&self, node: &Node) {
        if self.with(node, |cache| cache.told += 1).is_none() {
            let cache = ReliantCache { epoch: node.spec.epoch().cloned(), owes_flush: false, told: 1 };
            self.0.lock().insert(node.id().clone(), cache);
        }
    }

    /// Whether this cache relies on seals.
    pub(super) fn has(&self, node: &Node) -> bool {
        self.with(node, |_| ()).is_some()
    }

    /// How often this cache was told purges once.
    pub(super) fn told(&self, node: &Node) -> u64 {
        self.with(node, |cache| cache.told).unwrap_or(0)
    }

    /// This cache has been emptied, and nothing that was told once before that is on its way any more.
    fn end(&self, node: &NodeId) {
        self.0.lock().remove(node);
    }
}

/// The flush that a node owes.
#[derive(Debug, Default)]
pub(super) struct OwedFlush {
    /// When it is to be sent.
    due: Mutex<Option<Instant>>,
    ring: Notify,
}

impl OwedFlush {
    pub(super) fn owe(&self) {
        self.due.lock().get_or_insert_with(Instant::now);
        self.ring.notify_one();
    }

    /// Returns when it is to be sent.
    pub(super) async fn due(&self) {
        loop {
            let due = *self.due.lock();
            match due {
                Some(due) if due <= Instant::now() => return,
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => self.ring.notified().await,
            }
        }
    }

    /// It is to be sent then.
    pub(super) fn postpone(&self, due: Instant) {
        *self.due.lock() = Some(due);
    }

    fn settle(&self) {
        *self.due.lock() = None;
    }
}

impl Deliveries {
    /// Has a node that no seals are judged of, and whose cache relies on them, flushed before it serves.
    pub(super) fn owe_flush_if_relying(&self, node: &Node, owed: &OwedFlush) {
        let was_owed = self.reliance.with(node, |cache| std::mem::replace(&mut cache.owes_flush, true));
        let Some(was_owed) = was_owed else { return };
        node.live.set_owes_flush(true);
        owed.owe();
        if !was_owed {
            tracing::warn!(
                node = %node.id(),
                "what this Varnish has was kept in order by seals, which it does not return, or which are not judged any more: it \
                 gets no traffic until its cache is dropped"
            );
        }
    }

    /// Begins with what an earlier delivery of the node, or an earlier process, left.
    pub(super) fn begin_reliance(&self, node: &Node, owed: &OwedFlush) {
        let owes_flush = self.reliance.with(node, |cache| cache.owes_flush) == Some(true);
        if owes_flush || self.context.sealed.is_none() {
            self.owe_flush_if_relying(node, owed);
        }
    }

    /// Records that a node has acknowledged the flush that it owed. `told`: how often its cache had been told purges once when
    /// the flush was first sent.
    pub(super) fn settle_flush(&self, node: &Node, owed: &OwedFlush, told: u64) {
        if self.reliance.told(node) == told {
            self.reliance.end(node.id());
        } else {
            // It returns seals again, so all that was told once meanwhile is shown by them.
            self.reliance.with(node, |cache| cache.owes_flush = false);
        }
        owed.settle();
        node.live.set_owes_flush(false);
        self.notify_progress();
    }

    /// Whether the flush that a node owed counts: since it was first sent, when its cache had been told purges once so often, none
    /// was told so by a node that does not return seals by now.
    pub(super) fn is_flush_enough(&self, node: &Node, told: u64) -> bool {
        self.reliance.told(node) == told || node.live.seals.returned() == ReturnsSeals::Yes
    }
}
