//! What the traffic listeners count.

use prometheus::{Histogram, IntCounterVec, Registry};

use super::{code_class, counters, histogram};
use crate::fleet::NodeId;

/// From a cache hit on the same host to a page that takes a minute, in seconds.
const REQUEST_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// The metrics of one traffic listener.
#[derive(Debug)]
pub struct ListenerMetrics {
    pub(super) requests: IntCounterVec,
    /// How long requests took, from their first byte to the last byte of the answer.
    pub duration: Histogram,
}

impl ListenerMetrics {
    pub(super) fn new(registry: &Registry, name: &str, from: &str) -> prometheus::Result<Self> {
        let requests = counters(
            registry,
            &format!("{name}_requests_total"),
            &format!("Requests from {from} by status class and the node that answered (empty: clearcoat itself)"),
            &["code_class", "node"],
        )?;
        let duration = histogram(
            registry,
            &format!("{name}_request_duration_seconds"),
            &format!("Time from the first byte of a request from {from} to the last byte of its answer"),
            &REQUEST_BUCKETS,
        )?;
        Ok(ListenerMetrics { requests, duration })
    }

    /// Counts a request that no node answered.
    pub fn record_own_answer(&self, status: u16) {
        self.requests.with_label_values(&[code_class(status), ""]).inc();
    }

    /// Counts a request that a node of the other role answered: a web node, past the caches.
    pub fn record_bypass(&self, status: u16, id: &NodeId) {
        self.requests.with_label_values(&[code_class(status), id.as_str()]).inc();
    }
}
