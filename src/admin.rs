//! The admin listener: metrics, health of this process, and as JSON the fleet and who purges what.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hyper::body::Bytes;
use serde::Serialize;
use tokio::sync::watch;

use crate::attribution::Attribution;
use crate::clock;
use crate::delivery::Deliveries;
use crate::fleet::{Fence, Health, Member, NodeId, NodeSource, Pool, Role, Snapshot, TrialState, WHOLE_SHARE};
use crate::http_server::{Handler, Response, json, response, text};
use crate::journal::{Cursor, Journal, Lag, Position};
use crate::registry::RegistryStatus;
use crate::replicas::{self, Replicas};
use crate::shutdown::{Shutdown, Stage};
use crate::telemetry::Metrics;
use crate::trial::Trials;

/// Answers operators and their tools.
pub struct AdminApi {
    /// The fleet as it is now.
    pub fleet: Arc<ArcSwap<Snapshot>>,
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
    /// The attribution of purges.
    pub attribution: Arc<Attribution>,
    /// The status of the registry, if nodes are not in the configuration alone.
    pub registry: Option<RegistryStatus>,
    /// All metrics.
    pub metrics: Arc<Metrics>,
    /// Whether the edge takes traffic.
    pub open: watch::Receiver<bool>,
    /// The end of the process.
    pub shutdown: Shutdown,
}

/// `/api/v1/fleet`.
#[derive(Serialize)]
struct FleetView<'a> {
    version: u64,
    head: Position,
    fence: Position,
    journal: &'static str,
    /// Purges that are not in etcd yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    spooled: Option<usize>,
    /// The clearcoats before this fleet, this one first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replicas: Vec<replicas::View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registry: Option<RegistryView>,
    nodes: Vec<NodeView<'a>>,
}

/// Where nodes come from, beside the configuration file.
#[derive(Serialize)]
struct RegistryView {
    kind: NodeSource,
    connected: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<i64>,
    last_contact_seconds: f64,
    problem: Arc<str>,
}

#[derive(Serialize)]
struct NodeView<'a> {
    role: Role,
    id: &'a str,
    address: SocketAddr,
    weight: u32,
    /// Its share of the traffic in percent: below 100 in its slow start.
    share: u32,
    health: Health,
    reason: &'a str,
    inflight: u32,
    source: NodeSource,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<&'a str>,
    /// It is absent from its source.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    retained: bool,
    #[serde(flatten)]
    varnish: Option<VarnishView>,
}

/// A saved cursor.
#[derive(Serialize)]
struct SavedView {
    cursor: Position,
    /// All that its cache has was stored since answers are sealed.
    seals: bool,
}

#[derive(Serialize)]
struct VarnishView {
    cursor: Position,
    /// What a start finds of it in the journal, once another purge is on disk; `null` if nothing.
    saved: Option<SavedView>,
    /// Purges that it has not acknowledged.
    lag: usize,
    current: bool,
    /// It may serve: it has every purge that it must have for that.
    admitted: bool,
    /// Purges that a seal shows do not wait for it.
    seals: bool,
    /// Why they do, if they need not.
    #[serde(skip_serializing_if = "Option::is_none")]
    seals_not: Option<&'static str>,
    delivery_error: Arc<str>,
    /// What came of the last trial, and the finding in words if something is wrong.
    trial: TrialState,
    trial_finding: Arc<str>,
    /// Whether that keeps it out of traffic.
    trial_fenced: bool,
}

impl Handler for AdminApi {
    async fn handle(&self, request: http::Request<Bytes>, _peer: SocketAddr) -> Response {
        if request.method() != http::Method::GET && request.method() != http::Method::HEAD {
            return text(405, "only GET and HEAD are allowed here\n");
        }
        match request.uri().path() {
            "/metrics" => self.metrics(),
            "/healthz" => text(200, "ok\n"),
            "/readyz" => self.ready(),
            "/api/v1/fleet" => self.fleet(),
            "/api/v1/purges" => json(200, &self.attribution.report()),
            _ => text(404, "not found; there are /metrics /healthz /readyz /api/v1/fleet /api/v1/purges\n"),
        }
    }
}

impl AdminApi {
    /// Not ready before the first round of deliveries, while the journal accepts no purges, while another replica of
    /// the same name gets our purges, and once the process is about to end. The state of the fleet does not count: a
    /// balancer that took us out because the shop is ill would make it worse.
    fn ready(&self) -> Response {
        if self.shutdown.stage() != Stage::Running {
            text(503, "draining\n")
        } else if !*self.open.borrow() {
            text(503, "starting\n")
        } else if let Some(trouble) = self.journal.trouble().filter(|trouble| trouble.refuses) {
            // Purges should be sent elsewhere; traffic that still comes is served.
            text(503, format!("journal: {}\n", trouble.reason))
        } else if let Some(problem) = self.replicas.as_ref().and_then(|replicas| replicas.superseded()) {
            // The other one of this name gets the purges and is ready: if both were not, the shop would be gone.
            text(503, format!("{problem}\n"))
        } else {
            text(200, "ready\n")
        }
    }

