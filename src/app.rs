//! Wires the parts together: binds, builds, spawns, and drains them in order.
//!
//! ```text
//! registry ──events──┐
//! probes ────events──┴─> fleet keeper ──snapshot──> workers (edge, origin)
//! purge api ──append──> journal ──head──> deliveries ──bans──> Varnish
//!     └── waits for the cursors, raises the fence, answers
//! ```
//!
//! Traffic and control plane never share a thread: each worker has a runtime of its own for the traffic, and one
//! runtime carries everything else. So a purge storm or a slow registry costs a request nothing but CPU time.

mod access_log;
mod engine;
mod fleet;
pub mod listeners;
mod reload;
mod running_parts;
mod sealing;
mod supervision;
mod traces;
mod vcl;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::admin::{AdminApi, AdminContext, AdminSettings};
use crate::config::{Config, ConfigSource};
use crate::delivery::Deliveries;
use crate::files;
use crate::fleet::{Health, Role, Snapshot, Suspicion};
use crate::http_server;
use crate::inherited::InheritedSockets;
use crate::journal::Journal;
use crate::proxy::{
    self, Admission, CutRequests, Entrance, ErrorPages, IdleWorker, LeaveNotice, NOTICED, RequestQueue, RetryBudgets,
    TrafficRules,
};
use crate::purge_api::PurgeApi;
use crate::registry::RegistryStatus;
use crate::registry::fixed::UnresolvedNodes;
use crate::replicas::Replicas;
use crate::service_manager::{Heartbeats, ServiceManager};
use crate::shutdown::{self, Shutdown, ShutdownHandle, Stage};
use crate::telemetry::{Metrics, causes};
use crate::tls;
use crate::trial::Trials;
use crate::vcl_push::VclPush;
use access_log::RunningAccessLog;
use engine::Engine;
use fleet::FleetInputs;
use listeners::BoundSockets;
use reload::Reloader;
use running_parts::{RunningParts, TrafficParts};
use sealing::Sealing;
use supervision::{Supervised, supervise};
use traces::RunningTraces;

/// How long the process may take for its last words (to other replicas, to the journal, to its logs) after a second signal.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long the edge, otherwise ready to open, waits at most for the trials of the nodes that are up.
const LONGEST_TRIAL: Duration = Duration::from_secs(1);

/// The interval at which a clearcoat that ends looks whether another one stays.
const LOOK_AROUND: Duration = Duration::from_millis(250);

/// After so many looks in a row that found nobody else, none stays.
const ALONE: u32 = 2;

/// The largest request that the admin listener takes, in bytes.
const MAX_ADMIN_REQUEST: usize = 64 * 1024;

/// A running clearcoat.
pub struct App {
    addresses: Addresses,
    shutdown: ShutdownHandle,
    open: watch::Receiver<bool>,
    /// Closed when every worker's edge has drained.
    edge_in_use: mpsc::Receiver<Infallible>,
    workers: Vec<JoinHandle<CutRequests>>,
    servers: JoinSet<()>,
    tasks: JoinSet<()>,
    /// What a reload changes.
    parts: Arc<RunningParts>,
    fleet: Arc<ArcSwap<Snapshot>>,
    /// What must go on while the process runs.
    loops: Heartbeats,
    /// Tells the service manager how things stand.
    supervision: Option<AbortHandle>,
    metrics: Arc<Metrics>,
    deliveries: Arc<Deliveries>,
    journal: Arc<dyn Journal>,
    replicas: Option<Arc<Replicas>>,
    access_log: Arc<Mutex<RunningAccessLog>>,
    traces: RunningTraces,
}

/// The bound addresses of the listeners, with port 0 resolved to the real port.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// Clients.
    pub edge: Vec<SocketAddr>,
    /// Clients by TLS.
    pub edge_tls: Vec<SocketAddr>,
    /// Varnish.
    pub origin: Vec<SocketAddr>,
    /// Magento's purges.
    pub purge: Vec<SocketAddr>,
    /// Operators.
    pub admin: Vec<SocketAddr>,
}

