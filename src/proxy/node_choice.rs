//! The node of a request: chosen at once, or waited for.
//!
//! A request waits with its head read and its body left where it is, in the client's kernel: nothing of it grows here. It is given up when
//! it has waited for `queue_timeout` in all, when `timeouts.request` is over, or when its client has gone. **A client that closes its side counts as gone**,
//! here alone. Elsewhere that may be a half-close, whose answer somebody waits for (RFC 9112 section 9.6), and the node is at work on it
//! already; in the queue it is, as HAProxy says of its `abortonclose`, a reader who has pressed "stop" with a probability close to 100 %,
//! and his page would be rendered for nobody while others wait.

use std::io;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::client::Client;
use super::deadline::Phase;
use super::failure::Failure;
use super::frontend::NoNode;
use super::node_permit::NodePermit;
use super::request::Request;
use super::trace::RequestPhase;
use crate::balance::LbContext;

/// How often it is looked whether a client has closed that had sent more than its request, which hides the end of its stream.
const LOOK_BEHIND: Duration = Duration::from_millis(250);

/// A place at another node than those with the endpoints `tried`, if need be after a wait.
pub(super) async fn choose(
    client: &mut Client,
    request: &mut Request,
    lb: LbContext,
    tried: &[u64],
) -> Result<NodePermit, Failure> {
    let permit = {
        let fleet = client.worker.shared.fleet.load();
        client.worker.queue.permit(&*client.frontend.select, &fleet, lb, tried)
    };
    match permit {
        Ok(permit) => Ok(permit),
        Err(NoNode::Busy) => wait(client, request, lb, tried).await,
        Err(no_node) => Err(Failure::NoNode(no_node)),
    }
}

/// Waits in the queue for such a place.
pub(super) async fn wait(
    client: &mut Client,
    request: &mut Request,
    lb: LbContext,
    tried: &[u64],
) -> Result<NodePermit, Failure> {
    let (role, terms) = (client.frontend.role, client.frontend.terms);
    // Who waits now has been served by then, or has given up as well.
    let retry_after = u32::try_from(terms.queue_timeout.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
    request.trace.phase = RequestPhase::Queue;
    let Ok(mut queued) = client.worker.queue.join(role, tried, lb) else {
        return Err(Failure::QueueFull { retry_after });
    };
    // Others wait, and none of them can use the node that has room.
    if let Poll::Ready(permit) = queued.poll(&mut Context::from_waker(Waker::noop())) {
        return Ok(permit);
    }
    client.deadline.enter(Phase::Queue);
    let began = Instant::now();
    let mut late = pin!(tokio::time::sleep(terms.queue_timeout.saturating_sub(request.trace.queued)));
    let mut looks = tokio::time::interval_at((began + LOOK_BEHIND).into(), LOOK_BEHIND);
    let mut watches_input = true;
    let ended = std::future::poll_fn(|cx| {
        // Before all else: who has gone wants no place.
        if watches_input && let Poll::Ready(sign) = client.stream.poll_closed(cx) {
            match sign {
                Ok(()) => watches_input = false,
                Err(gone) => return Poll::Ready(Err(Failure::ClientGone(gone))),
            }
        }
        while !watches_input && looks.poll_tick(cx).is_ready() {
            if client.stream.has_closed() {
                return Poll::Ready(Err(Failure::ClientGone(io::ErrorKind::UnexpectedEof.into())));
            }
        }
        if let Poll::Ready(permit) = queued.poll(cx) {
            return Poll::Ready(Ok(permit));
        }
        if let Poll::Ready(interrupt) = client.deadline.poll(cx) {
            return Poll::Ready(Err(Failure::interrupted(interrupt, Failure::QueueTimeout { retry_after })));
        }
        late.as_mut().poll(cx).map(|()| Err(Failure::QueueTimeout { retry_after }))
    });
    let ended = ended.await;
    drop(queued);
    let waited = began.elapsed();
    request.trace.queued += waited;
    let worker = &client.worker;
    worker.shared.metrics.queue.record_wait(role, waited);
    if matches!(ended, Err(Failure::QueueTimeout { .. })) {
        worker.queue.note_timeout(role);
    }
    ended
}
