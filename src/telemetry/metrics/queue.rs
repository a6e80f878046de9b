//! Requests that wait, and retries that are not made.

use std::time::Duration;

use prometheus::{IntGauge, Registry};

use super::ROLES;
use super::family::{Counters, Histograms, IntGauges, counters, histograms, int_gauges};
use super::labels::{AwaitedResource, RetryReason};
use super::sharded::DurationHistogram;
use crate::fleet::Role;

/// From a place that is free at once to the longest `queue_timeout` that makes sense, in seconds.
const WAIT_BUCKETS: [f64; 10] = [0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Requests that wait for a node or for a file.
#[derive(Debug)]
pub struct QueueMetrics {
    /// By what is waited for, and by role.
    lengths: [[IntGauge; 2]; AwaitedResource::ALL.len()],
    waits: [DurationHistogram; 2],
    retries_refused: Counters<(Role, RetryReason)>,
}

impl QueueMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        let help = "Requests that wait for a node with room, or for a file for a connection to their node";
        let lengths: IntGauges<(Role, AwaitedResource)> = int_gauges(r, "queue_length", help)?;
        let help = "How long requests waited for a node with room, of those that had to wait";
        let waits: Histograms<Role> = histograms(r, "queue_duration_seconds", help, &WAIT_BUCKETS)?;
        let help = "Requests that were not sent to another node, as the retry budget was used up";
        let retries_refused = counters(r, "retries_refused_total", help)?;
        // In the order of their numbers.
        let of_roles = [Role::Web, Role::Varnish];
        Ok(QueueMetrics {
            lengths: AwaitedResource::ALL.map(|awaited| of_roles.map(|role| lengths.get(&(role, awaited)))),
            waits: of_roles.map(|role| waits.get(&role)),
            retries_refused: retries_refused
                .with(ROLES.into_iter().flat_map(|role| RetryReason::ALL.map(|reason| (role, reason)))),
        })
    }

    /// Requests that wait for a node of this role with room.
    pub fn length(&self, role: Role) -> &IntGauge {
        &self.lengths[AwaitedResource::Node as usize][role as usize]
    }

    /// Requests that wait for a file for a connection to a node of this role.
    pub fn for_files(&self, role: Role) -> &IntGauge {
        &self.lengths[AwaitedResource::File as usize][role as usize]
    }

    /// Notes how long a request has waited for a node of this role, whatever came of it.
    pub fn record_wait(&self, role: Role, waited: Duration) {
        self.waits[role as usize].observe(waited);
    }

    /// Counts a request that was not retried.
    pub fn count_refused_retry(&self, role: Role, reason: RetryReason) {
        self.retries_refused.get(&(role, reason)).inc();
    }
}
