//! `[registry]` and `[[node]]`: where nodes come from.

use serde::{Deserialize, Serialize};

use crate::fleet::{Delivery, NodeId, Role, SendProxy};

/// `[registry]`: where nodes are learnt from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// Default `static`.
    pub kind: RegistryKind,
}

/// A source of nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegistryKind {
    /// The `[[node]]` tables alone.
    #[default]
    Static,
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
}

fn one() -> u32 {
    1
}
