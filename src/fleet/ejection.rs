//! Ejection: a node that fails the requests of clients gets none for a while, whatever its health checks say.
//!
//! A check asks for one page, and not for that which is broken. A node whose PHP has lost its code cache, or its connection to the
//! search, passes it and fails its readers. One that fails every tenth of them is none of these: its good answers end the row.
//! Envoy calls this outlier detection; its numbers are used here (five
//! failures in a row, 30 s times the number of ejections, at most 300 s), and its lessons:
//!
//! - **An outlier is one that the others are not.** If more nodes fail than may be ejected, their common cause is elsewhere (a
//!   database is gone; a client asks for what fails everywhere), and taking nodes out would only load the others. So nobody is
//!   ejected then. This is what keeps the fleet from a client that asks for a page that always fails: its requests reach every
//!   node. Where others are served beside it, their answers end the rows, so a row has to last ([`LEAST_LASTING`]) as well.
//! - **Never more than a share** of the nodes that serve, and never the last of them. When others go down, those that have been
//!   out for the longest part of their time come back first.
//! - **A passed check is no reason to come back.** It passed all the time. One that failed, and passes again, is: it has seen
//!   both, as with a node that was restarted. That ends an ejection early, and nothing else does.
//! - **Time grows with each ejection and shrinks with the time in traffic**, by one step for each `eject_for`. So a node that
//!   fails now and then is not punished for last week, and one that fails at each return hardly gets requests.
//!
//! An ejection is of the traffic alone: health checks and purges go on. Pure: the caller has the clock, and publishes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{Health, NodeFault, NodeId, Streak};

/// The shortest time from the first to the last failure of a row that ejects.
pub const LEAST_LASTING: Duration = Duration::from_secs(1);

/// When nodes of a role are ejected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EjectionTerms {
    /// Failures in a row. 0: none is ejected.
    pub after: u32,
    /// The time of the first ejection, above zero.
    pub lasts: Duration,
    /// The longest time, at least `lasts`.
    pub longest: Duration,
    /// The largest share of the serving nodes that is out, 0 to 1: at least one node if it is above 0.
    pub most: f64,
}

impl EjectionTerms {
    /// How many of so many nodes may be out: never all.
    fn most_of(&self, serving: usize) -> usize {
        // 0.29 of 100 is 28.999….
        let share = (self.most * serving as f64 + 1e-6) as usize;
        share.max(usize::from(self.most > 0.0)).min(serving.saturating_sub(1))
    }

    /// How long a node stays out the `times`th time.
    fn time_of(&self, times: u32) -> Duration {
        self.lasts.saturating_mul(times).min(self.longest)
    }

    /// From this number of ejections on the time does not grow.
    fn most_times(&self) -> u32 {
        let times = self.longest.as_nanos().div_ceil(self.lasts.as_nanos().max(1));
        u32::try_from(times).unwrap_or(u32::MAX).max(1)
    }
}

/// A node that would serve if it were not ejected: it is up, and has a weight.
#[derive(Clone, Copy, Debug)]
pub struct ServingNode<'n> {
    /// Who.
    pub id: &'n NodeId,
    /// Its failures in a row.
    pub failures: u32,
}

/// An ejection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// When it ends.
    pub until: Instant,
    /// Its whole time.
    pub lasts: Duration,
    /// What it is for.
    pub fault: NodeFault,
}

/// The ejections of one role.
#[derive(Debug, Default)]
pub struct Ejections {
    /// Those that are out, or were not long ago.
    nodes: BTreeMap<NodeId, EjectionRecord>,
}

#[derive(Debug)]
struct EjectionRecord {
    /// How often it was ejected, less one for each time that it was in traffic for so long since.
    times: u32,
    /// What the time in traffic counts from.
    since: Instant,
    out: Option<Ejection>,
    /// A check has failed while it was out.
    was_down: bool,
}

impl Ejections {
    /// The ejection of this node, if it is out.
    pub fn of(&self, id: &NodeId) -> Option<&Ejection> {
        self.nodes.get(id).and_then(|record| record.out.as_ref())
    }

    /// Whether none is out, and none was lately.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// When the next ejection ends.
    pub fn due(&self) -> Option<Instant> {
        self.nodes.values().filter_map(|record| record.out.as_ref()).map(|out| out.until).min()
    }

