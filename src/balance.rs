//! Chooses the node of a request. One algorithm a file; eligibility (healthy, current, not tried yet) is the caller's
//! filter, not part of an algorithm.
//!
//! Everything here is a pure function of the nodes, their load and a [`LbContext`]; the caller supplies the randomness.
//! All scans are linear: a fleet has tens of nodes, and a scan over 200 of them costs less than one system call.
//!
//! A node in slow start gets only a share of its traffic ([`Live::share`](crate::fleet::Live::share)). That is not part
//! of the algorithms either: such a node takes part in as many decisions as its share says and is not a candidate in
//! the others. Over many decisions that is its weight times its share, without fractional weights, for which round
//! robin would need a schedule and two choices an artificial load. If there is a key, its hash decides, so that a
//! growing share moves keys to that node one at a time, and no other keys: a cache keeps its pages. If no other node is
//! eligible, a small share is not a reason to refuse.

mod least_request;
mod rendezvous;
mod weighted;

use serde::{Deserialize, Serialize};

use crate::fleet::{Member, WHOLE_SHARE};

/// How a listener chooses among its nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The same key goes to the same node, and a node that leaves moves only its own keys: for caches.
    Rendezvous,
    /// In turn, by weight.
    RoundRobin,
    /// The one with fewer requests of two random nodes ("power of two choices"): for application servers.
    LeastRequest,
    /// Random, by weight.
    Random,
}

/// The input of one decision.
#[derive(Clone, Copy, Debug, Default)]
pub struct LbContext {
    /// The hash of the requested page.
    pub request_hash: u64,
    /// Increases by one with every request of this chooser.
    pub turn: u64,
    /// Random bits.
    pub random: u64,
}

