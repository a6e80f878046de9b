//! Failures of a request: which side is at fault, whether it may be retried, and the one table that turns them into
//! answers.

use std::io;
use std::sync::Arc;

use super::NoNode;
use crate::fleet::Node;
use crate::http1::{BadChunk, BadHead};
use crate::seal::StalePage;
use crate::telemetry::{FailureReason, RetryReason, UpstreamFault};

/// Why a request failed. The texts are for our log, not for the client.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the head of the request is refused: {0}")]
    BadHead(BadHead),
    /// The listener does not accept this method.
    #[error("the method is refused")]
    BadMethod,
    /// An internal path, hidden from clients.
    #[error("nothing is there")]
    NotFound,
    #[error("the body of the request is refused: {0}")]
    BadBody(BadChunk),
    #[error("the body of the request is longer than it may be")]
    BodyTooLarge,
    #[error("the request took too long to arrive")]
    ClientTimeout,
    #[error("the client went away: {0}")]
    ClientGone(io::Error),
    #[error("no node can take the request: {0:?}")]
    NoNode(NoNode),
    /// Nothing was sent.
    #[error("connecting failed: {0}")]
    Connect(io::Error),
    /// Nothing was sent, and the node is not to blame.
    #[error("this machine has no room for a connection: {0}")]
    NoPort(io::Error),
    /// Nothing was sent: no file for a connection to a node became free in time.
    #[error("no file for a connection")]
    NoFiles,
    /// The connection to the node failed before the first byte of an answer.
    #[error("no answer: {0}")]
    NoAnswer(io::Error),
    /// The node went down while its answer was awaited, and another one can take the request.
    #[error("the node went down while it was waited for")]
    NodeDown(Arc<Node>),
    /// A cache answered with a page that is older than a purge. Nobody has seen it.
    #[error("the answer is older than a purge: {:?}", .0.because)]
    Stale(Box<StalePage>),
    #[error("the answer took too long to begin")]
    NodeTimeout,
    #[error("the head of the answer is refused: {0}{limit}", limit = limit_of(*.0))]
    BadAnswer(BadHead),
    /// The node aborted its answer: the client must see a cut.
    #[error("the answer was cut off: {0}")]
    CutAnswer(io::Error),
    #[error("the body of the answer is refused: {0}")]
    BadAnswerBody(BadChunk),
}

/// The answer to a failure.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) reason: &'static str,
    pub(super) text: String,
}

impl Reply {
    /// The bytes of its body: one line.
    pub(super) fn body_len(&self, head_only: bool) -> u64 {
        if head_only { 0 } else { self.text.len() as u64 + 1 }
    }
}

impl Failure {
    /// The answer for a client that has seen none, which says what happened and nothing about the nodes. `None` if the
    /// client is gone.
    pub(super) fn reply(&self) -> Option<Reply> {
        let bad_request = |reason: &dyn std::fmt::Display| (400, "Bad Request", format!("bad request: {reason}"));
        let (status, reason, text) = match self {
            Failure::BadHead(reason @ (BadHead::TooLarge | BadHead::TooManyFields)) => {
                (431, "Request Header Fields Too Large", reason.to_string())
            }
            Failure::BadHead(reason) => bad_request(reason),
            Failure::BadBody(reason) => bad_request(reason),
            Failure::BodyTooLarge => (413, "Content Too Large", "the body of the request is too large".into()),
            Failure::BadMethod => (405, "Method Not Allowed", "this method is not allowed here".into()),
            Failure::NotFound => (404, "Not Found", "not found".into()),
            Failure::ClientTimeout => (408, "Request Timeout", "the request took too long to arrive".into()),
            Failure::NoNode(NoNode::AllBehind) | Failure::Stale(_) => {
                unavailable("every cache is being brought up to date")
            }
            Failure::NoNode(NoNode::Busy) | Failure::NoPort(_) | Failure::NoFiles => {
                unavailable("all servers are busy")
            }
            Failure::NoNode(NoNode::NoneUp) | Failure::NodeDown(_) => unavailable("no server is up"),
            Failure::NoAnswer(error) if error.kind() == io::ErrorKind::TimedOut => timed_out(),
            Failure::NodeTimeout => timed_out(),
            Failure::Connect(_)
            | Failure::NoAnswer(_)
            | Failure::BadAnswer(_)
            | Failure::CutAnswer(_)
            | Failure::BadAnswerBody(_) => (502, "Bad Gateway", "the server failed to answer".into()),
            Failure::ClientGone(_) => return None,
        };
        Some(Reply { status, reason, text })
    }

