//! `[edge]` and `[origin]`: the two balanced listeners.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::edge_rules::{EdgeErrorPages, EdgeHttps, EdgeMaintenance, EdgeRateLimit};
use super::optional::{empty_is_none, zero_is_none};
use super::text;
use crate::balance::{BoundedLoad, Policy};

/// The defaults of both listeners. As many may wait as with Envoy (`max_pending_requests`).
const MAX_QUEUE: u32 = 1024;
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_BUDGET: f64 = 0.2;

/// How many requests the nodes of a listener get, and what becomes of others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RequestTerms {
    /// In flight at each node; `None`: no limit.
    pub max_per_node: Option<NonZeroU32>,
    /// How many requests may wait for a node with room.
    pub max_queue: usize,
    /// For how long.
    pub queue_timeout: Duration,
    /// The share of requests that may be retried, 0 to 1.
    pub retry_budget: f64,
}

/// A number that was checked.
fn as_limit(requests: NonZeroUsize) -> NonZeroU32 {
    NonZeroU32::try_from(requests).unwrap_or(NonZeroU32::MAX)
}

/// What Magento 2.4.8 strips from a URL before its own hash (`Identifier::getMarketingParameterPatterns`, and its VCL), and
/// what other shops' advertisements use. `ie` and `origin`, which older VCLs of Magento stripped as well, are none.
#[rustfmt::skip]
pub const MARKETING_PARAMETERS: [&str; 53] = [
    "_branch_match_id", "_bta_*", "_ga", "_gl", "_ke", "_kx", "campid", "ceneo_cid", "clickId",
    "cof", "customid", "cx", "dclid", "dm_i", "ef_id", "epik", "fbclid", "gad_*",
    "gbraid", "gclid", "gclsrc", "gdffi", "gdfms", "gdftrk", "hsa_*", "igshid", "matomo_*",
    "mc_*", "mkcid", "mkevt", "mkrid", "mkwid", "msclkid", "mtm_*", "pcrid", "piwik_*",
    "pk_*", "redirect_log_mongo_id", "redirect_mongo_id", "s_kwcid", "sb_referer_host", "ScCid", "siteurl", "snrai_*", "srsltid",
    "tduid", "trk_*", "ttclid", "twclid", "utm_*", "wbraid", "yclid", "zanpid",
];

