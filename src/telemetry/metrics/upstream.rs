//! What clients have to bear of a node.

use prometheus::Registry;

use super::family::{Counters, counters};
use super::labels::UpstreamFault;
use crate::fleet::Role;

/// Requests that got no good answer from their node, by role and fault. All are there from the start, so that the first
/// failure is a rise and not a new series.
#[derive(Debug)]
pub struct UpstreamFailures(Counters<(Role, UpstreamFault)>);

impl UpstreamFailures {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let failures = counters(
            registry,
            "upstream_failures_total",
            "Requests whose answer from a node was refused, cut off or did not come, and was not had from another one",
        )?;
        let of = |role| UpstreamFault::ALL.map(|fault| (role, fault));
        Ok(UpstreamFailures(failures.with([Role::Varnish, Role::Web].into_iter().flat_map(of))))
    }

    /// Counts one.
    pub fn count(&self, role: Role, fault: UpstreamFault) {
        self.0.get(&(role, fault)).inc();
    }
}
