//! How purges were answered that a node may refuse, as it is learnt from nodes and from other replicas.
//!
//! What is decided, and why, stands in [`requests`](super::requests); here is what has to happen then: a purge is marked in
//! the journal, other replicas hear of it, and nodes that have passed over what was answered as done are told of it again.

use std::sync::Arc;

use tokio::sync::watch;

use super::refusal::{Owed, Refused};
use super::requests::Consequence;
use super::{Deliveries, Refusals};
use crate::fleet::{FILL_LATENCY, NodeId};
use crate::journal::{Missed, Position};
use crate::telemetry::causes;

impl Deliveries {
    /// Takes note of what the journal has brought since this was last done, and a node may refuse for itself. To be done
    /// before anything is decided about a purge: others may have accepted it, and whoever knows of it by the journal alone
    /// would take it for unknown.
    pub fn note_requests(&self) {
        let journal = &self.context.journal;
        let mut requests = self.requests.lock();
        let floor = journal.floor();
        if let Missed::Entries(entries) = journal.since(requests.looked_up_to().max(floor)) {
            requests.note_all(&entries, floor);
        }
    }

    /// Whether purges that a flush may not cover lie after the first position, up to the second.
    pub(super) fn requests_lie_in(&self, (after, last): (Position, Position)) -> bool {
        let uncovered = self.context.journal.uncovered();
        (after < uncovered && uncovered <= last) || self.requests.lock().lie_in((after, last))
    }

    /// A node does not take a request though it takes others: said with its sender, for it is that one's to change, and
    /// kept for whoever waits for it. Gives what is owed to those who do not any more.
    pub(super) fn record_refusal(self: &Arc<Self>, node: &NodeId, refused: Refused, reason: &Arc<str>) -> Owed {
        // A node may be faster than whoever brought it.
        self.note_requests();
        let fleet = self.context.fleet.load();
        let fleet: Vec<&NodeId> = fleet.varnish.members().iter().map(|member| member.node.id()).collect();
        let (consequence, newest) = {
            let mut requests = self.requests.lock();
            let consequence = requests.record_refusal(node, refused, reason, self.context.fence.position(), &fleet);
            (consequence, requests.newest(refused.fingerprint))
        };
        let Consequence { owed, is_news, taken_by_nobody } = consequence;
        let (position, sender) = newest.map_or((None, None), |(position, sender)| (Some(position), sender));
        let sender = sender.map_or("not known here".to_owned(), |sender| sender.to_string());
        let what = match owed {
            Owed::Nothing => "a purge is passed over",
            Owed::Flush | Owed::FlushOfAll => "a purge that was answered before is carried out as one of everything",
        };
        tracing::warn!(%node, position, sender, %reason, "{what}: this node does not take it, though it takes others");
        if is_news {
            self.refusals.send_replace(());
        }
        self.mark_behind(taken_by_nobody);
        owed
    }

    /// Notes in the journal that these were refused to their senders. Where that cannot be written, the next process believes
    /// that they were answered as done.
    pub(super) async fn mark_refused(&self, positions: Vec<Position>) {
        if positions.is_empty() {
            return;
        }
        if let Err(error) = self.context.journal.refuse(positions).await {
            tracing::warn!(
                error = %causes(&error),
                "that a purge was refused could not be written down: after a restart a node that does not take it drops its pages"
            );
        }
    }

    /// The same, and nobody waits for it.
    fn mark_behind(self: &Arc<Self>, positions: Vec<Position>) {
        if !positions.is_empty() {
            let this = Arc::clone(self);
            tokio::spawn(async move { this.mark_refused(positions).await });
        }
    }

    /// The purge at this position is about to be confirmed to the replica that accepted it: which nodes do not take it here.
    /// Without any, none may refuse it from now on.
    pub fn confirm(&self, position: Position) -> Refusals {
        self.note_requests();
        self.requests.lock().confirm(position)
    }

    /// Nodes do not take a purge of ours at another replica. Says whether that comes before its answer.
    pub fn record_refusal_elsewhere(&self, position: Position, refusals: &Refusals) -> bool {
        // The other one may be faster than whoever accepted it.
        self.note_requests();
        let taken = self.requests.lock().record_refusal_elsewhere(position, refusals);
        if taken == Some(true) {
            self.refusals.send_replace(());
        }
        taken.is_some()
    }

    /// Another replica says that these were refused to their senders. Nothing waits until that is durable here: a mark that is
    /// lost breaks no promise.
    pub fn record_refused(self: &Arc<Self>, mut positions: Vec<Position>) {
        // The journal may have brought them a moment ago.
        self.note_requests();
        {
            let mut requests = self.requests.lock();
            positions.retain(|position| requests.record_refused(*position));
        }
        if positions.is_empty() {
            return;
        }
        tracing::info!(?positions, "purges of other replicas were refused to their senders");
        self.refusals.send_replace(());
        // Nodes that were kept out for them need not be.
        self.nodes.iter().for_each(|delivery| delivery.state.wake.notify_one());
        self.mark_behind(positions);
    }

    /// Whoever accepted this says that it was answered as done.
    pub fn record_done(&self, position: Position) {
        self.note_requests();
        let nodes = self.requests.lock().record_done(position);
        self.tell_again(nodes.into_iter().map(|node| (position, node)));
    }

    /// Whoever accepted these never says how they were answered.
    pub fn record_older_version(self: &Arc<Self>, positions: impl Iterator<Item = Position>) {
        self.note_requests();
        let fleet = self.context.fleet.load();
        let fleet: Vec<&NodeId> = fleet.varnish.members().iter().map(|member| member.node.id()).collect();
        let mut requests = self.requests.lock();
        let taken_by_nobody = positions.filter(|position| requests.record_older_version(*position, &fleet)).collect();
        drop(requests);
        self.mark_behind(taken_by_nobody);
    }

    /// What nobody has said of, up to this position, counts as done.
    pub(super) fn expire_open(&self, last: Position) {
        self.note_requests();
        let refused = self.requests.lock().expire_open(last);
        self.tell_again(refused.into_iter());
    }

    /// These nodes have passed over what was answered as done: they do not count until they were told again.
    fn tell_again(&self, refused: impl Iterator<Item = (Position, NodeId)>) {
        for (position, id) in refused {
            if let Some(delivery) = self.nodes.get(&id) {
                tracing::warn!(node = %id, position, "a purge that it passed over was answered as done: it is told again");
                delivery.state.recalls.push(position, FILL_LATENCY);
            }
        }
    }

    /// Whether the sender of this purge was told that it is done, or may have been, and a node may refuse it.
    pub fn is_done(&self, position: Position) -> bool {
        self.requests.lock().is_done(position)
    }

    /// At most `most` of the purges that were refused to their senders, from the one with this number on, each with its
    /// number. Whoever accepted them: a replica that is new hears of it from any.
    pub fn refused_from(&self, number: u64, most: usize) -> Vec<(u64, Position)> {
        self.requests.lock().refused_from(number, most)
    }

    /// The newest of them, at most so many.
    pub fn newest_refused(&self, most: usize) -> Vec<Position> {
        self.requests.lock().newest_refused(most)
    }

    /// Rings when there are more of them.
    pub fn watch_refusals(&self) -> watch::Receiver<()> {
        self.refusals.subscribe()
    }
}
