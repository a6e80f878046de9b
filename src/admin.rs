//! The admin listener: the status page, metrics, health of this process, and as JSON the fleet and who purges what.
//!
//! What is shown is read when it is asked for. Only what has a past is kept, by one task that looks every second
//! ([`AdminApi::observe`]): the traffic of the last quarter of an hour, and since when a node is in or out. Nothing here
//! is on the way of a request or a purge.

mod discovery;
mod history;
mod host;
mod last_minute;
mod listeners;
mod node_order;
mod operator;
mod page;
mod problems;
mod progress;
mod standing;
mod view;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{HeaderValue, header};
use hyper::body::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::attribution::{Attribution, Throttle};
use crate::clock;
use crate::config::{Config, RequestTerms, Token, WhenAllBehind};
use crate::delivery::Deliveries;
use crate::fleet::{Fence, Health, Member, NodeKey, Pool, Role, Snapshot};
use crate::http_server::{Handler, Response, events, json, response, text};
use crate::journal::Journal;
use crate::purge_api::PurgeApi;
use crate::registry::RegistryStatus;
use crate::registry::fixed::UnresolvedNodes;
use crate::registry::overrides::OverrideStore;
use crate::replicas::Replicas;
use crate::shutdown::{Shutdown, Stage};
use crate::telemetry::{IncidentKind, Metrics, PurgeResult};
use crate::trial::Trials;
use crate::vcl_push::VclPush;
use history::{EdgeReading, History, STEP};
use last_minute::{NodeMemories, NodeReading};
use listeners::{KEEP_ALIVE, Listeners, event};
use operator::Objection;
pub use standing::advice_for;
use view::{RegistryView, lag_age};

/// How often it is looked at what has changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The looks from one sample of the traffic to the next.
const LOOKS_PER_STEP: u64 = STEP.as_secs() / LOOK_EVERY.as_secs();

/// The looks after which listeners get a sign of life.
const LOOKS_PER_SIGN: u64 = 15;

/// Answers operators and their tools.
pub struct AdminApi {
    context: AdminContext,
    observed: Mutex<Observed>,
    listeners: Listeners,
    refused_told: Mutex<Throttle>,
}

/// What the admin listener shows, and from where.
pub struct AdminContext {
    /// The fleet as it is now.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// The nodes of the configuration that have no address yet.
    pub unresolved: Arc<UnresolvedNodes>,
    /// The fence.
    pub fence: Arc<Fence>,
    /// The journal.
    pub journal: Arc<dyn Journal>,
    /// The kind of the journal, as configured.
    pub journal_kind: &'static str,
    /// The clearcoats before this fleet, if there may be several.
    pub replicas: Option<Arc<Replicas>>,
    /// The deliveries.
    pub deliveries: Arc<Deliveries>,
    /// The trials of the Varnish nodes.
    pub trials: Arc<Trials>,
    /// The VCL that is pushed to each Varnish.
    pub vcl_push: Arc<VclPush>,
    /// What operators say of nodes.
    pub overrides: Arc<OverrideStore>,
    /// Held by who drains a node that may be the last.
    pub draining: tokio::sync::Mutex<()>,
    /// The attribution of purges.
    pub attribution: Arc<Attribution>,
    /// Takes the purges of operators.
    pub purge_api: Arc<PurgeApi>,
    /// What a reload of the configuration changes.
    pub settings: ArcSwap<AdminSettings>,
    /// The status of the registry, if nodes are not in the configuration alone.
    pub registry: Option<RegistryStatus>,
    /// All metrics.
    pub metrics: Arc<Metrics>,
    /// Whether the edge takes traffic.
    pub open: watch::Receiver<bool>,
    /// The end of the process.
    pub shutdown: Shutdown,
}

/// What a reload of the configuration changes here.
#[derive(Clone, Debug)]
pub struct AdminSettings {
    /// The token of operators who may purge, drain and resume; `None`: nobody may.
    pub token: Option<Token>,
    /// The names by which this listener is reached, beside addresses.
    pub hosts: Vec<String>,
    /// What readers get when no Varnish may serve, as configured.
    pub when_all_behind: WhenAllBehind,
    /// Whether the shop is closed.
    pub maintenance: bool,
    /// How much nodes get, by the listener that sends to them.
    pub edge: RequestTerms,
    /// The same of the origin.
    pub origin: RequestTerms,
}

impl AdminSettings {
    /// As configured.
    pub fn of(config: &Config) -> Self {
        AdminSettings {
            token: config.admin.token.clone(),
            hosts: config.admin.hosts.clone(),
            when_all_behind: config.edge.when_all_behind,
            maintenance: config.edge.maintenance.on,
            edge: config.edge.request_terms(),
            origin: config.origin.request_terms(),
        }
    }

