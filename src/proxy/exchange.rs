//! The request path: `handle` never fails, `try_handle` does the work.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::access;
use super::attempt::{FailedAttempt, Terms, attempt};
use super::client::{Client, Disposition, PeerAddress};
use super::deadline::{AwaitedSide, Phase};
use super::failure::Failure;
use super::gate::GateRefusal;
use super::latency;
use super::request::Request;
use super::second_look::{NextLook, SecondLook};
use super::spans;
use super::suspicion;
use super::trace::RequestPhase;
use super::worker::Worker;
use super::{Freshness, Frontend, OwnAnswer, StorePolicy};
use crate::balance::LbContext;
use crate::fleet::{Node, Role, Snapshot};
use crate::http1::{Framing, Method, OwnResponse};
use crate::purge::PROBE_PATH;

/// The nodes of a request, for metrics and logs.
#[derive(Default)]
struct Nodes {
    /// The node that answered.
    answered: Option<Arc<Node>>,
    /// The last node that was tried and failed.
    failed: Option<Arc<Node>>,
}

/// Serves the request whose head is `request.input[..len]`, or answers input that is not a valid request.
///
/// Its state is allocated for each request. glibc takes up to 1032 bytes from a cache of the thread (`tcache`), which
/// costs less than half of a search of the heap.
pub(super) async fn handle(client: &mut Client, request: &mut Request, head: Result<usize, Failure>) -> Disposition {
    (request.id, request.began) = (client.worker.request_id(), Instant::now());
    request.status = None;
    request.trace.reset();
    client.deadline.begin_request();
    client.worker.spin.mark_active();
    let mut nodes = Nodes::default();
    let after = match try_handle(client, request, head, &mut nodes).await {
        Ok(after) => after,
        Err(failure) => {
            client.worker.report(nodes.failed.as_deref(), &failure, request);
            request.trace.fail(&failure);
            respond_to(client, request, &failure).await
        }
    };
    client.record_written();
    finish(client, request, &nodes);
    client.worker.spin.mark_active();
    after
}

/// Runs once at the end of every request. Those that clearcoat and its VCL make to try and to probe are nobody's.
fn finish(client: &Client, request: &mut Request, nodes: &Nodes) {
    let answered = nodes.answered.as_deref();
    let (role, worker) = (client.frontend.role, &client.worker);
    if request.trace.is_own {
        return;
    }
    let listener = worker.shared.metrics.listener(role);
    let took = request.began.elapsed();
    listener.record_end(took, request.bytes_read(), request.trace.sent);
    let node = answered.or(nodes.failed.as_deref());
    let cache = access::cache_of(request, node);
    match (answered, request.status) {
        (Some(node), Some(status)) if node.spec.role() == role => {
            if role == Role::Varnish {
                let began = request.began.saturating_duration_since(worker.shared.started);
                node.live.life_signs.record_answer(began, took);
            }
            let metrics = worker.pools.metrics(node);
            metrics.record_answer(status, took);
            if let (Some(varnish), Some(result)) = (&metrics.varnish, cache) {
                varnish.record_cache_result(result);
            }
        }
        (Some(node), Some(status)) => worker.pools.metrics(node).record_bypass(status, took),
        (None, Some(status)) => listener.record_own_answer(status),
        // A client that left before any answer is counted as 499, as nginx does.
        (_, None) => listener.record_own_answer(499),
    }
    if let Some(reason) = request.trace.reason() {
        listener.record_failure(reason);
    }
    access::write_line(client, request, (node, cache), took);
    spans::finish(client, request, node, took);
}

/// Counts and logs a request that was refused before it came here.
pub(super) fn record_refused(worker: &Worker, frontend: &Frontend, peer: &PeerAddress, failure: &Failure) {
    let Some((status, _)) = failure.status() else { return };
    let listener = worker.shared.metrics.listener(frontend.role);
    listener.record_end(Duration::ZERO, 0, 0);
    listener.record_own_answer(status);
    listener.record_failure(failure.reason());
    access::write_refused(worker, frontend, peer, (status, failure));
}

