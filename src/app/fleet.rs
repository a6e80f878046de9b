//! Starts node discovery and the fleet keeper.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::engine::Engine;
use crate::config::{Config, HealthChecks, JournalKind, RegistryKind, StaticNode};
use crate::etcd::follow::WatchStatus;
use crate::fleet::{Event, NodeSource, Suspicion};
use crate::fleet_keeper::{FleetKeeper, KeeperContext};
use crate::registry::fixed::UnresolvedNodes;
use crate::registry::{self, RegistryStatus, SourceStatus};
use crate::service_manager::Heartbeat;

/// Starts node discovery and the fleet keeper. `nodes` are those of the configuration, `checks` is how all are checked.
pub(super) fn keep(
    config: &Config,
    (nodes, checks): (watch::Receiver<Vec<StaticNode>>, watch::Receiver<HealthChecks>),
    engine: &Engine,
    heartbeat: Arc<Heartbeat>,
    tasks: &mut JoinSet<()>,
) -> FleetInputs {
    let (listed_sender, listed) = watch::channel(false);
    let (events_sender, events) = mpsc::channel(1024);
    let (suspects_sender, suspects) = mpsc::channel(1024);
    let (doubted, doubts) = watch::channel(());
    let around = KeeperContext {
        fleet: Arc::clone(&engine.fleet),
        checks: config.health.clone(),
        headers: config.purge.headers.clone(),
        zone: config.replica.zone.as_deref().map(Arc::from),
        retain: config.registry.retain,
        deliveries: Arc::clone(&engine.deliveries),
        trials: config.health.varnish.trial.then(|| Arc::clone(&engine.trials)),
        slow_start: Arc::clone(&engine.slow_start),
        metrics: Arc::clone(&engine.metrics),
        events: events_sender.clone(),
        heartbeat,
        doubted,
    };
    let registry = follow_registry(config, engine, (&events_sender, &doubts), tasks);
    let sources = [Some(NodeSource::Static), registry.as_ref().map(RegistryStatus::source)];
    let slow_start = Arc::clone(&engine.slow_start);
    tasks.spawn(async move { slow_start.run().await });
    let keeper = FleetKeeper::new(around, sources.into_iter().flatten(), listed_sender);
    tasks.spawn(keeper.run(events, suspects, engine.overrides.watch(), checks));
    let unresolved = Arc::<UnresolvedNodes>::default();
    tasks.spawn(registry::fixed::follow(nodes, doubts, events_sender, Arc::clone(&unresolved)));
    FleetInputs { listed, suspects: suspects_sender, registry, unresolved }
}

/// The inputs of the fleet keeper that other parts read or write.
pub(super) struct FleetInputs {
    /// Turns true when the sources have announced all nodes that they knew at the start.
    pub(super) listed: watch::Receiver<bool>,
    /// Reports nodes that failed a request to the keeper.
    pub(super) suspects: mpsc::Sender<Suspicion>,
    /// The status of the registry, if there is one beside the configuration.
    pub(super) registry: Option<RegistryStatus>,
    /// Nodes of the configuration whose names have no address yet.
    pub(super) unresolved: Arc<UnresolvedNodes>,
}

/// Starts the registry of the nodes that are not in the configuration. Returns its status.
fn follow_registry(
    config: &Config,
    engine: &Engine,
    (events, doubts): (&mpsc::Sender<Event>, &watch::Receiver<()>),
    tasks: &mut JoinSet<()>,
) -> Option<RegistryStatus> {
    let (events, metrics) = (events.clone(), Arc::clone(&engine.metrics));
    let has_disk = config.journal.kind != JournalKind::Memory;
    let last_fleet = has_disk.then(|| config.journal.path.join("fleet.json"));
    match (config.registry.kind, &engine.etcd) {
        (RegistryKind::Etcd, Some(etcd)) => {
            let status = WatchStatus::new("nodes");
            tasks.spawn(registry::etcd::run(registry::etcd::EtcdRegistrySettings {
                etcd: Arc::clone(etcd),
                status: Arc::clone(&status),
                snapshot: last_fleet,
                metrics,
                events,
                doubted: doubts.clone(),
            }));
            Some(RegistryStatus::Etcd(status))
        }
        (RegistryKind::Dns, _) => {
            let status = Arc::<SourceStatus>::default();
            let rejected = move || metrics.registry.rejected.inc();
            tasks.spawn(registry::dns::follow(config.registry.dns.clone(), events, Arc::clone(&status), rejected));
            Some(RegistryStatus::Dns(status))
        }
        (RegistryKind::Kubernetes, _) => {
            let status = Arc::<SourceStatus>::default();
            let access = engine.kubernetes.clone()?;
            tasks.spawn(registry::kubernetes::run(registry::kubernetes::KubernetesRegistrySettings {
                kubernetes: config.registry.kubernetes.clone(),
                access,
                status: Arc::clone(&status),
                last_fleet,
                metrics,
                events,
            }));
            Some(RegistryStatus::Kubernetes(status))
        }
        (RegistryKind::Static | RegistryKind::Etcd, _) => None,
    }
}
