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
//! **A key that is gone is no replica that is gone.** The lease of one that is cut off from etcd runs out while it serves
//! its readers, and then it is us or nobody who tells it of purges. So who is not registered any more is told as before,
//! and asked now and then whether it is still there; it is let go of when nobody listens at its address, when nothing was
//! heard of it for [`KEPT`], or when it has said goodbye.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};

use super::{Message, PATH, Record, Replicas};
use crate::fleet::NodeId;
use crate::journal::{Entry, Etcd as SharedJournal, Journal, Missed, Position, Told};
use crate::purge::Purge;

/// Messages on their way at once. Each waits for the other fleet's Varnish nodes, a tenth of a second at times.
const ON_THEIR_WAY: usize = 8;

/// Bytes of purges in one message, as near as it can be told, where `purge.max_request` is not less.
const MAX_MESSAGE: usize = 256 << 10;

/// What else is in a request of ours, and more.
const OVERHEAD: usize = 4 << 10;

/// The pauses after a failure: a random share of a bound that doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How often one that is not registered is asked whether it is there.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// How long one that is not registered and does not answer is still told: as long as a node whose agent says nothing.
const KEPT: Duration = Duration::from_secs(600);

/// An answer is some words.
const MAX_ANSWER: usize = 64 << 10;

/// Another replica.
pub(super) struct Peer {
    pub(super) id: NodeId,
    pub(super) record: Record,
    /// It has confirmed every purge of ours up to here.
    confirmed: AtomicU64,
    late: AtomicBool,
    gone: AtomicBool,
    /// Its key is not in etcd.
    unlisted: AtomicBool,
    /// Rings when that has changed.
    relisted: Notify,
    heard: Mutex<Instant>,
    problem: Mutex<Arc<str>>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// Why it was not told.
#[derive(Debug, thiserror::Error)]
enum TellError {
    #[error("connecting failed: {0}")]
    Connect(#[from] std::io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] http::Error),
    #[error("{0}")]
    Encode(#[from] serde_json::Error),
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("it answered {0}: {1}")]
    Refused(u16, String),
}

impl Peer {
    /// One that needs not be told of anything up to `told`: it has read the journal after that. `listed`: by its key in etcd.
    pub(super) fn new(id: NodeId, record: Record, told: Position, listed: bool) -> Self {
        Peer {
            id,
            record,
            confirmed: AtomicU64::new(told),
            late: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            unlisted: AtomicBool::new(!listed),
            relisted: Notify::new(),
            heard: Mutex::new(Instant::now()),
            problem: Mutex::new("".into()),
            idle: Mutex::default(),
        }
    }

    pub(super) fn has(&self, position: Position) -> bool {
        self.confirmed.load(Ordering::SeqCst) >= position
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

    /// Whether its key is in etcd.
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
        let heard = *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let nobody_listens =
            matches!(error, TellError::Connect(error) if error.kind() == std::io::ErrorKind::ConnectionRefused);
        self.is_unlisted() && (nobody_listens || heard.elapsed() > KEPT)
    }

    pub(super) fn problem(&self) -> Arc<str> {
        let problem = Arc::clone(&self.problem.lock().unwrap_or_else(PoisonError::into_inner));
        if problem.is_empty() && self.is_unlisted() { "not registered in etcd any more".into() } else { problem }
    }

    /// Nobody waits for it any more.
    pub(super) fn is_late_now(&self, problem: &str) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem.into();
        if !self.late.swap(true, Ordering::SeqCst) {
            tracing::warn!(
                replica = %self.id, address = self.record.address, problem,
                "a replica does not confirm purges: they are answered without it, and it may serve an old page until the journal has told it"
            );
        }
    }

