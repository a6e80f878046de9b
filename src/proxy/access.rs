//! The line of a request in the access log, made once, at its end, of what its [`Trace`] has noted.

use std::time::Duration;

use super::Frontend;
use super::cache_result::cache_result;
use super::client::{Client, PeerAddress};
use super::failure::Failure;
use super::request::Request;
use super::trace::{RequestPhase, Trace};
use super::worker::Worker;
use crate::fleet::{Node, Role};
use crate::http1::Version;
use crate::telemetry::access::{AccessLine, RequestLine};
use crate::telemetry::{CacheResult, FailureReason};

/// Gives the request its id, if there is an access log: a trusted proxy's, which is how it is found in the logs of both,
/// or a new one. A client's own would let strangers choose what is looked for.
pub(super) fn name(client: &Client, request: &mut Request) {
    if !client.worker.has_access_log() || !request.trace.id.is_empty() {
        return;
    }
    let Request { head, trace, id, .. } = request;
    if client.trusted && trace.has_head {
        head.copy_request_id(&mut trace.id);
    }
    if trace.id.is_empty() {
        id.push_to(&mut trace.id);
    }
    if trace.has_head {
        head.drop_request_id();
    }
}

/// Writes the line of a request that was refused before anybody could read its head.
pub(super) fn write_refused(
    worker: &Worker,
    frontend: &Frontend,
    peer: &PeerAddress,
    (status, failure): (u16, &Failure),
) {
    let Some(access) = worker.access() else { return };
    let mut trace = Trace::default();
    trace.fail(failure);
    access.write(&AccessLine {
        listener: name_of(frontend),
        client: &peer.text,
        request: None,
        status,
        bytes_down: 0,
        head_down: 0,
        bytes_up: 0,
        node: None,
        tries: 0,
        cache: None,
        queue: None,
        connect: None,
        first_byte: None,
        total: Duration::ZERO,
        termination: trace.termination(),
        reason: trace.reason().map(FailureReason::as_str),
        request_id: worker.request_id().to_string().as_bytes(),
    });
}

/// The name of a listener.
pub(super) fn name_of(frontend: &Frontend) -> &'static str {
    match frontend.role {
        Role::Varnish => "edge",
        Role::Web => "origin",
    }
}

/// How the cache that answered came by its answer; `None` if no cache did, or it does not say.
pub(super) fn cache_of(request: &Request, node: Option<&Node>) -> Option<CacheResult> {
    let has_answer = request.trace.phase >= RequestPhase::Data;
    let is_cache = has_answer && node.is_some_and(|node| node.spec.role() == Role::Varnish);
    if is_cache { cache_result(request.head.method, &request.response) } else { None }
}

/// The client that a trusted proxy in front of the edge names; `None` if it is the peer itself. At the origin the peer is the Varnish
/// that asks.
fn client_named(client: &Client, request: &Request) -> Option<String> {
    if !client.frontend.is_public || !client.trusted || !request.trace.has_head {
        return None;
    }
    let fleet = client.worker.shared.fleet.load();
    let client = client.arrival(&request.head, &fleet).client?;
    Some(client.to_string())
}

/// Writes the line of a request that has ended. `node` answered it, or failed last; `cache`: how it came by the answer.
pub(super) fn write_line(
    client: &Client,
    request: &mut Request,
    (node, cache): (Option<&Node>, Option<CacheResult>),
    total: Duration,
) {
    let Some(access) = client.worker.access() else { return };
    name(client, request);
    let Request { head, trace, status, began, .. } = &*request;
    let status = status.unwrap_or(499);
    let termination = trace.termination();
    // `LR`: the configuration has it so, a redirect or maintenance.
    let is_failed = !matches!(&termination, b"--" | b"LR") || status >= 500 && &termination != b"LR";
    if !is_failed && !access.log().is_sampled(&trace.id) {
        return;
    }
    let named = client_named(client, request);
    let has_node = trace.tries > 0;
    let turned_to = trace.tried.map_or(Duration::ZERO, |tried| tried.saturating_duration_since(*began)) + trace.waited;
    let first_byte = trace.answered.map(|answered| {
        answered.saturating_duration_since(*began).saturating_sub(turned_to).saturating_sub(trace.connected)
    });
    access.write(&AccessLine {
        listener: name_of(&client.frontend),
        client: named.as_deref().unwrap_or(&client.peer.text),
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
        cache: cache.map(CacheResult::as_str),
        queue: if has_node { Some(turned_to) } else { Some(trace.queued).filter(|queued| !queued.is_zero()) },
        connect: (trace.phase >= RequestPhase::Headers).then_some(trace.connected),
        first_byte,
        total,
        termination,
        reason: trace.reason().map(FailureReason::as_str),
        request_id: &trace.id,
    });
}
