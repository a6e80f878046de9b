//! The nodes of the current configuration file.
//!
//! A node may be given by name, as containers are. A name that does not resolve yet (the container is still starting)
//! neither prevents the start nor delays other nodes: it is retried until it resolves. Names are looked up
//! concurrently, so that the order of the nodes in the file does not affect when they join.
//!
//! A name that has resolved is looked up [again](super::resolve). With another address it is still the same node: its
//! id is that of the file, and its cursor stays. The new address may belong to another cache; without an epoch this
//! cannot be detected, and the cache gets only the purges after the cursor (see [`VarnishSettings::epoch`](crate::fleet::VarnishSettings::epoch)).
//!
//! When the file changes, a node with an unchanged table is not announced again; one with a changed weight keeps its
//! resolved address, so that a new weight never causes a new address by accident. New nodes join before removed nodes
//! leave: a node with a changed id is in the fleet all the time, under one of them. A node with a changed address keeps
//! the previous one until the new one resolves.

mod names;
mod unresolved;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::mpsc::error::SendError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::resolve::{AT_ONCE, RETRY, Resolve, look_again, system};
use crate::config::StaticNode;
use crate::fleet::{Event, NodeKey, NodeSource, NodeSpec};
use crate::telemetry::causes;
use names::Lookups;
pub use unresolved::{UnresolvedName, UnresolvedNodes};

/// Announces the nodes and every change of them. Returns when the sender of `nodes` or the receiver of the events is
/// gone. `doubted` changes when a node cannot be reached at its address: names are looked up again soon. `unresolved`
/// gets those that have no address yet.
pub async fn follow(
    nodes: watch::Receiver<Vec<StaticNode>>,
    doubted: watch::Receiver<()>,
    events: mpsc::Sender<Event>,
    unresolved: Arc<UnresolvedNodes>,
) {
    follow_by(system(), nodes, doubted, events, unresolved).await;
}

async fn follow_by(
    resolve: Resolve,
    mut nodes: watch::Receiver<Vec<StaticNode>>,
    mut doubted: watch::Receiver<()>,
    events: mpsc::Sender<Event>,
    unresolved: Arc<UnresolvedNodes>,
) {
    let mut fixed = Fixed { nodes: BTreeMap::new(), events, resolve: Arc::clone(&resolve), unresolved };
    let mut lookups = Lookups::new(resolve);
    let first = nodes.borrow_and_update().clone();
    if fixed.change_to(first).await.is_err() || fixed.send(Event::Listed(NodeSource::Static)).await.is_err() {
        return;
    }
    let mut looked = Instant::now();
    loop {
        let has_names = lookups.is_idle() && fixed.nodes.values().any(FixedNode::is_name);
        let outcome = tokio::select! {
            changed = nodes.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = nodes.borrow_and_update().clone();
                fixed.change_to(now).await
            }
            () = tokio::time::sleep(RETRY), if fixed.has_untold() => fixed.tell().await,
            () = look_again(&mut doubted, looked), if has_names => {
                looked = Instant::now();
                lookups.begin(fixed.names());
                Ok(())
            }
            (identity, name, found) = lookups.next() => fixed.found(&identity, &name, found).await,
        };
        if outcome.is_err() {
            return;
        }
    }
}

/// The nodes of the file, and what has been announced of them.
struct Fixed {
    nodes: BTreeMap<NodeKey, FixedNode>,
    events: mpsc::Sender<Event>,
    resolve: Resolve,
    unresolved: Arc<UnresolvedNodes>,
}

/// One node.
struct FixedNode {
    node: StaticNode,
    /// The address that its name resolved to, or the literal address of the file.
    address: Option<SocketAddr>,
    told: Announcement,
    /// The last look-up of its name failed.
    fails: bool,
}

/// How much of a node was announced to the fleet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Announcement {
    Nothing,
    /// Its state before the last change.
    Before,
    Everything,
}

impl Fixed {
    async fn send(&self, event: Event) -> Result<(), SendError<Event>> {
        self.events.send(event).await
    }