async fn try_handle(
    client: &mut Client,
    request: &mut Request,
    head: Result<usize, Failure>,
    nodes: &mut Nodes,
) -> Result<Disposition, Failure> {
    let (mut node, lb) = match take_in(client, request, head)? {
        Answerer::Node(node, lb) => (node, lb),
        Answerer::Ourselves(page) => {
            request.status = Some(200);
            (request.trace.is_own, request.trace.sent) = (true, page.len() as u64);
            client.deadline.enter(Phase::Body(AwaitedSide::Client));
            return client.send(&page).await.map(|()| Disposition::Linger);
        }
    };
    let is_safe = request.head.method.is_safe();
    let (mut fresh, mut elsewhere) = (false, false);
    let (mut second_look, mut takes_stale) = (None::<Box<SecondLook>>, false);
    loop {
        request.trace.begin_try(&node);
        latency::begin(request, client.frontend.notes_latency);
        let terms = Terms { lb, fresh, is_safe, takes_stale, may_move: is_safe && !elsewhere };
        let FailedAttempt { failure, untouched, unsent, reused } = match attempt(client, request, &node, &terms).await {
            Ok(after) => {
                suspicion::note_answer(&client.worker, &node, request.status.unwrap_or_default());
                nodes.answered = Some(node);
                return Ok(after);
            }
            Err(failed) => failed,
        };
        request.trace.fail_try(&failure);
        if client.frontend.notes_latency {
            latency::note_failure(&client.worker, request, &node, &failure, reused);
        }
        let failure = match failure {
            Failure::Stale(page) => {
                tracing::debug!(request = %request.name(), node = %node.id(), ?page, "a stale answer is thrown away");
                client.deadline.enter(Phase::FirstByte);
                let look = second_look.get_or_insert_default();
                (node, takes_stale) = match Box::pin(look.after(client, &node, page, untouched, lb)).await? {
                    NextLook::Node(node) => (node, false),
                    NextLook::AsItIs(node) => (node, true),
                };
                continue;
            }
            failure => failure,
        };
        client.worker.log_failure(&node, &failure, request);
        suspicion::note_failure(&client.worker, &node, &failure, reused);
        nodes.answered = request.status.is_some().then(|| Arc::clone(&node));
        nodes.failed = Some(Arc::clone(&node));
        let Some(reason) = failure.retry_reason(untouched, is_safe || unsent) else { return Err(failure) };
        if reused && matches!(failure, Failure::NoAnswer(_)) {
            // The node closed an idle connection, which it may do at any time. The same node again.
            fresh = true;
        } else if elsewhere {
            let web = second_look.as_mut().and_then(|look| look.after_failure(client, &node, lb));
            let Some(web) = web else { return Err(failure) };
            node = web;
        } else {
            elsewhere = true;
            node = match failure {
                Failure::NodeDown(other) => other,
                failure => {
                    let fleet = client.worker.shared.fleet.load();
                    let Ok(other) = client.frontend.select.pick(&fleet, lb, Some(node.endpoint_id)) else {
                        return Err(failure);
                    };
                    other
                }
            };
        }
        client.worker.shared.metrics.count_retry(client.frontend.role, reason);
        tracing::debug!(request = %request.name(), node = %node.id(), reason = reason.as_str(), "request is retried");
    }
}

/// Who answers a request.
enum Answerer {
    /// clearcoat itself, with this page.
    Ourselves(Vec<u8>),
    /// This node first, chosen in this context.
    Node(Arc<Node>, LbContext),
}

/// Takes in a request, and decides who answers it. Whether its sender is a trusted proxy is decided before all else: one that is
/// refused is found by its id as well.
fn take_in(client: &mut Client, request: &mut Request, head: Result<usize, Failure>) -> Result<Answerer, Failure> {
    let fleet = client.worker.shared.fleet.load();
    client.judge(&fleet);
    if let Some(page) = take_head(client, request, head, &fleet)? {
        return Ok(Answerer::Ourselves(page));
    }
    access::name(client, request);
    spans::begin(client, request);
    let Frontend { select, store, freshness, .. } = &*client.frontend;
    let lb = client.worker.lb_context(select.request_hash(&request.head), request.began);
    request.mark = store.as_ref().map(StorePolicy::mark).unwrap_or_default();
    request.known = freshness.as_ref().map_or(0, Freshness::known);
    request.trace.phase = RequestPhase::Queue;
    let node = select.pick(&fleet, lb, None).map_err(Failure::NoNode)?;
    Ok(Answerer::Node(node, lb))
}

