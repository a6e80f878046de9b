//! The nodes of the file that are in no fleet yet: their names have no address.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::fleet::NodeKey;

/// Nodes whose names have not resolved yet, for whoever shows the fleet.
#[derive(Debug, Default)]
pub struct UnresolvedNodes(Mutex<BTreeMap<NodeKey, UnresolvedName>>);

/// A name without an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnresolvedName {
    /// As the file has it, with its port.
    pub name: String,
    /// Why the last look-up failed.
    pub reason: String,
}

impl UnresolvedNodes {
    /// All of them, in the order of role and id.
    pub fn list(&self) -> Vec<(NodeKey, UnresolvedName)> {
        self.0.lock().iter().map(|(identity, unresolved)| (identity.clone(), unresolved.clone())).collect()
    }

    pub(super) fn add(&self, identity: NodeKey, name: String, reason: String) {
        self.0.lock().insert(identity, UnresolvedName { name, reason });
    }

    pub(super) fn retain(&self, is_unresolved: impl Fn(&NodeKey) -> bool) {
        self.0.lock().retain(|identity, _| is_unresolved(identity));
    }
}
