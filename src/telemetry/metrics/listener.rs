//! What the traffic listeners count.

use prometheus::core::Collector;
use prometheus::{Histogram, Registry};

use super::family::{Counters, counters};
use super::histogram;
use super::labels::CodeClass;
use crate::fleet::NodeId;

/// From a cache hit on the same host to a page that takes a minute, in seconds.
const REQUEST_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Requests, by how they were answered and by whom.
pub(super) type RequestCounters = Counters<(CodeClass, Option<NodeId>)>;

/// The metrics of one traffic listener.
#[derive(Debug)]
pub struct ListenerMetrics {
    pub(super) requests: RequestCounters,
    /// How long requests took, from their first byte to the last byte of the answer.
    pub duration: Histogram,
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
        let requests = counters(
            registry,
            &format!("{name}_requests_total"),
            &format!("Requests from {from} by status class and the node that answered (empty: clearcoat itself)"),
        )?;
        let duration = histogram(
            registry,
            &format!("{name}_request_duration_seconds"),
            &format!("Time from the first byte of a request from {from} to the last byte of its answer"),
            &REQUEST_BUCKETS,
        )?;
        Ok(ListenerMetrics { requests, duration })
    }

    /// How long all requests took, so far.
    pub fn durations(&self) -> Durations {
        let families = self.duration.collect();
        let Some(series) = families.first().and_then(|family| family.get_metric().first()) else {
            return Durations::default();
        };
        let histogram = series.get_histogram();
        let buckets = histogram.get_bucket().iter().map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()));
        Durations { count: histogram.get_sample_count(), buckets: buckets.collect() }
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
