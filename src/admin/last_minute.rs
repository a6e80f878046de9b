//! What each node did in the last minute, and since when it gets traffic or none.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use super::history::{STEP, ratio};
use crate::fleet::{NodeKey, Role};
use crate::telemetry::Answers;

/// The readings that are kept of each node: those of a minute.
const READINGS: usize = 13;

/// The counters of a node at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NodeReading {
    pub(super) answers: Answers,
    /// Answers of its cache: hits, misses, passes; 0 of a web node.
    pub(super) cache_results: [u64; 3],
}

/// What a node did in the last minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct LastMinute {
    requests_per_second: f64,
    /// Its part of the requests to nodes of its role, from 0 to 1.
    part: f64,
    /// The share of its answers that were a 5xx, from 0 to 1.
    errors: f64,
    /// The mean time to the end of an answer; absent without requests.
    mean_ms: Option<f64>,
    /// The share of answers that its cache had, from 0 to 1; absent if none told, and of a web node.
    hit_rate: Option<f64>,
}

/// What is known of each node of the fleet.
#[derive(Debug, Default)]
pub(super) struct NodeMemories(BTreeMap<NodeKey, NodeMemory>);

#[derive(Debug)]
struct NodeMemory {
    readings: VecDeque<NodeReading>,
    serves: bool,
    since_ms: u64,
}

impl NodeMemory {
    /// The oldest reading, the newest, and the time between them.
    fn span(&self) -> Option<(&NodeReading, &NodeReading, Duration)> {
        let steps = u32::try_from(self.readings.len().checked_sub(1)?).unwrap_or(u32::MAX);
        Some((self.readings.front()?, self.readings.back()?, STEP * steps)).filter(|_| steps > 0)
    }

    fn requests(&self) -> u64 {
        self.span().map_or(0, |(first, last, _)| last.answers.all.saturating_sub(first.answers.all))
    }
}

impl NodeMemories {
    /// Notes who is in the fleet now, and who of them gets traffic.
    pub(super) fn note(&mut self, nodes: &[(NodeKey, bool)], now_ms: u64) {
        let known: BTreeMap<&NodeKey, bool> = nodes.iter().map(|(identity, serves)| (identity, *serves)).collect();
        self.0.retain(|identity, _| known.contains_key(identity));
        for (identity, serves) in nodes {
            // The counters of a node begin with it, so what it answers before the first reading counts, too.
            let readings = || VecDeque::from([NodeReading::default()]);
            let new = || NodeMemory { serves: *serves, since_ms: now_ms, readings: readings() };
            let memory = self.0.entry(identity.clone()).or_insert_with(new);
            if memory.serves != *serves {
                (memory.serves, memory.since_ms) = (*serves, now_ms);
            }
        }
    }

    /// Takes a reading of each node, [`STEP`] after the last one.
    pub(super) fn read(&mut self, read: impl Fn(&NodeKey) -> NodeReading) {
        for (identity, memory) in &mut self.0 {
            if memory.readings.len() == READINGS {
                memory.readings.pop_front();
            }
            memory.readings.push_back(read(identity));
        }
    }

    /// Since when a node gets traffic, or none, in milliseconds since 1970; `None` if it was not noted yet.
    pub(super) fn since_ms(&self, identity: &NodeKey, serves: bool) -> Option<u64> {
        self.0.get(identity).filter(|memory| memory.serves == serves).map(|memory| memory.since_ms)
    }

    /// What each node of a role did in the last minute.
    pub(super) fn recent(&self, role: Role) -> BTreeMap<&NodeKey, LastMinute> {
        let of_role = || self.0.iter().filter(move |((of, _), _)| *of == role);
        let total: u64 = of_role().map(|(_, memory)| memory.requests()).sum();
        of_role().map(|(identity, memory)| (identity, LastMinute::of(memory, total))).collect()
    }
}

impl LastMinute {
    /// `total`: the requests to all nodes of its role.
    fn of(memory: &NodeMemory, total: u64) -> Self {
        let Some((first, last, span)) = memory.span() else { return LastMinute::default() };
        let requests = memory.requests();
        let errors = last.answers.server_errors.saturating_sub(first.answers.server_errors);
        let time = last.answers.time.saturating_sub(first.answers.time);
        let cached: [u64; 3] = std::array::from_fn(|at| last.cache_results[at].saturating_sub(first.cache_results[at]));
        LastMinute {
            requests_per_second: requests as f64 / span.as_secs_f64(),
            part: ratio(requests, total).unwrap_or(0.0),
            errors: ratio(errors, requests).unwrap_or(0.0),
            mean_ms: (requests > 0).then(|| time.as_secs_f64() * 1000.0 / requests as f64),
            hit_rate: ratio(cached[0], cached.iter().sum()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::NodeId;

    fn varnish(id: &str) -> NodeKey {
        (Role::Varnish, NodeId::try_from(id).unwrap())
    }

    #[test]
    fn the_last_minute_of_a_node_is_told_and_what_was_before_is_not() {
        let (a, b) = (varnish("a"), varnish("b"));
        let mut memories = NodeMemories::default();
        memories.note(&[(a.clone(), true), (b.clone(), true)], 1);
        for step in 0..40 {
            let read = |identity: &NodeKey| {
                // The first has three times the requests of the second, and a burst in the first steps.
                let each = if *identity == a { 15 } else { 5 };
                let all = each * step + if *identity == a { 1000 * step.min(3) } else { 0 };
                let answers = Answers { all, server_errors: step, time: Duration::from_millis(2 * all) };
                NodeReading { answers, cache_results: [4 * step, step, 0] }
            };
            memories.read(read);
        }
        let recent = memories.recent(Role::Varnish);
        let of_a = recent[&a];
        assert_eq!((of_a.requests_per_second, of_a.part, of_a.hit_rate), (3.0, 0.75, Some(0.8)));
        assert_eq!((of_a.mean_ms.map(f64::round), recent[&b].errors), (Some(2.0), 0.2));
        assert!(memories.recent(Role::Web).is_empty());
    }

    #[test]
    fn what_a_new_node_answers_before_it_is_first_read_counts() {
        let a = varnish("a");
        let mut memories = NodeMemories::default();
        memories.note(&[(a.clone(), true)], 1);
        let answers = Answers { all: 50, ..Answers::default() };
        memories.read(|_| NodeReading { answers, cache_results: [45, 5, 0] });
        let recent = memories.recent(Role::Varnish)[&a];
        assert_eq!((recent.requests_per_second, recent.hit_rate), (10.0, Some(0.9)));
    }

    #[test]
    fn since_when_a_node_is_out_is_remembered_until_it_serves_again() {
        let a = varnish("a");
        let mut memories = NodeMemories::default();
        for (serves, now) in [(true, 1), (false, 5), (false, 9)] {
            memories.note(&[(a.clone(), serves)], now);
        }
        assert_eq!((memories.since_ms(&a, false), memories.since_ms(&a, true)), (Some(5), None));
        memories.note(&[(a.clone(), true)], 12);
        assert_eq!(memories.since_ms(&a, true), Some(12));
        // One that left and comes back is a new one.
        memories.note(&[], 13);
        memories.note(&[(a.clone(), true)], 14);
        assert_eq!(memories.since_ms(&a, true), Some(14));
    }
}