impl App {
    /// Opens the journal, binds every listener and starts to work. Returns before the edge takes traffic: see
    /// [`App::opened`].
    ///
    /// Everything that can fail is done before edge and origin listen: the kernel shares their connections among all processes
    /// that listen there, and a second process, started by mistake, that ended a moment later would take some of those of the
    /// first one with it. The other listeners are nobody else's once they are bound.
    ///
    /// `inherited` are listening sockets that were there before.
    ///
    /// # Errors
    /// A file that cannot be used, a journal that cannot be opened, or an address that cannot be bound. Nothing runs then, and
    /// no client was connected.
    pub async fn start(config: &Config, inherited: InheritedSockets) -> anyhow::Result<App> {
        let Foundation { limit, certificates, error_pages, engine, access_log, sockets, addresses } =
            Foundation::lay(config, inherited).await?;
        let mut tasks = JoinSet::new();
        let (shutdown_handle, shutdown) = shutdown::channel();
        let mut loops = Heartbeats::default();
        let (nodes, configured) = watch::channel(config.nodes.clone());
        let (checks, followed_checks) = watch::channel(config.health.clone());
        engine.overrides.start(&mut tasks);
        let FleetInputs { listed, suspects, registry, unresolved } =
            fleet::keep(config, (configured, followed_checks), &engine, loops.watch("fleet-keeper"), &mut tasks);
        spawn_keepers(&engine, &certificates, &mut tasks);
        let replicas = engine.join_replicas(config, &addresses, &mut tasks)?;
        let first_round = FirstRound::of(&engine, config);
        let traffic = traffic_parts(&engine, config, replicas.as_ref());
        let purge_api = Arc::new(purge_api(config, &engine, replicas.clone()));
        let (opening, open) = watch::channel(false);
        let (vcl_push, pushed) =
            vcl::start_pushing(config, &engine, &listed, (replicas.as_ref(), registry.as_ref()), &mut tasks);
        let shown = ShownParts { unresolved, registry, replicas: replicas.clone(), vcl_push, open: open.clone() };
        let admin_api = Arc::new(admin_api(config, &engine, &purge_api, shown, shutdown.clone()));
        tasks.spawn(Arc::clone(&admin_api).observe());
        let BoundSockets { edge, origin, purge, admin } = sockets;
        let plan = files::Plan::new(limit, purge.len() + admin.len(), config.nodes.len());
        let mut servers = JoinSet::new();
        serve_all(&mut servers, purge, &purge_api, (plan.control_connections, config.purge.max_request), &shutdown);
        serve_all(&mut servers, admin, &admin_api, (plan.control_connections, MAX_ADMIN_REQUEST), &shutdown);

        let rules = Arc::new(ArcSwap::from_pointee(traffic.rules(config, access_log.log.clone(), &error_pages)));
        let files = files::FileBudget::new(&plan, config.limits.max_connections, &engine.metrics);
        let shared = worker_context(config, &engine, (Arc::clone(&rules), files), suspects, shutdown);
        let Engine { metrics, journal, fleet, slow_start, deliveries, traces, .. } = engine;
        let (idle, edge_in_use) = start_workers(edge.len(), &shared, &mut loops)?;
        listeners::listen(edge.iter().chain(&origin), &addresses)?;
        let (origin_opening, origin_open) = watch::channel(false);
        let workers = serve_traffic(idle, edge.into_iter().zip(origin), &open, &origin_open);
        let caches = Arc::clone(&traffic.leave_notice);
        let others = replicas.clone().map(|replicas| (replicas, caches));
        tasks.spawn(open_listeners(listed, first_round, others, (origin_opening, opening)));
        let access_log = Arc::new(Mutex::new(access_log));
        tasks.spawn(access_log::say_losses(metrics.access_log_dropped.clone(), Arc::clone(&metrics.incidents)));
        let parts = RunningParts {
            nodes,
            checks,
            pushed,
            traffic,
            rules,
            admission: shared.admission,
            files: shared.files,
            queue: shared.queue,
            slow_start,
            deliveries: Arc::clone(&deliveries),
            purge_api,
            admin_api,
            replicas: replicas.clone(),
            certificates,
            access_log: Arc::clone(&access_log),
            times: Arc::new(Mutex::new(config.shutdown)),
        };
        Ok(App {
            addresses,
            shutdown: shutdown_handle,
            open,
            edge_in_use,
            workers,
            servers,
            tasks,
            parts: Arc::new(parts),
            fleet,
            loops,
            supervision: None,
            metrics,
            deliveries,
            journal,
            replicas,
            access_log,
            traces,
        })
    }