    fn has_untold(&self) -> bool {
        self.nodes.values().any(|known| known.told != Announcement::Everything)
    }

    /// The names that have resolved.
    fn names(&self) -> Vec<(NodeKey, String)> {
        let names = self.nodes.iter().filter(|(_, known)| known.is_name());
        names.map(|(identity, known)| (identity.clone(), known.node.address.clone())).collect()
    }

    /// Applies the result of a look-up.
    async fn found(
        &mut self,
        identity: &NodeKey,
        name: &str,
        found: Result<Vec<SocketAddr>, String>,
    ) -> Result<(), SendError<Event>> {
        let Some(known) = self.nodes.get_mut(identity).filter(|known| known.node.address == name) else {
            return Ok(());
        };
        let Some(before) = known.address else { return Ok(()) };
        let (role, id) = identity;
        let addresses = match found {
            Ok(addresses) => addresses,
            Err(reason) => {
                if !std::mem::replace(&mut known.fails, true) {
                    tracing::warn!(%role, node = %id, name, %before, reason, "node address does not resolve any more; it stays as it was");
                }
                return Ok(());
            }
        };
        if std::mem::take(&mut known.fails) {
            tracing::info!(%role, node = %id, name, "node address resolves again");
        }
        let Some(&address) = addresses.first().filter(|_| !addresses.contains(&before)) else { return Ok(()) };
        tracing::info!(%role, node = %id, name, %before, %address, "node has another address");
        known.address = Some(address);
        let spec = known.spec(address);
        self.send(Event::Joined(spec)).await
    }

    async fn change_to(&mut self, nodes: Vec<StaticNode>) -> Result<(), SendError<Event>> {
        let nodes: BTreeMap<NodeKey, StaticNode> =
            nodes.into_iter().map(|node| ((node.role, node.id.clone()), node)).collect();
        let gone: Vec<NodeKey> = self.nodes.keys().filter(|identity| !nodes.contains_key(*identity)).cloned().collect();
        let gone: Vec<FixedNode> = gone.iter().filter_map(|identity| self.nodes.remove(identity)).collect();
        for (identity, node) in nodes {
            match self.nodes.get_mut(&identity) {
                Some(known) => known.change_to(node),
                None => _ = self.nodes.insert(identity, FixedNode::new(node)),
            }
        }
        self.tell().await?;
        for FixedNode { node, .. } in gone.into_iter().filter(|known| known.told != Announcement::Nothing) {
            self.send(Event::Left(NodeSource::Static, node.role, node.id)).await?;
        }
        Ok(())
    }

    /// Announces all nodes that are not announced yet and have an address, or get one now.
    async fn tell(&mut self) -> Result<(), SendError<Event>> {
        let mut lookups = JoinSet::new();
        let room = Arc::new(Semaphore::new(AT_ONCE));
        for (identity, known) in &mut self.nodes {
            match known.address {
                Some(address) if known.told != Announcement::Everything => {
                    self.events.send(Event::Joined(known.spec(address))).await?;
                    known.told = Announcement::Everything;
                }
                Some(_) => {}
                None => {
                    let (identity, name, room) = (identity.clone(), known.node.address.clone(), Arc::clone(&room));
                    let resolve = Arc::clone(&self.resolve);
                    lookups.spawn(async move {
                        // The semaphore is never closed.
                        let _place = room.acquire().await;
                        (identity, resolve(name).await)
                    });
                }
            }
        }
        while let Some(ended) = lookups.join_next().await {
            let (identity, outcome) = match ended {
                Ok(outcome) => outcome,
                Err(error) => {
                    tracing::error!(error = %causes(&error), "a look-up panicked; it is tried again");
                    continue;
                }
            };
            // No other code changes the nodes meanwhile.
            let Some(known) = self.nodes.get_mut(&identity) else { continue };
            match outcome {
                Ok(addresses) => {
                    let Some(&address) = addresses.first() else { continue };
                    known.address = Some(address);
                    known.told = Announcement::Everything;
                    self.events.send(Event::Joined(known.spec(address))).await?;
                }
                Err(reason) => {
                    let StaticNode { role, id, address, .. } = &known.node;
                    tracing::warn!(%role, node = %id, address, reason, "node address does not resolve yet");
                    self.unresolved.add(identity, address.clone(), reason);
                }
            }
        }
        self.unresolved.retain(|identity| self.nodes.get(identity).is_some_and(|known| known.address.is_none()));
        Ok(())
    }
}

