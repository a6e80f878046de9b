//! What the access log says of a request: how far it came, what took how long, and who ended it.
//!
//! The facts are noted in the [`Trace`] of the request where they happen: a byte or a number each. What costs more, the
//! time at which a head arrived and the id of the request, is only noted if there is an access log. The line is made once,
//! at the end.

use std::io;
use std::io::Write as _;
use std::time::{Duration, Instant};

use super::cache_result::cache_result;
use super::client::Client;
use super::failure::Failure;
use super::frontend::NoNode;
use super::request::Request;
use crate::fleet::{Node, Role};
use crate::http1::Version;
use crate::telemetry::access::{AccessLine, RequestLine};
use crate::telemetry::{CacheResult, FailureReason};

/// How far a request has come: the second letter of its termination code, as in HAProxy's log (its manual, section 8.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Progress {
    /// It is read.
    #[default]
    Request,
    /// It waits for a node, or for room for a connection to it.
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

impl Progress {
    fn letter(self) -> u8 {
        match self {
            Progress::Request => b'R',
            Progress::Queue => b'Q',
            Progress::Connect => b'C',
            Progress::Headers => b'H',
            Progress::Data => b'D',
            Progress::Last => b'L',
        }
    }
}

/// What is noted of a request on its way.
#[derive(Debug, Default)]
pub(super) struct Trace {
    pub(super) progress: Progress,
    /// Its head was read and is valid.
    pub(super) has_head: bool,
    /// It is one of clearcoat's own, or of its VCL: the page of a trial, or a probe.
    pub(super) is_own: bool,
    /// Attempts at nodes.
    pub(super) tries: u32,
    /// When the last of them began; `None`: when the request did.
    pub(super) tried: Option<Instant>,
    /// How long that one waited for room for a connection.
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
}

impl Trace {
    /// Forgets the last request.
    pub(super) fn reset(&mut self) {
        let mut id = std::mem::take(&mut self.id);
        id.clear();
        *self = Trace { id, ..Trace::default() };
    }

    /// An attempt at a node begins.
    pub(super) fn begin_try(&mut self) {
        self.tried = (self.tries > 0).then(Instant::now);
        self.tries += 1;
        self.progress = Progress::Connect;
        (self.waited, self.connected) = (Duration::ZERO, Duration::ZERO);
    }

    /// The request ends with this failure.
    pub(super) fn fail(&mut self, failure: &Failure) {
        self.failure = Some((failure.reason(), termination(failure, self.progress)));
    }

    /// Why it failed.
    pub(super) fn reason(&self) -> Option<FailureReason> {
        self.failure.map(|(reason, _)| reason)
    }

    /// Who ended the request, and in which phase: two letters.
    fn termination(&self) -> [u8; 2] {
        self.failure.map_or(*b"--", |(_, code)| code)
    }
}

/// The code of a failure that happened at this point. `docs/logging.md` has the table.
fn termination(failure: &Failure, progress: Progress) -> [u8; 2] {
    let timed_out = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
    let by = |late: bool, late_letter, letter| if late { late_letter } else { letter };
    let phase = progress.letter();
    match failure {
        Failure::BadHead(_) | Failure::BadMethod | Failure::NotFound | Failure::BadBody(_) | Failure::BodyTooLarge => {
            *b"PR"
        }
        Failure::ClientTimeout => [b'c', phase],
        Failure::ClientGone(error) => [by(timed_out(error), b'c', b'C'), phase],
        Failure::NoNode(NoNode::NoneUp) => *b"SC",
        Failure::NoNode(NoNode::AllBehind) | Failure::Stale(_) => *b"PC",
        Failure::NoNode(NoNode::Busy) | Failure::NoFiles => *b"RQ",
        Failure::NoPort(_) => *b"RC",
        Failure::Connect(error) => [by(timed_out(error), b's', b'S'), b'C'],
        Failure::NoAnswer(error) => [by(timed_out(error), b's', b'S'), b'H'],
        Failure::NodeDown(_) => *b"SH",
        Failure::NodeTimeout => *b"sH",
        Failure::BadAnswer(_) => *b"PH",
        Failure::CutAnswer(error) => [by(timed_out(error), b's', b'S'), b'D'],
        Failure::BadAnswerBody(_) => *b"PD",
    }
}

/// Gives the request its id, if there is an access log: a trusted proxy's, which is how it is found in the logs of both,
/// or a new one. A client's own would let strangers choose what is looked for.
pub(super) fn name(client: &Client, request: &mut Request) {
    if client.worker.access.is_none() || !request.trace.id.is_empty() {
        return;
    }
    let Request { head, trace, id, .. } = request;
    if client.trusted && trace.has_head {
        head.copy_request_id(&mut trace.id);
    }
    if trace.id.is_empty() {
        // Writing to memory does not fail.
        _ = write!(trace.id, "{id}");
    }
    if trace.has_head {
        head.drop_request_id();
    }
}

/// Writes the line of a request that has ended. `node` answered it, or failed last.
pub(super) fn write_line(client: &Client, request: &mut Request, node: Option<&Node>, total: Duration) {
    let Some(access) = &client.worker.access else { return };
    name(client, request);
    let Request { head, trace, response, status, began, .. } = &*request;
    let status = status.unwrap_or(499);
    let termination = trace.termination();
    let is_failed = status >= 500 || termination != *b"--";
    if !is_failed && !access.log().is_sampled(&trace.id) {
        return;
    }
    let has_node = trace.tries > 0;
    let has_answer = trace.progress >= Progress::Data;
    let turned_to = trace.tried.map_or(Duration::ZERO, |tried| tried.saturating_duration_since(*began)) + trace.waited;
    let first_byte = trace.answered.map(|answered| {
        answered.saturating_duration_since(*began).saturating_sub(turned_to).saturating_sub(trace.connected)
    });
    let is_cache = has_answer && node.is_some_and(|node| node.spec.role() == Role::Varnish);
    access.write(&AccessLine {
        listener: match client.frontend.role {
            Role::Varnish => "edge",
            Role::Web => "origin",
        },
        client: &client.peer.text,
        request: trace.has_head.then(|| RequestLine {
            method: head.method_name(),
            target: head.target(),
            host: head.host(),
            protocol: match client.version(head.version) {
                Version::Http10 => "HTTP/1.0",
                Version::Http11 => "HTTP/1.1",
                Version::Http2 => "HTTP/2.0",
            },
        }),
        status,
        bytes_down: trace.sent,
        head_down: trace.head_sent,
        bytes_up: request.bytes_read(),
        node: node.map(|node| node.id().as_str()),
        tries: trace.tries,
        cache: if is_cache { cache_result(request.head.method, response).map(CacheResult::as_str) } else { None },
        queue: has_node.then_some(turned_to),
        connect: (trace.progress >= Progress::Headers).then_some(trace.connected),
        first_byte,
        total,
        termination,
        reason: trace.reason().map(FailureReason::as_str),
        request_id: &trace.id,
    });
}