    /// Has the file of the access log opened again, after somebody has moved it away. Returns whether there is an access log.
    pub fn access_log_reopener(&self) -> impl Fn() -> bool + use<> {
        let access_log = Arc::clone(&self.access_log);
        move || access_log.lock().reopen()
    }

    /// Tells the service manager when the edge takes traffic, and from then on how things stand and that all goes on.
    pub fn report_to(&mut self, manager: &ServiceManager) {
        let supervised = Supervised {
            manager: manager.clone(),
            open: self.open.clone(),
            fleet: Arc::clone(&self.fleet),
            incidents: Arc::clone(&self.metrics.incidents),
            loops: std::mem::take(&mut self.loops),
        };
        self.supervision = Some(self.tasks.spawn(supervise(supervised)));
    }

    /// Reloads the configuration when its file changes and whenever the returned `Notify` is notified. `running` is the
    /// configuration that this process was started with. `app/reload.rs` says which keys can change at run time.
    pub fn reload_from(&mut self, source: ConfigSource, running: Config, manager: &ServiceManager) -> Arc<Notify> {
        let asked = Arc::new(Notify::new());
        let parts = Arc::clone(&self.parts) as _;
        let reloader = Reloader::new(source, running, parts, Arc::clone(&self.metrics), manager.clone());
        self.tasks.spawn(reloader.run(Arc::clone(&asked)));
        asked
    }

    /// The bound addresses of the listeners.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Returns when the edge takes traffic: after one round of deliveries to all nodes, or after `ack_timeout`.
    pub async fn opened(&self) {
        // The sender lives in one of our tasks; if it is gone, the process is ending.
        _ = self.open.clone().wait_for(|open| *open).await;
    }

    /// Shuts down in order: fails `/readyz`, stops accepting, lets requests under way finish, says goodbye, saves the cursors.
    ///
    /// `next_signal` returns when somebody asks once more: requests under way are cut then, and the rest is done in
    /// [`LAST_WORDS`]. Once more, and it is not done at all.
    pub async fn stop(self, mut next_signal: impl AsyncFnMut()) {
        let App { shutdown, mut edge_in_use, workers, parts, mut servers, mut tasks, metrics, supervision, .. } = self;
        if let Some(supervision) = supervision {
            // From now on its parts end one after the other, and how things stand was told.
            supervision.abort();
        }
        let App { deliveries, journal, replicas, access_log, traces, .. } = self;
        let mut drained = pin!(async {
            let cut = end_of(workers).await;
            // Not earlier: as long as pages pass here, other clearcoats report purges to us and ask about pages.
            shutdown.advance(Stage::Closing);
            while servers.join_next().await.is_some() {}
            cut
        });
        let overdue = async {
            let times = *parts.times.lock();
            shutdown.advance(Stage::Leaving);
            if let Some(replicas) = &parts.replicas {
                replicas.end_serving();
            }
            let edge_drains = async {
                tokio::time::sleep(times.leave).await;
                shutdown.advance(Stage::Draining);
                // Clients may be waiting for a page that Varnish has yet to fetch through the origin.
                _ = edge_in_use.recv().await;
            };
            let noticed = Notify::new();
            let origin_closes = async {
                tokio::join!(edge_drains, noticed.notified());
                shutdown.advance(Stage::Emptying);
            };
            let told = tell_caches(&parts.traffic.leave_notice, parts.replicas.as_ref(), &noticed);
            _ = tokio::time::timeout(times.leave + times.drain, async { tokio::join!(origin_closes, told) }).await;
        };
        let reason = tokio::select! {
            _nothing_is_cut = &mut drained => None,
            () = overdue => Some(CutReason::DrainOver),
            () = next_signal() => Some(CutReason::SecondSignal),
        };
        if let Some(reason) = reason {
            let purges = metrics.purge.waiting.get();
            shutdown.advance(Stage::Stopping);
            let CutRequests { edge, origin } = drained.await;
            if edge + origin > 0 || purges > 0 {
                tracing::warn!(edge, origin, purges, "requests that were still under way are cut: {}", reason.as_str());
            }
        }
        let last_words = async {
            // No client is served here any more, so other replicas need not wait for our confirmation.
            if let Some(replicas) = replicas {
                replicas.withdraw().await;
            }
            tasks.shutdown().await;
            if let Err(error) = journal.save_cursors(deliveries.cursors()).await {
                tracing::warn!(error = %causes(&error), "cursors could not be saved");
            }
            // The rules have the log as well.
            drop(parts);
            let access_log = std::mem::take(&mut *access_log.lock());
            access_log.end().await;
            traces.end().await;
        };
        let too_late = async {
            match reason {
                Some(CutReason::SecondSignal) => tokio::time::sleep(LAST_WORDS).await,
                Some(CutReason::DrainOver) | None => next_signal().await,
            }
        };
        tokio::select! {
            () = last_words => {}
            () = too_late => tracing::warn!("ended before all was saved: a restart tells Varnish more than it needs"),
        }
    }
}

