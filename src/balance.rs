//! Which node gets a request. One algorithm a file; who is eligible (healthy, current, not tried yet) is the caller's
//! filter and no business of the algorithm.
//!
//! Everything here is a pure function of the nodes, their load and a [`Draw`]; the caller brings the randomness. All
//! scans are linear: a fleet has tens of nodes, and a scan over 200 of them costs less than one system call.

mod least_request;
mod rendezvous;
mod weighted;

use serde::{Deserialize, Serialize};

use crate::fleet::Member;

/// How a listener chooses among its nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The same key goes to the same node, and a node that leaves moves only its own keys: what a cache wants.
    Rendezvous,
    /// In turn, by weight.
    RoundRobin,
    /// The one with fewer requests of two drawn by chance ("power of two choices"): what an application server wants.
    LeastRequest,
    /// By chance, by weight.
    Random,
}

/// What one decision is made from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Draw {
    /// The hash of what is asked for.
    pub key: u64,
    /// Grows by one with every request of this chooser.
    pub turn: u64,
    /// Random bits.
    pub random: u64,
}

/// Chooses among the eligible members, or `None` where there is none.
///
/// `bounded_load` only concerns [`Policy::Rendezvous`]: a node above that multiple of the mean load passes a key on
/// to the next choice of that key. 0 turns it off.
pub fn pick(
    policy: Policy,
    members: &[Member],
    draw: Draw,
    bounded_load: f64,
    eligible: impl Fn(&Member) -> bool,
) -> Option<&Member> {
    match policy {
        Policy::Rendezvous => rendezvous::pick(members, draw.key, bounded_load, eligible),
        Policy::RoundRobin => weighted::pick(members, draw.turn, eligible),
        Policy::LeastRequest => least_request::pick(members, draw.random, eligible),
        Policy::Random => weighted::pick(members, draw.random, eligible),
    }
}

/// Mixes two words into one that depends on every bit of both (the finaliser of MurmurHash3 over their combination).
fn mix(a: u64, b: u64) -> u64 {
    let mut h = a ^ b.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
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
            Member { node, health: Health::Up, reason: "".into(), usable: true }
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
