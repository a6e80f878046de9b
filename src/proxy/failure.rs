//! Failures of a request: which side is at fault, whether it may be retried, and the one table that turns them into
//! answers.

use std::borrow::Cow;
use std::io;

use super::NoNode;
use super::deadline::Interrupt;
use super::gate::GateRefusal;
use super::node_permit::NodePermit;
use hyper::body::Bytes;

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
    /// The same, of a method that purges: the sender is at the wrong listener.
    #[error("purges are not taken here")]
    PurgeMethod,
    /// A Varnish asks whether this clearcoat is there, which is about to end. It is counted nowhere.
    #[error("this clearcoat is about to end")]
    Leaving,
    /// An internal path, hidden from clients.
    #[error("nothing is there")]
    NotFound,
    /// A rule of the edge does not let it in.
    #[error("refused: {0}")]
    Refused(GateRefusal),
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
    /// As many requests wait for a node with room as may.
    #[error("every node is at its limit of requests, and the queue is full (max_queue)")]
    QueueFull {
        /// When to come again, in seconds.
        retry_after: u32,
    },
    #[error("every node was at its limit of requests for too long (queue_timeout)")]
    QueueTimeout {
        /// When to come again, in seconds.
        retry_after: u32,
    },
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
    /// The node went down while its answer was awaited, and the request has a place at another one.
    #[error("the node went down while it was waited for")]
    NodeDown(Box<NodePermit>),
    /// A cache answered with a page that is older than a purge. Nobody has seen it.
    #[error("the answer is older than a purge: {:?}", .0.because)]
    Stale(Box<StalePage>),
    #[error("the answer took too long to begin")]
    NodeTimeout,
    /// Nobody is to blame: both sides and all tries had their part in it.
    #[error("the request took longer than timeouts.request")]
    DeadlineExceeded,
    #[error("the head of the answer is refused: {0}{limit}", limit = limit_of(*.0))]
    BadAnswer(BadHead),
    /// The node aborted its answer: the client must see a cut.
    #[error("the answer was cut off: {0}")]
    CutAnswer(io::Error),
    #[error("the body of the answer is refused: {0}")]
    BadAnswerBody(BadChunk),
    /// The guard cut an answer to a cache that did not end, since a purge waited for it.
    #[error("an endless answer delayed a purge, and was cut")]
    GuardCut,
    /// Nobody is to blame: neither side of a tunnel had anything to say.
    #[error("nothing moved through the tunnel for too long")]
    IdleTunnel,
}

/// The answer to a failure.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) reason: &'static str,
    pub(super) text: Cow<'static, str>,
    /// When to come again, in seconds.
    pub(super) retry_after: Option<u32>,
}

impl Reply {
    /// Its body: one line.
    pub(super) fn body(&self) -> Bytes {
        Bytes::from(format!("{}\n", self.text))
    }
}

impl Failure {
    /// A wait was interrupted. `late`: what it means that whoever was awaited was too slow.
    pub(super) fn interrupted(interrupt: Interrupt, late: Failure) -> Self {
        if interrupt == Interrupt::Overdue { Failure::DeadlineExceeded } else { late }
    }

    /// The status and reason of the answer for a client that has seen none. `None` if there is no such client: it is gone, or an
    /// answer has always begun before this failure.
    pub(super) fn status(&self) -> Option<(u16, &'static str)> {
        Some(match self {
            Failure::BadHead(BadHead::TooLarge | BadHead::TooManyFields) => (431, "Request Header Fields Too Large"),
            Failure::BadHead(_) | Failure::BadBody(_) => (400, "Bad Request"),
            Failure::BodyTooLarge => (413, "Content Too Large"),
            Failure::BadMethod | Failure::PurgeMethod => (405, "Method Not Allowed"),
            Failure::NotFound => (404, "Not Found"),
            Failure::Refused(GateRefusal::Blocked) => (403, "Forbidden"),
            Failure::Refused(GateRefusal::UnknownHost) => (421, "Misdirected Request"),
            Failure::Refused(GateRefusal::PlainHttp) => (308, "Permanent Redirect"),
            Failure::Refused(GateRefusal::Maintenance { .. }) => (503, "Service Unavailable"),
            Failure::Refused(GateRefusal::ClientRate { .. } | GateRefusal::TotalRate { .. }) => {
                (429, "Too Many Requests")
            }
            Failure::ClientTimeout => (408, "Request Timeout"),
            Failure::NoNode(_)
            | Failure::QueueFull { .. }
            | Failure::QueueTimeout { .. }
            | Failure::Stale(_)
            | Failure::NoPort(_)
            | Failure::NoFiles
            | Failure::NodeDown(_)
            | Failure::Leaving => (503, "Service Unavailable"),
            Failure::NoAnswer(error) if error.kind() == io::ErrorKind::TimedOut => (504, "Gateway Timeout"),
            Failure::NodeTimeout | Failure::DeadlineExceeded => (504, "Gateway Timeout"),
            Failure::Connect(_)
            | Failure::NoAnswer(_)
            | Failure::BadAnswer(_)
            | Failure::CutAnswer(_)
            | Failure::BadAnswerBody(_) => (502, "Bad Gateway"),
            Failure::ClientGone(_) | Failure::GuardCut | Failure::IdleTunnel => return None,
        })
    }

