//! The nodes of the configuration file, as it is now.
//!
//! A node may be given by name, as containers are. A name that does not resolve yet (the container is still starting)
//! is no reason to refuse to start or to hold the others up: it is tried again until it does. Names are looked up side
//! by side, so that the place of a node in the file says nothing about when it is there. A name that has resolved is not
//! looked up again: whoever wants to follow names has `registry.kind = "dns"` for it.
//!
//! The file can change. A node whose table is as it was hears nothing of that; one whose weight changed keeps the
//! address that its name had, so that a new weight is never a new address by accident. Those that are new join before
//! those that are gone leave: a node that was only given another id is in the fleet all the time, under one of them. A
//! node that was given an address that does not resolve stays where it was until it does.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::mpsc::error::SendError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use super::resolve::{RETRY, resolve};
use crate::config::StaticNode;
use crate::fleet::{DEFAULT_HEADER_LIMIT, Event, NodeId, NodeSpec, Role, Source};

/// How many look-ups there are at once: each has a thread.
const AT_ONCE: usize = 16;

/// Announces the nodes and every change of them. Returns when nobody can change them any more, or nobody listens.
pub async fn follow(mut nodes: watch::Receiver<Vec<StaticNode>>, events: mpsc::Sender<Event>) {
    let mut fixed = Fixed { nodes: BTreeMap::new(), events };
    let first = nodes.borrow_and_update().clone();
    if fixed.change_to(first).await.is_err() || fixed.send(Event::Listed(Source::Static)).await.is_err() {
        return;
    }
    loop {
        let outcome = tokio::select! {
            changed = nodes.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = nodes.borrow_and_update().clone();
                fixed.change_to(now).await
            }
            () = tokio::time::sleep(RETRY), if fixed.has_untold() => fixed.tell().await,
        };
        if outcome.is_err() {
            return;
        }
    }
}

type Identity = (Role, NodeId);

/// What was told of the nodes.
struct Fixed {
    nodes: BTreeMap<Identity, Known>,
    events: mpsc::Sender<Event>,
}

/// One node.
struct Known {
    node: StaticNode,
    /// What its name resolved to, or the address that it is.
    address: Option<SocketAddr>,
    told: Told,
}

/// What the fleet knows of a node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    /// What it was before the last change.
    Before,
    Everything,
}

impl Fixed {
    async fn send(&self, event: Event) -> Result<(), SendError<Event>> {
        self.events.send(event).await
    }

    fn has_untold(&self) -> bool {
        self.nodes.values().any(|known| known.told != Told::Everything)
    }

    async fn change_to(&mut self, nodes: Vec<StaticNode>) -> Result<(), SendError<Event>> {
        let nodes: BTreeMap<Identity, StaticNode> =
            nodes.into_iter().map(|node| ((node.role, node.id.clone()), node)).collect();
        let gone: Vec<Identity> =
            self.nodes.keys().filter(|identity| !nodes.contains_key(*identity)).cloned().collect();
        let gone: Vec<Known> = gone.iter().filter_map(|identity| self.nodes.remove(identity)).collect();
        for (identity, node) in nodes {
            match self.nodes.get_mut(&identity) {
                Some(known) => known.change_to(node),
                None => _ = self.nodes.insert(identity, Known::new(node)),
            }
        }
        self.tell().await?;
        for Known { node, .. } in gone.into_iter().filter(|known| known.told != Told::Nothing) {
            self.send(Event::Left(Source::Static, node.role, node.id)).await?;
        }
        Ok(())
    }

    /// Tells of all that was not told yet and has an address, or gets one now.
    async fn tell(&mut self) -> Result<(), SendError<Event>> {
        let mut lookups = JoinSet::new();
        let room = Arc::new(Semaphore::new(AT_ONCE));
        for (identity, known) in &mut self.nodes {
            match known.address {
                Some(address) if known.told != Told::Everything => {
                    self.events.send(Event::Joined(known.spec(address))).await?;
                    known.told = Told::Everything;
                }
                Some(_) => {}
                None => {
                    let (identity, name, room) = (identity.clone(), known.node.address.clone(), Arc::clone(&room));
                    lookups.spawn(async move {
                        // Nobody closes it.
                        let _place = room.acquire().await;
                        (identity, resolve(&name).await)
                    });
                }
            }
        }
        while let Some(ended) = lookups.join_next().await {
            let (identity, outcome) = match ended {
                Ok(outcome) => outcome,
                Err(error) => {
                    tracing::error!(%error, "a look-up panicked; it is tried again");
                    continue;
                }
            };
            // Nobody else changes the nodes meanwhile.
            let Some(known) = self.nodes.get_mut(&identity) else { continue };
            match outcome {
                Ok(address) => {
                    known.address = Some(address);
                    known.told = Told::Everything;
                    self.events.send(Event::Joined(known.spec(address))).await?;
                }
                Err(reason) => {
                    let StaticNode { role, id, address, .. } = &known.node;
                    tracing::warn!(%role, node = %id, address, reason, "node address does not resolve yet");
                }
            }
        }
        Ok(())
    }
}

