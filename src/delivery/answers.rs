//! The answers to purges that a node may refuse, as learnt from nodes and from other replicas.
//!
//! The decisions are made in [`requests`](super::requests). This module carries out their consequences: it marks refused
//! purges in the journal, notifies other replicas, and redelivers purges that a node passed over although their senders were
//! told that they are done.

use std::sync::Arc;

use tokio::sync::watch;

use super::refusal::{Owed, Refused};
use super::requests::Consequence;
use super::{Deliveries, Refusals};
use crate::fleet::{FILL_LATENCY, NodeId};
use crate::journal::{Missed, Position};
use crate::telemetry::causes;

impl Deliveries {
    /// Notes the refusable purges that the journal has received since the last call. Call it before any decision about a
    /// purge: another replica may have accepted it, and a purge known only to the journal would count as unknown.
    pub fn note_requests(&self) {
        let journal = &self.context.journal;
        let mut requests = self.requests.lock();
        let floor = journal.floor();
        if let Missed::Entries(entries) = journal.since(requests.looked_up_to().max(floor)) {
            requests.note_all(&entries, floor);
        }
    }

    /// Whether the range after the first position, up to the second, has purges that a flush may not cover.
    pub(super) fn requests_lie_in(&self, (after, last): (Position, Position)) -> bool {
        let uncovered = self.context.journal.uncovered();
        (after < uncovered && uncovered <= last) || self.requests.lock().lie_in((after, last))
    }

    /// Records that a node refuses a request although it accepts others. The log names the sender, who has to change it.
    /// Returns what the node owes to senders that were answered already.
    pub(super) fn record_refusal(self: &Arc<Self>, node: &NodeId, refused: Refused, reason: &Arc<str>) -> Owed {
        // The node's answer may arrive before the purge was noted here.
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
        tracing::warn!(%node, position, sender, %reason, "{what}: this node refuses it, but accepts others");
        if is_news {
            self.refusals.send_replace(());
        }
        self.mark_in_background(taken_by_nobody);
        owed
    }

    /// Marks these purges as refused in the journal. If the mark is lost, the next process assumes that they were answered
    /// as done.
    pub(super) async fn mark_refused(&self, positions: Vec<Position>) {
        if positions.is_empty() {
            return;
        }
        if let Err(error) = self.context.journal.refuse(positions).await {
            tracing::warn!(
                error = %causes(&error),
                "the mark of a refused purge could not be written: after a restart a node that refuses it drops its pages"
            );
        }
    }

    /// Marks them in the background.
    fn mark_in_background(self: &Arc<Self>, positions: Vec<Position>) {
        if !positions.is_empty() {
            let this = Arc::clone(self);
            tokio::spawn(async move { this.mark_refused(positions).await });
        }
    }

    /// The nodes that refuse the purge at this position, for the confirmation to the replica that accepted it. If there are
    /// none, a refusal after this call comes too late.
    pub fn confirm(&self, position: Position) -> Refusals {
        self.note_requests();
        self.requests.lock().confirm(position)
    }

    /// Records that nodes refuse one of our purges at another replica. Returns whether this precedes our answer.
    pub fn record_refusal_elsewhere(&self, position: Position, refusals: &Refusals) -> bool {
        // The other replica may be faster than the handler that accepted the purge.
        self.note_requests();
        let taken = self.requests.lock().record_refusal_elsewhere(position, refusals);
        if taken == Some(true) {
            self.refusals.send_replace(());
        }
        taken.is_some()
    }

    /// Records that another replica refused these purges to their senders. The mark is written in the background, because a
    /// lost mark breaks no promise.
    pub fn record_refused(self: &Arc<Self>, mut positions: Vec<Position>) {
        // The purges may have arrived in the journal only a moment ago.
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
        // Nodes may have been kept out because of them.
        self.nodes.iter().for_each(|delivery| delivery.state.wake.notify_one());
        self.mark_in_background(positions);
    }

    /// Records that the replica that accepted this purge has answered it as done.
    pub fn record_done(&self, position: Position) {
        self.note_requests();
        let nodes = self.requests.lock().record_done(position);
        self.redeliver(nodes.into_iter().map(|node| (position, node)));
    }

    /// Records that these purges come from a version that never reports its answers.
    pub fn record_older_version(self: &Arc<Self>, positions: impl Iterator<Item = Position>) {
        self.note_requests();
        let fleet = self.context.fleet.load();
        let fleet: Vec<&NodeId> = fleet.varnish.members().iter().map(|member| member.node.id()).collect();
        let mut requests = self.requests.lock();
        let taken_by_nobody = positions.filter(|position| requests.record_older_version(*position, &fleet)).collect();
        drop(requests);
        self.mark_in_background(taken_by_nobody);
    }

    /// Treats purges up to this position as done if no answer was reported.
    pub(super) fn expire_open(&self, last: Position) {
        self.note_requests();
        let refused = self.requests.lock().expire_open(last);
        self.redeliver(refused.into_iter());
    }

    /// Redelivers purges to nodes that passed them over, before the nodes count as current.
    fn redeliver(&self, refused: impl Iterator<Item = (Position, NodeId)>) {
        for (position, id) in refused {
            if let Some(delivery) = self.nodes.get(&id) {
                tracing::warn!(node = %id, position, "a purge that this node passed over was answered as done: it is sent again");
                delivery.state.recalls.push(position, FILL_LATENCY);
            }
        }
    }

    /// Whether a node may refuse this purge although its sender was told, or may have been told, that it is done.
    pub fn is_done(&self, position: Position) -> bool {
        self.requests.lock().is_done(position)
    }

    /// At most `most` of the purges that were refused to their senders, numbered, from `number` on. Includes those of other
    /// replicas, because a new replica may ask any of them.
    pub fn refused_from(&self, number: u64, most: usize) -> Vec<(u64, Position)> {
        self.requests.lock().refused_from(number, most)
    }

    /// The newest refused purges, at most `most`.
    pub fn newest_refused(&self, most: usize) -> Vec<Position> {
        self.requests.lock().newest_refused(most)
    }

    /// Notified when a purge is refused.
    pub fn watch_refusals(&self) -> watch::Receiver<()> {
        self.refusals.subscribe()
    }
}
