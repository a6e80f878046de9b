//! Who starts slowly, and who stays. The checkers talk to nobody; the tests tell the keeper what was seen.

use std::time::{Duration, Instant};

use super::*;
use crate::config::PurgeListener;
use crate::delivery::{DeliveryContext, Pace, noted_by};
use crate::fleet::{
    CheckResult, FaultKind, Fence, LEAST_LASTING, Member, NamedOverride, NodeFault, NodeId, NodeOverride, RequestFault,
    Streak, VersionedOverride, WHOLE_SHARE,
};
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
    let context = DeliveryContext {
        journal: Arc::new(Memory::new(Limits::default(), noted_by(&guard))),
        guard,
        tracer: None,
        slow_start: Arc::clone(&slow_start),
        pace: Pace::new(&PurgeListener::default()),
        started,
        fence: Arc::new(Fence::default()),
        fleet: Arc::clone(&fleet),
        sealed: None,
        has_trials: true,
        metrics: Arc::clone(&metrics),
    };
    let deliveries = Arc::new(Deliveries::new(context));
    let (nobody_listens, listed) = (mpsc::channel(1).0, watch::channel(false).0);
    let (events, retain) = (nobody_listens, Duration::from_secs(600));
    let (headers, (doubted, _)) = (SecretHeaders::default(), watch::channel(()));
    let trials = None;
    let context = KeeperContext {
        fleet,
        headers,
        checks,
        zone: None,
        retain,
        deliveries,
        trials,
        slow_start,
        metrics,
        events,
        heartbeat: Arc::default(),
        doubted,
    };
    let mut rig = Rig { keeper: FleetKeeper::new(context, [NodeSource::Static], listed) };
    rig.operators(&[]);
    rig
}

impl Rig {
    fn tell(&mut self, event: Event) {
        self.keeper.take([event]);
    }

    fn join(&mut self, id: &str, weight: u32) {
        self.tell(Event::Joined(NodeSpec { weight, ..spec(id) }));
    }

    /// What operators say now of nodes of the web.
    fn operators(&mut self, say: &[(&str, NodeOverride)]) {
        let named = |(id, says): &(&str, NodeOverride)| NamedOverride {
            role: Role::Web,
            id: spec(id).id,
            versioned: VersionedOverride { version: 1, says: *says },
        };
        let overrides = say.iter().map(named).collect();
        self.keeper.follow_operators(Arc::new(KnownOverrides {
            is_complete: true,
            overrides,
            ..KnownOverrides::default()
        }));
    }

    fn member(&self, id: &str) -> Member {
        self.keeper.context.fleet.load().web.get(&spec(id).id).unwrap().clone()
    }

    /// As many results as change the verdict.
    fn check(&mut self, id: &str, verdict: &Verdict) {
        for _ in 0..3 {
            let (role, id) = (Role::Web, spec(id).id);
            let endpoint_id = self.keeper.nodes[&(role, id.clone())].node.endpoint_id;
            let check = CheckResult {
                role,
                id,
                endpoint_id,
                began: Instant::now(),
                took: Duration::ZERO,
                verdict: verdict.clone(),
            };
            self.tell(Event::Checked(check));
        }
    }

    /// Two nodes that were there at the start.
    fn settled(panic_threshold: f64) -> Self {
        let mut rig = rig(panic_threshold);
        ["a", "b"].into_iter().for_each(|id| rig.join(id, 1));
        rig.tell(Event::Listed(NodeSource::Static));
        ["a", "b"].into_iter().for_each(|id| rig.check(id, &Verdict::Passed));
        rig
    }

    fn share(&self, id: &str) -> u32 {
        self.keeper.context.fleet.load().web.get(&spec(id).id).unwrap().node.live.share()
    }

    fn shares(&self) -> [u32; 2] {
        [self.share("a"), self.share("b")]
    }
}

fn spec(id: &str) -> NodeSpec {
    NodeSpec::new(Role::Web, NodeId::try_from(id).unwrap(), ([127, 0, 0, 1], 1).into())
}

fn down() -> Verdict {
    Verdict::Failed(NodeFault::new(FaultKind::Silent, "it does not answer"))
}

const WHOLE: [u32; 2] = [WHOLE_SHARE; 2];

