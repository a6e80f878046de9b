//! One deadline per connection, checked by a periodic sweep.
//!
//! A tokio timer for every read costs about 0.4 µs, twenty times what it costs to store a number. So a connection
//! stores when its current phase began, and ten times a second the worker checks all of them. Timeouts of seconds do
//! not need millisecond precision.
//!
//! The same sweep notices the other reasons to end a wait: the awaited node went down or left the fleet, a client is
//! too slow, or a connection is idle and the process drains or needs room for others.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;

use crate::fleet::Node;
use crate::shutdown::Stage;

/// The interval between sweeps.
pub(super) const SWEEP: Duration = Duration::from_millis(100);

/// How long a connection has to be at rest before draining ends it: the first request on a new one, or the next one on
/// one that has just been answered, may be on its way.
const AT_REST: Duration = Duration::from_secs(1);

/// The phase of a connection, which sets its time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Between requests. As long as nginx keeps a connection by default.
    Idle,
    /// From the first byte of a head to its last.
    Header,
    /// Waiting for a node with room: who waits has a limit of his own (`queue_timeout`).
    Queue,
    /// Opening a connection to a node.
    Connect,
    /// Waiting for the first byte of an answer: the limit that Magento's VCL sets for an administrator's export.
    FirstByte,
    /// Between two pieces of a body, in either direction. While both connections are known to be alive, a node that
    /// owes the next piece of an answer has the limit of a tunnel ([`Deadline::poll_answer`]).
    Body,
    /// From the request for a fragment of a page to the end of its answer. A page without the fragment is worth more
    /// than a page that is this late.
    Fragment,
    /// Between two pieces that a client sends after it was already answered.
    Linger,
    /// Between two pieces of a tunnel, in either direction: the value for WebSocket in HAProxy's documentation.
    Tunnel,
    /// An HTTP/2 connection with requests in flight, each of which has its own deadline.
    Streams,
    /// An HTTP/2 connection that is shutting down.
    Leaving,
}

impl Phase {
    /// Whether a request is under way: its client waits for us, or we for the client.
    fn is_request(self) -> bool {
        match self {
            Phase::Header
            | Phase::Queue
            | Phase::Connect
            | Phase::FirstByte
            | Phase::Body
            | Phase::Fragment
            | Phase::Tunnel => true,
            Phase::Idle | Phase::Linger | Phase::Streams | Phase::Leaving => false,
        }
    }
}

/// How long we wait for a client before its pace is judged, and the step at which it is judged again.
const PACE_GRACE: Duration = Duration::from_secs(20);

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// The phase exceeded its limit.
    Timeout,
    /// The awaited node went down according to its health checks.
    NodeDown,
    /// The awaited node left the fleet, or changed its address: its health is no longer checked.
    NodeGone,
    /// The process drains, or others need the room.
    Draining,
}

#[derive(Debug)]
struct DeadlineSlot {
    drains_at: Stage,
    phase: Phase,
    /// When the phase began, or last made progress.
    since: Duration,
    node: Option<Arc<Node>>,
    fired: Option<Interrupt>,
    waker: Option<Waker>,
    pace: BodyPace,
    /// Both ends of an answer are alive, and only the node is awaited.
    patient: bool,
}

/// How fast a client sends and takes bodies. Only the time spent waiting for the client counts: a page that is rendered
/// slowly is not the reader's fault.
#[derive(Debug, Default)]
struct BodyPace {
    /// The required bytes per second; 0 for none.
    wanted: u64,
    waits_for_client: bool,
    waited: Duration,
    moved: u64,
}

impl BodyPace {
    /// Checks the client at each sweep, `elapsed` after the last one; true if it has been too slow for too long. Each
    /// continuous wait is judged by itself: the kernel buffers megabytes for a client that reads nothing, so a client
    /// that took most of a large answer quickly could otherwise hold its last part, and a connection to a node, for
    /// days.
    fn is_too_slow(&mut self, elapsed: Duration) -> bool {
        if self.wanted == 0 || !self.waits_for_client {
            return false;
        }
        self.waited += elapsed;
        if self.waited <= PACE_GRACE {
            return false;
        }
        let too_slow = self.moved < self.wanted.saturating_mul(self.waited.as_secs());
        if !too_slow {
            (self.waited, self.moved) = (Duration::ZERO, 0);
        }
        too_slow
    }
}

/// The deadlines of one worker's connections.
#[derive(Debug)]
pub(super) struct Deadlines {
    slots: RefCell<Slab<DeadlineSlot>>,
    now: Cell<Duration>,
    header_timeout: Cell<Duration>,
}

