//! What clients have to bear of a node.

use prometheus::{IntCounter, Registry};

use super::counters;
use crate::fleet::Role;

/// What a node did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamFault {
    /// It took no connection.
    Connect,
    /// It closed the connection before its answer.
    NoAnswer,
    /// It went down while it was waited for.
    NodeDown,
    /// Its answer did not begin in time.
    Timeout,
    /// The head of its answer had more bytes or fields than it may.
    HeadTooLarge,
    /// The head of its answer was malformed.
    BadHead,
    /// The frame of its answer's body was malformed.
    BadBody,
    /// It broke off in mid-answer.
    Cut,
    /// It said nothing more in mid-answer.
    Stalled,
}

impl UpstreamFault {
    const ALL: [(UpstreamFault, &'static str); 9] = [
        (UpstreamFault::Connect, "connect"),
        (UpstreamFault::NoAnswer, "no_answer"),
        (UpstreamFault::NodeDown, "node_down"),
        (UpstreamFault::Timeout, "timeout"),
        (UpstreamFault::HeadTooLarge, "head_too_large"),
        (UpstreamFault::BadHead, "bad_head"),
        (UpstreamFault::BadBody, "bad_body"),
        (UpstreamFault::Cut, "cut"),
        (UpstreamFault::Stalled, "stalled"),
    ];
}

/// Requests that got no good answer from their node, by role and fault. All are there from the start, so that the first
/// failure is a rise and not a new series.
#[derive(Debug)]
pub struct UpstreamFailures {
    varnish: [IntCounter; 9],
    web: [IntCounter; 9],
}

impl UpstreamFailures {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let failures = counters(
            registry,
            "upstream_failures_total",
            "Requests whose answer from a node was refused, cut off or did not come, and was not had from another one",
            &["role", "reason"],
        )?;
        let of =
            |role: Role| UpstreamFault::ALL.map(|(_, reason)| failures.with_label_values(&[role.as_str(), reason]));
        Ok(UpstreamFailures { varnish: of(Role::Varnish), web: of(Role::Web) })
    }

    /// Counts one.
    pub fn count(&self, role: Role, fault: UpstreamFault) {
        let counters = match role {
            Role::Varnish => &self.varnish,
            Role::Web => &self.web,
        };
        counters[fault as usize].inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_its_own_counter() {
        for (place, (fault, _)) in UpstreamFault::ALL.into_iter().enumerate() {
            assert_eq!(fault as usize, place, "{fault:?}");
        }
    }
}
