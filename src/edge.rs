//! The edge: receives client traffic, and sends it to Varnish nodes that are up **and** current.
//!
//! The promise is kept here: a Varnish behind the fence is not a candidate. If no candidate is left, the shop has to
//! choose between an old page, a slow page and none (`when_all_behind`). The default is the slow one: past the caches
//! to the web nodes, up to their limit of concurrent requests. Only beyond that is an old page better than none, and it
//! is counted.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::balance::{self, BoundedLoad, LbContext, Policy};
use crate::config::{self, ProxyProtocol, WhenAllBehind};
use crate::fleet::{Fence, Health, Member, Node, Pool, Role, Snapshot};
use crate::http1::RequestHead;
use crate::proxy::{
    ErrorPages, Freshness, Frontend, Gate, IgnoredParameters, NoNode, NodeChoice, OwnAnswer, PastCaches, RateBuckets,
    Select, Trust, request_hash,
};
use crate::shutdown::Stage;
use crate::trial::{self, Trials};

/// What the rules of the edge need beside their configuration.
pub struct GateParts {
    /// Of the process, over all reloads.
    pub buckets: Arc<RateBuckets>,
    /// The pages of this configuration.
    pub error_pages: Arc<ErrorPages>,
}

/// The edge's frontend: it selects nodes by this fence, and judges their answers by `freshness`, if those have seals.
/// `purge_methods` are the configured purging methods, beside those that every listener knows; `web_limit` is how many requests may be
/// in flight at a web node, whoever sends them.
pub fn frontend(
    config: &config::Edge,
    purge_methods: &[String],
    web_limit: Option<NonZeroU32>,
    fence: Arc<Fence>,
    trials: Arc<Trials>,
    freshness: Option<Freshness>,
    parts: GateParts,
) -> Frontend {
    let select = EdgeSelect::new(config, web_limit, fence, Arc::clone(&trials));
    // No client asks for a trial page; a Varnish would see our own address and answer it.
    let own_answer = move |head: &RequestHead| {
        trials.saw_host(head.host());
        trial::is_ours(head.path()).then_some(OwnAnswer::NotFound)
    };
    Frontend {
        role: Role::Varnish,
        drains_at: Stage::Draining,
        is_public: true,
        trust: Trust::Networks(config.trusted_proxies.clone().into()),
        accepts_proxy_header: config.proxy_protocol == ProxyProtocol::Accept,
        offload_header: config.offload_header.as_deref().map(Arc::from),
        purge_methods: purge_methods.into(),
        gate: Gate::of(config, &parts.buckets).map(Arc::new),
        error_pages: parts.error_pages,
        own_answer: Arc::new(own_answer),
        leave_notice: None,
        notes_latency: config.policy == Policy::PeakEwma,
        select: Arc::new(select),
        terms: config.request_terms(),
        // None of our caches is in front of the edge.
        store: None,
        freshness,
    }
}

/// Chooses among the current Varnish nodes.
struct EdgeSelect {
    policy: Policy,
    bounded_load: Option<BoundedLoad>,
    ignored: IgnoredParameters,
    when_all_behind: WhenAllBehind,
    /// Of each Varnish.
    limit: Option<NonZeroU32>,
    /// Of each web node, for those who come past the caches.
    bypass_limit: NonZeroU32,
    fence: Arc<Fence>,
    trials: Arc<Trials>,
}

impl EdgeSelect {
    /// `web_limit`: the requests that may be in flight at a web node, whoever sends them.
    fn new(config: &config::Edge, web_limit: Option<NonZeroU32>, fence: Arc<Fence>, trials: Arc<Trials>) -> Self {
        let bypass_limit = NonZeroU32::new(config.bypass_max_requests_per_node).unwrap_or(NonZeroU32::MIN);
        EdgeSelect {
            policy: config.policy,
            bounded_load: config.bounded_load(),
            ignored: IgnoredParameters::new(config.hash_ignore_query.iter().map(String::as_str)),
            when_all_behind: config.when_all_behind,
            limit: config.request_terms().max_per_node,
            bypass_limit: web_limit.map_or(bypass_limit, |limit| limit.min(bypass_limit)),
            fence,
            trials,
        }
    }

