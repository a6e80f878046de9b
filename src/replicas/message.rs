//! What replicas say to each other, as JSON over their purge listeners.
//!
//! What is not known of a message is passed over, so that a later version may say more. What must not be passed over has
//! another format number, and is refused by whoever does not know it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Record;
use crate::fleet::NodeId;
use crate::journal::{Position, PurgeMessage};

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
    pub purges: Vec<PurgeMessage>,
    /// Purges that were told before, and that a replica could not tell some nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub again: Vec<RedeliveryRequest>,
    /// Nodes of which it is to be said up to where pages have landed there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub asks_about: Vec<NodeId>,
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
pub struct RedeliveryRequest {
    /// Its name.
    pub id: String,
    /// The nodes.
    pub nodes: Vec<NodeId>,
    /// Not before such a page has landed there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub under_way_at: Option<PeerPosition>,
}

/// A place in the journal of one process of a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerPosition {
    /// The name of the replica.
    pub replica: NodeId,
    /// The process (its `boot`).
    pub boot: String,
    /// The position there.
    pub position: Position,
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
    /// Where the last of these purges stands in the journal here. `None`: there was none, or this version does not say
    /// what is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Position>,
    /// Up to where in the journal here pages have landed, at nodes that do not have it and at those that were asked about.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub landed: BTreeMap<NodeId, Position>,
    /// Of all of these purges those that nodes do not take here. Whoever accepted them says whether that came in time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedPurge>,
    /// Who answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Introduction>,
}

impl Confirmation {
    /// Up to where pages have to land first at a node that does not have these purges, in the journal of whoever answers.
    /// `None`: they have, as far as that is said.
    pub(super) fn awaits_landing(&self, node: &NodeId) -> Option<Position> {
        // One of which it says nothing is not known there, but pages pass to whoever asks for them.
        self.place.filter(|place| self.landed.get(node).is_none_or(|landed| landed < place))
    }
}

/// A purge that nodes do not take though they take others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedPurge {
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
        assert_eq!((answer.applied.len(), &answer.from, answer.refused.len()), (1, &None, 0));
        // It does not say what is under way there: nothing is waited for.
        assert_eq!(answer.awaits_landing(&NodeId::try_from("w").unwrap()), None);
    }

    #[test]
    fn pages_have_landed_where_that_is_said_up_to_the_purge() {
        let said: Confirmation =
            serde_json::from_str(r#"{"fenced":["v","w"],"place":7,"landed":{"v":6,"w":7}}"#).unwrap();
        let awaited = |node: &str| said.awaits_landing(&NodeId::try_from(node).unwrap());
        assert_eq!((awaited("v"), awaited("w"), awaited("unknown")), (Some(7), None, Some(7)));
    }
}
