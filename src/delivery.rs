//! The delivery task of each Varnish, which brings its node from its cursor to the head of the journal.
//!
//! ```text
//! loop: wait until head > cursor
//!       walk from cursor to head:  connect, compile the next batch, send it
//!       all of it acknowledged -> cursor = head;  the node is at fault -> back off, continue with the rest
//! ```
//!
//! Tasks are independent, so a node that hangs delays no other. There is no queue: the backlog of a node is the difference
//! of two positions ([`walk`]). An unreachable node costs a connection attempt, however large its backlog, and a long
//! compilation runs on a thread of its own.
//!
//! **One purge takes no node out of service.** Acknowledged requests are not repeated, and a request that fails is sent
//! alone until it is clear whether the node or the request is to blame ([`dispatch`]).
//!
//! **A flush counts for no more than the VCL says.** A backlog that cannot be replayed becomes one ban of everything, which
//! most VCLs apply only to pages with tags and pools. If a node may have missed the purge of another page ([`requests`]),
//! the flush makes it current only if its VCL confirms that every page was dropped. Otherwise the node stays out, and the
//! log says why.
//!
//! **A page in flight is purged twice.** The guard of the origin marks pages that were rendered before a purge and pass
//! after it. A page that passed just before may still be in a socket of Varnish: if Varnish reads the ban first, it stores
//! the page after it, and the ban never finds the page. The guard knows when a page with these tags last passed, so the same
//! bans are sent again a moment later ([`FILL_LATENCY`](crate::fleet::FILL_LATENCY)), and only then does the cursor move. If
//! a page is known to be still in flight, they are sent after its arrival ([`pending_fills`]). For a node that may have been
//! stopped, "just before" reaches back to the last time at which it was seen to run
//! ([`LifeSigns`](crate::fleet::LifeSigns)).
//!
//! **Bans are rationed** (`purge.max_bans_per_second`, [`budget`]): above the limit purges gather for longer and are sent as
//! one batch. **`purge.settle`** repeats acknowledged purges after a fixed delay, for a Varnish that fetches pages past the
//! guard.
//!
//! **Late nodes.** A purge does not wait for a node that let an earlier purge time out: that node is *late* until it has
//! acknowledged everything it missed at that moment. Later purges then wait for it again, although the fence is still ahead
//! of it by the purges that were answered meanwhile. Otherwise the fence would move away with every purge, and in a storm no
//! fenced node would ever return. Purges do not wait for a node that is held back for another replica either ([`Hold`]),
//! because its acknowledgements do not count.

mod answers;
mod block_notes;
mod budget;
mod caught;
mod dispatch;
mod expected;
mod fill_watermark;
mod keep_up;
mod known_caches;
mod pending_fills;
mod recalls;
mod redelivery;
mod refusal;
mod reliance;
mod requests;
mod sealed;
mod sealed_caches;
mod steps;
mod task;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::awaited::{Lateness, Progress};
use crate::config::PurgeListener;
use crate::fleet::{FaultKind, Fence, Health, Live, Member, Node, NodeFault, NodeId, Snapshot, VarnishSettings};
use crate::journal::{Cursor, Journal, Missed, Position, PurgeObserver};
use crate::mutants::Mutant;
use crate::purge::{Guard, Purge};
use crate::slow_start::SlowStart;
use crate::telemetry::traces::Tracer;
use crate::telemetry::{Metrics, causes};
use block_notes::BlockNotes;
use caught::Caught;
pub use expected::Expected;
use fill_watermark::FillWatermark;
pub use known_caches::{KnownCaches, SeenCaches};
pub use recalls::Hold;
use recalls::{Left, Recalls};
pub use refusal::{Refusable, Refusals};
use reliance::{RelyingCaches, WantedFlush};
use requests::Requests;
pub use sealed::SealedPurges;
pub use steps::CursorStep;
use steps::CursorSteps;

/// An observer that notes each purge of a journal in this guard before any delivery can see it.
pub fn noted_by(guard: &Arc<Guard>) -> PurgeObserver {
    let guard = Arc::clone(guard);
    Arc::new(move |entry| guard.note(&entry.purge))
}

