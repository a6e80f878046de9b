//! The faults of a run: a schedule determined by its seed, and its execution.

use std::time::Duration;

use fastrand::Rng;

use super::history::Moment;
use super::run::Run;
use crate::support::fleet::Fleet;

/// A fault or its end. Varnish nodes are given by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// SIGSTOP: the kernel still accepts connections and data, but there are no answers.
    Hang(usize),
    /// SIGCONT: the data in its sockets is read now.
    Resume(usize),
    /// kill -9.
    Kill(usize),
    /// A start with an empty cache.
    Restart(usize),
    /// kill -9 of clearcoat, and a start on the same ports and journal. Several clearcoats take turns.
    KillClearcoat,
    /// SIGSTOP of an etcd member, by index.
    HangEtcd(usize),
    ResumeEtcd(usize),
    /// kill -9 of every member.
    KillEtcd,
    RestartEtcd,
    /// The disk of the first clearcoat's journal blocks all writes without an error.
    Freeze,
    Thaw,
}

/// An act and its time.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub at: Moment,
    pub act: Act,
}

/// The kinds to draw from, shuffled again and again: every kind of fault comes in every half minute, the most revealing
/// ones more than once.
const DECK: [Kind; 9] = {
    use Kind::{Clearcoat, ClearcoatInHang, Death, LongHang, OutlivedHang, ShortHang};
    [ShortHang, OutlivedHang, OutlivedHang, OutlivedHang, LongHang, Death, Clearcoat, ClearcoatInHang, ClearcoatInHang]
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Shorter than `ack_timeout`: purges wait for the node.
    ShortHang,
    /// Purges are answered without the node, but before a health check fails: only the fence keeps readers away when it
    /// resumes.
    OutlivedHang,
    /// Health checks detect it.
    LongHang,
    /// A node is killed, and comes back with an empty cache.
    Death,
    /// Clearcoat is killed.
    Clearcoat,
    /// Clearcoat is killed before it could deliver the purges that a hung node misses: only the journal has them.
    ClearcoatInHang,
}

impl Kind {
    /// How long a fault lasts, in ms.
    fn lasts(self) -> std::ops::Range<u64> {
        match self {
            Kind::ShortHang => 200..1000,
            Kind::OutlivedHang => 1050..1700,
            Kind::LongHang => 1700..4000,
            Kind::Death => 100..2000,
            Kind::ClearcoatInHang => 2500..4000,
            Kind::Clearcoat => 0..1,
        }
    }
}

/// When a hung or dead node is certainly marked down: after the longest interval, and two checks that time out.
const FOUND_OUT: Duration = Duration::from_millis(2500);

/// The time for requests that moved from one node to another: the other one must stay healthy meanwhile, since a request is tried
/// on two nodes and not on a third. On a busy machine the slowest reads take seconds.
const MOVED: Duration = Duration::from_millis(1000);

/// A random schedule for `nodes` Varnish nodes. Mostly one of them is hung or dead at a time, sometimes two, never
/// three; clearcoat is killed independently. Everything is healed at the end of `length`.
pub fn random(seed: u64, nodes: usize, length: Duration) -> Vec<Step> {
    let mut random = Rng::with_seed(seed);
    let mut steps = Vec::new();
    let mut deck = Vec::new();
    // For each node the start and the end of its last fault.
    let mut ill = vec![(Duration::ZERO, Duration::ZERO); nodes];
    let mut at = Duration::from_millis(300);
    while at < length {
        let kind = deck.pop().unwrap_or_else(|| {
            deck.extend(DECK);
            random.shuffle(&mut deck);
            deck.pop().expect("a full deck")
        });
        if kind == Kind::Clearcoat {
            steps.push(Step { at, act: Act::KillClearcoat });
        } else {
            at = at.max(room_at(&ill, &mut random));
            let well: Vec<usize> = (0..nodes).filter(|&node| ill[node].1 <= at).collect();
            let node = *random.choice(&well).expect("a node that is well");
            if ill.iter().any(|other| other.0 > ill[node].0) {
                at += MOVED;
            }
            if at >= length {
                break;
            }
            let (begin, end) = match kind {
                Kind::Death => (Act::Kill(node), Act::Restart(node)),
                _ => (Act::Hang(node), Act::Resume(node)),
            };
            let lasts = random.u64(kind.lasts());
            ill[node] = (at, (at + Duration::from_millis(lasts)).min(length));
            steps.extend([Step { at, act: begin }, Step { at: ill[node].1, act: end }]);
            if kind == Kind::ClearcoatInHang {
                at += Duration::from_millis(random.u64(200..2300));
                steps.push(Step { at, act: Act::KillClearcoat });
            }
        }
        at += Duration::from_millis(random.u64(100..900));
    }
    steps.retain(|step| step.at <= length);
    steps.sort_by_key(|step| step.at);
    steps
}

