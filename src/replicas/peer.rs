//! Another replica, and the task that brings it to the head of our journal.
//!
//! ```text
//! loop: wait until head > sent; send what was accepted here since; an answer moves `confirmed`
//! ```
//!
//! Several messages may be in flight at once, so that no purge waits for the confirmation of an earlier one; answers count
//! in order. After a failure all unconfirmed purges are sent again. The first answer then proves that the replica is there,
//! and confirms all that it has by then.
//!
//! **Its backlog.** A replica that shares our journal reads there what it was not sent. Any other replica is sent everything
//! after its last confirmed position ([`Marks`](super::marks::Marks)). If the journal no longer holds that, or if the
//! replica has lost its own journal, it is sent one purge of everything.
//!
//! **Answers.** A replica that has a purge also learns if it was refused to its sender, because its own nodes may refuse it,
//! too. Every replica reports this, since the accepting one may be gone when a new one joins. If a node refuses there what
//! was answered here as done, because that replica was late, the replica has not confirmed the purge: it is sent once more,
//! as done.
//!
//! **A missing key does not mean that a replica is gone.** If a replica is cut off from etcd, its lease expires while it
//! still serves readers, and only we can send it purges. So it is sent purges as before, and is asked periodically whether
//! it is there. It is removed if nothing listens at its address, if it was silent for [`KEPT`], or if it has announced its
//! shutdown.

mod caches;
mod content;
mod fetched;
mod overrides;
mod traces;
mod watermarks;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, SemaphorePermit};
use tokio_util::task::AbortOnDropHandle;

use super::call::{PeerClient, PeerError};
use super::message::{Confirmation, FORMAT, Message, RedeliveryRequest, RefusedPurge};
use super::under_way::PeerHolds;
use super::{Record, Replicas};
use crate::awaited::Lateness;
use crate::backoff::Backoff;
use crate::delivery::SeenCaches;
use crate::fleet::{NamedOverride, NodeId};
use crate::journal::{Position, Shared};
use crate::seal::Name;
use crate::telemetry::causes;
use content::{Next, next, patience, refused, refused_last};
pub(super) use fetched::{Fetched, PeerNames};
use traces::ToldTraces;

/// The maximum number of messages in flight. Each waits for the Varnish nodes of the other replica, sometimes a tenth of a
/// second.
const MAX_IN_FLIGHT: usize = 8;

/// Room for the rest of a request, with a margin.
const OVERHEAD: usize = 4 << 10;

/// The bounds of the pauses after failures; each pause is a random share, at least a tenth.
pub(super) const BACKOFF: Backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_secs(2) };

/// The delay of the next attempt after news of a replica.
const AFTER_NEWS: Duration = Duration::from_millis(10);

/// The interval of asking a replica that etcd does not list whether it is there.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// The same interval while our edge waits for purges of that replica.
const ASK_AT_START: Duration = Duration::from_millis(25);

/// How long an unlisted replica that does not answer is kept: as long as a node whose agent is silent.
pub(super) const KEPT: Duration = Duration::from_secs(600);

/// The number of confirmations to keep, for purges that are not answered yet.
const CONFIRMATIONS: usize = 256;

/// Another replica.
pub(super) struct Peer {
    pub(super) id: NodeId,
    pub(super) record: Record,
    client: PeerClient,
    /// It has confirmed all our purges up to here.
    confirmed: AtomicU64,
    /// It is unknown which of them it has, so it first gets a purge of everything.
    has_gap: AtomicBool,
    /// It has said that it has purges for us.
    owes_us: AtomicBool,
    late: Lateness,
    gone: AtomicBool,
    /// Its key is not in etcd, or its address is not in the configuration.
    unlisted: AtomicBool,
    /// Notified when `unlisted` has changed.
    relisted: Notify,
    heard: Mutex<Instant>,
    problem: Mutex<Option<Arc<str>>>,
    /// Each with the purges that it is for: after the first position, up to the second.
    confirmations: Mutex<VecDeque<((Position, Position), Confirmation)>>,
    /// Nodes that are held back here while pages are in flight through that replica.
    pub(super) under_way: PeerHolds,
    /// Whether its purged names are known here.
    pub(super) names: PeerNames,
    /// The serial of our overrides that it has; `None` before the first.
    has_overrides: Mutex<Option<u64>>,
}

