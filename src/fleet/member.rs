//! A node as one snapshot has it.

use std::sync::Arc;

use super::{Ejection, FaultKind, Health, Node, NodeFault};

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

impl Member {
    /// Whether a failed check leaves no doubt that it cannot answer: nothing is there, or its source has lost it as well.
    pub fn is_gone(&self) -> bool {
        let nothing_there = |fault: &NodeFault| matches!(fault.kind, FaultKind::NotListening | FaultKind::Unreachable);
        self.health == Health::Down && (self.retained || self.fault.as_ref().is_some_and(nothing_there))
    }
}
