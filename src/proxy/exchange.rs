//! The request path: `handle` never fails, `try_handle` is what happens.

use std::sync::Arc;
use std::time::Instant;

use super::attempt::{Answered, Failed, Terms, attempt};
use super::buffers::Buffers;
use super::client::{After, Client};
use super::deadline::Phase;
use super::failure::Failure;
use super::{OwnAnswer, StorePolicy};
use crate::fleet::{Node, Role};
use crate::http1::{Framing, Method};

/// What is known of a request when it is over, for metrics and logs.
#[derive(Default)]
struct Outcome {
    /// The node that answered, and the status that the client saw. 0 while nothing was sent.
    node: Option<Arc<Node>>,
    status: u16,
    /// The node that was asked last and failed.
    failed: Option<Arc<Node>>,
}

/// Carries out the request whose head is `buffers.input[..len]`, or answers bytes that never became one.
pub(super) async fn handle(
    client: &mut Client,
    buffers: &mut Buffers,
    head: Result<usize, Failure>,
) -> After {
    let began = Instant::now();
    client.worker.spin.worked();
    let mut outcome = Outcome::default();
    let handled = match head {
        Ok(len) => try_handle(client, buffers, len, &mut outcome).await,
        Err(failure) => {
            buffers.request.method = Method::Get;
            Err(failure)
        }
    };
    let after = match handled {
        Ok(after) => after,
        Err(failure) => {
            if let Some(node) = &outcome.failed {
                client.worker.report(node, &failure, buffers.request.path());
            }
            respond_to(client, buffers, &failure, &mut outcome).await
        }
    };
    client.written();
    count(client, &outcome, began);
    client.worker.spin.worked();
    after
}

fn count(client: &Client, outcome: &Outcome, began: Instant) {
    let role = client.frontend.role;
    let listener = client.worker.shared.metrics.listener(role);
    let took = began.elapsed();
    listener.duration.observe(took.as_secs_f64());
    match &outcome.node {
        Some(node) if node.spec.role == role => {
            if role == Role::Varnish {
                node.live.life_signs.answered(began.saturating_duration_since(client.worker.shared.started), took);
            }
            client.worker.pools.metrics(node).answered(outcome.status);
        }
        Some(node) => {
            // The series of a node that left while it answered went with it.
            let fleet = client.worker.shared.fleet.load();
            if fleet.pool(node.spec.role).get(node.id()).is_some() {
                listener.bypassed(outcome.status, node.id());
            }
        }
        // A client that left before any answer counts as nginx counts it.
        None => listener.answered_by_us(if outcome.status == 0 { 499 } else { outcome.status }),
    }
}

async fn try_handle(
    client: &mut Client,
    buffers: &mut Buffers,
    len: usize,
    outcome: &mut Outcome,
) -> Result<After, Failure> {
    let limits = &client.worker.shared.limits;
    buffers.request.parse(&buffers.input[..len], limits.max_fields).map_err(Failure::BadHead)?;
    if !client.frontend.admits(&buffers.request) {
        return Err(Failure::BadMethod);
    }
    match (client.frontend.own_answer)(&buffers.request) {
        None => {}
        Some(OwnAnswer::NotFound) => return Err(Failure::NotFound),
        Some(OwnAnswer::Page(page)) => {
            outcome.status = 200;
            client.deadline.enter(Phase::Body);
            return client.send(&page).await.map(|()| After::Linger);
        }
    }
    if matches!(buffers.request.framing, Framing::Length(length) if length > limits.longest_body()) {
        return Err(Failure::BodyTooLarge);
    }
    let draw = client.worker.draw(client.frontend.select.key(&buffers.request));
    let is_safe = buffers.request.method.is_safe();
    buffers.guard_mark = client.frontend.store.as_ref().map_or(0, StorePolicy::mark);

    let mut node = {
        let fleet = client.worker.shared.fleet.load();
        client.judge(&fleet);
        client.frontend.select.pick(&fleet, draw, None).map_err(Failure::NoNode)?
    };
    let (mut fresh, mut elsewhere) = (false, false);
    loop {
        let terms = Terms { draw, fresh, is_safe, may_move: is_safe && !elsewhere };
        let Failed { failure, status, untouched, unsent, reused, other } =
            match attempt(client, buffers, &node, terms).await {
                Ok(Answered { status, after }) => {
                    *outcome = Outcome { node: Some(node), status, failed: None };
                    return Ok(after);
                }
                Err(failed) => failed,
            };
        if let Some(status) = status {
            (outcome.node, outcome.status) = (Some(Arc::clone(&node)), status);
        }
        client.worker.suspect(&node, &failure);
        outcome.failed = Some(Arc::clone(&node));
        let Some(reason) = failure.retry_reason(untouched, is_safe || unsent) else { return Err(failure) };
        if reused && matches!(failure, Failure::NoAnswer(_)) {
            // The node closed a connection that it had kept for us: its good right. The same node again.
            fresh = true;
        } else if elsewhere {
            return Err(failure);
        } else {
            elsewhere = true;
            let fleet = client.worker.shared.fleet.load();
            let other = other.map_or_else(|| client.frontend.select.pick(&fleet, draw, Some(node.key)), Ok);
            let Ok(other) = other else { return Err(failure) };
            node = other;
        }
        client.worker.shared.metrics.retried(client.frontend.role, reason);
        tracing::debug!(node = %node.id(), reason, "request is tried again");
    }
}

/// Tells the client what it can be told: an answer where none has begun, a reset where one was cut.
async fn respond_to(
    client: &mut Client,
    buffers: &mut Buffers,
    failure: &Failure,
    outcome: &mut Outcome,
) -> After {
    tracing::debug!(peer = %client.peer.text, %failure, "request failed");
    let Some(reply) = failure.reply() else {
        // Where nothing of an answer was sent there is nothing to cut, and a reset would destroy what the client has not
        // read of the answers before.
        return if outcome.status == 0 { After::Close } else { After::Reset };
    };
    outcome.status = reply.status;
    let Buffers { to_client, request, .. } = buffers;
    client.deadline.enter(Phase::Body);
    match client.answer_with(&reply, request.method == Method::Head, to_client).await {
        // Who was too slow is not waited for any longer.
        Ok(()) if matches!(failure, Failure::ClientTimeout) => After::Close,
        Ok(()) => After::Linger,
        Err(_gone) => After::Close,
    }
}
