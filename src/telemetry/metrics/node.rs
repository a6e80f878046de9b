//! The series of nodes: bound once per node, and gone with it.

use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::{Gauge, IntCounter, IntGauge, Registry};

use super::family::{
    Counters, Gauges, Histograms, IntGauges, NodeSeries, ShardedCounters, counters, data_path_counters, gauges,
    histograms, int_gauges,
};
use super::labels::{BatchResult, CacheResult, CodeClass};
use super::listener::{NODE_BUCKETS, RequestCounters};
use super::sharded::{DurationHistogram, ShardedCounter};
use super::vcl::{VclFamilies, VclMetrics};
use crate::fleet::{NodeId, Role};

/// The families in which every node of a role has its series.
#[derive(Debug)]
pub(super) struct NodeFamilies {
    durations: Histograms<(Role, NodeId)>,
    bypassed: Counters<NodeId>,
    connect_errors: Counters<(Role, NodeId)>,
    ejections: Counters<(Role, NodeId)>,
    ejected: IntGauges<(Role, NodeId)>,
    inflight: IntGauges<(Role, NodeId)>,
    at_limit: IntGauges<(Role, NodeId)>,
    up: IntGauges<(Role, NodeId)>,
    drained: IntGauges<(Role, NodeId)>,
    weight: IntGauges<(Role, NodeId)>,
    current: IntGauges<NodeId>,
    admitted: IntGauges<NodeId>,
    cursor_lag: IntGauges<NodeId>,
    cursor_lag_seconds: Gauges<NodeId>,
    deliveries: Counters<(NodeId, BatchResult)>,
    bans_sent: Counters<NodeId>,
    flushed: Counters<NodeId>,
    trial_failed: IntGauges<NodeId>,
    fenced: Counters<NodeId>,
    stale_caught: Counters<NodeId>,
    unsealed: Counters<NodeId>,
    cache_results: ShardedCounters<(NodeId, CacheResult)>,
    vcl: VclFamilies,
}

/// The handles of one node.
#[derive(Debug)]
pub struct NodeMetrics {
    id: NodeId,
    /// Requests that ended with this node, by status class.
    answers: [ShardedCounter; CodeClass::ALL.len()],
    /// The same of clients that asked it past the caches. Made when they are first counted: no node need ever be asked so.
    bypass: [OnceLock<Option<ShardedCounter>>; CodeClass::ALL.len()],
    edge: RequestCounters,
    duration: DurationHistogram,
    /// Requests of clients that a web node answered past the caches.
    bypassed: Option<IntCounter>,
    /// Connections that could not be opened.
    pub connect_errors: IntCounter,
    /// Times it was ejected.
    pub ejections: IntCounter,
    /// 1 while it is ejected.
    pub ejected: IntGauge,
    /// Requests that are at the node now.
    pub inflight: IntGauge,
    /// 1 while these are as many as there may be.
    pub at_limit: IntGauge,
    /// 1 while the node is up.
    pub up: IntGauge,
    /// 1 while an operator has drained the node.
    pub drained: IntGauge,
    /// Its weight, by its source and by operators; 0 while it is drained.
    pub weight: IntGauge,
    /// The handles that only a Varnish has.
    pub varnish: Option<VarnishMetrics>,
    /// Those of its VCL, made when one is first pushed.
    vcl: OnceLock<Option<VclMetrics>>,
    vcl_families: VclFamilies,
    /// `None` once the node has left: none of its series comes back then, whoever still has these handles.
    held: Mutex<Option<NodeSeries>>,
}

/// The handles of one Varnish.
#[derive(Debug)]
pub struct VarnishMetrics {
    /// 1 while the node has every purge that was answered.
    pub current: IntGauge,
    /// 1 while the node has every purge that it must have to serve.
    pub admitted: IntGauge,
    /// Purges that the node has not acknowledged.
    pub cursor_lag: IntGauge,
    /// The age of the oldest purge that the node has not acknowledged, in seconds.
    pub cursor_lag_seconds: Gauge,
    /// Batches that were acknowledged.
    pub delivered: IntCounter,
    /// Batches that failed and will be tried again.
    pub failed: IntCounter,
    /// Batches that the node refused: its VCL or ACL must be changed.
    pub refused: IntCounter,
    /// Requests that the node does not take though it takes others.
    pub passed_over: IntCounter,
    /// Bans that were sent.
    pub bans_sent: IntCounter,
    /// Times one ban of everything was sent instead of what could not be replayed.
    pub flushed: IntCounter,
    /// 1 while its last trial showed that purges by tags do not take pages out of it.
    pub trial_failed: IntGauge,
    /// Times the node was behind when a purge was answered.
    pub fenced: IntCounter,
    /// Answers that were older than a purge, and that no client saw.
    pub stale_caught: IntCounter,
    /// Answers at the edge without a seal.
    pub unsealed: IntCounter,
    cache_results: [ShardedCounter; CacheResult::ALL.len()],
}

