//! Fleets for the tests of the algorithms.

use std::sync::Arc;

use crate::fleet::{Health, Live, Member, Node, NodeId, NodeSpec, Pool, Role};

/// Nodes `n000`, `n001`, … with these weights.
pub(super) fn pool(weights: &[u32]) -> Pool {
    pool_of(weights.iter().enumerate().map(|(index, &weight)| (index, weight, None)), None)
}

/// Nodes with these numbers, weights and zones, for a clearcoat in this zone.
pub(super) fn pool_of(nodes: impl IntoIterator<Item = (usize, u32, Option<&'static str>)>, zone: Option<&str>) -> Pool {
    let member = |(index, weight, zone): (usize, u32, Option<&str>)| {
        let id = NodeId::try_from(format!("n{index:03}")).unwrap();
        let zone = zone.map(Arc::from);
        let spec = NodeSpec { weight, zone, ..NodeSpec::new(Role::Varnish, id, ([127, 0, 0, 1], 80).into()) };
        let node = Arc::new(Node::new(spec, Arc::new(Live::default()), index as u64));
        Member { node, health: Health::Up, fault: None, ejection: None, retained: false, usable: false }
    };
    Pool::new(nodes.into_iter().map(member).collect(), 0.0, zone).remembering(&Pool::default())
}

/// How often each member was chosen.
pub(super) fn shares<'a>(pool: &Pool, picks: impl Iterator<Item = Option<&'a Member>>) -> Vec<usize> {
    let mut shares = vec![0; pool.members().len()];
    for pick in picks {
        let id = pick.expect("somebody is eligible").node.id().clone();
        shares[pool.members().iter().position(|member| *member.node.id() == id).unwrap()] += 1;
    }
    shares
}
