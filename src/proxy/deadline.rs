//! One deadline per connection, checked by a periodic sweep.
//!
//! A tokio timer for every read costs about 0.4 µs, twenty times what it costs to store a number. So a connection
//! stores when its current phase began, and ten times a second the worker checks all of them. Timeouts of seconds do
//! not need millisecond precision.
//!
//! The same sweep notices the other reasons to end a wait: the awaited node went down or left the fleet, a client is
//! too slow, the whole request takes too long, or a connection is idle and the process drains or needs room for others.
//!
//! The limits are looked up at each sweep, so that a reload is in effect for waits that go on. Their age counts from the
//! reload at the earliest: one that makes a limit shorter than a wait has lasted cuts nobody at once.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;

use crate::config::Timeouts;
use crate::fleet::Node;
use crate::shutdown::Stage;

/// The interval between sweeps.
pub(super) const SWEEP: Duration = Duration::from_millis(100);

/// How long a connection has to be at rest before draining ends it: the first request on a new one, or the next one on
/// one that has just been answered, may be on its way.
const AT_REST: Duration = Duration::from_secs(1);

/// Who owes the next piece of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AwaitedSide {
    /// The client is to send or to take it.
    Client,
    /// The node is to send or to take it.
    Node,
    /// The node, or a client that is still sending, or that has closed its side and may be gone.
    Either,
    /// The node, in an answer of no announced length, while neither side has closed, and the kernel or HTTP/2 detects a
    /// dead peer. A silent node is not at fault then: an event stream sends nothing while nothing happens.
    Event,
}

