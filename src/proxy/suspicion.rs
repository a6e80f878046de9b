//! What the answers and failures of nodes say about them, for their ejection ([`crate::fleet::Ejections`]).
//!
//! What is ours says nothing: no file, no port, no memory, a limit of ours that an answer exceeds, a purge that cut it. Neither
//! does a client that leaves, nor a kept connection that the node closed, as it may. A status from 500 on that is not configured
//! as a failure says nothing either: it does not show that the node works.

use std::io;

use rustix::io::Errno;

use super::failure::Failure;
use super::worker::Worker;
use crate::files::is_ours;
use crate::fleet::{FaultKind, Node, RequestFault, Suspicion};
use crate::http1::BadHead;

/// Notes a complete answer with this status.
pub(super) fn note_answer(worker: &Worker, node: &Node, status: u16) {
    if status < 500 {
        node.live.failures.record_success();
    } else if worker.failing(node.spec.role()).contains(status) {
        tell(worker, node, RequestFault::Status(status), true);
    }
}

/// Notes a failure that is the node's fault. `reused`: on a connection that the node may have closed before.
pub(super) fn note_failure(worker: &Worker, node: &Node, failure: &Failure, reused: bool) {
    if let Some(fault) = fault_of(failure) {
        let was_closed =
            reused && matches!(failure, Failure::NoAnswer(error) if error.kind() != io::ErrorKind::TimedOut);
        if !was_closed {
            tell(worker, node, fault, fault.counts_against(node.spec.role()));
        }
    }
}

fn tell(worker: &Worker, node: &Node, fault: RequestFault, counts: bool) {
    let now_ms = worker.latency_time(std::time::Instant::now());
    let streak = counts.then(|| node.live.failures.record_failure(now_ms));
    let (node, endpoint_id) = ((node.spec.role(), node.id().clone()), node.endpoint_id);
    // A full queue means that the keeper has heard enough.
    _ = worker.shared.suspects.try_send(Suspicion { node, endpoint_id, fault, streak });
}

/// What of a failure is the node's.
fn fault_of(failure: &Failure) -> Option<RequestFault> {
    Some(match failure {
        // The system's own routes say that; the checks go on to tell.
        Failure::Connect(error) if Errno::from_io_error(error) == Some(Errno::NETUNREACH) => return None,
        Failure::Connect(error) | Failure::NoAnswer(error) | Failure::CutAnswer(error) if is_ours(error) => {
            return None;
        }
        Failure::Connect(error) => RequestFault::NotConnected(FaultKind::of_connection(error)),
        Failure::NoAnswer(error) => RequestFault::NoAnswer(FaultKind::of_connection(error)),
        Failure::NodeTimeout => RequestFault::TooSlow,
        Failure::CutAnswer(error) if error.kind() == io::ErrorKind::TimedOut => RequestFault::TooSlow,
        Failure::CutAnswer(_) => RequestFault::Cut,
        Failure::BadAnswer(BadHead::TooLarge | BadHead::TooManyFields) => return None,
        Failure::BadAnswer(_) | Failure::BadAnswerBody(_) => RequestFault::Malformed,
        Failure::BadHead(_)
        | Failure::BadMethod
        | Failure::PurgeMethod
        | Failure::Leaving
        | Failure::Refused(_)
        | Failure::NotFound
        | Failure::BadBody(_)
        | Failure::BodyTooLarge
        | Failure::ClientTimeout
        | Failure::ClientGone(_)
        | Failure::NoNode(_)
        | Failure::QueueFull { .. }
        | Failure::QueueTimeout { .. }
        | Failure::NoPort(_)
        | Failure::NoFiles
        | Failure::NodeDown(_)
        | Failure::Stale(_)
        | Failure::GuardCut
        | Failure::IdleTunnel
        | Failure::DeadlineExceeded => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_or_the_clients_is_no_fault_of_a_node() {
        let error = |errno: Errno| io::Error::from(errno);
        for ours in [Errno::MFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL, Errno::ACCESS] {
            assert_eq!(fault_of(&Failure::Connect(error(ours))), None, "{ours:?}");
            assert_eq!(fault_of(&Failure::NoAnswer(error(ours))), None, "{ours:?}");
        }
        assert_eq!(fault_of(&Failure::Connect(error(Errno::NETUNREACH))), None);
        for failure in [
            Failure::ClientGone(error(Errno::CONNRESET)),
            Failure::ClientTimeout,
            Failure::GuardCut,
            Failure::DeadlineExceeded,
            Failure::NoFiles,
            Failure::BadAnswer(BadHead::TooLarge),
        ] {
            assert_eq!(fault_of(&failure), None, "{failure}");
        }
    }

    #[test]
    fn each_fault_of_a_node_has_its_name() {
        let error = |errno: Errno| io::Error::from(errno);
        for (failure, expected) in [
            (Failure::Connect(error(Errno::CONNREFUSED)), RequestFault::NotConnected(FaultKind::NotListening)),
            (Failure::Connect(io::ErrorKind::TimedOut.into()), RequestFault::NotConnected(FaultKind::Silent)),
            (Failure::NoAnswer(error(Errno::CONNRESET)), RequestFault::NoAnswer(FaultKind::Disconnects)),
            (Failure::NodeTimeout, RequestFault::TooSlow),
            (Failure::CutAnswer(io::ErrorKind::TimedOut.into()), RequestFault::TooSlow),
            (Failure::CutAnswer(error(Errno::CONNRESET)), RequestFault::Cut),
            (Failure::BadAnswer(BadHead::Status), RequestFault::Malformed),
        ] {
            assert_eq!(fault_of(&failure), Some(expected), "{failure}");
        }
    }
}
