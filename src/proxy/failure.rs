//! What can go wrong with a request: whose fault it is, whether it may be tried again, and the one table that turns
//! it into an answer.

use std::io;

use super::{NoNode, Refused};
use crate::http1::{BadChunk, BadHead};

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The client sent a head that is refused.
    BadHead(BadHead),
    /// The listener refuses the request.
    Refused(Refused),
    /// The client sent a body whose frame is malformed.
    BadBody(BadChunk),
    /// The client did not send what it announced in time.
    ClientTimeout,
    /// The client went away.
    ClientGone(io::Error),
    /// No node can take it.
    NoNode(NoNode),
    /// No connection to the node; nothing was sent.
    Connect(io::Error),
    /// The connection to the node ended before a byte of an answer.
    NoAnswer(io::Error),
    /// The node went down while it was waited for.
    NodeDown,
    /// The node did not begin to answer in time.
    NodeTimeout,
    /// The node sent a head that is refused.
    BadAnswer(BadHead),
    /// The node broke off in mid-answer: the client must see a cut.
    CutAnswer(io::Error),
    /// The node sent a body whose frame is malformed.
    BadAnswerBody(BadChunk),
}

/// How a failure is answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) reason: &'static str,
    pub(super) text: String,
}

impl Failure {
    /// The table of answers. `None` where there is nobody to answer, or where an answer has begun already.
    pub(super) fn reply(&self) -> Option<Reply> {
        let (status, reason, text) = match self {
            Failure::BadHead(BadHead::TooLarge | BadHead::TooManyFields) => {
                (431, "Request Header Fields Too Large", self.text())
            }
            Failure::BadHead(_) | Failure::Refused(Refused::Head(_)) | Failure::BadBody(_) => {
                (400, "Bad Request", self.text())
            }
            Failure::Refused(Refused::Method) => (405, "Method Not Allowed", self.text()),
            Failure::ClientTimeout => (408, "Request Timeout", self.text()),
            Failure::NoNode(_) | Failure::NodeDown => (503, "Service Unavailable", self.text()),
            Failure::Connect(_) | Failure::NoAnswer(_) | Failure::BadAnswer(_) => (502, "Bad Gateway", self.text()),
            Failure::NodeTimeout => (504, "Gateway Timeout", self.text()),
            Failure::ClientGone(_) | Failure::CutAnswer(_) | Failure::BadAnswerBody(_) => return None,
        };
        Some(Reply { status, reason, text })
    }

    /// What the client is told: what happened, and nothing about who is behind us.
    fn text(&self) -> String {
        match self {
            Failure::BadHead(reason) | Failure::Refused(Refused::Head(reason)) => format!("bad request: {reason}"),
            Failure::BadBody(reason) => format!("bad request: {reason}"),
            Failure::Refused(Refused::Method) => "this method is not allowed here".into(),
            Failure::ClientTimeout => "the request took too long to arrive".into(),
            Failure::NoNode(NoNode::NoneUp) | Failure::NodeDown => "no server is up".into(),
            Failure::NoNode(NoNode::AllBehind) => "every cache is being brought up to date".into(),
            Failure::NoNode(NoNode::Busy) => "all servers are busy".into(),
            Failure::NodeTimeout => "the server took too long to answer".into(),
            Failure::Connect(_) | Failure::NoAnswer(_) | Failure::BadAnswer(_) => "the server failed to answer".into(),
            Failure::ClientGone(_) | Failure::CutAnswer(_) | Failure::BadAnswerBody(_) => String::new(),
        }
    }

    /// Why the request may be tried on another node, as the label of `retries_total`; `None` where it may not.
    ///
    /// `untouched`: no byte of the body was read beyond what is still in memory. `idempotent`: repeating what may
    /// have been carried out does no harm. Nothing was sent when a connection failed, so there the method is free.
    pub(super) fn retry_reason(&self, untouched: bool, idempotent: bool) -> Option<&'static str> {
        match self {
            Failure::Connect(_) if untouched => Some("connect"),
            Failure::NoAnswer(_) if untouched && idempotent => Some("no_answer"),
            Failure::NodeDown if untouched && idempotent => Some("node_down"),
            _ => None,
        }
    }

    /// Whether the node is to blame, and with what, for the log. Clients that misbehave or leave are everyday life.
    pub(super) fn blames_node(&self) -> Option<String> {
        match self {
            Failure::Connect(error) => Some(format!("connecting failed: {error}")),
            Failure::NoAnswer(error) => Some(format!("no answer: {error}")),
            Failure::NodeDown => Some("the node went down while it was waited for".into()),
            Failure::NodeTimeout => Some("the answer took too long".into()),
            Failure::BadAnswer(reason) => Some(format!("the head of the answer is refused: {reason}")),
            Failure::CutAnswer(error) => Some(format!("the answer was cut off: {error}")),
            Failure::BadAnswerBody(reason) => Some(format!("the body of the answer is refused: {reason}")),
            Failure::BadHead(_)
            | Failure::Refused(_)
            | Failure::BadBody(_)
            | Failure::ClientTimeout
            | Failure::ClientGone(_)
            | Failure::NoNode(_) => None,
        }
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
        assert_eq!(Failure::Connect(cut()).retry_reason(true, false), Some("connect"));
        assert_eq!(Failure::Connect(cut()).retry_reason(false, true), None);
    }

    #[test]
    fn only_what_may_be_repeated_is_repeated_after_it_was_sent() {
        assert_eq!(Failure::NoAnswer(cut()).retry_reason(true, true), Some("no_answer"));
        assert_eq!(Failure::NoAnswer(cut()).retry_reason(true, false), None);
        assert_eq!(Failure::CutAnswer(cut()).retry_reason(true, true), None);
        assert_eq!(Failure::NodeTimeout.retry_reason(true, true), None);
    }

    #[test]
    fn a_cut_answer_gets_no_second_one() {
        assert_eq!(Failure::CutAnswer(cut()).reply(), None);
        assert_eq!(Failure::NoAnswer(cut()).reply().unwrap().status, 502);
    }
}
