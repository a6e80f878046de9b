//! Who starts slowly. The checkers talk to nobody; the tests tell the keeper what was seen.

use std::time::{Duration, Instant};

use super::*;
use crate::config::PurgeListener;
use crate::delivery::{Context, Pace};
use crate::fleet::{Check, Fence, WHOLE_SHARE};
use crate::journal::{Limits, Memory};
use crate::purge::Guard;

struct Rig {
    keeper: FleetKeeper,
}

/// A keeper of a fleet whose web nodes start for 10 s. Its shares grow while the test sleeps.
fn rig(panic_threshold: f64) -> Rig {
    let mut checks = HealthChecks::default();
    (checks.web.slow_start, checks.web.panic_threshold) = (Duration::from_secs(10), panic_threshold);
    let slow_start = Arc::new(SlowStart::new(&checks));
    let running = Arc::clone(&slow_start);
    tokio::spawn(async move { running.run().await });
    let fleet = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let metrics = Arc::new(Metrics::new().unwrap());
    let started = Instant::now();
    let guard = Arc::new(Guard::new(started));
    let context = Context {
        journal: Arc::new(Memory::new(Limits::default(), Arc::clone(&guard))),
        guard,
        slow_start: Arc::clone(&slow_start),
        pace: Pace::new(&PurgeListener::default()),
        started,
        fence: Arc::new(Fence::default()),
        fleet: Arc::clone(&fleet),
        metrics: Arc::clone(&metrics),
    };
    let deliveries = Arc::new(Deliveries::new(context));
    let (nobody_listens, listed) = (mpsc::channel(1).0, watch::channel(false).0);
    let keeper =
        FleetKeeper::new(fleet, checks, deliveries, slow_start, metrics, nobody_listens, [Source::Static], listed);
    Rig { keeper }
}

impl Rig {
    fn tell(&mut self, event: Event) {
        self.keeper.apply(event);
        self.keeper.settle();
    }

    fn join(&mut self, id: &str, weight: u32) {
        self.tell(Event::Joined(NodeSpec { weight, ..spec(id) }));
    }

    /// As many results as change the verdict.
    fn check(&mut self, id: &str, verdict: &Verdict) {
        for _ in 0..3 {
            let NodeSpec { role, id, address, .. } = spec(id);
            let check =
                Check { role, id, address, began: Instant::now(), took: Duration::ZERO, verdict: verdict.clone() };
            self.tell(Event::Checked(check));
        }
    }

    /// Two nodes that were there at the start.
    fn settled(panic_threshold: f64) -> Self {
        let mut rig = rig(panic_threshold);
        ["a", "b"].into_iter().for_each(|id| rig.join(id, 1));
        rig.tell(Event::Listed(Source::Static));
        ["a", "b"].into_iter().for_each(|id| rig.check(id, &Verdict::Passed));
        rig
    }

    fn share(&self, id: &str) -> u32 {
        self.keeper.fleet.load().web.get(&spec(id).id).unwrap().node.live.share()
    }

    fn shares(&self) -> [u32; 2] {
        [self.share("a"), self.share("b")]
    }
}

fn spec(id: &str) -> NodeSpec {
    NodeSpec::new(Role::Web, NodeId::try_from(id).unwrap(), ([127, 0, 0, 1], 1).into())
}

fn down() -> Verdict {
    Verdict::Failed("it does not answer".into())
}

const WHOLE: [u32; 2] = [WHOLE_SHARE; 2];

#[tokio::test(start_paused = true)]
async fn nodes_that_are_new_together_have_their_whole_share_at_once() {
    assert_eq!(Rig::settled(0.0).shares(), WHOLE);
    // Also where one of them is down at first and the other one is not known yet.
    let mut rig = rig(0.0);
    ["a", "b"].into_iter().for_each(|id| rig.join(id, 1));
    rig.tell(Event::Listed(Source::Static));
    rig.check("a", &down());
    rig.check("a", &Verdict::Passed);
    rig.check("b", &Verdict::Passed);
    assert_eq!(rig.shares(), WHOLE);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_recovers_starts_slowly_and_ends_with_the_whole() {
    let mut rig = Rig::settled(0.0);
    rig.check("a", &down());
    rig.check("a", &Verdict::Passed);
    let [first, other] = rig.shares();
    assert!(first < WHOLE_SHARE / 8 && other == WHOLE_SHARE, "{first} {other}");
    tokio::time::sleep(Duration::from_secs(5)).await;
    let half = rig.share("a");
    assert!((WHOLE_SHARE / 2..WHOLE_SHARE * 3 / 4).contains(&half), "{half}");
    // What else is published meanwhile changes nothing about it.
    rig.check("b", &down());
    assert_eq!(rig.share("a"), half);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(rig.shares(), WHOLE);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_joins_later_starts_slowly_with_its_first_pass() {
    let mut rig = Rig::settled(0.0);
    rig.join("c", 1);
    assert_eq!(rig.share("c"), WHOLE_SHARE);
    tokio::time::sleep(Duration::from_secs(60)).await;
    rig.check("c", &Verdict::Passed);
    assert!(rig.share("c") < WHOLE_SHARE / 8);
    rig.tell(Event::Left(Source::Static, Role::Web, spec("c").id));
    rig.join("c", 1);
    rig.check("c", &Verdict::Passed);
    assert!(rig.share("c") < WHOLE_SHARE / 8, "another node with this id had a slow start, and not this one");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_was_drained_starts_slowly_when_it_gets_traffic_again() {
    let mut rig = Rig::settled(0.0);
    rig.join("a", 0);
    assert_eq!(rig.share("a"), WHOLE_SHARE);
    rig.join("a", 1);
    assert!(rig.share("a") < WHOLE_SHARE / 8);
}

#[tokio::test(start_paused = true)]
async fn who_was_used_in_spite_of_its_health_goes_on_with_what_it_has() {
    let mut rig = Rig::settled(1.0);
    ["a", "b"].into_iter().for_each(|id| rig.check(id, &down()));
    rig.check("a", &Verdict::Passed);
    assert_eq!(rig.shares(), WHOLE);
}