/// When another node may fail: in half of the cases once all are healed, otherwise already once the failure of the
/// current one is detected, if it lasts that long.
fn room_at(ill: &[(Moment, Moment)], random: &mut Rng) -> Moment {
    let mut ends: Vec<Moment> = ill.iter().map(|&(_, end)| end).collect();
    ends.sort();
    let (last, last_but_one) = (ends[ends.len() - 1], ends[ends.len() - 2]);
    let found_out = ill.iter().map(|&(begin, _)| begin + FOUND_OUT).max().expect("a node");
    if random.bool() { last } else { found_out.max(last_but_one).min(last) }
}

/// Alternating faults of etcd: a hanging member, all members killed, and time between them to recover.
pub fn of_etcd(seed: u64, members: usize, length: Duration) -> Vec<Step> {
    let mut random = Rng::with_seed(seed ^ 0xe7cd);
    let mut steps = Vec::new();
    let mut at = Duration::from_millis(1500);
    for turn in 0.. {
        let ends = at + Duration::from_millis(random.u64(2000..6000));
        if ends >= length {
            return steps;
        }
        let member = random.usize(..members);
        let (begin, end) = match turn % 2 {
            0 => (Act::HangEtcd(member), Act::ResumeEtcd(member)),
            _ => (Act::KillEtcd, Act::RestartEtcd),
        };
        steps.extend([Step { at, act: begin }, Step { at: ends, act: end }]);
        at = ends + Duration::from_millis(random.u64(1500..4000));
    }
    unreachable!("the run has an end")
}

/// Freezes the journal's disk now and then, usually for longer than a purge waits, sometimes for less.
pub fn of_disk(seed: u64, length: Duration) -> Vec<Step> {
    let mut random = Rng::with_seed(seed ^ 0xd15c);
    let mut steps = Vec::new();
    let mut at = Duration::from_millis(random.u64(2000..6000));
    loop {
        let ends = at + Duration::from_millis(random.u64(300..3000));
        if ends >= length {
            return steps;
        }
        steps.extend([Step { at, act: Act::Freeze }, Step { at: ends, act: Act::Thaw }]);
        at = ends + Duration::from_millis(random.u64(3000..8000));
    }
}

/// Two schedules as one.
pub fn both(mut one: Vec<Step>, other: Vec<Step>) -> Vec<Step> {
    one.extend(other);
    one.sort_by_key(|step| step.at);
    one
}

/// Hangs each node in turn for `hang`, with pauses of the same length. Too short to fail a health check.
pub fn hang_in_turn(nodes: usize, hang: Duration, length: Duration) -> Vec<Step> {
    let turns = (0..).map(|turn: u32| (turn as usize % nodes, hang * (1 + 2 * turn)));
    let steps =
        turns.map(|(node, at)| [Step { at, act: Act::Hang(node) }, Step { at: at + hang, act: Act::Resume(node) }]);
    steps.take_while(|steps| steps[1].at <= length).flatten().collect()
}

/// Executes a schedule, and leaves every node healed. A step that takes long delays the following ones, so that their
/// distances stay the same; steps that would begin after `length` are skipped.
pub fn inject(run: &Run, fleet: &mut Fleet, steps: &[Step], length: Duration) {
    let mut delay = Duration::ZERO;
    let mut ill = vec![false; fleet.varnish.len()];
    // The current fault of etcd.
    let mut etcd = None;
    let mut frozen = false;
    let mut killed = 0;
    for step in steps {
        std::thread::sleep((step.at + delay).saturating_sub(run.now()));
        let happens = match step.act {
            Act::Resume(node) | Act::Restart(node) => std::mem::take(&mut ill[node]),
            Act::ResumeEtcd(_) | Act::RestartEtcd => etcd.take().is_some(),
            Act::HangEtcd(_) | Act::KillEtcd if run.now() <= length => etcd.replace(step.act).is_none(),
            // A replica started while etcd is away knows only what other replicas tell it: see the tests of replicas.
            Act::KillClearcoat if etcd.is_some() => false,
            // A process that waits for a frozen disk cannot be killed.
            Act::KillClearcoat if frozen => false,
            Act::Freeze if run.now() <= length => !std::mem::replace(&mut frozen, true),
            Act::Thaw => std::mem::take(&mut frozen),
            Act::Hang(node) | Act::Kill(node) if run.now() <= length => !std::mem::replace(&mut ill[node], true),
            _ => run.now() <= length,
        };
        if happens {
            run.happened(format!("{:?}", step.act));
            carry_out(run, fleet, step.act, &mut killed);
            run.happened(format!("{:?} done", step.act));
        }
        delay = delay.max(run.now().saturating_sub(step.at));
    }
    std::thread::sleep(length.saturating_sub(run.now()));
}

