//! The usable nodes of a pool, laid out so that one of them is found without a look at all.
//!
//! Membership, weights and health change some times a minute, requests come some thousand times a second. So what
//! follows from the former alone is computed once for each snapshot, by the fleet keeper and not by a worker: who is
//! usable at all, which ticket is whose, how much of the traffic the own zone takes. What changes with every request
//! (load, the fence, who was tried) is asked of the few nodes that come into question.
//!
//! # The own zone
//!
//! A node in another zone costs a millisecond and, with most hosters, money for each byte. But a zone with few nodes, or
//! with few left, must not be overrun by its own traffic. HAProxy's `backup` servers are used when all others are down,
//! which overloads the last one first; a threshold moves all traffic at once when it is crossed. As with Envoy's
//! zone-aware routing, the share that stays grows with what the zone has: it is the whole while each of its nodes gets
//! at most [`NEAR_EXCESS`] of what it would get if all nodes shared all traffic evenly, and falls from there.
//! How much traffic enters in which zone is not known (no replica tells the others), so it counts as the same in each.
//! Where that is wrong, the nodes of a zone with more traffic are busier than the others: leave `replica.zone` empty.
//!
//! Places in the hash have no zones: see [`crate::balance`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{Member, RankMemo};

/// How much more than an even share a node of the own zone may get for being near.
const NEAR_EXCESS: f64 = 1.25;

/// The unit of [`Candidates::near_share`].
pub const WHOLE_TRAFFIC: u32 = 1 << 16;

/// The usable nodes of a pool.
#[derive(Debug, Default)]
pub struct Candidates {
    /// By weight, as few as there are different weights.
    groups: Vec<WeightGroup>,
    all: Tickets,
    near: Tickets,
    near_share: u32,
    memo: Option<Arc<RankMemo>>,
    /// How busy they are.
    pub load: LoadEstimate,
}

/// Nodes of the same weight.
#[derive(Debug, PartialEq, Eq)]
pub struct WeightGroup {
    /// The weight, at least 1.
    pub weight: u32,
    /// Their seeds in the hash, in the order of their ids.
    pub seeds: Vec<u64>,
    /// Where they are among the members.
    pub members: Vec<u32>,
}

/// Every node holds as many tickets as its weight.
#[derive(Debug, Default)]
pub struct Tickets {
    /// The number of the first ticket that is not the node's and not an earlier node's.
    ends: Vec<u64>,
    /// Where the nodes are among the members.
    members: Vec<u32>,
}

impl Candidates {
    /// The usable ones of these members, which are in the order of their ids. `zone` is where this clearcoat stands.
    pub(super) fn new(members: &[Member], zone: Option<&str>) -> Self {
        let usable = || (0_u32..).zip(members).filter(|(_, member)| member.usable);
        let mut by_weight = usable().collect::<Vec<_>>();
        by_weight.sort_by_key(|(_, member)| member.node.weight);
        let group = |nodes: &[(u32, &Member)]| WeightGroup {
            weight: nodes[0].1.node.weight,
            seeds: nodes.iter().map(|(_, member)| member.node.seed).collect(),
            members: nodes.iter().map(|(index, _)| *index).collect(),
        };
        let groups = by_weight.chunk_by(|(_, a), (_, b)| a.node.weight == b.node.weight).map(group).collect();
        let is_near = |member: &Member| zone.is_some() && member.node.spec.zone.as_deref() == zone;
        let (all, near) = (Tickets::new(usable()), Tickets::new(usable().filter(|(_, member)| is_near(member))));
        let zones = usable().map(|(_, member)| member.node.spec.zone.as_deref()).collect::<BTreeSet<_>>();
        let near_share = near_share(near.total(), all.total(), zones.len());
        Candidates { groups, all, near, near_share, memo: None, load: LoadEstimate::default() }
    }

    /// Gives them a memory for their ranks: that of the candidates before, if their ranks are the same.
    pub(super) fn remember(&mut self, before: &Candidates) {
        self.memo = match &before.memo {
            Some(memo) if self.groups == before.groups => Some(Arc::clone(memo)),
            _ => RankMemo::for_nodes(self.all.len()).map(Arc::new),
        };
    }

    /// By weight, the least first.
    pub fn groups(&self) -> &[WeightGroup] {
        &self.groups
    }

    /// Everybody's tickets.
    pub fn all(&self) -> &Tickets {
        &self.all
    }

    /// The tickets of those in the own zone.
    pub fn near(&self) -> &Tickets {
        &self.near
    }

    /// How much of the traffic those in the own zone get: 0 to [`WHOLE_TRAFFIC`].
    pub fn near_share(&self) -> u32 {
        self.near_share
    }

