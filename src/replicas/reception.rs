//! What another replica tells: who it is, what it has accepted, and what is to be told again.
//!
//! A purge is confirmed when it is durable here, the guard knows it, and the fence has risen to it. Nothing else that a
//! message says changes what is promised.

use std::sync::Arc;
use std::time::Duration;

use super::message::{Confirmation, FORMAT, Introduction, Message, PeerPosition, RedeliveryRequest, RefusedPurge};
use super::peer::Peer;
use super::{GAP, Record, Replicas};
use crate::delivery::Acknowledged;
use crate::fleet::NodeId;
use crate::journal::{Position, Shared, WriteError};

/// So many nodes are named for a purge that they do not take. One is enough for it to be refused, and a confirmation of a
/// thousand purges has to fit into an answer.
const MOST_REFUSING: usize = 2;

/// What became of a message.
pub enum Received {
    /// It holds here: what is said of it.
    Confirmed(Box<Confirmation>),
    /// It could not be taken in, and nothing is confirmed.
    Failed(WriteError),
    /// The sender's purges are none of ours, or cannot be understood: why.
    Refused(String),
    /// It means another process than this.
    Misdirected,
}

impl Replicas {
    /// Takes in what another replica tells of, and waits until it holds here: every Varnish has it, or is avoided.
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
                // Ourselves, by the address of a list; or one that has our name.
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
        let patience = Duration::from_millis(message.wait_ms).min(self.context.ack_timeout);
        if message.purges.iter().any(|told| told.id.starts_with(GAP) && journal.place_of(&told.id).is_none()) {
            self.context.metrics.journal.replica_gaps.inc();
            tracing::warn!(
                replica = %message.from,
                "a replica does not know which of its purges are missing here: every Varnish drops its pages"
            );
        }
        let position = match self.take_in_purges(journal, &message).await {
            Ok(position) => position,
            Err(error) => return Received::Failed(error),
        };
        self.note_answers(journal, &message);
        let outcome = match position {
            Some(position) => self.context.deliveries.expect().acknowledge(position, patience, true).await,
            None => Acknowledged::default(),
        };
        // After the wait: what a node refuses from now on comes too late.
        let refused = self.refused(journal, &message);
        let confirmation = Confirmation { refused, ..self.confirmation(&message, position, outcome) };
        Received::Confirmed(confirmation.into())
    }

    /// The purges of a message that nodes do not take here.
    fn refused(&self, journal: &dyn Shared, message: &Message) -> Vec<RefusedPurge> {
        let told = message.purges.iter().filter_map(|told| Some((&told.id, journal.place_of(&told.id)?)));
        let nodes = |position| {
            let refusals = self.context.deliveries.confirm(position);
            let named = refusals.into_iter().take(MOST_REFUSING);
            named.map(|(node, reason)| (node, reason.to_string())).collect()
        };
        let confirmed = told.map(|(id, position)| RefusedPurge { id: id.clone(), nodes: nodes(position) });
        confirmed.filter(|refused| !refused.nodes.is_empty()).collect()
    }

    /// Takes note of how purges were answered, as far as their teller says so.
    fn note_answers(&self, journal: &dyn Shared, message: &Message) {
        let deliveries = &self.context.deliveries;
        message.done.iter().filter_map(|id| journal.place_of(id)).for_each(|position| deliveries.record_done(position));
        match &message.refused {
            Some(refused) => {
                let refused = refused.iter().filter_map(|id| journal.place_of(id)).collect();
                deliveries.record_refused(refused);
            }
            None => {
                let told = message.purges.iter().filter_map(|told| journal.place_of(&told.id));
                deliveries.record_older_version(told);
            }
        }
    }

    /// Makes the purges of a message durable, and has nodes told again as it says. Gives the last place of any of them.
    async fn take_in_purges(&self, journal: &dyn Shared, message: &Message) -> Result<Option<Position>, WriteError> {
        let mut position = None;
        if !message.purges.is_empty() {
            // Before they are durable: a disk that stalls here is no reason to pass pages on that others have purged.
            let new = message.purges.iter().filter(|told| journal.place_of(&told.id).is_none());
            self.context.deliveries.guard_against(new.map(|told| &told.purge));
            position = Some(journal.admit(message.purges.clone()).await?);
            self.context.deliveries.note_requests();
            tracing::debug!(from = %message.from, position, "told of purges");
        }
        for RedeliveryRequest { id, nodes, under_way_at } in &message.again {
            // What is not held any more is a gap for whoever has not had it.
            let Some(place) = journal.place_of(id) else { continue };
            let through = under_way_at.as_ref().and_then(|there| Some((self.peer_at(there)?, there)));
            for node in nodes {
                let is_held = through.as_ref().is_some_and(|(peer, theirs)| self.hold(peer, node, place, theirs));
                if !is_held {
                    self.context.deliveries.recall(place, std::slice::from_ref(node));
                }
            }
            position = position.max(Some(place));
        }
        Ok(position)
    }

    /// The other replica that is meant. Whether the process is there still that is meant, it says when it is asked.
    fn peer_at(&self, there: &PeerPosition) -> Option<Arc<Peer>> {
        self.sharing().into_iter().find(|peer| peer.id == there.replica)
    }

    fn confirmation(&self, message: &Message, place: Option<Position>, outcome: Acknowledged) -> Confirmation {
        let pending = !self.has_journal_in_common() && self.owes(message);
        let from = Introduction { id: self.id.clone(), record: self.own.clone(), fresh: self.fresh, pending };
        let Acknowledged { applied, fenced, .. } = outcome;
        let landed = self.context.deliveries.fill_watermarks(fenced.iter().chain(&message.asks_about));
        Confirmation { applied, fenced, place, landed, refused: Vec::new(), from: Some(from) }
    }

    /// Whether there is anything that the sender of this message has yet to be told.
    fn owes(&self, message: &Message) -> bool {
        let (Some(journal), Some(record)) = (&self.context.journal, &message.record) else { return false };
        let peer = self.peers().get(&message.from).cloned();
        peer.filter(|peer| peer.record.boot == record.boot).is_none_or(|peer| !peer.has(journal.head()))
    }

    /// Takes note of what another one says of itself.
    fn note(&self, id: &NodeId, record: &Record) {
        let known = self.peers().get(id).cloned();
        match known.filter(|peer| peer.record.boot == record.boot) {
            Some(peer) if record.leaving && !self.has_journal_in_common() => {
                peer.mark_gone();
                self.ring.send_replace(());
                self.progress.notify();
            }
            Some(_) => {}
            None if record.leaving => {}
            None => {
                // Whoever finds no place is found elsewhere, or tells again.
                _ = self.strangers.try_send((id.clone(), record.clone()));
                self.ring.send_replace(());
            }
        }
    }
}

/// The same, to whoever tells of a purge.
const NO_JOURNAL: &str =
    "this clearcoat has a journal of its own: its journal.kind is not etcd, and its replica.peers is empty";