impl Known {
    fn new(node: StaticNode) -> Self {
        Known { address: node.address.parse().ok(), node, told: Told::Nothing }
    }

    fn change_to(&mut self, node: StaticNode) {
        if self.node == node {
            return;
        }
        if self.node.address != node.address {
            self.address = node.address.parse().ok();
        }
        self.node = node;
        if self.told == Told::Everything {
            self.told = Told::Before;
        }
    }

    fn spec(&self, address: SocketAddr) -> NodeSpec {
        let StaticNode { role, id, weight, delivery, header_limit, send_proxy, headers, .. } = self.node.clone();
        let delivery = delivery.unwrap_or_default();
        let header_limit = header_limit.unwrap_or(DEFAULT_HEADER_LIMIT);
        NodeSpec { weight, delivery, header_limit, send_proxy, headers, ..NodeSpec::new(role, id, address) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{PurgeHeaders, SendProxy};

    /// No name server need be asked to know that there is no such name.
    const UNRESOLVABLE: &str = "a..b:1";

    fn web(id: &str, address: &str, weight: u32) -> StaticNode {
        let id = NodeId::try_from(id).unwrap();
        let (delivery, header_limit, send_proxy) = (None, None, SendProxy::Off);
        let (address, headers) = (address.into(), PurgeHeaders::default());
        StaticNode { role: Role::Web, id, address, weight, delivery, header_limit, send_proxy, headers }
    }

    /// What happens, in words: a join as `id address weight`.
    async fn next(events: &mut mpsc::Receiver<Event>) -> String {
        match events.recv().await.unwrap() {
            Event::Joined(spec) => format!("{} {} {}", spec.id, spec.address, spec.weight),
            Event::Left(Source::Static, _, id) => format!("left {id}"),
            Event::Listed(Source::Static) => "listed".to_owned(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_change_tells_of_what_changed_and_of_nothing_else() {
        let (nodes, followed) = watch::channel(vec![web("a", "127.0.0.1:1", 1), web("b", "127.0.0.1:2", 1)]);
        let (sender, mut events) = mpsc::channel(16);
        let follower = tokio::spawn(follow(followed, sender));
        let mut first = [next(&mut events).await, next(&mut events).await];
        first.sort();
        assert_eq!(first, ["a 127.0.0.1:1 1", "b 127.0.0.1:2 1"]);
        assert_eq!(next(&mut events).await, "listed");

        // Another order, another weight, another address and one more.
        nodes.send_replace(vec![web("c", "127.0.0.1:3", 1), web("b", "127.0.0.1:2", 7), web("a", "127.0.0.1:1", 1)]);
        let mut second = [next(&mut events).await, next(&mut events).await];
        second.sort();
        assert_eq!(second, ["b 127.0.0.1:2 7", "c 127.0.0.1:3 1"]);

        // Under another id: it joins before it leaves.
        nodes.send_replace(vec![web("d", "127.0.0.1:3", 1), web("b", "127.0.0.1:2", 7)]);
        assert_eq!(next(&mut events).await, "d 127.0.0.1:3 1");
        assert_eq!([next(&mut events).await, next(&mut events).await], ["left a", "left c"]);
        drop(nodes);
        follower.await.unwrap();
        assert!(events.recv().await.is_none(), "no more than that");
    }

    #[tokio::test]
    async fn a_name_that_does_not_resolve_holds_nobody_up_and_can_be_taken_back() {
        let unknown = web("a", UNRESOLVABLE, 1);
        let (nodes, followed) = watch::channel(vec![unknown, web("b", "127.0.0.1:2", 1)]);
        let (sender, mut events) = mpsc::channel(16);
        let follower = tokio::spawn(follow(followed, sender));
        assert_eq!([next(&mut events).await, next(&mut events).await], ["b 127.0.0.1:2 1", "listed"]);
        // Nobody was told of it, so nobody is told that it left.
        nodes.send_replace(vec![]);
        assert_eq!(next(&mut events).await, "left b");
        nodes.send_replace(vec![web("a", "127.0.0.1:1", 1)]);
        assert_eq!(next(&mut events).await, "a 127.0.0.1:1 1");
        // What it is now does not resolve: it stays what it was.
        nodes.send_replace(vec![web("a", UNRESOLVABLE, 1)]);
        nodes.send_replace(vec![web("a", "127.0.0.1:4", 1)]);
        assert_eq!(next(&mut events).await, "a 127.0.0.1:4 1");
        drop(nodes);
        follower.await.unwrap();
    }
}
