//! Metrics: one value that is passed in, families registered once, handles bound once per node.
//!
//! No global registry, and no look-up by label on the data path: a worker keeps the handles of a node beside its
//! connections. Series of a node go when the node goes, so that no dashboard shows ghosts. No label can be grown by a
//! stranger: node ids come from the registry, families of tags and senders of purges are a bounded number, everything else
//! comes from this source.

mod bypass;
mod files;
mod guard;
mod journal;
mod listener;
mod purge;
mod registry;
mod upstream;

use std::sync::Arc;

use dashmap::DashMap;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::fleet::{NodeId, NodeKey, Role};

pub use bypass::FragmentMetrics;
pub use files::{FileMetrics, Shortage};
pub use guard::GuardMetrics;
pub use journal::JournalMetrics;
pub use listener::ListenerMetrics;
pub use purge::PurgeMetrics;
pub use registry::RegistryMetrics;
pub use upstream::{UpstreamFailures, UpstreamFault};

const CODE_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    families: Registry,
    nodes: DashMap<NodeKey, Arc<NodeMetrics>>,
    /// The edge listener.
    pub edge: ListenerMetrics,
    /// The origin listener.
    pub origin: ListenerMetrics,
    /// The purge listener.
    pub purge: PurgeMetrics,
    /// Where nodes come from.
    pub registry: RegistryMetrics,
    /// The files of the traffic.
    pub files: FileMetrics,
    retries: IntCounterVec,
    connect_errors: IntCounterVec,
    inflight: IntGaugeVec,
    node_up: IntGaugeVec,
    node_current: IntGaugeVec,
    cursor_lag: IntGaugeVec,
    cursor_lag_seconds: GaugeVec,
    deliveries: IntCounterVec,
    bans_sent: IntCounterVec,
    flushed: IntCounterVec,
    trial_failed: IntGaugeVec,
    fenced: IntCounterVec,
    reloads: IntCounterVec,
    tls_reloads: IntCounterVec,
    tls_expiry: IntGaugeVec,
    /// Client connections that are open at the edge.
    pub edge_connections: IntGauge,
    /// Client connections that were closed at once: their address has as many as it may.
    pub edge_connections_refused: IntCounter,
    /// Requests served by a Varnish that was behind, because nobody else could take them.
    pub stale_served: IntCounter,
    /// What the guard keeps from being stored.
    pub guard: GuardMetrics,
    /// Requests that got no good answer from their node.
    pub upstream_failures: UpstreamFailures,
    /// The fragments of pages that pass the caches by.
    pub fragments: FragmentMetrics,
    /// The journal, and the replicas that share it.
    pub journal: JournalMetrics,
}

/// The handles of one node.
#[derive(Debug)]
pub struct NodeMetrics {
    /// Requests that ended with this node, by status class (index 0 is 1xx).
    pub responses: [IntCounter; 5],
    /// Connections that could not be opened.
    pub connect_errors: IntCounter,
    /// Requests that are at the node now.
    pub inflight: IntGauge,
    /// 1 while the node is up.
    pub up: IntGauge,
    /// The handles that only a Varnish has.
    pub varnish: Option<VarnishMetrics>,
}

/// The handles of one Varnish.
#[derive(Debug)]
pub struct VarnishMetrics {
    /// 1 while the node has every purge that was answered.
    pub current: IntGauge,
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
}

