//! The loop of one delivery.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::budget::Budget;
use super::stretches::{Stretch, Stretches};
use super::{BatchResult, Context, Deliveries, DeliveryState, fingerprint, lock};
use crate::fleet::{LANDING, Node};
use crate::journal::{Missed, Position, Remembered};
use crate::purge::{Ban, Batch as Compiled, Purge, compile};
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

/// How long a cache may have lived before anybody told us that it is a new one.
const NEWS: Duration = Duration::from_secs(10);

/// A batch of more bans than this becomes one ban of everything: each ban costs the node a comparison per object.
const MAX_BANS: usize = 64;

/// The same for requests that are no bans.
const MAX_OTHERS: usize = 1_000;

/// A round trip that took longer than this came from a node that stood still for a while.
const STALL: Duration = Duration::from_millis(100);

/// How long after its bans a node that stood still gets them again: a Varnish that runs again stores what was waiting
/// in its sockets within this time.
const AFTER_STALL: Duration = Duration::from_millis(250);

/// Purges whose repetition is due within this time of each other are repeated together.
const GRAIN: Duration = Duration::from_millis(25);

/// Into how many parts `settle` is cut, for the same reason.
const SETTLE_GRAINS: u32 = 8;

/// Brings one node up to the head of the journal, again and again.
pub(super) struct Task {
    deliveries: Arc<Deliveries>,
    node: Arc<Node>,
    state: Arc<DeliveryState>,
    metrics: Arc<NodeMetrics>,
    link: Link,
    budget: Budget,
    failures: u32,
    /// Whether `told` means anything: nobody knows what the node has of what came before.
    known: bool,
    /// The node was sent every ban up to here. The cursor follows when none of them needs to be repeated.
    told: Position,
    /// Told, and to be repeated before the cursor may pass: a page could have been on its way.
    unsure: Stretches,
    /// Acknowledged, and to be repeated all the same: `purge.settle`.
    settling: Stretches,
}

/// What a stretch of the journal comes to for a node.
struct Batch {
    bans: Vec<Ban>,
    folded: u64,
    /// It cannot be replayed, and is one ban of everything.
    is_flush: bool,
    last: Position,
    /// When a page that they concern passed last.
    last_passed: Option<Instant>,
}

/// What there is to do for a node.
enum Work {
    /// Purges that it was never told of.
    New,
    /// Purges that it must be told of again before they count.
    Repeat(Stretch),
    /// Purges that counted until another replica said that it had not told them.
    Recalled(Stretch),
    /// Purges that count, and are repeated for fetches that we do not see.
    Settle(Stretch),
}

impl Task {
    pub(super) fn new(deliveries: Arc<Deliveries>, node: Arc<Node>, state: Arc<DeliveryState>) -> Self {
        let journal = &deliveries.context.journal;
        let cursor = match journal.remembered(node.id(), node.spec.epoch.as_deref()) {
            // An empty cache, but for what it took in before we heard of it: that much is replayed.
            Remembered::AnotherLife => Some(journal.older_than(NEWS)),
            // A cursor ahead of the head is of another journal.
            Remembered::At(position) => Some(position).filter(|&position| position <= journal.head()),
            Remembered::Nothing => None,
        };
        // A journal without history has promised nothing yet.
        let known = cursor.is_some() || !journal.has_history();
        state.known.store(known, Ordering::SeqCst);
        let cursor = cursor.unwrap_or(0);
        node.live.set_cursor(cursor);
        state.late.store(cursor < journal.head(), Ordering::SeqCst);
        let metrics = deliveries.context.metrics.node(node.spec.role, node.id());
        let link = Link::new(node.spec.address, node.spec.send_proxy, ATTEMPT);
        let pace = deliveries.context.pace;
        let budget = Budget::new(pace.max_bans_per_second, pace.longest_wait, Instant::now());
        let mut settling = Stretches::new(pace.settle / SETTLE_GRAINS);
        let young = journal.older_than(pace.settle);
        if !pace.settle.is_zero() && young < cursor {
            // Who acknowledged these was another process, and may not have lived to repeat them.
            settling.push(young, cursor, Instant::now() + pace.settle);
        }
        let (unsure, told) = (Stretches::new(GRAIN), cursor);
        Task { deliveries, node, state, metrics, link, budget, failures: 0, known, told, unsure, settling }
    }