/// What a node has answered so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// All answers, with those past the caches.
    pub all: u64,
    /// Those with a 5xx among them.
    pub server_errors: u64,
    /// How long they took together.
    pub time: Duration,
}

impl NodeFamilies {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(NodeFamilies {
            durations: histograms(
                r,
                "upstream_request_duration_seconds",
                "Time from the head of a request to the last byte of the answer, by the node that answered",
                &NODE_BUCKETS,
            )?,
            bypassed: counters(
                r,
                "bypass_requests_total",
                "Requests from clients that a web node answered past the caches",
            )?,
            connect_errors: counters(
                r,
                "upstream_connect_errors_total",
                "Connections to a node that could not be opened",
            )?,
            ejections: counters(r, "ejections_total", "Times a node was ejected, because it failed requests")?,
            ejected: int_gauges(r, "node_ejected", "1 while a node is ejected, because it failed requests")?,
            inflight: int_gauges(r, "upstream_inflight", "Requests that are at a node now")?,
            at_limit: int_gauges(r, "node_at_limit", "1 while a node has as many requests as it may")?,
            up: int_gauges(r, "node_up", "1 while the health checks of a node pass")?,
            drained: int_gauges(r, "node_drained", "1 while an operator has drained a node")?,
            weight: int_gauges(r, "node_weight", "The weight of a node; 0 while it is drained")?,
            current: int_gauges(r, "node_current", "1 while a Varnish has every answered purge")?,
            admitted: int_gauges(r, "node_admitted", "1 while a Varnish has every purge that it must have to serve")?,
            cursor_lag: int_gauges(r, "node_cursor_lag", "Purges that a Varnish has not acknowledged")?,
            cursor_lag_seconds: gauges(
                r,
                "node_cursor_lag_seconds",
                "Age of the oldest purge that a Varnish has not acknowledged",
            )?,
            deliveries: counters(r, "purge_deliveries_total", "Batches of purges sent to a Varnish")?,
            bans_sent: counters(r, "bans_sent_total", "Bans sent to a Varnish")?,
            flushed: counters(
                r,
                "node_flushed_total",
                "Times a Varnish was sent one ban of everything, because what it missed could not be replayed",
            )?,
            trial_failed: int_gauges(
                r,
                "node_trial_failed",
                "1 while the last trial showed that purges by tags do not take pages out of a Varnish",
            )?,
            fenced: counters(r, "fenced_total", "Times a Varnish was behind when a purge was answered")?,
            stale_caught: counters(
                r,
                "stale_caught_total",
                "Answers of a Varnish that were older than a purge: no client saw them",
            )?,
            unsealed: counters(r, "unsealed_answers_total", "Answers of a Varnish at the edge without a seal")?,
            cache_results: data_path_counters(
                r,
                "cache_results_total",
                "Answers of a Varnish at the edge, by whether they came from its cache",
            )?,
            vcl: VclFamilies::new(r)?,
        })
    }

    /// The handles of a node. `requests` are those of the listener that sends to nodes of its role, `edge` those of the edge.
    pub(super) fn bind(
        &self,
        role: Role,
        id: &NodeId,
        requests: &RequestCounters,
        edge: &RequestCounters,
    ) -> NodeMetrics {
        let mut held = NodeSeries::default();
        let answers = CodeClass::ALL.map(|class| held.bind(requests, (class, Some(id.clone()))));
        let of_node = || (role, id.clone());
        let connect_errors = held.bind(&self.connect_errors, of_node());
        let ejections = held.bind(&self.ejections, of_node());
        let ejected = held.bind(&self.ejected, of_node());
        let inflight = held.bind(&self.inflight, of_node());
        let at_limit = held.bind(&self.at_limit, of_node());
        let up = held.bind(&self.up, of_node());
        let drained = held.bind(&self.drained, of_node());
        let weight = held.bind(&self.weight, of_node());
        let duration = held.bind(&self.durations, of_node());
        let bypassed = (role == Role::Web).then(|| held.bind(&self.bypassed, id.clone()));
        let varnish = (role == Role::Varnish).then(|| self.bind_varnish(id, &mut held));
        NodeMetrics {
            id: id.clone(),
            answers,
            bypass: Default::default(),
            edge: edge.clone(),
            duration,
            bypassed,
            connect_errors,
            ejections,
            ejected,
            inflight,
            at_limit,
            up,
            drained,
            weight,
            varnish,
            vcl: OnceLock::new(),
            vcl_families: self.vcl.clone(),
            held: Mutex::new(Some(held)),
        }
    }

    fn bind_varnish(&self, id: &NodeId, held: &mut NodeSeries) -> VarnishMetrics {
        let batches = BatchResult::ALL.map(|result| held.bind(&self.deliveries, (id.clone(), result)));
        let [delivered, failed, refused, passed_over] = batches;
        VarnishMetrics {
            current: held.bind(&self.current, id.clone()),
            admitted: held.bind(&self.admitted, id.clone()),
            cursor_lag: held.bind(&self.cursor_lag, id.clone()),
            cursor_lag_seconds: held.bind(&self.cursor_lag_seconds, id.clone()),
            delivered,
            failed,
            refused,
            passed_over,
            bans_sent: held.bind(&self.bans_sent, id.clone()),
            flushed: held.bind(&self.flushed, id.clone()),
            trial_failed: held.bind(&self.trial_failed, id.clone()),
            fenced: held.bind(&self.fenced, id.clone()),
            stale_caught: held.bind(&self.stale_caught, id.clone()),
            unsealed: held.bind(&self.unsealed, id.clone()),
            cache_results: CacheResult::ALL.map(|result| held.bind(&self.cache_results, (id.clone(), result))),
        }
    }
}