impl Metrics {
    /// All families, registered.
    ///
    /// # Errors
    /// Only where two families share a name: a fault in this file.
    pub fn new() -> prometheus::Result<Self> {
        let families = Registry::new_custom(Some("clearcoat".into()), None)?;
        let r = &families;
        let build = int_gauges(r, "build_info", "The version that runs; always 1", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(Metrics {
            edge: ListenerMetrics::new(r, "edge", "clients")?,
            origin: ListenerMetrics::new(r, "origin", "Varnish")?,
            purge: PurgeMetrics::new(r)?,
            registry: RegistryMetrics::new(r)?,
            files: FileMetrics::new(r)?,
            retries: counters(r, "retries_total", "Requests that were tried again elsewhere", &["role", "reason"])?,
            connect_errors: counters(
                r,
                "upstream_connect_errors_total",
                "Connections to a node that could not be opened",
                &["role", "node"],
            )?,
            inflight: int_gauges(r, "upstream_inflight", "Requests that are at a node now", &["role", "node"])?,
            node_up: int_gauges(r, "node_up", "1 while the health checks of a node pass", &["role", "node"])?,
            node_current: int_gauges(r, "node_current", "1 while a Varnish has every answered purge", &["node"])?,
            cursor_lag: int_gauges(r, "node_cursor_lag", "Purges that a Varnish has not acknowledged", &["node"])?,
            cursor_lag_seconds: register(
                r,
                GaugeVec::new(
                    Opts::new("node_cursor_lag_seconds", "Age of the oldest purge that a Varnish has not acknowledged"),
                    &["node"],
                )?,
            )?,
            deliveries: counters(
                r,
                "purge_deliveries_total",
                "Batches of purges sent to a Varnish",
                &["node", "result"],
            )?,
            bans_sent: counters(r, "bans_sent_total", "Bans sent to a Varnish", &["node"])?,
            flushed: counters(
                r,
                "node_flushed_total",
                "Times a Varnish was sent one ban of everything, because what it missed could not be replayed",
                &["node"],
            )?,
            trial_failed: int_gauges(
                r,
                "node_trial_failed",
                "1 while the last trial showed that purges by tags do not take pages out of a Varnish",
                &["node"],
            )?,
            fenced: counters(r, "fenced_total", "Times a Varnish was behind when a purge was answered", &["node"])?,
            reloads: reloads(r, "reloads_total", "the configuration", &["applied", "refused", "unchanged"])?,
            tls_reloads: reloads(r, "tls_reloads_total", "TLS certificates", &["ok", "failed"])?,
            tls_expiry: int_gauges(
                r,
                "tls_certificate_expiry_timestamp_seconds",
                "When the certificate in use ends (notAfter, Unix time)",
                &["cert"],
            )?,
            edge_connections: register(
                r,
                IntGauge::new("edge_connections", "Client connections that are open at the edge")?,
            )?,
            edge_connections_refused: counter(
                r,
                "edge_connections_refused_total",
                "Client connections that were closed at once: their address has as many as it may",
            )?,
            stale_served: counter(
                r,
                "stale_served_total",
                "Requests served by a Varnish that was behind, for want of others",
            )?,
            guard: GuardMetrics::new(r)?,
            upstream_failures: UpstreamFailures::new(r)?,
            fragments: FragmentMetrics::new(r)?,
            journal: JournalMetrics::new(r)?,
            nodes: DashMap::new(),
            families,
        })
    }

    /// The handles of a node, made when first asked for.
    pub fn node(&self, role: Role, id: &NodeId) -> Arc<NodeMetrics> {
        self.nodes.entry((role, id.clone())).or_insert_with(|| Arc::new(self.bind(role, id.as_str()))).clone()
    }

    fn bind(&self, role: Role, id: &str) -> NodeMetrics {
        let listener = self.listener(role);
        let of_node = &[role.as_str(), id][..];
        NodeMetrics {
            responses: CODE_CLASSES.map(|class| listener.requests.with_label_values(&[class, id])),
            connect_errors: self.connect_errors.with_label_values(of_node),
            inflight: self.inflight.with_label_values(of_node),
            up: self.node_up.with_label_values(of_node),
            varnish: (role == Role::Varnish).then(|| VarnishMetrics {
                current: self.node_current.with_label_values(&[id]),
                cursor_lag: self.cursor_lag.with_label_values(&[id]),
                cursor_lag_seconds: self.cursor_lag_seconds.with_label_values(&[id]),
                delivered: self.deliveries.with_label_values(&[id, "ok"]),
                failed: self.deliveries.with_label_values(&[id, "error"]),
                refused: self.deliveries.with_label_values(&[id, "refused"]),
                passed_over: self.deliveries.with_label_values(&[id, "passed_over"]),
                bans_sent: self.bans_sent.with_label_values(&[id]),
                flushed: self.flushed.with_label_values(&[id]),
                trial_failed: self.trial_failed.with_label_values(&[id]),
                fenced: self.fenced.with_label_values(&[id]),
            }),
        }
    }

    /// The listener that sends to nodes of this role.
    pub fn listener(&self, role: Role) -> &ListenerMetrics {
        match role {
            Role::Varnish => &self.edge,
            Role::Web => &self.origin,
        }
    }

    /// Drops the series of a node that left.
    pub fn forget(&self, role: Role, id: &NodeId) {
        self.nodes.remove(&(role, id.clone()));
        let (role_name, id) = (role.as_str(), id.as_str());
        // A series that was never made is no fault: the results say only that.
        for class in CODE_CLASSES {
            _ = self.listener(role).requests.remove_label_values(&[class, id]);
            if role == Role::Web {
                _ = self.edge.requests.remove_label_values(&[class, id]);
            }
        }
        for family in [&self.inflight, &self.node_up] {
            _ = family.remove_label_values(&[role_name, id]);
        }
        _ = self.connect_errors.remove_label_values(&[role_name, id]);
        if role == Role::Varnish {
            for family in [&self.node_current, &self.cursor_lag, &self.trial_failed] {
                _ = family.remove_label_values(&[id]);
            }
            _ = self.cursor_lag_seconds.remove_label_values(&[id]);
            for result in ["ok", "error", "refused", "passed_over"] {
                _ = self.deliveries.remove_label_values(&[id, result]);
            }
            for family in [&self.bans_sent, &self.flushed, &self.fenced] {
                _ = family.remove_label_values(&[id]);
            }
        }
    }

    /// Counts a request that was sent again.
    pub fn retried(&self, role: Role, reason: &str) {
        self.retries.with_label_values(&[role.as_str(), reason]).inc();
    }

    /// Counts a reload of the configuration: `applied`, `refused` or `unchanged`.
    pub fn reloaded(&self, result: &str) {
        self.reloads.with_label_values(&[result]).inc();
    }

    /// Counts a reload of TLS certificates that had something new.
    pub fn tls_reloaded(&self, succeeded: bool) {
        self.tls_reloads.with_label_values(&[if succeeded { "ok" } else { "failed" }]).inc();
    }

    /// Shows when a certificate ends, in Unix seconds. `cert` is its file as configured.
    pub fn tls_certificate(&self, cert: &str, not_after: i64) {
        self.tls_expiry.with_label_values(&[cert]).set(not_after);
    }

    /// Drops the series of a certificate that is not served any more.
    pub fn forget_tls_certificate(&self, cert: &str) {
        // A series that was never made is no fault.
        _ = self.tls_expiry.remove_label_values(&[cert]);
    }

    /// All series in Prometheus' text format.
    ///
    /// # Errors
    /// Where a series cannot be written as text: a fault in this file.
    pub fn render(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::with_capacity(16 * 1024);
        TextEncoder::new().encode(&self.families.gather(), &mut text)?;
        Ok(text)
    }
}

impl NodeMetrics {
    /// Counts a request that this node answered.
    pub fn record_answer(&self, status: u16) {
        self.responses[usize::from(status / 100).clamp(1, 5) - 1].inc();
    }
}

/// Reloads of something by result. There from the start, so that the first failure is a rise and not a new series.
fn reloads(registry: &Registry, name: &str, of: &str, results: &[&str]) -> prometheus::Result<IntCounterVec> {
    let reloads = counters(registry, name, &format!("Reloads of {of} by result"), &["result"])?;
    results.iter().for_each(|result| drop(reloads.with_label_values(&[result])));
    Ok(reloads)
}

fn code_class(status: u16) -> &'static str {
    CODE_CLASSES[usize::from(status / 100).clamp(1, 5) - 1]
}

fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, family: C) -> prometheus::Result<C> {
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    register(registry, IntCounter::new(name, help)?)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn int_gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    register(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
    let family = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[])?;
    Ok(register(registry, family)?.with_label_values::<&str>(&[]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_of_a_node_come_and_go_with_it() {
        let metrics = Metrics::new().unwrap();
        let id = NodeId::try_from("varnish-1").unwrap();
        let node = metrics.node(Role::Varnish, &id);
        node.record_answer(200);
        node.varnish.as_ref().unwrap().fenced.inc();
        let text = || String::from_utf8(metrics.render().unwrap()).unwrap();
        assert!(
            text().contains("clearcoat_edge_requests_total{code_class=\"2xx\",node=\"varnish-1\"} 1"),
            "{}",
            text()
        );
        metrics.forget(Role::Varnish, &id);
        assert!(!text().contains("varnish-1"), "{}", text());
    }

    #[test]
    fn the_series_of_a_certificate_come_and_go_with_it() {
        let metrics = Metrics::new().unwrap();
        let text = || String::from_utf8(metrics.render().unwrap()).unwrap();
        for result in ["ok", "failed"] {
            assert!(text().contains(&format!("clearcoat_tls_reloads_total{{result=\"{result}\"}} 0\n")), "{}", text());
        }
        metrics.tls_certificate("shop.pem", 4_102_444_800);
        let series = "clearcoat_tls_certificate_expiry_timestamp_seconds{cert=\"shop.pem\"} 4102444800\n";
        assert!(text().contains(series), "{}", text());
        metrics.forget_tls_certificate("shop.pem");
        assert!(!text().contains("shop.pem"), "{}", text());
    }

    #[test]
    fn odd_status_codes_stay_within_the_classes() {
        assert_eq!([code_class(99), code_class(204), code_class(999)], ["1xx", "2xx", "5xx"]);
    }
}