    fn fleet(&self) -> Response {
        let fleet = self.fleet.load();
        let members = fleet.varnish.members().iter().chain(fleet.web.members());
        let saved = self.journal.cursors();
        let view = FleetView {
            version: fleet.version,
            head: self.journal.head(),
            fence: self.fence.position(),
            journal: self.journal_kind,
            spooled: self.spooled(),
            replicas: self.replicas.as_ref().map_or_else(Vec::new, |replicas| replicas.view()),
            registry: self.registry.as_ref().map(RegistryView::of),
            nodes: members.map(|member| self.node(member, &saved)).collect(),
        };
        json(200, &view)
    }

    fn spooled(&self) -> Option<usize> {
        self.replicas.as_ref().and_then(|replicas| replicas.spooled())
    }

    fn node<'m>(&self, member: &'m Member, saved: &HashMap<NodeId, Cursor>) -> NodeView<'m> {
        let spec = &member.node.spec;
        let varnish = spec.varnish.as_ref().map(|_| VarnishView {
            cursor: member.node.live.cursor(),
            saved: saved.get(&spec.id).map(|saved| SavedView { cursor: saved.position, seals: saved.is_sealed }),
            lag: self.journal.lag(member.node.live.cursor()).entries,
            current: self.fence.is_current(&member.node.live),
            admitted: self.fence.admits(&member.node.live),
            seals: member.node.live.is_sealing(),
            seals_not: self.deliveries.why_not_sealing(&member.node.live),
            delivery_error: self.deliveries.error(&spec.id).unwrap_or_default(),
            trial: member.node.live.trial(),
            trial_finding: self.trials.finding(&spec.id),
            trial_fenced: !self.trials.admits(&member.node.live),
        });
        NodeView {
            role: spec.role(),
            id: spec.id.as_str(),
            address: spec.address,
            weight: spec.weight,
            share: member.node.live.share() * 100 / WHOLE_SHARE,
            health: member.health,
            reason: &member.reason,
            inflight: member.node.live.inflight(),
            source: spec.source,
            zone: spec.zone.as_deref(),
            labels: &spec.labels,
            epoch: spec.epoch().map(|epoch| &**epoch),
            retained: member.retained,
            varnish,
        }
    }

    /// Gauges that follow from the state are computed for each scrape, so that no code has to keep them up to date.
    fn metrics(&self) -> Response {
        let fleet = self.fleet.load();
        self.metrics.journal.head.set(self.journal.head().cast_signed());
        self.metrics.journal.stalled.set(self.journal.trouble().is_some().into());
        self.metrics.journal.spooled.set(i64::try_from(self.spooled().unwrap_or(0)).unwrap_or(i64::MAX));
        if let Some(link) = self.registry.as_ref().map(RegistryView::of) {
            self.metrics.registry.connected.set(link.connected.into());
            self.metrics.registry.revision.set(link.revision.unwrap_or(0));
            self.metrics.registry.last_contact.set(link.last_contact_seconds);
        }
        self.gauge_pool(&fleet.web);
        self.gauge_pool(&fleet.varnish);
        match self.metrics.render() {
            Ok(text) => response(200, "text/plain; version=0.0.4; charset=utf-8", text),
            Err(error) => text(500, format!("{error}\n")),
        }
    }

    fn gauge_pool(&self, pool: &Pool) {
        for Member { node, health, .. } in pool.members() {
            let metrics = self.metrics.node(node.spec.role(), node.id());
            metrics.inflight.set(node.live.inflight().into());
            metrics.up.set((*health == Health::Up).into());
            let Some(varnish) = &metrics.varnish else { continue };
            let cursor = node.live.cursor();
            varnish.current.set(self.fence.is_current(&node.live).into());
            varnish.admitted.set(self.fence.admits(&node.live).into());
            let lag = self.journal.lag(cursor);
            varnish.cursor_lag.set(i64::try_from(lag.entries).unwrap_or(i64::MAX));
            varnish.cursor_lag_seconds.set(age(lag));
        }
    }
}

/// How long ago the oldest purge was accepted that a node misses.
fn age(lag: Lag) -> f64 {
    match lag {
        Lag { entries: 0, .. } => 0.0,
        Lag { oldest_ms: None, .. } => f64::INFINITY,
        Lag { oldest_ms: Some(oldest_ms), .. } => clock::now_ms().saturating_sub(oldest_ms) as f64 / 1000.0,
    }
}

impl RegistryView {
    fn of(registry: &RegistryStatus) -> Self {
        RegistryView {
            kind: registry.source(),
            connected: registry.is_connected(),
            revision: registry.revision(),
            last_contact_seconds: registry.silence().as_secs_f64(),
            problem: registry.problem().unwrap_or_default(),
        }
    }
}
