//! What seals said of the answers of caches.

use prometheus::{IntGauge, Registry};

use super::family::{ShardedCounters, data_path_counters};
use super::labels::SealVerdict;
use super::register;
use super::sharded::ShardedCounter;

/// The metrics of seals.
#[derive(Debug)]
pub struct SealMetrics {
    /// Answers of caches, by what their seal said.
    pub checks: SealChecks,
    /// Tags that no seal shows: purges of them wait for Varnish.
    pub unsealable: IntGauge,
}

/// Answers of caches by what their seal said: bound once, as each answer is counted.
#[derive(Debug)]
pub struct SealChecks([ShardedCounter; SealVerdict::ALL.len()]);

impl SealMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let checks: ShardedCounters<SealVerdict> = data_path_counters(
            registry,
            "seal_checks_total",
            "Answers of Varnish at the edge, by what their seal said",
        )?;
        let unsealable = IntGauge::new(
            "unsealable_tags",
            "Tags that no seal shows, as those of blocks of pages: purges of them wait for Varnish",
        )?;
        Ok(SealMetrics {
            checks: SealChecks(SealVerdict::ALL.map(|verdict| checks.get(&verdict))),
            unsealable: register(registry, unsealable)?,
        })
    }
}

impl SealChecks {
    /// Counts an answer.
    pub fn count(&self, verdict: SealVerdict) {
        self.0[verdict as usize].inc();
    }
}
