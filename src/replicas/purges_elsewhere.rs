//! What was purged at the other clearcoats: each remembers the purges that were sent to it, and gives them when it is asked.
//!
//! Nothing is told in advance and nothing is kept here: who looks at the purges of the fleet is rare, and a report is as large
//! as all purges of a second. So they are asked all at once, and who does not answer in time is named.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;

use super::Replicas;
use super::peer::Peer;
use crate::fleet::NodeId;
use crate::telemetry::causes;

/// The maximum wait for the report of another replica.
const PATIENCE: Duration = Duration::from_secs(2);

/// What another replica says of the purges that were sent to it.
#[derive(Debug)]
pub struct ReplicaReport {
    /// Its name.
    pub id: NodeId,
    /// Its report, as its admin listener shows it.
    pub report: serde_json::Value,
}

/// A replica whose report is not there.
#[derive(Debug, Serialize)]
pub struct SilentReplica {
    /// Its name, or its address if it was never met.
    pub id: NodeId,
    /// Why.
    pub problem: String,
}

impl Replicas {
    /// The name of this replica.
    pub fn id(&self) -> &NodeId {
        &self.id
    }

    /// Asks all others for their purges, in the order of their names; and those that have not answered.
    pub async fn ask_purges(self: &Arc<Self>) -> (Vec<ReplicaReport>, Vec<SilentReplica>) {
        let peers: Vec<Arc<Peer>> = self.peers.lock().values().cloned().collect();
        let mut asked = JoinSet::new();
        for peer in peers {
            let this = Arc::clone(self);
            asked.spawn(async move {
                let report = peer.ask_purges(&this, PATIENCE).await;
                report
                    .map(|report| ReplicaReport { id: peer.id.clone(), report })
                    .map_err(|error| SilentReplica { id: peer.id.clone(), problem: causes(&error).to_string() })
            });
        }
        let (mut reports, mut silent) = (Vec::new(), Vec::new());
        for answer in asked.join_all().await {
            match answer {
                Ok(report) => reports.push(report),
                Err(replica) => silent.push(replica),
            }
        }
        let unmet = self.unmet().into_iter().map(|id| SilentReplica { id, problem: "never met".to_owned() });
        silent.extend(unmet);
        reports.sort_by(|a, b| a.id.cmp(&b.id));
        silent.sort_by(|a, b| a.id.cmp(&b.id));
        (reports, silent)
    }
}
