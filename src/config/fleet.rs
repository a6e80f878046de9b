//! `[registry]`, `[replica]` and `[[node]]`: where nodes come from, and who this clearcoat is among several.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::kubernetes::Kubernetes;
use super::node::is_host_port;
use super::optional::empty_is_none;
use super::{headers, text};
use crate::fleet::{
    DEFAULT_HEADER_LIMIT, NodeId, NodeSpec, PurgeDialect, Role, SecretHeaders, SendProxy, VarnishSettings,
};

/// `[registry]`: where nodes are learnt from, beside the `[[node]]` tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// Default `static`.
    pub kind: RegistryKind,
    /// How long a node that is gone without a word is kept while its health check passes, 0s to 24h. Default 10m.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub retain: Duration,
    /// Where etcd is, for the registry and for the journal.
    pub etcd: Etcd,
    /// Which names are asked for.
    pub dns: Dns,
    /// Which services are followed.
    pub kubernetes: Kubernetes,
}

impl Default for Registry {
    fn default() -> Self {
        Registry {
            kind: RegistryKind::default(),
            retain: Duration::from_secs(600),
            etcd: Etcd::default(),
            dns: Dns::default(),
            kubernetes: Kubernetes::default(),
        }
    }
}

/// `[registry.etcd]`: where etcd is and how to get in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Etcd {
    /// The client URLs of its members, all `http` or all `https`. Default `["http://127.0.0.1:2379"]`.
    pub endpoints: Vec<String>,
    /// What every key of this fleet starts with; ends in `/`, so that no other prefix can start with it. Default
    /// `/clearcoat/v1/`.
    pub prefix: String,
    /// The user, if etcd wants one. Default: none.
    #[serde(with = "empty_is_none")]
    pub username: Option<String>,
    /// A file with the user's password, read again with each connection.
    #[serde(with = "empty_is_none")]
    pub password_file: Option<PathBuf>,
    /// A file with the certificates in PEM that sign those of etcd; wanted for `https`.
    #[serde(with = "empty_is_none")]
    pub ca: Option<PathBuf>,
    /// A file with our own certificate in PEM, if etcd wants one.
    #[serde(with = "empty_is_none")]
    pub cert: Option<PathBuf>,
    /// Its private key in PEM.
    #[serde(with = "empty_is_none")]
    pub key: Option<PathBuf>,
}

impl Default for Etcd {
    fn default() -> Self {
        Etcd {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            prefix: "/clearcoat/v1/".to_owned(),
            username: None,
            password_file: None,
            ca: None,
            cert: None,
            key: None,
        }
    }
}

/// `[registry.dns]`: the names whose addresses are the nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dns {
    /// Names of web nodes: `NAME:PORT`, whose A and AAAA records are asked for, or `_SERVICE._PROTO.NAME`, whose SRV
    /// records are.
    pub web: Vec<String>,
    /// The same for Varnish nodes.
    pub varnish: Vec<String>,
    /// Name servers, ADDRESS:PORT. Default: those of the system.
    #[serde(deserialize_with = "text::list")]
    pub servers: Vec<SocketAddr>,
}

/// `[replica]`: who this clearcoat is among several before one fleet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Replica {
    /// Its stable name, unique among them. Default: the host's name.
    pub id: Option<NodeId>,
    /// `HOST:PORT` at which the others reach its purge listener. Default: the local address of its connection to etcd, or
    /// to the first of `peers`, with the first port of `purge.listen`.
    #[serde(with = "empty_is_none")]
    pub address: Option<String>,
    /// The zone in which it stands, as its nodes name theirs: where no hash decides, those of the same zone come first.
    /// Default: none, all nodes are alike.
    #[serde(with = "empty_is_none")]
    pub zone: Option<String>,
    /// The purge listeners of the others, if they have no journal in etcd. This replica itself may be among
    /// them. Default: none.
    #[serde(deserialize_with = "text::list", serialize_with = "text::write_list")]
    pub peers: Vec<PeerAddress>,
}

/// Where other replicas are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerAddress {
    /// `HOST:PORT`: one of them.
    One(String),
    /// `dns+http://NAME:PORT`: one at each address that the name has.
    All(String),
}

