//! Nodes that are kept back here, because an answer is on its way to them through another replica.
//!
//! Our bans may be at a node before a page that passed another replica's origin, and only that replica knows when the page
//! has landed. When it confirms a purge it says so: where the purge stands in its journal, and up to where pages have landed
//! at each node that it has not reached. A node that is not that far is held back here ([`Hold`]), and the other replica is
//! asked until it is. Whoever holds asks for himself, also a replica that was told to by a third one ([`RedeliveryRequest`]): nobody has
//! to live for a hold to end.
//!
//! **One task for each replica asks, whatever the purges are.** What it asks for is a position that only grows, so any number
//! of purges is one question about a few nodes.
//!
//! **A hold ends** when the pages have landed, when the other replica is gone, and when it has not answered for as long as a
//! purge waits: a replica that hangs must not keep nodes out of everybody's traffic. What lands after that is stored behind
//! our bans.
//!
//! [`RedeliveryRequest`]: super::RedeliveryRequest

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::message::PeerPosition;
use crate::delivery::{Deliveries, Hold};
use crate::fleet::NodeId;
use crate::journal::Position;

/// The pauses between two questions are a quarter of the time for which a node has been held, within these bounds.
pub(super) const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// When a node that is held is worth a word.
const LONG: Duration = Duration::from_secs(2);

/// What is held here for one other replica.
#[derive(Debug, Default)]
pub(super) struct PeerHolds {
    state: Mutex<HoldState>,
    /// Rings when there is something to ask for.
    ring: Notify,
}

#[derive(Debug, Default)]
struct HoldState {
    /// Nobody asks any more.
    is_over: bool,
    /// The process of the other replica that is asked.
    boot: String,
    nodes: BTreeMap<NodeId, Awaited>,
}

/// A node that is held until the other replica says that its pages have landed.
#[derive(Debug)]
struct Awaited {
    /// Up to this position of the other replica's journal.
    place: Position,
    since: Instant,
    is_told: bool,
    hold: Hold,
}

impl PeerHolds {
    /// Holds back what this node acknowledges of the purge at our `position`, until pages have landed there up to `place` of
    /// the other replica's journal. False if the other replica is gone, or there is no such node.
    pub(super) fn hold(
        &self,
        deliveries: &Deliveries,
        node: &NodeId,
        position: Position,
        theirs: &PeerPosition,
    ) -> bool {
        let mut state = self.state.lock();
        if state.is_over {
            return false;
        }
        if state.boot != theirs.boot {
            // What passed the process before has ended with its connections.
            state.nodes.clear();
            state.boot.clone_from(&theirs.boot);
        }
        let place = theirs.position;
        if let Some(awaited) = state.nodes.get_mut(node) {
            awaited.place = awaited.place.max(place);
            awaited.hold.cover(position);
            return true;
        }
        let reason = format!("a page that purges concern is on its way to it through {}", theirs.replica);
        let Some(hold) = deliveries.hold(position, node, reason.into()) else { return false };
        let awaited = Awaited { place, since: Instant::now(), is_told: false, hold };
        state.nodes.insert(node.clone(), awaited);
        self.ring.notify_one();
        true
    }

    /// The other replica says up to where pages have landed there. Nodes of which it says nothing go on to be held.
    pub(super) fn record_watermarks(&self, landed: &BTreeMap<NodeId, Position>) {
        let is_under_way =
            |node: &NodeId, awaited: &mut Awaited| landed.get(node).is_none_or(|landed| *landed < awaited.place);
        self.state.lock().nodes.retain(is_under_way);
    }

    /// The process that has said what is awaited (its `boot`).
    pub(super) fn boot(&self) -> String {
        self.state.lock().boot.clone()
    }

    /// The nodes that are held.
    pub(super) fn nodes(&self) -> Vec<NodeId> {
        self.state.lock().nodes.keys().cloned().collect()
    }

    /// How long to wait before the next question.
    pub(super) fn pause(&self) -> Duration {
        let newest = self.state.lock().nodes.values().map(|awaited| awaited.since).max();
        newest.map_or(Duration::ZERO, |since| since.elapsed() / 4).clamp(PAUSES.0, PAUSES.1)
    }

    /// Nodes that have been held for long, and of which nothing was said yet.
    pub(super) fn newly_long(&self) -> Vec<NodeId> {
        let mut state = self.state.lock();
        let long = state.nodes.iter_mut().filter(|(_, awaited)| awaited.since.elapsed() > LONG && !awaited.is_told);
        let tell = |(node, awaited): (&NodeId, &mut Awaited)| {
            awaited.is_told = true;
            node.clone()
        };
        long.map(tell).collect()
    }

    /// Returns when there is something to ask for.
    pub(super) async fn wait_until_asked(&self) {
        self.ring.notified().await;
    }

    /// Nothing is held any more.
    pub(super) fn release(&self) {
        self.state.lock().nodes.clear();
    }

    /// Nothing is held from now on.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.is_over = true;
        state.nodes.clear();
    }
}
