//! What all replicas together say of a purge.
//!
//! A replica that has reached a node knows that nothing old passed it on the way there: what passed its own origin before
//! the purge has landed, and what passes after it is marked. One that has *not* reached a node cannot say so, and what it
//! passed on may land after the bans of the others. So its word is taken against theirs: a node that any of them has not
//! reached is told once more by all that have, and counts with them only then ([`crate::delivery::Deliveries::recall`]).
//! Whoever accepted the purge knows what all of them say, and so it is the one who asks for that.
//!
//! If one that has not reached a node says that such a page is still under way there, the node counts with nobody else until
//! that one says that the page has landed, and it was told once more after that ([`super::under_way`]). The purge's answer does
//! not wait for it: the node is behind in it.
//!
//! Without such a page the node is not taken out of the traffic of those that reach it. A replica with a broken link would otherwise take
//! every Varnish out of service everywhere.

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

/// What the others say of a purge.
#[derive(Default)]
pub struct PeerAnswers {
    /// The replicas that have not confirmed it.
    pub unconfirmed: Vec<NodeId>,
    /// The nodes that a replica has not reached, by the name of the replica.
    pub fenced_at: BTreeMap<NodeId, Vec<NodeId>>,
    said: Vec<(Arc<Peer>, Confirmation)>,
}

impl PeerAnswers {
    /// Whether a node has taken the purge from another replica.
    pub fn is_taken(&self) -> bool {
        self.said.iter().any(|(_, said)| !said.applied.is_empty())
    }
}

impl Replicas {
    /// Waits until every replica that could be waited for has confirmed this purge, at most for `timeout`.
    pub async fn confirmed(&self, position: Position, timeout: Duration) -> PeerAnswers {
        let awaited: Vec<Arc<Peer>> = self.sharing().into_iter().filter(|peer| !peer.is_late()).collect();
        let is_settled = |peer: &Arc<Peer>| peer.has(position) || peer.is_late() || peer.is_gone();
        self.progress.wait_for(&awaited, timeout, is_settled, |peer| peer.mark_late(UNCONFIRMED)).await;
        let mut heard = PeerAnswers { unconfirmed: self.unmet(), ..PeerAnswers::default() };
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
        heard: &mut PeerAnswers,
        timeout: Duration,
    ) {
        let here: BTreeSet<&NodeId> = reached.iter().chain(missed).collect();
        // A node that another one does not know of at all is one that it has not reached.
        let missed_by = |said: &Confirmation| -> BTreeSet<NodeId> {
            let applied: BTreeSet<&NodeId> = said.applied.iter().collect();
            here.iter().copied().filter(|id| !applied.contains(id)).chain(&said.fenced).cloned().collect()
        };
        let by_peer: Vec<BTreeSet<NodeId>> = heard.said.iter().map(|(_, said)| missed_by(said)).collect();
        let mut held = BTreeSet::new();
        for ((peer, said), missed) in heard.said.iter().zip(&by_peer) {
            let under_way = missed.iter().filter_map(|node| Some((node, said.awaits_landing(node)?)));
            let is_held =
                |(node, place): &(&NodeId, Position)| self.hold(peer, node, position, &position_at(peer, said, *place));
            held.extend(under_way.filter(is_held).map(|(node, _)| node));
        }
        let is_recalled = |node: &&NodeId| !held.contains(*node) && by_peer.iter().any(|missed| missed.contains(*node));
        // Also those that count as missed here: they may have acknowledged it while an earlier purge keeps them back.
        let recalled: Vec<NodeId> = here.iter().copied().filter(is_recalled).cloned().collect();
        if !recalled.is_empty() {
            self.context.deliveries.recall(position, &recalled);
        }
        let Some(name) = self.name_of(position) else { return };
        let asked = self.to_be_told_again(&name, position, missed, &heard.said, &by_peer);
        let mut answers = JoinSet::new();
        for (peer, again) in asked.into_iter().filter(|(_, again)| !again.is_empty()) {
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

    /// What each of the others is to tell again of the purge of this name, which is at `position` here: `missed` are the
    /// nodes that we have not reached, `by_peer` those that they have not.
    pub(super) fn to_be_told_again(
        &self,
        name: &str,
        position: Position,
        missed: &[NodeId],
        said: &[(Arc<Peer>, Confirmation)],
        by_peer: &[BTreeSet<NodeId>],
    ) -> Vec<(Arc<Peer>, Vec<RedeliveryRequest>)> {
        // To which nodes something is under way at whom.
        let landed = self.context.deliveries.fill_watermarks(missed);
        let own = landed.into_iter().filter(|(_, landed)| *landed < position).map(|(node, _)| node).collect();
        let own = (PeerPosition { replica: self.id.clone(), boot: self.own.boot.clone(), position }, own);
        let of_others = said.iter().zip(by_peer).filter_map(|((peer, said), missed)| {
            let under_way = missed.iter().filter(|node| said.awaits_landing(node).is_some()).cloned().collect();
            Some((position_at(peer, said, said.place?), under_way))
        });
        let under_way: Vec<(PeerPosition, Vec<NodeId>)> = std::iter::once(own).chain(of_others).collect();
        let again = |index: usize, peer: &Peer, said: &Confirmation| {
            // Whether or not it has reached them: it may before the page lands.
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

    /// Holds back what a node acknowledges of the purge at our `position` until another replica says that pages have landed
    /// up to `theirs` in its journal. False if nobody could say so.
    pub(super) fn hold(&self, peer: &Peer, node: &NodeId, position: Position, theirs: &PeerPosition) -> bool {
        peer.under_way.hold(&self.context.deliveries, node, position, theirs)
    }

    /// Has a peer tell nodes of a purge again. Gives what it says then; `None` where it is not known to have done so.
    async fn ask_again(
        self: Arc<Self>,
        peer: Arc<Peer>,
        again: Vec<RedeliveryRequest>,
        timeout: Duration,
    ) -> (NodeId, Option<Confirmation>) {
        // It answers in time, whether or not it has reached the nodes by then: it avoids them until it has.
        let answered = peer.tell_again(&self, again, timeout * 3 / 4);
        let failed = match tokio::time::timeout(timeout, answered).await {
            // Who does not say who it is is of a version that does not know what it was asked.
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

    /// Counts the replicas that have not confirmed a purge that is about to be answered.
    pub fn count_unconfirmed(&self, heard: &PeerAnswers) {
        self.context.metrics.journal.unconfirmed.inc_by(heard.unconfirmed.len() as u64);
    }

    /// Whether there are others, or may be.
    pub fn are_several(&self) -> bool {
        !self.sharing().is_empty() || !self.unmet().is_empty()
    }
}

/// A position of another replica's journal, in the process that has said so: a new one may have come in the place of the one
/// that is known.
fn position_at(peer: &Peer, said: &Confirmation, position: Position) -> PeerPosition {
    let boot = said.from.as_ref().map_or(&peer.record.boot, |from| &from.record.boot).clone();
    PeerPosition { replica: peer.id.clone(), boot, position }
}