impl PeerAddress {
    /// The `HOST:PORT`.
    pub fn host_port(&self) -> &str {
        let (PeerAddress::One(host_port) | PeerAddress::All(host_port)) = self;
        host_port
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerAddress::One(address) => f.write_str(address),
            PeerAddress::All(name) => write!(f, "{DNS_SCHEME}{name}"),
        }
    }
}

const DNS_SCHEME: &str = "dns+http://";

impl text::FromText for PeerAddress {
    const WANTED: &'static str = "HOST:PORT of a purge listener such as 192.0.2.3:6081, or dns+http://NAME:PORT for all \
                                  addresses of a name such as dns+http://clearcoat-headless:6081";

    fn from_text(text: &str) -> Option<Self> {
        match text.strip_prefix(DNS_SCHEME) {
            Some(name) => {
                let name = name.trim_end_matches('/');
                is_host_port(name).then(|| PeerAddress::All(name.to_owned()))
            }
            None => is_host_port(text).then(|| PeerAddress::One(text.to_owned())),
        }
    }
}

/// A source of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegistryKind {
    /// The `[[node]]` tables alone.
    #[default]
    Static,
    /// The keys under `nodes/` of `registry.etcd.prefix`.
    Etcd,
    /// The addresses of the names in `[registry.dns]`.
    Dns,
    /// The pods of the services in `[registry.kubernetes]`.
    Kubernetes,
}

/// `[[node]]`: one node that is always there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticNode {
    /// Its role: `web` or `varnish`.
    pub role: Role,
    /// Its stable name, unique within its role.
    pub id: NodeId,
    /// `HOST:PORT`, the host an address or a name. Kept as text: a name is resolved when it is used.
    pub address: String,
    /// Its share of the traffic next to its peers, 0 (no new traffic) to 65535. Default 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// The zone in which it stands. Default: none.
    #[serde(default, with = "empty_is_none", skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// The dialect of purges to a Varnish, default `magento`; always set for a Varnish, never for a web node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delivery: Option<PurgeDialect>,
    /// The longest value of one request header that this Varnish takes, in bytes: 512 to 65536, default 7680; always set
    /// for a Varnish, never for a web node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header_limit: Option<usize>,
    /// Whether connections to this Varnish start with a PROXY header. Default `off`; never anything else for a web
    /// node.
    #[serde(default)]
    pub send_proxy: SendProxy,
    /// Header fields that every purge and every health check to this Varnish carries, over `purge.headers`; none for a web
    /// node.
    #[serde(default, deserialize_with = "headers::table", skip_serializing_if = "SecretHeaders::is_empty")]
    pub headers: SecretHeaders,
    /// `HOST:PORT` of the management port of this Varnish (`-T`), which `clearcoat doctor` asks, and
    /// at which a VCL is pushed. Default: its host, with
    /// `health.varnish.management_port`; none for a web node.
    #[serde(default, with = "empty_is_none", skip_serializing_if = "Option::is_none")]
    pub management: Option<String>,
    /// The file with the secret of that port (`-S`). Default: `health.varnish.management_secret_file`; none for a web node.
    #[serde(default, with = "empty_is_none", skip_serializing_if = "Option::is_none")]
    pub management_secret_file: Option<PathBuf>,
}

impl StaticNode {
    /// The node at this address, which is its own or one that its name has.
    pub fn spec(&self, address: SocketAddr) -> NodeSpec {
        let StaticNode { role, id, weight, zone, delivery, header_limit, send_proxy, headers, .. } = self.clone();
        let settings = || VarnishSettings {
            delivery: delivery.unwrap_or_default(),
            header_limit: header_limit.unwrap_or(DEFAULT_HEADER_LIMIT),
            send_proxy,
            epoch: None,
            headers,
        };
        let varnish = (role == Role::Varnish).then(settings);
        NodeSpec { weight, zone: zone.map(Arc::from), varnish, ..NodeSpec::new(role, id, address) }
    }
}

fn one() -> u32 {
    1
}
