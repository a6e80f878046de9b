//! One deadline per connection, swept coarsely.
//!
//! A tokio timer for every read costs about 0.4 µs, twenty times what it costs to store a number. So a connection
//! stores when its current phase must be over, and ten times a second the worker looks at all of them. Nobody needs
//! to know to the millisecond that a client has been silent for ten seconds.
//!
//! The same sweep notices what else ends a wait: the node that a request waits for went down, or the process drains
//! and a connection is at rest.

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

/// How often the worker sweeps.
pub(super) const SWEEP: Duration = Duration::from_millis(100);

/// How long a connection has to be at rest before draining ends it: the first request on a new one, or the next one on
/// one that has just been answered, may be on its way.
const AT_REST: Duration = Duration::from_secs(1);

/// What a connection is doing, and so how long it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Between requests. As long as nginx keeps a connection by default.
    Idle,
    /// From the first byte of a head to its last.
    Header,
    /// Opening a connection to a node.
    Connect,
    /// Waiting for the first byte of an answer: as long as Magento's VCL gives an administrator's export.
    FirstByte,
    /// Between two pieces of a body, in either direction.
    Body,
    /// Between two pieces of what a client sends though it was answered already.
    Linger,
}

impl Phase {
    fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Phase::Idle => 75,
            Phase::Header => 10,
            Phase::Connect => 3,
            Phase::FirstByte => 600,
            Phase::Body => 60,
            Phase::Linger => 2,
        })
    }
}

/// Why a wait was ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// The phase took too long.
    Timeout,
    /// The node that is waited for went down.
    NodeDown,
    /// The process drains.
    Draining,
}

#[derive(Debug)]
struct Slot {
    drains_at: Stage,
    phase: Phase,
    due: Duration,
    node: Option<Arc<Node>>,
    fired: Option<Interrupt>,
    waker: Option<Waker>,
}

impl Slot {
    /// When the phase began, or came a step further.
    fn begun(&self) -> Duration {
        self.due - self.phase.limit()
    }
}

/// The deadlines of one worker's connections.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    slots: RefCell<Slab<Slot>>,
    now: Cell<Duration>,
}

impl Deadlines {
    /// How many connections there are that drain at this stage or before it.
    pub(super) fn connections(&self, stage: Stage) -> usize {
        self.slots.borrow().iter().filter(|(_, slot)| slot.drains_at <= stage).count()
    }

    /// A deadline for a new connection, at rest, whose rest ends at the latest at this stage.
    pub(super) fn register(self: &Rc<Self>, drains_at: Stage) -> Deadline {
        let slot = Slot {
            drains_at,
            phase: Phase::Idle,
            due: self.now.get() + Phase::Idle.limit(),
            node: None,
            fired: None,
            waker: None,
        };
        Deadline { key: self.slots.borrow_mut().insert(slot), owner: Rc::clone(self) }
    }

    /// Looks at all connections. `now` counts from any fixed point.
    pub(super) fn sweep(&self, now: Duration, stage: Stage, is_down: impl Fn(&Node) -> bool) {
        self.now.set(now);
        let mut woken = Vec::new();
        for (_, slot) in self.slots.borrow_mut().iter_mut() {
            if slot.fired.is_some() {
                continue;
            }
            slot.fired = if slot.node.as_ref().is_some_and(|node| is_down(node)) {
                Some(Interrupt::NodeDown)
            } else if now >= slot.due {
                Some(Interrupt::Timeout)
            } else if stage >= slot.drains_at && slot.phase == Phase::Idle && now >= slot.begun() + AT_REST {
                Some(Interrupt::Draining)
            } else {
                None
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
    key: usize,
}

impl Deadline {
    /// A phase begins, or came a step further: its time counts from now.
    pub(super) fn enter(&self, phase: Phase) {
        self.set(phase, None);
    }

    /// A phase begins that is over, too, when this node goes down.
    pub(super) fn enter_with(&self, phase: Phase, node: &Arc<Node>) {
        self.set(phase, Some(Arc::clone(node)));
    }

    fn set(&self, phase: Phase, node: Option<Arc<Node>>) {
        let mut slots = self.owner.slots.borrow_mut();
        let slot = &mut slots[self.key];
        slot.phase = phase;
        slot.due = self.owner.now.get() + phase.limit();
        slot.node = node;
        slot.fired = None;
    }

    /// Ready when the wait is to end.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Interrupt> {
        let mut slots = self.owner.slots.borrow_mut();
        let slot = &mut slots[self.key];
        if let Some(interrupt) = slot.fired {
            return Poll::Ready(interrupt);
        }
        if !slot.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            slot.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Runs a future to its end or to the end of the wait.
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
        self.owner.slots.borrow_mut().remove(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interrupted(deadline: &Deadline) -> Option<Interrupt> {
        match deadline.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(interrupt) => Some(interrupt),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_phase_that_takes_too_long_is_interrupted_and_a_step_forward_starts_its_time_again() {
        let deadlines = Rc::new(Deadlines::default());
        let deadline = deadlines.register(Stage::Draining);
        deadline.enter(Phase::Header);
        deadlines.sweep(Duration::from_secs(9), Stage::Running, |_| false);
        assert_eq!(interrupted(&deadline), None);
        deadline.enter(Phase::Header);
        deadlines.sweep(Duration::from_secs(18), Stage::Running, |_| false);
        assert_eq!(interrupted(&deadline), None);
        deadlines.sweep(Duration::from_secs(19), Stage::Running, |_| false);
        assert_eq!(interrupted(&deadline), Some(Interrupt::Timeout));
    }

    #[test]
    fn draining_ends_rest_but_no_work() {
        let deadlines = Rc::new(Deadlines::default());
        let (resting, working) = (deadlines.register(Stage::Draining), deadlines.register(Stage::Draining));
        let later = deadlines.register(Stage::Emptying);
        working.enter(Phase::Body);
        deadlines.sweep(AT_REST, Stage::Draining, |_| false);
        assert_eq!((interrupted(&resting), interrupted(&working)), (Some(Interrupt::Draining), None));
        assert_eq!(interrupted(&later), None);
        deadlines.sweep(AT_REST, Stage::Emptying, |_| false);
        assert_eq!((interrupted(&later), interrupted(&working)), (Some(Interrupt::Draining), None));
    }

    #[test]
    fn draining_gives_a_request_that_may_be_on_its_way_the_time_to_arrive() {
        let deadlines = Rc::new(Deadlines::default());
        deadlines.sweep(Duration::from_secs(1), Stage::Draining, |_| false);
        let new = deadlines.register(Stage::Draining);
        deadlines.sweep(Duration::from_secs(1), Stage::Draining, |_| false);
        assert_eq!(interrupted(&new), None);
        deadlines.sweep(Duration::from_secs(1) + AT_REST, Stage::Draining, |_| false);
        assert_eq!(interrupted(&new), Some(Interrupt::Draining));
    }

    #[test]
    fn a_connection_that_ended_leaves_no_deadline() {
        let deadlines = Rc::new(Deadlines::default());
        drop(deadlines.register(Stage::Draining));
        assert_eq!(deadlines.connections(Stage::Stopping), 0);
    }
}
