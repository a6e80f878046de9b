//! Events from the registries and health checks to the fleet keeper.

use std::time::{Duration, Instant};

use super::{NodeFault, NodeId, NodeSource, NodeSpec, Role};

/// A change of the fleet, as received by its single writer.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node is present, or its spec changed.
    Joined(NodeSpec),
    /// A node is gone for good: somebody said so.
    Left(NodeSource, Role, NodeId),
    /// A node is gone without a word: its lease ran out, or its name has another address. It may be as well as ever, and
    /// whoever should have said that it is may be the one that is ill.
    Vanished(NodeSource, Role, NodeId),
    /// This source has told of every node that it knew at the start.
    Listed(NodeSource),
    /// A health check of a node came to a result.
    Checked(CheckResult),
}

/// One health check.
#[derive(Clone, Debug)]
pub struct CheckResult {
    /// The role of the node.
    pub role: Role,
    /// Its id.
    pub id: NodeId,
    /// What was checked ([`super::Node::endpoint_id`]).
    pub endpoint_id: u64,
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
    /// The node does not work.
    Failed(NodeFault),
    /// Unknown: the check could not be carried out here, for this reason.
    NotAsked(String),
}

impl Verdict {
    /// Whether the node works; `None` if that is unknown.
    pub fn passed(&self) -> Option<bool> {
        match self {
            Verdict::Passed => Some(true),
            Verdict::Failed(_) => Some(false),
            Verdict::NotAsked(_) => None,
        }
    }
}