impl Deadlines {
    /// An empty set. `header_timeout` limits a head from its first byte to its last.
    pub(super) fn new(header_timeout: Duration) -> Self {
        Deadlines { slots: RefCell::default(), now: Cell::default(), header_timeout: Cell::new(header_timeout) }
    }

    /// Heads have this long from now on.
    pub(super) fn set_header_timeout(&self, header_timeout: Duration) {
        self.header_timeout.set(header_timeout);
    }

    fn limit(&self, phase: Phase) -> Duration {
        Duration::from_secs(match phase {
            Phase::Idle => 75,
            Phase::Header => return self.header_timeout.get(),
            Phase::Connect => 3,
            Phase::FirstByte => 600,
            Phase::Fragment => 30,
            Phase::Body | Phase::Leaving => 60,
            Phase::Linger => 2,
            Phase::Tunnel => 3600,
            Phase::Queue | Phase::Streams => return Duration::MAX,
        })
    }

    /// The number of connections that drain at this stage or before it.
    pub(super) fn connections(&self, stage: Stage) -> usize {
        self.slots.borrow().iter().filter(|(_, slot)| slot.drains_at <= stage).count()
    }

    /// The number of requests under way on connections that drain at exactly this stage.
    pub(super) fn requests(&self, drains_at: Stage) -> usize {
        let slots = self.slots.borrow();
        slots.iter().filter(|(_, slot)| slot.drains_at == drains_at && slot.phase.is_request()).count()
    }

    /// A deadline for a new, idle connection that is closed when idle from this stage on. `pace` is the required rate
    /// of its client's bodies, in bytes per second; 0 for none.
    pub(super) fn register(self: &Rc<Self>, drains_at: Stage, pace: u64) -> Deadline {
        let slot = DeadlineSlot {
            drains_at,
            phase: Phase::Idle,
            since: self.now.get(),
            node: None,
            fired: None,
            waker: None,
            pace: BodyPace { wanted: pace, ..BodyPace::default() },
            patient: false,
        };
        Deadline { slot: self.slots.borrow_mut().insert(slot), owner: Rc::clone(self) }
    }

    /// Checks all connections. `now` counts from any fixed point. `crowded`: there is no room for new connections, so
    /// idle ones are closed. `trouble` reports a node's problem: [`Interrupt::NodeDown`] or [`Interrupt::NodeGone`].
    pub(super) fn sweep(
        &self,
        now: Duration,
        stage: Stage,
        crowded: bool,
        trouble: impl Fn(&Node) -> Option<Interrupt>,
    ) {
        let elapsed = now.saturating_sub(self.now.replace(now));
        let mut woken = Vec::new();
        for (_, slot) in self.slots.borrow_mut().iter_mut() {
            if slot.fired.is_some() {
                continue;
            }
            let age = now.saturating_sub(slot.since);
            let lasts = if slot.patient { Phase::Tunnel } else { slot.phase };
            let at_rest = slot.phase == Phase::Idle && age >= AT_REST;
            let too_slow = slot.phase == Phase::Body && slot.pace.is_too_slow(elapsed);
            slot.fired = if age >= self.limit(lasts) || too_slow {
                Some(Interrupt::Timeout)
            } else if stage >= slot.drains_at && (at_rest || slot.phase == Phase::Streams) || crowded && at_rest {
                Some(Interrupt::Draining)
            } else {
                slot.node.as_ref().and_then(|node| trouble(node))
            };
            if slot.fired.is_some() {
                woken.extend(slot.waker.take());
            }
        }
        woken.into_iter().for_each(Waker::wake);
    }
}

/// The deadline of one connection.
#[derive(Debug)]
pub(super) struct Deadline {
    owner: Rc<Deadlines>,
    slot: usize,
}

impl Deadline {
    /// Begins a phase: its time counts from now.
    pub(super) fn enter(&self, phase: Phase) {
        self.set(phase, None);
    }

    /// Begins a phase that is also interrupted if this node goes down or leaves.
    pub(super) fn enter_with(&self, phase: Phase, node: &Arc<Node>) {
        self.set(phase, Some(Arc::clone(node)));
    }

    fn set(&self, phase: Phase, node: Option<Arc<Node>>) {
        self.with(|slot, now| {
            slot.phase = phase;
            slot.since = now;
            slot.node = node;
            slot.fired = None;
            slot.pace = BodyPace { wanted: slot.pace.wanted, ..BodyPace::default() };
            slot.patient = false;
        });
    }