    /// How much nodes of this role get.
    fn terms(&self, role: Role) -> &RequestTerms {
        match role {
            Role::Varnish => &self.edge,
            Role::Web => &self.origin,
        }
    }
}

/// What has a past.
#[derive(Default)]
struct Observed {
    history: History,
    nodes: NodeMemories,
}

/// The first event: what does not change while this process runs.
#[derive(Serialize)]
struct Hello {
    version: &'static str,
    /// The time here, in milliseconds since 1970: the clock of who listens may be wrong.
    now: u64,
    /// An operator with the token may purge from the page, drain and resume.
    may_purge: bool,
    when_all_behind: WhenAllBehind,
    /// From one sample to the next.
    step_seconds: u64,
}

impl Handler for AdminApi {
    fn wants_body(&self, head: &http::request::Parts, _peer: SocketAddr) -> bool {
        let path = head.uri.path();
        head.method == http::Method::POST
            && (path == operator::PATH || path.starts_with(node_order::PREFIX))
            && self.objection(&head.headers).is_none()
    }

    async fn handle(&self, request: http::Request<Bytes>, peer: SocketAddr) -> Response {
        let path = request.uri().path();
        if path == operator::PATH {
            return self.purge(&request, peer).await;
        }
        if let Some(node) = path.strip_prefix(node_order::PREFIX) {
            return self.order(node, &request, peer).await;
        }
        let is_for_machines = matches!(path, "/metrics" | "/healthz" | "/readyz" | discovery::PATH);
        if !is_for_machines && !host::is_ours(request.headers(), &self.context.settings.load().hosts) {
            return text(421, format!("{}\n", host::REFUSED));
        }
        if request.method() != http::Method::GET && request.method() != http::Method::HEAD {
            let text = text(405, "only GET and HEAD are allowed here; purges go to purge.listen (port 6081)\n");
            return not_allowed(text, "GET, HEAD");
        }
        match path {
            "/metrics" => self.metrics(),
            "/healthz" => text(200, "ok\n"),
            "/readyz" => self.ready(),
            "/api/v1/fleet" => self.context.with_fleet(&self.observed.lock().nodes, |fleet| json(200, fleet)),
            "/api/v1/purges" => json(200, &self.context.purges()),
            "/api/v1/purges/all" => json(200, &self.context.purges_of_all().await),
            "/api/v1/events" => self.listen(request.method()),
            discovery::PATH => discovery::targets(&self.context.fleet.load(), request.uri().query()),
            _ => match path.strip_prefix("/api/v1/purges/").and_then(|position| position.parse().ok()) {
                Some(position) => self.context.purge(position).map_or_else(
                    || text(404, "this purge is not remembered, or was accepted by another clearcoat\n"),
                    |purge| json(200, &purge),
                ),
                None => page::file(path).unwrap_or_else(|| {
                    text(
                        404,
                        "not found; there are / /metrics /healthz /readyz /api/v1/fleet /api/v1/purges \
                         /api/v1/purges/all /api/v1/purges/POSITION \
                         /api/v1/events /sd/prometheus, and POST /api/v1/purge and \
                         /api/v1/nodes/ROLE/ID\n",
                    )
                }),
            },
        }
    }
}

/// An answer to a method that is not allowed, with those that are (RFC 9110 section 15.5.6).
fn not_allowed(mut answer: Response, allowed: &'static str) -> Response {
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    answer
}

/// An answer to a request that is not carried out.
fn refused(status: u16, error: &str) -> Response {
    #[derive(Serialize)]
    struct Refused<'e> {
        error: &'e str,
    }
    json(status, &Refused { error })
}

impl AdminApi {
    /// An API that shows this.
    pub fn new(context: AdminContext) -> Self {
        let (observed, listeners, refused_told) = Default::default();
        AdminApi { context, observed, listeners, refused_told }
    }

