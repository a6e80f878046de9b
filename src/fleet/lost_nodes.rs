//! Nodes missing from their source, and the decision whether to keep them.
//!
//! A registry is wrong more often than a fleet dies. An unstable etcd lets every lease expire; a script deletes too
//! wide a prefix; a name server answers with nothing. The nodes themselves are healthy, and the worst reaction is to
//! drop them. So losses are checked twice:
//!
//! - A node that **vanished** without a deletion stays while its health check passes, for a bounded time. An intended
//!   removal is a deletion.
//! - If **more than half** of the nodes of a role are lost within a short time, deleted or not, none of them is
//!   removed: they are *held*, whatever their health, until they return or their time is over. A node that is down gets
//!   no traffic anyway, but it gets purges, and is current when it returns.
//!
//! Related losses rarely arrive together: etcd ends expired leases in batches. So losses are gathered for a moment
//! before a decision, and are added up for a while after the first.
//!
//! A node that was drained before its deletion is not handled here: its removal is clearly intended.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::{NodeId, NodeKey, NodeSource, Role};

/// Losses within this time of the first one are added up.
pub const WINDOW: Duration = Duration::from_secs(10);

/// How long losses are gathered before a decision.
pub const GATHER: Duration = Duration::from_millis(250);

/// The nodes that are absent from their source, and still in the fleet.
#[derive(Debug)]
pub struct LostNodes {
    retain: Duration,
    nodes: BTreeMap<NodeKey, LostNode>,
    losses: BTreeMap<(NodeSource, Role), Losses>,
}

#[derive(Debug)]
struct LostNode {
    source: NodeSource,
    since: Instant,
    /// The node was deleted explicitly.
    deleted: bool,
    state: LossState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LossState {
    Undecided,
    Retained,
    Held,
}

/// The recent losses of one source and role.
#[derive(Debug)]
struct Losses {
    /// When the first of them happened.
    began: Instant,
    /// The number of nodes before it.
    there: usize,
    lost: BTreeSet<NodeId>,
    /// When the oldest undecided loss happened.
    gathered_since: Option<Instant>,
    /// The mass loss was already reported.
    told: bool,
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LossDecision {
    /// This node leaves the fleet.
    Leaves(Role, NodeId),
    /// A source has lost too many of its nodes: they are held. Reported once for each such event.
    Mass {
        /// Whose nodes.
        source: NodeSource,
        /// Their role.
        role: Role,
        /// The number of lost nodes.
        lost: usize,
        /// The number of nodes before.
        there: usize,
    },
}

impl LostNodes {
    /// Nobody is absent. `retain` is how long a node may be at most; zero is not at all.
    pub fn new(retain: Duration) -> Self {
        LostNodes { retain, nodes: BTreeMap::new(), losses: BTreeMap::new() }
    }

    /// Records that a source no longer names this node; `deleted`: because of an explicit deletion. `there` counts the
    /// nodes of this source and role in the fleet. Returns whether the node leaves at once.
    pub fn lost(
        &mut self,
        source: NodeSource,
        (role, id): NodeKey,
        deleted: bool,
        now: Instant,
        there: impl FnOnce() -> usize,
    ) -> bool {
        if self.retain.is_zero() {
            return true;
        }
        let is_over =
            |losses: &Losses| losses.gathered_since.is_none() && now.saturating_duration_since(losses.began) >= WINDOW;
        if self.losses.get(&(source, role)).is_none_or(is_over) {
            let absent = self.nodes.iter().filter(|((of, _), node)| *of == role && node.source == source).count();
            let (lost, gathered_since, told) = (BTreeSet::new(), None, false);
            let there = there().saturating_sub(absent);
            self.losses.insert((source, role), Losses { began: now, there, lost, gathered_since, told });
        }
        if let Some(losses) = self.losses.get_mut(&(source, role)) {
            losses.lost.insert(id.clone());
            losses.gathered_since.get_or_insert(now);
        }
        self.nodes.insert((role, id), LostNode { source, since: now, deleted, state: LossState::Undecided });
        false
    }

    /// A source names this node (again). Returns whether it was absent.
    pub fn returned(&mut self, source: NodeSource, node: &NodeKey) -> bool {
        if let Some(losses) = self.losses.get_mut(&(source, node.0)) {
            losses.lost.remove(&node.1);
        }
        self.forget(node)
    }

    /// The node has left, or is not of this source any more. Returns whether it was absent.
    pub fn forget(&mut self, node: &NodeKey) -> bool {
        self.nodes.remove(node).is_some()
    }

