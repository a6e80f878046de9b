//! How long an answer is waited for: as long as the connection lives.
//!
//! A node that fails its health checks has not failed the requests that are under way there. A cache that stood still for
//! two seconds, a web node whose database hiccuped, a node that was taken out of the configuration: each of them still
//! answers what it has, and who is told meanwhile that it failed buys twice. So a verdict on the node ends no wait. What
//! it does:
//!
//! - A safe request of which nothing was passed on may go to another node when this one is *down*, if there is one that
//!   can take it: that makes failover quick, and to carry out a GET twice harms nobody. It moves once.
//! - For any other request the connection is asked: the system sends keepalive probes on it and gives up on a node that
//!   leaves them, or a request that was sent to it whole, without a sign for [`SILENCE`]. A hung process has a system that
//!   answers for it, and is waited for; a machine that is gone has none. (Not so a request of which there is more to send:
//!   the system counts a full receive window, which a hung process leaves, as no sign.)
//!
//! Beside that the phases have their limits, which no verdict makes longer.

use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use super::super::deadline::Interrupt;
use super::super::failure::Failure;
use super::Exchange;
use super::head::AwaitingHead;
use crate::fleet::Node;

/// How long the system of a node that is down or gone may give no sign of life on a connection.
const SILENCE: Duration = Duration::from_secs(15);

/// How often it is asked for one.
const ASK_EVERY: Duration = Duration::from_secs(3);

impl AwaitingHead<'_, '_> {
    /// Ready with the reason when the wait for the head of the answer is to end. `for_client`: it is the client that is
    /// waited for.
    pub(super) fn poll_patience(&mut self, cx: &mut Context<'_>, for_client: bool) -> Poll<Failure> {
        loop {
            let interrupt = ready!(self.exchange.client.deadline.poll_wait(cx, for_client));
            match interrupt {
                Interrupt::NodeDown | Interrupt::NodeGone => {}
                _ if for_client => return Poll::Ready(Failure::ClientTimeout),
                _ => return Poll::Ready(Failure::NodeTimeout),
            }
            let is_sent = self.exchange.upload.is_done();
            if !mem::replace(&mut self.exchange.asked_for_life, true) {
                ask_for_life(&self.exchange.upstream.stream, is_sent);
            }
            let Exchange { client, terms, upload, .. } = &*self.exchange;
            if interrupt == Interrupt::NodeGone || !terms.may_move || upload.has_read() {
                client.deadline.go_on_without_node();
                continue;
            }
            if let Some(other) = self.another_node() {
                return Poll::Ready(Failure::NodeDown(other));
            }
            // Perhaps there is one at the next sweep.
            client.deadline.go_on();
        }
    }

    fn another_node(&self) -> Option<Arc<Node>> {
        let Exchange { client, terms, node, .. } = &*self.exchange;
        client.frontend.select.pick(&client.worker.shared.fleet.load(), terms.lb, Some(node.endpoint_id)).ok()
    }
}

/// Makes the system ask for signs of life on a connection; reads and writes fail with `TimedOut` when there are none.
/// `is_sent`: there is no more to send.
fn ask_for_life(stream: &TcpStream, is_sent: bool) {
    const PROBES: u32 = (SILENCE.as_secs() / ASK_EVERY.as_secs()) as u32;
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(ASK_EVERY).with_interval(ASK_EVERY).with_retries(PROBES - 1);
    #[cfg(target_os = "linux")]
    // Also for what was sent and not acknowledged: no probes go out while that is repeated.
    let limited = if is_sent { socket.set_tcp_user_timeout(Some(SILENCE)) } else { Ok(()) };
    #[cfg(not(target_os = "linux"))]
    let limited = Ok(());
    let asked = limited.and_then(|()| socket.set_tcp_keepalive(&probes));
    if let Err(error) = asked {
        tracing::debug!(%error, "a connection cannot be asked whether its node is there");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_is_asked_for_life_fails_when_its_other_side_is_silent_for_too_long() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let socket = SockRef::from(&stream);
        assert!(!socket.keepalive().unwrap());
        ask_for_life(&stream, true);
        assert!(socket.keepalive().unwrap());
        assert_eq!(
            (socket.tcp_keepalive_time().unwrap(), socket.tcp_keepalive_interval().unwrap()),
            (ASK_EVERY, ASK_EVERY)
        );
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(SILENCE));
    }
}
