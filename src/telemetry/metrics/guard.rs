//! What the guard keeps from being stored.

use prometheus::{IntCounter, Registry};

use super::counter;

/// The metrics of the guard.
#[derive(Debug)]
pub struct GuardMetrics {
    /// Pages that were purged while they were rendered.
    pub marked: IntCounter,
    /// Answers that a purge waited for in vain.
    pub cut: IntCounter,
}

impl GuardMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let marked = counter(
            registry,
            "guard_marked_total",
            "Pages that Varnish was told not to store: they were purged while they were rendered",
        )?;
        let cut = counter(
            registry,
            "guard_cut_total",
            "Answers to Varnish that were cut: a purge concerned them, and they did not come to their end in 30 s",
        )?;
        Ok(GuardMetrics { marked, cut })
    }
}
