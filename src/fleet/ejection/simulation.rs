//! 10,000 seeded histories of a fleet, in virtual time: nodes fall ill in ways that their checks see, or do not, are drained and
//! recover, while each second brings requests, checks and decisions. What has to hold in every second of each is asserted by name.

use std::sync::Arc;

use super::tests::any_moment;
use super::*;
use crate::fleet::{FailureStreak, HealthState, Live, Member, Node, NodeSpec, Pool, RequestFault, Role, Thresholds};

const HISTORIES: u64 = 10_000;
const SECONDS: u32 = 25;
const THRESHOLDS: Thresholds = Thresholds { rise: 2, fall: 3 };

/// Numbers by chance, the same ones for the same seed: `SplitMix64`, since this layer has no source of them.
struct Dice(u64);

impl Dice {
    /// Below `sides`.
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % sides
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Well,
    /// Its checks pass, and its requests fail.
    FailsRequests,
    /// Both fail.
    Dead,
}

struct SimulatedNode {
    node: Arc<Node>,
    condition: Condition,
    health: HealthState,
    streak: FailureStreak,
    has_failed: bool,
    /// When it was ejected, for how long, and whether a check took it down since.
    out: Option<(Ejection, bool)>,
    /// How often it was ejected, and when it came back, by a count of the test's own.
    times: u32,
    returned: Instant,
}

struct History {
    seed: u64,
    dice: Dice,
    began: Instant,
    now: Instant,
    terms: EjectionTerms,
    panic_threshold: f64,
    ejections: Ejections,
    nodes: Vec<SimulatedNode>,
}

/// What the histories met together: a simulation in which nothing happens shows nothing.
#[derive(Debug, Default)]
struct Met {
    ejections: u64,
    repeated: u64,
    recalled: u64,
    recovered: u64,
    panics: u64,
    pardons: u64,
}

fn simulated(id: u64, now: Instant) -> SimulatedNode {
    let id = NodeId::try_from(format!("n{id}")).unwrap();
    let spec = NodeSpec::new(Role::Web, id, ([127, 0, 0, 1], 80).into());
    SimulatedNode {
        node: Arc::new(Node::new(spec, Arc::<Live>::default(), 1)),
        condition: Condition::Well,
        health: HealthState::default(),
        streak: FailureStreak::default(),
        has_failed: false,
        out: None,
        times: 0,
        returned: now,
    }
}

impl SimulatedNode {
    fn serves(&self) -> bool {
        self.health.health() == Health::Up && self.node.weight > 0
    }

    fn set_weight(&mut self, weight: u32) {
        let node = Node::new(self.node.spec.clone(), Arc::clone(&self.node.live), 1);
        self.node = Arc::new(Node { weight, ..node });
    }

    fn member(&self, ejections: &Ejections) -> Member {
        Member {
            node: Arc::clone(&self.node),
            health: self.health.health(),
            fault: None,
            ejection: ejections.of(self.node.id()).cloned(),
            retained: false,
            usable: false,
        }
    }
}

impl History {
    fn new(seed: u64, began: Instant) -> Self {
        let mut dice = Dice(seed);
        let nodes = (0..=dice.throw(6)).map(|id| simulated(id, began)).collect();
        let lasts = Duration::from_secs(2 + dice.throw(5));
        let terms = EjectionTerms {
            after: 1 + dice.throw(6) as u32,
            lasts,
            longest: lasts * (1 + dice.throw(4) as u32),
            most: dice.throw(1001) as f64 / 1000.0,
        };
        let panic_threshold = [0.0, 0.5, 1.0][dice.throw(3) as usize];
        let ejections = Ejections::default();
        History { seed, dice, began, now: began, terms, panic_threshold, ejections, nodes }
    }

    fn pool(&self) -> Pool {
        let members = self.nodes.iter().map(|node| node.member(&self.ejections)).collect();
        Pool::new(members, self.panic_threshold, None)
    }

    fn change_conditions(&mut self) {
        let common = self.dice.throw(40) == 0;
        for node in &mut self.nodes {
            if common || self.dice.throw(8) == 0 {
                let conditions = [Condition::Well, Condition::FailsRequests, Condition::Dead];
                node.condition =
                    if common { Condition::FailsRequests } else { conditions[self.dice.throw(3) as usize] };
            }
            if self.dice.throw(30) == 0 {
                node.set_weight(1 - node.node.weight);
            }
        }
    }

    fn check(&mut self, met: &mut Met) {
        for node in &mut self.nodes {
            let passed = node.condition != Condition::Dead;
            let Some(health) = node.health.record(passed, THRESHOLDS) else { continue };
            if health == Health::Up {
                node.streak.record_success();
            }
            let out = self.ejections.of(node.node.id()).is_some();
            let ended = self.ejections.health_changed(node.node.id(), health, self.now);
            if let Some((_, was_down)) = &mut node.out {
                assert_eq!(ended, out && *was_down && health == Health::Up, "a passed check alone ends nothing");
                *was_down |= health == Health::Down;
            }
            if ended {
                met.recovered += 1;
                node.out = None;
                node.returned = self.now;
                node.streak.record_success();
            }
        }
    }