impl FixedNode {
    fn new(node: StaticNode) -> Self {
        FixedNode { address: node.address.parse().ok(), node, told: Announcement::Nothing, fails: false }
    }

    /// Whether its address is what a name has resolved to.
    fn is_name(&self) -> bool {
        self.address.is_some() && self.node.address.parse::<SocketAddr>().is_err()
    }

    fn change_to(&mut self, node: StaticNode) {
        if self.node == node {
            return;
        }
        if self.node.address != node.address {
            self.address = node.address.parse().ok();
        }
        self.node = node;
        if self.told == Announcement::Everything {
            self.told = Announcement::Before;
        }
    }

    fn spec(&self, address: SocketAddr) -> NodeSpec {
        self.node.spec(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{NodeId, Role, SecretHeaders, SendProxy};
    use crate::registry::resolve::LOOK_EVERY;

    /// Not a valid name, so that it fails without a name server.
    const UNRESOLVABLE: &str = "a..b:1";

    fn web(id: &str, address: &str, weight: u32) -> StaticNode {
        let id = NodeId::try_from(id).unwrap();
        let (delivery, header_limit, send_proxy) = (None, None, SendProxy::Off);
        let (address, headers) = (address.into(), SecretHeaders::default());
        let (management, management_secret_file) = (None, None);
        let role = Role::Web;
        #[rustfmt::skip]
        let node = StaticNode { role, id, address, weight, zone: None, delivery, header_limit, send_proxy, headers, management, management_secret_file };
        node
    }

    /// The next event as text: a join as `id address weight`.
    async fn next(events: &mut mpsc::Receiver<Event>) -> String {
        match events.recv().await.unwrap() {
            Event::Joined(spec) => format!("{} {} {}", spec.id, spec.address, spec.weight),
            Event::Left(NodeSource::Static, _, id) => format!("left {id}"),
            Event::Listed(NodeSource::Static) => "listed".to_owned(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_change_tells_of_what_changed_and_of_nothing_else() {
        let (nodes, followed) = watch::channel(vec![web("a", "127.0.0.1:1", 1), web("b", "127.0.0.1:2", 1)]);
        let (sender, mut events) = mpsc::channel(16);
        let follower = tokio::spawn(follow(followed, watch::channel(()).1, sender, Arc::default()));
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
        let follower = tokio::spawn(follow(followed, watch::channel(()).1, sender, Arc::default()));
        assert_eq!([next(&mut events).await, next(&mut events).await], ["b 127.0.0.1:2 1", "listed"]);
        // It was never announced, so its departure is not announced either.
        nodes.send_replace(vec![]);
        assert_eq!(next(&mut events).await, "left b");
        nodes.send_replace(vec![web("a", "127.0.0.1:1", 1)]);
        assert_eq!(next(&mut events).await, "a 127.0.0.1:1 1");
        // The new address does not resolve, so the node keeps the previous one.
        nodes.send_replace(vec![web("a", UNRESOLVABLE, 1)]);
        nodes.send_replace(vec![web("a", "127.0.0.1:4", 1)]);
        assert_eq!(next(&mut events).await, "a 127.0.0.1:4 1");
        drop(nodes);
        follower.await.unwrap();
    }

    /// The result of each look-up, set by the test.
    type Zone = Arc<parking_lot::Mutex<Result<Vec<&'static str>, &'static str>>>;

    /// A follower of `a`, by a name in this zone, and of `b`, by its address; with the senders of the nodes and of
    /// doubts.
    fn by_name(zone: &Zone) -> (watch::Sender<Vec<StaticNode>>, watch::Sender<()>, mpsc::Receiver<Event>) {
        let (nodes, followed) = watch::channel(vec![web("a", "shop.test:80", 1), web("b", "127.0.0.1:2", 1)]);
        let (sender, events) = mpsc::channel(16);
        let (zone, (doubted, doubts)) = (Arc::clone(zone), watch::channel(()));
        let resolve: Resolve = Arc::new(move |_| {
            let answer = zone.lock().clone();
            let answer = answer.map(|ips| ips.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 80)).collect());
            Box::pin(async move { answer.map_err(str::to_owned) })
        });
        tokio::spawn(follow_by(resolve, followed, doubts, sender, Arc::default()));
        (nodes, doubted, events)
    }

    async fn begun(events: &mut mpsc::Receiver<Event>) {
        let mut first = [next(events).await, next(events).await, next(events).await];
        first.sort();
        assert_eq!(first, ["a 10.0.0.1:80 1", "b 127.0.0.1:2 1", "listed"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_looked_up_again_and_its_node_keeps_its_id_at_the_new_address() {
        let zone: Zone = Arc::new(parking_lot::Mutex::new(Ok(vec!["10.0.0.1"])));
        let (nodes, _doubted, mut events) = by_name(&zone);
        begun(&mut events).await;
        let began = Instant::now();
        *zone.lock() = Ok(vec!["10.0.0.2"]);
        assert_eq!(next(&mut events).await, "a 10.0.0.2:80 1");
        assert!(began.elapsed() <= LOOK_EVERY + RETRY, "{:?}", began.elapsed());

        // The node keeps the address while the answer contains it, in any order, and while the look-up fails.
        for answer in [Ok(vec!["10.0.0.3", "10.0.0.2"]), Err("away"), Ok(vec!["10.0.0.2", "10.0.0.3"]), Err("away")] {
            *zone.lock() = answer;
            tokio::time::sleep(3 * LOOK_EVERY).await;
            assert!(events.try_recv().is_err());
        }
        *zone.lock() = Ok(vec!["10.0.0.3", "10.0.0.4"]);
        assert_eq!(next(&mut events).await, "a 10.0.0.3:80 1");
        // A new weight does not change the address.
        nodes.send_replace(vec![web("a", "shop.test:80", 7), web("b", "127.0.0.1:2", 1)]);
        assert_eq!(next(&mut events).await, "a 10.0.0.3:80 7");
        tokio::time::sleep(3 * LOOK_EVERY).await;
        assert!(events.try_recv().is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_cannot_be_reached_is_looked_up_soon_and_not_all_the_time() {
        let zone: Zone = Arc::new(parking_lot::Mutex::new(Ok(vec!["10.0.0.1"])));
        let (_nodes, doubted, mut events) = by_name(&zone);
        begun(&mut events).await;
        for ip in ["10.0.0.2", "10.0.0.3"] {
            let began = Instant::now();
            *zone.lock() = Ok(vec![ip]);
            (0..100).for_each(|_| doubted.send_replace(()));
            assert_eq!(next(&mut events).await, format!("a {ip}:80 1"));
            assert!(began.elapsed() <= RETRY, "{:?}", began.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_up_of_a_name_that_the_file_has_no_more_changes_nothing() {
        let zone: Zone = Arc::new(parking_lot::Mutex::new(Ok(vec!["10.0.0.1"])));
        let (nodes, _doubted, mut events) = by_name(&zone);
        begun(&mut events).await;
        nodes.send_replace(vec![web("a", "127.0.0.1:9", 1), web("b", "127.0.0.1:2", 1)]);
        assert_eq!(next(&mut events).await, "a 127.0.0.1:9 1");
        *zone.lock() = Ok(vec!["10.0.0.2"]);
        tokio::time::sleep(3 * LOOK_EVERY).await;
        assert!(events.try_recv().is_err());
    }
}