/// The progress of a replica at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// It has all our purges up to here.
    After(Position),
    /// Its progress is unknown.
    Gap,
}

impl Peer {
    /// A peer with this progress. `listed`: in etcd, or in the configuration.
    pub(super) fn new(id: NodeId, record: Record, start: Start, listed: bool) -> Self {
        let (confirmed, has_gap) = match start {
            Start::After(position) => (position, false),
            Start::Gap => (0, true),
        };
        Peer {
            id,
            client: PeerClient::to(record.address.clone()),
            record,
            confirmed: AtomicU64::new(confirmed),
            has_gap: AtomicBool::new(has_gap),
            owes_us: AtomicBool::new(false),
            late: Lateness::default(),
            gone: AtomicBool::new(false),
            unlisted: AtomicBool::new(!listed),
            relisted: Notify::new(),
            heard: Mutex::new(Instant::now()),
            problem: Mutex::default(),
            confirmations: Mutex::default(),
            under_way: PeerHolds::default(),
            names: PeerNames::default(),
            has_overrides: Mutex::default(),
        }
    }

    pub(super) fn has(&self, position: Position) -> bool {
        self.confirmed_up_to().is_some_and(|confirmed| confirmed >= position)
    }

    /// The position up to which it has confirmed all our purges; `None` if unknown.
    pub(super) fn confirmed_up_to(&self) -> Option<Position> {
        (!self.has_gap.load(Ordering::SeqCst)).then(|| self.confirmed.load(Ordering::SeqCst))
    }

    /// Its confirmation of the purge at this position; `None` if it was not sent that purge, or long ago.
    pub(super) fn confirmation(&self, position: Position) -> Option<Confirmation> {
        let confirmations = self.confirmations.lock();
        // That of a later message says nothing of it.
        let has_it = |(after, last): (Position, Position)| after < position && position <= last;
        confirmations.iter().find(|(purges, _)| has_it(*purges)).map(|(_, confirmation)| confirmation.clone())
    }

    /// Whether it has said that it has purges for us.
    pub(super) fn owes_us(&self) -> bool {
        self.owes_us.load(Ordering::SeqCst)
    }

    /// Records whether it has purges for us.
    pub(super) fn set_owes_us(&self, owes_us: bool) {
        self.owes_us.store(owes_us, Ordering::SeqCst);
    }