/// The phase of a connection, which sets its time limit ([`Timeouts`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Between requests.
    Idle,
    /// From the first byte of a head to its last.
    Header,
    /// Waiting for a node with room: who waits has a limit of his own (`queue_timeout`).
    Queue,
    /// Opening a connection to a node.
    Connect,
    /// Waiting for the first byte of an answer.
    FirstByte,
    /// Between two pieces of a body, in either direction.
    Body(AwaitedSide),
    /// From the request for a fragment of a page to the end of its answer. A page without the fragment is worth more
    /// than a page that is this late.
    Fragment,
    /// Between two pieces that a client sends after it was already answered.
    Linger,
    /// Between two pieces of a tunnel, in either direction.
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
            Phase::Header | Phase::Tunnel => true,
            phase => phase.is_exchange(),
        }
    }

    /// Whether its time is part of a request's: from the end of the head to the end of the answer. A tunnel has its answer.
    fn is_exchange(self) -> bool {
        match self {
            Phase::Queue | Phase::Connect | Phase::FirstByte | Phase::Body(_) | Phase::Fragment => true,
            Phase::Idle | Phase::Header | Phase::Linger | Phase::Tunnel | Phase::Streams | Phase::Leaving => false,
        }
    }

    /// How long it may last without progress.
    fn limit(self, timeouts: &Timeouts) -> Duration {
        match self {
            Phase::Idle => timeouts.keep_alive,
            Phase::Header => timeouts.client_header,
            Phase::Connect => timeouts.connect,
            Phase::FirstByte => timeouts.first_byte,
            Phase::Body(AwaitedSide::Node) => timeouts.between_bytes,
            // A client that is not known to be there is not awaited for longer than one that is.
            Phase::Body(AwaitedSide::Client | AwaitedSide::Either) | Phase::Leaving => timeouts.client_body,
            Phase::Body(AwaitedSide::Event) | Phase::Tunnel => timeouts.tunnel.unwrap_or(Duration::MAX),
            Phase::Fragment => timeouts.fragment,
            Phase::Linger => timeouts.client_fin,
            Phase::Queue | Phase::Streams => Duration::MAX,
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
    /// The whole request exceeded its limit. Nothing that moves takes this back.
    Overdue,
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
    /// When the request began whose time is limited.
    began: Option<Duration>,
    node: Option<Arc<Node>>,
    fired: Option<Interrupt>,
    waker: Option<Waker>,
    pace: BodyPace,
}

impl DeadlineSlot {
    /// Continues, unless the whole request has had its time.
    fn clear(&mut self) {
        if self.fired != Some(Interrupt::Overdue) {
            self.fired = None;
        }
    }
}

/// How fast a client sends and takes bodies. Only the time spent waiting for the client counts: a page that is rendered
/// slowly is not the reader's fault.
#[derive(Debug, Default)]
struct BodyPace {
    /// The required bytes per second; 0 for none.
    wanted: u64,
    waited: Duration,
    moved: u64,
}

impl BodyPace {
    /// Checks an awaited client at each sweep, `elapsed` after the last one; true if it has been too slow for too long. Each
    /// continuous wait is judged by itself: the kernel buffers megabytes for a client that reads nothing, so a client
    /// that took most of a large answer quickly could otherwise hold its last part, and a connection to a node, for
    /// days.
    fn is_too_slow(&mut self, elapsed: Duration) -> bool {
        if self.wanted == 0 {
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
    timeouts: Cell<Timeouts>,
    /// When these limits came into effect.
    limited: Cell<Duration>,
}

impl Deadlines {
    /// An empty set with these limits.
    pub(super) fn new(timeouts: Timeouts) -> Self {
        Deadlines {
            slots: RefCell::default(),
            now: Cell::default(),
            timeouts: Cell::new(timeouts),
            limited: Cell::default(),
        }
    }

    /// Waits have these limits from now on, those under way as well.
    pub(super) fn set_timeouts(&self, timeouts: Timeouts) {
        if self.timeouts.replace(timeouts) != timeouts {
            self.limited.set(self.now.get());
        }
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
            began: None,
            node: None,
            fired: None,
            waker: None,
            pace: BodyPace { wanted: pace, ..BodyPace::default() },
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
        let (timeouts, limited) = (self.timeouts.get(), self.limited.get());
        let lasted = |since: Duration| now.saturating_sub(since.max(limited));
        let mut woken = Vec::new();
        for (_, slot) in self.slots.borrow_mut().iter_mut() {
            if slot.fired.is_some() {
                continue;
            }
            let at_rest = slot.phase == Phase::Idle && now.saturating_sub(slot.since) >= AT_REST;
            let too_slow = slot.phase == Phase::Body(AwaitedSide::Client) && slot.pace.is_too_slow(elapsed);
            let overdue = |limit| slot.phase.is_exchange() && slot.began.is_some_and(|began| lasted(began) >= limit);
            slot.fired = if lasted(slot.since) >= slot.phase.limit(&timeouts) || too_slow {
                Some(Interrupt::Timeout)
            } else if timeouts.request.is_some_and(overdue) {
                Some(Interrupt::Overdue)
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
    /// A request begins, whose time is limited as a whole until its answer ends, or [`Deadline::end_request`].
    pub(super) fn begin_request(&self) {
        self.with(|slot, now| {
            slot.began = Some(now);
            slot.fired = None;
        });
    }

    /// The request has ended, or is to be answered for having taken too long.
    pub(super) fn end_request(&self) {
        self.with(|slot, _| (slot.began, slot.fired) = (None, None));
    }

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
            if phase.is_exchange() {
                slot.clear();
            } else {
                slot.fired = None;
            }
            slot.pace = BodyPace { wanted: slot.pace.wanted, ..BodyPace::default() };
        });
    }

    /// Continues the phase after an interrupt that does not end it; its time keeps running. The next sweep interrupts
    /// again if the reason persists.
    pub(super) fn go_on(&self) {
        self.with(|slot, _| slot.clear());
    }

    /// Continues the phase, no longer interrupted for its node.
    pub(super) fn go_on_without_node(&self) {
        self.with(|slot, _| {
            slot.clear();
            slot.node = None;
        });
    }

    /// The phase made progress: its time counts from now.
    pub(super) fn advance(&self, moved: u64) {
        self.with(|slot, now| {
            slot.since = now;
            slot.clear();
            slot.pace.moved += moved;
        });
    }

    /// Ready if the wait for a piece of a body is to end. The time of whoever is `awaited` counts from when that began, or
    /// from the last piece: what one side has taken is not charged to the other.
    pub(super) fn poll_body(&self, cx: &mut Context<'_>, awaited: AwaitedSide) -> Poll<Interrupt> {
        self.with(|slot, now| {
            let phase = Phase::Body(awaited);
            if slot.phase != phase {
                (slot.phase, slot.since) = (phase, now);
                // What it was late for has come.
                slot.clear();
            }
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
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
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
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
        let (resting, working) = (deadlines.register(Stage::Draining, 0), deadlines.register(Stage::Draining, 0));
        let later = deadlines.register(Stage::Emptying, 0);
        working.enter(Phase::Body(AwaitedSide::Node));
        deadlines.sweep(AT_REST, Stage::Draining, false, |_| None);
        assert_eq!((interrupted(&resting), interrupted(&working)), (Some(Interrupt::Draining), None));
        assert_eq!(interrupted(&later), None);
        deadlines.sweep(AT_REST, Stage::Emptying, false, |_| None);
        assert_eq!((interrupted(&later), interrupted(&working)), (Some(Interrupt::Draining), None));
    }

    #[test]
    fn what_is_cut_at_the_end_is_requests_and_not_connections_at_rest() {
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
        let [_resting, lingering, upload, fetch] = [Stage::Draining, Stage::Draining, Stage::Draining, Stage::Emptying]
            .map(|drains_at| deadlines.register(drains_at, 0));
        lingering.enter(Phase::Linger);
        upload.enter(Phase::Body(AwaitedSide::Client));
        fetch.enter(Phase::FirstByte);
        assert_eq!((deadlines.requests(Stage::Draining), deadlines.requests(Stage::Emptying)), (1, 1));
    }

    #[test]
    fn draining_gives_a_request_that_may_be_on_its_way_the_time_to_arrive() {
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
        deadlines.sweep(Duration::from_secs(1), Stage::Draining, false, |_| None);
        let new = deadlines.register(Stage::Draining, 0);
        deadlines.sweep(Duration::from_secs(1), Stage::Draining, false, |_| None);
        assert_eq!(interrupted(&new), None);
        deadlines.sweep(Duration::from_secs(1) + AT_REST, Stage::Draining, false, |_| None);
        assert_eq!(interrupted(&new), Some(Interrupt::Draining));
    }

    #[test]
    fn connections_at_rest_make_room_in_a_crowd() {
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
        let (resting, working) = (deadlines.register(Stage::Draining, 0), deadlines.register(Stage::Draining, 0));
        working.enter(Phase::Body(AwaitedSide::Node));
        deadlines.sweep(AT_REST, Stage::Running, true, |_| None);
        assert_eq!((interrupted(&resting), interrupted(&working)), (Some(Interrupt::Draining), None));
    }

    /// Sweeps for `seconds` while the body moves at `rate` bytes a second, after `first` bytes at once; returns whether
    /// the client survived.
    fn survives(first: u64, rate: u64, seconds: u64, awaited: AwaitedSide) -> bool {
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
        let deadline = deadlines.register(Stage::Draining, 500);
        deadline.enter(Phase::Body(awaited));
        deadline.advance(first);
        for step in 1..=seconds * 10 {
            deadline.advance(rate / 10);
            let waiting = deadline.poll_body(&mut Context::from_waker(Waker::noop()), awaited);
            if waiting.is_ready() {
                return false;
            }
            deadlines.sweep(SWEEP * step as u32, Stage::Running, false, |_| None);
        }
        interrupted(&deadline).is_none()
    }

    #[test]
    fn a_client_that_trickles_is_cut_and_one_behind_a_slow_node_is_not() {
        assert!(survives(0, 600, 60, AwaitedSide::Client));
        assert!(survives(0, 100, 19, AwaitedSide::Client));
        assert!(!survives(0, 100, 25, AwaitedSide::Client));
        for not_judged in [AwaitedSide::Node, AwaitedSide::Either, AwaitedSide::Event] {
            assert!(survives(0, 100, 60, not_judged), "{not_judged:?}");
        }
    }

    #[test]
    fn what_a_client_took_quickly_is_no_credit_for_its_trickle_afterwards() {
        assert!(survives(10_000_000, 100, 39, AwaitedSide::Client));
        assert!(!survives(10_000_000, 100, 45, AwaitedSide::Client));
    }

    /// Limits that differ all, in seconds.
    fn distinct() -> Timeouts {
        Timeouts {
            client_header: Duration::from_secs(1),
            client_body: Duration::from_secs(2),
            client_fin: Duration::from_secs(3),
            connect: Duration::from_secs(4),
            first_byte: Duration::from_secs(5),
            between_bytes: Duration::from_secs(6),
            fragment: Duration::from_secs(7),
            keep_alive: Duration::from_secs(8),
            tunnel: Some(Duration::from_secs(9)),
            ..Timeouts::default()
        }
    }

    #[test]
    fn each_phase_has_the_limit_that_is_set_for_it_to_the_sweep() {
        for (phase, seconds) in [
            (Phase::Header, 1),
            (Phase::Body(AwaitedSide::Client), 2),
            (Phase::Body(AwaitedSide::Either), 2),
            (Phase::Leaving, 2),
            (Phase::Linger, 3),
            (Phase::Connect, 4),
            (Phase::FirstByte, 5),
            (Phase::Body(AwaitedSide::Node), 6),
            (Phase::Fragment, 7),
            (Phase::Idle, 8),
            (Phase::Body(AwaitedSide::Event), 9),
            (Phase::Tunnel, 9),
        ] {
            let deadlines = Rc::new(Deadlines::new(distinct()));
            let deadline = deadlines.register(Stage::Draining, 0);
            deadline.enter(phase);
            let at = Duration::from_secs(seconds);
            deadlines.sweep(at - SWEEP, Stage::Running, false, |_| None);
            assert_eq!(interrupted(&deadline), None, "{phase:?} too early");
            deadlines.sweep(at, Stage::Running, false, |_| None);
            assert_eq!(interrupted(&deadline), Some(Interrupt::Timeout), "{phase:?}");
        }
    }

    #[test]
    fn a_limit_of_none_ends_no_wait() {
        let deadlines = Rc::new(Deadlines::new(Timeouts { tunnel: None, request: None, ..distinct() }));
        for phase in [Phase::Tunnel, Phase::Body(AwaitedSide::Event), Phase::Streams] {
            let deadline = deadlines.register(Stage::Draining, 0);
            deadline.begin_request();
            deadline.enter(phase);
            deadlines.sweep(Duration::from_secs(1 << 40), Stage::Running, false, |_| None);
            assert_eq!(interrupted(&deadline), None, "{phase:?}");
        }
    }

    /// Polls a body at these times, in seconds, for whom it waits then; returns whether each wait went on.
    fn waits<const N: usize>(timeouts: Timeouts, steps: [(u64, AwaitedSide); N]) -> [bool; N] {
        let deadlines = Rc::new(Deadlines::new(timeouts));
        let deadline = deadlines.register(Stage::Draining, 0);
        deadline.enter(Phase::Body(steps[0].1));
        steps.map(|(at, awaited)| {
            deadlines.sweep(Duration::from_secs(at), Stage::Running, false, |_| None);
            deadline.poll_body(&mut Context::from_waker(Waker::noop()), awaited).is_pending()
        })
    }

    #[test]
    fn whoever_is_awaited_has_all_of_its_time_though_the_other_took_its_own() {
        use AwaitedSide::{Client, Node};
        let timeouts = Timeouts {
            client_body: Duration::from_secs(10),
            between_bytes: Duration::from_secs(100),
            ..Timeouts::default()
        };
        // The node took 99 s for a piece of which the client takes nothing at first.
        let taken = waits(timeouts, [(0, Node), (99, Client), (108, Client), (109, Client)]);
        assert_eq!(taken, [true, true, true, false]);
        // A piece that comes as its time ends is not late for the other one.
        assert_eq!(
            waits(timeouts, [(0, Node), (100, Client), (109, Client), (110, Client)]),
            [true, true, true, false]
        );
        // And the other way round: what the client took is not charged to the node.
        let taken = waits(timeouts, [(0, Client), (9, Node), (108, Node), (109, Node)]);
        assert_eq!(taken, [true, true, true, false]);
    }

    #[test]
    fn an_event_stream_may_pause_for_as_long_as_a_tunnel_while_both_ends_live() {
        use AwaitedSide::{Client, Either, Event};
        let default = Timeouts::default();
        assert_eq!(waits(default, [(0, Event), (66, Event), (3599, Event), (3600, Event)]), [true, true, true, false]);
        // The client may have gone: from now on it is not awaited for longer than any.
        assert_eq!(
            waits(default, [(0, Event), (3000, Either), (3059, Either), (3060, Either)]),
            [true, true, true, false]
        );
        assert_eq!(
            waits(default, [(0, Event), (3000, Client), (3059, Client), (3060, Client)]),
            [true, true, true, false]
        );
    }

    #[test]
    fn a_whole_request_has_its_limit_whatever_moves_and_a_tunnel_has_not() {
        let timeouts = Timeouts { request: Some(Duration::from_secs(30)), ..Timeouts::default() };
        let deadlines = Rc::new(Deadlines::new(timeouts));
        let [moving, phases, tunnel, resting, unlimited] = [(); 5].map(|()| deadlines.register(Stage::Emptying, 0));
        for deadline in [&moving, &phases, &tunnel, &resting] {
            deadline.begin_request();
        }
        let waits =
            |deadline: &Deadline| deadline.poll_body(&mut Context::from_waker(Waker::noop()), AwaitedSide::Node);
        for at in 1..=30 {
            moving.advance(1);
            assert_eq!((waits(&moving), waits(&unlimited)), (Poll::Pending, Poll::Pending), "after {at} s");
            phases.enter(if at % 2 == 0 { Phase::Connect } else { Phase::FirstByte });
            tunnel.enter(Phase::Tunnel);
            resting.enter(Phase::Idle);
            deadlines.sweep(Duration::from_secs(at), Stage::Running, false, |_| None);
        }
        // Neither progress nor another phase takes it back.
        moving.advance(1);
        phases.enter(Phase::Connect);
        phases.go_on();
        assert_eq!((waits(&moving), interrupted(&phases)), (Poll::Ready(Interrupt::Overdue), Some(Interrupt::Overdue)));
        assert_eq!((interrupted(&tunnel), interrupted(&resting), waits(&unlimited)), (None, None, Poll::Pending));
        // Who is answered for it has the time of any answer, and the next request its own.
        moving.end_request();
        phases.begin_request();
        deadlines.sweep(Duration::from_secs(59), Stage::Running, false, |_| None);
        assert_eq!((waits(&moving), interrupted(&phases)), (Poll::Pending, Some(Interrupt::Timeout)));
    }

    #[test]
    fn a_reload_gives_waits_under_way_the_new_limit_from_then_on() {
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
        let deadline = deadlines.register(Stage::Draining, 0);
        deadline.begin_request();
        deadline.enter(Phase::FirstByte);
        let sweep = |seconds| {
            deadlines.sweep(Duration::from_secs(seconds), Stage::Running, false, |_| None);
            interrupted(&deadline)
        };
        assert_eq!(sweep(500), None);
        let shorter = Timeouts { first_byte: Duration::from_secs(5), ..Timeouts::default() };
        deadlines.set_timeouts(shorter);
        assert_eq!(sweep(504), None);
        // What is the same is no change, and gives nobody more time.
        deadlines.set_timeouts(shorter);
        assert_eq!(sweep(505), Some(Interrupt::Timeout));
        deadlines.set_timeouts(Timeouts { request: Some(Duration::from_secs(10)), ..Timeouts::default() });
        deadline.go_on();
        assert_eq!(sweep(514), None);
        assert_eq!(sweep(515), Some(Interrupt::Overdue));
    }

    #[test]
    fn a_wait_that_continues_though_its_node_is_down_gets_no_more_time() {
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
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
        let deadlines = Rc::new(Deadlines::new(Timeouts::default()));
        drop(deadlines.register(Stage::Draining, 0));
        assert_eq!(deadlines.connections(Stage::Stopping), 0);
    }
}
