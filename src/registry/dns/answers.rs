//! From answers to events: what an answer changes in the fleet.
//!
//! Pure. Two questions can have the same node in their answers (a name and an alias of it): the node stays as long as
//! any answer contains it, with the settings of the first of these answers.

use std::collections::BTreeMap;

use crate::fleet::{Event, NodeKey, NodeSource, NodeSpec};

/// The last good answer to each question.
#[derive(Debug, Default)]
pub(super) struct LastAnswers(BTreeMap<usize, Vec<NodeSpec>>);

impl LastAnswers {
    /// Sets the answer to a question. Returns the changes: joins come before departures, so that a fleet
    /// that moves is never empty in between.
    pub(super) fn replace(&mut self, question: usize, nodes: Vec<NodeSpec>) -> Vec<Event> {
        let before = self.nodes();
        self.0.insert(question, nodes);
        let now = self.nodes();
        let joined = now.iter().filter(|(identity, spec)| before.get(*identity) != Some(*spec));
        let mut events: Vec<Event> = joined.map(|(_, spec)| Event::Joined(spec.clone())).collect();
        let gone = before.into_keys().filter(|identity| !now.contains_key(identity));
        events.extend(gone.map(|(role, id)| Event::Vanished(NodeSource::Dns, role, id)));
        events
    }

    fn nodes(&self) -> BTreeMap<NodeKey, NodeSpec> {
        let mut nodes = BTreeMap::new();
        for spec in self.0.values().flatten() {
            nodes.entry((spec.role(), spec.id.clone())).or_insert_with(|| spec.clone());
        }
        nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{NodeId, Role};

    fn node(role: Role, address: &str, weight: u32) -> NodeSpec {
        let id = NodeId::try_from(address).unwrap();
        NodeSpec { source: NodeSource::Dns, weight, ..NodeSpec::new(role, id, address.parse().unwrap()) }
    }

    fn web(address: &str) -> NodeSpec {
        node(Role::Web, address, 1)
    }

    fn words(events: Vec<Event>) -> Vec<String> {
        let word = |event| match event {
            Event::Joined(spec) => format!("+{} {}", spec.id, spec.weight),
            Event::Vanished(NodeSource::Dns, _, id) => format!("-{id}"),
            other => panic!("{other:?}"),
        };
        events.into_iter().map(word).collect()
    }

    #[test]
    fn only_what_changed_is_told_and_who_is_new_comes_first() {
        let mut answers = LastAnswers::default();
        assert_eq!(
            words(answers.replace(0, vec![web("10.0.0.2:80"), web("10.0.0.1:80")])),
            ["+10.0.0.1:80 1", "+10.0.0.2:80 1"]
        );
        assert!(answers.replace(0, vec![web("10.0.0.1:80"), web("10.0.0.2:80")]).is_empty());
        assert_eq!(
            words(answers.replace(0, vec![web("10.0.0.3:80"), node(Role::Web, "10.0.0.2:80", 5)])),
            ["+10.0.0.2:80 5", "+10.0.0.3:80 1", "-10.0.0.1:80"]
        );
        assert_eq!(words(answers.replace(0, vec![])), ["-10.0.0.2:80", "-10.0.0.3:80"]);
        assert!(answers.replace(0, vec![]).is_empty());
    }

    #[test]
    fn a_node_with_two_names_stays_until_both_have_dropped_it() {
        let mut answers = LastAnswers::default();
        assert_eq!(words(answers.replace(1, vec![node(Role::Web, "10.0.0.1:80", 2)])), ["+10.0.0.1:80 2"]);
        // The first name counts, whichever was answered first.
        assert_eq!(words(answers.replace(0, vec![web("10.0.0.1:80")])), ["+10.0.0.1:80 1"]);
        assert_eq!(words(answers.replace(0, vec![])), ["+10.0.0.1:80 2"]);
        assert_eq!(words(answers.replace(1, vec![])), ["-10.0.0.1:80"]);
    }

    #[test]
    fn the_same_address_in_two_roles_is_two_nodes() {
        let mut answers = LastAnswers::default();
        answers.replace(0, vec![web("10.0.0.1:80")]);
        assert_eq!(words(answers.replace(1, vec![node(Role::Varnish, "10.0.0.1:80", 1)])), ["+10.0.0.1:80 1"]);
        assert_eq!(words(answers.replace(1, vec![])), ["-10.0.0.1:80"]);
    }
}
