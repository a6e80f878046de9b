//! The fill watermark of each node, for other replicas that ask.
//!
//! Other replicas send their bans over their own connections, and a ban may reach a node before a page that passes here.
//! They need a position ([`FillWatermark`]) such that no page in flight here is concerned by a purge up to it. The watermark
//! only grows, and does not depend on our own bans: even a node that we cannot reach may have received all its pages.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::pending_fills::{POLL, PendingFills};
use super::{Deliveries, DeliveryContext};
use crate::fleet::{NodeId, Snapshot};
use crate::journal::Position;

/// The position up to which no page in flight here is concerned by a purge. Updated only on request.
#[derive(Debug, Default)]
pub(super) struct FillWatermark {
    up_to: Position,
    /// The pages that are awaited before the watermark can move to this position.
    next: Option<(Position, PendingFills)>,
    /// The time of the last update.
    looked: Option<Instant>,
}

impl FillWatermark {
    /// A watermark at this position.
    pub(super) fn new(up_to: Position) -> Self {
        FillWatermark { up_to, ..FillWatermark::default() }
    }

    /// Updates the watermark and returns it. `node` is the address of a node that has `acknowledged` every purge up to that
    /// position; without an address, pages to any address count.
    fn look(
        &mut self,
        context: &DeliveryContext,
        (node, acknowledged): (Option<IpAddr>, Position),
        fleet: &Snapshot,
        now: Instant,
    ) -> Position {
        let DeliveryContext { journal, guard, .. } = context;
        // A node acknowledges only after the pages in flight have arrived.
        self.up_to = self.up_to.max(acknowledged);
        self.next.take_if(|(last, _)| *last <= acknowledged);
        let head = journal.head();
        while self.up_to < head {
            let up_to = self.up_to;
            let (last, fills) = self.next.get_or_insert_with(|| {
                self.looked = None;
                // Whoever asks may wait for purges that are sealed here.
                (head, PendingFills::new(&**journal, (up_to, head), |_| false, now))
            });
            // At most once per interval, however many ask.
            if self.looked.is_some_and(|looked| now < looked + POLL) {
                break;
            }
            self.looked = Some(now);
            if !fills.have_arrived(guard, node, fleet, now) {
                break;
            }
            self.up_to = *last;
            self.next = None;
        }
        self.up_to
    }
}

