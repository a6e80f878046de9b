//! What is noted of a request on its way, for its line in the access log and for the metrics: how far it came, what took how
//! long, and who ended it.
//!
//! A byte or a number each, noted where it happens. What costs more, the time at which a head arrived and the id of the
//! request, is only noted if there is an access log.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::failure::Failure;
use super::frontend::NoNode;
use super::gate::GateRefusal;
use super::span_notes::RequestSpans;
use crate::fleet::Node;
use crate::telemetry::FailureReason;

/// How far a request has come: the second letter of its termination code, as in HAProxy's log (its manual, section 8.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RequestPhase {
    /// It is read.
    #[default]
    Request,
    /// It waits for a node with room, or for a file for a connection to it.
    Queue,
    /// A connection to the node is opened.
    Connect,
    /// The node has it, and has not begun to answer.
    Headers,
    /// The answer is relayed.
    Data,
    /// The node has finished, and the client takes the rest.
    Last,
}

impl RequestPhase {
    fn letter(self) -> u8 {
        match self {
            RequestPhase::Request => b'R',
            RequestPhase::Queue => b'Q',
            RequestPhase::Connect => b'C',
            RequestPhase::Headers => b'H',
            RequestPhase::Data => b'D',
            RequestPhase::Last => b'L',
        }
    }
}

/// What is noted of a request on its way.
#[derive(Debug, Default)]
pub(super) struct Trace {
    pub(super) phase: RequestPhase,
    /// Its head was read and is valid.
    pub(super) has_head: bool,
    /// It is one of clearcoat's own, or of its VCL: the page of a trial, or a probe.
    pub(super) is_own: bool,
    /// Attempts at nodes.
    pub(super) tries: u32,
    /// When the last of them began; `None`: when the request did.
    pub(super) tried: Option<Instant>,
    /// How long it waited for nodes with room, in all.
    pub(super) queued: Duration,
    /// How long the last attempt waited for a file for a connection.
    pub(super) waited: Duration,
    /// How long its connection took; zero for one that was kept.
    pub(super) connected: Duration,
    /// When the head of the answer was complete, if there is an access log.
    pub(super) answered: Option<Instant>,
    /// Bytes of the answer written to the client, and how many of them are its head.
    pub(super) sent: u64,
    pub(super) head_sent: u64,
    /// Bytes of the request's body that were read.
    pub(super) body_read: u64,
    /// Why it failed, and the code for that.
    failure: Option<(FailureReason, [u8; 2])>,
    /// The value of `X-Request-ID`; empty if there is no access log.
    pub(super) id: Vec<u8>,
    /// What its spans need; `None` if there are no traces.
    pub(super) spans: Option<Box<RequestSpans>>,
}

impl Trace {
    /// Forgets the last request.
    pub(super) fn reset(&mut self) {
        let mut id = std::mem::take(&mut self.id);
        id.clear();
        *self = Trace { id, ..Trace::default() };
    }

    /// An attempt at this node begins.
    pub(super) fn begin_try(&mut self, node: &Arc<Node>) {
        self.tried = (self.tries > 0 || !self.queued.is_zero()).then(Instant::now);
        self.tries += 1;
        self.phase = RequestPhase::Connect;
        (self.waited, self.connected) = (Duration::ZERO, Duration::ZERO);
        if let Some(spans) = &mut self.spans {
            spans.begin_try(node);
        }
    }

    /// The last attempt failed.
    pub(super) fn fail_try(&mut self, failure: &Failure) {
        if let Some(spans) = &mut self.spans {
            spans.fail_try(failure);
        }
    }

    /// What the node is told of the trace; empty if there are no traces.
    pub(super) fn traceparent(&self) -> &[u8] {
        self.spans.as_ref().map_or(b"", |spans| spans.traceparent())
    }

    /// The request ends with this failure.
    pub(super) fn fail(&mut self, failure: &Failure) {
        self.failure = Some((failure.reason(), termination(failure, self.phase)));
    }

    /// Why it failed.
    pub(super) fn reason(&self) -> Option<FailureReason> {
        self.failure.map(|(reason, _)| reason)
    }

    /// Who ended the request, and in which phase: two letters.
    pub(super) fn termination(&self) -> [u8; 2] {
        self.failure.map_or(*b"--", |(_, code)| code)
    }
}

/// The code of a failure that happened at this point. `docs/logging.md` has the table.
fn termination(failure: &Failure, phase: RequestPhase) -> [u8; 2] {
    let timed_out = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
    let by = |late: bool, late_letter, letter| if late { late_letter } else { letter };
    let phase = phase.letter();
    match failure {
        // Answered here, as the configuration says.
        Failure::Refused(GateRefusal::PlainHttp | GateRefusal::Maintenance { .. }) => *b"LR",
        Failure::BadHead(_)
        | Failure::BadMethod
        | Failure::PurgeMethod
        | Failure::Leaving
        | Failure::NotFound
        | Failure::Refused(_)
        | Failure::BadBody(_)
        | Failure::BodyTooLarge => *b"PR",
        Failure::ClientTimeout => [b'c', phase],
        Failure::ClientGone(error) => [by(timed_out(error), b'c', b'C'), phase],
        Failure::NoNode(NoNode::NoneUp) => *b"SC",
        Failure::NoNode(NoNode::AllBehind) => *b"PC",
        Failure::NoNode(NoNode::Busy) | Failure::QueueFull { .. } | Failure::NoFiles => *b"RQ",
        Failure::QueueTimeout { .. } => *b"sQ",
        Failure::NoPort(_) => *b"RC",
        Failure::Connect(error) => [by(timed_out(error), b's', b'S'), b'C'],
        Failure::NoAnswer(error) => [by(timed_out(error), b's', b'S'), b'H'],
        Failure::NodeDown(_) => *b"SH",
        Failure::NodeTimeout => *b"sH",
        Failure::BadAnswer(_) | Failure::Stale(_) => *b"PH",
        Failure::CutAnswer(error) => [by(timed_out(error), b's', b'S'), b'D'],
        Failure::BadAnswerBody(_) | Failure::GuardCut | Failure::IdleTunnel => *b"PD",
        Failure::DeadlineExceeded => [b'P', phase],
    }
}
