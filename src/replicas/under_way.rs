//! Nodes that are held back because a page is in flight to them through another replica.
//!
//! Our bans may reach a node before a page that passed another replica's origin, and only that replica knows when the page
//! has arrived. With its confirmation of a purge it reports the position of the purge in its journal, and the fill watermark
//! of each node that it has not reached. A node whose watermark is lower is held back here ([`Hold`]), and the other replica
//! is asked until the watermark reaches that position. A replica asks for its own holds even if a third replica requested
//! them ([`RedeliveryRequest`]), so no other replica has to live for a hold to end.
//!
//! **One task for each replica asks, for any number of purges.** A watermark only grows, so any number of purges is one
//! question about a few nodes.
//!
//! **A hold ends** when the pages have arrived, when the other replica is gone, or when it has not answered for
//! `ack_timeout`: a replica that hangs must not keep nodes out of all traffic. A page that arrives after that is stored
//! behind our bans.
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

/// The bounds of the pauses between two questions. A pause is a quarter of the time since the newest hold.
pub(super) const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// The time after which a hold is logged.
const LONG: Duration = Duration::from_secs(2);

/// The holds for one other replica.
#[derive(Debug, Default)]
pub(super) struct PeerHolds {
    state: Mutex<HoldState>,
    /// Notified of a new hold.
    ring: Notify,
}

#[derive(Debug, Default)]
struct HoldState {
    /// The task that asks has ended.
    is_over: bool,
    /// The process of the other replica that is asked.
    boot: String,
    nodes: BTreeMap<NodeId, Awaited>,
}

/// A node that is held back until the other replica reports a sufficient watermark.
#[derive(Debug)]
struct Awaited {
    /// The required watermark, a position in the other replica's journal.
    place: Position,
    since: Instant,
    is_logged: bool,
    hold: Hold,
}

impl PeerHolds {
    /// Holds back this node's acknowledgement of the purge at our `position` until the other replica reports a watermark of
    /// at least `theirs`. Returns false if the other replica is gone, or there is no such node.
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
            // Pages that passed the earlier process have ended with its connections.
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
        let awaited = Awaited { place, since: Instant::now(), is_logged: false, hold };
        state.nodes.insert(node.clone(), awaited);
        self.ring.notify_one();
        true
    }

    /// Records the fill watermarks of the other replica. Nodes without one stay held back.
    pub(super) fn record_watermarks(&self, landed: &BTreeMap<NodeId, Position>) {
        let is_under_way =
            |node: &NodeId, awaited: &mut Awaited| landed.get(node).is_none_or(|landed| *landed < awaited.place);
        self.state.lock().nodes.retain(is_under_way);
    }

    /// The `boot` of the process to ask.
    pub(super) fn boot(&self) -> String {
        self.state.lock().boot.clone()
    }

    /// The nodes that are held back.
    pub(super) fn nodes(&self) -> Vec<NodeId> {
        self.state.lock().nodes.keys().cloned().collect()
    }

    /// The pause before the next question.
    pub(super) fn pause(&self) -> Duration {
        let newest = self.state.lock().nodes.values().map(|awaited| awaited.since).max();
        newest.map_or(Duration::ZERO, |since| since.elapsed() / 4).clamp(PAUSES.0, PAUSES.1)
    }

    /// Nodes that have been held back for long and were not logged yet.
    pub(super) fn newly_long(&self) -> Vec<NodeId> {
        let mut state = self.state.lock();
        let long = state.nodes.iter_mut().filter(|(_, awaited)| awaited.since.elapsed() > LONG && !awaited.is_logged);
        let log = |(node, awaited): (&NodeId, &mut Awaited)| {
            awaited.is_logged = true;
            node.clone()
        };
        long.map(log).collect()
    }

    /// Returns when there is something to ask for.
    pub(super) async fn wait_until_asked(&self) {
        self.ring.notified().await;
    }

    pub(super) fn release(&self) {
        self.state.lock().nodes.clear();
    }

    /// Ends all holds, and rejects new ones.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.is_over = true;
        state.nodes.clear();
    }
}
