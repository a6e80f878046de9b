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
use super::node_choice;
use super::node_permit::NodePermit;
use super::request::Request;
use super::second_look::{NextLook, SecondLook};
use super::spans;
use super::suspicion;
use super::trace::RequestPhase;
use super::worker::Worker;
use super::{Freshness, Frontend, NoNode, OwnAnswer, StorePolicy};
use crate::balance::LbContext;
use crate::fleet::{Node, Role, Snapshot};
use crate::http1::{Framing, Method, OwnResponse};
use crate::purge::PROBE_PATH;
use crate::telemetry::RetryReason;

/// The nodes of a request, for metrics and logs.
#[derive(Default)]
struct Nodes {
    /// The node that answered.
    answered: Option<NodePermit>,
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
    let (answerer, terms) = take_in(client, request, head)?;
    let mut permit = match answerer {
        Answerer::Node(permit) => permit,
        other => match Box::pin(answer_later(client, request, other, terms.lb)).await? {
            LateAnswer::Node(permit) => permit,
            LateAnswer::Given(after) => return Ok(after),
        },
    };
    let mut retries = Retries { terms, second_look: None };
    loop {
        request.trace.begin_try(permit.node());
        latency::begin(request, client.frontend.notes_latency);
        let failed = match attempt(client, request, permit.node(), &retries.terms).await {
            Ok(after) => {
                suspicion::note_answer(&client.worker, &permit, request.status.unwrap_or_default());
                nodes.answered = Some(permit);
                return Ok(after);
            }
            Err(failed) => failed,
        };
        // Rare, and so no part of the state of each request.
        permit = Box::pin(retry(client, request, (permit, failed), &mut retries, nodes)).await?;
    }
}

/// A request that no node takes at once.
enum LateAnswer {
    /// It was answered here.
    Given(Disposition),
    /// This node takes it now.
    Node(NodePermit),
}

async fn answer_later(
    client: &mut Client,
    request: &mut Request,
    answerer: Answerer,
    lb: LbContext,
) -> Result<LateAnswer, Failure> {
    match answerer {
        Answerer::Node(permit) => Ok(LateAnswer::Node(permit)),
        Answerer::Queue => {
            let permit = node_choice::wait(client, request, lb, &[]).await?;
            // What was purged while it waited is in no page that is rendered from now on.
            request.mark = client.frontend.store.as_ref().map(StorePolicy::mark).unwrap_or_default();
            Ok(LateAnswer::Node(permit))
        }
        Answerer::Ourselves(page) => {
            request.status = Some(200);
            (request.trace.is_own, request.trace.sent) = (true, page.len() as u64);
            client.deadline.enter(Phase::Body(AwaitedSide::Client));
            client.send(&page).await.map(|()| LateAnswer::Given(Disposition::Linger))
        }
    }
}

/// How far the retries of a request have come.
struct Retries {
    /// Of the next attempt.
    terms: Terms,
    second_look: Option<Box<SecondLook>>,
}

/// Where a request goes next whose attempt has failed.
///
/// # Errors
/// If it goes nowhere: what the client is told.
async fn retry(
    client: &mut Client,
    request: &mut Request,
    (permit, failed): (NodePermit, FailedAttempt),
    retries: &mut Retries,
    nodes: &mut Nodes,
) -> Result<NodePermit, Failure> {
    let FailedAttempt { failure, untouched, unsent, reused } = failed;
    request.trace.fail_try(&failure);
    if client.frontend.notes_latency {
        latency::note_failure(&client.worker, request, &permit, &failure, reused);
    }
    let failure = match failure {
        Failure::Stale(page) => {
            tracing::debug!(request = %request.name(), node = %permit.id(), ?page, "a stale answer is thrown away");
            client.deadline.enter(Phase::FirstByte);
            let look = retries.second_look.get_or_insert_default();
            let next = look.after(client, request, permit, (page, untouched), retries.terms.lb).await?;
            retries.terms.takes_stale = matches!(next, NextLook::AsItIs(_));
            let (NextLook::Node(permit) | NextLook::AsItIs(permit)) = next;
            return Ok(permit);
        }
        failure => failure,
    };
    client.worker.log_failure(&permit, &failure, request);
    suspicion::note_failure(&client.worker, permit.node(), &failure, reused);
    nodes.failed = Some(Arc::clone(permit.node()));
    retries.terms.may_have_begun |= !unsent;
    let Some(reason) = failure.retry_reason(untouched, retries.terms.is_safe || unsent) else {
        nodes.answered = request.status.is_some().then_some(permit);
        return Err(failure);
    };
    let next = if reused && matches!(failure, Failure::NoAnswer(_)) {
        // The node closed an idle connection, which it may do at any time. The same node again.
        retries.terms.fresh = true;
        permit
    } else {
        another_node(client, request, (permit, failure), retries, reason).await?
    };
    client.worker.shared.metrics.count_retry(client.frontend.role, reason);
    tracing::debug!(request = %request.name(), node = %next.id(), reason = reason.as_str(), "request is retried");
    Ok(next)
}

