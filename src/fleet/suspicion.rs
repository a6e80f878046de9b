//! A request that a node failed, as the data path tells of it.

use std::fmt;

use super::{FaultKind, NodeFault, NodeKey, Role, Streak};

/// A node that failed a request of a client.
#[derive(Clone, Debug)]
pub struct Suspicion {
    /// Who.
    pub node: NodeKey,
    /// At which of its addresses: [`Node::endpoint_id`](super::Node::endpoint_id).
    pub endpoint_id: u64,
    /// How.
    pub fault: RequestFault,
    /// The failures in a row, with this one; `None` if it is none of those that count.
    pub streak: Option<Streak>,
}

/// How a node failed a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestFault {
    /// No connection could be made.
    NotConnected(FaultKind),
    /// The connection ended before an answer.
    NoAnswer(FaultKind),
    /// The answer took too long to begin, or to go on.
    TooSlow,
    /// The answer is not HTTP/1.1.
    Malformed,
    /// The answer ended before its end.
    Cut,
    /// It answered with this status.
    Status(u16),
}

impl RequestFault {
    /// Whether it may be the node's own. A Varnish is as slow, and its answers end as early, as those of the web node behind it;
    /// both are told from its own faults by nothing, and the web node has been counted for them. Its statuses: see
    /// `health.varnish.eject_statuses`.
    pub fn counts_against(self, role: Role) -> bool {
        match (self, role) {
            (RequestFault::TooSlow | RequestFault::Cut, Role::Varnish) => false,
            (
                RequestFault::NotConnected(_)
                | RequestFault::NoAnswer(_)
                | RequestFault::TooSlow
                | RequestFault::Malformed
                | RequestFault::Cut
                | RequestFault::Status(_),
                _,
            ) => true,
        }
    }

    /// Whether a health check should look at once: it may see the same.
    pub fn calls_for_check(self) -> bool {
        matches!(self, RequestFault::NotConnected(_) | RequestFault::NoAnswer(_))
    }

    /// Whether its name may have another address by now.
    pub fn doubts_address(self) -> bool {
        matches!(self, RequestFault::NotConnected(_))
    }

    fn kind(self) -> FaultKind {
        match self {
            RequestFault::NotConnected(kind) | RequestFault::NoAnswer(kind) => kind,
            RequestFault::TooSlow => FaultKind::Silent,
            RequestFault::Malformed => FaultKind::Malformed,
            RequestFault::Cut => FaultKind::Disconnects,
            RequestFault::Status(status) => FaultKind::of_status(status),
        }
    }

    /// The fault of a node whose last `failures` requests failed, the last one like this.
    pub fn of_streak(self, failures: u32) -> NodeFault {
        NodeFault::new(self.kind(), format!("{failures} requests in a row failed, the last one: {self}"))
    }
}

impl fmt::Display for RequestFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RequestFault::NotConnected(FaultKind::NotListening) => f.write_str("nothing listens"),
            RequestFault::NotConnected(_) => f.write_str("no connection"),
            RequestFault::NoAnswer(_) => f.write_str("no answer"),
            RequestFault::TooSlow => f.write_str("no answer in time"),
            RequestFault::Malformed => f.write_str("an answer that is no HTTP/1.1"),
            RequestFault::Cut => f.write_str("an answer that was cut off"),
            RequestFault::Status(status) => write!(f, "answered {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_that_of_its_backend_does_not_count_against_a_varnish() {
        let own = |fault: RequestFault| fault.counts_against(Role::Varnish);
        for fault in [
            RequestFault::NotConnected(FaultKind::NotListening),
            RequestFault::NoAnswer(FaultKind::Disconnects),
            RequestFault::Malformed,
        ] {
            assert!(own(fault), "{fault}");
        }
        for fault in [RequestFault::TooSlow, RequestFault::Cut] {
            assert!(!own(fault) && fault.counts_against(Role::Web), "{fault}");
        }
    }
}
