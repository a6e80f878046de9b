//! Events from the registries and health checks to the fleet keeper.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{NodeId, NodeSpec, Role};

/// The source of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The configuration file. It takes precedence over other sources for a node of the same name.
    #[default]
    Static,
    /// etcd.
    Etcd,
    /// DNS.
    Dns,
}

/// A change of the fleet, as received by its single writer.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node is present, or its spec changed.
    Joined(NodeSpec),
    /// A node was removed explicitly.
    Left(Source, Role, NodeId),
    /// A node is missing without a removal: its lease expired, or its name has another address. The node may be
    /// healthy, and its registration at fault.
    Vanished(Source, Role, NodeId),
    /// This source has reported every node that it knew at the start.
    Listed(Source),
    /// The result of a health check.
    Checked(Check),
}

/// One health check.
#[derive(Clone, Debug)]
pub struct Check {
    /// The role of the node.
    pub role: Role,
    /// Its id.
    pub id: NodeId,
    /// The address checked.
    pub address: SocketAddr,
    /// When the request was sent.
    pub began: Instant,
    /// The time until its answer.
    pub took: Duration,
    /// The result.
    pub verdict: Verdict,
}

/// The result of one health check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The node works.
    Passed,
    /// The node does not work; the reason is for the operator.
    Failed(String),
    /// Unknown: the check could not be carried out here, for this reason.
    NotAsked(String),
}