    /// Whether it is up, has what it must have, and carries out purges.
    fn may_serve(&self, Member { node, usable, .. }: &Member) -> bool {
        *usable && self.fence.admits(&node.live) && self.trials.admits(&node.live)
    }

    /// Past the caches: a web node below its limit.
    fn bypass(&self, fleet: &Snapshot, lb: LbContext, tried: &[u64]) -> Option<NodeChoice> {
        let limit = Some(self.bypass_limit);
        let has_room = |member: &Member| member.usable && is_new(member, tried) && member.node.live.has_room(limit);
        let member = balance::pick(Policy::LeastRequest, &fleet.web, lb, None, has_room)?;
        Some(NodeChoice { node: Arc::clone(&member.node), limit, is_stale: false })
    }

    /// One of those that may serve and have room.
    fn with_room(
        &self,
        fleet: &Snapshot,
        lb: LbContext,
        is_stale: bool,
        may_serve: impl Fn(&Member) -> bool,
    ) -> Option<NodeChoice> {
        let has_room = |member: &Member| may_serve(member) && member.node.live.has_room(self.limit);
        let member = balance::pick(self.policy, &fleet.varnish, lb, self.bounded_load, has_room)?;
        Some(NodeChoice { node: Arc::clone(&member.node), limit: self.limit, is_stale })
    }

    /// A Varnish that is kept out for what requests have met at it, and for nothing else: the one with the least to do. What it
    /// answers is no older than it should be.
    fn ejected(&self, fleet: &Snapshot, tried: &[u64]) -> Option<NodeChoice> {
        let is_well = |member: &&Member| {
            let Member { node, health, ejection, .. } = member;
            let is_out = ejection.is_some() && *health == Health::Up && node.weight > 0 && is_new(member, tried);
            let is_current = self.fence.admits(&node.live) && self.trials.admits(&node.live);
            is_out && is_current && node.live.has_room(self.limit)
        };
        let members = fleet.varnish.members().iter().filter(is_well);
        let member = members.min_by_key(|member| member.node.live.inflight())?;
        Some(NodeChoice { node: Arc::clone(&member.node), limit: self.limit, is_stale: false })
    }

    /// The last resort: of the Varnish nodes that are up, best such as carry purges out and owe no flush, one of those that miss
    /// the fewest purges. After a purge that all of them miss these are all, so a page has its place among them as ever.
    fn least_behind(&self, fleet: &Snapshot, lb: LbContext, tried: &[u64]) -> Option<NodeChoice> {
        let rank = |Member { node, .. }: &Member| {
            (self.trials.admits(&node.live), !node.live.must_be_flushed(), node.live.cursor())
        };
        let is_candidate = |member: &Member| member.usable && is_new(member, tried);
        let best = fleet.varnish.members().iter().filter(|member| is_candidate(member)).map(rank).max()?;
        let is_best = |member: &Member| is_candidate(member) && rank(member) >= best;
        self.with_room(fleet, lb, true, is_best)
    }
}

/// Whether it is none of these endpoints.
fn is_new(member: &Member, tried: &[u64]) -> bool {
    !tried.contains(&member.node.endpoint_id)
}

impl Select for EdgeSelect {
    fn request_hash(&self, head: &RequestHead) -> u64 {
        if self.policy == Policy::Rendezvous { request_hash(head, &self.ignored) } else { 0 }
    }