    /// Why the request may be retried on another node, as the label of `retries_total`; `None` if it may not.
    ///
    /// `untouched`: no byte of the body was read beyond what is still in memory. `repeatable`: no byte of the request was
    /// handed to the node, or its method is safe. Nothing was sent when a connection failed, so there the method is free.
    pub(super) fn retry_reason(&self, untouched: bool, repeatable: bool) -> Option<RetryReason> {
        match self {
            // Local ports are used up for one node at a time.
            Failure::Connect(_) | Failure::NoPort(_) if untouched => Some(RetryReason::Connect),
            Failure::NoAnswer(_) if untouched && repeatable => Some(RetryReason::NoAnswer),
            Failure::NodeDown(_) if untouched && repeatable => Some(RetryReason::NodeDown),
            _ => None,
        }
    }

    /// Why the request failed, as the label of `edge_failures_total` and in the access log.
    pub(super) fn reason(&self) -> FailureReason {
        let timed_out = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
        match self {
            Failure::BadHead(BadHead::TooLarge | BadHead::TooManyFields) => FailureReason::RequestHeadTooLarge,
            Failure::BadHead(_) => FailureReason::BadRequest,
            Failure::BadMethod => FailureReason::MethodRefused,
            Failure::NotFound => FailureReason::NotFound,
            Failure::BadBody(_) => FailureReason::BadRequestBody,
            Failure::BodyTooLarge => FailureReason::RequestBodyTooLarge,
            Failure::ClientTimeout => FailureReason::ClientTimeout,
            Failure::ClientGone(_) => FailureReason::ClientGone,
            Failure::NoNode(NoNode::NoneUp) => FailureReason::NoneUp,
            Failure::NoNode(NoNode::AllBehind) => FailureReason::AllBehind,
            Failure::NoNode(NoNode::Busy) => FailureReason::Busy,
            Failure::NoFiles => FailureReason::NoFiles,
            Failure::NoPort(_) => FailureReason::NoPort,
            Failure::Connect(_) => FailureReason::Connect,
            Failure::NoAnswer(error) if timed_out(error) => FailureReason::Timeout,
            Failure::NoAnswer(_) => FailureReason::NoAnswer,
            Failure::NodeDown(_) => FailureReason::NodeDown,
            Failure::NodeTimeout => FailureReason::Timeout,
            Failure::Stale(_) => FailureReason::Stale,
            Failure::BadAnswer(BadHead::TooLarge | BadHead::TooManyFields) => FailureReason::AnswerHeadTooLarge,
            Failure::BadAnswer(_) => FailureReason::BadAnswerHead,
            Failure::BadAnswerBody(_) => FailureReason::BadAnswerBody,
            Failure::CutAnswer(error) if timed_out(error) => FailureReason::Stalled,
            Failure::CutAnswer(_) => FailureReason::Cut,
        }
    }