    /// Requests to those that get traffic, and what becomes of them.
    fn ask(&mut self, met: &mut Met) {
        let pool = self.pool();
        let now_ms = (self.now - self.began).as_millis() as u32;
        // Both are in the order of the ids.
        let usable = pool.members().iter().enumerate().filter(|(_, member)| member.usable);
        for (index, _) in usable {
            for _ in 0..self.dice.throw(4) {
                let node = &mut self.nodes[index];
                if node.condition == Condition::Well {
                    node.streak.record_success();
                    continue;
                }
                node.has_failed = true;
                let streak = node.streak.record_failure(now_ms);
                self.consider(index, streak, met);
            }
        }
    }

    fn consider(&mut self, index: usize, streak: Streak, met: &mut Met) {
        let serving = self.nodes.iter().filter(|node| node.serves());
        let serving: Vec<_> =
            serving.map(|node| ServingNode { id: node.node.id(), failures: node.streak.failures() }).collect();
        let id = self.nodes[index].node.id().clone();
        let fault = RequestFault::Status(503).of_streak(streak.failures);
        if !self.ejections.consider(&id, (streak, fault), &serving, &self.terms, self.now) {
            return;
        }
        met.ejections += 1;
        let out = self.ejections.of(&id).unwrap().clone();
        let History { seed, terms, now, .. } = *self;
        let node = &mut self.nodes[index];
        assert!(node.has_failed, "{seed}: a node that never failed is out");
        assert!(streak.failures >= terms.after && streak.lasts >= LEAST_LASTING, "{seed}: {streak:?}");
        // The time grows by one step with each ejection, and shrinks by one with each such time in traffic.
        let lived = (now - node.returned).as_nanos() / terms.lasts.as_nanos();
        let most = terms.longest.as_nanos().div_ceil(terms.lasts.as_nanos()) as u32;
        node.times = (node.times.saturating_sub(lived as u32) + 1).min(most);
        assert_eq!(out.lasts, (terms.lasts * node.times).min(terms.longest), "{seed}: the {} time", node.times);
        met.repeated += u64::from(node.times > 1);
        node.out = Some((out, false));
    }

    fn settle(&mut self, met: &mut Met) {
        let serving = self.nodes.iter().filter(|node| node.serves());
        let serving: Vec<_> =
            serving.map(|node| ServingNode { id: node.node.id(), failures: node.streak.failures() }).collect();
        let were_out = serving.iter().filter(|node| self.ejections.of(node.id).is_some()).count();
        let most = self.terms.most_of(serving.len());
        let back = self.ejections.settle(&serving, &self.terms, self.now);
        for node in self.nodes.iter_mut().filter(|node| back.contains(node.node.id())) {
            let (out, _) = node.out.take().unwrap();
            if out.until > self.now {
                met.recalled += 1;
                assert!(were_out > most, "{}: it came back early, and for no reason", self.seed);
            }
            node.returned = self.now;
            node.streak.record_success();
        }
    }

    fn holds(&self, met: &mut Met) {
        let seed = self.seed;
        let pool = self.pool();
        let serving = self.nodes.iter().filter(|node| node.serves()).count();
        let out = self.nodes.iter().filter(|node| node.serves() && node.out.is_some()).count();
        let usable = pool.members().iter().filter(|member| member.usable).count();
        let weighted = self.nodes.iter().filter(|node| node.node.weight > 0).count();
        let share = self.terms.most * serving as f64;
        assert!(out as f64 <= share + 1e-6 || out == 1 && share > 0.0, "{seed}: more than the share is out");
        assert!(serving == 0 || out < serving, "{seed}: the last node is out");
        assert!(serving == 0 || usable > 0, "{seed}: a node that is up, and none gets traffic");
        assert!(!pool.panics() || usable == weighted, "{seed}: a panic leaves somebody out");
        for node in &self.nodes {
            assert_eq!(
                node.out.as_ref().map(|(out, _)| out),
                self.ejections.of(node.node.id()),
                "{seed}: out without a decision"
            );
            if let Some((out, _)) = &node.out {
                assert!(out.until > self.now, "{seed}: a node is out for longer than its time");
                assert!(out.lasts <= self.terms.longest, "{seed}: a time is longer than the longest");
                let member = pool.get(node.node.id()).unwrap();
                met.pardons += u64::from(member.usable && !pool.panics());
            }
        }
        met.panics += u64::from(pool.panics());
    }

    fn run(mut self, met: &mut Met) {
        for second in 0..SECONDS {
            self.now = self.began + Duration::from_secs(second.into());
            self.change_conditions();
            self.check(met);
            self.settle(met);
            self.ask(met);
            self.settle(met);
            self.holds(met);
        }
        // All are well from now on: what was held against them is forgotten in bounded time.
        for node in &mut self.nodes {
            node.condition = Condition::Well;
            node.set_weight(1);
        }
        self.now += self.terms.longest;
        self.settle(met);
        assert!(self.nodes.iter().all(|node| node.out.is_none()), "{}: a node that is well is not back", self.seed);
        self.now += self.terms.longest + self.terms.lasts;
        self.settle(met);
        assert!(self.ejections.is_empty(), "{}: something is held against a node for ever", self.seed);
    }
}

#[test]
fn what_must_hold_in_every_second_holds_in_10_000_histories() {
    let (mut met, began) = (Met::default(), any_moment());
    (0..HISTORIES).for_each(|seed| History::new(seed, began).run(&mut met));
    let Met { ejections, repeated, recalled, recovered, panics, pardons } = met;
    let all = [ejections, repeated, recalled, recovered, panics, pardons];
    assert!(all.iter().all(|&times| times > HISTORIES / 200), "it shows little: {met:?}");
    println!("{met:?} in {:?}", began.elapsed());
}
