//! The nodes of the configuration file.
//!
//! A node may be given by name, as containers are. A name that does not resolve yet (the container is still starting)
//! is no reason to refuse to start or to hold the others up: it is tried again until it does.

use tokio::sync::mpsc;

use super::resolve::{RETRY, resolve};
use crate::config::StaticNode;
use crate::fleet::{DEFAULT_HEADER_LIMIT, Event, NodeSpec, Source};

/// Announces the nodes, then goes on with those whose names did not resolve. Returns when all are announced, or when
/// nobody listens any more.
pub async fn announce(nodes: Vec<StaticNode>, events: mpsc::Sender<Event>) {
    let mut unresolved = announce_once(nodes, &events).await;
    if events.send(Event::Listed(Source::Static)).await.is_err() {
        return;
    }
    while !unresolved.is_empty() && !events.is_closed() {
        tokio::time::sleep(RETRY).await;
        unresolved = announce_once(unresolved, &events).await;
    }
}

/// Returns the nodes whose names did not resolve.
async fn announce_once(nodes: Vec<StaticNode>, events: &mpsc::Sender<Event>) -> Vec<StaticNode> {
    let mut unresolved = Vec::new();
    for node in nodes {
        match resolve(&node.address).await {
            Ok(address) => {
                let StaticNode { role, id, weight, delivery, header_limit, send_proxy, .. } = node;
                let delivery = delivery.unwrap_or_default();
                let header_limit = header_limit.unwrap_or(DEFAULT_HEADER_LIMIT);
                let spec = NodeSpec { weight, delivery, header_limit, send_proxy, ..NodeSpec::new(role, id, address) };
                if events.send(Event::Joined(spec)).await.is_err() {
                    return Vec::new();
                }
            }
            Err(reason) => {
                tracing::warn!(role = %node.role, node = %node.id, address = node.address, reason, "node address does not resolve yet");
                unresolved.push(node);
            }
        }
    }
    unresolved
}