#[tokio::test(start_paused = true)]
async fn nodes_that_are_new_together_have_their_whole_share_at_once() {
    assert_eq!(Rig::settled(0.0).shares(), WHOLE);
    // Even if one of them is down at first and the other one is not known yet.
    let mut rig = rig(0.0);
    ["a", "b"].into_iter().for_each(|id| rig.join(id, 1));
    rig.tell(Event::Listed(NodeSource::Static));
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
    rig.tell(Event::Left(NodeSource::Static, Role::Web, spec("c").id));
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
async fn what_a_node_failed_before_it_comes_into_traffic_is_forgotten() {
    let mut rig = Rig::settled(0.0);
    let live = Arc::clone(&rig.member("a").node.live);
    let fails = || (0..4).for_each(|at| _ = live.failures.record_failure(at));
    fails();
    rig.check("a", &down());
    assert_eq!(live.failures.failures(), 4, "until it is well");
    rig.check("a", &Verdict::Passed);
    assert_eq!(live.failures.failures(), 0);
    fails();
    rig.join("a", 0);
    rig.join("a", 1);
    assert_eq!(live.failures.failures(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_result_for_the_node_that_had_this_name_before_says_nothing() {
    let mut rig = Rig::settled(0.0);
    let check = CheckResult {
        role: Role::Web,
        id: spec("a").id,
        endpoint_id: rig.member("a").node.endpoint_id,
        began: Instant::now(),
        took: Duration::ZERO,
        verdict: Verdict::Passed,
    };
    rig.tell(Event::Left(NodeSource::Static, Role::Web, spec("a").id));
    rig.join("a", 1);
    rig.tell(Event::Checked(check.clone()));
    assert_eq!(rig.member("a").health, Health::Unknown);
    rig.tell(Event::Checked(CheckResult { endpoint_id: rig.member("a").node.endpoint_id, ..check }));
    assert_eq!(rig.member("a").health, Health::Up);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_be_asked_from_here_keeps_no_slow_start_off() {
    let mut rig = rig(0.0);
    ["a", "b"].into_iter().for_each(|id| rig.join(id, 1));
    rig.tell(Event::Listed(NodeSource::Static));
    rig.check("a", &Verdict::Passed);
    rig.check("b", &Verdict::NotAsked("no route that may be used".to_owned()));
    rig.check("a", &down());
    rig.check("a", &Verdict::Passed);
    assert!(rig.share("a") < WHOLE_SHARE / 8);
}

const DRAINED: NodeOverride = NodeOverride { drained_at_ms: Some(1), weight: None };

#[tokio::test(start_paused = true)]
async fn a_node_that_an_operator_drains_gets_nothing_until_it_is_resumed() {
    let mut rig = Rig::settled(0.0);
    let key = rig.member("a").node.endpoint_id;
    rig.operators(&[("a", DRAINED)]);
    assert_eq!((rig.member("a").usable, rig.member("b").usable), (false, true));
    // Whatever else is heard of it: another weight, a check, a change of the file.
    rig.join("a", 7);
    rig.check("a", &down());
    rig.check("a", &Verdict::Passed);
    assert_eq!((rig.member("a").usable, rig.member("a").node.weight), (false, 0));
    rig.operators(&[]);
    let member = rig.member("a");
    assert_eq!((member.usable, member.node.weight, member.node.endpoint_id), (true, 7, key));
    assert!(rig.share("a") < WHOLE_SHARE / 8);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_leaves_and_comes_back_is_as_an_operator_left_it() {
    let mut rig = Rig::settled(0.0);
    let weighted = NodeOverride { drained_at_ms: None, weight: std::num::NonZeroU16::new(5) };
    rig.operators(&[("a", DRAINED), ("c", weighted)]);
    rig.tell(Event::Left(NodeSource::Static, Role::Web, spec("a").id));
    assert_eq!(rig.shown(), ["b"]);
    rig.join("a", 1);
    rig.join("c", 1);
    rig.check("a", &Verdict::Passed);
    rig.check("c", &Verdict::Passed);
    assert_eq!((rig.member("a").usable, rig.member("c").node.weight), (false, 5));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_an_operator_drained_and_that_is_deleted_leaves_at_once() {
    let mut rig = Rig::of_etcd(&["a", "b"]);
    rig.operators(&[("a", DRAINED)]);
    rig.tell(left("a"));
    assert_eq!(rig.shown(), ["b*"]);
}

#[tokio::test(start_paused = true)]
async fn the_fleet_is_not_known_before_what_operators_say_is() {
    let mut rig = rig(0.0);
    rig.keeper.overrides = Arc::default();
    rig.tell(Event::Listed(NodeSource::Static));
    assert!(!*rig.keeper.listed.borrow());
    rig.operators(&[]);
    assert!(*rig.keeper.listed.borrow());
}

#[tokio::test(start_paused = true)]
async fn who_was_used_in_spite_of_its_health_goes_on_with_what_it_has() {
    let mut rig = Rig::settled(1.0);
    ["a", "b"].into_iter().for_each(|id| rig.check(id, &down()));
    rig.check("a", &Verdict::Passed);
    assert_eq!(rig.shares(), WHOLE);
}

impl Rig {
    /// The nodes, as they are shown: `a` is from the file, `a*` from etcd, `a*?` absent from it.
    fn shown(&self) -> Vec<String> {
        let fleet = self.keeper.context.fleet.load();
        let of = |member: &Member| {
            let source = if member.node.spec.source == NodeSource::Etcd { "*" } else { "" };
            format!("{}{source}{}", member.node.id(), if member.retained { "?" } else { "" })
        };
        fleet.web.members().iter().map(of).collect()
    }

    fn of_etcd(nodes: &[&str]) -> Self {
        let mut rig = rig(0.0);
        nodes.iter().for_each(|id| rig.tell(Event::Joined(etcd(id, 1))));
        rig.tell(Event::Listed(NodeSource::Static));
        nodes.iter().for_each(|id| rig.check(id, &Verdict::Passed));
        rig
    }

    /// Lets time pass, and what is due happen.
    async fn after(&mut self, seconds: f64) -> Vec<String> {
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        self.keeper.take([]);
        self.shown()
    }

    fn held(&self) -> String {
        let text = String::from_utf8(self.keeper.context.metrics.render().unwrap()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("clearcoat_registry_held{role=\"web\"} "));
        line.unwrap().to_owned()
    }
}

fn etcd(id: &str, weight: u32) -> NodeSpec {
    NodeSpec { source: NodeSource::Etcd, weight, ..spec(id) }
}

fn left(id: &str) -> Event {
    Event::Left(NodeSource::Etcd, Role::Web, spec(id).id)
}

fn vanished(id: &str) -> Event {
    Event::Vanished(NodeSource::Etcd, Role::Web, spec(id).id)
}

#[tokio::test(start_paused = true)]
async fn a_node_that_vanished_stays_while_it_is_well_and_no_longer_than_that() {
    let mut rig = Rig::of_etcd(&["a", "b", "c", "d"]);
    rig.tell(vanished("a"));
    assert_eq!(rig.shown(), ["a*?", "b*", "c*", "d*"]);
    assert_eq!(rig.after(599.0).await, ["a*?", "b*", "c*", "d*"]);
    assert_eq!(rig.after(1.0).await, ["b*", "c*", "d*"]);
    rig.tell(vanished("b"));
    rig.after(1.0).await;
    rig.check("b", &down());
    assert_eq!(rig.shown(), ["c*", "d*"]);
    // One that is down already, long after: two of three at once would be held.
    rig.after(10.0).await;
    rig.check("c", &down());
    rig.tell(vanished("c"));
    assert_eq!(rig.after(1.0).await, ["d*"]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_vanished_and_is_back_has_its_traffic_all_the_time() {
    let mut rig = Rig::of_etcd(&["a", "b", "c"]);
    rig.tell(vanished("a"));
    rig.after(5.0).await;
    rig.tell(Event::Joined(etcd("a", 1)));
    assert_eq!(rig.shown(), ["a*", "b*", "c*"]);
    assert_eq!(rig.share("a"), WHOLE_SHARE);
    rig.check("a", &down());
    assert_eq!(rig.after(1000.0).await, ["a*", "b*", "c*"]);
}

#[tokio::test(start_paused = true)]
async fn a_drained_node_that_is_deleted_leaves_at_once_others_in_a_moment() {
    let mut rig = Rig::of_etcd(&["a", "b", "c", "d"]);
    rig.tell(Event::Joined(etcd("a", 0)));
    rig.tell(left("a"));
    assert_eq!(rig.shown(), ["b*", "c*", "d*"]);
    rig.tell(left("b"));
    assert_eq!(rig.after(0.3).await, ["c*", "d*"]);
}

#[tokio::test(start_paused = true)]
async fn most_nodes_at_once_are_held_and_those_that_were_drained_are_not() {
    let mut rig = Rig::of_etcd(&["a", "b", "c", "d"]);
    rig.tell(Event::Joined(etcd("d", 0)));
    rig.keeper.take([left("a"), left("b"), vanished("c"), left("d")]);
    assert_eq!(rig.after(0.3).await, ["a*?", "b*?", "c*?"]);
    assert_eq!(rig.held(), "3");
    rig.check("a", &down());
    assert_eq!(rig.shown(), ["a*?", "b*?", "c*?"]);
    rig.tell(Event::Joined(etcd("a", 1)));
    assert_eq!((rig.held().as_str(), rig.shown().join(" ").as_str()), ("2", "a* b*? c*?"));
    // How an operator lets go of one: he drains it.
    rig.tell(Event::Joined(etcd("b", 0)));
    rig.tell(left("b"));
    assert_eq!((rig.held().as_str(), rig.shown().join(" ").as_str()), ("1", "a* c*?"));
    assert_eq!(rig.after(600.0).await, ["a*"]);
    assert_eq!(rig.held(), "0");
}

#[tokio::test(start_paused = true)]
async fn what_the_file_says_counts_and_the_other_source_when_it_is_gone() {
    let mut rig = Rig::settled(0.0);
    rig.tell(Event::Joined(etcd("a", 7)));
    rig.tell(vanished("b"));
    assert_eq!(rig.after(1.0).await, ["a", "b"]);
    let key = |rig: &Rig| rig.keeper.context.fleet.load().web.get(&spec("a").id).unwrap().node.endpoint_id;
    let before = key(&rig);
    rig.tell(Event::Left(NodeSource::Static, Role::Web, spec("a").id));
    assert_eq!(rig.shown(), ["a*", "b"]);
    assert_eq!(key(&rig), before, "it is reached as before: what is connected to it goes on");
    assert_eq!(rig.keeper.context.fleet.load().web.get(&spec("a").id).unwrap().node.spec.weight, 7);
    // The other way round: the file takes over, and gives back.
    rig.join("a", 1);
    assert_eq!(rig.shown(), ["a", "b"]);
    rig.tell(left("a"));
    assert_eq!(rig.after(1.0).await, ["a", "b"]);
    rig.tell(Event::Left(NodeSource::Static, Role::Web, spec("a").id));
    assert_eq!(rig.shown(), ["b"]);
}

#[tokio::test(start_paused = true)]
async fn many_events_become_one_snapshot_and_none_becomes_none() {
    let mut rig = rig(0.0);
    let version = |rig: &Rig| rig.keeper.context.fleet.load().version;
    let before = version(&rig);
    let nodes: Vec<String> = (0..1000).map(|number| format!("n{number}")).collect();
    rig.keeper.take(nodes.iter().map(|id| Event::Joined(etcd(id, 1))));
    assert_eq!((version(&rig), rig.shown().len()), (before + 1, 1000));
    rig.keeper.take(nodes.iter().map(|id| Event::Joined(etcd(id, 1))));
    assert_eq!(version(&rig), before + 1);
}

impl Rig {
    /// A row of requests that this node failed, at its present address or another one.
    fn fails(&mut self, id: &str, at_its_address: bool) {
        let endpoint_id = self.member(id).node.endpoint_id + u64::from(!at_its_address);
        let streak = Some(Streak { failures: 5, lasts: LEAST_LASTING });
        let node = (Role::Web, spec(id).id);
        let suspicion = Suspicion { node, endpoint_id, fault: RequestFault::Status(503), streak };
        self.keeper.suspect(suspicion, super::now());
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_fails_requests_is_out_for_its_time_and_starts_slowly_then() {
    let mut rig = Rig::settled(0.5);
    rig.fails("a", false);
    assert!(rig.member("a").usable, "that was another one");
    rig.fails("a", true);
    assert_eq!((rig.member("a").usable, rig.member("b").usable), (false, true));
    // Its check passed all the time.
    rig.check("a", &Verdict::Passed);
    rig.after(29.0).await;
    assert!(!rig.member("a").usable);
    rig.after(1.0).await;
    assert!(rig.member("a").usable && rig.share("a") < WHOLE_SHARE / 8, "{}", rig.share("a"));
}

#[tokio::test(start_paused = true)]
async fn an_ejection_ends_when_a_failed_check_passes_or_the_others_are_lost() {
    let mut rig = Rig::settled(0.0);
    rig.fails("a", true);
    rig.check("a", &down());
    rig.check("a", &Verdict::Passed);
    assert!(rig.member("a").usable);
    rig.fails("a", true);
    assert!(!rig.member("a").usable);
    rig.check("b", &down());
    assert!(rig.member("a").usable, "it is the last");
}
