//! Rendezvous hashing (highest random weight) with bounded load.
//!
//! Each node gets a score from the key and its own id, and the highest wins. Compared to a hash ring: no table to
//! rebuild, an even spread without virtual nodes, the same result in every replica from the ids alone, and a node that
//! leaves moves exactly its own keys, each to its next choice. It costs a scan, which is negligible for the size of a
//! Varnish fleet.

use super::mix;
use crate::fleet::Member;

/// The eligible node with the highest score among those within the load bound. (Other threads change the loads
/// meanwhile: if no node is within the bound by then, the highest score wins.)
pub(super) fn pick(
    members: &[Member],
    key: u64,
    bounded_load: Option<f64>,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&Member> {
    let limit = bounded_load.map_or(u32::MAX, |factor| load_limit(members, factor, &eligible));
    let equal = members.windows(2).all(|pair| pair[0].node.weight == pair[1].node.weight);
    let mut best: Option<(bool, f64, &Member)> = None;
    for member in members.iter().filter(|member| eligible(member)) {
        let rank = (member.node.live.inflight() < limit, score(key, member, equal));
        if best.is_none_or(|(within, highest, _)| rank > (within, highest)) {
            best = Some((rank.0, rank.1, member));
        }
    }
    best.map(|(.., member)| member)
}

/// With unequal weights `w`, the score is `w / -ln(u)` for a uniform `u`: a node then wins a share of the keys in
/// proportion to its weight, and a change of one weight moves only keys from or to that node.
fn score(key: u64, member: &Member, equal_weights: bool) -> f64 {
    let uniform = ((mix(key, member.node.seed) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    if equal_weights { uniform } else { f64::from(member.node.weight) / -uniform.ln() }
}

/// The number of requests from which a node passes keys on: `factor` times the mean if this request were in.
fn load_limit(members: &[Member], factor: f64, eligible: impl Fn(&Member) -> bool) -> u32 {
    let (mut nodes, mut requests) = (0_u32, 1_u32);
    for member in members.iter().filter(|member| eligible(member)) {
        nodes += 1;
        requests += member.node.live.inflight();
    }
    (factor * f64::from(requests) / f64::from(nodes.max(1))).ceil() as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{members, shares};
    use super::*;

    fn chosen(members: &[Member], key: u64) -> &Member {
        pick(members, key, None, |_| true).unwrap()
    }

    #[test]
    fn keys_spread_evenly_over_equal_nodes() {
        let nodes = members(&[1, 1, 1, 1]);
        let shares = shares(&nodes, (0..8000).map(|key| pick(&nodes, mix(key, 7), None, |_| true)));
        assert!(shares.iter().all(|share| (1800..2200).contains(share)), "{shares:?}");
    }

    #[test]
    fn keys_follow_unequal_weights() {
        let nodes = members(&[1, 3]);
        let shares = shares(&nodes, (0..8000).map(|key| pick(&nodes, mix(key, 7), None, |_| true)));
        assert!((1800..2200).contains(&shares[0]), "{shares:?}");
    }

    #[test]
    fn a_busy_node_passes_its_keys_on_and_no_others() {
        let nodes = members(&[1, 1, 1]);
        let key = (0..).find(|&key| chosen(&nodes, key).node.id().as_str() == "n0").unwrap();
        for _ in 0..10 {
            nodes[0].node.live.request_began();
        }
        let next = pick(&nodes, key, Some(1.25), |_| true).unwrap().node.id().clone();
        assert_ne!(next.as_str(), "n0");
        let second = pick(&nodes, key, None, |member| member.node.id().as_str() != "n0").unwrap();
        assert_eq!(next, *second.node.id());
        assert_eq!(chosen(&nodes, key).node.id().as_str(), "n0");
    }

    #[test]
    fn nobody_eligible_is_nobody() {
        assert!(pick(&members(&[1]), 1, Some(1.25), |_| false).is_none());
        assert!(pick(&[], 1, Some(1.25), |_| true).is_none());
    }

    proptest! {
        #[test]
        fn a_node_that_leaves_moves_only_its_own_keys(key: u64, gone in 0_usize..5) {
            let nodes = members(&[1, 1, 1, 1, 1]);
            let before = chosen(&nodes, key).node.id().clone();
            let left = nodes[gone].node.id();
            let after = pick(&nodes, key, None, |member| member.node.id() != left).unwrap().node.id().clone();
            prop_assert!(before == *left || before == after);
        }

        #[test]
        fn somebody_is_always_within_the_bound(key: u64, loads in prop::collection::vec(0_u32..50, 1..6)) {
            let nodes = members(&vec![1; loads.len()]);
            for (member, &load) in nodes.iter().zip(&loads) {
                (0..load).for_each(|_| member.node.live.request_began());
            }
            prop_assert!(pick(&nodes, key, Some(1.0), |_| true).is_some());
        }
    }
}
