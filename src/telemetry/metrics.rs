//! Metrics: one value that is passed in, families registered once, handles bound once per node.
//!
//! No global registry, and no look-up by label on the data path: a worker keeps the handles of a node beside its
//! connections. Series of a node go when the node goes, so that no dashboard shows ghosts: they are made through one value
//! that removes them from whatever family they are in ([`family`]). No label can be grown by a stranger: node ids come from
//! the registry, families of tags and senders of purges are a bounded number, everything else comes from this source
//! ([`labels`]).

mod bypass;
mod family;
mod files;
mod guard;
mod journal;
mod labels;
mod listener;
mod node;
mod process;
mod purge;
mod queue;
mod registry;
mod seal;
mod sharded;
mod upstream;
mod vcl;

use std::collections::BTreeMap;
use std::sync::Arc;

use dashmap::DashMap;
use parking_lot::Mutex;
use prometheus::{Encoder, IntCounter, IntGauge, Registry, TextEncoder};

use crate::fleet::{NodeId, NodeKey, Role};
use crate::telemetry::Incidents;

pub use bypass::FragmentMetrics;
pub use files::{FileMetrics, Shortage};
pub use guard::GuardMetrics;
pub use journal::JournalMetrics;
pub use labels::{
    CacheResult, FailureReason, FileShare, HandshakeResult, PurgeResult, ReloadResult, Resync, RetryReason,
    SealVerdict, UpstreamFault,
};
pub use listener::{Durations, ListenerMetrics};
pub use node::{Answers, NodeMetrics, VarnishMetrics};
pub use purge::PurgeMetrics;
pub use queue::QueueMetrics;
pub use registry::RegistryMetrics;
pub use seal::{SealChecks, SealMetrics};
pub use sharded::{DurationHistogram, ShardedCounter};
pub use upstream::UpstreamFailures;
pub use vcl::VclMetrics;

use family::{Counters, IntGauges, counters, int_gauges};
use labels::{CertificateFile, TlsReloadResult, Version};
use node::NodeFamilies;
use process::ProcessMetrics;

const ROLES: [Role; 2] = [Role::Varnish, Role::Web];

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    families: Registry,
    process: ProcessMetrics,
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
    node_families: NodeFamilies,
    retries: Counters<(Role, RetryReason)>,
    reloads: Counters<ReloadResult>,
    tls_reloads: Counters<TlsReloadResult>,
    tls_expiry: IntGauges<CertificateFile>,
    /// The same as values: the end of each certificate in use, in Unix seconds, by its file as configured.
    certificates: Mutex<BTreeMap<String, i64>>,
    /// Client connections that are open at the edge.
    pub edge_connections: IntGauge,
    /// 1 while the shop is closed.
    pub edge_maintenance: IntGauge,
    handshakes: Counters<HandshakeResult>,
    /// Requests that wait.
    pub queue: QueueMetrics,
    /// Client connections that were closed at once: their address has as many as it may.
    pub edge_connections_refused: IntCounter,
    /// Requests served by a Varnish that was behind, because nobody else could take them.
    pub stale_served: IntCounter,
    /// What the guard keeps from being stored.
    pub guard: GuardMetrics,
    /// What seals said of the answers of caches.
    pub seal: SealMetrics,
    /// Requests that got no good answer from their node.
    pub upstream_failures: UpstreamFailures,
    /// The fragments of pages that pass the caches by.
    pub fragments: FragmentMetrics,
    /// The journal, and the replicas that share it.
    pub journal: JournalMetrics,
    /// Lines of the access log that were lost.
    pub access_log_dropped: IntCounter,
    /// Spans that were lost.
    pub spans_dropped: IntCounter,
    /// The last of each kind of incident, in words.
    pub incidents: Arc<Incidents>,
}

impl Metrics {
    /// All families, registered.
    ///
    /// # Errors
    /// Only where two families share a name: a fault in this file.
    pub fn new() -> prometheus::Result<Self> {
        let families = Registry::new_custom(Some("clearcoat".into()), None)?;
        let r = &families;
        let incidents = Arc::new(Incidents::default());
        let build: IntGauges<Version> = int_gauges(r, "build_info", "The version that runs; always 1")?;
        build.get(&Version(env!("CARGO_PKG_VERSION").into())).set(1);
        Ok(Metrics {
            edge: ListenerMetrics::new(r, "edge", "clients")?,
            origin: ListenerMetrics::new(r, "origin", "Varnish")?,
            purge: PurgeMetrics::new(r)?,
            registry: RegistryMetrics::new(r)?,
            files: FileMetrics::new(r, &incidents)?,
            node_families: NodeFamilies::new(r)?,
            retries: counters(r, "retries_total", "Requests that were tried again elsewhere")?
                .with(ROLES.into_iter().flat_map(|role| RetryReason::ALL.map(|reason| (role, reason)))),
            reloads: counters(r, "reloads_total", "Reloads of the configuration by result")?.with(ReloadResult::ALL),
            tls_reloads: counters(r, "tls_reloads_total", "Reloads of TLS certificates by result")?
                .with(TlsReloadResult::ALL),
            tls_expiry: int_gauges(
                r,
                "tls_certificate_expiry_timestamp_seconds",
                "When the certificate in use ends (notAfter, Unix time)",
            )?,
            edge_connections: register(
                r,
                IntGauge::new("edge_connections", "Client connections that are open at the edge")?,
            )?,
            edge_maintenance: register(r, IntGauge::new("edge_maintenance", "1 while edge.maintenance.on is true")?)?,
            handshakes: counters(r, "tls_handshakes_total", "TLS handshakes at the edge by result")?
                .with(HandshakeResult::ALL),
            queue: QueueMetrics::new(r)?,
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
            certificates: Mutex::default(),
            guard: GuardMetrics::new(r)?,
            seal: SealMetrics::new(r)?,
            upstream_failures: UpstreamFailures::new(r)?,
            fragments: FragmentMetrics::new(r)?,
            journal: JournalMetrics::new(r)?,
            access_log_dropped: counter(
                r,
                "access_log_dropped_total",
                "Lines of the access log that were lost, because its file or pipe did not take them",
            )?,
            spans_dropped: counter(
                r,
                "spans_dropped_total",
                "Spans that were lost, because the collector did not take them",
            )?,
            nodes: DashMap::new(),
            process: ProcessMetrics::new()?,
            incidents,
            families,
        })
    }

