//! Acknowledgements of a Varnish that do not count, because another replica could not deliver the same purge.
//!
//! A page passes the origin of one replica, and the ban comes from another: if the node reads the ban first, it stores the
//! page after it, and the ban never finds the page. Each replica prevents this for pages that pass itself by sending the
//! bans twice, unless it cannot reach the node. Then the other replicas do it instead: they take back the acknowledgement,
//! send the purge once more after [`FILL_LATENCY`], and count the acknowledgement that follows.
//!
//! If the other replica says that such a page is still in flight, the fill latency has not begun, and only that replica can
//! say when it does. Until then a [`Hold`] keeps the acknowledgement back. A hold ends when its owner drops it, for whatever
//! reason, so that no node is kept out for a replica that no longer exists.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Deliveries;
use super::redelivery::{RedeliveryQueue, RedeliveryRange};
use crate::fleet::{FILL_LATENCY, Live, NodeId};
use crate::journal::Position;

/// Recalls that are due within this time are sent together.
const GRAIN: Duration = Duration::from_millis(25);

/// The recalls of one node.
#[derive(Debug, Default)]
pub(super) struct Recalls {
    state: Mutex<RecallState>,
    /// Notified of a new recall.
    ring: Notify,
}

#[derive(Debug)]
struct RecallState {
    /// The counters of the node. Replaced if the node is registered again.
    live: Arc<Live>,
    /// Ranges to send again.
    waiting: RedeliveryQueue,
    /// Ranges to send again when their holds end, by the number of the hold.
    held: BTreeMap<u64, HeldBack>,
    /// The number of the next hold.
    next: u64,
}

impl Default for RecallState {
    fn default() -> Self {
        let waiting = RedeliveryQueue::new(GRAIN);
        RecallState { live: Arc::default(), waiting, held: BTreeMap::new(), next: 0 }
    }
}

/// The range of one hold: after `after`, up to `last`.
#[derive(Debug)]
struct HeldBack {
    after: Position,
    last: Position,
    reason: Arc<str>,
}

/// Keeps a node's acknowledgements from counting. When it is dropped, the purges are sent once more after [`FILL_LATENCY`],
/// and then count.
#[derive(Debug)]
pub struct Hold {
    recalls: Arc<Recalls>,
    key: u64,
}

impl Hold {
    /// Extends the hold to the purge at this position.
    pub fn cover(&self, position: Position) {
        let mut state = self.recalls.state.lock();
        if let Some(held) = state.held.get_mut(&self.key) {
            (held.after, held.last) = (held.after.min(position.saturating_sub(1)), held.last.max(position));
        }
        state.show();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.recalls.state.lock();
        if let Some(HeldBack { after, last, .. }) = state.held.remove(&self.key) {
            state.push(after, last, Instant::now() + FILL_LATENCY);
            self.recalls.ring.notify_one();
        }
    }
}

impl Recalls {
    /// Applies the recalls to these counters from now on.
    pub(super) fn attach(&self, live: &Arc<Live>) {
        let mut state = self.state.lock();
        state.live = Arc::clone(live);
        state.show();
    }

    /// Takes back the acknowledgement of the purge at this position, and sends it again in `delay` or later.
    pub(super) fn push(&self, position: Position, delay: Duration) {
        self.state.lock().push(position.saturating_sub(1), position, Instant::now() + delay);
        self.ring.notify_one();
    }

    /// Takes back the acknowledgement of the purge at this position, also a future one, until the hold is dropped.
    pub(super) fn hold(self: &Arc<Self>, position: Position, reason: Arc<str>) -> Hold {
        let mut state = self.state.lock();
        let key = state.next;
        state.next += 1;
        state.held.insert(key, HeldBack { after: position.saturating_sub(1), last: position, reason });
        state.show();
        Hold { recalls: Arc::clone(self), key }
    }

    /// Whether a hold covers the purge at this position.
    pub(super) fn is_held_back(&self, position: Position) -> bool {
        self.state.lock().held.values().any(|held| held.after < position)
    }

    /// The reason of a hold, if there is one.
    pub(super) fn held_because(&self) -> Option<Arc<str>> {
        self.state.lock().held.values().next().map(|held| Arc::clone(&held.reason))
    }

    /// Returns when a range is due. Nothing is added to it any more.
    pub(super) async fn due(&self) -> RedeliveryRange {
        loop {
            let first = self.state.lock().waiting.first();
            match first {
                Some(first) if first.due <= Instant::now() => {
                    let mut state = self.state.lock();
                    state.waiting.close();
                    // It may have grown meanwhile.
                    return state.waiting.first().unwrap_or(first);
                }
                Some(first) => tokio::time::sleep_until(first.due.into()).await,
                None => self.ring.notified().await,
            }
        }
    }

    /// Removes the range that was due, after its acknowledgement.
    pub(super) fn complete(&self) {
        let mut state = self.state.lock();
        state.waiting.complete_first(Instant::now());
        state.show();
    }

    /// Moves the due time of the first range.
    pub(super) fn postpone(&self, due: Instant) {
        self.state.lock().waiting.postpone(due);
    }
}

