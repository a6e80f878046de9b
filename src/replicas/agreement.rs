//! What all replicas together say of a purge.
//!
//! A replica that has reached a node knows that nothing old passed it on the way there: what passed its own origin before
//! the purge has landed, and what passes after it is marked. One that has *not* reached a node cannot say so, and what it
//! passed on may land after the bans of the others. So its word is taken against theirs: a node that any of them has not
//! reached is told once more by all that have, and counts with them only then ([`crate::delivery::Deliveries::recall`]).
//! Whoever accepted the purge knows what all of them say, and so it is the one who asks for that.
//!
//! The node is not taken out of the traffic of those that reach it. A replica with a broken link would otherwise take
//! every Varnish out of service everywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::message::{Again, Confirmation};
use super::peer::Peer;
use super::{Position, Replicas};
use crate::fleet::NodeId;
use crate::telemetry::causes;

/// What the others say of a purge.
#[derive(Default)]
pub struct Heard {
    /// The replicas that have not confirmed it.
    pub unconfirmed: Vec<NodeId>,
    /// The nodes that a replica has not reached, by the name of the replica.
    pub fenced_at: BTreeMap<NodeId, Vec<NodeId>>,
    said: Vec<(Arc<Peer>, Confirmation)>,
}

impl Replicas {
    /// Waits until every replica that could be waited for has confirmed this purge, at most for `timeout`.
    pub async fn confirmed(&self, position: Position, timeout: Duration) -> Heard {
        let awaited: Vec<Arc<Peer>> = self.sharing().into_iter().filter(|peer| !peer.is_late()).collect();
        let all_have_it = async {
            let mut progress = self.progress.subscribe();
            while awaited.iter().any(|peer| !peer.has(position) && !peer.is_late() && !peer.is_gone()) {
                if progress.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(timeout, all_have_it).await.is_err() {
            awaited
                .iter()
                .filter(|peer| !peer.has(position))
                .for_each(|peer| peer.is_late_now("it has not confirmed a purge in time"));
            // Those who wait for the same one need not.
            self.progress.send_replace(());
        }
        let mut heard = Heard { unconfirmed: self.unmet(), ..Heard::default() };
        for peer in self.sharing() {
            if !peer.has(position) {
                heard.unconfirmed.push(peer.id.clone());
                continue;
            }
            let said = peer.confirmation(position).unwrap_or_default();
            if !said.fenced.is_empty() {
                heard.fenced_at.insert(peer.id.clone(), said.fenced.clone());
            }
            heard.said.push((peer, said));
        }
        heard
    }

    /// Has every node told once more of this purge by those who have reached it, where another one has not; `reached` and
    /// `missed` are the nodes here. Waits for the others, at most for `timeout`; those who do not answer are added to the
    /// unconfirmed ones.
    pub async fn agree(
        self: &Arc<Self>,
        position: Position,
        (reached, missed): (&[NodeId], &[NodeId]),
        heard: &mut Heard,
        timeout: Duration,
    ) {
        let here: BTreeSet<&NodeId> = reached.iter().chain(missed).collect();
        // A node that another one does not know of at all is one that it has not reached.
        let missed_by = |said: &Confirmation| -> BTreeSet<NodeId> {
            let applied: BTreeSet<&NodeId> = said.applied.iter().collect();
            here.iter().copied().filter(|id| !applied.contains(id)).chain(&said.fenced).cloned().collect()
        };
        let by_peer: Vec<BTreeSet<NodeId>> = heard.said.iter().map(|(_, said)| missed_by(said)).collect();
        let recalled: Vec<NodeId> =
            reached.iter().filter(|id| by_peer.iter().any(|missed| missed.contains(*id))).cloned().collect();
        if !recalled.is_empty() {
            self.context.deliveries.recall(position, &recalled);
        }
        let Some(name) = self.name_of(position) else { return };
        let asked = heard.said.iter().enumerate().filter_map(|(index, (peer, said))| {
            let elsewhere = by_peer.iter().enumerate().filter(|(other, _)| *other != index).flat_map(|(_, ids)| ids);
            let doubtful: BTreeSet<&NodeId> = elsewhere.chain(missed).collect();
            let nodes: Vec<NodeId> = said.applied.iter().filter(|id| doubtful.contains(id)).cloned().collect();
            (!nodes.is_empty()).then(|| (Arc::clone(peer), Again { id: name.clone(), nodes }))
        });
        let mut answers = JoinSet::new();
        for (peer, again) in asked {
            answers.spawn(Arc::clone(self).ask_again(peer, again, timeout));
        }
        while let Some(answer) = answers.join_next().await {
            match answer {
                Ok((id, Some(said))) if !said.fenced.is_empty() => _ = heard.fenced_at.insert(id, said.fenced),
                Ok((_, Some(_))) => {}
                Ok((id, None)) => heard.unconfirmed.push(id),
                Err(error) => tracing::error!(%error, "asking a replica to tell a purge again failed"),
            }
        }
    }

    /// Has a peer tell nodes of a purge again. Gives what it says then; `None` where it is not known to have done so.
    async fn ask_again(
        self: Arc<Self>,
        peer: Arc<Peer>,
        again: Again,
        timeout: Duration,
    ) -> (NodeId, Option<Confirmation>) {
        // It answers in time, whether or not it has reached the nodes by then: it avoids them until it has.
        let answered = peer.tell_again(&self, vec![again], timeout * 3 / 4);
        let failed = match tokio::time::timeout(timeout, answered).await {
            // Who does not say who it is is of a version that does not know what it was asked.
            Ok(Ok(said)) => return (peer.id.clone(), said.from.is_some().then_some(said)),
            Ok(Err(error)) => causes(&error).to_string(),
            Err(_) => "it has not confirmed a purge in time".to_owned(),
        };
        peer.is_late_now(&failed);
        (peer.id.clone(), None)
    }

    /// The name of the purge at this position.
    fn name_of(&self, position: Position) -> Option<String> {
        self.context.journal.as_ref()?.name_of(position).map(|name| name.to_string())
    }

    /// Counts the replicas that have not confirmed a purge that is about to be answered.
    pub fn count_unconfirmed(&self, heard: &Heard) {
        self.context.metrics.journal.unconfirmed.inc_by(heard.unconfirmed.len() as u64);
    }

    /// Whether there are others, or may be.
    pub fn are_several(&self) -> bool {
        !self.sharing().is_empty() || !self.unmet().is_empty()
    }
}