/// Why requests under way are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CutReason {
    /// They had their time.
    DrainOver,
    /// Somebody does not want to wait.
    SecondSignal,
}

impl CutReason {
    fn as_str(self) -> &'static str {
        match self {
            CutReason::DrainOver => "shutdown.drain is over",
            CutReason::SecondSignal => "a second signal",
        }
    }
}

/// Waits for the end of all workers. Returns what they cut together.
async fn end_of(workers: Vec<JoinHandle<CutRequests>>) -> CutRequests {
    let joined = tokio::task::spawn_blocking(|| workers.into_iter().map(JoinHandle::join).collect::<Vec<_>>());
    let ends = joined.await.unwrap_or_default();
    if ends.iter().any(Result::is_err) {
        tracing::error!("a worker panicked");
    }
    ends.into_iter().flatten().fold(CutRequests::default(), |sum, of_one| CutRequests {
        edge: sum.edge + of_one.edge,
        origin: sum.origin + of_one.origin,
    })
}

/// All that can fail, and that no client notices.
struct Foundation {
    /// Of open files.
    limit: u64,
    certificates: Vec<(SocketAddr, Arc<tls::Tls>)>,
    error_pages: Arc<ErrorPages>,
    engine: Engine,
    access_log: RunningAccessLog,
    sockets: BoundSockets,
    addresses: Addresses,
}

impl Foundation {
    async fn lay(config: &Config, inherited: InheritedSockets) -> anyhow::Result<Self> {
        let (before, limit) = files::raise_limit();
        tracing::info!(before, limit, "limit of open files");
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let workers = config.runtime.workers.map_or_else(cores, usize::from);
        let certificates = listeners::load_certificates(&config.edge)?;
        let error_pages = Arc::new(ErrorPages::read(&config.edge)?);
        let engine = Engine::build(config).await?;
        let access_log = RunningAccessLog::start(&config.log, &engine.metrics)?;
        let (sockets, addresses) = BoundSockets::bind(config, &certificates, inherited, workers).await?;
        Ok(Foundation { limit, certificates, error_pages, engine, access_log, sockets, addresses })
    }
}

/// What the admin listener shows beside the engine.
struct ShownParts {
    unresolved: Arc<UnresolvedNodes>,
    registry: Option<RegistryStatus>,
    replicas: Option<Arc<Replicas>>,
    vcl_push: Arc<VclPush>,
    open: watch::Receiver<bool>,
}

/// The admin listener's handler.
fn admin_api(
    config: &Config,
    engine: &Engine,
    purge_api: &Arc<PurgeApi>,
    ShownParts { unresolved, registry, replicas, vcl_push, open }: ShownParts,
    shutdown: Shutdown,
) -> AdminApi {
    AdminApi::new(AdminContext {
        fleet: Arc::clone(&engine.fleet),
        unresolved,
        fence: Arc::clone(&engine.fence),
        journal: Arc::clone(&engine.journal),
        journal_kind: config.journal.kind.as_str(),
        replicas,
        vcl_push,
        deliveries: Arc::clone(&engine.deliveries),
        trials: Arc::clone(&engine.trials),
        overrides: Arc::clone(&engine.overrides),
        draining: tokio::sync::Mutex::default(),
        attribution: purge_api.attribution(),
        purge_api: Arc::clone(purge_api),
        settings: ArcSwap::from_pointee(AdminSettings::of(config)),
        registry,
        metrics: Arc::clone(&engine.metrics),
        open,
        shutdown,
    })
}

