//! The purge engine and the parts that it depends on. Everything else is built on them.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::traces::RunningTraces;
use super::{Addresses, sealing};
use crate::config::{Config, JournalKind, RegistryKind};
use crate::delivery::{self, Deliveries, Pace, SealedPurges};
use crate::etcd::{EtcdCluster, SharedEtcd};
use crate::fleet::{Fence, Snapshot};
use crate::journal::{self, Anew, Disk, Journal, Limits, Memory, Missed, Named, NamedStore, Position, PurgeObserver};
use crate::origin::SocketDiagnosis;
use crate::purge::Guard;
use crate::registry::kubernetes::ApiAccess;
use crate::registry::overrides::OverrideStore;
use crate::replicas::{self, FoundBy, Replicas};
use crate::slow_start::SlowStart;
use crate::telemetry::Metrics;
use crate::trial::{Trials, UnsealedCache};

/// The parts, wired to each other.
pub(super) struct Engine {
    pub(super) started: Instant,
    pub(super) metrics: Arc<Metrics>,
    pub(super) guard: Arc<Guard>,
    /// The etcd cluster, if the registry or the journal is in etcd.
    pub(super) etcd: Option<SharedEtcd>,
    /// The API server of Kubernetes, if that is the registry.
    pub(super) kubernetes: Option<ApiAccess>,
    pub(super) journal: Arc<dyn Journal>,
    /// The same journal again, if replicas share it or exchange its entries.
    shared_journal: Option<Arc<dyn journal::Shared>>,
    /// The position up to which other replicas have answered its purges, if they share it.
    answered: Option<watch::Receiver<Position>>,
    pub(super) fence: Arc<Fence>,
    pub(super) fleet: Arc<ArcSwap<Snapshot>>,
    pub(super) slow_start: Arc<SlowStart>,
    pub(super) deliveries: Arc<Deliveries>,
    pub(super) trials: Arc<Trials>,
    /// What operators say of nodes.
    pub(super) overrides: Arc<OverrideStore>,
    pub(super) traces: RunningTraces,
}

impl Engine {
    /// Opens the journal and builds the rest around it. Nothing runs yet, except the tasks of a journal in etcd.
    pub(super) async fn build(config: &Config) -> anyhow::Result<Self> {
        let started = Instant::now();
        let metrics = Arc::new(Metrics::new().context("metrics")?);
        let traces = RunningTraces::start(&config.traces, &metrics)?;
        let guard = Arc::new(Guard::with_wire(started, SocketDiagnosis::new()));
        let etcd: Option<SharedEtcd> = config.uses_etcd().then(|| Arc::new(EtcdCluster::new(&config.registry.etcd)));
        let kubernetes = match config.registry.kind {
            RegistryKind::Kubernetes => {
                Some(ApiAccess::find(&config.registry.kubernetes, |name| std::env::var(name).ok())?)
            }
            RegistryKind::Static | RegistryKind::Etcd | RegistryKind::Dns => None,
        };
        let decides = Arc::new(OnceLock::<Arc<SealedPurges>>::new());
        let (in_guard, as_sealed) = (delivery::noted_by(&guard), Arc::clone(&decides));
        let observer: PurgeObserver = Arc::new(move |entry| {
            in_guard(entry);
            // After the guard: see `SealedPurges`.
            as_sealed.get().inspect(|sealed| sealed.note(entry));
        });
        let OpenJournal { journal, shared: shared_journal, answered } =
            open_journal(config, observer, etcd.as_ref()).await?;
        let sealed = sealing::sealed_purges(config, &*journal);
        if let Some(sealed) = &sealed {
            _ = decides.set(Arc::clone(sealed));
            // The watch of a journal in etcd may have brought purges already.
            sealed.count_as_unsealed(journal.head());
        }
        for reason in Anew::REASONS {
            let is_it = journal.anew().is_some_and(|anew| anew.reason() == reason);
            metrics.journal.began_anew(reason, is_it);
        }
        // Treats every purge in the journal as answered, because it is unknown which ones the last process answered.
        let fence = Arc::new(Fence::at(journal.head()));
        let fleet = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let slow_start = Arc::new(SlowStart::new(&config.health));
        let context = delivery::DeliveryContext {
            journal: Arc::clone(&journal),
            fence: Arc::clone(&fence),
            fleet: Arc::clone(&fleet),
            guard: Arc::clone(&guard),
            metrics: Arc::clone(&metrics),
            tracer: traces.tracer.clone(),
            slow_start: Arc::clone(&slow_start),
            pace: Pace::new(&config.purge),
            sealed,
            has_trials: config.health.varnish.trial,
            started,
        };
        let deliveries = Arc::new(Deliveries::new(context));
        deliveries.show_unsealable();
        recall(&*journal, &guard);
        let trials = Arc::new(Trials::new(config.health.web.host.as_deref(), Arc::clone(&guard), Arc::clone(&metrics)));
        connect(&trials, &deliveries);
        let has_disk = config.journal.kind != JournalKind::Memory;
        let path = has_disk.then(|| config.journal.path.join("overrides.json"));
        let overrides = OverrideStore::open(etcd.clone(), path).await;
        Ok(Engine {
            started,
            metrics,
            guard,
            etcd,
            kubernetes,
            journal,
            shared_journal,
            answered,
            fence,
            fleet,
            slow_start,
            deliveries,
            trials,
            overrides,
            traces,
        })
    }

