//! What seals said of the answers of caches.

use prometheus::{IntCounter, Registry};

use super::family::{Counters, counters};
use super::labels::SealVerdict;

/// The metrics of seals.
#[derive(Debug)]
pub struct SealMetrics {
    /// Answers of caches, by what their seal said.
    pub checks: SealChecks,
}

/// Answers of caches by what their seal said: bound once, as each answer is counted.
#[derive(Debug)]
pub struct SealChecks([IntCounter; SealVerdict::ALL.len()]);

impl SealMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let checks: Counters<SealVerdict> =
            counters(registry, "seal_checks_total", "Answers of Varnish at the edge, by what their seal said")?;
        Ok(SealMetrics { checks: SealChecks(SealVerdict::ALL.map(|verdict| checks.get(&verdict))) })
    }
}

impl SealChecks {
    /// Counts an answer.
    pub fn count(&self, verdict: SealVerdict) {
        self.0[verdict as usize].inc();
    }
}