/// `[edge]`: clients to Varnish.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Edge {
    /// Where clients connect; port 0 takes any free port. Default `["0.0.0.0:8080"]`.
    #[serde(deserialize_with = "text::list")]
    pub listen: Vec<SocketAddr>,
    /// How a request finds its Varnish. Default `rendezvous`: each page is cached once in the fleet.
    pub policy: Policy,
    /// How far above the mean load a node may be, as a factor, before it passes a URL on to its next choice;
    /// 0 turns that off, else at least 1. Default 1.25.
    #[serde(with = "empty_is_none")]
    pub bounded_load: Option<f64>,
    /// How many requests in flight are never too much for a node, whatever the mean is: requests for one page that come
    /// together stay together in a small fleet. At least 1, default 32.
    pub bounded_load_from: u32,
    /// Query parameters that do not make a URL another page: a name, or a name with one trailing `*`. Our VCL strips
    /// them, so that it is one list: `clearcoat vcl` writes it there. Default [`MARKETING_PARAMETERS`].
    pub hash_ignore_query: Vec<String>,
    /// What becomes of requests while no Varnish has all purges. Default `bypass`.
    pub when_all_behind: WhenAllBehind,
    /// Requests in flight that a bypass may put on one web node; beyond it the Varnish that is least behind serves, and where there
    /// is none requests wait. Where `origin.max_requests_per_node` is less, that counts. At least 1, default 32.
    pub bypass_max_requests_per_node: u32,
    /// Requests in flight that all clients together may put on one Varnish; 0 (the default) is no limit, and 1000000 the
    /// highest. While every Varnish that may serve has as many, requests wait. Tunnels and event streams count as long as they last.
    #[serde(with = "zero_is_none")]
    pub max_requests_per_node: Option<NonZeroUsize>,
    /// Requests that may wait for a node with room; one more is answered 503 at once. 0: none waits. At most 1000000, default 1024.
    pub max_queue: u32,
    /// How long a request may wait for a node with room; then it is answered 503. Above 0s, at most 600s, default 5s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub queue_timeout: Duration,
    /// The share of the requests of the last 10 s that may be sent to another node after one may have begun to carry them out. Not
    /// counted is who could not connect, and 100 in 10 s are always allowed. 0 to 1, default 0.2.
    pub retry_budget: f64,
    /// Networks whose `X-Forwarded-*` headers are believed, and whose PROXY header if `proxy_protocol` is `accept`;
    /// a bare address is one host. Default none.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub trusted_proxies: Vec<IpNet>,
    /// Whether the peers in `trusted_proxies` send a PROXY header. Default `off`.
    pub proxy_protocol: ProxyProtocol,
    /// Whether TLS listeners offer HTTP/2 (`h2` in ALPN, RFC 9113 section 3.2). Default true.
    pub http2: bool,
    /// A header that says `https` to Magento and to its VCL when the client came by TLS: what the shop has under
    /// `web/secure/offloader_header`. A stranger's own is dropped. Default empty: `X-Forwarded-Proto`, which is
    /// always written, is enough; to name that one is read as empty.
    #[serde(with = "empty_is_none")]
    pub offload_header: Option<String>,
    /// Whether answers are sealed at the origin and judged at the edge: one that is older than a purge is thrown away there,
    /// whichever Varnish has kept it. Default true.
    pub seal: bool,
    /// Hosts that the edge answers for: names, `*.` and a name for all below it, addresses; without ports. Others are
    /// answered 421. Default none: every host.
    pub hosts: Vec<String>,
    /// Networks whose clients are answered 403; a bare address is one host. Default none.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub blocked: Vec<IpNet>,
    /// `[edge.https]`: the redirect to https, and HSTS.
    pub https: EdgeHttps,
    /// `[edge.error_pages]`: pages for answers that clearcoat makes itself.
    pub error_pages: EdgeErrorPages,
    /// `[edge.maintenance]`: the shop is closed, but for some.
    pub maintenance: EdgeMaintenance,
    /// `[edge.rate_limit]`: how many requests clients may make.
    pub rate_limit: EdgeRateLimit,
    /// `[[edge.tls]]`: where clients connect with TLS. Default none.
    pub tls: Vec<TlsListener>,
}

impl Default for Edge {
    fn default() -> Self {
        Edge {
            listen: vec![SocketAddr::from(([0, 0, 0, 0], 8080))],
            policy: Policy::Rendezvous,
            bounded_load: Some(1.25),
            bounded_load_from: 32,
            hash_ignore_query: MARKETING_PARAMETERS.map(str::to_owned).to_vec(),
            when_all_behind: WhenAllBehind::Bypass,
            bypass_max_requests_per_node: 32,
            max_requests_per_node: None,
            max_queue: MAX_QUEUE,
            queue_timeout: QUEUE_TIMEOUT,
            retry_budget: RETRY_BUDGET,
            trusted_proxies: Vec::new(),
            proxy_protocol: ProxyProtocol::Off,
            http2: true,
            offload_header: None,
            seal: true,
            hosts: Vec::new(),
            blocked: Vec::new(),
            https: EdgeHttps::default(),
            error_pages: EdgeErrorPages::default(),
            maintenance: EdgeMaintenance::default(),
            rate_limit: EdgeRateLimit::default(),
            tls: Vec::new(),
        }
    }
}

impl Edge {
    /// How much nodes get, and what becomes of what they cannot take.
    pub fn request_terms(&self) -> RequestTerms {
        RequestTerms {
            max_per_node: self.max_requests_per_node.map(as_limit),
            max_queue: self.max_queue as usize,
            queue_timeout: self.queue_timeout,
            retry_budget: self.retry_budget,
        }
    }

    /// When a node passes keys on.
    pub fn bounded_load(&self) -> Option<BoundedLoad> {
        self.bounded_load.map(|factor| BoundedLoad { factor, from: self.bounded_load_from })
    }
}

