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
//! **A key that is gone is no replica that is gone.** The lease of one that is cut off from etcd runs out while it serves
//! its readers, and then it is us or nobody who tells it of purges. So who is not registered any more is told as before,
//! and asked now and then whether it is still there; it is let go of when nobody listens at its address, when nothing was
//! heard of it for [`KEPT`], or when it has said goodbye.

mod landed;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::call::{TellError, Way};
use super::message::{Again, Confirmation, Message};
use super::under_way::PeerHolds;
use super::{Record, Replicas};
use crate::backoff::Backoff;
use crate::fleet::NodeId;
use crate::journal::{Entry, Missed, Position, Shared, Told};
use crate::purge::{Purge, Target};
use crate::telemetry::causes;

/// Messages on their way at once. Each waits for the other fleet's Varnish nodes, a tenth of a second at times.
const ON_THEIR_WAY: usize = 8;

/// Bytes of purges in one message, as near as it can be told, where `purge.max_request` is not less.
const MAX_MESSAGE: usize = 256 << 10;

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
    way: Way,
    /// It has confirmed every purge of ours up to here.
    confirmed: AtomicU64,
    /// Nobody knows what it has of those before: it gets one of everything first.
    has_gap: AtomicBool,
    /// It has said that it has purges to tell us.
    owes_us: AtomicBool,
    late: AtomicBool,
    gone: AtomicBool,
    /// Its key is not in etcd, or its address not among those of the configuration.
    unlisted: AtomicBool,
    /// Rings when that has changed.
    relisted: Notify,
    heard: Mutex<Instant>,
    problem: Mutex<Arc<str>>,
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
            way: Way::to(record.address.clone()),
            record,
            confirmed: AtomicU64::new(told),
            has_gap: AtomicBool::new(has_gap),
            owes_us: AtomicBool::new(false),
            late: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            unlisted: AtomicBool::new(!listed),
            relisted: Notify::new(),
            heard: Mutex::new(Instant::now()),
            problem: Mutex::new("".into()),
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
        self.late.load(Ordering::SeqCst)
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    pub(super) fn is_gone_now(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_unlisted(&self) -> bool {
        self.unlisted.load(Ordering::SeqCst)
    }

    /// Whether it is named where replicas are: in etcd, or in the configuration.
    pub(super) fn is_listed_now(&self, listed: bool) {
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
    fn has_ended(&self, error: &TellError) -> bool {
        let heard = *self.heard.lock();
        let is_over = self.is_unlisted() && (error.is_refused_connection() || heard.elapsed() > KEPT);
        is_over || matches!(error, TellError::Restarted | TellError::Left)
    }

    pub(super) fn problem(&self) -> Arc<str> {
        let problem = Arc::clone(&self.problem.lock());
        if problem.is_empty() && self.is_unlisted() { "not registered any more".into() } else { problem }
    }

    /// Nobody waits for it any more.
    pub(super) fn is_late_now(&self, problem: &str) {
        *self.problem.lock() = problem.into();
        if !self.late.swap(true, Ordering::SeqCst) {
            tracing::warn!(
                replica = %self.id, address = self.record.address, problem,
                "a replica does not confirm purges: they are answered without it, and it may serve an old page until it is told again, or by the journal"
            );
        }
    }

    fn is_on_time_again(&self) {
        *self.heard.lock() = Instant::now();
        *self.problem.lock() = "".into();
        if self.late.swap(false, Ordering::SeqCst) {
            tracing::info!(replica = %self.id, "a replica confirms purges again");
        }
    }

    /// It has confirmed everything up to `position`, as it says of the last purge up to `last`.
    fn confirms(&self, last: Position, position: Position, confirmation: Confirmation, gap_is_told: bool) {
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
        self.is_on_time_again();
    }

    /// Has it tell nodes of a purge once more, and gives what it says then.
    pub(super) async fn tell_again(
        &self,
        replicas: &Replicas,
        again: Vec<Again>,
        patience: Duration,
    ) -> Result<Confirmation, TellError> {
        let message = Message { again, ..self.message(replicas, Vec::new(), patience) };
        self.way.post(replicas, &message).await
    }

    /// Asks it up to where pages have landed at these nodes that passed there.
    pub(super) async fn ask_landed(
        &self,
        replicas: &Replicas,
        asks_about: Vec<NodeId>,
    ) -> Result<Confirmation, TellError> {
        // Positions are those of this process's journal.
        let to = Some(self.record.boot.clone());
        let message = Message { to, asks_about, ..self.message(replicas, Vec::new(), Duration::ZERO) };
        self.way.post(replicas, &message).await
    }

    /// Tells it that we are about to end.
    pub(super) async fn say_goodbye(&self, replicas: &Replicas) -> Result<Confirmation, TellError> {
        let record = Some(Record { leaving: true, ..replicas.own.clone() });
        let message = Message { record, ..self.message(replicas, Vec::new(), Duration::ZERO) };
        self.way.post(replicas, &message).await
    }

    fn message(&self, replicas: &Replicas, purges: Vec<Told>, patience: Duration) -> Message {
        // Who shares our journal may be any process of this name: what it was not told it reads there.
        let to = (!replicas.has_journal_in_common()).then(|| self.record.boot.clone());
        Message { to, purges, ..replicas.hello(patience) }
    }
}

/// A message that is on its way, and what it brings the other one to.
struct Sent {
    last: Position,
    tells_gap: bool,
    /// Ends with this value.
    answer: AbortOnDropHandle<Result<Confirmation, TellError>>,
}

/// Tells a peer of everything that is accepted here, and asks it about what is held for it, until it is gone: why it is.
pub(super) async fn run(replicas: Arc<Replicas>, peer: Arc<Peer>) -> TellError {
    tokio::select! {
        error = keep_telling(Arc::clone(&replicas), Arc::clone(&peer)) => error,
        never = landed::ask(replicas, peer) => match never {},
    }
}

async fn keep_telling(replicas: Arc<Replicas>, peer: Arc<Peer>) -> TellError {
    let Some(journal) = replicas.context.journal.clone() else { return TellError::Left };
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
        peer.is_late_now(&causes(&error).to_string());
        replicas.progress.send_replace(());
        // Whoever has confirmed anything since was there.
        failures = if peer.has(before + 1) { 1_u32 } else { failures.saturating_add(1) };
        tokio::select! {
            () = tokio::time::sleep(BACKOFF.pause(failures, 0.1 + 0.9 * fastrand::f64())) => {}
            // Somebody has come, or gone.
            _ = woken.changed() => tokio::time::sleep(AFTER_NEWS).await,
        }
        if peer.is_gone() {
            replicas.let_go(&peer);
            return TellError::Left;
        }
    }
}

