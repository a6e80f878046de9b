//! The agreement of all replicas on a purge.
//!
//! A replica that has reached a node knows that no old page passes it on the way there: pages that passed its origin before
//! the purge have arrived, and later ones are marked. A replica that has *not* reached a node cannot know that, and a page
//! that passed it may arrive after the bans of the others. So its statement overrides theirs: a node that any replica has
//! not reached receives the purge once more from all others, and counts with them only afterwards
//! ([`crate::delivery::Deliveries::recall`]). The accepting replica receives all statements, so it is the one that requests
//! this.
//!
//! If a replica that has not reached a node says that such a page is still in flight there, the node counts with no replica
//! until the page has arrived and the purge was delivered once more ([`super::under_way`]). The answer to the purge does not
//! wait for this: the node counts as behind.
//!
//! Without such a page, the replicas that reach the node keep it in their traffic. Otherwise a replica with a broken link
//! would take every Varnish out of service everywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::message::{Confirmation, PeerPosition, RedeliveryRequest};
use super::peer::Peer;
use super::{Position, Replicas};
use crate::fleet::NodeId;
use crate::telemetry::causes;

/// The problem of a peer that let a purge time out.
const UNCONFIRMED: &str = "it has not confirmed a purge in time";

/// The answers of the other replicas to a purge.
#[derive(Default)]
pub struct PeerAnswers {
    /// The name of the purge, if it is held.
    name: Option<String>,
    /// The replicas that have not confirmed it.
    pub unconfirmed: Vec<NodeId>,
    /// The nodes that a replica has not reached, by the name of that replica.
    pub fenced_at: BTreeMap<NodeId, Vec<NodeId>>,
    said: Vec<(Arc<Peer>, Confirmation)>,
}

impl PeerAnswers {
    /// Whether every replica has confirmed the purge, and waits for no Varnish with it. If one does, or does not answer, the
    /// purge waits here, too: that one may know of a block with its tags.
    pub fn is_sealed_everywhere(&self) -> bool {
        let is_sealed =
            |said: &Confirmation| said.seals && self.name.as_ref().is_some_and(|name| !said.unsealed.contains(name));
        self.unconfirmed.is_empty() && self.said.iter().all(|(_, said)| is_sealed(said))
    }

    /// Whether a node has accepted the purge from another replica.
    pub fn is_taken(&self) -> bool {
        self.said.iter().any(|(_, said)| !said.applied.is_empty())
    }
}

