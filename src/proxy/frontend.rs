//! A frontend: what one listener of the data path is, beside its sockets.
//!
//! Edge and origin take the same path through the code. What differs between them is here, as data where data will do, and
//! as the two decisions that are theirs: which node takes a request ([`Select`]), and whether a cache behind the listener
//! may store an answer ([`StorePolicy`], of the origin alone).

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::store::StorePolicy;
use crate::balance::LbContext;
use crate::fleet::{Node, Role, Snapshot};
use crate::http1::{Method, RequestHead};
use crate::shutdown::Stage;

/// One listener of the data path. Cheap to clone: each worker has its own.
#[derive(Clone)]
pub struct Frontend {
    /// The role of the nodes that its requests go to.
    pub role: Role,
    /// From this stage on, connections at rest are closed and no new ones are taken.
    pub drains_at: Stage,
    /// Its clients are strangers, whose number and pace are limited.
    pub is_public: bool,
    /// Who is believed about what lies behind it.
    pub trust: Trust,
    /// The connections of trusted proxies begin with a PROXY header.
    pub accepts_proxy_header: bool,
    /// A request field that says `https` of a client that came that way, beside `X-Forwarded-Proto`.
    pub offload_header: Option<Arc<str>>,
    /// Methods that purge at the nodes, beside [`Method::Purging`]: none passes.
    pub purge_methods: Arc<[String]>,
    /// What is answered here, whatever the nodes do.
    pub own_answer: OwnAnswers,
    /// Chooses the node of a request.
    pub select: Arc<dyn Select>,
    /// What the caches behind this listener may store; `None` if there are none.
    pub store: Option<StorePolicy>,
}

/// Decides which requests are answered here.
pub type OwnAnswers = Arc<dyn Fn(&RequestHead) -> Option<OwnAnswer> + Send + Sync>;

/// Whose `X-Forwarded-*` fields are believed.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Proxies in these networks.
    Networks(Arc<[IpNet]>),
    /// The Varnish nodes of the fleet: the edge already wrote who the client is, and they passed it on.
    VarnishNodes,
}

/// Chooses the node of a request.
pub trait Select: Send + Sync {
    /// The hash of what is asked for, for policies that keep a page on a node; 0 for other policies.
    fn request_hash(&self, head: &RequestHead) -> u64;

    /// Chooses a node whose key is not `tried`.
    ///
    /// # Errors
    /// Why there is none, for the answer.
    fn pick(&self, fleet: &Snapshot, lb: LbContext, tried: Option<u64>) -> Result<Arc<Node>, NoNode>;
}

/// An answer that no node gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnAnswer {
    /// Nothing is there: 404.
    NotFound,
    /// A whole answer in HTTP/1.1, with status 200, that closes the connection.
    Page(Vec<u8>),
}

/// Why no node can take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoNode {
    /// No node is up, or none beside the one that failed.
    NoneUp,
    /// Every Varnish misses a purge and the configuration says to refuse then.
    AllBehind,
    /// Nodes are up, but all of them have as many requests as they may.
    Busy,
}

impl Frontend {
    /// Whether the connections of this peer begin with a PROXY header.
    pub(super) fn expects_proxy_header(&self, peer: IpAddr, fleet: &Snapshot) -> bool {
        self.accepts_proxy_header && self.trusts(peer, fleet)
    }

    /// Whether the `X-Forwarded-*` fields of this peer are believed.
    pub(super) fn trusts(&self, peer: IpAddr, fleet: &Snapshot) -> bool {
        match &self.trust {
            Trust::Networks(networks) => networks.iter().any(|network| network.contains(&peer)),
            Trust::VarnishNodes => {
                let mut nodes = fleet.varnish.members().iter();
                nodes.any(|member| member.node.spec.address.ip().to_canonical() == peer)
            }
        }
    }

    /// Whether a request with this method may pass; others are answered 405. No purge method passes: at the edge, Varnish
    /// would see our own address in its ACL and obey; at the origin it comes from a Varnish whose VCL pipes what it does
    /// not know, and no web server wants it.
    pub(super) fn admits(&self, head: &RequestHead) -> bool {
        !matches!(head.method, Method::Purging | Method::Unsupported) && !head.is_one_of(&self.purge_methods)
    }
}

impl fmt::Debug for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frontend").field("role", &self.role).finish_non_exhaustive()
    }
}
