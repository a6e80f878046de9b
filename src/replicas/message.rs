//! What replicas say to each other, as JSON over their purge listeners.
//!
//! What is not known of a message is passed over, so that a later version may say more. What must not be passed over has
//! another format number, and is refused by whoever does not know it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Record;
use crate::fleet::NodeId;
use crate::journal::Told;

/// The format of messages. Those that have no number are of the first one.
pub(super) const FORMAT: u32 = 1;

/// What is told to another replica: all purges since the last time.
#[derive(Debug, Serialize, Deserialize)]
pub struct Message {
    /// What a reader must know to understand it.
    #[serde(default = "first")]
    pub format: u32,
    /// Who tells.
    pub from: NodeId,
    /// What it says of itself.
    #[serde(default)]
    pub record: Option<Record>,
    /// Its journal was begun by this very process.
    #[serde(default)]
    pub fresh: bool,
    /// The process that is meant (its `boot`), where not any will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// How long the answer may take, in milliseconds.
    pub wait_ms: u64,
    /// The purges.
    pub purges: Vec<Told>,
    /// Purges that were told before, and that a replica could not tell some nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub again: Vec<Again>,
    /// The names of those purges that were answered as done by now: a node that does not take them comes too late.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub done: Vec<String>,
    /// The names of purges that the other one has, and that were refused to their senders, whoever accepted them. `None`: of
    /// a version that never says.
    #[serde(default)]
    pub refused: Option<Vec<String>>,
}

/// A purge of which nodes are to be told once more: a page that passed another replica may be on its way to them.
#[derive(Debug, Serialize, Deserialize)]
pub struct Again {
    /// Its name.
    pub id: String,
    /// The nodes.
    pub nodes: Vec<NodeId>,
}

/// The answer: what became of the last of these purges here.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Confirmation {
    /// The nodes that have it.
    #[serde(default)]
    pub applied: Vec<NodeId>,
    /// The nodes that have not, and are avoided here.
    #[serde(default)]
    pub fenced: Vec<NodeId>,
    /// Of all of these purges those that nodes do not take here. Whoever accepted them says whether that came in time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<Refused>,
    /// Who answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Introduction>,
}

/// A purge that nodes do not take though they take others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Its name.
    pub id: String,
    /// The nodes, and what each of them said.
    pub nodes: BTreeMap<NodeId, String>,
}

/// Who a replica is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Its name.
    pub id: NodeId,
    /// What it says of itself.
    pub record: Record,
    /// Its journal was begun by this very process.
    #[serde(default)]
    pub fresh: bool,
    /// It has purges that it has yet to tell whoever asked.
    #[serde(default)]
    pub pending: bool,
}

fn first() -> u32 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_an_older_version_and_one_of_a_later_one_are_read() {
        let older = r#"{"from":"b","wait_ms":750,"purges":[]}"#;
        let message: Message = serde_json::from_str(older).unwrap();
        assert_eq!((message.format, message.to, message.fresh), (1, None, false));
        assert_eq!((message.done.len(), message.refused), (0, None));
        let later = r#"{"format":2,"from":"b","wait_ms":1,"purges":[],"and":{"more":1}}"#;
        assert_eq!(serde_json::from_str::<Message>(later).unwrap().format, 2);
        let answer: Confirmation = serde_json::from_str(r#"{"applied":["v"],"fenced":[],"more":1}"#).unwrap();
        assert_eq!((answer.applied.len(), answer.from, answer.refused.len()), (1, None, 0));
    }
}
