//! One immutable view of the fleet. A request loads it once and keeps it to its end, so that the number of nodes and an
//! index into them always come from the same snapshot.

use std::net::IpAddr;

use super::{Candidates, Health, Member, NodeId, Role};

/// The fleet at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Increases with every published change.
    pub version: u64,
    /// The web nodes.
    pub web: Pool,
    /// The Varnish nodes.
    pub varnish: Pool,
}

impl Snapshot {
    /// The nodes of one role.
    pub fn pool(&self, role: Role) -> &Pool {
        match role {
            Role::Web => &self.web,
            Role::Varnish => &self.varnish,
        }
    }
}

/// The nodes of one role, in the order of their ids.
#[derive(Debug, Default)]
pub struct Pool {
    members: Vec<Member>,
    panic: bool,
    candidates: Candidates,
    /// All that are used, in order.
    endpoint_ids: Vec<u64>,
    /// All addresses without ports, in order.
    addresses: Vec<IpAddr>,
}

impl Pool {
    /// Decides which nodes may get traffic.
    ///
    /// `panic_threshold` is a share from 0 to 1: if fewer of the checked nodes are up, checks that leave a doubt are not believed,
    /// because one that fails nearly everywhere is more likely to be wrong than right (Magento's own health check fails on
    /// every node at once when the database hiccups). 0 turns it off. A node of weight 0 takes no part in that, as it gets
    /// nothing either way, nor does one that is certainly gone ([`Member::is_gone`]): it would fail each request at once, and so
    /// look like the one with the least to do. Only if there is no other node, those may be tried as well. While no node is up yet that takes traffic, unchecked
    /// nodes may serve: those that are up may all be about to go, replaced by these. `zone` is where this clearcoat stands, if
    /// that is known.
    ///
    /// Ejected nodes get nothing, unless too few others are left: none that has a weight, or fewer than the panic threshold wants.
    /// What some requests have met counts less than what the checks see, so ejections are the first to be ignored.
    pub fn new(mut members: Vec<Member>, panic_threshold: f64, zone: Option<&str>) -> Self {
        members.sort_by(|a, b| a.node.id().cmp(b.node.id()));
        let takes_traffic = |member: &&Member| member.node.weight > 0;
        let count =
            |wanted: fn(&Member) -> bool| members.iter().filter(takes_traffic).filter(|member| wanted(member)).count();
        let up = count(|member| member.health == Health::Up);
        let doubted = count(|member| member.health == Health::Down && !member.is_gone());
        let unchecked = count(|member| member.health == Health::Unknown);
        let too_few = doubted > 0 && (up as f64) < panic_threshold * ((up + doubted) as f64);
        let nobody_else = panic_threshold > 0.0 && up + doubted + unchecked == 0;
        let well = count(|member| member.health == Health::Up && member.ejection.is_none());
        let ejects = well > 0 && well as f64 >= panic_threshold * ((up + doubted) as f64);
        for member in &mut members {
            let may_serve = match member.health {
                Health::Up => member.ejection.is_none() || !ejects,
                Health::Unknown => up == 0,
                Health::Down => nobody_else || too_few && !member.is_gone(),
            };
            member.usable = member.node.weight > 0 && may_serve;
        }
        let panic = members.iter().any(|member| member.usable && member.health == Health::Down);
        let candidates = Candidates::new(&members, zone);
        let mut endpoint_ids: Vec<_> = members.iter().map(|member| member.node.endpoint_id).collect();
        let mut addresses: Vec<_> = members.iter().map(|member| member.node.spec.address.ip().to_canonical()).collect();
        endpoint_ids.sort_unstable();
        addresses.sort_unstable();
        Pool { members, panic, candidates, endpoint_ids, addresses }
    }

    /// The same pool with a memory for the ranks of its nodes: that of the last snapshot, if nothing has changed that ranks
    /// depend on.
    pub fn remembering(mut self, before: &Pool) -> Self {
        self.candidates.remember(&before.candidates);
        self
    }