    /// Continues the phase after an interrupt that does not end it; its time keeps running. The next sweep interrupts
    /// again if the reason persists.
    pub(super) fn go_on(&self) {
        self.with(|slot, _| slot.fired = None);
    }

    /// Continues the phase, no longer interrupted for its node.
    pub(super) fn go_on_without_node(&self) {
        self.with(|slot, _| (slot.fired, slot.node) = (None, None));
    }

    /// The phase made progress: its time counts from now.
    pub(super) fn advance(&self, moved: u64) {
        self.with(|slot, now| {
            slot.since = now;
            slot.fired = None;
            slot.pace.moved += moved;
        });
    }

    /// Ready if the wait is to end. `for_client`: the wait is for the client.
    pub(super) fn poll_wait(&self, cx: &mut Context<'_>, for_client: bool) -> Poll<Interrupt> {
        self.with(|slot, _| slot.pace.waits_for_client = for_client);
        self.poll(cx)
    }

    /// The same while an answer is relayed. `both_there`: neither side has closed, and the kernel or HTTP/2 detects a
    /// dead peer. Then a silent node is not at fault: an event stream sends nothing while nothing happens.
    pub(super) fn poll_answer(&self, cx: &mut Context<'_>, for_client: bool, both_there: bool) -> Poll<Interrupt> {
        self.with(|slot, now| {
            slot.pace.waits_for_client = for_client;
            let patient = both_there && !for_client;
            if slot.patient && !patient {
                slot.since = now;
            }
            slot.patient = patient;
        });
        self.poll(cx)
    }

    fn with(&self, change: impl FnOnce(&mut DeadlineSlot, Duration)) {
        change(&mut self.owner.slots.borrow_mut()[self.slot], self.owner.now.get());
    }

