//! The parts of a running process that take another configuration.
//!
//! All or nothing: first everything that can fail is done beside what runs (certificates are read, the access log is opened,
//! [`RunningParts::prepare`]), then each part is given its new value, which cannot fail ([`RunningParts::apply`]).

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Instant;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::access_log::RunningAccessLog;
use super::listeners;
use super::sealing::Sealing;
use crate::admin::{AdminApi, AdminSettings};
use crate::config::{Config, HealthChecks, Log, LogFilter, ShutdownTimes, StaticNode};
use crate::delivery::Deliveries;
use crate::edge;
use crate::files::FileBudget;
use crate::fleet::Fence;
use crate::origin;
use crate::proxy::{
    Admission, ErrorPages, FailureStatuses, Frontend, LeaveNotice, RateBuckets, RequestQueue, TrafficRules,
};
use crate::purge::Guard;
use crate::purge_api::PurgeApi;
use crate::replicas::Replicas;
use crate::slow_start::SlowStart;
use crate::telemetry::access::AccessLog;
use crate::telemetry::{Metrics, log};
use crate::tls::{PreparedCertificates, Tls};
use crate::trial::Trials;
use crate::vcl_push::PushSettings;

/// What the listeners of the traffic are made of, beside their configuration.
pub(super) struct TrafficParts {
    pub(super) fence: Arc<Fence>,
    pub(super) guard: Arc<Guard>,
    pub(super) trials: Arc<Trials>,
    pub(super) sealing: Sealing,
    pub(super) leave_notice: Arc<LeaveNotice>,
    pub(super) metrics: Arc<Metrics>,
    /// What clients have used up of their rates.
    pub(super) buckets: Arc<RateBuckets>,
    /// What the times in there count from.
    pub(super) started: Instant,
}

impl TrafficParts {
    /// The rules of this configuration.
    pub(super) fn rules(
        &self,
        config: &Config,
        access: Option<Arc<AccessLog>>,
        pages: &Arc<ErrorPages>,
    ) -> TrafficRules {
        let (methods, trials) = (&config.purge.methods, || Arc::clone(&self.trials));
        let Sealing { origin, edge } = self.sealing.clone();
        let parts = edge::GateParts { buckets: Arc::clone(&self.buckets), error_pages: Arc::clone(pages) };
        let origin = origin::frontend(
            &config.origin,
            methods,
            Arc::clone(&self.guard),
            origin,
            trials(),
            Arc::clone(&self.leave_notice),
            Arc::clone(&self.metrics),
        );
        TrafficRules {
            edge: edge::frontend(
                &config.edge,
                methods,
                config.origin.request_terms().max_per_node,
                Arc::clone(&self.fence),
                trials(),
                edge,
                parts,
            ),
            origin: Frontend { error_pages: Arc::clone(pages), ..origin },
            limits: config.limits.clone(),
            timeouts: config.timeouts,
            failing: FailureStatuses::new(&config.health),
            access,
        }
    }
}

/// The parts.
pub(super) struct RunningParts {
    /// The nodes of the configuration.
    pub(super) nodes: watch::Sender<Vec<StaticNode>>,
    pub(super) checks: watch::Sender<HealthChecks>,
    pub(super) pushed: watch::Sender<Arc<PushSettings>>,
    pub(super) traffic: TrafficParts,
    pub(super) rules: Arc<ArcSwap<TrafficRules>>,
    pub(super) admission: Arc<Admission>,
    pub(super) files: Arc<FileBudget>,
    pub(super) queue: Arc<RequestQueue>,
    pub(super) slow_start: Arc<SlowStart>,
    pub(super) deliveries: Arc<Deliveries>,
    pub(super) purge_api: Arc<PurgeApi>,
    pub(super) admin_api: Arc<AdminApi>,
    pub(super) replicas: Option<Arc<Replicas>>,
    pub(super) certificates: Vec<(SocketAddr, Arc<Tls>)>,
    pub(super) access_log: Arc<Mutex<RunningAccessLog>>,
    pub(super) times: Arc<Mutex<ShutdownTimes>>,
}