    pub(super) async fn run(mut self) {
        let mut head = self.deliveries.context.journal.watch();
        while let Some(work) = self.next(&mut head).await {
            match self.carry_out(work).await {
                Ok(()) => {
                    self.failures = 0;
                    *lock(&self.state.error) = "".into();
                }
                Err(error) => {
                    // Whatever the node was told without an acknowledgement, it is told again.
                    self.known = self.state.known.load(Ordering::SeqCst);
                    self.told = self.node.live.cursor();
                    self.unsure.clear();
                    self.back_off(&error).await;
                }
            }
        }
    }

    /// Waits for something to do. `None` where the journal is closed: the process ends.
    async fn next(&mut self, head: &mut watch::Receiver<Position>) -> Option<Work> {
        let ready = self.budget.ready_at(Instant::now());
        let (unsure, settle) = (self.unsure.first(), self.settling.first());
        let moved = async {
            let moved = head.wait_for(|&head| head > self.told).await.is_ok();
            // Here purges gather.
            tokio::time::sleep_until(ready.into()).await;
            moved
        };
        tokio::select! {
            biased;
            stretch = due(unsure) => Some(Work::Repeat(stretch)),
            stretch = self.state.recalls.due() => Some(Work::Recalled(stretch)),
            moved = moved => moved.then_some(Work::New),
            stretch = due(settle.map(|settle| Stretch { due: settle.due.max(ready), ..settle })) => {
                Some(Work::Settle(stretch))
            }
        }
    }

    async fn carry_out(&mut self, work: Work) -> Result<(), DeliveryError> {
        match work {
            Work::New => {
                let repeat = self.tell_new().await?;
                if repeat.is_none() && self.unsure.first().is_none() {
                    self.acknowledged(self.told);
                }
            }
            Work::Repeat(stretch) => {
                let began = Instant::now();
                // Not rationed: Varnish drops the first of two equal bans (its parameter `ban_dups`).
                let batch = self.batch(stretch.after, stretch.last);
                self.send(&batch.bans).await?;
                if began.elapsed() > STALL {
                    self.unsure.postpone(Instant::now() + AFTER_STALL);
                } else {
                    self.unsure.done();
                    self.acknowledged(stretch.last);
                }
            }
            Work::Recalled(stretch) => {
                let began = Instant::now();
                let batch = self.batch(stretch.after, stretch.last);
                self.send(&batch.bans).await?;
                if began.elapsed() > STALL {
                    self.state.recalls.postpone(Instant::now() + AFTER_STALL);
                } else {
                    self.state.recalls.done(&self.node.live, stretch);
                    self.deliveries.progressed();
                }
            }
            Work::Settle(stretch) => {
                let batch = self.batch(stretch.after, stretch.last);
                self.spend(&batch.bans);
                self.send(&batch.bans).await?;
                self.settling.done();
            }
        }
        Ok(())
    }

