//! What operators say of nodes while clearcoat runs: drained or not, and a weight in place of the registered one.
//!
//! An override belongs to the name of a node (role and id), not to its registration: an agent that registers its node anew, a
//! node that leaves and comes back, and a restart of clearcoat change nothing about it. Only an operator ends it. It never
//! gives traffic to a node that wants none: an operator's weight replaces a registered weight above 0 alone.
//!
//! Every clearcoat has a table of all overrides, and tables are merged in any order, any number of times, with one result:
//! of two overrides of a node the one with the higher version counts, and of two with the same version (two operators, at two
//! clearcoats that had not heard of each other) the one that is greater as a value, so that one that drains counts before one
//! that does not. An override that was taken back is kept as *spent*: without it, a clearcoat that was away would bring the
//! old one back. A version is higher than all in its table, or it is a revision of etcd.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{NodeId, NodeKey, NodeOverride, OverrideChange, Role};

/// The maximum number of nodes that can have an override in effect, so that a table fits into a message.
pub const MAX_OVERRIDES: usize = 1000;

/// The number of spent overrides that are kept. Those with the lowest versions go first.
const MAX_SPENT: usize = 500;

/// An override, and the version that decides which of several counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VersionedOverride {
    /// The version.
    pub version: u64,
    /// What the operator says.
    #[serde(flatten)]
    pub says: NodeOverride,
}

/// An override with its node, as a file or a message has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedOverride {
    /// The role of the node.
    pub role: Role,
    /// Its id.
    pub id: NodeId,
    /// The override.
    #[serde(flatten)]
    pub versioned: VersionedOverride,
}

/// So many nodes have an override already.
#[derive(Debug, thiserror::Error)]
#[error("{MAX_OVERRIDES} nodes have an override already: resume those that are gone for good")]
pub struct TooManyOverrides;

/// All overrides, with those that are spent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides(BTreeMap<NodeKey, VersionedOverride>);

impl Overrides {
    /// What operators say of this node.
    pub fn of(&self, node: &NodeKey) -> NodeOverride {
        self.0.get(node).map_or_else(NodeOverride::default, |known| known.says)
    }

    /// Those that say anything, with their nodes in order.
    pub fn in_effect(&self) -> impl Iterator<Item = (&NodeKey, NodeOverride)> {
        self.0.iter().filter(|(_, known)| !known.says.is_spent()).map(|(node, known)| (node, known.says))
    }

    /// All of them, for a file or a message.
    pub fn to_named(&self) -> Vec<NamedOverride> {
        let named = |((role, id), versioned): (&NodeKey, &VersionedOverride)| NamedOverride {
            role: *role,
            id: id.clone(),
            versioned: *versioned,
        };
        self.0.iter().map(named).collect()
    }

    /// Changes the override of a node. Its version is higher than all that are known here. Returns whether anything is new.
    ///
    /// # Errors
    /// [`TooManyOverrides`]: nothing is changed.
    pub fn change(&mut self, node: &NodeKey, change: OverrideChange, now_ms: u64) -> Result<bool, TooManyOverrides> {
        let before = self.of(node);
        let says = before.changed(change, now_ms);
        if says == before {
            return Ok(false);
        }
        if before.is_spent() && self.in_effect().count() >= MAX_OVERRIDES {
            return Err(TooManyOverrides);
        }
        let version = 1 + self.0.values().map(|known| known.version).max().unwrap_or(0);
        self.0.insert(node.clone(), VersionedOverride { version, says });
        self.forget_spent();
        Ok(true)
    }

    /// Takes what counts before what is known here. Returns whether anything is new.
    pub fn merge(&mut self, others: impl IntoIterator<Item = NamedOverride>) -> bool {
        let before = self.clone();
        for NamedOverride { role, id, versioned } in others {
            let known = self.0.entry((role, id)).or_insert(versioned);
            *known = versioned.max(*known);
        }
        self.forget_spent();
        *self != before
    }

    fn forget_spent(&mut self) {
        let spent = self.0.iter().filter(|(_, known)| known.says.is_spent());
        let mut oldest: Vec<(u64, NodeKey)> = spent.map(|(node, known)| (known.version, node.clone())).collect();
        oldest.sort_unstable();
        oldest.truncate(oldest.len().saturating_sub(MAX_SPENT));
        oldest.iter().for_each(|(_, node)| _ = self.0.remove(node));
    }
}