    /// Ejects this node if its row of failures says so, and the others that serve do not fail alike. Returns whether it is out now,
    /// and was not.
    pub fn consider(
        &mut self,
        id: &NodeId,
        (streak, fault): (Streak, NodeFault),
        serving: &[ServingNode<'_>],
        terms: &EjectionTerms,
        now: Instant,
    ) -> bool {
        if terms.after == 0 || streak.failures < terms.after || streak.lasts < LEAST_LASTING || self.of(id).is_some() {
            return false;
        }
        if !serving.iter().any(|node| node.id == id) {
            return false;
        }
        // At half of the row: they are not asked in step.
        let fails = |node: &&ServingNode<'_>| node.id == id || node.failures >= terms.after.div_ceil(2);
        let failing = serving.iter().filter(|node| fails(node) || self.of(node.id).is_some()).count();
        if failing > terms.most_of(serving.len()) {
            return false;
        }
        let fresh = EjectionRecord { times: 0, since: now, out: None, was_down: false };
        let record = self.nodes.entry(id.clone()).or_insert(fresh);
        record.live_down(terms, now);
        record.times = record.times.saturating_add(1).min(terms.most_times());
        let lasts = terms.time_of(record.times);
        record.was_down = false;
        record.out = Some(Ejection { until: now + lasts, lasts, fault });
        true
    }

    /// Ends what is to end: what is due, and what is more than the share. Returns those that come back.
    pub fn settle(&mut self, serving: &[ServingNode<'_>], terms: &EjectionTerms, now: Instant) -> Vec<NodeId> {
        let is_over = |out: &Ejection| terms.after == 0 || out.until <= now;
        let mut back: Vec<NodeId> = Vec::new();
        for (id, record) in &mut self.nodes {
            if record.out.as_ref().is_some_and(is_over) {
                record.end(now);
                back.push(id.clone());
            }
        }
        let mut out: Vec<_> =
            serving.iter().filter_map(|node| self.of(node.id).map(|out| (out.until, node.id))).collect();
        out.sort_unstable();
        for (_, id) in out.iter().take(out.len().saturating_sub(terms.most_of(serving.len()))) {
            if let Some(record) = self.nodes.get_mut(*id) {
                record.end(now);
                back.push((*id).clone());
            }
        }
        self.nodes.retain(|_, record| {
            record.live_down(terms, now);
            record.out.is_some() || record.times > 0
        });
        back
    }

    /// Takes note of the health checks' verdict on this node. Returns whether that ends its ejection.
    pub fn health_changed(&mut self, id: &NodeId, health: Health, now: Instant) -> bool {
        let Some(record) = self.nodes.get_mut(id).filter(|record| record.out.is_some()) else { return false };
        match health {
            Health::Down => record.was_down = true,
            Health::Up if record.was_down => {
                record.end(now);
                return true;
            }
            Health::Up | Health::Unknown => {}
        }
        false
    }

    /// Forgets a node that has left, or that is another one under the same name.
    pub fn forget(&mut self, id: &NodeId) {
        self.nodes.remove(id);
    }
}

impl EjectionRecord {
    fn end(&mut self, now: Instant) {
        self.out = None;
        self.since = now;
    }

    /// Counts the time in traffic since it came back.
    fn live_down(&mut self, terms: &EjectionTerms, now: Instant) {
        if self.out.is_some() || self.times == 0 {
            return;
        }
        let step = terms.lasts.max(Duration::from_millis(1));
        while self.times > 0 && now.saturating_duration_since(self.since) >= step {
            self.times -= 1;
            self.since += step;
        }
    }
}

#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::FaultKind;

    const TERMS: EjectionTerms =
        EjectionTerms { after: 5, lasts: Duration::from_secs(30), longest: Duration::from_secs(100), most: 0.5 };

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    struct Rig {
        ejections: Ejections,
        ids: Vec<NodeId>,
        failures: Vec<u32>,
        now: Instant,
    }

    fn rig(nodes: usize) -> Rig {
        let ids = NAMES.into_iter().take(nodes).map(|id| NodeId::try_from(id).unwrap()).collect();
        Rig { ejections: Ejections::default(), ids, failures: vec![0; nodes], now: any_moment() }
    }

    impl Rig {
        fn serving<'n>(ids: &'n [NodeId], failures: &[u32]) -> Vec<ServingNode<'n>> {
            ids.iter().zip(failures).map(|(id, &failures)| ServingNode { id, failures }).collect()
        }

        /// This many failures in a row, in this time.
        fn fails_in(&mut self, node: usize, failures: u32, lasts: Duration) -> bool {
            self.failures[node] = failures;
            let fault = NodeFault::new(FaultKind::Fails, "answered 503");
            let serving = Self::serving(&self.ids, &self.failures);
            let streak = Streak { failures, lasts };
            self.ejections.consider(&self.ids[node], (streak, fault), &serving, &TERMS, self.now)
        }

        fn fails(&mut self, node: usize) -> bool {
            self.fails_in(node, 5, LEAST_LASTING)
        }