/// Tells until something fails.
async fn tell(replicas: &Arc<Replicas>, peer: &Arc<Peer>, journal: &dyn Shared) -> TellError {
    let mut head = journal.watch();
    let mut woken = replicas.woken();
    // They have one configuration: what we would not take, the other one does not.
    let room = replicas.context.max_request.saturating_sub(OVERHEAD);
    let mut sent = peer.confirmed_up_to();
    let mut on_their_way = VecDeque::new();
    // After a failure the first message goes at once, with or without a purge: is it there?
    let mut asks = peer.is_late() || peer.is_unlisted() || peer.owes_us();
    loop {
        while on_their_way.len() < ON_THEIR_WAY {
            let Next { purges, last, tells_gap } = next(replicas, peer, journal, sent, room);
            if purges.is_empty() && !asks {
                // Others' purges: they tell of those themselves.
                sent = Some(last);
                if on_their_way.is_empty() {
                    peer.confirmed.store(last, Ordering::SeqCst);
                    replicas.progress.send_replace(());
                }
                break;
            }
            asks = false;
            let answer = tokio::spawn(post(Arc::clone(replicas), Arc::clone(peer), purges));
            on_their_way.push_back(Sent { last, tells_gap, answer: AbortOnDropHandle::new(answer) });
            sent = Some(last);
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
                // What was skipped behind it counts, too, when nothing else is on its way.
                let confirmed = if on_their_way.is_empty() { told.max(last) } else { last };
                peer.confirms(last, confirmed, confirmation, tells_gap);
                replicas.progress.send_replace(());
            }
            moved = head.wait_for(|head| *head > told), if !full => if moved.is_err() {
                return TellError::NoAnswer(Duration::ZERO);
            },
            () = asks_again(replicas, peer) => asks = true,
            _ = woken.changed() => {
                if peer.is_gone() {
                    return TellError::Left;
                }
                // It may be another process that has come in the place of this one.
                asks = !replicas.has_journal_in_common();
            }
        }
    }
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
async fn first(on_their_way: &mut VecDeque<Sent>) -> Result<(Position, bool, Confirmation), TellError> {
    match on_their_way.front_mut() {
        Some(sent) => match (&mut sent.answer).await {
            Ok(answer) => answer.map(|confirmation| (sent.last, sent.tells_gap, confirmation)),
            Err(error) => Err(TellError::Refused(500, error.to_string())),
        },
        None => std::future::pending().await,
    }
}

/// What is to be told next.
struct Next {
    purges: Vec<Told>,
    /// Up to where the other one has everything then.
    last: Position,
    tells_gap: bool,
}

