//! Another replica, and the task that brings it up to the head.
//!
//! ```text
//! loop: wait until head > sent; send what was accepted here since; an answer moves `confirmed`
//! ```
//!
//! Several messages may be on their way at once, as a purge must not wait for the confirmation of the one before it; they
//! count in their order. After a failure everything that was not confirmed is sent again, and the first message that
//! comes through says that the other one is there: what it has by then, it has confirmed.
//!
//! **What it may have missed.** One that shares our journal reads there what it was not told. One that does not is told all
//! of it from where it was last ([`Marks`](super::marks::Marks)); where that is not held any more, or where it has lost its
//! own journal, it is told one purge of everything.
//!
//! **How purges were answered.** One that has a purge is told when that was refused to its sender: its nodes may refuse it,
//! too. Everybody tells that, as whoever accepted the purge may be gone when another one comes. If a node refuses there what
//! was answered here as done, because the other one was late, it has not confirmed it; it is told once more, and that it is
//! done.
//!
//! **A key that is gone is no replica that is gone.** The lease of one that is cut off from etcd runs out while it serves
//! its readers, and then it is us or nobody who tells it of purges. So who is not registered any more is told as before,
//! and asked now and then whether it is still there; it is let go of when nobody listens at its address, when nothing was
//! heard of it for [`KEPT`], or when it has said goodbye.

mod content;
mod watermarks;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::call::{PeerClient, PeerError};
use super::message::{Confirmation, Message, RedeliveryRequest, RefusedPurge};
use super::under_way::PeerHolds;
use super::{Record, Replicas};
use crate::awaited::Lateness;
use crate::backoff::Backoff;
use crate::fleet::NodeId;
use crate::journal::{Position, Shared};
use crate::telemetry::causes;
use content::{Next, next, patience, refused, refused_last};

/// Messages on their way at once. Each waits for the other fleet's Varnish nodes, a tenth of a second at times.
const ON_THEIR_WAY: usize = 8;

/// What else is in a request of ours, and more.
const OVERHEAD: usize = 4 << 10;

/// The bound of the pauses after failures; each is a random share of it, a tenth at least.
pub(super) const BACKOFF: Backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_secs(2) };

/// How long after somebody has come or gone a peer that failed is tried again.
const AFTER_NEWS: Duration = Duration::from_millis(10);

/// How often one is asked whether it is there, of which no etcd tells.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// How often one that may have something to tell us is asked while our edge waits for that.
const ASK_AT_START: Duration = Duration::from_millis(25);

/// How long one that is not registered and does not answer is still told: as long as a node whose agent says nothing.
const KEPT: Duration = Duration::from_secs(600);

/// How many confirmations are remembered, for the purges that still wait to be answered.
const CONFIRMATIONS: usize = 256;

/// Another replica.
pub(super) struct Peer {
    pub(super) id: NodeId,
    pub(super) record: Record,
    client: PeerClient,
    /// It has confirmed every purge of ours up to here.
    confirmed: AtomicU64,
    /// Nobody knows what it has of those before: it gets one of everything first.
    has_gap: AtomicBool,
    /// It has said that it has purges to tell us.
    owes_us: AtomicBool,
    late: Lateness,
    gone: AtomicBool,
    /// Its key is not in etcd, or its address not among those of the configuration.
    unlisted: AtomicBool,
    /// Rings when that has changed.
    relisted: Notify,
    heard: Mutex<Instant>,
    problem: Mutex<Option<Arc<str>>>,
    confirmations: Mutex<VecDeque<(Position, Confirmation)>>,
    /// What is held here for as long as pages are under way there.
    pub(super) under_way: PeerHolds,
}

/// Where a replica is to be told from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// It has every purge of ours up to here.
    After(Position),
    /// What it has cannot be known.
    Gap,
}

impl Peer {
    /// One that is told from there on. `listed`: by its key in etcd, or in the configuration.
    pub(super) fn new(id: NodeId, record: Record, start: Start, listed: bool) -> Self {
        let (told, has_gap) = match start {
            Start::After(position) => (position, false),
            Start::Gap => (0, true),
        };
        Peer {
            id,
            client: PeerClient::to(record.address.clone()),
            record,
            confirmed: AtomicU64::new(told),
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
        }
    }

    pub(super) fn has(&self, position: Position) -> bool {
        self.confirmed_up_to().is_some_and(|confirmed| confirmed >= position)
    }

    /// Up to where it has confirmed every purge of ours; `None` while nobody knows what it has.
    pub(super) fn confirmed_up_to(&self) -> Option<Position> {
        (!self.has_gap.load(Ordering::SeqCst)).then(|| self.confirmed.load(Ordering::SeqCst))
    }

    /// What it said of the purge at this position; `None` where it was not told of it, or that was long ago.
    pub(super) fn confirmation(&self, position: Position) -> Option<Confirmation> {
        let confirmations = self.confirmations.lock();
        confirmations.iter().find(|(last, _)| *last >= position).map(|(_, confirmation)| confirmation.clone())
    }

