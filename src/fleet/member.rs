//! A node as one snapshot has it.

use std::sync::Arc;

use super::{Ejection, Health, Node, NodeFault};

/// A node with the keeper's state.
#[derive(Clone, Debug)]
pub struct Member {
    /// The node.
    pub node: Arc<Node>,
    /// Its health when the snapshot was made.
    pub health: Health,
    /// Why it is down; `None` if it is not.
    pub fault: Option<NodeFault>,
    /// Its ejection, if it failed the requests of clients.
    pub ejection: Option<Ejection>,
    /// Whether it is kept though its source no longer names it.
    pub retained: bool,
    /// Whether health and weight allow traffic to it.
    pub usable: bool,
}