    /// Those that may get traffic.
    pub fn candidates(&self) -> &Candidates {
        &self.candidates
    }

    /// All nodes, whatever their state.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Whether nodes that are down get traffic, because too few are up.
    pub fn panics(&self) -> bool {
        self.panic
    }

    /// Whether a node has this endpoint. Each worker asks for all of its connections ten times a second.
    pub fn has_endpoint(&self, endpoint_id: u64) -> bool {
        self.endpoint_ids.binary_search(&endpoint_id).is_ok()
    }

    /// Whether a node has this address, with any port.
    pub fn has_address(&self, address: IpAddr) -> bool {
        self.addresses.binary_search(&address.to_canonical()).is_ok()
    }

    /// The node with this id.
    pub fn get(&self, id: &NodeId) -> Option<&Member> {
        self.members.binary_search_by(|member| member.node.id().cmp(id)).ok().map(|index| &self.members[index])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fleet::{FaultKind, Live, Node, NodeFault, NodeSpec};

    fn pool(states: &[(&str, Health)], panic_threshold: f64) -> Pool {
        let member = |(index, (id, health)): (usize, &(&str, Health))| {
            let spec = NodeSpec::new(Role::Web, NodeId::try_from(*id).unwrap(), ([127, 0, 0, 1], 80).into());
            let node = Arc::new(Node::new(spec, Arc::new(Live::default()), index as u64));
            Member { node, health: *health, fault: None, ejection: None, retained: false, usable: false }
        };
        Pool::new(states.iter().enumerate().map(member).collect(), panic_threshold, None)
    }

    fn usable(pool: &Pool) -> Vec<&str> {
        pool.members().iter().filter(|member| member.usable).map(|member| member.node.id().as_str()).collect()
    }

    #[test]
    fn only_nodes_that_are_up_get_traffic() {
        let pool = pool(&[("c", Health::Unknown), ("a", Health::Up), ("b", Health::Down)], 0.5);
        assert_eq!(usable(&pool), ["a"]);
    }

    #[test]
    fn while_nobody_is_up_the_unchecked_may_serve() {
        assert_eq!(usable(&pool(&[("a", Health::Unknown), ("b", Health::Down)], 0.0)), ["a"]);
    }

    #[test]
    fn while_those_that_are_up_are_about_to_go_the_unchecked_may_serve() {
        let mut members = pool(&[("a", Health::Up), ("b", Health::Unknown)], 0.5).members().to_vec();
        let drained = NodeSpec { weight: 0, ..members[0].node.spec.clone() };
        members[0].node = Arc::new(Node::new(drained, Arc::new(Live::default()), 9));
        assert_eq!(usable(&Pool::new(members, 0.5, None)), ["b"]);
    }

    #[test]
    fn below_the_panic_threshold_health_is_ignored() {
        let states = [("a", Health::Up), ("b", Health::Down), ("c", Health::Down)];
        assert_eq!(usable(&pool(&states, 0.5)), ["a", "b", "c"]);
        assert_eq!(usable(&pool(&states, 0.0)), ["a"]);
    }

    /// As the pool of these states, with the first of them changed.
    fn with_first(states: &[(&str, Health)], change: impl Fn(&mut Member)) -> Pool {
        let mut members = pool(states, 0.5).members().to_vec();
        change(&mut members[0]);
        Pool::new(members, 0.5, None)
    }

    fn weigh_nothing(member: &mut Member) {
        let spec = NodeSpec { weight: 0, ..member.node.spec.clone() };
        member.node = Arc::new(Node::new(spec, Arc::new(Live::default()), 9));
    }

    #[test]
    fn what_is_certainly_gone_is_not_tried_in_a_panic_and_causes_none() {
        let refused = |member: &mut Member| member.fault = Some(NodeFault::new(FaultKind::NotListening, "refused"));
        let (down, up) = (Health::Down, Health::Up);
        assert_eq!(usable(&with_first(&[("a", down), ("b", down), ("c", up), ("d", down)], refused)), ["b", "c", "d"]);
        let one_left = with_first(&[("a", down), ("b", up)], refused);
        assert!(usable(&one_left) == ["b"] && !one_left.panics());
        let held = with_first(&[("a", down), ("b", down), ("c", down)], |member| member.retained = true);
        assert_eq!(usable(&held), ["b", "c"]);
        // Nobody else is there: perhaps it is back before its next check.
        let alone = with_first(&[("a", down)], refused);
        assert!(usable(&alone) == ["a"] && alone.panics());
        assert!(usable(&Pool::new(alone.members().to_vec(), 0.0, None)).is_empty());
    }

    #[test]
    fn a_node_of_no_weight_neither_causes_a_panic_nor_keeps_one_off() {
        let (down, up) = (Health::Down, Health::Up);
        // It is about to go, and what replaces it has not passed its checks again yet.
        let replaced = with_first(&[("a", up), ("b", down)], weigh_nothing);
        assert!(usable(&replaced) == ["b"] && replaced.panics());
        let drained = with_first(&[("a", down), ("b", up), ("c", up), ("d", down)], weigh_nothing);
        assert!(usable(&drained) == ["b", "c"] && !drained.panics());
    }

    fn ejected(states: &[(&str, Health)], out: &[&str], panic_threshold: f64) -> Pool {
        let mut members = pool(states, 0.0).members().to_vec();
        let now = std::time::Instant::now();
        let fault = NodeFault::new(FaultKind::Fails, "answered 503");
        let ejection = Some(crate::fleet::Ejection { until: now, lasts: std::time::Duration::ZERO, fault });
        let is_out = |member: &&mut Member| out.contains(&member.node.id().as_str());
        members.iter_mut().filter(is_out).for_each(|member| member.ejection = ejection.clone());
        Pool::new(members, panic_threshold, None)
    }

    #[test]
    fn the_ejected_get_nothing_while_enough_others_are_left() {
        let up = [("a", Health::Up), ("b", Health::Up), ("c", Health::Up)];
        assert_eq!(usable(&ejected(&up, &["b"], 0.5)), ["a", "c"]);
        // Fewer than the threshold wants, or none: the checks are believed, and not the requests.
        assert_eq!(usable(&ejected(&up, &["a", "b"], 0.5)), ["a", "b", "c"]);
        assert_eq!(usable(&ejected(&up, &["a", "b"], 0.0)), ["c"]);
        assert_eq!(usable(&ejected(&up, &["a", "b", "c"], 0.0)), ["a", "b", "c"]);
        // And in a panic neither.
        let most_down = [("a", Health::Up), ("b", Health::Down), ("c", Health::Down)];
        assert_eq!(usable(&ejected(&most_down, &["a"], 0.5)), ["a", "b", "c"]);
        assert_eq!(usable(&ejected(&most_down, &["a"], 0.0)), ["a"]);
    }

    #[test]
    fn a_node_is_found_by_its_id() {
        let pool = pool(&[("b", Health::Up), ("a", Health::Up)], 0.5);
        assert_eq!(pool.get(&NodeId::try_from("b").unwrap()).unwrap().node.id().as_str(), "b");
        assert!(pool.get(&NodeId::try_from("c").unwrap()).is_none());
    }

    #[test]
    fn endpoints_and_addresses_are_those_of_its_nodes() {
        let pool = pool(&[("b", Health::Down), ("a", Health::Up)], 0.5);
        assert_eq!([0, 1, 2].map(|endpoint| pool.has_endpoint(endpoint)), [true, true, false]);
        let address = |text: &str| text.parse().unwrap();
        assert_eq!(
            ["127.0.0.1", "::ffff:127.0.0.1", "127.0.0.2"].map(|text| pool.has_address(address(text))),
            [true, true, false]
        );
        assert!(!Pool::default().has_endpoint(0) && !Pool::default().has_address(address("127.0.0.1")));
    }
}
