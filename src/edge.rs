//! The edge: clients come in, Varnish nodes that are up **and** current answer.
//!
//! Here the promise is kept: a Varnish behind the fence is not a candidate. When that leaves nobody, the shop has to
//! choose between an old page, a slow page and none (`when_all_behind`), and the default is the slow one: past the
//! caches to the web nodes, as many requests at once as they can bear. Only beyond that an old page is better than
//! none, and then it is counted.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::balance::{self, Draw, Policy};
use crate::config::{self, ProxyProtocol, WhenAllBehind};
use crate::fleet::{Fence, Member, Node, Role, Snapshot};
use crate::http1::{Method, RequestHead, ResponseHead};
use crate::proxy::{IgnoredParameters, NoNode, OwnAnswer, Route, request_key};
use crate::purge::{Ends, Passage};
use crate::shutdown::Stage;
use crate::telemetry::Metrics;
use crate::trial::{self, Trials};

/// The edge's decisions. Cheap to clone: each worker has its own.
#[derive(Clone)]
pub struct Edge {
    policy: Policy,
    bounded_load: f64,
    ignored: Arc<IgnoredParameters>,
    when_all_behind: WhenAllBehind,
    bypass_max_requests_per_node: u32,
    trusted_proxies: Arc<[IpNet]>,
    accepts_proxy_header: bool,
    offload_header: Arc<str>,
    /// The methods that purge here.
    purging: Arc<[String]>,
    fence: Arc<Fence>,
    trials: Arc<Trials>,
    metrics: Arc<Metrics>,
}

impl Edge {
    /// An edge that picks behind this fence. `purging` are the methods that purge, of which none passes.
    pub fn new(
        config: &config::Edge,
        purging: &[String],
        fence: Arc<Fence>,
        trials: Arc<Trials>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Edge {
            policy: config.policy,
            bounded_load: config.bounded_load,
            ignored: Arc::new(IgnoredParameters::new(config.hash_ignore_query.iter().map(String::as_str))),
            when_all_behind: config.when_all_behind,
            bypass_max_requests_per_node: config.bypass_max_requests_per_node,
            trusted_proxies: config.trusted_proxies.clone().into(),
            accepts_proxy_header: config.proxy_protocol == ProxyProtocol::Accept,
            offload_header: config.offload_header.as_str().into(),
            purging: purging.into(),
            fence,
            trials,
            metrics,
        }
    }

    fn is_trusted(&self, peer: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(&peer))
    }

    /// Past the caches: a web node that has room.
    fn bypass<'f>(&self, fleet: &'f Snapshot, draw: Draw, tried: Option<u64>) -> Option<&'f Member> {
        let has_room = |member: &Member| {
            member.usable
                && Some(member.node.key) != tried
                && member.node.live.inflight() < self.bypass_max_requests_per_node
        };
        balance::pick(Policy::LeastRequest, fleet.web.members(), draw, 0.0, has_room)
    }

    /// The last resort: the Varnish that misses the fewest purges.
    fn least_behind<'f>(&self, fleet: &'f Snapshot, tried: Option<u64>) -> Option<&'f Member> {
        let candidates = fleet.varnish.members().iter();
        candidates
            .filter(|member| member.usable && Some(member.node.key) != tried)
            .max_by_key(|member| member.node.live.cursor())
            .inspect(|_| self.metrics.stale_served.inc())
    }
}

impl Route for Edge {
    const ROLE: Role = Role::Varnish;
    const DRAINS_AT: Stage = Stage::Draining;

    const PUBLIC: bool = true;

    /// What comes from Varnish is for nobody's purges any more.
    const JOINS_TAGS: bool = false;

    fn expects_proxy_header(&self, peer: IpAddr) -> bool {
        self.accepts_proxy_header && self.is_trusted(peer)
    }

    fn offload_header(&self) -> &str {
        &self.offload_header
    }

    fn trusts(&self, peer: IpAddr, _fleet: &Snapshot) -> bool {
        self.is_trusted(peer)
    }

    /// No purge method passes: Varnish would see our own address in its ACL and obey.
    fn admits(&self, head: &RequestHead) -> bool {
        !matches!(head.method, Method::Purging | Method::Unsupported) && !head.is_one_of(&self.purging)
    }

    /// What is ours no client asks for: a Varnish would see our own address and answer.
    fn own_answer(&self, head: &RequestHead) -> Option<OwnAnswer> {
        self.trials.saw_host(head.host());
        trial::is_ours(head.path()).then_some(OwnAnswer::NotFound)
    }

    fn key(&self, head: &RequestHead) -> u64 {
        if self.policy == Policy::Rendezvous { request_key(head, &self.ignored) } else { 0 }
    }

    fn pick(&self, fleet: &Snapshot, draw: Draw, tried: Option<u64>) -> Result<Arc<Node>, NoNode> {
        let fence = self.fence.position();
        let may_serve = |Member { node, usable, .. }: &Member| {
            *usable && node.live.cursor() >= fence && self.trials.admits(&node.live) && Some(node.key) != tried
        };
        let current = balance::pick(self.policy, fleet.varnish.members(), draw, self.bounded_load, may_serve);
        let chosen = current.or_else(|| match self.when_all_behind {
            WhenAllBehind::Bypass => self.bypass(fleet, draw, tried).or_else(|| self.least_behind(fleet, tried)),
            WhenAllBehind::Serve => self.least_behind(fleet, tried),
            WhenAllBehind::Refuse => None,
        });
        match chosen {
            Some(member) => Ok(Arc::clone(&member.node)),
            None if fleet.varnish.members().iter().any(|member| member.usable) => Err(NoNode::AllBehind),
            None if fleet.web.members().iter().any(|member| member.usable) => Err(NoNode::Busy),
            None => Err(NoNode::NoneUp),
        }
    }