    fn is_on_time_again(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = "".into();
        if self.late.swap(false, Ordering::SeqCst) {
            tracing::info!(replica = %self.id, "a replica confirms purges again");
        }
    }
}

/// A message that is on its way, and what it brings the other one to.
struct Sent {
    last: Position,
    answer: JoinHandle<Result<(), TellError>>,
    /// Ends with this value.
    _abort: AbortOnDrop,
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells a peer of everything that is accepted here, until it is gone.
pub(super) async fn run(replicas: Arc<Replicas>, peer: Arc<Peer>) {
    let Some(journal) = replicas.context.journal.clone() else { return };
    let mut failures = 0;
    loop {
        let before = peer.confirmed.load(Ordering::SeqCst);
        let error = tell(&replicas, &peer, &journal).await;
        // Where nobody listens, nobody is served an old page either; and who does not answer has had its time.
        peer.is_late_now(&error.to_string());
        if peer.has_ended(&error) {
            return replicas.let_go(&peer);
        }
        replicas.progress.send_replace(());
        // Whoever has confirmed anything since was there.
        failures = if peer.has(before + 1) { 1 } else { (failures + 1).min(16) };
        let bound = (FIRST_PAUSE * 2_u32.saturating_pow(failures - 1)).min(LONGEST_PAUSE);
        tokio::time::sleep(bound.mul_f64(0.1 + 0.9 * fastrand::f64())).await;
    }
}

/// Tells until something fails.
async fn tell(replicas: &Arc<Replicas>, peer: &Arc<Peer>, journal: &SharedJournal) -> TellError {
    let mut head = journal.watch();
    // They have one configuration: what we would not take, the other one does not.
    let room = replicas.context.max_request.saturating_sub(OVERHEAD);
    let mut sent = peer.confirmed.load(Ordering::SeqCst);
    let mut on_their_way = VecDeque::new();
    // After a failure the first message goes at once, with or without a purge: is it there?
    let mut asks = peer.is_late() || peer.is_unlisted();
    loop {
        while on_their_way.len() < ON_THEIR_WAY {
            let (purges, last) = next(journal, sent, room);
            if purges.is_empty() && !asks {
                // Others' purges: they tell of those themselves.
                sent = last;
                if on_their_way.is_empty() {
                    peer.confirmed.store(sent, Ordering::SeqCst);
                    replicas.progress.send_replace(());
                }
                break;
            }
            asks = false;
            let answer = tokio::spawn(post(Arc::clone(replicas), Arc::clone(peer), message(replicas, journal, purges)));
            let abort = AbortOnDrop(answer.abort_handle());
            on_their_way.push_back(Sent { last, answer, _abort: abort });
            sent = last;
        }
        let full = on_their_way.len() >= ON_THEIR_WAY;
        let is_there = async {
            if !peer.is_unlisted() {
                peer.relisted.notified().await;
            } else {
                tokio::time::sleep(ASK_EVERY).await;
            }
        };
        tokio::select! {
            answered = first(&mut on_their_way) => {
                let last = match answered {
                    Ok(last) => last,
                    Err(error) => return error,
                };
                on_their_way.pop_front();
                // What was skipped behind it counts, too, when nothing else is on its way.
                let confirmed = if on_their_way.is_empty() { sent.max(last) } else { last };
                peer.confirmed.store(confirmed, Ordering::SeqCst);
                peer.is_on_time_again();
                replicas.progress.send_replace(());
            }
            moved = head.wait_for(|head| *head > sent), if !full => if moved.is_err() {
                return TellError::NoAnswer(Duration::ZERO);
            },
            () = is_there => asks = peer.is_unlisted(),
        }
    }
}

/// The answer to the oldest message.
async fn first(on_their_way: &mut VecDeque<Sent>) -> Result<Position, TellError> {
    match on_their_way.front_mut() {
        Some(sent) => match (&mut sent.answer).await {
            Ok(answer) => answer.map(|()| sent.last),
            Err(error) => Err(TellError::Refused(500, error.to_string())),
        },
        None => std::future::pending().await,
    }
}

/// What was accepted here after `sent`, as much as a message of `room` bytes takes, and up to where that is.
fn next(journal: &SharedJournal, sent: Position, room: usize) -> (Vec<Told>, Position) {
    let entries = match journal.since(sent) {
        Missed::Entries(entries) => entries,
        // Whoever missed so much has a gap in its journal, too.
        Missed::Gap => return (Vec::new(), journal.head()),
    };
    let (mut purges, mut bytes, mut last) = (Vec::new(), 0, sent);
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
    (purges, last)
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
    (ack_timeout * 3 / 4).saturating_sub(gone).max(ack_timeout / 8)
}

fn message(replicas: &Replicas, journal: &SharedJournal, purges: Vec<Told>) -> Message {
    let newest_ms = purges.iter().map(|told| told.at_ms).max().unwrap_or(0);
    let wait = others_patience(replicas.context.ack_timeout, newest_ms, journal.now_ms());
    Message {
        from: replicas.id.clone(),
        record: Some(replicas.own.clone()),
        wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        purges,
    }
}

/// Sends one message and waits for its answer.
async fn post(replicas: Arc<Replicas>, peer: Arc<Peer>, message: Message) -> Result<(), TellError> {
    let patience = replicas.context.ack_timeout;
    let body = Bytes::from(serde_json::to_vec(&message)?);
    let answered = async {
        let pooled = peer.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(mut sender) = pooled.filter(|sender| sender.is_ready()) {
            match exchange(&replicas, &peer, &mut sender, body.clone()).await {
                // It was closed under us.
                Err(TellError::Http(error))
                    if error.is_canceled() || error.is_closed() || error.is_incomplete_message() => {}
                answer => return keep(&peer, sender, answer),
            }
        }
        let stream = TcpStream::connect(&peer.record.address).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends with its sender; its error is the one that the sender reports.
        tokio::spawn(connection);
        let answer = exchange(&replicas, &peer, &mut sender, body).await;
        keep(&peer, sender, answer)
    };
    tokio::time::timeout(patience, answered).await.unwrap_or(Err(TellError::NoAnswer(patience)))
}

fn keep(peer: &Peer, sender: SendRequest<Full<Bytes>>, answer: Result<(), TellError>) -> Result<(), TellError> {
    if answer.is_ok() {
        peer.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
    }
    answer
}

async fn exchange(
    replicas: &Replicas,
    peer: &Peer,
    sender: &mut SendRequest<Full<Bytes>>,
    body: Bytes,
) -> Result<(), TellError> {
    let mut request = http::Request::post(PATH)
        .header(http::header::HOST, &peer.record.address)
        .header(http::header::CONTENT_TYPE, "application/json");
    if let Some(token) = &replicas.context.token {
        request = request.header(http::header::AUTHORIZATION, format!("Bearer {}", token.reveal()));
    }
    let answer = sender.send_request(request.body(Full::new(body))?).await?;
    let status = answer.status().as_u16();
    let text = match Limited::new(answer.into_body(), MAX_ANSWER).collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    if status == 200 { Ok(()) } else { Err(TellError::Refused(status, text)) }
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
            let (method, rules) = (http::Method::from_bytes(b"PURGE").unwrap(), crate::purge::Rules::default());
            crate::purge::parse(&method, &"/".parse().unwrap(), &headers, &rules).unwrap()
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
        assert_eq!([0, 350, 700, 60_000].map(patience), [750, 400, 125, 125]);
        // A clock that was set back.
        assert_eq!(others_patience(ack, 10_000, 9_000).as_millis(), 750);
    }
}