/// The dependencies of every delivery.
#[derive(Clone)]
pub struct DeliveryContext {
    /// The purges to deliver.
    pub journal: Arc<dyn Journal>,
    /// The position up to which purges were answered.
    pub fence: Arc<Fence>,
    /// The members of the fleet.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// Knows which pages passed lately.
    pub guard: Arc<Guard>,
    /// Counts deliveries.
    pub metrics: Arc<Metrics>,
    /// Makes spans of deliveries, if there are traces.
    pub tracer: Option<Arc<Tracer>>,
    /// Eases nodes back into traffic after they were behind.
    pub slow_start: Arc<SlowStart>,
    /// The rate limit and the delays.
    pub pace: Pace,
    /// The purges that wait for no Varnish; `None` if all wait.
    pub sealed: Option<Arc<SealedPurges>>,
    /// Whether nodes are tried, so that there are verdicts of whether they return seals.
    pub has_trials: bool,
    /// When the process started.
    pub started: Instant,
}

/// The pace of deliveries.
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
    /// The configured pace.
    pub fn new(config: &PurgeListener) -> Self {
        let PurgeListener { max_bans_per_second, settle, ack_timeout, .. } = *config;
        Pace {
            max_bans_per_second: NonZeroU32::new(max_bans_per_second),
            longest_wait: ack_timeout / 4,
            redelivery_delay: (!settle.is_zero()).then_some(settle),
        }
    }
}

/// What is done about a node of which another clearcoat has seen something.
type OnSeenElsewhere = Box<dyn Fn(&NodeId) + Send + Sync>;

/// The deliveries of all Varnish nodes.
pub struct Deliveries {
    context: DeliveryContext,
    nodes: DashMap<NodeId, Delivery>,
    /// [`Pace::max_bans_per_second`] of now; 0 is no limit.
    ration: AtomicU32,
    requests: Mutex<Requests>,
    progress: Progress,
    /// The recalls of nodes that left during a hold, in case they return.
    left: Left,
    /// The head at the start of this process, before any page passed.
    first: Position,
    /// The fill watermark over all nodes.
    watermark: Mutex<FillWatermark>,
    /// Notified when a purge is refused to its sender.
    refusals: watch::Sender<()>,
    /// The notes of tags that no seal shows.
    block_notes: BlockNotes,
    /// Which caches only seals keep in order.
    relying: RelyingCaches,
    /// Called with a node of whose seals another clearcoat has seen something else than before.
    on_seen_elsewhere: OnceLock<OnSeenElsewhere>,
    /// Held by who looks through pending purges, which takes a thread.
    unsealing: tokio::sync::Mutex<()>,
}

/// The delivery of one Varnish, as seen by others.
struct Delivery {
    node: Arc<Node>,
    state: Arc<DeliveryState>,
    task: AbortHandle,
}

/// The state that a delivery task publishes.
#[derive(Debug, Default)]
struct DeliveryState {
    /// Ends the task's back-off early.
    wake: Notify,
    /// Purges up to here do not gather: a reader waits for them.
    hurry: watch::Sender<Position>,
    /// Whether the cursor is valid. If not, the node gets a ban of everything before anything else.
    known: AtomicBool,
    /// Whether purges are answered without it.
    late: Lateness,
    /// The last position of each batch that may contain an awaited purge, with the number of objects that the node said it
    /// dropped.
    results: Mutex<VecDeque<(Position, u64)>>,
    /// Purges to send once more because another replica could not deliver them.
    recalls: Arc<Recalls>,
    /// What was caught of it.
    caught: Arc<Caught>,
    /// The flush of it that is wanted, if one is.
    wanted_flush: WantedFlush,
    /// The fill watermark of this node, for pages that passed here.
    watermark: Mutex<FillWatermark>,
    /// When it acknowledged what.
    steps: CursorSteps,
    /// Why its last batch failed, or does not count yet.
    fault: Mutex<Option<NodeFault>>,
    /// That it keeps pages that it said it had dropped, if it does.
    kept: Mutex<Option<Arc<str>>>,
}

/// The outcome of a purge, for its answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Acknowledged {
    /// The nodes that have applied it.
    pub applied: Vec<NodeId>,
    /// The nodes that have yet to apply it, and whose answers are judged meanwhile.
    pub pending: Vec<NodeId>,
    /// The nodes that have not applied it, and get no traffic until they have.
    pub fenced: Vec<NodeId>,
    /// The number of objects that the nodes said they dropped.
    pub invalidated: u64,
    /// Nodes that refuse this purge but accept others, with their reasons.
    pub refused: Refusals,
    /// No node has accepted or refused this purge in time, so it is unknown whether any accepts it.
    pub is_untaken: bool,
}