impl FromIterator<NamedOverride> for Overrides {
    fn from_iter<I: IntoIterator<Item = NamedOverride>>(named: I) -> Self {
        let mut overrides = Overrides::default();
        overrides.merge(named);
        overrides
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use proptest::prelude::*;

    use super::*;

    const DRAIN: OverrideChange = OverrideChange { drains: Some(true), weight: None };
    const RESUME: OverrideChange = OverrideChange { drains: Some(false), weight: None };

    fn weight(weight: u16) -> OverrideChange {
        OverrideChange { drains: None, weight: Some(NonZeroU16::new(weight)) }
    }

    fn node(id: &str) -> NodeKey {
        (Role::Varnish, NodeId::try_from(id).unwrap())
    }

    #[test]
    fn a_drain_keeps_its_time_and_the_weight_and_a_resume_takes_it_back() {
        let mut table = Overrides::default();
        assert!(table.change(&node("a"), weight(5), 1).unwrap());
        assert!(table.change(&node("a"), DRAIN, 2).unwrap());
        assert!(!table.change(&node("a"), DRAIN, 3).unwrap(), "it is drained already");
        let says = table.of(&node("a"));
        assert_eq!((says.drained_at_ms, says.weight_over(1)), (Some(2), 5));
        table.change(&node("a"), RESUME, 4).unwrap();
        assert_eq!((table.of(&node("a")).drained_at_ms, table.of(&node("a")).weight_over(1)), (None, 5));
        table.change(&node("a"), weight(0), 5).unwrap();
        assert!(table.of(&node("a")).is_spent());
        assert_eq!(table.in_effect().count(), 0);
    }

    #[test]
    fn ids_of_two_roles_are_two_nodes() {
        let mut table = Overrides::default();
        table.change(&node("a"), DRAIN, 1).unwrap();
        assert!(table.of(&(Role::Web, node("a").1)).is_spent());
    }

    #[test]
    fn a_node_that_wants_no_traffic_gets_none_whatever_its_weight() {
        let says = NodeOverride { drained_at_ms: None, weight: NonZeroU16::new(9) };
        assert_eq!((says.weight_over(0), says.weight_over(3)), (0, 9));
        assert_eq!(NodeOverride::default().weight_over(3), 3);
    }

    #[test]
    fn one_that_was_away_does_not_bring_back_what_was_taken_back() {
        let mut here = Overrides::default();
        here.change(&node("a"), DRAIN, 1).unwrap();
        let away = here.clone();
        here.change(&node("a"), RESUME, 2).unwrap();
        assert!(!here.merge(away.to_named()));
        let mut back = away;
        assert!(back.merge(here.to_named()));
        assert_eq!((back.of(&node("a")).is_spent(), &back), (true, &here));
    }

    #[test]
    fn of_two_at_once_the_one_that_drains_counts() {
        let (mut here, mut there) = (Overrides::default(), Overrides::default());
        here.change(&node("a"), weight(3), 1).unwrap();
        there.change(&node("a"), DRAIN, 1).unwrap();
        here.merge(there.to_named());
        assert_eq!(here.of(&node("a")).drained_at_ms, Some(1));
    }

    #[test]
    fn the_table_is_bounded_and_what_is_in_effect_is_never_forgotten() {
        let mut table = Overrides::default();
        let name = |number: usize| node(&format!("n{number}"));
        for number in 0..MAX_OVERRIDES {
            table.change(&name(number), DRAIN, 1).unwrap();
        }
        assert!(table.change(&name(MAX_OVERRIDES), DRAIN, 1).is_err());
        table.change(&name(0), weight(2), 1).unwrap();
        for number in 0..MAX_OVERRIDES {
            table.change(&name(number), RESUME, 1).unwrap();
        }
        assert_eq!((table.in_effect().count(), table.0.len()), (1, MAX_SPENT + 1));
        assert!(table.change(&name(MAX_OVERRIDES), DRAIN, 1).unwrap());
    }

    #[test]
    fn what_is_written_is_read_again_and_says_no_more_than_it_has_to() {
        let mut table = Overrides::default();
        table.change(&node("a"), DRAIN, 7).unwrap();
        table.change(&node("b"), weight(2), 7).unwrap();
        table.change(&node("b"), weight(0), 7).unwrap();
        let text = serde_json::to_string(&table.to_named()).unwrap();
        assert_eq!(
            text,
            r#"[{"role":"varnish","id":"a","version":1,"drained_at":7},{"role":"varnish","id":"b","version":3}]"#
        );
        let named: Vec<NamedOverride> = serde_json::from_str(&text).unwrap();
        assert_eq!(named.into_iter().collect::<Overrides>(), table);
        assert!(serde_json::from_str::<NodeOverride>(r#"{"weight":0}"#).is_err());
    }

    fn tables() -> impl Strategy<Value = Vec<NamedOverride>> {
        let says = (prop::option::of(0..3_u64), 0..3_u16)
            .prop_map(|(drained_at_ms, weight)| NodeOverride { drained_at_ms, weight: NonZeroU16::new(weight) });
        let one = (prop::sample::select(vec!["a", "b", "c"]), 0..4_u64, says).prop_map(|(id, version, says)| {
            let (role, id) = node(id);
            NamedOverride { role, id, versioned: VersionedOverride { version, says } }
        });
        prop::collection::vec(one, 0..8)
    }

    proptest! {
        /// Whatever is heard from whom, in which order and how often: all end with the same.
        #[test]
        fn all_that_have_heard_the_same_say_the_same(a in tables(), b in tables(), c in tables()) {
            let heard = |order: [&Vec<NamedOverride>; 4]| {
                let mut table = Overrides::default();
                order.into_iter().for_each(|told| _ = table.merge(told.clone()));
                table
            };
            let first = heard([&a, &b, &c, &c]);
            prop_assert_eq!(&heard([&c, &b, &a, &b]), &first);
            let mut passed_on = heard([&a, &a, &b, &a]);
            passed_on.merge(heard([&c, &c, &c, &c]).to_named());
            prop_assert_eq!(&passed_on, &first);
            prop_assert!(!passed_on.merge(first.to_named()));
        }
    }
}