impl Deliveries {
    /// The fill watermarks of these nodes, for pages that passed here. For an unknown node, pages to any address count.
    pub fn fill_watermarks<'n>(&self, nodes: impl IntoIterator<Item = &'n NodeId>) -> BTreeMap<NodeId, Position> {
        let (fleet, now) = (self.context.fleet.load(), Instant::now());
        let of = |id: &NodeId| {
            let known = self.nodes.get(id).map(|delivery| (Arc::clone(&delivery.state), Arc::clone(&delivery.node)));
            let Some((state, node)) = known else {
                return self.watermark.lock().look(&self.context, (None, 0), &fleet, now);
            };
            let asked = (Some(node.spec.address.ip()), node.live.acknowledged());
            state.watermark.lock().look(&self.context, asked, &fleet, now)
        };
        nodes.into_iter().map(|id| (id.clone(), of(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::delivery::{Pace, noted_by};
    use crate::fleet::Fence;
    use crate::journal::{Journal, Limits, Memory};
    use crate::purge::{Guard, Page, Passage, Purge, SocketPair, Target};

    const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    struct Rig {
        context: DeliveryContext,
        watermark: FillWatermark,
        began: Instant,
        ms: AtomicU64,
    }

    impl Rig {
        fn new() -> Self {
            let began = Instant::now();
            let guard = Arc::new(Guard::new(began));
            let journal: Arc<dyn Journal> = Arc::new(Memory::new(Limits::default(), noted_by(&guard)));
            let context = DeliveryContext {
                fence: Arc::new(Fence::at(0)),
                journal,
                fleet: Arc::default(),
                guard,
                metrics: Arc::new(crate::telemetry::Metrics::new().unwrap()),
                tracer: None,
                slow_start: Arc::new(crate::slow_start::SlowStart::new(&crate::config::HealthChecks::default())),
                pace: Pace { max_bans_per_second: None, longest_wait: Duration::ZERO, redelivery_delay: None },
                sealed: None,
                has_trials: true,
                started: began,
            };
            Rig { context, watermark: FillWatermark::new(0), began, ms: AtomicU64::new(1) }
        }

        /// A later moment, by more than the interval between two looks.
        fn now(&self) -> Instant {
            self.began + Duration::from_millis(self.ms.fetch_add(20, Ordering::SeqCst))
        }

        async fn purge(&self, tag: &str) -> Position {
            let targets = vec![Target::Tags([tag].into_iter().collect())];
            self.context.journal.append(Purge { targets, soft: false }).await.unwrap()
        }

        /// A page with this tag begins to pass to this address.
        fn pass(&self, to: IpAddr, tag: &str) -> Passage {
            let guard = &self.context.guard;
            let passage = guard.connected(SocketPair { ours: (NODE, 80).into(), theirs: (to, 1000).into() });
            let fields = [(&b"X-Magento-Tags"[..], tag.as_bytes())].into_iter();
            let page = Page { status: 200, target: b"/", fields };
            assert!(passage.may_be_stored(guard.now(), &page, self.now()));
            passage
        }

        fn look(&mut self, acknowledged: Position) -> Position {
            let now = self.now();
            self.watermark.look(&self.context, (Some(NODE), acknowledged), &Snapshot::default(), now)
        }
    }

    #[tokio::test]
    async fn it_follows_the_head_up_to_a_purge_whose_page_is_under_way() {
        let mut rig = Rig::new();
        let passage = rig.pass(NODE, "a");
        let first = rig.purge("b").await;
        assert_eq!(rig.look(0), first);
        let held = rig.purge("a").await;
        let behind = rig.purge("b").await;
        assert_eq!((rig.look(0), rig.look(0)), (first, first));
        // A page that passes later is checked against this purge, but not against the next one.
        let later = rig.pass(NODE, "a");
        assert!(held < behind && rig.look(0) == first);
        passage.taken(rig.now());
        assert_eq!(rig.look(0), behind);
        let last = rig.purge("a").await;
        assert_eq!(rig.look(0), behind);
        drop(later);
        assert_eq!(rig.look(0), last);
    }

    #[tokio::test]
    async fn what_the_node_has_acknowledged_has_landed() {
        let mut rig = Rig::new();
        let _passage = rig.pass(NODE, "a");
        let held = rig.purge("a").await;
        assert_eq!((rig.look(0), rig.look(held)), (0, held));
        let next = rig.purge("b").await;
        assert_eq!(rig.look(held), next);
    }

    #[tokio::test]
    async fn of_a_node_that_nobody_knows_any_page_counts() {
        let rig = Rig::new();
        let unknown = [NodeId::try_from("unknown").unwrap()];
        let deliveries = Deliveries::new(rig.context.clone());
        let passage = rig.pass("10.0.0.77".parse().unwrap(), "a");
        let held = rig.purge("a").await;
        assert_eq!(deliveries.fill_watermarks(&unknown)[&unknown[0]], 0);
        drop(passage);
        tokio::time::sleep(POLL * 2).await;
        assert_eq!(deliveries.fill_watermarks(&unknown)[&unknown[0]], held);
    }

    #[tokio::test]
    async fn however_many_ask_it_looks_now_and_then() {
        let mut rig = Rig::new();
        let passage = rig.pass(NODE, "a");
        let held = rig.purge("a").await;
        let now = rig.now();
        let mut look = |now| rig.watermark.look(&rig.context, (Some(NODE), 0), &Snapshot::default(), now);
        assert_eq!(look(now), 0);
        drop(passage);
        assert_eq!((look(now + POLL / 2), look(now + POLL)), (0, held));
    }
}