/// The recalls of nodes that left during a hold, until it ends.
#[derive(Debug, Default)]
pub(super) struct Left(Mutex<BTreeMap<NodeId, Weak<Recalls>>>);

impl Left {
    /// The recalls for a node that joins, including holds from before it left.
    pub(super) fn take(&self, node: &NodeId) -> Arc<Recalls> {
        self.0.lock().remove(node).and_then(|left| left.upgrade()).unwrap_or_default()
    }

    /// Keeps the recalls of a node that leaves.
    pub(super) fn keep(&self, node: &NodeId, recalls: &Arc<Recalls>) {
        let mut left = self.0.lock();
        left.retain(|_, recalls| recalls.strong_count() > 0);
        if recalls.held_because().is_some() {
            left.insert(node.clone(), Arc::downgrade(recalls));
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}

impl RecallState {
    fn push(&mut self, after: Position, last: Position, due: Instant) {
        self.waiting.push(after, last, due);
        self.show();
    }

    /// Limits the node's cursor accordingly.
    fn show(&self) {
        let held = self.held.values().map(|held| held.after);
        self.live.recall(self.waiting.after().into_iter().chain(held).min());
    }
}

impl Deliveries {
    /// Has these nodes receive the purge at this position once more before it counts, whether or not they have acknowledged
    /// it: another replica has not reached them, and a page that passed there may be in flight.
    pub fn recall(&self, position: Position, nodes: &[NodeId]) {
        for delivery in nodes.iter().filter_map(|id| self.nodes.get(id)) {
            delivery.state.recalls.push(position, FILL_LATENCY);
        }
    }

    /// Holds back the acknowledgement of the purge at this position while the returned value lives, because another replica
    /// says that a page is in flight to this node. `None` if there is no such node.
    pub fn hold(&self, position: Position, node: &NodeId, reason: Arc<str>) -> Option<Hold> {
        let hold = self.nodes.get(node).map(|delivery| delivery.state.recalls.hold(position, reason));
        // Purges no longer wait for this node.
        self.notify_progress();
        hold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recalls() -> (Arc<Recalls>, Arc<Live>) {
        let (recalls, live) = (Arc::<Recalls>::default(), Arc::<Live>::default());
        recalls.attach(&live);
        (recalls, live)
    }

    #[tokio::test]
    async fn an_acknowledgement_taken_back_counts_again_when_repeated() {
        let (recalls, live) = recalls();
        live.set_cursor(9);
        recalls.push(5, Duration::ZERO);
        recalls.push(7, Duration::ZERO);
        assert_eq!(live.cursor(), 4);
        let due = recalls.due().await;
        assert_eq!((due.after, due.last), (4, 7));
        // A recall during the redelivery does not count with it.
        recalls.push(9, Duration::from_millis(200));
        live.set_cursor(12);
        recalls.complete();
        assert_eq!(live.cursor(), 8);
        let began = Instant::now();
        recalls.due().await;
        assert!(began.elapsed() > Duration::from_millis(100));
        recalls.complete();
        assert_eq!(live.cursor(), 12);
    }

    #[tokio::test]
    async fn a_storm_does_not_put_off_the_first_one() {
        let (recalls, _) = recalls();
        let began = Instant::now();
        for position in 1..20_000 {
            recalls.push(position, Duration::from_millis(100));
        }
        let took = began.elapsed();
        let first = recalls.state.lock().waiting.first().unwrap();
        assert!(first.due <= began + Duration::from_millis(130) + took);
    }

    #[tokio::test]
    async fn what_is_held_counts_when_the_hold_has_ended_and_it_was_repeated() {
        let (recalls, live) = recalls();
        live.set_cursor(6);
        let hold = recalls.hold(7, "a page".into());
        let another = recalls.hold(6, "another page".into());
        assert_eq!((live.cursor(), recalls.held_because().as_deref()), (5, Some("a page")));
        // It receives the purge only now, and one more.
        live.set_cursor(9);
        hold.cover(9);
        drop(another);
        assert_eq!(live.cursor(), 5);
        recalls.due().await;
        recalls.complete();
        assert_eq!(live.cursor(), 6);
        assert!(tokio::time::timeout(FILL_LATENCY * 2, recalls.due()).await.is_err(), "it is told while it is held");
        let ended = Instant::now();
        drop(hold);
        assert_eq!((live.cursor(), recalls.held_because()), (6, None));
        let due = recalls.due().await;
        assert!(ended.elapsed() >= FILL_LATENCY && (due.after, due.last) == (6, 9), "{due:?}");
        recalls.complete();
        assert_eq!(live.cursor(), 9);
    }

    #[tokio::test]
    async fn a_node_that_is_registered_anew_is_still_held() {
        let (recalls, _) = recalls();
        let hold = recalls.hold(7, "a page".into());
        let live = Arc::<Live>::default();
        live.set_cursor(9);
        recalls.attach(&live);
        assert_eq!(live.cursor(), 6);
        drop(hold);
        recalls.due().await;
        recalls.complete();
        assert_eq!(live.cursor(), 9);
    }
}