        /// Nodes that come back after this time, of those from the first to the `serving`th.
        fn after(&mut self, seconds: u64, serving: usize) -> Vec<String> {
            self.now += Duration::from_secs(seconds);
            let serving = Self::serving(&self.ids[..serving], &self.failures);
            let back = self.ejections.settle(&serving, &TERMS, self.now);
            back.iter().map(NodeId::to_string).collect()
        }

        /// Ejects the first node, waits until it is back; returns for how long it was out.
        fn out_for(&mut self) -> u64 {
            assert!(self.fails(0));
            let lasts = self.ejections.of(&self.ids[0]).unwrap().lasts.as_secs();
            assert!(self.after(lasts - 1, self.ids.len()).is_empty());
            assert_eq!(self.after(1, self.ids.len()), ["a"]);
            self.failures[0] = 0;
            lasts
        }
    }

    #[test]
    fn a_row_of_failures_that_lasts_ejects_and_a_short_or_quick_one_does_not() {
        let mut rig = rig(3);
        assert!(!rig.fails_in(0, 4, LEAST_LASTING * 10));
        assert!(!rig.fails_in(0, 100, LEAST_LASTING / 2), "one client that asks for what fails is as quick");
        assert!(rig.fails(0));
        assert!(!rig.fails(0), "it is out already");
    }

    #[test]
    fn the_time_grows_with_each_ejection_and_shrinks_in_traffic() {
        let mut rig = rig(3);
        assert_eq!([(); 5].map(|()| rig.out_for()), [30, 60, 90, 100, 100]);
        // Each half minute in traffic takes one step back.
        rig.after(61, 3);
        assert_eq!(rig.out_for(), 90);
        rig.after(1000, 3);
        assert!(rig.ejections.nodes.is_empty(), "nothing is held against it for ever");
        assert_eq!(rig.out_for(), 30);
    }

    #[test]
    fn never_more_than_the_share_and_never_the_last() {
        let mut four = rig(4);
        assert_eq!([0, 1].map(|node| four.fails(node)), [true, true]);
        four.failures = vec![0; 4];
        assert_eq!([2, 3].map(|node| four.fails(node)), [false, false]);
        let mut three = rig(3);
        assert_eq!([0, 1].map(|node| three.fails(node)), [true, false]);
        assert!(!rig(1).fails(0));
        let everybody = EjectionTerms { most: 1.0, ..TERMS };
        assert_eq!([1, 2, 3].map(|serving| everybody.most_of(serving)), [0, 1, 2]);
        let few = EjectionTerms { most: 0.1, ..TERMS };
        assert_eq!([1, 2, 10, 29].map(|serving| few.most_of(serving)), [0, 1, 1, 2]);
        assert_eq!(EjectionTerms { most: 0.29, ..TERMS }.most_of(100), 29);
        assert_eq!(EjectionTerms { most: 0.0, ..TERMS }.most_of(100), 0);
    }

    #[test]
    fn when_others_go_down_the_ejected_come_back_the_first_due_first() {
        let mut rig = rig(4);
        assert!(rig.fails(1));
        rig.after(5, 4);
        assert!(rig.fails(0));
        // Two of three may not be out.
        assert_eq!(rig.after(0, 3), ["b"]);
        assert_eq!(rig.after(0, 1), ["a"]);
    }

    #[test]
    fn what_fails_everywhere_ejects_nobody() {
        let mut rig = rig(4);
        rig.failures = vec![4, 3, 4, 3];
        assert!((0..4).all(|node| !rig.fails(node)));
    }

    #[test]
    fn only_a_check_that_had_failed_before_it_passes_brings_a_node_back() {
        let mut rig = rig(3);
        assert!(rig.fails(0));
        let id = rig.ids[0].clone();
        let mut checked = |health| rig.ejections.health_changed(&id, health, rig.now);
        assert_eq!(
            [Health::Up, Health::Up, Health::Down, Health::Down, Health::Up].map(&mut checked),
            [false, false, false, false, true]
        );
        assert!(rig.ejections.of(&id).is_none());
    }

    #[test]
    fn whoever_is_switched_off_ejects_nobody_and_brings_all_back() {
        let mut rig = rig(3);
        assert!(rig.fails(0));
        let off = EjectionTerms { after: 0, ..TERMS };
        let serving = Rig::serving(&rig.ids, &rig.failures);
        assert_eq!(rig.ejections.settle(&serving, &off, rig.now), [rig.ids[0].clone()]);
        let fault = NodeFault::new(FaultKind::Fails, "answered 503");
        let streak = Streak { failures: u32::MAX, lasts: Duration::MAX };
        assert!(!rig.ejections.consider(&rig.ids[0], (streak, fault), &serving, &off, rig.now));
    }

    /// Where the time of a test begins.
    pub(super) fn any_moment() -> Instant {
        Instant::now()
    }
}