fn carry_out(run: &Run, fleet: &mut Fleet, act: Act, killed: &mut usize) {
    match act {
        Act::Hang(node) => {
            run.set_hung(node, true);
            fleet.varnish[node].hang();
        }
        Act::Resume(node) => {
            fleet.varnish[node].resume();
            run.set_hung(node, false);
        }
        Act::Kill(node) => fleet.varnish[node].kill(),
        Act::Restart(node) => fleet.varnish[node].restart(),
        Act::KillClearcoat => {
            kill_clearcoat(run, fleet, *killed % (1 + fleet.others.len()));
            *killed += 1;
        }
        Act::HangEtcd(member) => fleet.etcd().hang(member),
        Act::ResumeEtcd(member) => fleet.etcd().resume(member),
        Act::KillEtcd => fleet.etcd().kill_all(),
        Act::RestartEtcd => fleet.etcd().restart_all(),
        Act::Freeze => {
            run.freeze_begins();
            fleet.disk.as_ref().expect("a plan with a disk").freeze();
        }
        Act::Thaw => {
            fleet.disk.as_ref().expect("a plan with a disk").thaw();
            fleet.clearcoat.opened();
            run.freeze_ends();
        }
    }
}

fn kill_clearcoat(run: &Run, fleet: &mut Fleet, number: usize) {
    let clearcoat = fleet.replica(number);
    run.keep_log(clearcoat.log().clone());
    run.note_judged(clearcoat);
    run.outage_begins(number);
    clearcoat.kill();
    clearcoat.restart();
    clearcoat.opened();
    run.outage_ends(number);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(30);

    /// The most nodes failed at once, and whether all are healed in the end.
    fn worst(steps: &[Step]) -> (usize, bool) {
        let mut ill = std::collections::BTreeSet::new();
        let mut most = 0;
        for step in steps {
            match step.act {
                Act::Hang(node) | Act::Kill(node) => assert!(ill.insert(node), "{step:?} of a node that is ill"),
                Act::Resume(node) | Act::Restart(node) => assert!(ill.remove(&node), "{step:?} of a node that is well"),
                Act::KillClearcoat
                | Act::HangEtcd(_)
                | Act::ResumeEtcd(_)
                | Act::KillEtcd
                | Act::RestartEtcd
                | Act::Freeze
                | Act::Thaw => {}
            }
            most = most.max(ill.len());
        }
        (most, ill.is_empty())
    }

    #[test]
    fn every_schedule_has_and_heals_every_fault_and_spares_one_varnish() {
        let mut most_ever = 0;
        for seed in 0..200 {
            let steps = random(seed, 3, LENGTH);
            let (most, healed) = worst(&steps);
            assert!(most <= 2 && healed, "seed {seed}: {most} ill at once, healed: {healed}");
            most_ever = most_ever.max(most);
            for kind in ["Hang", "Kill(", "KillClearcoat"] {
                let has = steps.iter().any(|step| format!("{:?}", step.act).starts_with(kind));
                assert!(has, "seed {seed}: no {kind} in {steps:?}");
            }
        }
        assert_eq!(most_ever, 2);
    }

    #[test]
    fn a_disk_is_frozen_and_thawed_in_turns_and_never_left_frozen() {
        for seed in 0..200 {
            let steps = of_disk(seed, LENGTH);
            assert!(steps.len() >= 2, "seed {seed}");
            for (number, step) in steps.iter().enumerate() {
                assert_eq!(step.act, if number % 2 == 0 { Act::Freeze } else { Act::Thaw }, "seed {seed}");
            }
            assert!(steps.is_sorted_by_key(|step| step.at) && steps.len().is_multiple_of(2), "seed {seed}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_schedule() {
        assert_eq!(format!("{:?}", random(5, 3, LENGTH)), format!("{:?}", random(5, 3, LENGTH)));
        assert_ne!(format!("{:?}", random(5, 3, LENGTH)), format!("{:?}", random(6, 3, LENGTH)));
    }

    #[test]
    fn hanging_in_turn_heals_too() {
        let steps = hang_in_turn(3, Duration::from_millis(700), Duration::from_secs(6));
        assert_eq!((steps.len(), worst(&steps)), (8, (1, true)));
    }
}
