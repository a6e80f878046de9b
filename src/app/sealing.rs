//! Decides whether answers are sealed, and has caches drop stale ones.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::config::{Config, JournalKind, WaitFor};
use crate::delivery::{Deliveries, SealedPurges};
use crate::fleet::NodeId;
use crate::journal::Journal;
use crate::proxy::{Freshness, NoteTags, Refresh};
use crate::replicas::Replicas;
use crate::seal::{Name, PurgedNames, StalePage};
use crate::telemetry::Metrics;
use crate::trial::Trials;

/// What the origin listener needs to seal answers, and the edge listener to check the seals.
#[derive(Clone, Default)]
pub(super) struct Sealing {
    /// For the origin.
    pub(super) origin: Option<(Arc<PurgedNames>, NoteTags)>,
    /// For the edge.
    pub(super) edge: Option<Freshness>,
}

/// A future that returns whether its action was done.
type Done = Pin<Box<dyn Future<Output = bool> + Send>>;

/// Whether purges that seals can enforce are answered without waiting for any Varnish. Only then are the tags of the
/// blocks (ESI) of pages recorded.
pub(super) fn is_waited_for_edge(config: &Config) -> bool {
    config.edge.seal && config.purge.wait_for == WaitFor::Edge
}

/// Whether there are, or may be, other clearcoats with which purges are exchanged.
fn has_others(config: &Config) -> bool {
    config.journal.kind == JournalKind::Etcd || !config.replica.peers.is_empty()
}

/// Decides which purges are answered without waiting for any Varnish; `None` if all wait.
pub(super) fn sealed_purges(config: &Config, journal: &dyn Journal) -> Option<Arc<SealedPurges>> {
    let purged = journal.purged().filter(|_| is_waited_for_edge(config))?;
    Some(Arc::new(SealedPurges::new(Arc::clone(purged), config.purge.gather, has_others(config))))
}

/// Has caches drop stale pages, through their deliveries.
struct Refreshing {
    deliveries: Arc<Deliveries>,
    trials: Arc<Trials>,
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

    fn try_seals(&self, node: &NodeId) {
        self.trials.question(node);
    }
}

impl Sealing {
    /// Seals answers if the configuration wants it and the journal supports it.
    pub(super) fn of(
        journal: &dyn Journal,
        (deliveries, trials): (&Arc<Deliveries>, &Arc<Trials>),
        replicas: Option<&Arc<Replicas>>,
        metrics: &Arc<Metrics>,
        config: &Config,
    ) -> Self {
        // Beside others a seal has a stamp of each, and only those that wait for the edge tell each other theirs.
        let is_wanted = if has_others(config) { is_waited_for_edge(config) } else { config.edge.seal };
        let Some(purged) = journal.purged().filter(|_| is_wanted) else { return Sealing::default() };
        let patience = config.purge.ack_timeout;
        let refresh = Arc::new(Refreshing { deliveries: Arc::clone(deliveries), trials: Arc::clone(trials), patience });
        let (deliveries, replicas) = (Arc::clone(deliveries), replicas.cloned());
        // The control plane never runs on a worker.
        let control = Handle::current();
        let note = Arc::new(move |names: Vec<Name>| {
            let noted = control.spawn(note_block(Arc::clone(&deliveries), replicas.clone(), names));
            Box::pin(async move { noted.await.unwrap_or(false) }) as Done
        });
        let freshness = Freshness::new(Arc::clone(purged), refresh, Arc::clone(metrics));
        Sealing { origin: Some((Arc::clone(purged), note)), edge: Some(freshness) }
    }
}

/// Has the tags of a block that is about to pass known, durably and by every clearcoat. Returns whether they are.
async fn note_block(deliveries: Arc<Deliveries>, replicas: Option<Arc<Replicas>>, names: Vec<Name>) -> bool {
    if !deliveries.note_unsealable(&names).await {
        return false;
    }
    if let Some(replicas) = replicas
        && !replicas.share_unsealable(&names).await
    {
        return false;
    }
    deliveries.settle_unsealable(&names);
    true
}