    /// It has purges that it has yet to tell us, as far as it has said.
    pub(super) fn owes_us(&self) -> bool {
        self.owes_us.load(Ordering::SeqCst)
    }

    /// Whether it has purges that it has yet to tell us.
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

    /// Whether it is named where replicas are: in etcd, or in the configuration.
    pub(super) fn set_listed(&self, listed: bool) {
        if self.unlisted.swap(!listed, Ordering::SeqCst) == listed {
            self.relisted.notify_one();
            if listed {
                tracing::info!(replica = %self.id, "a replica is registered again");
            } else {
                tracing::warn!(replica = %self.id, "a replica is not registered any more: it is told of purges as long as it answers");
            }
        }
    }

    /// Whether it is not worth another attempt.
    fn has_ended(&self, error: &PeerError) -> bool {
        let heard = *self.heard.lock();
        let is_over = self.is_unlisted() && (error.is_refused_connection() || heard.elapsed() > KEPT);
        is_over || matches!(error, PeerError::Restarted | PeerError::Left)
    }

    pub(super) fn problem(&self) -> Option<Arc<str>> {
        let problem = self.problem.lock().clone();
        problem.or_else(|| self.is_unlisted().then(|| "not registered any more".into()))
    }

    /// Nobody waits for it any more.
    pub(super) fn mark_late(&self, problem: &str) {
        *self.problem.lock() = Some(problem.into());
        if self.late.mark_late() {
            tracing::warn!(
                replica = %self.id, address = self.record.address, problem,
                "a replica does not confirm purges: they are answered without it, and it may serve an old page until it is told again, or by the journal"
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

    /// It has confirmed everything up to `position`, as it says of the last purge up to `last`.
    fn record_confirmation(&self, last: Position, position: Position, confirmation: Confirmation, gap_is_told: bool) {
        self.set_owes_us(confirmation.from.as_ref().is_some_and(|from| from.pending));
        let mut confirmations = self.confirmations.lock();
        if confirmations.len() == CONFIRMATIONS {
            confirmations.pop_front();
        }
        confirmations.push_back((last, confirmation));
        drop(confirmations);
        self.confirmed.store(position, Ordering::SeqCst);
        if gap_is_told {
            self.has_gap.store(false, Ordering::SeqCst);
        }
        self.mark_on_time();
    }

    /// Has it tell nodes of a purge once more, and gives what it says then.
    pub(super) async fn tell_again(
        &self,
        replicas: &Replicas,
        again: Vec<RedeliveryRequest>,
        patience: Duration,
    ) -> Result<Confirmation, PeerError> {
        let message = Message { again, ..self.message(replicas, patience) };
        self.client.post(replicas, &message).await
    }

    /// Asks it up to where pages have landed at these nodes that passed there.
    pub(super) async fn ask_watermarks(
        &self,
        replicas: &Replicas,
        asks_about: Vec<NodeId>,
    ) -> Result<Confirmation, PeerError> {
        // Positions are those of this process's journal.
        let to = Some(self.under_way.boot());
        let message = Message { to, asks_about, ..self.message(replicas, Duration::ZERO) };
        self.client.post(replicas, &message).await
    }

    /// Tells it that we are about to end, and what was refused to its sender and may not be known there yet.
    pub(super) async fn say_goodbye(&self, replicas: &Replicas) -> Result<Confirmation, PeerError> {
        let record = Some(Record { leaving: true, ..replicas.own.clone() });
        let refused = Some(refused_last(replicas));
        let message = Message { record, refused, ..self.message(replicas, Duration::ZERO) };
        self.client.post(replicas, &message).await
    }

    /// One that tells of nothing.
    fn message(&self, replicas: &Replicas, patience: Duration) -> Message {
        // Who shares our journal may be any process of this name: what it was not told it reads there.
        let to = (!replicas.has_journal_in_common()).then(|| self.record.boot.clone());
        Message { to, ..replicas.hello(patience) }
    }
}

/// A message that is on its way, and what it brings the other one to.
struct Sent {
    last: Position,
    tells_gap: bool,
    /// Ends with this value.
    answer: AbortOnDropHandle<Result<Confirmation, PeerError>>,
}

/// Tells a peer of everything that is accepted here, and asks it about what is held for it, until it is gone: why it is.
pub(super) async fn run(replicas: Arc<Replicas>, peer: Arc<Peer>) -> PeerError {
    tokio::select! {
        error = keep_telling(Arc::clone(&replicas), Arc::clone(&peer)) => error,
        never = watermarks::ask(replicas, peer) => match never {},
    }
}

async fn keep_telling(replicas: Arc<Replicas>, peer: Arc<Peer>) -> PeerError {
    let Some(journal) = replicas.context.journal.clone() else { return PeerError::Left };
    let mut woken = replicas.woken();
    let mut failures = 0;
    loop {
        let before = peer.confirmed.load(Ordering::SeqCst);
        let error = tell(&replicas, &peer, &*journal).await;
        if peer.has_ended(&error) {
            replicas.let_go(&peer);
            return error;
        }
        // Where nobody listens, nobody is served an old page either; and who does not answer has had its time.
        peer.mark_late(&causes(&error).to_string());
        replicas.progress.notify();
        // Whoever has confirmed anything since was there.
        failures = if peer.has(before + 1) { 1_u32 } else { failures.saturating_add(1) };
        tokio::select! {
            () = tokio::time::sleep(BACKOFF.pause(failures, 0.1 + 0.9 * fastrand::f64())) => {}
            // Somebody has come, or gone.
            _ = woken.changed() => tokio::time::sleep(AFTER_NEWS).await,
        }
        if peer.is_gone() {
            replicas.let_go(&peer);
            return PeerError::Left;
        }
    }
}

/// Tells until something fails.
async fn tell(replicas: &Arc<Replicas>, peer: &Arc<Peer>, journal: &dyn Shared) -> PeerError {
    let mut head = journal.watch();
    let mut woken = replicas.woken();
    // They have one configuration: what we would not take, the other one does not.
    let room = replicas.context.max_request.saturating_sub(OVERHEAD);
    let mut sent = peer.confirmed_up_to();
    let mut on_their_way = VecDeque::new();
    let mut refusals = replicas.context.deliveries.watch_refusals();
    let mut next_refused = 0;
    // After a failure the first message goes at once, with or without a purge: is it there?
    let mut asks = peer.is_late() || peer.is_unlisted() || peer.owes_us();
    loop {
        while on_their_way.len() < ON_THEIR_WAY {
            let Next { purges, done, bytes, last, tells_gap } = next(replicas, peer, journal, sent, room);
            let left = room.saturating_sub(bytes);
            let refused = refused(replicas, peer, journal, &mut next_refused, left);
            sent = Some(last);
            if purges.is_empty() && !asks && refused.is_empty() {
                // Others' purges: they tell of those themselves.
                if on_their_way.is_empty() && peer.confirmed.swap(last, Ordering::SeqCst) != last {
                    replicas.progress.notify();
                    // Some of them may have been refused.
                    continue;
                }
                break;
            }
            asks = false;
            let patience = patience(replicas, journal, &purges);
            let message = Message { purges, done, refused: Some(refused), ..peer.message(replicas, patience) };
            let (replicas, peer) = (Arc::clone(replicas), Arc::clone(peer));
            let answer = tokio::spawn(async move { peer.client.post(&replicas, &message).await });
            on_their_way.push_back(Sent { last, tells_gap, answer: AbortOnDropHandle::new(answer) });
        }
        let full = on_their_way.len() >= ON_THEIR_WAY;
        let told = sent.unwrap_or(0);
        tokio::select! {
            answered = first(&mut on_their_way) => {
                let (last, tells_gap, confirmation) = match answered {
                    Ok(answered) => answered,
                    Err(error) => return error,
                };
                on_their_way.pop_front();
                // Before it counts as confirmed: whoever waits for that is to hear of it.
                if !are_in_time(replicas, peer, journal, &confirmation) {
                    return PeerError::TooLate;
                }
                // What was skipped behind it counts, too, when nothing else is on its way.
                let confirmed = if on_their_way.is_empty() { told.max(last) } else { last };
                peer.record_confirmation(last, confirmed, confirmation, tells_gap);
                replicas.progress.notify();
            }
            moved = head.wait_for(|head| *head > told), if !full => if moved.is_err() {
                return PeerError::NoAnswer(Duration::ZERO);
            },
            _ = refusals.changed() => {}
            () = asks_again(replicas, peer) => asks = true,
            _ = woken.changed() => {
                if peer.is_gone() {
                    return PeerError::Left;
                }
                // It may be another process that has come in the place of this one.
                asks = !replicas.has_journal_in_common();
            }
        }
    }
}

/// Takes note of what nodes refuse at the other one. Says whether all of it comes before the answers here.
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

/// Returns when the other one is to be asked whether it is there, and what it has for us.
async fn asks_again(replicas: &Replicas, peer: &Peer) {
    if peer.owes_us() && !replicas.neighbours.are_caught_up() {
        tokio::time::sleep(ASK_AT_START).await;
    } else if peer.is_unlisted() || !replicas.has_journal_in_common() {
        // Also one that was restarted at once must be met anew, and no etcd tells of that.
        tokio::time::sleep(ASK_EVERY).await;
    } else {
        peer.relisted.notified().await;
    }
}

/// The answer to the oldest message.
async fn first(on_their_way: &mut VecDeque<Sent>) -> Result<(Position, bool, Confirmation), PeerError> {
    match on_their_way.front_mut() {
        Some(sent) => Ok((sent.last, sent.tells_gap, (&mut sent.answer).await??)),
        None => std::future::pending().await,
    }
}
