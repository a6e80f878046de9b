//! `[registry]`, `[replica]` and `[[node]]`: where nodes come from, and who this clearcoat is among several.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{headers, text};
use crate::fleet::{Delivery, NodeId, PurgeHeaders, Role, SendProxy};

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
}

impl Default for Registry {
    fn default() -> Self {
        Registry {
            kind: RegistryKind::default(),
            retain: Duration::from_secs(600),
            etcd: Etcd::default(),
            dns: Dns::default(),
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
    /// The user, where etcd wants one. Default: none.
    pub username: String,
    /// A file with the user's password, read again with each connection.
    pub password_file: PathBuf,
    /// A file with the certificates in PEM that sign those of etcd; wanted for `https`.
    pub ca: PathBuf,
    /// A file with our own certificate in PEM, where etcd wants one.
    pub cert: PathBuf,
    /// Its private key in PEM.
    pub key: PathBuf,
}

impl Default for Etcd {
    fn default() -> Self {
        Etcd {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            prefix: "/clearcoat/v1/".to_owned(),
            username: String::new(),
            password_file: PathBuf::new(),
            ca: PathBuf::new(),
            cert: PathBuf::new(),
            key: PathBuf::new(),
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
    /// `HOST:PORT` at which the others reach its purge listener. Default: the local address of its connection to etcd,
    /// with the first port of `purge.listen`.
    pub address: String,
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
}

/// `[[node]]`: one node that is always there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticNode {
    /// What it does: `web` or `varnish`.
    pub role: Role,
    /// Its stable name, unique within its role.
    pub id: NodeId,
    /// `HOST:PORT`, the host an address or a name. Kept as text: a name is resolved when it is used.
    pub address: String,
    /// Its share of the traffic next to its peers, 0 (no new traffic) to 65535. Default 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// How a Varnish is told to drop pages, default `magento`; always set for a Varnish, never for a web node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delivery: Option<Delivery>,
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
    #[serde(default, deserialize_with = "headers::table", skip_serializing_if = "PurgeHeaders::is_empty")]
    pub headers: PurgeHeaders,
}

fn one() -> u32 {
    1
}