/// Takes in the head of a request that this listener admits. Gives the page that clearcoat itself answers with, if any.
fn take_head(
    client: &Client,
    request: &mut Request,
    head: Result<usize, Failure>,
    fleet: &Snapshot,
) -> Result<Option<Vec<u8>>, Failure> {
    head?;
    let limits = client.worker.limits();
    request.longest_body = limits.longest_body();
    request.trace.has_head = true;
    if client.frontend.is_purge(&request.head) {
        let notice = client.frontend.leave_notice.as_ref().filter(|_| request.head.path() == PROBE_PATH.as_bytes());
        request.trace.is_own = notice.is_some();
        let is_leaving = notice.is_some_and(|notice| notice.refuses_probe());
        return Err(if is_leaving { Failure::Leaving } else { Failure::PurgeMethod });
    }
    if request.head.method == Method::Unsupported {
        return Err(Failure::BadMethod);
    }
    if let Some(gate) = &client.frontend.gate
        && let Some(refusal) = gate.refusal(
            &request.head,
            &client.arrival(&request.head, fleet),
            request.began.saturating_duration_since(client.worker.shared.started),
        )
    {
        return Err(Failure::Refused(refusal));
    }
    match (client.frontend.own_answer)(&request.head) {
        None => {}
        Some(OwnAnswer::NotFound) => return Err(Failure::NotFound),
        Some(OwnAnswer::Page(page)) => return Ok(Some(page)),
    }
    if matches!(request.head.framing, Framing::Length(length) if length > limits.longest_body()) {
        return Err(Failure::BodyTooLarge);
    }
    Ok(None)
}

/// Reports the failure to the client: an answer if none has begun, a reset if one was cut.
async fn respond_to(client: &mut Client, request: &mut Request, failure: &Failure) -> Disposition {
    tracing::debug!(request = %request.name(), peer = %client.peer.text, %failure, "request failed");
    if request.status.is_some() {
        return Disposition::Reset;
    }
    // If no answer has begun there is nothing to cut, and a reset would destroy earlier answers that the client has not
    // read yet.
    let Some(reply) = failure.reply() else { return Disposition::Close };
    request.status = Some(reply.status);
    access::name(client, request);
    let frontend = Rc::clone(&client.frontend);
    let Request { to_client, head, trace, .. } = request;
    let location = match (failure, &frontend.gate) {
        (Failure::Refused(GateRefusal::PlainHttp), Some(gate)) => gate.https_location(head),
        _ => Vec::new(),
    };
    let strict_transport = match failure {
        // It would bind a name that is not ours.
        Failure::Refused(GateRefusal::UnknownHost) => String::new(),
        _ => client.strict_transport(head).to_owned(),
    };
    let pages = &frontend.error_pages;
    let page = match failure {
        Failure::Refused(GateRefusal::Maintenance { .. }) => pages.of_maintenance(),
        _ => pages.of_status(reply.status),
    };
    let (content_type, body) = match page {
        Some(page) => (page.content_type, page.body.clone()),
        None => ("text/plain; charset=utf-8", reply.body()),
    };
    let answer = OwnResponse {
        status: reply.status,
        reason: reply.reason,
        content_type,
        body: &body,
        retry_after: reply.retry_after,
        location: &location,
        strict_transport: &strict_transport,
        request_id: &trace.id,
        head_only: head.method == Method::Head,
    };
    // Whoever was too slow, the client has its own time for the answer.
    client.deadline.end_request();
    client.deadline.enter(Phase::Body(AwaitedSide::Client));
    match client.answer_with(&answer, &body, to_client).await {
        Ok(sent) => {
            (trace.sent, trace.head_sent) = (sent, sent.saturating_sub(answer.body_len()));
            // A client that was too slow gets no more time.
            if matches!(failure, Failure::ClientTimeout) { Disposition::Close } else { Disposition::Linger }
        }
        Err(_gone) => Disposition::Close,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of the state that this function's future keeps.
    fn state_of<'a, F: Future>(_: impl Fn(&'a mut Client, &'a mut Request, Result<usize, Failure>) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn the_state_of_a_request_comes_from_the_threads_cache() {
        assert!(state_of(handle) <= 1032, "{} bytes", state_of(handle));
    }
}
