//! Messages of other replicas: introductions, accepted purges, and redeliveries.
//!
//! A purge is confirmed once it is durable here, the guard knows it and the fence has risen to it. Nothing else in a message
//! affects what is promised.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{Confirmation, FORMAT, Introduction, Message, PeerPosition, RedeliveryRequest, RefusedPurge};
use super::peer::Peer;
use super::telling::Telling;
use super::{GAP, Record, Replicas};
use crate::delivery::Acknowledged;
use crate::fleet::NodeId;
use crate::journal::{Position, Shared, WriteError};
use crate::mutants::Mutant;

/// The maximum number of refusing nodes to name for a purge. One is enough to refuse it, and a confirmation of a thousand
/// purges must fit into an answer.
const MOST_REFUSING: usize = 2;

/// The outcome of a message.
pub enum Received {
    /// It was applied here.
    Confirmed(Box<Confirmation>),
    /// It could not be stored, and nothing is confirmed.
    Failed(WriteError),
    /// The sender's purges do not concern this replica, or cannot be understood, and why.
    Refused(String),
    /// It is for another process.
    Misdirected,
}

impl Replicas {
    /// Applies a message, and waits until every Varnish has its purges or is avoided.
    pub async fn receive(&self, message: Message) -> Received {
        if message.format > FORMAT {
            let format = message.format;
            return Received::Refused(format!(
                "this message is of format {format}, and {FORMAT} is known here: update it"
            ));
        }
        if message.to.as_ref().is_some_and(|boot| *boot != self.own.boot) {
            return Received::Misdirected;
        }
        if let Some(record) = &message.record {
            if message.from == self.id {
                // This replica itself, by an address of a list, or another one with our name.
                if record.boot != self.own.boot {
                    self.twins.record_contact(record, self.holds_name_against(record));
                }
                return Received::Confirmed(self.confirmation(&message, None, Acknowledged::default()).into());
            }
            self.note(&message.from, record);
        }
        let Some(journal) = self.context.journal.as_deref() else { return Received::Refused(NO_JOURNAL.to_owned()) };
        if let Some(record) = message.record.as_ref().filter(|record| !self.goes_with(record)) {
            return Received::Refused(format!(
                "its journal is in {}, and ours in {}",
                record.journal, self.own.journal
            ));
        }
        self.hear(message.reached);
        let overrides = message.overrides.clone().and_then(|theirs| {
            self.hear_overrides(Some(theirs));
            self.overrides_to_tell()
        });
        let seen_caches = message.seen_caches.clone().map(|seen| self.hear_seen_caches(&message, seen));
        if !message.unsealable.is_empty() && !self.context.deliveries.note_unsealable(&message.unsealable).await {
            return Received::Refused("the tags of its block could not be made durable".to_owned());
        }
        let patience = Duration::from_millis(message.wait_ms).min(self.context.ack_timeout);
        if message.purges.iter().any(|purge| purge.id.starts_with(GAP) && journal.place_of(&purge.id).is_none()) {
            self.context.metrics.journal.replica_gaps.inc();
            tracing::warn!(
                replica = %message.from,
                "a replica does not know which of its purges are missing here: every Varnish drops its pages"
            );
        }
        if Mutant::EarlyConfirmation.lives() {
            return Received::Confirmed(self.confirmation(&message, None, Acknowledged::default()).into());
        }
        let telling = Telling::begin(self.context.tracer.as_deref(), &message);
        let position = match self.store_purges(journal, &message).await {
            Ok(position) => position,
            Err(error) => return Received::Failed(error),
        };
        self.note_answers(journal, &message);
        let outcome = match position {
            Some(position) => {
                let unsealed = message.unsealed.iter().filter_map(|id| journal.place_of(id));
                unsealed.for_each(|position| self.context.deliveries.unseal(position));
                let (expected, began) = (self.context.deliveries.expect(), Instant::now());
                self.context.deliveries.await_unsealed(position, patience).await;
                expected.acknowledge(position, patience.saturating_sub(began.elapsed()), true).await
            }
            None => Acknowledged::default(),
        };
        if let Some(telling) = telling {
            telling.end(journal, &message);
        }
        // After the wait: later refusals come too late.
        let refused = self.refused(journal, &message);
        let (deliveries, seals) = (&self.context.deliveries, self.context.deliveries.has_sealed_purges());
        let is_unsealed = |id: &&String| journal.place_of(id).is_none_or(|position| !deliveries.is_sealed(position));
        let received = message.purges.iter().map(|purge| &purge.id).filter(|_| seals);
        let unsealed = received.filter(is_unsealed).cloned().collect();
        let confirmation = self.confirmation(&message, position, outcome);
        let confirmation = Confirmation { refused, seals, unsealed, overrides, seen_caches, ..confirmation };
        Received::Confirmed(confirmation.into())
    }