    /// Sends what the node was never sent. Returns when that has to be repeated before it counts.
    async fn tell_new(&mut self) -> Result<Option<Instant>, DeliveryError> {
        let batch = self.batch(self.told, Position::MAX);
        // What passed before this process was there is not known, so its start counts as such a time.
        let started = self.deliveries.context.started;
        let passed = batch.last_passed.map_or(Duration::ZERO, |at| at.saturating_duration_since(started));
        let on_their_way = passed >= self.node.live.life_signs.taken_in();
        self.spend(&batch.bans);
        let began = Instant::now();
        let Delivered { invalidated, refused } = self.send(&batch.bans).await?;
        let refused = refused.iter().map(|(forward, status)| (fingerprint(forward), *status)).collect();
        self.state.remember(BatchResult { last: batch.last, invalidated, refused });
        let now = Instant::now();
        let stood_still = self.failures > 0 || self.state.late.load(Ordering::SeqCst) || now - began > STALL;
        let repeat = match (stood_still, on_their_way) {
            (true, _) => Some(now + AFTER_STALL),
            (false, true) => Some(now + LANDING),
            // What follows a stretch that waits cannot count before it does, and may as well be repeated with it.
            (false, false) => self.unsure.first().map(|_| now),
        };
        self.deliveries.context.metrics.purge.tags_folded.inc_by(batch.folded);
        if batch.is_flush {
            let (after, last) = (self.told, batch.last);
            tracing::warn!(node = %self.node.id(), after, last, "what this node missed cannot be replayed: its cache is dropped");
            if let Some(varnish) = &self.metrics.varnish {
                varnish.flushed.inc();
            }
        }
        if let Some(due) = repeat {
            self.unsure.push(self.told, batch.last, due);
        }
        (self.known, self.told) = (true, batch.last);
        Ok(repeat)
    }

    /// The node has every purge up to here.
    fn acknowledged(&mut self, position: Position) {
        let Context { fence, slow_start, .. } = &self.deliveries.context;
        let (before, fence) = (self.node.live.cursor(), fence.position());
        if before < fence && fence <= position {
            slow_start.begin(&self.node);
        }
        self.node.live.set_cursor(position);
        self.state.known.store(true, Ordering::SeqCst);
        let late = self.state.late.swap(false, Ordering::SeqCst);
        self.deliveries.progressed();
        let settle = self.deliveries.context.pace.settle;
        if !settle.is_zero() {
            self.settling.push(before, position, Instant::now() + settle);
        }
        if late {
            tracing::info!(node = %self.node.id(), position, "node is up to date again");
        }
    }

    /// What follows `after` in the journal up to `last`, or up to its head.
    fn batch(&self, after: Position, last: Position) -> Batch {
        let Context { journal, guard, .. } = &self.deliveries.context;
        // Read first: what is appended from here on is in the next batch, whether it is in this one or not.
        let last = journal.head().min(last);
        let spec = &self.node.spec;
        if self.known
            && let Missed::Entries(mut entries) = journal.since(after)
        {
            entries.truncate(entries.partition_point(|entry| entry.position <= last));
            let purges = || entries.iter().map(|entry| &entry.purge);
            let Compiled { bans, folded } = compile(purges(), spec.delivery, spec.header_limit);
            let listed = listed(&bans);
            if listed <= MAX_BANS && bans.len() - listed <= MAX_OTHERS {
                let last_passed = purges().filter_map(|purge| guard.last_passed(purge)).max();
                return Batch { bans, folded, is_flush: false, last, last_passed };
            }
        }
        Batch {
            bans: vec![Ban::Everything],
            folded: 0,
            is_flush: true,
            last,
            last_passed: guard.last_passed(&Purge::everything()),
        }
    }

    /// What is no ban is not rationed.
    fn spend(&mut self, bans: &[Ban]) {
        self.budget.spend(listed(bans), Instant::now());
    }

    async fn send(&mut self, bans: &[Ban]) -> Result<Delivered, DeliveryError> {
        let began = Instant::now();
        let result = self.link.deliver(bans).await;
        if result.is_ok() {
            self.deliveries.answered(&self.node, began, began.elapsed());
        }
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

/// How many of them are bans.
fn listed(bans: &[Ban]) -> usize {
    bans.iter().filter(|ban| ban.is_listed()).count()
}

/// Waits until a stretch is due; for ever where there is none.
async fn due(stretch: Option<Stretch>) -> Stretch {
    match stretch {
        Some(stretch) => {
            tokio::time::sleep_until(stretch.due.into()).await;
            stretch
        }
        None => std::future::pending().await,
    }
}