    /// Looks every second at what has changed, and tells the listeners. Returns when the admin listener closes.
    pub async fn observe(self: Arc<Self>) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = [Bytes::new(), Bytes::new()];
        let mut sampled_at = tokio::time::Instant::now();
        for look in 0_u64.. {
            tokio::select! {
                _ = looks.tick() => {}
                () = self.context.shutdown.reached(Stage::Closing) => break,
            }
            self.note_nodes();
            if look % LOOKS_PER_STEP == 0 {
                let now = tokio::time::Instant::now();
                self.sample(now - std::mem::replace(&mut sampled_at, now));
            }
            if look % LOOKS_PER_SIGN == 0 {
                self.listeners.send(&KEEP_ALIVE);
            }
            if self.listeners.is_empty() {
                continue;
            }
            if self.listeners.take_joined() {
                // It may have been told of another state than the others were.
                told = Default::default();
            }
            for (event, told) in self.state().into_iter().zip(&mut told) {
                if event != *told {
                    self.listeners.send(&event);
                    *told = event;
                }
            }
        }
        self.listeners.close();
    }

    /// The events that tell the present state: the fleet, and the purges.
    fn state(&self) -> [Bytes; 2] {
        let fleet = self.context.with_fleet(&self.observed.lock().nodes, |fleet| event("fleet", fleet));
        [fleet, event("purges", &self.context.timeline())].map(|event| {
            // Maps with keys that are text, and numbers that are finite.
            event.unwrap_or_else(|error| {
                tracing::error!(%error, "an event cannot be written");
                Bytes::new()
            })
        })
    }

    fn note_nodes(&self) {
        let fleet = self.context.fleet.load();
        let members = fleet.varnish.members().iter().chain(fleet.web.members());
        let serve = |member: &Member| {
            let identity = (member.node.spec.role(), member.node.id().clone());
            (identity, self.context.serves(member))
        };
        let nodes: Vec<(NodeKey, bool)> = members.map(serve).collect();
        self.observed.lock().nodes.note(&nodes, clock::now_ms());
    }

    /// Takes a sample of the traffic, `elapsed` after the last one.
    fn sample(&self, elapsed: Duration) {
        let metrics = &self.context.metrics;
        let mut edge = EdgeReading {
            durations: metrics.edge.durations(),
            server_errors: metrics.edge.own_server_errors(),
            cache_results: [0; 3],
        };
        let fleet = self.context.fleet.load();
        for Member { node, .. } in fleet.varnish.members() {
            let handles = metrics.node(Role::Varnish, node.id());
            edge.server_errors += handles.answers().server_errors;
            let results = handles.varnish.as_ref().map_or([0; 3], |varnish| varnish.cache_results());
            edge.cache_results.iter_mut().zip(results).for_each(|(sum, result)| *sum += result);
        }
        for Member { node, .. } in fleet.web.members() {
            edge.server_errors += metrics.node(Role::Web, node.id()).bypass_server_errors();
        }
        let mut observed = self.observed.lock();
        observed.nodes.read(|(role, id)| {
            let handles = metrics.node(*role, id);
            let cache_results = handles.varnish.as_ref().map_or([0; 3], |varnish| varnish.cache_results());
            NodeReading { answers: handles.answers(), cache_results }
        });
        let sample = observed.history.record(clock::now_ms(), elapsed, edge);
        drop(observed);
        if let Some(Ok(event)) = sample.map(|sample| event("sample", &sample)) {
            self.listeners.send(&event);
        }
    }

    /// A stream of events: first everything that is known, then what changes.
    fn listen(&self, method: &http::Method) -> Response {
        let settings = self.context.settings.load();
        let hello = Hello {
            version: env!("CARGO_PKG_VERSION"),
            now: clock::now_ms(),
            may_purge: settings.token.is_some(),
            when_all_behind: settings.when_all_behind,
            step_seconds: STEP.as_secs(),
        };
        let history = event("history", self.observed.lock().history.samples());
        let first = [event("hello", &hello), history].into_iter().flatten().chain(self.state()).collect();
        if method == http::Method::HEAD {
            return response(200, "text/event-stream", Vec::new());
        }
        match self.listeners.add(first) {
            Some(receiver) => events(receiver),
            None => text(503, format!("{} are listening already, or this process is about to end\n", listeners::MOST)),
        }
    }

    /// Requests that arrive from now on are judged by these.
    pub fn configure(&self, settings: AdminSettings) {
        self.context.settings.store(Arc::new(settings));
    }

    /// Why the sender of this request may change nothing here.
    fn objection(&self, headers: &header::HeaderMap) -> Option<Objection> {
        if !host::is_ours(headers, &self.context.settings.load().hosts) {
            return Some((421, host::REFUSED));
        }
        operator::objection(headers, self.context.settings.load().token.as_ref())
    }

    /// A purge of an operator.
    async fn purge(&self, request: &http::Request<Bytes>, peer: SocketAddr) -> Response {
        if let Some((refusal, reason)) = self.refusal(request, peer) {
            self.context.metrics.purge.requested("none", PurgeResult::Forbidden);
            let words = format!("a purge by the status page from {} was refused: {reason}", peer.ip().to_canonical());
            self.context.metrics.incidents.note(IncidentKind::PurgeRefused, &words);
            return refusal;
        }
        match operator::as_magento(request.body()) {
            Ok(purge) => self.context.purge_api.purge(&purge, peer).await,
            Err(reason) => refused(400, &reason),
        }
    }

    /// What an operator says of a node.
    async fn order(&self, node: &str, request: &http::Request<Bytes>, peer: SocketAddr) -> Response {
        match self.refusal(request, peer) {
            Some((refusal, _)) => refusal,
            None => match self.context.order(node, request.body(), peer).await {
                Ok(told) => json(200, &told),
                Err((status, reason)) => refused(status, &reason),
            },
        }
    }

    /// The answer to a request that may change nothing here, and why.
    fn refusal(&self, request: &http::Request<Bytes>, peer: SocketAddr) -> Option<(Response, &'static str)> {
        if request.method() != http::Method::POST {
            let reason = "only POST is allowed here";
            return Some((not_allowed(refused(405, reason), "POST"), reason));
        }
        let (status, reason) = self.objection(request.headers())?;
        if let Some(left_out) = self.refused_told.lock().pass(clock::now_ms()) {
            let (address, path) = (peer.ip().to_canonical(), request.uri().path());
            tracing::warn!(%address, path, left_out, "an operator's request was refused: {reason}");
        }
        let mut answer = refused(status, reason);
        if status == 401 {
            // RFC 9110 section 15.5.2.
            answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        Some((answer, reason))
    }

    /// Not ready before the first round of deliveries, while the journal accepts no purges, while another replica of
    /// the same name gets our purges, and once the process is about to end. The state of the fleet does not count: a
    /// balancer that took us out because the shop is ill would make it worse.
    fn ready(&self) -> Response {
        let AdminContext { shutdown, open, journal, replicas, settings, .. } = &self.context;
        if shutdown.stage() != Stage::Running {
            text(503, "draining\n")
        } else if !*open.borrow() {
            text(503, "starting\n")
        } else if let Some(trouble) = journal.trouble().filter(|trouble| trouble.refuses) {
            // Purges should be sent elsewhere; traffic that still comes is served.
            text(503, format!("journal: {}\n", trouble.reason))
        } else if let Some(problem) = replicas.as_ref().and_then(|replicas| replicas.superseded()) {
            // The other one of this name gets the purges and is ready: if both were not, the shop would be gone.
            text(503, format!("{problem}\n"))
        } else {
            // Its page is what clients are to see: a balancer that sent them elsewhere would show another.
            text(200, if settings.load().maintenance { "ready, in maintenance\n" } else { "ready\n" })
        }
    }

    /// Gauges that follow from the state are computed for each scrape, so that no code has to keep them up to date.
    fn metrics(&self) -> Response {
        let AdminContext { fleet, journal, registry, metrics, .. } = &self.context;
        let fleet = fleet.load();
        metrics.edge_maintenance.set(self.context.settings.load().maintenance.into());
        metrics.journal.head.set(journal.head().cast_signed());
        metrics.journal.stalled.set(journal.trouble().is_some().into());
        metrics.journal.spooled.set(i64::try_from(self.context.spooled().unwrap_or(0)).unwrap_or(i64::MAX));
        if let Some(link) = registry.as_ref().map(RegistryView::of) {
            metrics.registry.connected.set(link.connected.into());
            metrics.registry.revision.set(link.revision.unwrap_or(0));
            metrics.registry.last_contact.set(link.last_contact_seconds);
        }
        self.gauge_pool(&fleet.web);
        self.gauge_pool(&fleet.varnish);
        match metrics.render() {
            Ok(text) => response(200, "text/plain; version=0.0.4; charset=utf-8", text),
            Err(error) => text(500, format!("{error}\n")),
        }
    }

    fn gauge_pool(&self, pool: &Pool) {
        let AdminContext { fence, journal, metrics, settings, .. } = &self.context;
        let settings = settings.load();
        for Member { node, health, ejection, .. } in pool.members() {
            let metrics = metrics.node(node.spec.role(), node.id());
            metrics.inflight.set(node.live.inflight().into());
            metrics.at_limit.set((!node.live.has_room(settings.terms(node.spec.role()).max_per_node)).into());
            metrics.up.set((*health == Health::Up).into());
            metrics.ejected.set(ejection.is_some().into());
            metrics.drained.set(node.operator.drained_at_ms.is_some().into());
            metrics.weight.set(node.weight.into());
            let Some(varnish) = &metrics.varnish else { continue };
            let lag = journal.lag(node.live.cursor());
            varnish.current.set(fence.is_current(&node.live).into());
            varnish.admitted.set(fence.admits(&node.live).into());
            varnish.cursor_lag.set(i64::try_from(lag.entries).unwrap_or(i64::MAX));
            varnish.cursor_lag_seconds.set(lag_age(lag).map_or(f64::INFINITY, |age| age.as_secs_f64()));
        }
    }
}
