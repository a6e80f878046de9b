//! Asks a replica for the fill watermarks of the nodes that are held back for it ([`PeerHolds`]).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use super::super::Replicas;
use super::super::under_way::PeerHolds;
use super::Peer;
use crate::fleet::NodeId;
use crate::telemetry::causes;

/// Ends the holds for a replica with the task that asks it.
struct EndsWithTask<'a>(&'a PeerHolds);

impl Drop for EndsWithTask<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Asks a replica about its holds for as long as this is polled.
pub(super) async fn ask(replicas: Arc<Replicas>, peer: Arc<Peer>) -> Infallible {
    let asking = EndsWithTask(&peer.under_way);
    loop {
        if asking.0.nodes().is_empty() {
            asking.0.wait_until_asked().await;
        }
        ask_until_landed(&replicas, &peer).await;
    }
}

async fn ask_until_landed(replicas: &Replicas, peer: &Peer) {
    let under_way = &peer.under_way;
    let mut heard = Instant::now();
    loop {
        let nodes = under_way.nodes();
        if nodes.is_empty() {
            return;
        }
        match peer.ask_watermarks(replicas, nodes).await {
            Ok(said) => {
                heard = Instant::now();
                under_way.record_watermarks(&said.landed);
            }
            Err(error) if error.has_ended() || heard.elapsed() >= replicas.context.ack_timeout => {
                tracing::warn!(
                    replica = %peer.id, error = %causes(&error),
                    "a replica does not report whether pages that passed it have arrived: nobody waits for them any more"
                );
                under_way.release();
            }
            Err(_) => {}
        }
        let long = under_way.newly_long();
        if !long.is_empty() {
            let nodes: Vec<&str> = long.iter().map(NodeId::as_str).collect();
            tracing::info!(
                replica = %peer.id, ?nodes,
                "a page that purges concern is on its way through another replica: these nodes get no traffic until it has arrived"
            );
        }
        tokio::time::sleep(under_way.pause()).await;
    }
}

#[cfg(test)]
mod tests;
