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
mod sealing;
mod traces;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use crate::admin::{AdminApi, AdminContext};
use crate::config::{Config, ConfigSource, StaticNode};
use crate::delivery::Deliveries;
use crate::edge;
use crate::files;
use crate::fleet::{Health, NodeKey, Snapshot};
use crate::http_server;
use crate::journal::Journal;
use crate::origin;
use crate::proxy::{self, Entrance, Frontend};
use crate::purge_api::PurgeApi;
use crate::replicas::Replicas;
use crate::shutdown::{self, Shutdown, ShutdownHandle, Stage};
use crate::telemetry::access::ReopenAccessLog;
use crate::telemetry::{Metrics, causes};
use crate::tls;
use crate::trial::Trials;
use access_log::RunningAccessLog;
use engine::Engine;
use fleet::FleetInputs;
use reload::Reloader;
use sealing::Sealing;
use traces::RunningTraces;

/// How long the process keeps accepting connections after `/readyz` starts to fail, so that a load balancer in front
/// can stop using it first.
const LEAVE: Duration = Duration::from_secs(1);

/// How long requests under way may take to finish. Together with [`LEAVE`] it is less than the 10 s after which `docker
/// stop` kills.
const DRAIN: Duration = Duration::from_secs(8);

/// How long the edge, otherwise ready to open, waits at most for the trials of the nodes that are up.
const LONGEST_TRIAL: Duration = Duration::from_secs(1);

/// The largest request that the admin listener takes, in bytes.
const MAX_ADMIN_REQUEST: usize = 64 * 1024;

/// A running clearcoat.
pub struct App {
    addresses: Addresses,
    shutdown: ShutdownHandle,
    open: watch::Receiver<bool>,
    /// Closed when every worker's edge has drained.
    edge_in_use: mpsc::Receiver<Infallible>,
    workers: Vec<JoinHandle<()>>,
    servers: JoinSet<()>,
    tasks: JoinSet<()>,
    /// The nodes of the configuration.
    nodes: watch::Sender<Vec<StaticNode>>,
    metrics: Arc<Metrics>,
    deliveries: Arc<Deliveries>,
    journal: Arc<dyn Journal>,
    replicas: Option<Arc<Replicas>>,
    access_log: RunningAccessLog,
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
    /// Binds every listener, opens the journal and starts to work. Returns before the edge takes traffic: see
    /// [`App::opened`].
    ///
    /// # Errors
    /// An address that cannot be bound, or a journal that cannot be opened. Nothing runs then.
    pub async fn start(config: &Config) -> anyhow::Result<App> {
        let (before, limit) = files::raise_limit();
        tracing::info!(before, limit, "limit of open files");
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let workers = config.runtime.workers.map_or_else(cores, usize::from);
        let mut addresses = Addresses::default();
        let certificates = listeners::load_certificates(&config.edge)?;
        let edge = listeners::bind_edge(&config.edge.listen, &certificates, workers, &mut addresses)?;
        let origin = listeners::bind_workers(&config.origin.listen, workers, "origin", None, &mut addresses.origin)?;
        let purge = listeners::bind_control(&config.purge.listen, "purge", &mut addresses.purge).await?;
        let admin = listeners::bind_control(&config.admin.listen, "admin", &mut addresses.admin).await?;

        let engine = Engine::build(config).await?;
        let (shutdown_handle, shutdown) = shutdown::channel();
        let (open_sender, open) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let (nodes, configured) = watch::channel(config.nodes.clone());
        engine.overrides.start(&mut tasks);
        let FleetInputs { listed, suspects, registry, unresolved } =
            fleet::keep(config, configured, &engine, &mut tasks);
        spawn_keepers(&engine, certificates.into_iter().map(|(_, tls)| tls), &mut tasks);
        let replicas = engine.join_replicas(config, &addresses, &mut tasks)?;
        let first_round = FirstRound::of(&engine, config);
        tasks.spawn(open_edge(listed.clone(), first_round, replicas.clone(), open_sender));

        let frontends = Frontends::new(&engine, config, replicas.as_ref(), open.clone(), listed);
        let purge_api = Arc::new(purge_api(config, &engine, replicas.clone()));
        let Engine { metrics, journal, fence, fleet, deliveries, trials, overrides, started, traces, .. } = engine;
        let admin_api = Arc::new(AdminApi::new(AdminContext {
            fleet: Arc::clone(&fleet),
            unresolved,
            fence: Arc::clone(&fence),
            journal: Arc::clone(&journal),
            journal_kind: config.journal.kind.as_str(),
            replicas: replicas.clone(),
            deliveries: Arc::clone(&deliveries),
            trials: Arc::clone(&trials),
            overrides,
            attribution: purge_api.attribution(),
            purge_api: Arc::clone(&purge_api),
            token: config.admin.token.clone(),
            hosts: config.admin.hosts.clone(),
            when_all_behind: config.edge.when_all_behind,
            registry,
            metrics: Arc::clone(&metrics),
            open: open.clone(),
            shutdown: shutdown.clone(),
        }));
        tasks.spawn(Arc::clone(&admin_api).observe());
        let plan = files::Plan::new(limit, purge.len() + admin.len(), config.nodes.len());
        let mut servers = JoinSet::new();
        serve_all(&mut servers, purge, &purge_api, (plan.control_connections, config.purge.max_request), &shutdown);
        serve_all(&mut servers, admin, &admin_api, (plan.control_connections, MAX_ADMIN_REQUEST), &shutdown);

        let access_log = RunningAccessLog::start(&config.log, &metrics, &mut tasks)?;
        let files = files::FileBudget::new(&plan, config.limits.max_connections, &metrics);
        let shared = shared(config, fleet, (Arc::clone(&metrics), files), suspects, started, shutdown);
        let shared = proxy::WorkerContext { access: access_log.log.clone(), tracer: traces.tracer.clone(), ..shared };
        let sockets = edge.into_iter().zip(origin);
        let (workers, edge_in_use) = start_workers(sockets, &shared, &frontends)?;
        Ok(App {
            addresses,
            shutdown: shutdown_handle,
            open,
            edge_in_use,
            workers,
            servers,
            tasks,
            nodes,
            metrics,
            deliveries,
            journal,
            replicas,
            access_log,
            traces,
        })
    }