    /// The node's fault, as the label of `upstream_failures_total`; `None` if the node is not at fault.
    pub(super) fn fault(&self) -> Option<UpstreamFault> {
        Some(match self {
            Failure::Connect(_) => UpstreamFault::Connect,
            // The keepalive probes on the connection got no reply.
            Failure::NoAnswer(error) if error.kind() == io::ErrorKind::TimedOut => UpstreamFault::Timeout,
            Failure::NoAnswer(_) => UpstreamFault::NoAnswer,
            Failure::NodeTimeout => UpstreamFault::Timeout,
            Failure::BadAnswer(BadHead::TooLarge | BadHead::TooManyFields) => UpstreamFault::HeadTooLarge,
            Failure::BadAnswer(_) => UpstreamFault::BadHead,
            Failure::BadAnswerBody(_) => UpstreamFault::BadBody,
            Failure::CutAnswer(error) if error.kind() == io::ErrorKind::TimedOut => UpstreamFault::Stalled,
            Failure::CutAnswer(_) => UpstreamFault::Cut,
            Failure::BadHead(_)
            | Failure::BadMethod
            | Failure::NotFound
            | Failure::BadBody(_)
            | Failure::BodyTooLarge
            | Failure::ClientTimeout
            | Failure::ClientGone(_)
            | Failure::NoPort(_)
            | Failure::NoFiles
            // Another node has taken the request.
            | Failure::NodeDown(_)
            // It is told, and asked again.
            | Failure::Stale(_)
            | Failure::NoNode(_) => return None,
        })
    }

    /// Whether the node is at fault. Clients that misbehave or leave are normal.
    pub(super) fn blames_node(&self) -> bool {
        self.fault().is_some()
    }
}

/// The setting that an answer exceeded.
fn limit_of(reason: BadHead) -> &'static str {
    match reason {
        BadHead::TooLarge => " (limits.max_answer_head)",
        BadHead::TooManyFields => " (limits.max_fields)",
        _ => "",
    }
}

fn timed_out() -> (u16, &'static str, String) {
    (504, "Gateway Timeout", "the server took too long to answer".into())
}

fn unavailable(text: &str) -> (u16, &'static str, String) {
    (503, "Service Unavailable", text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut() -> io::Error {
        io::ErrorKind::UnexpectedEof.into()
    }

    #[test]
    fn a_failed_connection_frees_every_method_whose_body_is_still_here() {
        assert_eq!(Failure::Connect(cut()).retry_reason(true, false), Some(RetryReason::Connect));
        assert_eq!(Failure::Connect(cut()).retry_reason(false, true), None);
        assert_eq!(Failure::NoPort(cut()).retry_reason(true, false), Some(RetryReason::Connect));
        assert_eq!(Failure::NoFiles.retry_reason(true, true), None);
    }

    #[test]
    fn only_what_may_be_repeated_is_repeated_after_it_was_sent() {
        assert_eq!(Failure::NoAnswer(cut()).retry_reason(true, true), Some(RetryReason::NoAnswer));
        assert_eq!(Failure::NoAnswer(cut()).retry_reason(true, false), None);
        assert_eq!(Failure::CutAnswer(cut()).retry_reason(true, true), None);
        assert_eq!(Failure::NodeTimeout.retry_reason(true, true), None);
    }

    #[test]
    fn who_has_seen_nothing_of_a_bad_answer_is_told_that_it_was_bad() {
        for failure in [Failure::CutAnswer(cut()), Failure::BadAnswerBody(BadChunk::Size), Failure::NoAnswer(cut())] {
            assert_eq!(failure.reply().unwrap().status, 502, "{failure}");
        }
        assert_eq!(Failure::ClientGone(cut()).reply(), None);
    }

    #[test]
    fn a_silent_node_timed_out_and_our_own_lack_of_resources_blames_no_node() {
        let silent = Failure::NoAnswer(io::ErrorKind::TimedOut.into());
        assert_eq!((silent.reply().unwrap().status, silent.fault()), (504, Some(UpstreamFault::Timeout)));
        assert_eq!(Failure::NoAnswer(cut()).fault(), Some(UpstreamFault::NoAnswer));
        for ours in [Failure::NoPort(cut()), Failure::NoFiles] {
            assert_eq!((ours.reply().unwrap().status, ours.fault()), (503, None));
        }
    }
}
