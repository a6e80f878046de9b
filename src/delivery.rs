//! The cursor task of each Varnish: it brings its node from where it is to the head of the journal, again and again.
//!
//! ```text
//! loop: wait until head > cursor
//!       walk from cursor to head:  connect, compile the next batch, send it
//!       all of it answered -> cursor = head;  the node is at fault -> back off, go on with what is left
//! ```
//!
//! No task knows of another, so a node that hangs delays nobody. Nothing is queued: what a node misses is the
//! difference of two numbers ([`walk`]). A node that cannot be reached costs a connection attempt, whatever it misses, and
//! what takes long to compile is compiled on a thread of its own.
//!
//! **One purge takes no node out of service.** What was answered is done, and what fails is tried alone until it is known
//! who is to blame, the node or the request ([`dispatch`]).
//!
//! **A flush is believed as far as it goes.** What cannot be replayed becomes one ban of everything, which most VCLs carry
//! out for pages with tags and pools only. A node that may have missed the purge of another page ([`requests`]) is current
//! by it only if its VCL says that all was dropped; else it stays out, and says why.
//!
//! **A page that is on its way is told of twice.** The guard of the origin marks pages that were rendered before a purge
//! and pass after it. A page that passed just before may still be in the socket of a Varnish: when that reads the ban
//! first, it stores the page after it, where no ban finds it any more. The guard knows when a page of these tags passed
//! last, so the same bans go out again a moment later ([`FILL_LATENCY`](crate::fleet::FILL_LATENCY)), and only then does the cursor
//! move. Where a page is known to be under way still, they go out when it has arrived ([`pending_fills`]). For a node that may
//! have stood still, "just before" is as long ago as it was seen to run ([`LifeSigns`](crate::fleet::LifeSigns)).
//!
//! **Bans are rationed** (`purge.max_bans_per_second`, [`budget`]): above it purges gather for longer, and are told as
//! one batch. **`purge.settle`** repeats what was acknowledged a fixed time later, for a Varnish that fetches past the
//! guard.
//!
//! **Who is waited for.** A purge is answered without a node that let another one wait in vain: it is *late*, until
//! it has taken all it missed. From then on it is waited for again, though the fence is still ahead of it by the
//! purges that were answered meanwhile. Otherwise the fence would run away from it with every further purge, and in a
//! storm no node that was fenced once would ever come back. A node that is held back for another replica ([`Hold`]) is not
//! waited for either: nothing that it acknowledges helps.

mod answers;
mod budget;
mod dispatch;
mod expected;
mod fill_watermark;
mod keep_up;
mod pending_fills;
mod recalls;
mod redelivery;
mod refusal;
mod requests;
mod task;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::awaited::{Lateness, Progress};
use crate::config::PurgeListener;
use crate::fleet::{Fence, Health, Member, Node, NodeId, Snapshot, VarnishSettings};
use crate::journal::{Cursor, Journal, Missed, Position, PurgeObserver};
use crate::purge::{Guard, Purge};
use crate::slow_start::SlowStart;
use crate::telemetry::{Metrics, causes};
pub use expected::Expected;
use fill_watermark::FillWatermark;
pub use recalls::Hold;
use recalls::{Left, Recalls};
pub use refusal::{Refusable, Refusals};
use requests::Requests;

/// Lets this guard take note of each purge of a journal, before any delivery can see it.
pub fn noted_by(guard: &Arc<Guard>) -> PurgeObserver {
    let guard = Arc::clone(guard);
    Arc::new(move |entry| guard.note(&entry.purge))
}

/// What every delivery works with.
#[derive(Clone)]
pub struct DeliveryContext {
    /// What is to be delivered.
    pub journal: Arc<dyn Journal>,
    /// What was promised.
    pub fence: Arc<Fence>,
    /// Who is in the fleet.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// Which pages passed lately.
    pub guard: Arc<Guard>,
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
    /// For nodes that were behind and are not any more.
    pub slow_start: Arc<SlowStart>,
    /// How fast, and how often.
    pub pace: Pace,
    /// When the process started.
    pub started: Instant,
}

/// How purges are told, as configured.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Bans per second for one Varnish, if they are limited. Beyond it purges gather.
    pub max_bans_per_second: Option<NonZeroU32>,
    /// The longest time for which purges gather.
    pub longest_wait: Duration,
    /// The delay after its acknowledgement with which a purge is sent once more, if it is.
    pub redelivery_delay: Option<Duration>,
}