    /// What opens the file of the access log again, if there is an access log.
    pub fn access_log_reopener(&self) -> Option<ReopenAccessLog> {
        self.access_log.reopener()
    }

    /// Reloads the configuration when its file changes and whenever the returned `Notify` is notified. `running` is the
    /// configuration that this process was started with. `app/reload.rs` says which keys can change at run time.
    pub fn reload_from(&mut self, source: ConfigSource, running: Config) -> Arc<Notify> {
        let asked = Arc::new(Notify::new());
        let reloader = Reloader::new(source, running, self.nodes.clone(), Arc::clone(&self.metrics));
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

    /// Shuts down in order: fails `/readyz`, stops accepting, lets requests under way finish, saves the cursors. When
    /// `hurry` resolves, requests under way are cut.
    pub async fn stop(self, hurry: impl Future<Output = ()>) {
        let App { shutdown, mut edge_in_use, workers, mut servers, mut tasks, .. } = self;
        let App { deliveries, journal, replicas, access_log, traces, .. } = self;
        let drained = async {
            let joined =
                tokio::task::spawn_blocking(|| workers.into_iter().map(JoinHandle::join).all(|end| end.is_ok()));
            if !joined.await.unwrap_or(false) {
                tracing::error!("a worker panicked");
            }
            // Not earlier: as long as pages pass here, other clearcoats report purges to us and ask about pages.
            shutdown.advance(Stage::Closing);
            while servers.join_next().await.is_some() {}
        };
        let stages = async {
            let orderly = async {
                shutdown.advance(Stage::Leaving);
                tokio::time::sleep(LEAVE).await;
                shutdown.advance(Stage::Draining);
                let finished = async {
                    // Clients may be waiting for a page that Varnish has yet to fetch through the origin.
                    _ = edge_in_use.recv().await;
                    shutdown.advance(Stage::Emptying);
                    std::future::pending::<()>().await;
                };
                _ = tokio::time::timeout(DRAIN, finished).await;
            };
            tokio::select! {
                () = orderly => tracing::warn!("requests that were still under way are cut"),
                () = hurry => tracing::warn!("requests under way are cut"),
            }
            shutdown.advance(Stage::Stopping);
            // From here on only `drained` ends the wait.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = drained => {}
            () = stages => {}
        }
        // No client is served here any more, so other replicas need not wait for our confirmation.
        if let Some(replicas) = replicas {
            replicas.withdraw().await;
        }
        tasks.shutdown().await;
        if let Err(error) = journal.save_cursors(deliveries.cursors()).await {
            tracing::warn!(error = %causes(&error), "cursors could not be saved");
        }
        access_log.end().await;
        traces.end().await;
    }
}

/// Starts what goes on beside everything else: cursors are saved, and certificates that change are taken.
fn spawn_keepers(engine: &Engine, certificates: impl Iterator<Item = tls::Tls>, tasks: &mut JoinSet<()>) {
    let saved = Arc::clone(&engine.deliveries);
    tasks.spawn(async move { saved.save_cursors().await });
    for tls in certificates {
        tasks.spawn(tls::watch(Arc::new(tls), Arc::clone(&engine.metrics), tls::LOOK_EVERY));
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

/// The two frontends, and for each the condition that must hold before it accepts connections.
#[derive(Clone)]
struct Frontends {
    edge: Frontend,
    /// Turns true when the first round of deliveries is over.
    opens: watch::Receiver<bool>,
    origin: Frontend,
    /// Turns true when the nodes are known.
    listed: watch::Receiver<bool>,
}

impl Frontends {
    fn new(
        engine: &Engine,
        config: &Config,
        replicas: Option<&Arc<Replicas>>,
        opens: watch::Receiver<bool>,
        listed: watch::Receiver<bool>,
    ) -> Self {
        let Engine { metrics, guard, fence, trials, journal, deliveries, .. } = engine;
        let sealing = Sealing::of(&**journal, deliveries, replicas, metrics, config);
        let (methods, trials, metrics) = (&config.purge.methods, || Arc::clone(trials), || Arc::clone(metrics));
        let edge = edge::frontend(&config.edge, methods, Arc::clone(fence), trials(), sealing.edge, metrics());
        let origin = origin::frontend(&config.origin, methods, Arc::clone(guard), sealing.origin, trials(), metrics());
        Frontends { edge, opens, origin, listed }
    }
}

/// Starts the workers, each with its sockets of edge and origin. The returned receiver is closed when the process
/// drains and no client is left at any worker's edge.
fn start_workers(
    sockets: impl Iterator<Item = (Vec<proxy::Listener>, Vec<proxy::Listener>)>,
    shared: &proxy::WorkerContext,
    frontends: &Frontends,
) -> anyhow::Result<(Vec<JoinHandle<()>>, mpsc::Receiver<Infallible>)> {
    // The origin opens before the edge, because Varnish needs its backend, and a page that is fetched now cannot be
    // stale. But it waits until the nodes are known: without them it would refuse requests that another clearcoat could
    // serve.
    let (in_use, edge_in_use) = mpsc::channel(1);
    let workers = sockets.enumerate().map(|(index, (edge, origin))| {
        let Frontends { edge: edge_frontend, opens, origin: origin_frontend, listed } = frontends.clone();
        let edge = Entrance { sockets: edge, frontend: edge_frontend, open: opens };
        let origin = Entrance { sockets: origin, frontend: origin_frontend, open: listed };
        proxy::spawn(index, shared.clone(), vec![edge, origin], in_use.clone())
    });
    let workers = workers.collect::<Result<_, _>>().context("a worker thread could not be started")?;
    Ok((workers, edge_in_use))
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

/// Opens the edge after the first round: every node has every purge that was answered before, or `patience` is over.
async fn open_edge(
    mut listed: watch::Receiver<bool>,
    first_round: FirstRound,
    replicas: Option<Arc<Replicas>>,
    open: watch::Sender<bool>,
) {
    if listed.wait_for(|listed| *listed).await.is_err() {
        return;
    }
    if let Some(replicas) = replicas {
        // Purges that the other replicas accept from now on are sent to us. Earlier ones are answered already, or will
        // be without us.
        replicas.announced().await;
        first_round.deliveries.fence_everything();
    }
    first_round.ended().await;
    tracing::info!("the edge is open");
    open.send_replace(true);
    // Keeps the channel open until every receiver is gone, so that each of them sees the change.
    open.closed().await;
}

/// The purge listener's handler, in front of this engine.
fn purge_api(config: &Config, engine: &Engine, replicas: Option<Arc<Replicas>>) -> PurgeApi {
    let (journal, deliveries) = (Arc::clone(&engine.journal), Arc::clone(&engine.deliveries));
    let (metrics, tracer) = (Arc::clone(&engine.metrics), engine.traces.tracer.clone());
    PurgeApi::new(&config.purge, journal, deliveries, replicas, metrics, tracer)
}

/// The context that all workers share.
fn shared(
    config: &Config,
    fleet: Arc<ArcSwap<Snapshot>>,
    (metrics, files): (Arc<Metrics>, files::FileBudget),
    suspects: mpsc::Sender<NodeKey>,
    started: Instant,
    shutdown: Shutdown,
) -> proxy::WorkerContext {
    let limits = Arc::new(config.limits.clone());
    let admission = proxy::Admission::new(limits.max_connections_per_address, metrics.edge_connections.clone());
    let (admission, files, spin) = (Arc::new(admission), Arc::new(files), config.runtime.spin);
    proxy::WorkerContext {
        fleet,
        metrics,
        suspects,
        limits,
        admission,
        files,
        spin,
        started,
        shutdown,
        access: None,
        tracer: None,
    }
}