impl Acknowledged {
    /// Records that another replica has not reached this node.
    pub fn miss(&mut self, node: &NodeId) {
        self.applied.retain(|id| id != node);
        if !self.fenced.contains(node) {
            self.fenced.push(node.clone());
        }
    }
}

impl Deliveries {
    /// A value without deliveries.
    pub fn new(context: DeliveryContext) -> Self {
        let first = context.journal.head();
        let mut requests = Requests::default();
        if let Missed::Entries(entries) = context.journal.since(context.journal.floor()) {
            requests.note_past(&entries, |position| context.journal.is_refused(position));
        }
        let ration = context.pace.max_bans_per_second.map_or(0, NonZeroU32::get);
        Deliveries {
            context,
            relying: RelyingCaches::default(),
            on_seen_elsewhere: OnceLock::new(),
            nodes: DashMap::new(),
            ration: AtomicU32::new(ration),
            requests: Mutex::new(requests),
            progress: Progress::default(),
            refusals: watch::channel(()).0,
            block_notes: BlockNotes::default(),
            unsealing: tokio::sync::Mutex::default(),
            left: Left::default(),
            first,
            watermark: Mutex::new(FillWatermark::new(first)),
        }
    }

    /// The bans per second that one Varnish gets from now on, and how long sealed purges gather.
    pub fn configure(&self, config: &PurgeListener) {
        self.ration.store(config.max_bans_per_second, Ordering::Relaxed);
        if let Some(sealed) = &self.context.sealed {
            sealed.set_gather(config.gather);
        }
    }