    /// The answer with that status, which says what happened and nothing about the nodes.
    pub(super) fn reply(&self) -> Option<Reply> {
        let (status, reason) = self.status()?;
        let bad_request = |reason: &dyn std::fmt::Display| Cow::Owned(format!("bad request: {reason}"));
        let text = match (self, status) {
            (Failure::BadHead(reason), 431) => Cow::Owned(reason.to_string()),
            (Failure::BadHead(reason), _) => bad_request(reason),
            (Failure::BadBody(reason), _) => bad_request(reason),
            (Failure::BodyTooLarge, _) => "the body of the request is too large".into(),
            (Failure::BadMethod, _) => "this method is not allowed here".into(),
            (Failure::PurgeMethod, _) => {
                "purges go to clearcoat's purge listener (purge.listen, port 6081); this listener is for pages".into()
            }
            (Failure::Leaving, _) => "this clearcoat is about to end: ask another one".into(),
            (Failure::NotFound, _) => "not found".into(),
            (Failure::Refused(GateRefusal::Blocked), _) => "forbidden".into(),
            (Failure::Refused(GateRefusal::UnknownHost), _) => "this server does not answer for this host".into(),
            (Failure::Refused(GateRefusal::PlainHttp), _) => "this page is there by https".into(),
            (Failure::Refused(GateRefusal::Maintenance { .. }), _) => "closed for maintenance, come again soon".into(),
            (Failure::Refused(GateRefusal::ClientRate { .. } | GateRefusal::TotalRate { .. }), _) => {
                "too many requests".into()
            }
            (Failure::ClientTimeout, _) => "the request took too long to arrive".into(),
            (Failure::NoNode(NoNode::AllBehind) | Failure::Stale(_), _) => {
                "every cache is being brought up to date".into()
            }
            (
                Failure::NoNode(NoNode::Busy)
                | Failure::QueueFull { .. }
                | Failure::QueueTimeout { .. }
                | Failure::NoPort(_)
                | Failure::NoFiles,
                _,
            ) => "all servers are busy".into(),
            (Failure::NoNode(NoNode::NoneUp) | Failure::NodeDown(_), _) => "no server is up".into(),
            (Failure::DeadlineExceeded, _) => "the request took too long".into(),
            (_, 504) => "the server took too long to answer".into(),
            _ => "the server failed to answer".into(),
        };
        let retry_after = match (self, status) {
            (
                &Failure::Refused(
                    GateRefusal::Maintenance { retry_after }
                    | GateRefusal::ClientRate { retry_after }
                    | GateRefusal::TotalRate { retry_after },
                ),
                _,
            ) => Some(retry_after),
            (&(Failure::QueueFull { retry_after } | Failure::QueueTimeout { retry_after }), _) => Some(retry_after),
            (_, 503) => Some(1),
            _ => None,
        };
        Some(Reply { status, reason, text, retry_after })
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
            Failure::BadMethod | Failure::PurgeMethod | Failure::Leaving => FailureReason::MethodRefused,
            Failure::NotFound => FailureReason::NotFound,
            Failure::Refused(GateRefusal::Blocked) => FailureReason::Blocked,
            Failure::Refused(GateRefusal::UnknownHost) => FailureReason::UnknownHost,
            Failure::Refused(GateRefusal::PlainHttp) => FailureReason::PlainHttp,
            Failure::Refused(GateRefusal::Maintenance { .. }) => FailureReason::Maintenance,
            Failure::Refused(GateRefusal::ClientRate { .. }) => FailureReason::ClientRate,
            Failure::Refused(GateRefusal::TotalRate { .. }) => FailureReason::TotalRate,
            Failure::BadBody(_) => FailureReason::BadRequestBody,
            Failure::BodyTooLarge => FailureReason::RequestBodyTooLarge,
            Failure::ClientTimeout => FailureReason::ClientTimeout,
            Failure::ClientGone(_) => FailureReason::ClientGone,
            // A node that goes down while it is awaited is another one's turn: nobody is told.
            Failure::NoNode(NoNode::NoneUp) | Failure::NodeDown(_) => FailureReason::NoneUp,
            Failure::NoNode(NoNode::AllBehind) => FailureReason::AllBehind,
            Failure::NoNode(NoNode::Busy) | Failure::QueueFull { .. } => FailureReason::QueueFull,
            Failure::QueueTimeout { .. } => FailureReason::QueueTimeout,
            Failure::NoFiles => FailureReason::NoFiles,
            Failure::NoPort(_) => FailureReason::NoPort,
            Failure::Connect(_) => FailureReason::Connect,
            Failure::NoAnswer(error) if timed_out(error) => FailureReason::Timeout,
            Failure::NoAnswer(_) => FailureReason::NoAnswer,
            Failure::NodeTimeout => FailureReason::Timeout,
            Failure::Stale(_) => FailureReason::Stale,
            Failure::BadAnswer(BadHead::TooLarge | BadHead::TooManyFields) => FailureReason::AnswerHeadTooLarge,
            Failure::BadAnswer(_) => FailureReason::BadAnswerHead,
            Failure::BadAnswerBody(_) => FailureReason::BadAnswerBody,
            Failure::CutAnswer(error) if timed_out(error) => FailureReason::Stalled,
            Failure::CutAnswer(_) => FailureReason::Cut,
            Failure::GuardCut => FailureReason::GuardCut,
            Failure::IdleTunnel => FailureReason::IdleTunnel,
            Failure::DeadlineExceeded => FailureReason::DeadlineExceeded,
        }
    }

    /// The node's fault, as the label of `upstream_failures_total`; `None` if the node is not at fault.
    pub(super) fn fault(&self) -> Option<UpstreamFault> {
        Some(match self.reason() {
            FailureReason::Connect => UpstreamFault::Connect,
            FailureReason::NoAnswer => UpstreamFault::NoAnswer,
            // Also where the keepalive probes on the connection got no reply.
            FailureReason::Timeout => UpstreamFault::Timeout,
            FailureReason::AnswerHeadTooLarge => UpstreamFault::HeadTooLarge,
            FailureReason::BadAnswerHead => UpstreamFault::BadHead,
            FailureReason::BadAnswerBody => UpstreamFault::BadBody,
            FailureReason::Cut => UpstreamFault::Cut,
            FailureReason::Stalled => UpstreamFault::Stalled,
            FailureReason::BadRequest
            | FailureReason::RequestHeadTooLarge
            | FailureReason::MethodRefused
            | FailureReason::NotFound
            | FailureReason::Blocked
            | FailureReason::UnknownHost
            | FailureReason::PlainHttp
            | FailureReason::Maintenance
            | FailureReason::ClientRate
            | FailureReason::TotalRate
            | FailureReason::BadRequestBody
            | FailureReason::RequestBodyTooLarge
            | FailureReason::ClientTimeout
            | FailureReason::ClientGone
            | FailureReason::NoneUp
            | FailureReason::AllBehind
            | FailureReason::QueueFull
            | FailureReason::QueueTimeout
            | FailureReason::NoFiles
            | FailureReason::NoPort
            // It is told, and asked again.
            | FailureReason::Stale
            // It is clearcoat that ended them.
            | FailureReason::GuardCut
            | FailureReason::IdleTunnel
            | FailureReason::DeadlineExceeded => return None,
        })
    }

    /// Whether the configuration asked for this answer: nothing is wrong.
    pub(super) fn is_ordered(&self) -> bool {
        matches!(self, Failure::Refused(_))
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
    fn who_found_no_room_is_told_when_to_come_again_and_no_node_is_blamed() {
        for full in [Failure::QueueFull { retry_after: 7 }, Failure::QueueTimeout { retry_after: 7 }] {
            let reply = full.reply().unwrap();
            assert_eq!(
                (reply.status, reply.retry_after, &*reply.text),
                (503, Some(7), "all servers are busy"),
                "{full}"
            );
            assert!(!full.blames_node() && full.retry_reason(true, true).is_none(), "{full}");
        }
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
    fn what_clearcoat_ends_itself_blames_no_node() {
        for failure in [Failure::GuardCut, Failure::IdleTunnel] {
            assert!(!failure.blames_node() && failure.reply().is_none(), "{failure}");
        }
        let exceeded = Failure::DeadlineExceeded;
        assert!(!exceeded.blames_node() && exceeded.retry_reason(true, true).is_none());
        assert_eq!(exceeded.status().map(|(status, _)| status), Some(504));
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