    fn pick(&self, fleet: &Snapshot, lb: LbContext, tried: &[u64]) -> Result<NodeChoice, NoNode> {
        let may_serve = |member: &Member| self.may_serve(member) && is_new(member, tried);
        if let Some(current) = self.with_room(fleet, lb, false, may_serve) {
            return Ok(current);
        }
        if self.limit.is_some() && fleet.varnish.members().iter().any(may_serve) {
            // What they cannot take is no reason to melt the web nodes, nor for an old page.
            return Err(NoNode::Busy);
        }
        let ejected = || self.ejected(fleet, tried);
        let behind = || self.least_behind(fleet, lb, tried);
        let chosen = match self.when_all_behind {
            WhenAllBehind::Bypass => self.bypass(fleet, lb, tried).or_else(ejected).or_else(behind),
            WhenAllBehind::Serve => ejected().or_else(behind),
            WhenAllBehind::Refuse => ejected(),
        };
        let has_other = |pool: &Pool| pool.members().iter().any(|member| member.usable && is_new(member, tried));
        chosen.ok_or_else(|| match self.when_all_behind {
            WhenAllBehind::Refuse if has_other(&fleet.varnish) => NoNode::AllBehind,
            // Those that are least behind would serve.
            WhenAllBehind::Bypass | WhenAllBehind::Serve if has_other(&fleet.varnish) => NoNode::Busy,
            // Then web nodes were asked for. One that has just failed the request is not busy.
            WhenAllBehind::Bypass if has_other(&fleet.web) => NoNode::Busy,
            WhenAllBehind::Bypass | WhenAllBehind::Serve | WhenAllBehind::Refuse => NoNode::NoneUp,
        })
    }

