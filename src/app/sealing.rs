//! Decides whether answers are sealed, and has caches drop stale ones.
//!
//! A seal is valid only if its position means the same to its writer and its reader. Each clearcoat numbers the purges
//! of its own journal, so answers are not sealed if there are other replicas.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, JournalKind, WaitFor};
use crate::delivery::{Deliveries, SealedPurges};
use crate::fleet::NodeId;
use crate::journal::Journal;
use crate::proxy::{Freshness, NoteTags, Refresh};
use crate::seal::{Name, PurgedNames, StalePage};
use crate::telemetry::Metrics;

/// What the origin listener needs to seal answers, and the edge listener to check the seals.
#[derive(Default)]
pub(super) struct Sealing {
    /// For the origin.
    pub(super) origin: Option<(Arc<PurgedNames>, NoteTags)>,
    /// For the edge.
    pub(super) edge: Option<Freshness>,
}

/// A future that returns whether its action was done.
type Done = Pin<Box<dyn Future<Output = bool> + Send>>;

/// Whether answers are to be sealed by this process.
fn is_wanted(config: &Config) -> bool {
    let has_replicas = config.journal.kind == JournalKind::Etcd || !config.replica.peers.is_empty();
    config.edge.seal && !has_replicas
}

/// Whether purges that seals can enforce are answered without waiting for any Varnish. Only then are the tags of the
/// blocks (ESI) of pages recorded.
pub(super) fn is_waited_for_edge(config: &Config) -> bool {
    is_wanted(config) && config.purge.wait_for == WaitFor::Edge
}

/// Decides which purges are answered without waiting for any Varnish; `None` if all wait.
pub(super) fn sealed_purges(config: &Config, journal: &dyn Journal) -> Option<Arc<SealedPurges>> {
    let purged = journal.purged().filter(|_| is_waited_for_edge(config))?;
    Some(Arc::new(SealedPurges::new(Arc::clone(purged), config.purge.gather)))
}

/// Has caches drop stale pages, through their deliveries.
struct Refreshing {
    deliveries: Arc<Deliveries>,
    /// How long a client waits at most for a cache to drop a stale page.
    patience: Duration,
}

impl Refresh for Refreshing {
    fn refresh(&self, node: &NodeId, page: StalePage) -> Done {
        let (deliveries, patience, node) = (Arc::clone(&self.deliveries), self.patience, node.clone());
        Box::pin(async move { deliveries.refresh(&node, page, patience).await })
    }

    fn record_kept(&self, node: &NodeId, page: &StalePage) {
        self.deliveries.record_kept(node, page);
    }
}

impl Sealing {
    /// Seals answers if the configuration wants it and the journal supports it.
    pub(super) fn of(
        journal: &dyn Journal,
        deliveries: &Arc<Deliveries>,
        metrics: &Arc<Metrics>,
        config: &Config,
    ) -> Self {
        let Some(purged) = journal.purged().filter(|_| is_wanted(config)) else { return Sealing::default() };
        let refresh = Arc::new(Refreshing { deliveries: Arc::clone(deliveries), patience: config.purge.ack_timeout });
        let deliveries = Arc::clone(deliveries);
        let note = Arc::new(move |names: Vec<Name>| {
            let deliveries = Arc::clone(&deliveries);
            Box::pin(async move { deliveries.note_unsealable(names).await }) as Done
        });
        let freshness = Freshness::new(Arc::clone(purged), refresh, Arc::clone(metrics));
        Sealing { origin: Some((Arc::clone(purged), note)), edge: Some(freshness) }
    }
}