impl NodeMetrics {
    /// Counts a request that this node answered.
    pub fn record_answer(&self, status: u16, took: Duration) {
        self.answers[CodeClass::of(status) as usize].inc();
        self.duration.observe(took);
    }

    /// Counts a request at the edge that this web node answered, past the caches.
    pub fn record_bypass(&self, status: u16, took: Duration) {
        let class = CodeClass::of(status);
        let bind = || self.held.lock().as_mut().map(|held| held.bind(&self.edge, (class, Some(self.id.clone()))));
        if let Some(counter) = self.bypass[class as usize].get_or_init(bind) {
            counter.inc();
        }
        if let Some(bypassed) = &self.bypassed {
            bypassed.inc();
        }
        self.duration.observe(took);
    }

    /// What it has answered so far.
    pub fn answers(&self) -> Answers {
        let count = |class: CodeClass| {
            let bypass = self.bypass[class as usize].get().and_then(Option::as_ref).map_or(0, ShardedCounter::get);
            self.answers[class as usize].get() + bypass
        };
        Answers {
            all: CodeClass::ALL.into_iter().map(count).sum(),
            server_errors: count(CodeClass::ServerError),
            time: self.duration.sum(),
        }
    }

    /// Its answers with a 5xx to clients that came past the caches.
    pub fn bypass_server_errors(&self) -> u64 {
        self.bypass[CodeClass::ServerError as usize].get().and_then(Option::as_ref).map_or(0, ShardedCounter::get)
    }

    /// Those of its VCL; `None` if it has left before one was pushed.
    pub fn vcl(&self) -> Option<&VclMetrics> {
        let bind = || self.held.lock().as_mut().map(|held| self.vcl_families.bind(&self.id, held));
        self.vcl.get_or_init(bind).as_ref()
    }

    /// The node has left: its series go.
    pub(super) fn release(&self) {
        self.held.lock().take();
    }
}

impl VarnishMetrics {
    /// Counts an answer by whether it came from the cache.
    pub fn record_cache_result(&self, result: CacheResult) {
        self.cache_results[result as usize].inc();
    }

    /// The answers so far: hits, misses, passes.
    pub fn cache_results(&self) -> [u64; CacheResult::ALL.len()] {
        self.cache_results.each_ref().map(ShardedCounter::get)
    }
}