    fn past_caches(&self, fleet: &Snapshot, lb: LbContext, told: &[u64], last: &Node) -> PastCaches {
        let bypasses = self.when_all_behind == WhenAllBehind::Bypass;
        if let Some(web) = bypasses.then(|| self.bypass(fleet, lb, &[])).flatten() {
            return PastCaches::Web(web);
        }
        // Nothing old is served, and nothing refused, while there is a cache that may have a fresh page.
        let has_another = fleet.varnish.members().iter().any(|member| self.may_serve(member) && is_new(member, told));
        if has_another || self.ejected(fleet, told).is_some() {
            return PastCaches::Cache;
        }
        if self.when_all_behind == WhenAllBehind::Refuse {
            return PastCaches::Refuse;
        }
        PastCaches::Serve { is_counted: !self.fence.admits(&last.live) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Live, NodeId, NodeSpec, TrialState};
    use crate::purge::{Guard, Purge};
    use crate::telemetry::Metrics;

    fn member(role: Role, id: &str, key: u64, cursor: u64) -> Member {
        let spec = NodeSpec::new(role, NodeId::try_from(id).unwrap(), ([127, 0, 0, 1], 80).into());
        let live = Arc::new(Live::default());
        live.set_cursor(cursor);
        let node = Arc::new(Node::new(spec, live, key));
        Member { node, health: Health::Up, fault: None, ejection: None, retained: false, usable: false }
    }

    fn fleet(cursors: &[u64], web: usize) -> Snapshot {
        let varnish = cursors.iter().enumerate();
        let varnish = varnish.map(|(n, &cursor)| member(Role::Varnish, &format!("v{n}"), n as u64, cursor)).collect();
        let web = (0..web).map(|n| member(Role::Web, &format!("w{n}"), 100 + n as u64, 0)).collect();
        Snapshot { version: 1, varnish: Pool::new(varnish, 0.0, None), web: Pool::new(web, 0.5, None) }
    }

    fn edge(when_all_behind: WhenAllBehind, answered: u64) -> EdgeSelect {
        edge_beside(when_all_behind, answered, Arc::new(Guard::new(std::time::Instant::now())))
    }

    fn edge_beside(when_all_behind: WhenAllBehind, answered: u64, guard: Arc<Guard>) -> EdgeSelect {
        let config = config::Edge { when_all_behind, bypass_max_requests_per_node: 1, ..config::Edge::default() };
        let trials = Arc::new(Trials::new(None, guard, Arc::new(Metrics::new().unwrap())));
        EdgeSelect::new(&config, None, Arc::new(Fence::at(answered)), trials)
    }

    fn picked(edge: &EdgeSelect, fleet: &Snapshot, tried: &[u64]) -> Result<String, NoNode> {
        edge.pick(fleet, LbContext::default(), tried).map(|choice| choice.node.id().to_string())
    }

    #[test]
    fn a_varnish_that_misses_an_answered_purge_gets_nothing() {
        let edge = edge(WhenAllBehind::Bypass, 5);
        for key in 0..50 {
            let lb = LbContext { request_hash: key, ..LbContext::default() };
            let choice = edge.pick(&fleet(&[4, 5, 4], 1), lb, &[]).unwrap();
            assert_eq!(choice.node.id().as_str(), "v1");
        }
    }

    #[test]
    fn with_all_behind_web_nodes_answer_and_beyond_that_the_least_behind() {
        let edge = edge(WhenAllBehind::Bypass, 5);
        let fleet = fleet(&[3, 4], 1);
        let pick = || edge.pick(&fleet, LbContext::default(), &[]).unwrap();
        assert_eq!((pick().node.id().as_str(), pick().limit, pick().is_stale), ("w0", NonZeroU32::new(1), false));
        fleet.web.members()[0].node.live.request_began();
        assert_eq!((pick().node.id().as_str(), pick().limit, pick().is_stale), ("v1", None, true));
    }

    #[test]
    fn a_current_cache_that_was_ejected_is_asked_before_an_old_page_is_served() {
        let mut fleet = fleet(&[5, 4], 1);
        let mut varnish = fleet.varnish.members().to_vec();
        let fault = crate::fleet::NodeFault::new(crate::fleet::FaultKind::Fails, "answered 503");
        let now = std::time::Instant::now();
        varnish[0].ejection = Some(crate::fleet::Ejection { until: now, lasts: std::time::Duration::ZERO, fault });
        fleet.varnish = Pool::new(varnish, 0.0, None);
        let picked = |when_all_behind, tried: &[u64]| picked(&edge(when_all_behind, 5), &fleet, tried);
        assert_eq!(picked(WhenAllBehind::Bypass, &[]).unwrap(), "w0", "which fails nothing");
        fleet.web.members()[0].node.live.request_began();
        for when_all_behind in [WhenAllBehind::Bypass, WhenAllBehind::Serve, WhenAllBehind::Refuse] {
            assert_eq!(picked(when_all_behind, &[]).unwrap(), "v0", "{when_all_behind:?}");
        }
        // It has failed this request just now.
        assert_eq!(picked(WhenAllBehind::Serve, &[0]).unwrap(), "v1");
        assert_eq!(picked(WhenAllBehind::Refuse, &[0]), Err(NoNode::AllBehind));
        // One that is behind itself is no better than another.
        fleet.varnish.members()[0].node.live.set_cursor(3);
        assert_eq!(picked(WhenAllBehind::Serve, &[]).unwrap(), "v1");
    }

    #[test]
    fn all_that_are_behind_alike_share_the_last_resort() {
        let (edge, fleet) = (edge(WhenAllBehind::Serve, 5), fleet(&[4, 4, 4], 0));
        let served = |key: u64| {
            let lb = LbContext { request_hash: key.wrapping_mul(0x9e37_79b9_7f4a_7c15), ..LbContext::default() };
            edge.pick(&fleet, lb, &[]).unwrap().node.id().to_string()
        };
        let all: std::collections::BTreeSet<_> = (0..100).map(served).collect();
        assert_eq!(all.len(), 3);
        // It keeps pages that it says it has dropped, and so has missed nothing, as far as it says.
        let liar = &fleet.varnish.members()[2].node.live;
        liar.set_trial(TrialState::Failed);
        liar.set_cursor(5);
        assert!((0..100).all(|key| served(key) != "v2"));
    }

    #[test]
    fn serve_and_refuse_do_as_they_say() {
        assert_eq!(picked(&edge(WhenAllBehind::Serve, 5), &fleet(&[3, 4], 1), &[]).unwrap(), "v1");
        assert_eq!(picked(&edge(WhenAllBehind::Refuse, 5), &fleet(&[3, 4], 1), &[]), Err(NoNode::AllBehind));
        assert_eq!(picked(&edge(WhenAllBehind::Serve, 0), &fleet(&[], 0), &[]), Err(NoNode::NoneUp));
    }

    #[test]
    fn web_nodes_are_busy_only_where_they_are_asked() {
        let busy = fleet(&[], 1);
        busy.web.members()[0].node.live.request_began();
        for (when_all_behind, reason) in [
            (WhenAllBehind::Bypass, NoNode::Busy),
            (WhenAllBehind::Serve, NoNode::NoneUp),
            (WhenAllBehind::Refuse, NoNode::NoneUp),
        ] {
            assert_eq!(picked(&edge(when_all_behind, 5), &busy, &[]), Err(reason), "{when_all_behind:?}");
        }
        // The only one has just failed.
        assert_eq!(picked(&edge(WhenAllBehind::Bypass, 5), &fleet(&[], 1), &[100]), Err(NoNode::NoneUp));
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
            assert_eq!(picked(&edge, &fleet, &[]).is_ok(), serves, "{state:?}");
        }
        // Until a purge comes that it cannot carry out.
        live.set_trial(TrialState::WithoutTags);
        guard.note(&Purge::everything());
        assert_eq!(picked(&edge, &fleet, &[]), Err(NoNode::AllBehind));
    }

