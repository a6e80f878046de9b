//! Slow start: a node that enters or re-enters traffic gets a small share of it first.
//!
//! A newly started web node compiles every page for the first time, and a newly started Varnish is empty: with its full
//! share at once, the first new node is overloaded by the load for which the second was started. So the share grows
//! linearly from a tenth to the whole, as with HAProxy's `slowstart`. A tenth and not zero: only requests fill a cache.
//!
//! The data path has no clock. It reads one number per node ([`Live::share`]), and one task of the control plane raises
//! that number in steps. The task sleeps while no node is starting.
//!
//! A node that goes down and returns while its share still grows begins anew: it may have been restarted, and time passes
//! while it is away. Being behind the fence is no such thing, or a Varnish would never complete its start in a storm of purges.

use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::config::HealthChecks;
use crate::fleet::{Live, Node, Role, WHOLE_SHARE};

/// The initial share of a node: a tenth.
const FIRST_SHARE: u32 = WHOLE_SHARE.div_ceil(10);

/// The time between two steps.
const STEP: Duration = Duration::from_millis(100);

/// Raises the shares of starting nodes.
#[derive(Debug)]
pub struct SlowStart {
    /// How long it lasts for each role.
    lasts: Mutex<StartTimes>,
    starting: Mutex<Vec<Starting>>,
    /// Notified when the first node starts.
    begun: Notify,
}

#[derive(Clone, Copy, Debug)]
struct StartTimes {
    web: Duration,
    varnish: Duration,
}

/// A node whose share grows, while it is in the fleet.
#[derive(Debug)]
struct Starting {
    node: Weak<Live>,
    began: Instant,
    lasts: Duration,
}

impl StartTimes {
    fn of(checks: &HealthChecks) -> Self {
        StartTimes { web: checks.web.slow_start, varnish: checks.varnish.slow_start }
    }
}

impl SlowStart {
    /// With the configured duration of each role.
    pub fn new(checks: &HealthChecks) -> Self {
        SlowStart { lasts: Mutex::new(StartTimes::of(checks)), starting: Mutex::default(), begun: Notify::new() }
    }

    /// Nodes that start from now on take this long. Those that have begun go on as they began.
    pub fn configure(&self, checks: &HealthChecks) {
        *self.lasts.lock() = StartTimes::of(checks);
    }

    /// Begins the slow start of this node, also if it is starting already: its share is small from now on, and grows. Does
    /// nothing if slow start is off. Call it before the node can be chosen.
    pub fn begin(&self, node: &Node) {
        let times = *self.lasts.lock();
        let lasts = match node.spec.role() {
            Role::Web => times.web,
            Role::Varnish => times.varnish,
        };
        let mut starting = self.starting();
        starting.retain(|starting| !std::ptr::eq(starting.node.as_ptr(), Arc::as_ptr(&node.live)));
        if lasts.is_zero() {
            return node.live.set_share(WHOLE_SHARE);
        }
        node.live.set_share(FIRST_SHARE);
        starting.push(Starting { node: Arc::downgrade(&node.live), began: Instant::now(), lasts });
        self.begun.notify_one();
    }

    /// Raises shares until the process ends.
    pub async fn run(&self) {
        loop {
            self.begun.notified().await;
            let mut steps = tokio::time::interval(STEP);
            while self.any_left() {
                steps.tick().await;
                self.step(Instant::now());
            }
        }
    }

    fn any_left(&self) -> bool {
        !self.starting().is_empty()
    }

    /// Updates the share of every starting node, and removes those that are done or gone.
    fn step(&self, now: Instant) {
        self.starting().retain(|starting| {
            let Some(node) = starting.node.upgrade() else { return false };
            let share = share_after(now.duration_since(starting.began), starting.lasts);
            node.set_share(share);
            share < WHOLE_SHARE
        });
    }

    fn starting(&self) -> parking_lot::MutexGuard<'_, Vec<Starting>> {
        self.starting.lock()
    }
}

/// The share of a node this long after its start.
fn share_after(elapsed: Duration, lasts: Duration) -> u32 {
    let done = (elapsed.as_secs_f64() / lasts.as_secs_f64()).min(1.0);
    FIRST_SHARE + (f64::from(WHOLE_SHARE - FIRST_SHARE) * done) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{NodeId, NodeSpec};

    fn node(role: Role) -> Node {
        let spec = NodeSpec::new(role, NodeId::try_from("a").unwrap(), ([127, 0, 0, 1], 80).into());
        Node::new(spec, Arc::new(Live::default()), 1)
    }

    fn lasting(web: u64, varnish: u64) -> Arc<SlowStart> {
        let mut checks = HealthChecks::default();
        (checks.web.slow_start, checks.varnish.slow_start) = (Duration::from_secs(web), Duration::from_secs(varnish));
        let slow_start = Arc::new(SlowStart::new(&checks));
        let running = Arc::clone(&slow_start);
        tokio::spawn(async move { running.run().await });
        slow_start
    }

    #[tokio::test(start_paused = true)]
    async fn the_share_grows_from_a_tenth_to_the_whole_in_its_time() {
        let slow_start = lasting(10, 0);
        let web = node(Role::Web);
        assert_eq!(web.live.share(), WHOLE_SHARE);
        slow_start.begin(&web);
        let mut shares = Vec::new();
        for _ in 0..6 {
            shares.push(web.live.share());
            tokio::time::sleep(Duration::from_millis(2000)).await;
        }
        let expected = [25, 71, 117, 163, 209, WHOLE_SHARE];
        let near = |(share, expected): (&u32, &u32)| share.abs_diff(*expected) <= 3;
        assert!(shares.iter().zip(&expected).all(near), "{shares:?}");
        assert!(!slow_start.any_left());
        // And again whenever it returns.
        slow_start.begin(&web);
        assert_eq!(web.live.share(), FIRST_SHARE);
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(web.live.share(), WHOLE_SHARE);
    }

    #[tokio::test(start_paused = true)]
    async fn who_returns_while_it_starts_begins_anew_and_no_time_is_no_slow_start() {
        let slow_start = lasting(10, 0);
        let (web, varnish) = (node(Role::Web), node(Role::Varnish));
        slow_start.begin(&varnish);
        assert_eq!(varnish.live.share(), WHOLE_SHARE);
        slow_start.begin(&web);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(web.live.share() > WHOLE_SHARE / 2);
        slow_start.begin(&web);
        assert_eq!((web.live.share(), slow_start.starting().len()), (FIRST_SHARE, 1));
        tokio::time::sleep(Duration::from_secs(8)).await;
        assert!(web.live.share() < WHOLE_SHARE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_left_is_forgotten() {
        let slow_start = lasting(3600, 3600);
        let web = node(Role::Web);
        slow_start.begin(&web);
        drop(web);
        tokio::time::sleep(STEP * 2).await;
        assert!(!slow_start.any_left());
    }
}