    /// Whether a node that has just gone down leaves.
    pub fn leaves_when_down(&self, node: &NodeKey) -> bool {
        self.nodes.get(node).is_some_and(|node| node.state == LossState::Retained)
    }

    /// Whether a node is in the fleet though its source does not name it.
    pub fn is_absent(&self, node: &NodeKey) -> bool {
        self.nodes.contains_key(node)
    }

    /// The number of held nodes of this role.
    pub fn held(&self, role: Role) -> usize {
        self.nodes.iter().filter(|((of, _), node)| *of == role && node.state == LossState::Held).count()
    }

    /// When the next decision is due.
    pub fn due(&self) -> Option<Instant> {
        let gathered = self.losses.values().filter_map(|losses| Some(losses.gathered_since? + GATHER));
        let decided = self.nodes.values().filter(|node| node.state != LossState::Undecided);
        gathered.chain(decided.map(|node| node.since + self.retain)).min()
    }

    /// Decides what is due.
    pub fn decide(&mut self, now: Instant, is_down: impl Fn(&NodeKey) -> bool) -> Vec<LossDecision> {
        let mut decisions = Vec::new();
        for (&(source, role), losses) in &mut self.losses {
            if losses.gathered_since.is_none_or(|since| now < since + GATHER) {
                continue;
            }
            losses.gathered_since = None;
            let is_mass = losses.lost.len() >= 2 && losses.lost.len() * 2 > losses.there;
            if is_mass && !std::mem::replace(&mut losses.told, true) {
                decisions.push(LossDecision::Mass { source, role, lost: losses.lost.len(), there: losses.there });
            }
            let of_these = |key: &NodeKey, node: &LostNode| key.0 == role && node.source == source;
            for (key, node) in self.nodes.iter_mut().filter(|(key, node)| of_these(key, node)) {
                if is_mass && node.since >= losses.began {
                    node.state = LossState::Held;
                } else if node.state == LossState::Undecided {
                    node.state = LossState::Retained;
                    if node.deleted || is_down(key) {
                        decisions.push(LossDecision::Leaves(key.0, key.1.clone()));
                    }
                }
            }
        }
        let is_over = |node: &LostNode| node.state != LossState::Undecided && now >= node.since + self.retain;
        let over = self.nodes.iter().filter(|(_, node)| is_over(node)).map(|(key, _)| key.clone());
        decisions.extend(over.map(|(role, id)| LossDecision::Leaves(role, id)));
        decisions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETAIN: Duration = Duration::from_secs(600);

    struct Rig {
        lost_nodes: LostNodes,
        start: Instant,
        there: usize,
        down: Vec<&'static str>,
    }

    fn rig(there: usize) -> Rig {
        Rig { lost_nodes: LostNodes::new(RETAIN), start: Instant::now(), there, down: Vec::new() }
    }

    fn node(id: &str) -> NodeKey {
        (Role::Web, NodeId::try_from(id).unwrap())
    }

    impl Rig {
        fn at(&self, seconds: f64) -> Instant {
            self.start + Duration::from_secs_f64(seconds)
        }

        fn lose(&mut self, seconds: f64, id: &str, deleted: bool) {
            let (now, there) = (self.at(seconds), self.there);
            assert!(!self.lost_nodes.lost(NodeSource::Etcd, node(id), deleted, now, || there));
        }

        fn decide(&mut self, seconds: f64) -> Vec<String> {
            let down = self.down.clone();
            let decisions = self.lost_nodes.decide(self.at(seconds), |node| down.contains(&node.1.as_str()));
            let told = |ruling| match ruling {
                LossDecision::Leaves(role, id) => {
                    self.lost_nodes.forget(&(role, id.clone()));
                    id.to_string()
                }
                LossDecision::Mass { lost, there, .. } => format!("{lost} of {there}"),
            };
            decisions.into_iter().map(told).collect()
        }
    }

    #[test]
    fn a_deleted_node_leaves_and_a_vanished_one_stays_while_healthy() {
        let mut rig = rig(10);
        rig.down = vec!["ill"];
        rig.lose(0.0, "deleted", true);
        rig.lose(0.0, "well", false);
        rig.lose(0.0, "ill", false);
        assert_eq!(rig.decide(0.2), Vec::<String>::new());
        assert_eq!(rig.decide(0.25), ["deleted", "ill"]);
        assert!(rig.lost_nodes.is_absent(&node("well")));
        // It goes down later.
        assert!(rig.lost_nodes.leaves_when_down(&node("well")));
        assert!(!rig.lost_nodes.leaves_when_down(&node("another")));
        // Or its time is over.
        assert_eq!(rig.lost_nodes.due(), Some(rig.at(600.0)));
        assert_eq!(rig.decide(599.9), Vec::<String>::new());
        assert_eq!(rig.decide(600.0), ["well"]);
        assert_eq!(rig.lost_nodes.due(), None);
    }

    #[test]
    fn a_node_that_is_back_was_never_away() {
        let mut rig = rig(10);
        rig.lose(0.0, "a", true);
        assert!(rig.lost_nodes.returned(NodeSource::Etcd, &node("a")));
        assert!(!rig.lost_nodes.returned(NodeSource::Etcd, &node("a")));
        assert_eq!(rig.decide(1.0), Vec::<String>::new());
        rig.lose(2.0, "a", false);
        rig.decide(3.0);
        assert!(rig.lost_nodes.returned(NodeSource::Etcd, &node("a")));
        assert_eq!(rig.decide(1000.0), Vec::<String>::new());
    }

    #[test]
    fn more_than_half_at_once_are_held_whatever_they_are() {
        let mut rig = rig(4);
        rig.down = vec!["b"];
        rig.lose(0.0, "a", true);
        rig.lose(0.1, "b", false);
        rig.lose(0.2, "c", false);
        assert_eq!(rig.decide(0.3), ["3 of 4"]);
        assert_eq!(rig.lost_nodes.held(Role::Web), 3);
        assert_eq!(rig.lost_nodes.held(Role::Varnish), 0);
        assert!(!rig.lost_nodes.leaves_when_down(&node("b")));
        // The last one, a little later, is of the same event, and that was told.
        rig.lose(5.0, "d", true);
        assert_eq!(rig.decide(6.0), Vec::<String>::new());
        assert_eq!(rig.lost_nodes.held(Role::Web), 4);
        rig.lost_nodes.returned(NodeSource::Etcd, &node("a"));
        assert_eq!(rig.lost_nodes.held(Role::Web), 3);
        // Not for ever.
        assert_eq!(rig.decide(700.0), ["b", "c", "d"]);
    }

    #[test]
    fn half_of_them_may_go_and_so_may_one_alone() {
        let mut rig = rig(4);
        rig.lose(0.0, "a", true);
        rig.lose(0.0, "b", true);
        assert_eq!(rig.decide(0.3), ["a", "b"]);
        rig.there = 1;
        rig.lose(20.0, "c", true);
        assert_eq!(rig.decide(20.3), ["c"]);
    }

    #[test]
    fn what_goes_one_after_the_other_counts_together_for_a_while() {
        let mut rig = rig(4);
        rig.lose(0.0, "a", true);
        assert_eq!(rig.decide(0.3), ["a"]);
        rig.lose(3.0, "b", false);
        assert_eq!(rig.decide(3.3), Vec::<String>::new());
        assert_eq!(rig.lost_nodes.held(Role::Web), 0);
        // The third one is too many: it is held, and so is the one that was only retained.
        rig.lose(9.0, "c", true);
        assert_eq!(rig.decide(9.3), ["3 of 4"]);
        assert_eq!(rig.lost_nodes.held(Role::Web), 2);
        // A node that went long after is of another event.
        rig.there = 1;
        rig.lose(30.0, "d", true);
        assert_eq!(rig.decide(30.3), ["d"]);
    }

    #[test]
    fn who_was_back_in_between_does_not_count() {
        let mut rig = rig(3);
        for (second, id) in [(0.0, "a"), (1.0, "b"), (2.0, "c")] {
            rig.lose(second, id, false);
            assert_eq!(rig.decide(second + 0.3), Vec::<String>::new());
            rig.lost_nodes.returned(NodeSource::Etcd, &node(id));
        }
        assert_eq!(rig.lost_nodes.held(Role::Web), 0);
    }

    #[test]
    fn sources_are_counted_each_for_itself() {
        let mut rig = rig(2);
        rig.lose(0.0, "a", true);
        let now = rig.start;
        rig.lost_nodes.lost(NodeSource::Dns, node("b"), false, now, || 2);
        assert_eq!(rig.decide(0.3), ["a"]);
        assert!(rig.lost_nodes.is_absent(&node("b")));
    }

    #[test]
    fn with_no_time_to_stay_everybody_leaves_at_once() {
        let mut lost_nodes = LostNodes::new(Duration::ZERO);
        assert!(lost_nodes.lost(NodeSource::Etcd, node("a"), false, Instant::now(), || 2));
        assert_eq!((lost_nodes.due(), lost_nodes.is_absent(&node("a"))), (None, false));
    }
}