impl Pace {
    /// As configured.
    pub fn new(config: &PurgeListener) -> Self {
        let PurgeListener { max_bans_per_second, settle, ack_timeout, .. } = *config;
        Pace {
            max_bans_per_second: NonZeroU32::new(max_bans_per_second),
            longest_wait: ack_timeout / 4,
            redelivery_delay: (!settle.is_zero()).then_some(settle),
        }
    }
}

/// The deliveries of all Varnish nodes.
pub struct Deliveries {
    context: DeliveryContext,
    nodes: DashMap<NodeId, Delivery>,
    requests: Mutex<Requests>,
    progress: Progress,
    /// The recalls of nodes that left while something was held, for when they come back.
    left: Left,
    /// The head when nothing had passed yet in this process.
    first: Position,
    /// Up to where pages have landed, whoever they are for.
    watermark: Mutex<FillWatermark>,
    /// Rings when a purge is refused to its sender.
    refusals: watch::Sender<()>,
}

/// The delivery of one Varnish, as others see it.
struct Delivery {
    node: Arc<Node>,
    state: Arc<DeliveryState>,
    task: AbortHandle,
}

/// What a delivery task tells.
#[derive(Debug, Default)]
struct DeliveryState {
    /// Rings when the node may be worth trying before its back-off is over.
    wake: Notify,
    /// The cursor says where the node is. Until then not even the journal knows it: the node gets a ban of everything
    /// before anything else.
    known: AtomicBool,
    /// It missed purges, and has not yet shown that it can take them.
    late: Lateness,
    /// The last position of each batch that a purge may have been in that is waited for, and how many objects the node
    /// said it dropped.
    results: Mutex<VecDeque<(Position, u64)>>,
    /// What it has to be told once more because another replica could not.
    recalls: Arc<Recalls>,
    /// Up to where pages for it have landed that passed here.
    watermark: Mutex<FillWatermark>,
    error: Mutex<Option<Arc<str>>>,
}

/// How a purge ended, for its answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// The nodes that have applied it.
    pub applied: Vec<NodeId>,
    /// The nodes that have not, and get no traffic until they have.
    pub fenced: Vec<NodeId>,
    /// The objects that nodes said they dropped.
    pub invalidated: u64,
    /// Nodes that do not take this very request though they obey others, and why.
    pub refused: Refusals,
    /// No node has taken or refused this very request in time: nobody knows whether any does.
    pub is_untaken: bool,
}

impl Acknowledged {
    /// Another replica has not reached this node.
    pub fn miss(&mut self, node: &NodeId) {
        self.applied.retain(|id| id != node);
        if !self.fenced.contains(node) {
            self.fenced.push(node.clone());
        }
    }
}

impl Deliveries {
    /// No deliveries yet.
    pub fn new(context: DeliveryContext) -> Self {
        let first = context.journal.head();
        let mut requests = Requests::default();
        if let Missed::Entries(entries) = context.journal.since(context.journal.floor()) {
            requests.note_past(&entries, |position| context.journal.is_refused(position));
        }
        Deliveries {
            context,
            nodes: DashMap::new(),
            requests: Mutex::new(requests),
            progress: Progress::default(),
            refusals: watch::channel(()).0,
            left: Left::default(),
            first,
            watermark: Mutex::new(FillWatermark::new(first)),
        }
    }

    /// Starts the task of a node that joined. Its cursor is read before this returns, so that no request meets a node
    /// whose cursor is not known.
    pub fn start(self: &Arc<Self>, node: &Arc<Node>, settings: &VarnishSettings) {
        let recalls = self.left.take(node.id());
        recalls.attach(&node.live);
        let watermark = Mutex::new(FillWatermark::new(self.first));
        let state = Arc::new(DeliveryState { recalls, watermark, ..DeliveryState::default() });
        let task = task::Task::new(Arc::clone(self), Arc::clone(node), settings, Arc::clone(&state));
        let task = tokio::spawn(task.run()).abort_handle();
        self.nodes.insert(node.id().clone(), Delivery { node: Arc::clone(node), state, task });
    }

    /// Stops the task of a node that left. Its cursor stays in the journal.
    pub fn stop(&self, id: &NodeId) {
        if let Some((_, Delivery { state, task, .. })) = self.nodes.remove(id) {
            task.abort();
            self.left.keep(id, &state.recalls);
        }
    }