    /// The most bans per second for one Varnish; `None` if they are not limited.
    fn ration(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.ration.load(Ordering::Relaxed))
    }

    /// Starts the task of a node that joined. Its cursor is read before this returns, so no request meets a node with an
    /// unknown cursor.
    pub fn start(self: &Arc<Self>, node: &Arc<Node>, settings: &VarnishSettings) {
        let recalls = self.left.take(node.id());
        recalls.attach(&node.live);
        let watermark = Mutex::new(FillWatermark::new(self.first));
        let state = Arc::new(DeliveryState { recalls, watermark, ..DeliveryState::default() });
        let task = task::Task::new(Arc::clone(self), Arc::clone(node), settings, Arc::clone(&state));
        let task = tokio::spawn(task.run()).abort_handle();
        self.nodes.insert(node.id().clone(), Delivery { node: Arc::clone(node), state, task });
        self.begin_doubts(node.id());
    }

    /// Stops the task of a node that left. Its cursor stays in the journal.
    pub fn stop(&self, id: &NodeId) {
        if let Some((_, Delivery { state, task, .. })) = self.nodes.remove(id) {
            task.abort();
            self.left.keep(id, &state.recalls);
        }
    }

    /// Makes the guard mark pages of these purges from now on. Called as soon as this process learns of them; the journal
    /// repeats it once it has them.
    pub fn guard_against<'p>(&self, purges: impl Iterator<Item = &'p Purge>) {
        purges.for_each(|purge| self.context.guard.note(purge));
    }

    /// Has `treat` called with a node of whose seals another clearcoat has seen something else than before.
    pub fn on_seen_elsewhere(&self, treat: impl Fn(&NodeId) + Send + Sync + 'static) {
        _ = self.on_seen_elsewhere.set(Box::new(treat));
    }

    /// Records the answer to a health check: when it was sent, and how long the answer took.
    pub fn record_health_check(&self, node: &Node, asked: Instant, took: Duration) {
        node.live.life_signs.record_round_trip(asked.saturating_duration_since(self.context.started), took);
    }

    /// Wakes the task of a node that came up or went down: another attempt may succeed now.
    pub fn health_changed(&self, id: &NodeId) {
        if let Some(delivery) = self.nodes.get(id) {
            delivery.state.wake.notify_one();
        }
    }

    /// Whether the fence lets this Varnish serve.
    pub fn admits(&self, node: &Live) -> bool {
        self.context.fence.admits(node)
    }

    /// Wakes waiting purges after a change of a cursor or of the fleet.
    pub fn notify_progress(&self) {
        self.progress.notify();
    }

    /// Why the last batch of a node failed, or why its acknowledgements are held back.
    pub fn fault(&self, id: &NodeId) -> Option<NodeFault> {
        let state = Arc::clone(&self.nodes.get(id)?.state);
        let fault = state.fault.lock().clone();
        let must_be_flushed = self.nodes.get(id).is_some_and(|delivery| delivery.node.live.must_be_flushed());
        let owed = || {
            must_be_flushed.then(|| NodeFault::new(FaultKind::OwesFlush, "its cache is to be dropped before it serves"))
        };
        let held = || Some(NodeFault::new(FaultKind::PageUnderWay, state.recalls.held_because()?));
        let kept = || Some(NodeFault::new(FaultKind::KeepsPages, state.kept.lock().clone()?));
        fault.or_else(owed).or_else(held).or_else(kept)
    }

    /// The last steps of a node's cursor, the oldest first.
    pub fn steps(&self, id: &NodeId) -> Vec<CursorStep> {
        let state = self.nodes.get(id).map(|delivery| Arc::clone(&delivery.state));
        state.map_or_else(Vec::new, |state| state.steps.list())
    }

    /// Starts to keep the nodes' reports for a purge that is about to be accepted.
    pub fn expect(&self) -> Expected<'_> {
        Expected::new(self)
    }

    /// A position before every awaited purge. `None` if no purge is awaited.
    fn expected(&self) -> Option<Position> {
        self.requests.lock().expected()
    }

    /// Waits for at most `timeout` until every available Varnish has this purge, without raising the fence. Returns the
    /// nodes that have it and those that do not, without those whose answers show a sealed purge.
    pub async fn reached(&self, position: Position, timeout: Duration) -> (Vec<NodeId>, Vec<NodeId>) {
        self.wait_for(position, timeout).await;
        let fleet = self.context.fleet.load();
        let members = fleet.varnish.members().iter().filter(|member| !self.is_shown_by(&member.node.live, position));
        let (has, misses): (Vec<_>, Vec<_>) = members.partition(|member| member.node.live.cursor() >= position);
        let ids = |members: Vec<&Member>| members.into_iter().map(|member| member.node.id().clone()).collect();
        (ids(has), ids(misses))
    }

    /// The position up to which every known Varnish has every purge that the journal still holds. Unknown nodes, and nodes
    /// that were away for longer than the journal holds, are flushed before they serve.
    pub fn least_cursor(&self) -> Position {
        let journal = &self.context.journal;
        let fleet = self.context.fleet.load();
        let away = journal.cursors().into_iter().filter(|(id, _)| fleet.varnish.get(id).is_none());
        let least = self.cursors().into_iter().chain(away).map(|(_, cursor)| cursor.position).min();
        least.unwrap_or_else(|| journal.head()).max(journal.floor())
    }

    /// Treats all purges in the journal as answered.
    pub fn fence_everything(&self) {
        self.count_as_answered(self.context.journal.head());
    }

    async fn await_acknowledgements(&self, position: Position, timeout: Duration) {
        self.wait_for(position, timeout).await;
        // After a timeout, too: the members are read below, for the fence and for the answer.
        let is_sealed = self.is_sealed(position) || Mutant::LowFence.lives();
        let fence = &self.context.fence;
        let before = if is_sealed { fence.raise_sealed(position) } else { fence.raise(position) };
        for member in self.context.fleet.load().varnish.members() {
            // Logged once when the node falls behind, not for each purge.
            let is_behind = (before..position).contains(&member.node.live.cursor());
            if is_behind && !fence.admits(&member.node.live) {
                tracing::warn!(node = %member.node.id(), position, "node is behind: no traffic until it has every purge");
            }
        }
    }

    /// Whether there is one purge after this position, and nobody waits for any other.
    fn is_awaited_alone(&self, position: Position) -> bool {
        self.requests.lock().awaited() == 1 && self.context.journal.lag(position).entries == 1
    }

    /// Waits until no node has to be waited for any more, and marks those late that let `timeout` pass.
    async fn wait_for(&self, position: Position, timeout: Duration) {
        let awaited = self.worth_waiting_for(position);
        let is_settled = |node: &Arc<Node>| self.is_settled(node, position);
        let mark_late =
            |node: &Arc<Node>| _ = self.nodes.get(node.id()).map(|delivery| delivery.state.late.mark_late());
        self.progress.wait_for(&awaited, timeout, is_settled, mark_late).await;
    }

    /// Nodes that are down, late or held back get no traffic, and those that return seals need not have a purge that a seal
    /// shows: no purge waits for them.
    fn worth_waiting_for(&self, position: Position) -> Vec<Arc<Node>> {
        let fleet = self.context.fleet.load();
        let is_no_use = |node: &Node| {
            self.is_shown_by(&node.live, position) || self.is_late(node) || self.is_held_back(node, position)
        };
        let members = fleet.varnish.members().iter();
        let awaited = members.filter(|member| member.health != Health::Down && !is_no_use(&member.node));
        awaited.map(|member| Arc::clone(&member.node)).collect()
    }

    /// Whether waiting is over for this node: it has the purge, or is down, gone, late or held back.
    fn is_settled(&self, node: &Node, position: Position) -> bool {
        if node.live.cursor() >= position || self.is_late(node) || self.is_held_back(node, position) {
            return true;
        }
        let fleet = self.context.fleet.load();
        let member = fleet.varnish.get(node.id()).filter(|member| member.node.endpoint_id == node.endpoint_id);
        member.is_none_or(|member| member.health == Health::Down)
    }

    /// A current node is not late, even if it was marked.
    fn is_late(&self, node: &Node) -> bool {
        let late = self.nodes.get(node.id()).is_some_and(|delivery| delivery.state.late.is_late());
        late && !self.context.fence.admits(&node.live)
    }

    /// A hold may last for any time, so no purge waits for its end.
    fn is_held_back(&self, node: &Node, position: Position) -> bool {
        self.nodes.get(node.id()).is_some_and(|delivery| delivery.state.recalls.is_held_back(position))
    }

    /// Saves all cursors until the process ends: at most once a second if they move, and once a minute otherwise, because
    /// the journal forgets a cursor that is not renewed within its retention.
    pub async fn save_cursors(&self) {
        let (mut saved, mut logged) = (Vec::new(), false);
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        for tick in 0_u64.. {
            ticks.tick().await;
            let cursors = self.cursors();
            if cursors == saved && tick % 60 != 0 {
                continue;
            }
            match self.context.journal.save_cursors(cursors.clone()).await {
                Ok(()) => (saved, logged) = (cursors, false),
                // Logged once for each series of failures.
                Err(error) if !std::mem::replace(&mut logged, true) => {
                    tracing::warn!(error = %causes(&error), "cursors could not be saved: a restart replays more");
                }
                Err(_) => {}
            }
        }
    }

    /// The known cursors of the fleet. Position 0 is a valid cursor: after a crash, a node that was there before the first
    /// purge is replayed, not flushed.
    pub fn cursors(&self) -> Vec<(NodeId, Cursor)> {
        let fleet = self.context.fleet.load();
        let is_known = |id: &NodeId| self.nodes.get(id).is_some_and(|node| node.state.known.load(Ordering::SeqCst));
        let known = fleet.varnish.members().iter().filter(|member| is_known(member.node.id()));
        known
            .map(|member| {
                let node = &member.node;
                // Passed-over purges count as delivered only while this process knows of them.
                let passed_over = self.requests.lock().first_open(node.id());
                let position = passed_over.map_or(Position::MAX, |position| position - 1).min(node.live.cursor());
                let (is_sealed, relies_on_seals) = (self.is_saved_as_sealed(node), self.relying.told(node).is_some());
                (node.id().clone(), Cursor { position, epoch: node.spec.epoch().cloned(), is_sealed, relies_on_seals })
            })
            .collect()
    }

    /// Returns when every Varnish that is not down may serve.
    pub async fn all_current(&self) {
        let all_current = || {
            let fleet = self.context.fleet.load();
            let mut alive = fleet.varnish.members().iter().filter(|member| member.health != Health::Down);
            alive.all(|member| self.context.fence.admits(&member.node.live))
        };
        self.progress.until(all_current).await;
    }
}

impl DeliveryState {
    /// Has purges up to this position sent without gathering. Remembered until they are.
    fn hurry(&self, position: Position) {
        self.hurry.send_if_modified(|wanted| {
            let moves = *wanted < position;
            *wanted = position.max(*wanted);
            moves
        });
    }

    /// Keeps the result of a batch if it may contain a purge that is awaited, that is, one after `expected`.
    fn remember(&self, last: Position, invalidated: u64, expected: Option<Position>) {
        let mut results = self.results.lock();
        let Some(expected) = expected else { return results.clear() };
        while results.front().is_some_and(|(last, _)| *last <= expected) {
            results.pop_front();
        }
        results.push_back((last, invalidated));
    }

    /// The number of objects dropped by the batch that contains this position.
    fn invalidated(&self, position: Position) -> u64 {
        self.results.lock().iter().find(|(last, _)| *last >= position).map_or(0, |(_, invalidated)| *invalidated)
    }
}

/// Runs what takes long on a thread of its own.
async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is shutting down, and this task with it.
        Err(_) => std::future::pending().await,
    }
}
