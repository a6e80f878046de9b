//! How a request finds its node.

use serde::{Deserialize, Serialize};

/// The way a listener chooses among the nodes that may serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The same URL always goes to the same node, so that each page is cached once in the fleet.
    Rendezvous,
    /// Each node in turn.
    RoundRobin,
    /// The node with the fewest requests in flight for its weight.
    LeastRequest,
    /// Any node, by chance.
    Random,
}