    /// Announces this process to the other clearcoats in front of this fleet, and starts to discover them. Returns
    /// `None` if no discovery is configured.
    pub(super) fn join_replicas(
        &self,
        config: &Config,
        addresses: &Addresses,
        tasks: &mut JoinSet<()>,
    ) -> anyhow::Result<Option<Arc<Replicas>>> {
        let peers = &config.replica.peers;
        // Configured peers take precedence: etcd may be in use for the nodes alone.
        let (found_by, seen_from, file) = match &self.etcd {
            _ if !peers.is_empty() => {
                let seen_from = peers.iter().map(|peer| format!("http://{}", peer.host_port())).collect();
                (FoundBy::Addresses(peers.clone()), seen_from, "peers.json")
            }
            Some(etcd) => (FoundBy::Etcd(Arc::clone(etcd)), config.registry.etcd.endpoints.clone(), "replicas.json"),
            None => return Ok(None),
        };
        let id = replicas::own_id(&config.replica).map_err(anyhow::Error::msg)?;
        let listener = addresses.purge.first().copied().context("purge.listen holds no address")?;
        let address = replicas::own_address(&config.replica, &seen_from, listener);
        let patience = config.purge.ack_timeout;
        if let Some(answered) = self.answered.clone() {
            let deliveries = Arc::clone(&self.deliveries);
            tasks.spawn(async move { deliveries.keep_up(patience, answered).await });
        } else if self.shared_journal.is_some() {
            let deliveries = Arc::clone(&self.deliveries);
            tasks.spawn(async move { deliveries.fence_in_time(patience).await });
        }
        let has_disk = config.journal.kind != JournalKind::Memory;
        let is_told = self.etcd.is_none() && config.admin.token.is_some();
        let context = replicas::ReplicaContext {
            found_by,
            journal: self.shared_journal.clone(),
            deliveries: Arc::clone(&self.deliveries),
            overrides: Some(&self.overrides).filter(|_| is_told).cloned(),
            ack_timeout: patience,
            max_request: config.purge.max_request,
            token: ArcSwapOption::from_pointee(config.purge.token.clone()),
            tracer: self.traces.tracer.clone(),
            metrics: Arc::clone(&self.metrics),
            memory: (self.shared_journal.is_some() && has_disk).then(|| config.journal.path.join(file)),
        };
        let record = replicas::Record::new(address, config.journal.kind);
        Ok(Some(Replicas::start(context, id, record, tasks)))
    }
}

/// Passes the purges of earlier processes that are still in the journal to the guard.
fn recall(journal: &dyn Journal, guard: &Guard) {
    if let Missed::Entries(entries) = journal.since(journal.older_than(Duration::MAX)) {
        entries.iter().for_each(|entry| guard.remember(&entry.purge));
    }
}

/// One journal, as each of the traits and values that its users need.
struct OpenJournal {
    journal: Arc<dyn Journal>,
    shared: Option<Arc<dyn journal::Shared>>,
    answered: Option<watch::Receiver<Position>>,
}

async fn open_journal(
    config: &Config,
    observer: PurgeObserver,
    etcd: Option<&SharedEtcd>,
) -> anyhow::Result<OpenJournal> {
    let limits = Limits { retention: config.journal.retention, max_names: config.journal.names, ..Limits::default() };
    let path = &config.journal.path;
    let settings = journal::Settings {
        limits,
        observer: Arc::clone(&observer),
        first_start: config.journal.first_start,
        damaged: config.journal.damaged,
        seals: sealing::is_waited_for_edge(config),
        own_process: true,
        patience: config.purge.ack_timeout,
    };
    let local = match (config.journal.kind, etcd) {
        (JournalKind::Etcd, Some(etcd)) => {
            let shared = Arc::new(journal::Etcd::open(path, settings, Arc::clone(etcd)).await?);
            let answered = Some(shared.answered());
            return Ok(OpenJournal {
                journal: Arc::clone(&shared) as Arc<dyn Journal>,
                shared: Some(shared),
                answered,
            });
        }
        (JournalKind::Memory, _) => NamedStore::Memory(Box::new(Memory::after_another(limits, observer))),
        (JournalKind::Disk | JournalKind::Etcd, _) => NamedStore::Disk(Disk::open(path, settings).await?),
    };
    if !config.replica.peers.is_empty() {
        let named = Arc::new(Named::new(local));
        return Ok(OpenJournal {
            journal: Arc::clone(&named) as Arc<dyn Journal>,
            shared: Some(named),
            answered: None,
        });
    }
    let journal: Arc<dyn Journal> = match local {
        NamedStore::Memory(memory) => Arc::new(*memory),
        NamedStore::Disk(disk) => Arc::new(disk),
    };
    Ok(OpenJournal { journal, shared: None, answered: None })
}

/// Has what trials show of seals treated by deliveries, and what other clearcoats see of caches tried here.
fn connect(trials: &Arc<Trials>, deliveries: &Arc<Deliveries>) {
    let caches = Arc::clone(deliveries);
    trials.on_unsealed(move |node, unsealed| match unsealed {
        UnsealedCache::Distrust => caches.distrust(node),
        UnsealedCache::Empty => caches.empty(node),
        UnsealedCache::Believe => caches.notify_progress(),
        UnsealedCache::GiveUp => caches.give_up_on_seals(node),
    });
    let tried = Arc::downgrade(trials);
    deliveries.on_seen_elsewhere(move |node| tried.upgrade().into_iter().for_each(|trials| trials.wake(node)));
}
