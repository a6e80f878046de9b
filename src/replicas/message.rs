//! The messages between replicas, as JSON over their purge listeners.
//!
//! Unknown fields of a message are ignored, so that a later version can say more. A change that must not be ignored gets
//! another format number, and replicas that do not know it refuse the message.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Record;
use crate::delivery::SeenCaches;
use crate::fleet::{NamedOverride, NodeId};
use crate::journal::{Position, PurgeMessage};
use crate::seal::{Name, Stamp};

/// The format of messages. A message without a number has format 1.
pub(super) const FORMAT: u32 = 2;

/// The format of a message that says nothing of blocks.
pub(super) const WITHOUT_BLOCKS: u32 = 1;

/// A message to another replica, with all purges since the last one.
#[derive(Debug, Serialize, Deserialize)]
pub struct Message {
    /// The format number.
    #[serde(default = "first")]
    pub format: u32,
    /// The sender.
    pub from: NodeId,
    /// The sender's record.
    #[serde(default)]
    pub record: Option<Record>,
    /// The sender's journal was created by this process.
    #[serde(default)]
    pub fresh: bool,
    /// The process that is addressed (its `boot`), unless any will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// The maximum delay of the answer in milliseconds.
    pub wait_ms: u64,
    /// The purges.
    pub purges: Vec<PurgeMessage>,
    /// Purges to deliver again, because a replica has not reached some nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub again: Vec<RedeliveryRequest>,
    /// Nodes whose fill watermarks are requested.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub asks_about: Vec<NodeId>,
    /// The names of those purges that wait for every Varnish at the sender.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unsealed: Vec<String>,
    /// What the sender's journal has reached, if the sender seals answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached: Option<Stamp>,
    /// The tags of blocks that no seal shows. Since format 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unsealable: Vec<Name>,
    /// The names of those purges that were already answered as done: a refusal by a node comes too late.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub done: Vec<String>,
    /// The names of purges that the receiver has and that were refused to their senders, by any replica. `None`: the
    /// sender's version never reports answers.
    #[serde(default)]
    pub refused: Option<Vec<String>>,
    /// What operators say of nodes, as far as the sender knows. `None`: this message is not about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overrides: Option<Vec<NamedOverride>>,
    /// What the sender sees of caches. `None`: this message is not about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_caches: Option<SeenCaches>,
    /// The traces of purges that the sender has told, in this message or an earlier one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub traces: Vec<PurgeTrace>,
}

/// Which trace a purge belongs to.
#[derive(Debug, Serialize, Deserialize)]
pub struct PurgeTrace {
    /// The name of the purge.
    pub id: String,
    /// Its span at the sender, as W3C Trace Context has it. What cannot be read is ignored, as in a request.
    pub traceparent: String,
}

/// A purge to deliver to nodes once more, because a page that passed another replica may be in flight to them.
#[derive(Debug, Serialize, Deserialize)]
pub struct RedeliveryRequest {
    /// The name of the purge.
    pub id: String,
    /// The nodes.
    pub nodes: Vec<NodeId>,
    /// Wait until the page has arrived, according to this replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub under_way_at: Option<PeerPosition>,
}

/// A position in the journal of one process of a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerPosition {
    /// The name of the replica.
    pub replica: NodeId,
    /// The `boot` of the process.
    pub boot: String,
    /// The position there.
    pub position: Position,
}

/// The answer: the outcome of the last of these purges here.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Confirmation {
    /// The nodes that have it.
    #[serde(default)]
    pub applied: Vec<NodeId>,
    /// The nodes that do not have it, and are avoided here.
    #[serde(default)]
    pub fenced: Vec<NodeId>,
    /// The position of the last purge in the journal here. `None`: the message had no purge, or this version does not report
    /// pages in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Position>,
    /// The fill watermarks here of the nodes in `fenced` and of those asked about.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub landed: BTreeMap<NodeId, Position>,
    /// Those of these purges that nodes refuse here. The accepting replica knows whether this is in time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedPurge>,
    /// Seals show purges of tags to this replica, so that they wait for no Varnish.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub seals: bool,
    /// The names of those of these purges that wait for every Varnish here all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unsealed: Vec<String>,
    /// What operators say of nodes, as far as the receiver knows now. `None`: the message said nothing of that, or this
    /// version knows nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overrides: Option<Vec<NamedOverride>>,
    /// The serial of what counts here of that which the receiver sees of caches: 0 before it was met. `None`: the message said
    /// nothing of that, or this version knows nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_caches: Option<u64>,
    /// The sender of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Introduction>,
}

impl Confirmation {
    /// The position in the answering replica's journal that the node's fill watermark has to reach. `None`: it has, as far
    /// as is known.
    pub(super) fn awaits_landing(&self, node: &NodeId) -> Option<Position> {
        // A node without a watermark is unknown there, but may receive pages through that replica all the same.
        self.place.filter(|place| self.landed.get(node).is_none_or(|landed| landed < place))
    }
}

/// A purge that nodes refuse although they accept others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedPurge {
    /// Its name.
    pub id: String,
    /// The nodes, with their reasons.
    pub nodes: BTreeMap<NodeId, String>,
}

/// The identity of a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Its name.
    pub id: NodeId,
    /// Its record.
    pub record: Record,
    /// Its journal was created by this process.
    #[serde(default)]
    pub fresh: bool,
    /// It has purges that it has yet to send to the receiver.
    #[serde(default)]
    pub pending: bool,
    /// What its journal has reached, if it seals answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached: Option<Stamp>,
    /// For how long it has been running, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up_ms: Option<u64>,
    /// Its origin is open, caches ask it, and it is not about to end. An older version does not say so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub serves: bool,
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
        assert_eq!((message.done.len(), message.refused, message.traces.len()), (0, None, 0));
        let later = r#"{"format":3,"from":"b","wait_ms":1,"purges":[],"and":{"more":1}}"#;
        assert_eq!(serde_json::from_str::<Message>(later).unwrap().format, 3);
        let answer: Confirmation = serde_json::from_str(r#"{"applied":["v"],"fenced":[],"more":1}"#).unwrap();
        assert_eq!((answer.applied.len(), &answer.from, answer.refused.len()), (1, &None, 0));
        // It does not report pages in flight, so none is awaited.
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