/// What was accepted here after `sent`, as much as a message of `room` bytes takes.
fn next(replicas: &Replicas, peer: &Peer, journal: &dyn Shared, sent: Option<Position>, room: usize) -> Next {
    // Read first: what is appended from here on is told after it.
    let head = journal.head();
    let missed = sent.map_or(Missed::Gap, |sent| journal.since(sent));
    let Missed::Entries(entries) = missed else {
        if replicas.has_journal_in_common() {
            // Whoever missed so much has a gap in its journal, too.
            return Next { purges: Vec::new(), last: head, tells_gap: true };
        }
        tracing::warn!(
            replica = %peer.id, head,
            "what a replica missed is not known any more: it is told one purge of everything"
        );
        let id = super::gap_name(&replicas.own.boot, &peer.record.boot, head);
        let told = Told { id, revision: None, at_ms: journal.now_ms(), purge: everything_missed() };
        return Next { purges: vec![told], last: head, tells_gap: true };
    };
    let (mut purges, mut bytes, mut last) = (Vec::new(), 0, sent.unwrap_or(0));
    for entry in entries {
        let ours = entry.origin.as_ref().filter(|origin| origin.ours);
        if let Some(origin) = ours {
            let (told, size) = fitting(told(journal.revision(entry.position), &origin.id, &entry), room);
            bytes += size;
            if bytes > MAX_MESSAGE.min(room) && !purges.is_empty() {
                break;
            }
            purges.push(told);
        }
        last = entry.position;
    }
    Next { purges, last, tells_gap: false }
}

/// What stands for any number of purges: among them may be some of pages without tags.
fn everything_missed() -> Purge {
    Purge { targets: vec![Target::All], soft: false }
}

/// A purge that fits into a message, and how large it is there: as JSON one can be larger than it was as a request, and
/// the other one would refuse it for ever.
fn fitting(told: Told, room: usize) -> (Told, usize) {
    let size = |told: &Told| serde_json::to_vec(told).map_or(0, |json| json.len());
    let as_it_is = size(&told);
    if as_it_is <= room {
        return (told, as_it_is);
    }
    let told = Told { purge: Purge::everything(), ..told };
    let size = size(&told);
    (told, size)
}

fn told(revision: Option<u64>, id: &str, entry: &Entry) -> Told {
    Told { id: id.to_owned(), revision, at_ms: entry.at_ms, purge: entry.purge.clone() }
}

/// How long the other one may wait for its Varnish nodes. It keeps some of our patience for itself (it takes the purge in,
/// and answers), and what etcd has taken before is gone: its answer is to be here when the purge's sender gets one. What is
/// older was answered long ago, and fences there almost at once.
fn others_patience(ack_timeout: Duration, accepted_ms: u64, now_ms: u64) -> Duration {
    let gone = Duration::from_millis(now_ms.saturating_sub(accepted_ms));
    (ack_timeout * 5 / 8).saturating_sub(gone).max(ack_timeout / 8)
}

/// Sends one message and waits for its answer.
async fn post(replicas: Arc<Replicas>, peer: Arc<Peer>, purges: Vec<Told>) -> Result<Confirmation, TellError> {
    let newest_ms = purges.iter().map(|told| told.at_ms).max().unwrap_or(0);
    // Both times are of our own clock: what is told was accepted here.
    let now_ms = replicas.context.journal.as_ref().map_or(0, |journal| journal.now_ms());
    let patience = others_patience(replicas.context.ack_timeout, newest_ms, now_ms);
    peer.way.post(&replicas, &peer.message(&replicas, purges, patience)).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::Target;

    #[test]
    fn a_purge_that_no_message_takes_is_told_as_one_of_everything() {
        let request = |pattern: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("X-Magento-Tags-Pattern", pattern.parse().unwrap());
            let (method, rules) = (http::Method::from_bytes(b"PURGE").unwrap(), crate::purge::PurgeRules::default());
            crate::purge::parse(&method, &"/".parse().unwrap(), &headers, &rules).unwrap().purge
        };
        let told = |purge| Told { id: "a".to_owned(), revision: None, at_ms: 1, purge };
        let (small, large) =
            (told(request("((^|,)cat_p_1(,|$))")), told(request(&format!("a{}", r"\.".repeat(2_000)))));
        assert_eq!(fitting(small.clone(), 4_500).0, small);
        let (fitted, size) = fitting(large, 4_500);
        assert!(fitted.purge.targets == [Target::Everything] && size < 200, "{size}");
    }

    #[test]
    fn the_other_one_answers_before_the_sender_of_the_purge_is_answered() {
        let ack = Duration::from_millis(1_000);
        let patience = |gone: u64| others_patience(ack, 10_000, 10_000 + gone).as_millis();
        assert_eq!([0, 350, 700, 60_000].map(patience), [625, 275, 125, 125]);
        // A clock that was set back.
        assert_eq!(others_patience(ack, 10_000, 9_000).as_millis(), 625);
    }
}