/// What was done for a new configuration, and has no effect yet.
pub(super) struct PreparedParts {
    certificates: Vec<(Arc<Tls>, PreparedCertificates)>,
    error_pages: Arc<ErrorPages>,
    /// `None`: the access log stays.
    access_log: Option<RunningAccessLog>,
}

impl RunningParts {
    /// Does all that can fail. Reads files, and blocks meanwhile.
    ///
    /// # Errors
    /// A new certificate or a page that cannot be used, or an access log that cannot be opened. A certificate of before whose files are wrong now
    /// goes on: whoever watches them says so, and everything else can be taken all the same.
    pub(super) fn prepare(&self, before: &Config, now: &Config) -> anyhow::Result<PreparedParts> {
        let mut certificates = Vec::new();
        let files_before = listeners::certificates_by_address(&before.edge);
        for (address, table) in listeners::certificates_by_address(&now.edge) {
            let of_address = self.certificates.iter().find(|(known, _)| *known == address);
            let (_, tls) = of_address.with_context(|| format!("edge.tls: nothing listens at {address}"))?;
            let is_new = !files_before.iter().any(|known| *known == (address, table.clone()));
            match tls.prepare(&table.files, &table.policy) {
                Ok(prepared) => certificates.push((Arc::clone(tls), prepared)),
                Err(error) if is_new => return Err(error).context("edge.tls"),
                Err(error) => tracing::warn!("edge.tls: {error:#}; the certificate of before goes on at {address}"),
            }
        }
        let metrics = &self.traffic.metrics;
        let access_log =
            (!is_same_access_log(&before.log, &now.log)).then(|| RunningAccessLog::start(&now.log, metrics));
        let error_pages = Arc::new(ErrorPages::read(&now.edge)?);
        Ok(PreparedParts { certificates, error_pages, access_log: access_log.transpose()? })
    }

    /// Gives each part what it is to go by from now on. Returns the rules of before, which are gone when no worker goes by them any
    /// more.
    pub(super) fn apply(&self, prepared: PreparedParts, before: &Config, now: &Config) -> Weak<TrafficRules> {
        for (tls, certificates) in prepared.certificates {
            if tls.replace(certificates) {
                tracing::info!("other certificates are in use");
                self.traffic.metrics.count_tls_reload(true);
            }
        }
        let access = {
            let mut running = self.access_log.lock();
            if let Some(access_log) = prepared.access_log {
                // The thread of the old one ends when no worker has it any more: nobody waits for that.
                *running = access_log;
            }
            running.log.clone()
        };
        self.admission.limit_each(now.limits.max_connections_per_address);
        if before.limits.max_connections != now.limits.max_connections {
            self.files.limit_edge_clients(now.limits.max_connections);
        }
        let (limits_before, limits) = (&before.edge.rate_limit, &now.edge.rate_limit);
        self.traffic.buckets.adopt(limits_before, limits, self.traffic.started.elapsed());
        let old = self.rules.swap(Arc::new(self.traffic.rules(now, access, &prepared.error_pages)));
        // A limit may have been raised.
        self.queue.serve();
        self.purge_api.configure(&now.purge);
        self.deliveries.configure(&now.purge);
        self.admin_api.configure(AdminSettings::of(now));
        if let Some(replicas) = &self.replicas {
            replicas.set_token(now.purge.token.clone());
        }
        self.traffic.trials.set_default_host(now.health.web.host.as_deref());
        self.slow_start.configure(&now.health);
        self.checks.send_if_modified(|checks| std::mem::replace(checks, now.health.clone()) != now.health);
        self.pushed.send_replace(Arc::new(PushSettings::of(now)));
        *self.times.lock() = now.shutdown;
        if before.log.level != now.log.level {
            log::set_filter(now.log.level.targets());
            tracing::info!(level = %now.log.level, "the log level was changed");
        }
        if before.nodes != now.nodes {
            self.nodes.send_replace(now.nodes.clone());
        }
        Arc::downgrade(&old)
    }
}

/// Whether both describe one access log: another level or format of the other log is none of its business.
fn is_same_access_log(before: &Log, now: &Log) -> bool {
    let of = |log: &Log| Log { level: LogFilter::default(), format: now.format, ..log.clone() };
    of(before) == of(now)
}
