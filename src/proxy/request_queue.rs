//! The queue of requests that no node has room for: one for both listeners and all workers.
//!
//! **The limit** of a node ([`NodeChoice::limit`]) is a number of requests in flight, of all workers together. A place is taken by a
//! compare-exchange on the node's own counter, so two workers that see the same last place do not both get it. That is one mechanism for
//! three limits: `edge.max_requests_per_node` and `origin.max_requests_per_node`, which are off by default, and
//! `edge.bypass_max_requests_per_node`. The last is a number of its own, since what a shop can render when its caches are
//! gone has to be bounded where nobody has set any limit.
//!
//! **Who waits** stands in one line ([`WaitingLine`]), whatever his listener: a web node that gets room may be wanted by the origin and by
//! the edge, and whoever came first has it. How many may wait is counted for each listener, so that neither fills the other's queue.
//!
//! **Who is served.** Whoever makes room (a request ends; the sweep of a worker, ten times a second, since a node may come up, catch up
//! with purges or start to serve without anybody here being told; a reload) serves those who wait, in order: he takes the place *for* the
//! first who can use it and sends it to him. A woken request that had to take its place itself could find it taken, and would have to wake
//! the next one; here a place is either in somebody's hands or free while nobody wants it. If a client leaves in the moment in which its
//! place is sent, the place is free when it is dropped, and the next one is served.
//!
//! **No wake-up is lost.** Who joins raises [`RequestQueue::waiting`] before he looks at the nodes for the last time. Who ends a request
//! lowers the node's counter before he looks at `waiting`. Both are sequentially consistent, so at least one of them sees the other.
//!
//! **What it costs.** A request without a limit counts itself at its node, as ever, and looks at `waiting` when it ends: a number that
//! nobody writes while nobody waits. The lock is taken by those who wait, and by those who end a request meanwhile.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::frontend::{NoNode, NodeChoice, Select};
use super::rules::TrafficRules;
use crate::balance::{LbContext, WaitingLine};
use crate::fleet::{Node, Role, Snapshot};
use crate::telemetry::{IncidentKind, Metrics};

/// The time between two lines of the log about requests that wait.
const SAID_AGAIN: Duration = Duration::from_secs(10);

/// The requests that wait for a node with room.
#[derive(Debug)]
pub struct RequestQueue {
    fleet: Arc<ArcSwap<Snapshot>>,
    rules: Arc<ArcSwap<TrafficRules>>,
    metrics: Arc<Metrics>,
    waiting: WaitingCount,
    queued: Mutex<Queued>,
}

/// How many wait. In a cache line of its own: it is looked at by every request that ends.
#[derive(Debug, Default)]
#[repr(align(64))]
struct WaitingCount(AtomicUsize);

#[derive(Debug, Default)]
struct Queued {
    line: WaitingLine<QueueClass, QueuedWaiter>,
    /// Of each listener.
    lengths: [usize; 2],
    reports: [QueueReport; 2],
}

/// Those who can use the same nodes: requests of a listener that have failed at the same nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct QueueClass {
    role: Role,
    /// Their endpoints.
    tried: Box<[u64]>,
}

#[derive(Debug)]
struct QueuedWaiter {
    lb: LbContext,
    place: oneshot::Sender<SentPlace>,
}

/// What is said in the log, and was not yet.
#[derive(Clone, Copy, Debug, Default)]
struct QueueReport {
    /// When something was said, and when that some were refused.
    said: Option<Instant>,
    said_refused: Option<Instant>,
    waited: u64,
    refused: u64,
}

/// The queue is full.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct QueueFull;

/// A place at a node on its way to a request that waits. Frees it when dropped.
pub(super) struct SentPlace {
    node: Option<Arc<Node>>,
    queue: Arc<RequestQueue>,
}

/// A request in the queue. It leaves when this is dropped.
pub(super) struct QueueTicket {
    class: QueueClass,
    number: u64,
    /// `None` once it has come.
    place: Option<oneshot::Receiver<SentPlace>>,
    queue: Arc<RequestQueue>,
}