/// Whether a PROXY header is expected (haproxy.org, doc/proxy-protocol.txt).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// From nobody.
    Off,
    /// A peer in `trusted_proxies` must start with a header of version 1 or 2; what any other peer sends is HTTP, so
    /// that no stranger names the address he comes from.
    Accept,
}

/// `[[edge.tls]]`: one certificate and the addresses that it answers on.
///
/// Tables with the same address in `listen` share its socket: the name that the client asks for (SNI, RFC 6066
/// section 3) chooses among their certificates, and the first is for everybody else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsListener {
    /// Where clients connect; at least one, port 0 takes any free port.
    #[serde(deserialize_with = "text::list")]
    pub listen: Vec<SocketAddr>,
    /// A PEM file: the certificate, then those between it and its root. Read when TLS is set up.
    pub cert: PathBuf,
    /// A PEM file: the private key of the certificate. Read when TLS is set up.
    pub key: PathBuf,
    /// The least version of TLS that a client must speak: `1.2` or `1.3`. The same for all tables with an address. Default `1.2`.
    #[serde(default)]
    pub min_version: TlsVersion,
    /// The cipher suites that are used, by their IANA names ([`CIPHER_SUITES`]); among them the client's order decides. The same
    /// for all tables with an address. Default none: all of them.
    #[serde(default)]
    pub ciphers: Vec<String>,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TlsVersion {
    /// RFC 5246.
    #[default]
    #[serde(rename = "1.2")]
    V12,
    /// RFC 8446.
    #[serde(rename = "1.3")]
    V13,
}

/// The cipher suites that there are, by their names in the registry of IANA: what rustls has. Those of TLS 1.3 come first.
pub const CIPHER_SUITES: [&str; 9] = [
    "TLS_AES_256_GCM_SHA384",
    "TLS_AES_128_GCM_SHA256",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];

/// How many of [`CIPHER_SUITES`] are of TLS 1.3.
pub const CIPHER_SUITES_OF_TLS13: usize = 3;

/// What becomes of client requests while every Varnish is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenAllBehind {
    /// They go to the web nodes, as far as `bypass_max_requests_per_node` allows.
    Bypass,
    /// The Varnish that is least behind serves, perhaps an old page.
    Serve,
    /// They are answered 503.
    Refuse,
}

/// `[origin]`: Varnish to the web nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Origin {
    /// Where Varnish finds its backend; port 0 takes any free port. Default `["127.0.0.1:8081"]`.
    #[serde(deserialize_with = "text::list")]
    pub listen: Vec<SocketAddr>,
    /// How a request finds its web node. Default `least_request`.
    pub policy: Policy,
    /// Requests in flight that all Varnish together may put on one web node; 0 (the default) is no limit, and 1000000 the
    /// highest. While every web node that may serve has as many, requests wait. Tunnels and event streams count as long as they last.
    #[serde(with = "zero_is_none")]
    pub max_requests_per_node: Option<NonZeroUsize>,
    /// Requests that may wait for a node with room; one more is answered 503 at once. 0: none waits. At most 1000000, default 1024.
    pub max_queue: u32,
    /// How long a request may wait for a node with room; then it is answered 503. Above 0s, at most 600s, default 5s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub queue_timeout: Duration,
    /// The share of the requests of the last 10 s that may be sent to another node after one may have begun to carry them out. Not
    /// counted is who could not connect, and 100 in 10 s are always allowed. 0 to 1, default 0.2.
    pub retry_budget: f64,
    /// Whether a page that was rendered before a purge of it is marked, so that no Varnish stores it. Default true.
    pub guard: bool,
}

impl Default for Origin {
    fn default() -> Self {
        Origin {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 8081))],
            policy: Policy::LeastRequest,
            max_requests_per_node: None,
            max_queue: MAX_QUEUE,
            queue_timeout: QUEUE_TIMEOUT,
            retry_budget: RETRY_BUDGET,
            guard: true,
        }
    }
}

impl Origin {
    /// How much nodes get, and what becomes of what they cannot take.
    pub fn request_terms(&self) -> RequestTerms {
        RequestTerms {
            max_per_node: self.max_requests_per_node.map(as_limit),
            max_queue: self.max_queue as usize,
            queue_timeout: self.queue_timeout,
            retry_budget: self.retry_budget,
        }
    }
}
