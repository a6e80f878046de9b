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
    Rig { ejections: Ejections::default(), ids, failures: vec![0; nodes], now: Instant::now() }
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
