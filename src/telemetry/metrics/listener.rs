//! What the traffic listeners count.

use std::time::Duration;

use prometheus::{IntCounter, Registry};

use super::family::{Counters, ShardedCounters, counters, data_path_counters};
use super::labels::{CodeClass, FailureReason};
use super::sharded::{DurationHistogram, ShardedCounter};
use super::{counter, histogram, sharded_counter};
use crate::fleet::NodeId;

/// From a cache hit on the same host to a page that takes a minute, in seconds.
const REQUEST_BUCKETS: [f64; 19] = [
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0,
];

/// The same for each node, coarser: there are many of them.
pub(super) const NODE_BUCKETS: [f64; 12] = [0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0];

/// Requests, by how they were answered and by whom.
pub(super) type RequestCounters = ShardedCounters<(CodeClass, Option<NodeId>)>;

/// The metrics of one traffic listener.
#[derive(Debug)]
pub struct ListenerMetrics {
    pub(super) requests: RequestCounters,
    /// How long requests took, from the end of their head to the last byte of the answer.
    duration: DurationHistogram,
    failures: Counters<FailureReason>,
    received: ShardedCounter,
    sent: ShardedCounter,
    /// Connections that were accepted.
    pub accepted: IntCounter,
}

/// How long all requests of a listener took, so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Durations {
    /// The requests.
    pub count: u64,
    /// The upper bound of each bucket in seconds, and the requests up to it.
    pub buckets: Vec<(f64, u64)>,
}

impl ListenerMetrics {
    pub(super) fn new(registry: &Registry, name: &str, from: &str) -> prometheus::Result<Self> {
        let requests = data_path_counters(
            registry,
            &format!("{name}_requests_total"),
            &format!("Requests from {from} by status class and the node that answered (empty: clearcoat itself)"),
        )?;
        let duration = histogram(
            registry,
            &format!("{name}_request_duration_seconds"),
            &format!("Time from the head of a request from {from} to the last byte of its answer"),
            &REQUEST_BUCKETS,
        )?;
        let failures = counters(
            registry,
            &format!("{name}_failures_total"),
            &format!("Requests from {from} that failed, by what was wrong"),
        )?;
        let received = sharded_counter(
            registry,
            &format!("{name}_received_bytes_total"),
            &format!("Bytes of requests from {from}, heads and bodies without their chunks"),
        )?;
        let sent = sharded_counter(
            registry,
            &format!("{name}_sent_bytes_total"),
            &format!("Bytes of answers to {from}, as they were written; by HTTP/2 without their heads"),
        )?;
        let requests = requests.with(CodeClass::ALL.map(|class| (class, None)));
        let accepted = counter(
            registry,
            &format!("{name}_connections_accepted_total"),
            &format!("Connections from {from} that were accepted"),
        )?;
        Ok(ListenerMetrics {
            accepted,
            requests,
            duration,
            failures: failures.with(FailureReason::ALL),
            received,
            sent,
        })
    }

    /// Counts a request that has ended: how long it took, and the bytes of it and of its answer.
    pub fn record_end(&self, took: Duration, received: u64, sent: u64) {
        self.duration.observe(took);
        self.received.inc_by(received);
        self.sent.inc_by(sent);
    }

    /// Counts a request that failed, beside its status.
    pub fn record_failure(&self, reason: FailureReason) {
        self.failures.get(&reason).inc();
    }

    /// How long all requests took, so far.
    pub fn durations(&self) -> Durations {
        let (buckets, count) = self.duration.cumulated();
        Durations { count, buckets }
    }

    /// The requests so far that no node answered and that clearcoat answered with a 5xx.
    pub fn own_server_errors(&self) -> u64 {
        self.requests.get(&(CodeClass::ServerError, None)).get()
    }

    /// Counts a request that no node answered.
    pub fn record_own_answer(&self, status: u16) {
        self.requests.get(&(CodeClass::of(status), None)).inc();
    }
}