    pub(super) fn is_late(&self) -> bool {
        self.late.is_late()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    pub(super) fn mark_gone(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_unlisted(&self) -> bool {
        self.unlisted.load(Ordering::SeqCst)
    }

    /// Records whether it is in etcd, or in the configuration.
    pub(super) fn set_listed(&self, listed: bool) {
        if self.unlisted.swap(!listed, Ordering::SeqCst) == listed {
            self.relisted.notify_one();
            if listed {
                tracing::info!(replica = %self.id, "a replica is registered again");
            } else {
                tracing::warn!(replica = %self.id, "a replica is not registered any more: it is sent purges as long as it answers");
            }
        }
    }

    /// Whether further attempts are useless.
    fn has_ended(&self, error: &PeerError) -> bool {
        let heard = *self.heard.lock();
        let is_over = self.is_unlisted() && (error.is_refused_connection() || heard.elapsed() > KEPT);
        is_over || matches!(error, PeerError::Restarted | PeerError::Left)
    }

    pub(super) fn problem(&self) -> Option<Arc<str>> {
        let problem = self.problem.lock().clone();
        problem.or_else(|| self.is_unlisted().then(|| "not registered any more".into()))
    }

    /// Purges are answered without it from now on.
    pub(super) fn mark_late(&self, problem: &str) {
        *self.problem.lock() = Some(problem.into());
        if self.late.mark_late() {
            tracing::warn!(
                replica = %self.id, address = self.record.address, problem,
                "a replica does not confirm purges: they are answered without it, and it may serve an old page until it receives them"
            );
        }
    }

    fn mark_on_time(&self) {
        *self.heard.lock() = Instant::now();
        *self.problem.lock() = None;
        if self.late.mark_on_time() {
            tracing::info!(replica = %self.id, "a replica confirms purges again");
        }
    }

    /// Records its `confirmation` of `purges`, after the first position up to the second, by which it has everything up to `position`.
    fn record_confirmation(
        &self,
        purges: (Position, Position),
        position: Position,
        confirmation: Confirmation,
        closes_gap: bool,
    ) {
        self.set_owes_us(confirmation.from.as_ref().is_some_and(|from| from.pending));
        let mut confirmations = self.confirmations.lock();
        if confirmations.len() == CONFIRMATIONS {
            confirmations.pop_front();
        }
        confirmations.push_back((purges, confirmation));
        drop(confirmations);
        self.confirmed.store(position, Ordering::SeqCst);
        if closes_gap {
            self.has_gap.store(false, Ordering::SeqCst);
        }
        self.mark_on_time();
    }

    /// Asks it to deliver purges to nodes once more, and returns its confirmation.
    pub(super) async fn redeliver(
        &self,
        replicas: &Replicas,
        again: Vec<RedeliveryRequest>,
        patience: Duration,
    ) -> Result<Confirmation, PeerError> {
        let message = Message { again, ..self.message(replicas, patience) };
        self.client.post(replicas, &message).await
    }

    /// Asks it for its fill watermarks of these nodes.
    pub(super) async fn ask_watermarks(
        &self,
        replicas: &Replicas,
        asks_about: Vec<NodeId>,
    ) -> Result<Confirmation, PeerError> {
        // The awaited positions belong to this process's journal.
        let to = Some(self.under_way.boot());
        let message = Message { to, asks_about, ..self.message(replicas, Duration::ZERO) };
        self.client.post(replicas, &message).await
    }

    /// Tells it of tags that no seal shows. Returns once they are durable there.
    pub(super) async fn tell_unsealable(&self, replicas: &Replicas, names: &[Name]) -> Result<Confirmation, PeerError> {
        let (format, unsealable) = (FORMAT, names.to_vec());
        let message = Message { format, unsealable, ..self.message(replicas, Duration::ZERO) };
        self.client.post(replicas, &message).await
    }

    /// Asks it for the purged names that it knows.
    pub(super) async fn ask_names<'r>(
        &self,
        replicas: &'r Replicas,
    ) -> Result<(Bytes, SemaphorePermit<'r>), PeerError> {
        self.client.ask_names(replicas, &self.message(replicas, Duration::ZERO)).await
    }

    /// Asks it for the purges that were sent to it.
    pub(super) async fn ask_purges(
        &self,
        replicas: &Replicas,
        patience: Duration,
    ) -> Result<serde_json::Value, PeerError> {
        self.client.ask_purges(replicas, &self.message(replicas, Duration::ZERO), patience).await
    }

    /// Sends it nothing, for its answer.
    pub(super) async fn greet(&self, replicas: &Replicas) -> Result<Confirmation, PeerError> {
        self.client.post(replicas, &self.message(replicas, Duration::ZERO)).await
    }

    /// Announces our shutdown, with refused purges that it may not know yet.
    pub(super) async fn send_farewell(&self, replicas: &Replicas) -> Result<Confirmation, PeerError> {
        let record = Some(Record { leaving: true, ..replicas.own.clone() });
        let refused = Some(refused_last(replicas));
        let message = Message { record, refused, ..self.message(replicas, Duration::ZERO) };
        self.client.post(replicas, &message).await
    }

    /// Tells it what operators say of nodes, and returns its answer.
    pub(super) async fn tell_overrides(
        &self,
        replicas: &Replicas,
        overrides: Vec<NamedOverride>,
    ) -> Result<Confirmation, PeerError> {
        let message = Message { overrides: Some(overrides), ..self.message(replicas, Duration::ZERO) };
        self.client.post(replicas, &message).await
    }

    /// Tells it what is seen of caches here, and returns its answer.
    pub(super) async fn tell_caches(&self, replicas: &Replicas, seen: SeenCaches) -> Result<Confirmation, PeerError> {
        let message = Message { seen_caches: Some(seen), ..self.message(replicas, Duration::ZERO) };
        self.client.post(replicas, &message).await
    }

    /// Whether it has our overrides with this serial, or later ones.
    pub(super) fn has_overrides(&self, serial: u64) -> bool {
        self.has_overrides.lock().is_some_and(|has| has >= serial)
    }

    /// Records that it has our overrides with this serial.
    pub(super) fn record_overrides(&self, serial: u64) {
        *self.has_overrides.lock() = Some(serial);
    }

    /// A message without purges.
    fn message(&self, replicas: &Replicas, patience: Duration) -> Message {
        // If the journal is shared, any process with this name will do: it reads there what it was not sent.
        let to = (!replicas.has_journal_in_common()).then(|| self.record.boot.clone());
        Message { to, ..replicas.hello(patience) }
    }
}

/// A message in flight.
struct Sent {
    /// Its purges: after the first position, up to the second.
    purges: (Position, Position),
    closes_gap: bool,
    /// Aborted with this value.
    answer: AbortOnDropHandle<Result<Confirmation, PeerError>>,
}

/// Sends a peer everything that is accepted here, and asks it about pages in flight. Returns once the peer is gone, with the
/// reason.
pub(super) async fn run(replicas: Arc<Replicas>, peer: Arc<Peer>) -> PeerError {
    tokio::select! {
        error = deliver(Arc::clone(&replicas), Arc::clone(&peer)) => error,
        never = watermarks::ask(Arc::clone(&replicas), Arc::clone(&peer)) => match never {},
        never = replicas.fetch_names(&peer) => match never {},
        never = overrides::tell(&replicas, &peer) => match never {},
        never = caches::tell(&replicas, &peer) => match never {},
    }
}

async fn deliver(replicas: Arc<Replicas>, peer: Arc<Peer>) -> PeerError {
    let Some(journal) = replicas.context.journal.clone() else { return PeerError::Left };
    let mut woken = replicas.woken();
    let mut failures = 0;
    loop {
        let before = peer.confirmed.load(Ordering::SeqCst);
        let error = send_purges(&replicas, &peer, &*journal).await;
        if peer.has_ended(&error) {
            replicas.remove_peer(&peer);
            return error;
        }
        // If nothing listens there, no reader gets an old page from there; and one that does not answer has had its time.
        peer.mark_late(&causes(&error).to_string());
        replicas.progress.notify();
        // A peer that has confirmed anything since then was there.
        failures = if peer.has(before + 1) { 1_u32 } else { failures.saturating_add(1) };
        tokio::select! {
            () = tokio::time::sleep(BACKOFF.pause(failures, 0.1 + 0.9 * fastrand::f64())) => {}
            // A replica has come or gone.
            _ = woken.changed() => tokio::time::sleep(AFTER_NEWS).await,
        }
        if peer.is_gone() {
            replicas.remove_peer(&peer);
            return PeerError::Left;
        }
    }
}

/// Sends purges until something fails.
async fn send_purges(replicas: &Arc<Replicas>, peer: &Arc<Peer>, journal: &dyn Shared) -> PeerError {
    let mut head = journal.watch();
    let mut woken = replicas.woken();
    // All replicas have one configuration, so the limit there is ours.
    let room = replicas.context.max_request.saturating_sub(OVERHEAD);
    let mut sent = peer.confirmed_up_to();
    let mut in_flight = VecDeque::new();
    let mut refusals = replicas.context.deliveries.watch_refusals();
    let mut next_refused = 0;
    let mut traces = ToldTraces::of(replicas.context.tracer.as_deref());
    // After a failure a message is sent at once, even without a purge, to find out whether the replica is there.
    let mut asks = peer.is_late() || peer.is_unlisted() || peer.owes_us();
    loop {
        while in_flight.len() < MAX_IN_FLIGHT {
            let Next { purges, done, unsealed, bytes, last, closes_gap } = next(replicas, peer, journal, sent, room);
            let left = room.saturating_sub(bytes);
            let refused = refused(replicas, peer, journal, &mut next_refused, left);
            let after = sent.replace(last).unwrap_or(0);
            let traces = traces.next(journal, last);
            if purges.is_empty() && !asks && refused.is_empty() && traces.is_empty() {
                // Purges of other replicas, which send them themselves.
                if in_flight.is_empty() && peer.confirmed.swap(last, Ordering::SeqCst) != last {
                    replicas.progress.notify();
                    // Look again: some of them may have been refused.
                    continue;
                }
                break;
            }
            asks = false;
            let is_any_sealed = replicas.context.deliveries.has_sealed_purges() && unsealed.len() < purges.len();
            let patience = patience(replicas, journal, &purges, is_any_sealed);
            let message =
                Message { purges, done, unsealed, refused: Some(refused), traces, ..peer.message(replicas, patience) };
            let (replicas, peer) = (Arc::clone(replicas), Arc::clone(peer));
            let answer = tokio::spawn(async move { peer.client.post(&replicas, &message).await });
            in_flight.push_back(Sent { purges: (after, last), closes_gap, answer: AbortOnDropHandle::new(answer) });
        }
        let full = in_flight.len() >= MAX_IN_FLIGHT;
        let sent_up_to = sent.unwrap_or(0);
        tokio::select! {
            answered = first(&mut in_flight) => {
                let (purges, closes_gap, confirmation) = match answered {
                    Ok(answered) => answered,
                    Err(error) => return error,
                };
                in_flight.pop_front();
                // Before it counts as confirmed, because the answer to the purge depends on it.
                if !are_in_time(replicas, peer, journal, &confirmation) {
                    return PeerError::TooLate;
                }
                // Skipped purges after the last message are confirmed with it.
                let confirmed = if in_flight.is_empty() { sent_up_to.max(purges.1) } else { purges.1 };
                peer.record_confirmation(purges, confirmed, confirmation, closes_gap);
                replicas.progress.notify();
            }
            moved = head.wait_for(|head| *head > sent_up_to), if !full => if moved.is_err() {
                return PeerError::NoAnswer(Duration::ZERO);
            },
            _ = refusals.changed() => {}
            () = traces.noted(), if !full => {}
            () = asks_again(replicas, peer) => asks = true,
            _ = woken.changed() => {
                if peer.is_gone() {
                    return PeerError::Left;
                }
                // Another process may have taken the place of this one.
                asks = !replicas.has_journal_in_common();
            }
        }
    }
}

/// Records what nodes refuse at the other replica. Returns whether all of it precedes the answers here.
fn are_in_time(replicas: &Replicas, peer: &Peer, journal: &dyn Shared, confirmation: &Confirmation) -> bool {
    let mut in_time = true;
    for RefusedPurge { id, nodes } in &confirmation.refused {
        let Some(position) = journal.place_of(id) else { continue };
        let asked = |reason: &String| format!("{reason}, asked by {}", peer.id).into();
        let refusals = nodes.iter().map(|(node, reason)| (node.clone(), asked(reason))).collect();
        in_time &= replicas.context.deliveries.record_refusal_elsewhere(position, &refusals);
    }
    in_time
}

/// Returns when the replica must be asked whether it is there, and for purges.
async fn asks_again(replicas: &Replicas, peer: &Peer) {
    if peer.owes_us() && !replicas.neighbours.are_caught_up() {
        tokio::time::sleep(ASK_AT_START).await;
    } else if peer.is_unlisted() || !replicas.has_journal_in_common() {
        // A replica that was restarted at once must be met anew, and no etcd reports that.
        tokio::time::sleep(ASK_EVERY).await;
    } else {
        peer.relisted.notified().await;
    }
}

/// The answer to the oldest message in flight.
async fn first(in_flight: &mut VecDeque<Sent>) -> Result<((Position, Position), bool, Confirmation), PeerError> {
    match in_flight.front_mut() {
        Some(sent) => Ok((sent.purges, sent.closes_gap, (&mut sent.answer).await??)),
        None => std::future::pending().await,
    }
}