/// Another node for a request that has failed at this one: once, or past the caches after a stale answer.
async fn another_node(
    client: &mut Client,
    request: &mut Request,
    (permit, failure): (NodePermit, Failure),
    retries: &mut Retries,
    reason: RetryReason,
) -> Result<NodePermit, Failure> {
    let lb = retries.terms.lb;
    // It has paid for its move.
    if let Failure::NodeDown(other) = failure {
        retries.terms.elsewhere = true;
        return Ok(*other);
    }
    let is_paid = || !retries.terms.may_have_begun || client.worker.spend_retry(client.frontend.role, reason);
    if retries.terms.elsewhere {
        let past = retries.second_look.as_mut().and_then(|look| look.after_failure(client, &permit, lb));
        return past.filter(|_| is_paid()).ok_or(failure);
    }
    let tried = permit.endpoint_id;
    let has_other = {
        let fleet = client.worker.shared.fleet.load();
        !matches!(client.frontend.select.pick(&fleet, lb, &[tried]), Err(NoNode::NoneUp | NoNode::AllBehind))
    };
    if !has_other || !is_paid() {
        return Err(failure);
    }
    retries.terms.elsewhere = true;
    drop(permit);
    match node_choice::choose(client, request, lb, &[tried]).await {
        Err(Failure::NoNode(_)) => Err(failure),
        chosen => chosen,
    }
}

/// Who answers a request.
enum Answerer {
    /// clearcoat itself, with this page.
    Ourselves(Vec<u8>),
    /// This node first.
    Node(NodePermit),
    /// A node, when one has room.
    Queue,
}

/// Takes in a request, and decides who answers it, and how it may be sent to a node. Whether its sender is a trusted proxy is
/// decided before all else: one that is refused is found by its id as well.
fn take_in(
    client: &mut Client,
    request: &mut Request,
    head: Result<usize, Failure>,
) -> Result<(Answerer, Terms), Failure> {
    let fleet = client.worker.shared.fleet.load();
    client.judge(&fleet);
    if let Some(page) = take_head(client, request, head, &fleet)? {
        return Ok((Answerer::Ourselves(page), Terms::default()));
    }
    access::name(client, request);
    spans::begin(client, request);
    let Frontend { select, store, freshness, .. } = &*client.frontend;
    let lb = client.worker.lb_context(client.frontend.role, select.request_hash(&request.head), request.began);
    request.mark = store.as_ref().map(StorePolicy::mark).unwrap_or_default();
    request.known = freshness.as_ref().map_or(0, Freshness::known);
    request.trace.phase = RequestPhase::Queue;
    let answerer = match client.worker.queue.permit(&**select, &fleet, lb, &[]) {
        Ok(permit) => Answerer::Node(permit),
        Err(NoNode::Busy) => Answerer::Queue,
        Err(no_node) => return Err(Failure::NoNode(no_node)),
    };
    Ok((answerer, Terms { lb, is_safe: request.head.method.is_safe(), ..Terms::default() }))
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