/// What all workers share.
fn worker_context(
    config: &Config,
    engine: &Engine,
    (rules, files): (Arc<ArcSwap<TrafficRules>>, files::FileBudget),
    suspects: mpsc::Sender<Suspicion>,
    shutdown: Shutdown,
) -> proxy::WorkerContext {
    let (of_one, connections) = (config.limits.max_connections_per_address, engine.metrics.edge_connections.clone());
    let (fleet, metrics) = (Arc::clone(&engine.fleet), Arc::clone(&engine.metrics));
    proxy::WorkerContext {
        queue: Arc::new(RequestQueue::new(Arc::clone(&fleet), Arc::clone(&rules), Arc::clone(&metrics))),
        retries: Arc::new(RetryBudgets::new(Arc::clone(&metrics))),
        fleet,
        metrics,
        suspects,
        rules,
        admission: Arc::new(Admission::new(of_one, connections)),
        files: Arc::new(files),
        spin: config.runtime.spin,
        started: engine.started,
        shutdown,
        tracer: engine.traces.tracer.clone(),
    }
}

/// Starts what goes on beside everything else: cursors are saved, and certificates that change are taken.
fn spawn_keepers(engine: &Engine, certificates: &[(SocketAddr, Arc<tls::Tls>)], tasks: &mut JoinSet<()>) {
    let saved = Arc::clone(&engine.deliveries);
    tasks.spawn(async move { saved.save_cursors().await });
    for (_, tls) in certificates {
        tasks.spawn(tls::watch(Arc::clone(tls), Arc::clone(&engine.metrics), tls::LOOK_EVERY));
    }
}

/// Serves the sockets of one listener of the control plane.
fn serve_all<H: http_server::Handler>(
    servers: &mut JoinSet<()>,
    sockets: Vec<TcpListener>,
    handler: &Arc<H>,
    (max_connections, max_request): (usize, usize),
    shutdown: &Shutdown,
) {
    for socket in sockets {
        let handler = Arc::clone(handler);
        servers.spawn(http_server::serve(socket, handler, max_connections, max_request, shutdown.clone()));
    }
}

/// Has each Varnish know that this clearcoat is about to end, as long as another one stays: whoever stayed may end as well, and
/// somebody has to serve the last requests. `noticed` is notified when nobody sends it more. Never returns.
async fn tell_caches(notice: &LeaveNotice, replicas: Option<&Arc<Replicas>>, noticed: &Notify) -> Infallible {
    let mut told_since = None;
    let mut alone = 0;
    loop {
        let another_stays = match replicas {
            Some(replicas) => replicas.another_stays().await,
            None => false,
        };
        alone = if another_stays { 0 } else { ALONE.min(alone + 1) };
        // One answer that came late is no end of another clearcoat.
        if another_stays || alone == ALONE {
            notice.refuse(another_stays);
        }
        let told = told_since.get_or_insert_with(tokio::time::Instant::now).elapsed();
        if alone >= ALONE || !notice.is_asked() || told >= NOTICED {
            noticed.notify_one();
        }
        tokio::time::sleep(LOOK_AROUND).await;
    }
}

/// What edge and origin are made of, beside their configuration.
fn traffic_parts(engine: &Engine, config: &Config, replicas: Option<&Arc<Replicas>>) -> TrafficParts {
    let Engine { metrics, guard, fence, trials, journal, deliveries, .. } = engine;
    TrafficParts {
        fence: Arc::clone(fence),
        guard: Arc::clone(guard),
        trials: Arc::clone(trials),
        sealing: Sealing::of(&**journal, (deliveries, trials), replicas, metrics, config),
        leave_notice: Arc::default(),
        metrics: Arc::clone(metrics),
        buckets: Arc::default(),
        started: engine.started,
    }
}