impl RequestQueue {
    /// An empty queue for requests to this fleet by these rules.
    pub fn new(fleet: Arc<ArcSwap<Snapshot>>, rules: Arc<ArcSwap<TrafficRules>>, metrics: Arc<Metrics>) -> Self {
        RequestQueue { fleet, rules, metrics, waiting: WaitingCount::default(), queued: Mutex::default() }
    }

    /// Whether somebody waits.
    pub(super) fn has_waiters(&self) -> bool {
        self.waiting.0.load(Ordering::SeqCst) > 0
    }

    /// Chooses a node, and counts a request there. Whoever waits comes first, wherever there is a limit.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn take(
        &self,
        select: &dyn Select,
        fleet: &Snapshot,
        lb: LbContext,
        tried: &[u64],
    ) -> Result<Arc<Node>, NoNode> {
        self.take_unless(|| self.has_waiters(), select, fleet, lb, tried)
    }

    fn take_unless(
        &self,
        is_anothers_turn: impl Fn() -> bool,
        select: &dyn Select,
        fleet: &Snapshot,
        lb: LbContext,
        tried: &[u64],
    ) -> Result<Arc<Node>, NoNode> {
        loop {
            let choice = select.pick(fleet, lb, tried)?;
            if choice.limit.is_some() && is_anothers_turn() {
                return Err(NoNode::Busy);
            }
            if let Some(node) = self.count(choice) {
                return Ok(node);
            }
        }
    }

    /// Counts a request at a node that was chosen for it; `None` if another one has taken the last place meanwhile.
    pub(super) fn count(&self, NodeChoice { node, limit, is_stale }: NodeChoice) -> Option<Arc<Node>> {
        match limit {
            None => node.live.request_began(),
            Some(limit) if node.live.try_begin_request(limit) => {}
            Some(_) => return None,
        }
        if is_stale {
            self.metrics.stale_served.inc();
        }
        Some(node)
    }

    /// Joins at the end of the queue of this listener. A place that is free for it is sent at once.
    ///
    /// # Errors
    /// If the queue is as long as it may be.
    pub(super) fn join(self: &Arc<Self>, role: Role, tried: &[u64], lb: LbContext) -> Result<QueueTicket, QueueFull> {
        let class = QueueClass { role, tried: tried.into() };
        let (sender, place) = oneshot::channel();
        let mut queued = self.queued.lock();
        let most = self.rules.load().frontend(role).terms.max_queue;
        let number = queued.line.join(class.clone(), QueuedWaiter { lb, place: sender });
        self.changed(&mut queued, role, 1);
        let sent = self.take_places(&mut queued);
        // Only now: there may be room for it that nobody who waits can use.
        let is_full = queued.lengths[role as usize] > most && queued.line.leave(&class, number).is_some();
        if is_full {
            self.changed(&mut queued, role, -1);
        }
        let (length, report) = (queued.lengths[role as usize], queued.reports[role as usize].note(is_full));
        drop(queued);
        send(sent);
        self.say(report.as_ref(), role, length);
        if is_full {
            return Err(QueueFull);
        }
        Ok(QueueTicket { class, number, place: Some(place), queue: Arc::clone(self) })
    }

    /// Notes that a request has waited for as long as it may.
    pub(super) fn note_timeout(&self, role: Role) {
        let mut queued = self.queued.lock();
        let (length, report) = (queued.lengths[role as usize], queued.reports[role as usize].note(true));
        drop(queued);
        self.say(report.as_ref(), role, length);
    }

    fn say(&self, report: Option<&QueueReport>, role: Role, length: usize) {
        let Some(&QueueReport { waited, refused, .. }) = report else { return };
        let all_are_full = "every node that may serve is at its limit of requests";
        if refused == 0 {
            tracing::info!(%role, length, waited, "{all_are_full}: others wait");
        } else {
            tracing::warn!(%role, length, waited, refused, "{all_are_full}: others wait, or are answered 503");
            let words = format!("{refused} requests found no {role} node with room in time, {length} wait");
            self.metrics.incidents.note(IncidentKind::Overload, &words);
        }
    }

    /// Serves those who wait and can be served.
    pub fn serve(self: &Arc<Self>) {
        if !self.has_waiters() {
            return;
        }
        let sent = self.take_places(&mut self.queued.lock());
        send(sent);
    }

    /// Counts the end of a request at a node.
    pub(super) fn end_request(self: &Arc<Self>, node: &Node) {
        node.live.request_ended();
        self.serve();
    }

    /// Takes places for those who can be served. They are sent when the lock is not held any more: one that nobody wants any longer is
    /// free again at once, and that needs the lock.
    fn take_places(self: &Arc<Self>, queued: &mut Queued) -> Vec<(QueuedWaiter, SentPlace)> {
        let (fleet, rules) = (self.fleet.load(), self.rules.load());
        let mut served = [0; 2];
        let sent = queued.line.serve(|class, waiter| {
            let select = &*rules.frontend(class.role).select;
            let node = self.take_unless(|| false, select, &fleet, waiter.lb, &class.tried).ok()?;
            served[class.role as usize] += 1;
            Some(SentPlace { node: Some(node), queue: Arc::clone(self) })
        });
        for role in [Role::Web, Role::Varnish] {
            self.changed(queued, role, -served[role as usize]);
        }
        sent
    }

    /// So many more wait.
    fn changed(&self, queued: &mut Queued, role: Role, by: isize) {
        if by != 0 {
            let length = queued.lengths[role as usize].saturating_add_signed(by);
            queued.lengths[role as usize] = length;
            self.waiting.0.store(queued.lengths.iter().sum(), Ordering::SeqCst);
            self.metrics.queue.length(role).set(i64::try_from(length).unwrap_or(i64::MAX));
        }
    }

    fn leave(&self, class: &QueueClass, number: u64) {
        let mut queued = self.queued.lock();
        if queued.line.leave(class, number).is_some() {
            self.changed(&mut queued, class.role, -1);
        }
    }
}