    #[test]
    fn a_second_try_goes_elsewhere() {
        let edge = edge(WhenAllBehind::Bypass, 0);
        let fleet = fleet(&[0, 0], 1);
        let first = edge.pick(&fleet, LbContext::default(), &[]).unwrap().node.endpoint_id;
        assert_ne!(edge.pick(&fleet, LbContext::default(), &[first]).unwrap().node.endpoint_id, first);
    }

    /// An edge with a limit of one request for each Varnish.
    fn limited(when_all_behind: WhenAllBehind) -> EdgeSelect {
        EdgeSelect { limit: NonZeroU32::new(1), ..edge(when_all_behind, 5) }
    }

    #[test]
    fn full_varnish_are_passed_by_and_no_reason_to_ask_the_web_nodes() {
        for when_all_behind in [WhenAllBehind::Bypass, WhenAllBehind::Serve, WhenAllBehind::Refuse] {
            let (edge, fleet) = (limited(when_all_behind), fleet(&[5, 5, 4], 1));
            let first = picked(&edge, &fleet, &[]).unwrap();
            let member = |id: &str| fleet.varnish.get(&NodeId::try_from(id).unwrap()).unwrap();
            member(&first).node.live.request_began();
            let second = picked(&edge, &fleet, &[]).unwrap();
            assert!(first != second && second != "v2", "{first}, {second}");
            member(&second).node.live.request_began();
            assert_eq!(picked(&edge, &fleet, &[]), Err(NoNode::Busy), "{when_all_behind:?}");
            // One that failed is not waited for.
            let [a, b] = [0, 1].map(|index| fleet.varnish.members()[index].node.endpoint_id);
            assert_eq!(picked(&edge, &fleet, &[a]), Err(NoNode::Busy), "{when_all_behind:?}");
            let expected = match when_all_behind {
                WhenAllBehind::Bypass => Ok("w0".to_owned()),
                WhenAllBehind::Serve => Ok("v2".to_owned()),
                WhenAllBehind::Refuse => Err(NoNode::AllBehind),
            };
            assert_eq!(picked(&edge, &fleet, &[a, b]), expected, "{when_all_behind:?}");
        }
    }

    #[test]
    fn the_last_resort_has_its_limit_as_well_and_a_request_waits_for_it() {
        for when_all_behind in [WhenAllBehind::Bypass, WhenAllBehind::Serve] {
            let (edge, fleet) = (limited(when_all_behind), fleet(&[3, 4], 1));
            fleet.web.members()[0].node.live.request_began();
            assert_eq!(picked(&edge, &fleet, &[]).unwrap(), "v1", "{when_all_behind:?}");
            fleet.varnish.members()[1].node.live.request_began();
            assert_eq!(picked(&edge, &fleet, &[]), Err(NoNode::Busy), "{when_all_behind:?}");
        }
    }

    #[test]
    fn the_limit_of_a_web_node_bounds_who_comes_past_the_caches() {
        let bypass_limit = |web_limit| {
            let trials = edge(WhenAllBehind::Bypass, 0).trials;
            EdgeSelect::new(&config::Edge::default(), NonZeroU32::new(web_limit), Arc::new(Fence::at(0)), trials)
                .bypass_limit
        };
        assert_eq!([0, 8, 100].map(|limit| bypass_limit(limit).get()), [32, 8, 32]);
    }
}