    /// Those purges of a message that nodes refuse here.
    fn refused(&self, journal: &dyn Shared, message: &Message) -> Vec<RefusedPurge> {
        let received = message.purges.iter().filter_map(|purge| Some((&purge.id, journal.place_of(&purge.id)?)));
        let nodes = |position| {
            let refusals = self.context.deliveries.confirm(position);
            let named = refusals.into_iter().take(MOST_REFUSING);
            named.map(|(node, reason)| (node, reason.to_string())).collect()
        };
        let confirmed = received.map(|(id, position)| RefusedPurge { id: id.clone(), nodes: nodes(position) });
        confirmed.filter(|refused| !refused.nodes.is_empty()).collect()
    }

    /// Records the answers to purges that a message reports.
    fn note_answers(&self, journal: &dyn Shared, message: &Message) {
        let deliveries = &self.context.deliveries;
        message.done.iter().filter_map(|id| journal.place_of(id)).for_each(|position| deliveries.record_done(position));
        match &message.refused {
            Some(refused) => {
                let refused = refused.iter().filter_map(|id| journal.place_of(id)).collect();
                deliveries.record_refused(refused);
            }
            None => {
                let received = message.purges.iter().filter_map(|purge| journal.place_of(&purge.id));
                deliveries.record_older_version(received);
            }
        }
    }

    /// Makes the purges of a message durable, and starts its redeliveries. Returns the highest position of any of them.
    async fn store_purges(&self, journal: &dyn Shared, message: &Message) -> Result<Option<Position>, WriteError> {
        let mut position = None;
        if !message.purges.is_empty() {
            // Before they are durable: even if the disk stalls, no page may pass that others have purged.
            let new = message.purges.iter().filter(|purge| journal.place_of(&purge.id).is_none());
            self.context.deliveries.guard_against(new.map(|message| &message.purge));
            position = Some(journal.admit(message.purges.clone()).await?);
            self.context.deliveries.note_requests();
            tracing::debug!(from = %message.from, position, "received purges");
        }
        for RedeliveryRequest { id, nodes, under_way_at } in &message.again {
            // If a purge is no longer held, nodes that missed it see a gap.
            let Some(place) = journal.place_of(id) else { continue };
            let through = under_way_at.as_ref().and_then(|there| Some((self.peer_at(there)?, there)));
            for node in nodes {
                let is_held = through
                    .as_ref()
                    .is_some_and(|(peer, theirs)| peer.under_way.hold(&self.context.deliveries, node, place, theirs));
                if !is_held {
                    self.context.deliveries.recall(place, std::slice::from_ref(node));
                }
            }
            position = position.max(Some(place));
        }
        Ok(position)
    }

    /// The peer with this name. Whether it is still the same process turns out when it is asked.
    fn peer_at(&self, there: &PeerPosition) -> Option<Arc<Peer>> {
        self.sharing().into_iter().find(|peer| peer.id == there.replica)
    }

    fn confirmation(&self, message: &Message, place: Option<Position>, outcome: Acknowledged) -> Confirmation {
        let pending = !self.has_journal_in_common() && self.owes(message);
        let reached = self.reached();
        let from = Introduction {
            id: self.id.clone(),
            record: self.own.clone(),
            fresh: self.fresh,
            pending,
            reached,
            up_ms: Some(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)),
            serves: self.serves(),
        };
        let Acknowledged { applied, pending, fenced, .. } = outcome;
        let asked = fenced.iter().chain(&pending).chain(&message.asks_about);
        let landed = self.context.deliveries.fill_watermarks(asked);
        Confirmation { applied, fenced, place, landed, from: Some(from), ..Confirmation::default() }
    }

    /// Whether there are purges that the sender of this message has yet to be sent.
    fn owes(&self, message: &Message) -> bool {
        let (Some(journal), Some(record)) = (&self.context.journal, &message.record) else { return false };
        let peer = self.peers.lock().get(&message.from).cloned();
        peer.filter(|peer| peer.record.boot == record.boot).is_none_or(|peer| !peer.has(journal.head()))
    }

    /// Records the sender's record.
    pub(super) fn note(&self, id: &NodeId, record: &Record) {
        let known = self.peers.lock().get(id).cloned();
        match known.filter(|peer| peer.record.boot == record.boot) {
            Some(peer) if record.leaving && !self.has_journal_in_common() => {
                peer.mark_gone();
                self.ring.send_replace(());
                self.progress.notify();
            }
            Some(_) => {}
            None if record.leaving => {}
            None => {
                // If the queue is full, the replica is found otherwise, or introduces itself again.
                _ = self.strangers.try_send((id.clone(), record.clone()));
                self.ring.send_replace(());
            }
        }
    }
}

/// The refusal of purges by a single replica.
const NO_JOURNAL: &str =
    "this clearcoat has a journal of its own: its journal.kind is not etcd, and its replica.peers is empty";