/// Starts the workers, without sockets. The returned receiver is closed when the process drains and no client is left at any
/// worker's edge.
fn start_workers(
    workers: usize,
    shared: &proxy::WorkerContext,
    loops: &mut Heartbeats,
) -> anyhow::Result<(Vec<IdleWorker>, mpsc::Receiver<Infallible>)> {
    let (in_use, edge_in_use) = mpsc::channel(1);
    let workers = (0..workers)
        .map(|index| IdleWorker::start(index, shared.clone(), in_use.clone(), loops.watch(format!("worker-{index}"))));
    let workers = workers.collect::<Result<_, _>>().context("a worker thread could not be started")?;
    Ok((workers, edge_in_use))
}

/// Gives each worker its sockets of edge and origin.
fn serve_traffic(
    workers: Vec<IdleWorker>,
    sockets: impl Iterator<Item = (Vec<proxy::Listener>, Vec<proxy::Listener>)>,
    edge_open: &watch::Receiver<bool>,
    origin_open: &watch::Receiver<bool>,
) -> Vec<JoinHandle<CutRequests>> {
    let workers = workers.into_iter().zip(sockets).map(|(worker, (edge, origin))| {
        let edge = Entrance { sockets: edge, role: Role::Varnish, open: edge_open.clone() };
        let origin = Entrance { sockets: origin, role: Role::Web, open: origin_open.clone() };
        worker.serve(vec![edge, origin])
    });
    workers.collect()
}

/// The deliveries and trials that the edge waits for before it opens.
struct FirstRound {
    fleet: Arc<ArcSwap<Snapshot>>,
    deliveries: Arc<Deliveries>,
    trials: Option<Arc<Trials>>,
    patience: Duration,
}

impl FirstRound {
    fn of(engine: &Engine, config: &Config) -> Self {
        FirstRound {
            fleet: Arc::clone(&engine.fleet),
            deliveries: Arc::clone(&engine.deliveries),
            trials: config.health.varnish.trial.then(|| Arc::clone(&engine.trials)),
            patience: config.purge.ack_timeout,
        }
    }

    /// Returns when every node has every purge that was answered before, and the nodes that are up have been tried; or
    /// when the time for that is over.
    async fn ended(&self) {
        if tokio::time::timeout(self.patience, self.deliveries.all_current()).await.is_err() {
            tracing::warn!("the edge opens though not every Varnish is up to date; those that are not get no traffic");
        }
        let Some(trials) = &self.trials else { return };
        let up = || {
            let fleet = self.fleet.load();
            let members = fleet.varnish.members().iter().filter(|member| member.health == Health::Up);
            members.map(|member| Arc::clone(&member.node)).collect()
        };
        // A node that has not been tried by then serves until its trial.
        _ = tokio::time::timeout(self.patience.min(LONGEST_TRIAL), trials.all_tried(up)).await;
    }
}

/// Opens origin and edge.
///
/// The origin opens before the edge, because Varnish needs its backend, and a page that is fetched now cannot be stale. But it
/// waits until the nodes are known: without them it would refuse requests that another clearcoat could serve. The edge opens
/// after the first round: every node has every purge that was answered before, or the time for that is over.
async fn open_listeners(
    mut listed: watch::Receiver<bool>,
    first_round: FirstRound,
    others: Option<(Arc<Replicas>, Arc<LeaveNotice>)>,
    (origin, edge): (watch::Sender<bool>, watch::Sender<bool>),
) {
    if listed.wait_for(|listed| *listed).await.is_err() {
        return;
    }
    origin.send_replace(true);
    if let Some((replicas, caches)) = others {
        replicas.begin_serving(move || caches.is_asked());
        // Purges that the other replicas accept from now on are sent to us. Earlier ones are answered already, or will
        // be without us.
        replicas.announced().await;
        first_round.deliveries.fence_everything();
    }
    first_round.ended().await;
    tracing::info!("the edge is open");
    edge.send_replace(true);
    // Keeps the channels open until every receiver is gone, so that each of them sees the change.
    edge.closed().await;
    origin.closed().await;
}

/// The purge listener's handler, in front of this engine.
fn purge_api(config: &Config, engine: &Engine, replicas: Option<Arc<Replicas>>) -> PurgeApi {
    let (journal, deliveries) = (Arc::clone(&engine.journal), Arc::clone(&engine.deliveries));
    let (metrics, tracer) = (Arc::clone(&engine.metrics), engine.traces.tracer.clone());
    PurgeApi::new(&config.purge, journal, deliveries, replicas, metrics, tracer)
}