    /// What is remembered of their ranks, where they are so many that it helps.
    pub fn memo(&self) -> Option<&RankMemo> {
        self.memo.as_deref()
    }
}

/// The share of a zone with `near` of `all` tickets, one of so many zones.
fn near_share(near: u64, all: u64, zones: usize) -> u32 {
    if near == all {
        return if all == 0 { 0 } else { WHOLE_TRAFFIC };
    }
    let even_share = near as f64 / all as f64 * zones as f64;
    ((NEAR_EXCESS * even_share).min(1.0) * f64::from(WHOLE_TRAFFIC)) as u32
}

impl Tickets {
    fn new<'m>(nodes: impl Iterator<Item = (u32, &'m Member)>) -> Self {
        let mut end = 0;
        let of_node = |(index, member): (u32, &Member)| {
            end += u64::from(member.node.weight);
            (end, index)
        };
        let (ends, members) = nodes.map(of_node).unzip();
        Tickets { ends, members }
    }

    /// Of how many nodes they are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether nobody holds one.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// How many there are.
    pub fn total(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Where the holder of this ticket (modulo their number) is among the members.
    pub fn holder(&self, ticket: u64) -> Option<usize> {
        let ticket = ticket.checked_rem(self.total())?;
        let at = self.ends.partition_point(|&end| end <= ticket);
        Some(self.members[at] as usize)
    }

    /// Where the holders are among the members, in the order of their ids.
    pub fn holders(&self) -> impl Iterator<Item = usize> {
        self.members.iter().map(|&index| index as usize)
    }
}

/// The mean load, counted now and then.
///
/// A counter of all requests in flight would be written by all workers for each request, and would not know who may
/// serve. A count of all nodes for each request costs as much as there are nodes. So the nodes are counted once in
/// as many questions as there are nodes for [`COUNTED_PER_QUESTION`](Self::COUNTED_PER_QUESTION) of them to be counted
/// for each: always in a small fleet, and in a large one the mean is off by what has changed in that time.
#[derive(Debug, Default)]
pub struct LoadEstimate {
    questions: AtomicU32,
    /// Requests in flight for each unit of weight: the bits of an `f64`.
    mean: AtomicU64,
}

impl LoadEstimate {
    /// How many nodes are counted for each question.
    pub const COUNTED_PER_QUESTION: usize = 16;

    /// The mean, as counted by `count` now or lately. `nodes`: how many are counted.
    pub fn mean(&self, nodes: usize, count: impl FnOnce() -> f64) -> f64 {
        let every = (nodes / Self::COUNTED_PER_QUESTION).max(1) as u32;
        if !self.questions.fetch_add(1, Ordering::Relaxed).is_multiple_of(every) {
            return f64::from_bits(self.mean.load(Ordering::Relaxed));
        }
        let mean = count();
        self.mean.store(mean.to_bits(), Ordering::Relaxed);
        mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(near: u64, all: u64, zones: usize) -> f64 {
        f64::from(near_share(near, all, zones)) / f64::from(WHOLE_TRAFFIC)
    }

    #[test]
    fn a_zone_with_its_part_of_the_nodes_keeps_all_its_traffic() {
        for (near, all, zones) in [(5, 5, 1), (2, 4, 2), (3, 9, 3), (2, 5, 2), (8, 9, 2)] {
            assert_eq!(share(near, all, zones), 1.0, "{near} of {all} in {zones}");
        }
        assert_eq!(share(0, 0, 0), 0.0);
        assert_eq!(share(0, 4, 1), 0.0);
    }

    /// What made others limit zones by hand: envoyproxy/envoy#38561, istio/api#3733.
    #[test]
    fn no_node_of_a_small_zone_gets_much_more_than_any_other() {
        for (near, all, zones) in [(1_u64, 10_u64, 2_usize), (1, 3, 2), (1, 9, 3), (4, 100, 3), (1, 1000, 2)] {
            // Each zone has the same traffic, and each node the same weight.
            let of_zone = 1.0 / zones as f64;
            let kept = share(near, all, zones) * of_zone / near as f64;
            let even = 1.0 / all as f64;
            assert!(kept <= even * NEAR_EXCESS + 1e-4 && kept >= even, "{near} of {all} in {zones}: {kept}");
        }
    }

    #[test]
    fn the_mean_is_counted_always_in_a_small_fleet_and_seldom_in_a_large_one() {
        let counted = |nodes| {
            let (load, mut counted) = (LoadEstimate::default(), 0);
            for _ in 0..1000 {
                load.mean(nodes, || {
                    counted += 1;
                    2.5
                });
            }
            assert_eq!(load.mean(nodes, || 2.5), 2.5);
            counted
        };
        assert_eq!([2, 30, 320, 1000].map(counted), [1000, 1000, 50, 17]);
    }
}
