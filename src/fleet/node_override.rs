//! What an operator says of one node while clearcoat runs. Which of several counts: [`super::Overrides`].

use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

/// What an operator says of a node. The default says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeOverride {
    /// When it was drained, in milliseconds since 1970 by the clock of the clearcoat that was told, for people; `None` if it
    /// is not drained.
    #[serde(default, rename = "drained_at", skip_serializing_if = "Option::is_none")]
    pub drained_at_ms: Option<u64>,
    /// Its weight in place of the registered one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<NonZeroU16>,
}

/// A change of an override. What is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OverrideChange {
    /// Whether the node is drained.
    pub drains: Option<bool>,
    /// The weight; `Some(None)` is the registered one.
    pub weight: Option<Option<NonZeroU16>>,
}

impl NodeOverride {
    /// Whether it says anything.
    pub fn is_spent(&self) -> bool {
        *self == NodeOverride::default()
    }

    /// The weight of a node with this registered weight, once it is not drained by an operator.
    pub fn weight_over(&self, registered: u32) -> u32 {
        match self.weight {
            Some(weight) if registered > 0 => weight.get().into(),
            _ => registered,
        }
    }

    /// This override after a change. A node that is drained once more was drained at its first time.
    pub fn changed(self, change: OverrideChange, now_ms: u64) -> Self {
        NodeOverride {
            drained_at_ms: match change.drains {
                Some(true) => self.drained_at_ms.or(Some(now_ms)),
                Some(false) => None,
                None => self.drained_at_ms,
            },
            weight: change.weight.unwrap_or(self.weight),
        }
    }
}
