//! How long an answer is awaited: as long as its connection lives.
//!
//! A node that fails its health checks has not failed its requests in flight. A cache that stalled for two seconds, a
//! web node whose database hiccuped, a node that was removed from the configuration: each still completes its requests,
//! and a client that is told of a failure meanwhile buys twice. So a health verdict never ends a wait. What it does:
//!
//! - A safe request whose answer has not begun may be retried on another node if this one is *down* and another can
//!   take it: failover is quick, and a GET may be executed twice. It is moved once. If all others are at their limit, it
//!   queues for them and waits here meanwhile, whichever is first; if the retry budget is used up, it waits here.
//! - For any other request the connection is checked: the kernel sends keepalive probes and gives up on a node that
//!   does not acknowledge them, or a completely sent request, for `timeouts.node_silence`. The kernel of a hung process still
//!   acknowledges, so that node is awaited; a dead machine does not. (This does not apply to a request with more to
//!   send: a hung process leaves its receive window full, which the kernel counts as no sign of life.)
//!
//! The phases also have their own limits, which no verdict extends.

use std::mem;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use super::super::deadline::{AwaitedSide, Interrupt};
use super::super::failure::Failure;
use super::super::frontend::NoNode;
use super::super::node_permit::NodePermit;
use super::Exchange;
use super::head::AwaitingHead;
use crate::telemetry::RetryReason;

/// Keepalive probes without a reply after which a node is given up. The first is sent as long after the last sign of life as
/// each is after the one before.
const PROBES: u32 = 5;

impl AwaitingHead<'_, '_> {
    /// Ready with the reason if the wait for the answer's head is to end. `awaited`: who owes the next piece of the request;
    /// `None` once it is sent.
    pub(super) fn poll_patience(&mut self, cx: &mut Context<'_>, awaited: Option<AwaitedSide>) -> Poll<Failure> {
        loop {
            if let Poll::Ready(elsewhere) = self.poll_queued(cx) {
                return Poll::Ready(elsewhere);
            }
            let deadline = &self.exchange.client.deadline;
            let interrupt = ready!(match awaited {
                Some(side) => deadline.poll_body(cx, side),
                None => deadline.poll(cx),
            });
            if !matches!(interrupt, Interrupt::NodeDown | Interrupt::NodeGone) {
                let is_client = awaited == Some(AwaitedSide::Client);
                let late = if is_client { Failure::ClientTimeout } else { Failure::NodeTimeout };
                return Poll::Ready(Failure::interrupted(interrupt, late));
            }
            let is_sent = self.exchange.upload.is_done();
            if !mem::replace(&mut self.exchange.asked_for_life, true) {
                let silence = self.exchange.client.worker.node_silence();
                ask_for_life(&self.exchange.upstream.stream, is_sent, silence);
            }
            let Exchange { client, terms, upload, .. } = &*self.exchange;
            if interrupt == Interrupt::NodeGone || !terms.may_move() || upload.has_read() {
                client.deadline.go_on_without_node();
                continue;
            }
            // Another node, or a retry, may be available at the next sweep.
            client.deadline.go_on();
            if self.queued.is_none()
                && let Some(elsewhere) = self.another_node()
            {
                return Poll::Ready(elsewhere);
            }
        }
    }

    /// Moves the request to another node that has room, or queues for one.
    fn another_node(&mut self) -> Option<Failure> {
        let Exchange { client, terms, node, .. } = &*self.exchange;
        let (worker, role) = (&client.worker, client.frontend.role);
        if !worker.may_retry(role) {
            if !mem::replace(&mut self.was_refused, true) {
                worker.refuse_retry(role, RetryReason::NodeDown);
            }
            return None;
        }
        let (fleet, tried) = (worker.shared.fleet.load(), [node.endpoint_id]);
        match worker.queue.permit(&*client.frontend.select, &fleet, terms.lb, &tried) {
            Ok(permit) => self.move_to(permit),
            Err(NoNode::Busy) => {
                // In a full queue there may be room at the next sweep.
                self.queued = worker.queue.join(role, &tried, terms.lb).ok().map(Box::new);
                None
            }
            Err(NoNode::NoneUp | NoNode::AllBehind) => None,
        }
    }

    /// Ready when the request has its turn at another node.
    fn poll_queued(&mut self, cx: &mut Context<'_>) -> Poll<Failure> {
        let Exchange { node, upload, .. } = &*self.exchange;
        let Some(queued) = &mut self.queued else { return Poll::Pending };
        if !node.live.is_down() || upload.has_read() {
            // It stays.
            self.queued = None;
            return Poll::Pending;
        }
        let permit = ready!(queued.poll(cx));
        self.queued = None;
        self.move_to(permit).map_or(Poll::Pending, Poll::Ready)
    }

    fn move_to(&self, permit: NodePermit) -> Option<Failure> {
        let Exchange { client, .. } = &*self.exchange;
        let is_paid = client.worker.spend_retry(client.frontend.role, RetryReason::NodeDown);
        is_paid.then(|| Failure::NodeDown(Box::new(permit)))
    }
}

/// Enables keepalive probes on a connection; reads and writes fail with `TimedOut` if they get no reply for `silence`, which
/// is at least a second for each of [`PROBES`]. `is_sent`: the request is sent completely.
fn ask_for_life(stream: &TcpStream, is_sent: bool, silence: Duration) {
    let socket = SockRef::from(stream);
    // The kernel counts whole seconds.
    let every = Duration::from_secs(silence.as_secs() / u64::from(PROBES));
    let probes = TcpKeepalive::new().with_time(every).with_interval(every).with_retries(PROBES - 1);
    #[cfg(target_os = "linux")]
    // TCP_USER_TIMEOUT covers unacknowledged data: no keepalive probes are sent during retransmission.
    let limited = if is_sent { socket.set_tcp_user_timeout(Some(silence)) } else { Ok(()) };
    #[cfg(not(target_os = "linux"))]
    let limited = Ok(());
    let asked = limited.and_then(|()| socket.set_tcp_keepalive(&probes));
    if let Err(error) = asked {
        tracing::debug!(%error, "keepalive probes cannot be enabled on a connection");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_with_keepalive_probes_fails_if_its_peer_is_silent() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let socket = SockRef::from(&stream);
        assert!(!socket.keepalive().unwrap());
        for (seconds, every) in [(15, 3), (5, 1), (9, 1), (600, 120)] {
            let silence = Duration::from_secs(seconds);
            ask_for_life(&stream, true, silence);
            assert!(socket.keepalive().unwrap());
            let set = (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap());
            assert_eq!(set, (Duration::from_secs(every), Duration::from_secs(every)), "{seconds} s");
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(silence));
        }
    }
}
