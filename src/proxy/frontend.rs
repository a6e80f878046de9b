//! A frontend: one listener of the data path, without its sockets.
//!
//! Edge and origin share the request path. Their differences are here, mostly as data, and as two decisions: which node
//! takes a request ([`Select`]), and whether a cache behind the listener may store an answer ([`StorePolicy`], of the
//! origin alone).

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use ipnet::IpNet;

use super::error_pages::ErrorPages;
use super::freshness::Freshness;
use super::gate::Gate;
use super::leave_notice::LeaveNotice;
use super::store::StorePolicy;
use crate::balance::LbContext;
use crate::config::RequestTerms;
use crate::fleet::{Node, Role, Snapshot};
use crate::http1::{Method, RequestHead};
use crate::shutdown::Stage;

/// One listener of the data path. Cheap to clone: each worker has its own.
#[derive(Clone)]
pub struct Frontend {
    /// The role of the nodes that serve its requests.
    pub role: Role,
    /// From this stage on, idle connections are closed and no new ones are accepted.
    pub drains_at: Stage,
    /// Its clients are untrusted, so their number and pace are limited.
    pub is_public: bool,
    /// Whose `X-Forwarded-*` fields are trusted.
    pub trust: Trust,
    /// The connections of trusted proxies begin with a PROXY header.
    pub accepts_proxy_header: bool,
    /// A request field that says `https` of a client that came that way, beside `X-Forwarded-Proto`.
    pub offload_header: Option<Arc<str>>,
    /// Methods that purge at the nodes, beside [`Method::Purging`]: none passes.
    pub purge_methods: Arc<[String]>,
    /// Decides who is let in; `None` if everybody is.
    pub gate: Option<Arc<Gate>>,
    /// Pages for answers of our own.
    pub error_pages: Arc<ErrorPages>,
    /// Requests that are answered here, without a node.
    pub own_answer: OwnAnswers,
    /// What the probes of the caches behind this listener are told; `None` if they have none here.
    pub leave_notice: Option<Arc<LeaveNotice>>,
    /// How long nodes take to begin an answer is noted ([`crate::fleet::PeakLatency`]), since its policy asks for that.
    pub notes_latency: bool,
    /// Chooses the node of a request.
    pub select: Arc<dyn Select>,
    /// How much nodes get, and what becomes of what they cannot take.
    pub terms: RequestTerms,
    /// What the caches behind this listener may store; `None` if there are none.
    pub store: Option<StorePolicy>,
    /// Judges what the nodes behind this listener answer; `None` if they are no caches, or their answers have no seals.
    pub freshness: Option<Freshness>,
}

/// Decides which requests are answered here.
pub type OwnAnswers = Arc<dyn Fn(&RequestHead) -> Option<OwnAnswer> + Send + Sync>;

/// Whose `X-Forwarded-*` fields are trusted.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Proxies in these networks.
    Networks(Arc<[IpNet]>),
    /// The Varnish nodes of the fleet: the edge already wrote the client's address, and they passed it on.
    VarnishNodes,
}

/// Chooses the node of a request.
pub trait Select: Send + Sync {
    /// The hash of the requested page, for policies that keep a page on one node; 0 for other policies.
    fn request_hash(&self, head: &RequestHead) -> u64;

    /// Chooses a node with room whose endpoint is none of `tried`. Whether there is one does not depend on `lb`.
    ///
    /// # Errors
    /// If there is none: the reason, for the answer. After [`NoNode::Busy`] the request may wait.
    fn pick(&self, fleet: &Snapshot, lb: LbContext, tried: &[u64]) -> Result<NodeChoice, NoNode>;

    /// What is done if the caches with these endpoints, `last` as the last one, answered with a stale page.
    fn past_caches(&self, fleet: &Snapshot, lb: LbContext, told: &[u64], last: &Node) -> PastCaches;
}

/// A chosen node, with nothing counted yet.
#[derive(Clone, Debug)]
pub struct NodeChoice {
    /// The node.
    pub node: Arc<Node>,
    /// The requests that may be in flight there, with this one; `None`: no limit.
    pub limit: Option<NonZeroU32>,
    /// It is a Varnish that is behind, because nobody else can take the request.
    pub is_stale: bool,
}

/// What is done if no cache has a fresh page.
#[derive(Clone, Debug)]
pub enum PastCaches {
    /// This web node is asked.
    Web(NodeChoice),
    /// A cache is that has not answered yet, if need be after a wait: no web node may be.
    Cache,
    /// The page is served as it is. `is_counted`: that its cache is behind was counted when it was chosen.
    Serve {
        /// Counted already.
        is_counted: bool,
    },
    /// The request is refused.
    Refuse,
}

/// An answer without a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnAnswer {
    /// Not found: 404.
    NotFound,
    /// A complete HTTP/1.1 answer, with status 200, that closes the connection.
    Page(Vec<u8>),
}

/// Why no node can take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoNode {
    /// No node is up, or none beside the one that failed.
    NoneUp,
    /// Every Varnish misses a purge, and the configuration says to refuse requests then.
    AllBehind,
    /// Nodes may serve, but all are at their limit of requests.
    Busy,
}

impl Frontend {
    /// Whether this peer's connections begin with a PROXY header.
    pub(super) fn expects_proxy_header(&self, peer: IpAddr, fleet: &Snapshot) -> bool {
        self.accepts_proxy_header && self.trusts(peer, fleet)
    }

    /// Whether this peer's `X-Forwarded-*` fields are trusted.
    pub(super) fn trusts(&self, peer: IpAddr, fleet: &Snapshot) -> bool {
        match &self.trust {
            Trust::Networks(networks) => networks.iter().any(|network| network.contains(&peer)),
            Trust::VarnishNodes => fleet.varnish.has_address(peer),
        }
    }

    /// Whether a request purges. Such a request never passes: at the edge, Varnish would find our own address in its ACL and
    /// obey; at the origin it comes from a Varnish whose VCL pipes unknown methods, and no web server wants it.
    pub(super) fn is_purge(&self, head: &RequestHead) -> bool {
        head.method == Method::Purging || head.is_one_of(&self.purge_methods)
    }
}

impl fmt::Debug for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frontend").field("role", &self.role).finish_non_exhaustive()
    }
}