/// Chooses among the eligible members; `None` if there is none.
///
/// `bounded_load` only concerns [`Policy::Rendezvous`]: a node above that multiple of the mean load passes a key on to
/// the key's next choice. 0 turns it off.
pub fn pick(
    policy: Policy,
    members: &[Member],
    lb: LbContext,
    bounded_load: Option<f64>,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&Member> {
    let lot = match policy {
        Policy::Rendezvous => lb.request_hash,
        Policy::RoundRobin => lb.turn,
        Policy::LeastRequest | Policy::Random => lb.random,
    };
    let takes_part = |member: &Member| eligible(member) && takes_part(member, lot);
    choose(policy, members, lb, bounded_load, takes_part)
        .or_else(|| choose(policy, members, lb, bounded_load, eligible))
}

/// Whether a node takes part in the decision with this lot: always, unless it is in slow start.
fn takes_part(member: &Member, lot: u64) -> bool {
    // Not the number from which scores are made, or the first keys to move would be those that a node wins narrowly.
    const LOTS: u64 = 0x5851_f42d_4c95_7f2d;
    let share = member.node.live.share();
    share == WHOLE_SHARE || mix(lot ^ LOTS, member.node.seed) % u64::from(WHOLE_SHARE) < u64::from(share)
}

fn choose(
    policy: Policy,
    members: &[Member],
    lb: LbContext,
    bounded_load: Option<f64>,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&Member> {
    match policy {
        Policy::Rendezvous => rendezvous::pick(members, lb.request_hash, bounded_load, eligible),
        Policy::RoundRobin => weighted::pick(members, lb.turn, eligible),
        Policy::LeastRequest => least_request::pick(members, lb.random, eligible),
        Policy::Random => weighted::pick(members, lb.random, eligible),
    }
}

/// Mixes two words so that the result depends on every bit of both (the finaliser of MurmurHash3 over their
/// combination).
fn mix(a: u64, b: u64) -> u64 {
    let mut h = a ^ b.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[cfg(test)]
mod tests {
    use super::testing::{members, shares};
    use super::*;

    const POLICIES: [Policy; 4] = [Policy::Rendezvous, Policy::RoundRobin, Policy::LeastRequest, Policy::Random];

    /// The context of the n-th request.
    fn lb_context(n: u64) -> LbContext {
        LbContext { request_hash: mix(n, 7), turn: n, random: mix(n, 3) }
    }

    fn first_of(policy: Policy, weights: &[u32], share: u32) -> usize {
        let nodes = members(weights);
        nodes[0].node.live.set_share(share);
        shares(&nodes, (0..10_000).map(|n| pick(policy, &nodes, lb_context(n), None, |_| true)))[0]
    }

    #[test]
    fn what_a_node_gets_grows_with_its_share_by_every_policy() {
        for policy in POLICIES {
            // Of four equal nodes, each gets 2500; of weights 3 and 1, the first gets 7500.
            for (weights, whole) in [(&[1, 1, 1, 1][..], 2500), (&[3, 1], 7500)] {
                let whole = if policy == Policy::LeastRequest && weights.len() == 2 { 10_000 } else { whole };
                for share in [WHOLE_SHARE / 16, WHOLE_SHARE / 4, WHOLE_SHARE / 2, WHOLE_SHARE] {
                    let expected = whole * share as usize / WHOLE_SHARE as usize;
                    let got = first_of(policy, weights, share);
                    let near = expected * 3 / 4..=expected * 5 / 4 + 20;
                    assert!(near.contains(&got), "{policy:?} {weights:?} at {share}: {got} and not {expected}");
                }
            }
        }
    }

    #[test]
    fn a_growing_share_moves_keys_to_its_node_and_no_others() {
        let nodes = members(&[1, 2, 1]);
        let chosen = |key| {
            pick(Policy::Rendezvous, &nodes, LbContext { request_hash: key, ..LbContext::default() }, None, |_| true)
                .unwrap()
        };
        let all = || (0..2000).map(|key| chosen(mix(key, 7)).node.id().to_string()).collect::<Vec<_>>();
        nodes[1].node.live.set_share(1);
        let mut before = all();
        for share in [20, 100, 200, WHOLE_SHARE] {
            nodes[1].node.live.set_share(share);
            let after = all();
            let moved = before.iter().zip(&after).filter(|(before, after)| before != after);
            assert!(moved.clone().count() > 0 && moved.clone().all(|(_, to)| to == "n1"), "at {share}");
            before = after;
        }
    }

    #[test]
    fn who_is_the_only_one_gets_everything_however_small_its_share() {
        let nodes = members(&[1, 1]);
        nodes[0].node.live.set_share(0);
        for policy in POLICIES {
            let first = |member: &Member| member.node.id().as_str() == "n0";
            assert!((0..100).all(|n| pick(policy, &nodes, lb_context(n), Some(1.25), first).is_some()), "{policy:?}");
            assert!(pick(policy, &nodes, lb_context(0), Some(1.25), |_| false).is_none(), "{policy:?}");
        }
    }
}

#[cfg(test)]
mod testing {
    use std::sync::Arc;

    use crate::fleet::{Health, Live, Member, Node, NodeId, NodeSpec, Role};

    /// Members `n0`, `n1`, … with these weights.
    pub(super) fn members(weights: &[u32]) -> Vec<Member> {
        let member = |(index, &weight): (usize, &u32)| {
            let id = NodeId::try_from(format!("n{index}")).unwrap();
            let spec = NodeSpec { weight, ..NodeSpec::new(Role::Varnish, id, ([127, 0, 0, 1], 80).into()) };
            let node = Arc::new(Node::new(spec, Arc::new(Live::default()), index as u64));
            Member { node, health: Health::Up, fault: None, retained: false, usable: true }
        };
        weights.iter().enumerate().map(member).collect()
    }

    /// How often each member was chosen.
    pub(super) fn shares<'a>(members: &[Member], picks: impl Iterator<Item = Option<&'a Member>>) -> Vec<usize> {
        let mut shares = vec![0; members.len()];
        for pick in picks {
            let id = pick.expect("somebody is eligible").node.id().clone();
            shares[members.iter().position(|member| *member.node.id() == id).unwrap()] += 1;
        }
        shares
    }
}
