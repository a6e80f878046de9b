//! The origin: Varnish comes in, web nodes answer. Varnish has this listener as its only backend, and so needs to know
//! no web node.

use std::net::IpAddr;
use std::sync::Arc;

use crate::balance::{self, Draw, Policy};
use crate::config;
use crate::fleet::{Member, Node, Role, Snapshot};
use crate::http1::{Method, RequestHead};
use crate::proxy::{IgnoredParameters, NoNode, Route, request_key};
use crate::shutdown::Stage;

/// The origin's decisions.
#[derive(Clone, Debug)]
pub struct Origin {
    policy: Policy,
    nothing_ignored: IgnoredParameters,
}

impl Origin {
    /// An origin that chooses as configured.
    pub fn new(config: &config::Origin) -> Self {
        Origin { policy: config.policy, nothing_ignored: IgnoredParameters::default() }
    }
}

impl Route for Origin {
    const ROLE: Role = Role::Web;
    const DRAINS_AT: Stage = Stage::Emptying;

    /// Its clients are Varnish nodes: few, ours, and as slow as the clients that they wait for.
    const PUBLIC: bool = false;

    fn expects_proxy_header(&self, _peer: IpAddr) -> bool {
        false
    }

    /// The edge wrote it, where one is wanted, and Varnish passes it on.
    fn offload_header(&self) -> &str {
        ""
    }

    /// The edge already wrote who the client is, and Varnish passed it on: registered Varnish nodes are believed.
    fn trusts(&self, peer: IpAddr, fleet: &Snapshot) -> bool {
        fleet.varnish.members().iter().any(|member| member.node.spec.address.ip().to_canonical() == peer)
    }

    /// A purge method here comes from a Varnish whose VCL pipes what it does not know; no web server wants it.
    fn admits(&self, method: Method) -> bool {
        !matches!(method, Method::Purging | Method::Unsupported)
    }

    fn key(&self, head: &RequestHead, buffer: &[u8]) -> u64 {
        if self.policy == Policy::Rendezvous { request_key(head, buffer, &self.nothing_ignored) } else { 0 }
    }

    fn pick(&self, fleet: &Snapshot, draw: Draw, tried: Option<u64>) -> Result<Arc<Node>, NoNode> {
        let may_serve = |member: &Member| member.usable && Some(member.node.key) != tried;
        balance::pick(self.policy, fleet.web.members(), draw, 0.0, may_serve)
            .map(|member| Arc::clone(&member.node))
            .ok_or(NoNode::NoneUp)
    }
}
