//! What the registry and the checkers tell the fleet keeper.

use super::{NodeId, NodeSpec, Role};

/// A change of the fleet, as its single writer hears it.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node is there, or its spec changed.
    Joined(NodeSpec),
    /// A node is gone for good.
    Left(Role, NodeId),
    /// A health check of a node came to a result.
    Checked(Role, NodeId, Verdict),
}

/// The result of one health check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The node does its work.
    Passed,
    /// It does not; the text says what was seen, for the operator.
    Failed(String),
}