    /// Has the guard mark pages of these purges from now on. To be done when they are heard of; the journal does it again when
    /// it has them.
    pub fn guard_against<'p>(&self, purges: impl Iterator<Item = &'p Purge>) {
        purges.for_each(|purge| self.context.guard.note(purge));
    }

    /// The node has answered a health check that was asked at this time, and took so long.
    pub fn record_health_check(&self, node: &Node, asked: Instant, took: Duration) {
        node.live.life_signs.record_round_trip(asked.saturating_duration_since(self.context.started), took);
    }

    /// A node came up or went down: what it misses may be worth another try now.
    pub fn health_changed(&self, id: &NodeId) {
        if let Some(delivery) = self.nodes.get(id) {
            delivery.state.wake.notify_one();
        }
    }

    /// Something changed that a waiting purge may depend on: a cursor moved, a node came or went.
    pub fn notify_progress(&self) {
        self.progress.notify();
    }

    /// Why the last batch of a node failed, or why its acknowledgements are held back.
    pub fn error(&self, id: &NodeId) -> Option<Arc<str>> {
        let state = Arc::clone(&self.nodes.get(id)?.state);
        let error = state.error.lock().clone();
        error.or_else(|| state.recalls.held_because())
    }

    /// Begins to wait for a purge that is about to be accepted. What nodes report from now on is kept for it.
    pub fn expect(&self) -> Expected<'_> {
        Expected::new(self)
    }

    /// No purge is waited for that is not after this position.
    fn expected(&self) -> Option<Position> {
        self.requests.lock().expected()
    }

    /// Waits until every Varnish that could be waited for has this purge, at most for `timeout`, and promises nothing yet.
    /// Says who has it, and who has not.
    pub async fn reached(&self, position: Position, timeout: Duration) -> (Vec<NodeId>, Vec<NodeId>) {
        self.wait_for(position, timeout).await;
        let fleet = self.context.fleet.load();
        let members = fleet.varnish.members().iter();
        let (has, misses): (Vec<_>, Vec<_>) = members.partition(|member| member.node.live.cursor() >= position);
        let ids = |members: Vec<&Member>| members.into_iter().map(|member| member.node.id().clone()).collect();
        (ids(has), ids(misses))
    }

    /// The position up to which every Varnish of which anything is known has every purge that is held. One of which nothing
    /// is known is emptied before it serves, and so is one that was away for longer than anything is held.
    pub fn least_cursor(&self) -> Position {
        let journal = &self.context.journal;
        let fleet = self.context.fleet.load();
        let away = journal.cursors().into_iter().filter(|(id, _)| fleet.varnish.get(id).is_none());
        let least = self.cursors().into_iter().chain(away).map(|(_, cursor)| cursor.position).min();
        least.unwrap_or_else(|| journal.head()).max(journal.floor())
    }

    /// What is in the journal counts as answered, whoever answered it.
    pub fn fence_everything(&self) {
        self.context.fence.raise(self.context.journal.head());
    }

    async fn await_acknowledgements(&self, position: Position, timeout: Duration) {
        self.wait_for(position, timeout).await;
        // Timed out or not: who has the purge is read below, for the fence and for the answer.
        let before = self.context.fence.raise(position);
        for member in self.context.fleet.load().varnish.members() {
            // Once a fall, not once a purge.
            if (before..position).contains(&member.node.live.cursor()) {
                tracing::warn!(node = %member.node.id(), position, "node is behind: no traffic until it has every purge");
            }
        }
    }

    /// Whoever lets this one wait in vain is late.
    async fn wait_for(&self, position: Position, timeout: Duration) {
        let awaited = self.worth_waiting_for(position);
        let is_settled = |node: &Arc<Node>| self.is_settled(node, position);
        self.progress.wait_for(&awaited, timeout, is_settled, |node| self.mark_late(node)).await;
    }

    /// Nobody waits for nodes that are down, nor for those that are late or held back: they get no traffic anyway.
    fn worth_waiting_for(&self, position: Position) -> Vec<Arc<Node>> {
        let fleet = self.context.fleet.load();
        let is_no_use = |node: &Node| self.is_late(node) || self.is_held_back(node, position);
        let members = fleet.varnish.members().iter();
        let awaited = members.filter(|member| member.health != Health::Down && !is_no_use(&member.node));
        awaited.map(|member| Arc::clone(&member.node)).collect()
    }

    /// Whether there is nothing more to wait for: the node has the purge, or is down, gone, late already, or held back.
    fn is_settled(&self, node: &Node, position: Position) -> bool {
        if node.live.cursor() >= position || self.is_late(node) || self.is_held_back(node, position) {
            return true;
        }
        let fleet = self.context.fleet.load();
        let member = fleet.varnish.get(node.id()).filter(|member| member.node.endpoint_id == node.endpoint_id);
        member.is_none_or(|member| member.health == Health::Down)
    }

    /// A node that is current is not late, whatever it was.
    fn is_late(&self, node: &Node) -> bool {
        let late = self.nodes.get(node.id()).is_some_and(|delivery| delivery.state.late.is_late());
        late && !self.context.fence.is_current(&node.live)
    }

    /// However long that takes, whoever asks for the end of it does not hurry for a purge.
    fn is_held_back(&self, node: &Node, position: Position) -> bool {
        self.nodes.get(node.id()).is_some_and(|delivery| delivery.state.recalls.is_held_back(position))
    }

    fn mark_late(&self, node: &Node) {
        if let Some(delivery) = self.nodes.get(node.id()) {
            delivery.state.late.mark_late();
        }
    }

    fn count_fenced(&self, id: &NodeId) {
        if let Some(varnish) = &self.context.metrics.node(crate::fleet::Role::Varnish, id).varnish {
            varnish.fenced.inc();
        }
    }

    /// Saves every cursor until the process ends, at most once a second, and once a minute also without a change: a
    /// cursor that is not renewed is forgotten after the journal's retention.
    pub async fn save_cursors(&self) {
        let (mut saved, mut told) = (Vec::new(), false);
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        for tick in 0_u64.. {
            ticks.tick().await;
            let cursors = self.cursors();
            if cursors == saved && tick % 60 != 0 {
                continue;
            }
            match self.context.journal.save_cursors(cursors.clone()).await {
                Ok(()) => (saved, told) = (cursors, false),
                // Once, however long the disk refuses.
                Err(error) if !std::mem::replace(&mut told, true) => {
                    tracing::warn!(error = %causes(&error), "cursors could not be saved: a restart replays more");
                }
                Err(_) => {}
            }
        }
    }

    /// Where every Varnish of the fleet is, as far as that is known. Position 0 is a place, too: a node that was there
    /// when the first purge came is replayed after a crash, and not emptied.
    pub fn cursors(&self) -> Vec<(NodeId, Cursor)> {
        let fleet = self.context.fleet.load();
        let is_known = |id: &NodeId| self.nodes.get(id).is_some_and(|node| node.state.known.load(Ordering::SeqCst));
        let known = fleet.varnish.members().iter().filter(|member| is_known(member.node.id()));
        known
            .map(|member| {
                let node = &member.node;
                // What it has passed over counts for as long as this process knows of it.
                let passed_over = self.requests.lock().first_open(node.id());
                let position = passed_over.map_or(Position::MAX, |position| position - 1).min(node.live.cursor());
                (node.id().clone(), Cursor { position, epoch: node.spec.epoch().cloned() })
            })
            .collect()
    }

    /// Returns when every Varnish of the fleet that is not down has everything that was answered.
    pub async fn all_current(&self) {
        let all_current = || {
            let fleet = self.context.fleet.load();
            let mut alive = fleet.varnish.members().iter().filter(|member| member.health != Health::Down);
            alive.all(|member| self.context.fence.is_current(&member.node.live))
        };
        self.progress.until(all_current).await;
    }
}

impl DeliveryState {
    /// Takes note of a batch, where a purge after `expected` may have been in it that is waited for.
    fn remember(&self, last: Position, invalidated: u64, expected: Option<Position>) {
        let mut results = self.results.lock();
        let Some(expected) = expected else { return results.clear() };
        while results.front().is_some_and(|(last, _)| *last <= expected) {
            results.pop_front();
        }
        results.push_back((last, invalidated));
    }

    /// The objects that the batch dropped that this position was in.
    fn invalidated(&self, position: Position) -> u64 {
        self.results.lock().iter().find(|(last, _)| *last >= position).map_or(0, |(_, invalidated)| *invalidated)
    }
}
