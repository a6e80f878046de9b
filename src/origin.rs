//! The origin: receives requests from Varnish, and sends them to web nodes. It is Varnish's only backend, so Varnish
//! needs to know no web node.
//!
//! Every page passes here on its way into a cache, so the guard is asked here ([`StorePolicy`]): a page rendered before
//! a purge must not be stored after it.

mod wire;

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::balance::{self, LbContext, Policy};
use crate::config;
use crate::fleet::{Member, Node, Role, Snapshot};
use crate::http1::{Method, RequestHead};
use crate::proxy::{
    Frontend, IgnoredParameters, LeaveNotice, NoNode, NodeChoice, NoteTags, OwnAnswer, PastCaches, Select, StorePolicy,
    Trust, request_hash,
};
use crate::purge::Guard;
use crate::seal::PurgedNames;
use crate::shutdown::Stage;
use crate::telemetry::Metrics;
use crate::trial::{self, Trials};

pub use wire::SocketDiagnosis;

/// The origin's frontend: it selects web nodes as configured, asks this guard what Varnish may store, and seals answers if
/// there is what they are sealed by.
/// `purge_methods` are the configured purging methods, beside those that every listener knows.
pub fn frontend(
    config: &config::Origin,
    purge_methods: &[String],
    guard: Arc<Guard>,
    sealing: Option<(Arc<PurgedNames>, NoteTags)>,
    trials: Arc<Trials>,
    leave_notice: Arc<LeaveNotice>,
    metrics: Arc<Metrics>,
) -> Frontend {
    // Trial pages are answered here; no path below theirs goes to a web node.
    let own_answer = move |head: &RequestHead| {
        let path = head.path();
        if !trial::is_ours(path) {
            return None;
        }
        let page = trials.answer(path, head.asked()).filter(|_| head.method == Method::Get);
        Some(page.map_or(OwnAnswer::NotFound, OwnAnswer::Page))
    };
    Frontend {
        role: Role::Web,
        drains_at: Stage::Emptying,
        // Its clients are Varnish nodes: few, trusted, and as slow as their own clients.
        is_public: false,
        trust: Trust::VarnishNodes,
        accepts_proxy_header: false,
        // The edge wrote it, if one is wanted, and Varnish passes it on.
        offload_header: None,
        purge_methods: purge_methods.into(),
        // It trusts its clients, and has asked nobody else.
        gate: None,
        error_pages: Arc::default(),
        own_answer: Arc::new(own_answer),
        leave_notice: Some(leave_notice),
        notes_latency: config.policy == Policy::PeakEwma,
        select: Arc::new(OriginSelect {
            policy: config.policy,
            limit: config.request_terms().max_per_node,
            nothing_ignored: IgnoredParameters::default(),
        }),
        terms: config.request_terms(),
        store: Some(StorePolicy::new(config.guard.then_some(guard), sealing, metrics)),
        freshness: None,
    }
}

/// Chooses among the web nodes.
struct OriginSelect {
    policy: Policy,
    /// Of each web node.
    limit: Option<NonZeroU32>,
    nothing_ignored: IgnoredParameters,
}

impl Select for OriginSelect {
    fn request_hash(&self, head: &RequestHead) -> u64 {
        if self.policy == Policy::Rendezvous { request_hash(head, &self.nothing_ignored) } else { 0 }
    }

    fn pick(&self, fleet: &Snapshot, lb: LbContext, tried: &[u64]) -> Result<NodeChoice, NoNode> {
        let may_serve = |member: &Member| member.usable && !tried.contains(&member.node.endpoint_id);
        let has_room = |member: &Member| may_serve(member) && member.node.live.has_room(self.limit);
        match balance::pick(self.policy, &fleet.web, lb, None, has_room) {
            Some(member) => Ok(NodeChoice { node: Arc::clone(&member.node), limit: self.limit, is_stale: false }),
            None if self.limit.is_some() && fleet.web.members().iter().any(may_serve) => Err(NoNode::Busy),
            None => Err(NoNode::NoneUp),
        }
    }

    fn past_caches(&self, _: &Snapshot, _: LbContext, _: &[u64], _: &Node) -> PastCaches {
        // Web nodes are no caches: none of their answers is stale.
        PastCaches::Serve { is_counted: true }
    }
}