    /// The handles of a node, made when first asked for.
    pub fn node(&self, role: Role, id: &NodeId) -> Arc<NodeMetrics> {
        let bind = || self.node_families.bind(role, id, &self.listener(role).requests, &self.edge.requests);
        self.nodes.entry((role, id.clone())).or_insert_with(|| Arc::new(bind())).clone()
    }

    /// The listener that sends to nodes of this role.
    pub fn listener(&self, role: Role) -> &ListenerMetrics {
        match role {
            Role::Varnish => &self.edge,
            Role::Web => &self.origin,
        }
    }

    /// Drops the series of a node that left, whoever still has its handles.
    pub fn forget(&self, role: Role, id: &NodeId) {
        if let Some((_, node)) = self.nodes.remove(&(role, id.clone())) {
            node.release();
        }
    }

    /// Counts a request that was sent again.
    pub fn count_retry(&self, role: Role, reason: RetryReason) {
        self.retries.get(&(role, reason)).inc();
    }

    /// Counts a TLS handshake of a client.
    pub fn count_handshake(&self, result: HandshakeResult) {
        self.handshakes.get(&result).inc();
    }

    /// Counts a reload of the configuration.
    pub fn count_reload(&self, result: ReloadResult) {
        self.reloads.get(&result).inc();
    }

    /// Counts a reload of TLS certificates that had something new.
    pub fn count_tls_reload(&self, succeeded: bool) {
        self.tls_reloads.get(if succeeded { &TlsReloadResult::Ok } else { &TlsReloadResult::Failed }).inc();
    }

    /// Shows when a certificate ends, in Unix seconds. `cert` is its file as configured.
    pub fn tls_certificate(&self, cert: &str, not_after: i64) {
        self.tls_expiry.get(&CertificateFile(cert.into())).set(not_after);
        self.certificates.lock().insert(cert.to_owned(), not_after);
    }

    /// Drops the series of a certificate that is not served any more.
    pub fn forget_tls_certificate(&self, cert: &str) {
        self.tls_expiry.remove(&CertificateFile(cert.into()));
        self.certificates.lock().remove(cert);
    }

    /// The certificates in use, by their files as configured, each with its end in Unix seconds.
    pub fn tls_certificates(&self) -> BTreeMap<String, i64> {
        self.certificates.lock().clone()
    }

    /// All series in Prometheus' text format.
    ///
    /// # Errors
    /// Where a series cannot be written as text: a fault in this file.
    pub fn render(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::with_capacity(16 * 1024);
        self.process.update();
        for families in [&self.families, &self.process.families] {
            TextEncoder::new().encode(&families.gather(), &mut text)?;
        }
        Ok(text)
    }
}

fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, family: C) -> prometheus::Result<C> {
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    register(registry, IntCounter::new(name, help)?)
}

/// A counter of the data path.
fn sharded_counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<ShardedCounter> {
    let family = register(registry, sharded::sharded_counters(name, help, &[])?)?;
    Ok(family.with_label_values::<&str>(&[]))
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<DurationHistogram> {
    let family = register(registry, sharded::duration_histograms(name, help, buckets, &[])?)?;
    Ok(family.with_label_values::<&str>(&[]))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const TOOK: Duration = Duration::from_millis(100);

    #[test]
    fn the_series_of_a_node_come_and_go_with_it() {
        let metrics = Metrics::new().unwrap();
        let id = NodeId::try_from("varnish-1").unwrap();
        let node = metrics.node(Role::Varnish, &id);
        node.record_answer(200, TOOK);
        node.varnish.as_ref().unwrap().fenced.inc();
        let text = || String::from_utf8(metrics.render().unwrap()).unwrap();
        assert!(
            text().contains("clearcoat_edge_requests_total{code_class=\"2xx\",node=\"varnish-1\"} 1"),
            "{}",
            text()
        );
        metrics.forget(Role::Varnish, &id);
        assert!(!text().contains("varnish-1"), "{}", text());
        node.record_bypass(200, TOOK);
        assert!(!text().contains("varnish-1"), "whoever still has the handles brings nothing back: {}", text());
    }

    #[test]
    fn what_two_nodes_of_one_name_share_stays_while_one_is_there() {
        let metrics = Metrics::new().unwrap();
        let id = NodeId::try_from("host-1").unwrap();
        let (web, varnish) = (metrics.node(Role::Web, &id), metrics.node(Role::Varnish, &id));
        web.record_bypass(200, TOOK);
        varnish.record_answer(200, TOOK);
        metrics.forget(Role::Web, &id);
        varnish.record_answer(200, TOOK);
        let text = || String::from_utf8(metrics.render().unwrap()).unwrap();
        let series = "clearcoat_edge_requests_total{code_class=\"2xx\",node=\"host-1\"} 3\n";
        assert!(text().contains(series) && !text().contains("role=\"web\",node=\"host-1\""), "{}", text());
        metrics.forget(Role::Varnish, &id);
        assert!(!text().contains("host-1"), "{}", text());
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
}