fn send(places: Vec<(QueuedWaiter, SentPlace)>) {
    for (waiter, place) in places {
        // Who has left leaves the place to the next one: it is dropped here.
        _ = waiter.place.send(place);
    }
}

impl QueueReport {
    /// Notes one that waits, or is refused. Returns what is to be said now.
    fn note(&mut self, is_refused: bool) -> Option<QueueReport> {
        if is_refused {
            self.refused += 1;
        } else {
            self.waited += 1;
        }
        let now = Instant::now();
        let said = if is_refused { self.said_refused } else { self.said };
        if said.is_some_and(|said| now.duration_since(said) < SAID_AGAIN) {
            return None;
        }
        let said_refused = if is_refused { Some(now) } else { self.said_refused };
        Some(std::mem::replace(self, QueueReport { said: Some(now), said_refused, ..QueueReport::default() }))
    }
}

impl SentPlace {
    /// The node, where the request stays counted.
    pub(super) fn into_node(mut self) -> Option<Arc<Node>> {
        self.node.take()
    }
}

impl fmt::Debug for SentPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SentPlace").field(&self.node.as_ref().map(|node| node.id())).finish()
    }
}

impl Drop for SentPlace {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            self.queue.end_request(&node);
        }
    }
}

impl QueueTicket {
    /// Ready with a node at which the request is counted.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Arc<Node>> {
        let Some(place) = &mut self.place else { return Poll::Pending };
        let sent = ready!(Pin::new(place).poll(cx));
        self.place = None;
        // There is an error only if somebody took it out of the line: nobody does but this ticket.
        sent.ok().and_then(SentPlace::into_node).map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        self.queue.leave(&self.class, self.number);
    }
}

impl fmt::Debug for QueueTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueTicket").field("class", &self.class).field("number", &self.number).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