    fn purges(&self) -> u64 {
        0
    }

    fn holds(&self, _method: Method, _answer: &ResponseHead) -> bool {
        false
    }

    /// Nobody before the edge is told of purges, so there is nothing to be told about them either.
    /// No cache of ours is behind the edge.
    fn connected(&self, _ends: Ends) -> Option<Passage> {
        None
    }

    fn may_be_stored(
        &self,
        _began: u64,
        _passage: Option<&Passage>,
        _request: &RequestHead,
        _answer: &ResponseHead,
    ) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Health, Live, NodeId, NodeSpec, Pool, TrialState};
    use crate::purge::{Guard, Purge};

    fn member(role: Role, id: &str, key: u64, cursor: u64) -> Member {
        let spec = NodeSpec::new(role, NodeId::try_from(id).unwrap(), ([127, 0, 0, 1], 80).into());
        let live = Arc::new(Live::default());
        live.set_cursor(cursor);
        let node = Arc::new(Node::new(spec, live, key));
        Member { node, health: Health::Up, reason: "".into(), retained: false, usable: false }
    }

    fn fleet(cursors: &[u64], web: usize) -> Snapshot {
        let varnish = cursors.iter().enumerate();
        let varnish = varnish.map(|(n, &cursor)| member(Role::Varnish, &format!("v{n}"), n as u64, cursor)).collect();
        let web = (0..web).map(|n| member(Role::Web, &format!("w{n}"), 100 + n as u64, 0)).collect();
        Snapshot { version: 1, varnish: Pool::new(varnish, 0.0), web: Pool::new(web, 0.5) }
    }

    fn edge(when_all_behind: WhenAllBehind, answered: u64) -> Edge {
        edge_beside(when_all_behind, answered, Arc::new(Guard::new(std::time::Instant::now())))
    }

    fn edge_beside(when_all_behind: WhenAllBehind, answered: u64, guard: Arc<Guard>) -> Edge {
        let config = config::Edge { when_all_behind, bypass_max_requests_per_node: 1, ..config::Edge::default() };
        let metrics = Arc::new(Metrics::new().unwrap());
        let trials = Arc::new(Trials::new("", guard, Arc::clone(&metrics)));
        Edge::new(&config, &[], Arc::new(Fence::at(answered)), trials, metrics)
    }

    fn picked(edge: &Edge, fleet: &Snapshot, tried: Option<u64>) -> Result<String, NoNode> {
        edge.pick(fleet, Draw::default(), tried).map(|node| node.id().to_string())
    }

    #[test]
    fn a_varnish_that_misses_an_answered_purge_gets_nothing() {
        let edge = edge(WhenAllBehind::Bypass, 5);
        for key in 0..50 {
            let draw = Draw { key, ..Draw::default() };
            let node = edge.pick(&fleet(&[4, 5, 4], 1), draw, None).unwrap();
            assert_eq!(node.id().as_str(), "v1");
        }
    }

    #[test]
    fn when_all_are_behind_the_web_nodes_answer_as_far_as_they_can_and_then_the_least_behind() {
        let edge = edge(WhenAllBehind::Bypass, 5);
        let fleet = fleet(&[3, 4], 1);
        assert_eq!(picked(&edge, &fleet, None).unwrap(), "w0");
        fleet.web.members()[0].node.live.request_began();
        assert_eq!(edge.metrics.stale_served.get(), 0);
        assert_eq!(picked(&edge, &fleet, None).unwrap(), "v1");
        assert_eq!(edge.metrics.stale_served.get(), 1);
    }

    #[test]
    fn serve_and_refuse_do_as_they_say() {
        assert_eq!(picked(&edge(WhenAllBehind::Serve, 5), &fleet(&[3, 4], 1), None).unwrap(), "v1");
        assert_eq!(picked(&edge(WhenAllBehind::Refuse, 5), &fleet(&[3, 4], 1), None), Err(NoNode::AllBehind));
        assert_eq!(picked(&edge(WhenAllBehind::Serve, 0), &fleet(&[], 0), None), Err(NoNode::NoneUp));
    }

    #[test]
    fn a_varnish_that_does_not_carry_out_purges_gets_nothing() {
        let guard = Arc::new(Guard::new(std::time::Instant::now()));
        let (edge, fleet) = (edge_beside(WhenAllBehind::Refuse, 0, Arc::clone(&guard)), fleet(&[0], 0));
        let live = &fleet.varnish.members()[0].node.live;
        for (state, serves) in [
            (TrialState::Untried, true),
            (TrialState::Inconclusive, true),
            (TrialState::Failed, false),
            (TrialState::WithoutTags, true),
            (TrialState::Passed, true),
        ] {
            live.set_trial(state);
            assert_eq!(picked(&edge, &fleet, None).is_ok(), serves, "{state:?}");
        }
        // Until something was purged that it cannot purge.
        live.set_trial(TrialState::WithoutTags);
        guard.note(&Purge::everything());
        assert_eq!(picked(&edge, &fleet, None), Err(NoNode::AllBehind));
    }

    #[test]
    fn a_second_try_goes_elsewhere() {
        let edge = edge(WhenAllBehind::Bypass, 0);
        let fleet = fleet(&[0, 0], 1);
        let first = edge.pick(&fleet, Draw::default(), None).unwrap();
        assert_ne!(edge.pick(&fleet, Draw::default(), Some(first.key)).unwrap().key, first.key);
    }
}