impl Replicas {
    /// Waits for at most `timeout` until every available replica has confirmed this purge.
    pub async fn confirmed(&self, position: Position, timeout: Duration) -> PeerAnswers {
        let awaited: Vec<Arc<Peer>> = self.sharing().into_iter().filter(|peer| !peer.is_late()).collect();
        let is_settled = |peer: &Arc<Peer>| peer.has(position) || peer.is_late() || peer.is_gone();
        self.progress.wait_for(&awaited, timeout, is_settled, |peer| peer.mark_late(UNCONFIRMED)).await;
        let (name, unconfirmed) = (self.name_of(position), self.unmet());
        let mut heard = PeerAnswers { name, unconfirmed, ..PeerAnswers::default() };
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

    /// Has a purge delivered once more to each node that some replica has not reached, by those that have; `reached` and
    /// `missed` are the nodes here. Waits for the other replicas for at most `timeout`, and adds those that do not answer to
    /// the unconfirmed ones.
    pub async fn agree(
        self: &Arc<Self>,
        position: Position,
        (reached, missed): (&[NodeId], &[NodeId]),
        heard: &mut PeerAnswers,
        timeout: Duration,
    ) {
        let here: BTreeSet<&NodeId> = reached.iter().chain(missed).collect();
        // A replica that does not know a node has not reached it.
        let missed_by = |said: &Confirmation| -> BTreeSet<NodeId> {
            let applied: BTreeSet<&NodeId> = said.applied.iter().collect();
            here.iter().copied().filter(|id| !applied.contains(id)).chain(&said.fenced).cloned().collect()
        };
        let by_peer: Vec<BTreeSet<NodeId>> = heard.said.iter().map(|(_, said)| missed_by(said)).collect();
        let mut held = BTreeSet::new();
        for ((peer, said), missed) in heard.said.iter().zip(&by_peer) {
            // Of the others, the answers to readers here show their age.
            let of_here = missed.iter().filter(|node| here.contains(node));
            let under_way = of_here.filter_map(|node| Some((node, said.awaits_landing(node)?)));
            let is_held = |(node, place): &(&NodeId, Position)| {
                peer.under_way.hold(&self.context.deliveries, node, position, &position_at(peer, said, *place))
            };
            held.extend(under_way.filter(is_held).map(|(node, _)| node));
        }
        let is_recalled = |node: &&NodeId| !held.contains(*node) && by_peer.iter().any(|missed| missed.contains(*node));
        // Includes nodes that count as missed here: they may have acknowledged it while an earlier purge keeps them back.
        let recalled: Vec<NodeId> = here.iter().copied().filter(is_recalled).cloned().collect();
        if !recalled.is_empty() {
            self.context.deliveries.recall(position, &recalled);
        }
        let Some(name) = self.name_of(position) else { return };
        let asked = self.redelivery_requests(&name, position, missed, &heard.said, &by_peer);
        let mut answers = JoinSet::new();
        for (peer, again) in asked.into_iter().filter(|(_, again)| !again.is_empty()) {
            answers.spawn(Arc::clone(self).request_redelivery(peer, again, timeout));
        }
        while let Some(answer) = answers.join_next().await {
            match answer {
                Ok((id, Some(said))) if !said.fenced.is_empty() => _ = heard.fenced_at.insert(id, said.fenced),
                Ok((_, Some(_))) => {}
                Ok((id, None)) => heard.unconfirmed.push(id),
                Err(error) => tracing::error!(%error, "asking a replica to deliver a purge again failed"),
            }
        }
    }

    /// The redeliveries to request from each replica, for the purge with this name at our `position`. `missed` are the nodes
    /// that we have not reached, `by_peer` those that each replica has not reached.
    pub(super) fn redelivery_requests(
        &self,
        name: &str,
        position: Position,
        missed: &[NodeId],
        said: &[(Arc<Peer>, Confirmation)],
        by_peer: &[BTreeSet<NodeId>],
    ) -> Vec<(Arc<Peer>, Vec<RedeliveryRequest>)> {
        // The nodes with a page in flight, by the replica that the page passed.
        let landed = self.context.deliveries.fill_watermarks(missed);
        let own = landed.into_iter().filter(|(_, landed)| *landed < position).map(|(node, _)| node).collect();
        let own = (PeerPosition { replica: self.id.clone(), boot: self.own.boot.clone(), position }, own);
        let of_others = said.iter().zip(by_peer).filter_map(|((peer, said), missed)| {
            let under_way = missed.iter().filter(|node| said.awaits_landing(node).is_some()).cloned().collect();
            Some((position_at(peer, said, said.place?), under_way))
        });
        let under_way: Vec<(PeerPosition, Vec<NodeId>)> = std::iter::once(own).chain(of_others).collect();
        let again = |index: usize, peer: &Peer, said: &Confirmation| {
            // Also if the replica has not reached these nodes: it may reach them before the page arrives.
            let elsewhere = under_way.iter().filter(|(place, nodes)| place.replica != peer.id && !nodes.is_empty());
            let mut again: Vec<RedeliveryRequest> = elsewhere
                .map(|(place, nodes)| RedeliveryRequest {
                    id: name.to_owned(),
                    nodes: nodes.clone(),
                    under_way_at: Some(place.clone()),
                })
                .collect();
            let held: BTreeSet<&NodeId> = again.iter().flat_map(|again| &again.nodes).collect();
            let by_others = by_peer.iter().enumerate().filter(|(other, _)| *other != index).flat_map(|(_, ids)| ids);
            let doubtful: BTreeSet<&NodeId> = by_others.chain(missed).filter(|node| !held.contains(node)).collect();
            let nodes: Vec<NodeId> = said.applied.iter().filter(|id| doubtful.contains(id)).cloned().collect();
            if !nodes.is_empty() {
                again.push(RedeliveryRequest { id: name.to_owned(), nodes, under_way_at: None });
            }
            again
        };
        said.iter().enumerate().map(|(index, (peer, said))| (Arc::clone(peer), again(index, peer, said))).collect()
    }

    /// Asks a peer to deliver purges again. Returns its confirmation, or `None` if it is not known to have done so.
    async fn request_redelivery(
        self: Arc<Self>,
        peer: Arc<Peer>,
        again: Vec<RedeliveryRequest>,
        timeout: Duration,
    ) -> (NodeId, Option<Confirmation>) {
        // It answers in time even if it has not reached the nodes by then, because it avoids them until it has.
        let answered = peer.redeliver(&self, again, timeout * 3 / 4);
        let failed = match tokio::time::timeout(timeout, answered).await {
            // A replica that does not introduce itself is of a version that does not understand the request.
            Ok(Ok(said)) => return (peer.id.clone(), said.from.is_some().then_some(said)),
            Ok(Err(error)) => causes(&error).to_string(),
            Err(_) => UNCONFIRMED.to_owned(),
        };
        peer.mark_late(&failed);
        (peer.id.clone(), None)
    }

    /// The name of the purge at this position.
    fn name_of(&self, position: Position) -> Option<String> {
        self.context.journal.as_ref()?.name_of(position).map(|name| name.to_string())
    }

    /// Counts the replicas without a confirmation of a purge that is about to be answered.
    pub fn count_unconfirmed(&self, heard: &PeerAnswers) {
        self.context.metrics.journal.unconfirmed.inc_by(heard.unconfirmed.len() as u64);
    }

    /// Whether there are, or may be, other replicas.
    pub fn are_several(&self) -> bool {
        !self.sharing().is_empty() || !self.unmet().is_empty()
    }
}

/// A position in the journal of another replica, with the process that reported it: a new process may have taken the place
/// of the known one.
fn position_at(peer: &Peer, said: &Confirmation, position: Position) -> PeerPosition {
    let boot = said.from.as_ref().map_or(&peer.record.boot, |from| &from.record.boot).clone();
    PeerPosition { replica: peer.id.clone(), boot, position }
}
