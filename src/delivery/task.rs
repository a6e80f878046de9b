//! The loop of one delivery.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{BatchResult, Deliveries, DeliveryState, lock};
use crate::fleet::Node;
use crate::journal::{Missed, Position};
use crate::purge::{Ban, compile};
use crate::telemetry::NodeMetrics;
use crate::varnish::http::{Delivered, DeliveryError, Link};

/// How long connecting, or one round trip, may take. Longer than any healthy Varnish needs, and short enough that a
/// node that wakes up from a hang is tried again soon.
const ATTEMPT: Duration = Duration::from_secs(2);

/// The first and the longest pause after a failure; each pause is a random share of a bound that doubles.
const BACK_OFF_FIRST: Duration = Duration::from_millis(50);
const BACK_OFF_LONGEST: Duration = Duration::from_secs(5);

/// The pause after a refusal: somebody has to change a VCL first.
const BACK_OFF_REFUSED: Duration = Duration::from_secs(30);

/// A batch of more bans than this becomes one ban of everything: each ban costs the node a comparison per object.
const MAX_BANS: usize = 200;

/// A round trip that took longer than this came from a node that stood still for a while.
const STALL: Duration = Duration::from_millis(100);

/// How long after its bans a node that stood still gets them again: a Varnish that runs again stores what was waiting
/// in its sockets within this time.
const SECOND_PASS: Duration = Duration::from_millis(250);

/// Brings one node up to the head of the journal, again and again.
pub(super) struct Task {
    deliveries: Arc<Deliveries>,
    node: Arc<Node>,
    state: Arc<DeliveryState>,
    metrics: Arc<NodeMetrics>,
    link: Link,
    failures: u32,
}

impl Task {
    pub(super) fn new(deliveries: Arc<Deliveries>, node: Arc<Node>, state: Arc<DeliveryState>) -> Self {
        let journal = &deliveries.context.journal;
        let stored = journal.cursors().get(node.id()).copied();
        // A cursor ahead of the head is of another journal; a journal without history has promised nothing yet.
        let known = stored.filter(|&cursor| cursor <= journal.head());
        node.live.set_cursor(known.unwrap_or(0));
        state.known.store(known.is_some() || !journal.has_history(), Ordering::SeqCst);
        state.late.store(node.live.cursor() < journal.head(), Ordering::SeqCst);
        let metrics = deliveries.context.metrics.node(node.spec.role, node.id());
        let link = Link::new(node.spec.address, node.spec.send_proxy, ATTEMPT);
        Task { deliveries, node, state, metrics, link, failures: 0 }
    }

    pub(super) async fn run(mut self) {
        let mut head = self.deliveries.context.journal.watch();
        loop {
            let cursor = self.node.live.cursor();
            if head.wait_for(|&head| head > cursor).await.is_err() {
                return; // The journal is closed: the process ends.
            }
            match self.deliver(cursor).await {
                Ok(()) => {
                    self.failures = 0;
                    *lock(&self.state.error) = "".into();
                }
                Err(error) => self.back_off(&error).await,
            }
        }
    }

    /// Brings the node from its cursor to where the journal's head is now.
    async fn deliver(&mut self, cursor: Position) -> Result<(), DeliveryError> {
        let (bans, last) = self.batch(cursor);
        let began = Instant::now();
        let delivered = self.send(&bans).await?;
        let late = self.state.late.load(Ordering::SeqCst);
        if late || self.failures > 0 || began.elapsed() > STALL {
            tokio::time::sleep(SECOND_PASS).await;
            self.send(&bans).await?;
        }
        let Delivered { invalidated, refused } = delivered;
        self.state.remember(BatchResult { last, invalidated, refused });
        self.node.live.set_cursor(last);
        self.state.known.store(true, Ordering::SeqCst);
        self.state.late.store(false, Ordering::SeqCst);
        self.deliveries.progressed();
        if late {
            tracing::info!(node = %self.node.id(), position = last, "node is up to date again");
        }
        Ok(())
    }

    /// What the node misses, and the position it has reached with that.
    fn batch(&self, cursor: Position) -> (Vec<Ban>, Position) {
        let journal = &self.deliveries.context.journal;
        // Read first: what is appended from here on is in the next batch, whether it is in this one or not.
        let head = journal.head();
        if self.state.known.load(Ordering::SeqCst)
            && let Missed::Entries(entries) = journal.since(cursor)
        {
            let spec = &self.node.spec;
            let bans = compile(entries.iter().map(|entry| &entry.purge), spec.delivery, spec.header_limit).bans;
            if bans.len() <= MAX_BANS {
                return (bans, entries.last().map_or(head, |entry| entry.position));
            }
        }
        tracing::warn!(node = %self.node.id(), cursor, head, "what this node missed cannot be replayed: its cache is dropped");
        (vec![Ban::Everything], head)
    }

    async fn send(&mut self, bans: &[Ban]) -> Result<Delivered, DeliveryError> {
        let result = self.link.deliver(bans).await;
        if let Some(varnish) = &self.metrics.varnish {
            match &result {
                Ok(_) => {
                    varnish.delivered.inc();
                    varnish.bans_sent.inc_by(bans.len() as u64);
                }
                Err(DeliveryError::Refused { .. }) => varnish.refused.inc(),
                Err(_) => varnish.failed.inc(),
            }
        }
        result
    }

    /// Waits before the next attempt; a change of the node's health cuts the wait short.
    async fn back_off(&mut self, error: &DeliveryError) {
        let text: Arc<str> = error.to_string().into();
        let told = std::mem::replace(&mut *lock(&self.state.error), Arc::clone(&text));
        if told != text {
            tracing::warn!(node = %self.node.id(), error = &*text, "purges do not reach a node");
        }
        let pause = match error {
            DeliveryError::Refused { .. } => BACK_OFF_REFUSED,
            _ => (BACK_OFF_FIRST * 2_u32.saturating_pow(self.failures.min(16)))
                .min(BACK_OFF_LONGEST)
                .mul_f64(fastrand::f64()),
        };
        self.failures = self.failures.saturating_add(1);
        _ = tokio::time::timeout(pause.max(BACK_OFF_FIRST / 10), self.state.wake.notified()).await;
    }
}