    /// Ready if the wait is to end.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Interrupt> {
        let mut slots = self.owner.slots.borrow_mut();
        let slot = &mut slots[self.slot];
        if let Some(interrupt) = slot.fired {
            return Poll::Ready(interrupt);
        }
        if !slot.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            slot.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Runs a future until it completes or the wait ends.
    pub(super) async fn limit<F: Future>(&self, future: F) -> Result<F::Output, Interrupt> {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => self.poll(cx).map(Err),
        })
        .await
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.owner.slots.borrow_mut().remove(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{NodeId, NodeSpec, Role};

    fn interrupted(deadline: &Deadline) -> Option<Interrupt> {
        match deadline.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(interrupt) => Some(interrupt),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_slow_phase_is_interrupted_and_progress_restarts_its_time() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        let deadline = deadlines.register(Stage::Draining, 0);
        deadline.enter(Phase::Header);
        deadlines.sweep(Duration::from_secs(9), Stage::Running, false, |_| None);
        assert_eq!(interrupted(&deadline), None);
        deadline.advance(1);
        deadlines.sweep(Duration::from_secs(18), Stage::Running, false, |_| None);
        assert_eq!(interrupted(&deadline), None);
        deadlines.sweep(Duration::from_secs(19), Stage::Running, false, |_| None);
        assert_eq!(interrupted(&deadline), Some(Interrupt::Timeout));
    }

    #[test]
    fn draining_ends_rest_but_no_work() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        let (resting, working) = (deadlines.register(Stage::Draining, 0), deadlines.register(Stage::Draining, 0));
        let later = deadlines.register(Stage::Emptying, 0);
        working.enter(Phase::Body);
        deadlines.sweep(AT_REST, Stage::Draining, false, |_| None);
        assert_eq!((interrupted(&resting), interrupted(&working)), (Some(Interrupt::Draining), None));
        assert_eq!(interrupted(&later), None);
        deadlines.sweep(AT_REST, Stage::Emptying, false, |_| None);
        assert_eq!((interrupted(&later), interrupted(&working)), (Some(Interrupt::Draining), None));
    }

    #[test]
    fn what_is_cut_at_the_end_is_requests_and_not_connections_at_rest() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        let [_resting, lingering, upload, fetch] = [Stage::Draining, Stage::Draining, Stage::Draining, Stage::Emptying]
            .map(|drains_at| deadlines.register(drains_at, 0));
        lingering.enter(Phase::Linger);
        upload.enter(Phase::Body);
        fetch.enter(Phase::FirstByte);
        assert_eq!((deadlines.requests(Stage::Draining), deadlines.requests(Stage::Emptying)), (1, 1));
    }

    #[test]
    fn draining_gives_a_request_that_may_be_on_its_way_the_time_to_arrive() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        deadlines.sweep(Duration::from_secs(1), Stage::Draining, false, |_| None);
        let new = deadlines.register(Stage::Draining, 0);
        deadlines.sweep(Duration::from_secs(1), Stage::Draining, false, |_| None);
        assert_eq!(interrupted(&new), None);
        deadlines.sweep(Duration::from_secs(1) + AT_REST, Stage::Draining, false, |_| None);
        assert_eq!(interrupted(&new), Some(Interrupt::Draining));
    }

    #[test]
    fn connections_at_rest_make_room_in_a_crowd() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        let (resting, working) = (deadlines.register(Stage::Draining, 0), deadlines.register(Stage::Draining, 0));
        working.enter(Phase::Body);
        deadlines.sweep(AT_REST, Stage::Running, true, |_| None);
        assert_eq!((interrupted(&resting), interrupted(&working)), (Some(Interrupt::Draining), None));
    }

    /// Sweeps for `seconds` while the body moves at `rate` bytes a second, after `first` bytes at once; returns whether
    /// the client survived.
    fn survives(first: u64, rate: u64, seconds: u64, for_client: bool) -> bool {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        let deadline = deadlines.register(Stage::Draining, 500);
        deadline.enter(Phase::Body);
        deadline.advance(first);
        for step in 1..=seconds * 10 {
            deadline.advance(rate / 10);
            let waiting = deadline.poll_wait(&mut Context::from_waker(Waker::noop()), for_client);
            if waiting.is_ready() {
                return false;
            }
            deadlines.sweep(SWEEP * step as u32, Stage::Running, false, |_| None);
        }
        interrupted(&deadline).is_none()
    }

    #[test]
    fn a_client_that_trickles_is_cut_and_one_behind_a_slow_node_is_not() {
        assert!(survives(0, 600, 60, true));
        assert!(survives(0, 100, 19, true));
        assert!(!survives(0, 100, 25, true));
        assert!(survives(0, 100, 60, false));
    }

    #[test]
    fn what_a_client_took_quickly_is_no_credit_for_its_trickle_afterwards() {
        assert!(survives(10_000_000, 100, 39, true));
        assert!(!survives(10_000_000, 100, 45, true));
    }

    #[test]
    fn an_answer_may_pause_while_both_ends_live_and_only_its_node_is_awaited() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        let deadline = deadlines.register(Stage::Draining, 500);
        let mut cx = Context::from_waker(Waker::noop());
        let mut at = 0;
        let mut waits = |seconds: u64, for_client: bool, both_there: bool| {
            at += seconds;
            deadlines.sweep(Duration::from_secs(at), Stage::Running, false, |_| None);
            deadline.poll_answer(&mut cx, for_client, both_there).is_pending()
        };
        deadline.enter(Phase::Body);
        assert!(waits(59, false, true) && waits(3000, false, true));
        // The client may have gone: from now on the ordinary limit applies.
        assert!(waits(0, false, false) && waits(59, false, false) && !waits(1, false, false));
        deadline.enter(Phase::Body);
        assert!(waits(0, true, true) && waits(20, true, true) && !waits(1, true, true));
        deadline.enter(Phase::Body);
        assert!(waits(0, false, true) && waits(3599, false, true) && !waits(1, false, true));
    }

    #[test]
    fn a_wait_that_continues_though_its_node_is_down_gets_no_more_time() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        let deadline = deadlines.register(Stage::Draining, 0);
        let id = NodeId::try_from("a").unwrap();
        let spec = NodeSpec::new(Role::Web, id, ([127, 0, 0, 1], 1).into());
        deadline.enter_with(Phase::FirstByte, &Arc::new(Node::new(spec, Arc::default(), 1)));
        let sweep = |seconds| {
            deadlines.sweep(Duration::from_secs(seconds), Stage::Running, false, |_| Some(Interrupt::NodeDown));
            interrupted(&deadline)
        };
        assert_eq!(sweep(1), Some(Interrupt::NodeDown));
        deadline.go_on();
        assert_eq!(interrupted(&deadline), None);
        assert_eq!(sweep(2), Some(Interrupt::NodeDown));
        deadline.go_on_without_node();
        assert_eq!((sweep(3), sweep(599)), (None, None));
        assert_eq!(sweep(600), Some(Interrupt::Timeout));
    }

    #[test]
    fn a_connection_that_ended_leaves_no_deadline() {
        let deadlines = Rc::new(Deadlines::new(Duration::from_secs(10)));
        drop(deadlines.register(Stage::Draining, 0));
        assert_eq!(deadlines.connections(Stage::Stopping), 0);
    }
}
