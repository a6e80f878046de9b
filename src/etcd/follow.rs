//! Follows the keys under a prefix: all of them once, and then every change, across connections.
//!
//! ```text
//! connect ─> LIST at one revision R ─> WATCH from R+1 ─── events ──> R moves with them
//!    ^                ^                    │  │
//!    │                └─ compacted, restored, far behind
//!    └──── pause ──── connection lost, silence ┘   (and then WATCH from R+1 if the list is long)
//! ```
//!
//! **R moves only with messages of the watch itself.** A revision from any other answer proves nothing about the changes
//! before it (apache/apisix#13067: configuration lost for good). Nor does the revision in the header of a watch response
//! with events: while a watch catches up, etcd sends at most a thousand revisions at a time, and each header has etcd's
//! newest one. So R is the revision of the last event. A progress notification moves R unless it was requested, because
//! requested ones overtake events on etcd before 3.4.25 and 3.5.8 (etcd-io/etcd#15220).
//!
//! **A silent member is checked.** After [`SILENCE`] the member gets a request that needs its leader, on the same
//! connection. A member that hangs or is cut off does not answer, and the next one is tried. Progress notifications of the
//! stream are requested periodically: one is no news, but two missing ones are.
//!
//! **History can begin anew.** After a restore from a backup the same revisions mean something else, and by the time we
//! reconnect there may be more of them than before. So keys that fit on one page are listed again on every new connection:
//! that costs no more than any request, and its receiver finds nothing new. A longer list is resumed from R. Then the
//! member's raft position is checked, too ([`RaftPosition`]), and revisions that others in this process have seen count as
//! known ([`WatchStatus::expect`]). If any of these has gone back, the keys are listed again. This misses a restore whose
//! log has become as long as the old one, which is impossible before we reconnect in a cluster with so many keys.
//!
//! **Lists are read through the leader** (not serializable), at one revision for all pages: otherwise a lagging member could
//! combine a fleet from two moments.

mod known;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{EventType, GetOptions, KeyValue, WatchOptions, WatchResponse, WatchStream};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{EtcdError, LeaseId, Pauses, RaftPosition, Session, SharedEtcd, bounded};
pub use crate::telemetry::Resync;
use crate::telemetry::causes;
use known::{WatchContent, WatchMessage, WatchOutcome, WatchPosition};

/// The silence of a watch after which its member is checked.
const SILENCE: Duration = Duration::from_secs(3);

/// The number of silences in a row after which a progress notification is requested.
const ASK_PROGRESS_AFTER: u32 = 10;

/// The number of keys on a page of a list; fewer if they are too large for a message.
const PAGE: i64 = 500;

/// The maximum size of a message. A watch never splits a revision, and a transaction can have thousands of keys. The
/// client's own limit is 4 MiB, less than 500 purges of a busy shop.
const MAX_MESSAGE: usize = 64 << 20;

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyEntry {
    /// The key, without the prefix of the watch.
    pub key: String,
    /// Its value.
    pub value: Vec<u8>,
    /// The lease of the key, if it has one.
    pub lease: Option<LeaseId>,
    /// The revision of the last write.
    pub revision: i64,
    /// The revision of its creation.
    pub created: i64,
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyChange {
    /// It was written.
    Put(KeyEntry),
    /// It was deleted.
    Deleted {
        /// The key, without the prefix of the watch.
        key: String,
        /// The revision of the deletion.
        revision: i64,
    },
}

/// A report of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// All keys at one moment. Known keys that are not listed are gone.
    Listed(Listing),
    /// The changes since, in order.
    Changed(Vec<KeyChange>),
}

/// All keys at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The cluster id.
    pub cluster: u64,
    /// The revision.
    pub revision: i64,
    /// The keys in order.
    pub items: Vec<KeyEntry>,
    /// The reason of the list.
    pub cause: Resync,
}

/// The status of a watch, for display.
#[derive(Debug)]
pub struct WatchStatus {
    /// The name of the watch in the log.
    what: &'static str,
    started: Instant,
    connected: AtomicBool,
    revision: AtomicI64,
    /// The highest revision seen by this process.
    expected: AtomicI64,
    /// The revision of etcd when the watch began.
    begun_at: AtomicI64,
    /// Milliseconds from `started` to the last answer.
    heard: AtomicU64,
    problem: Mutex<Option<Arc<str>>>,
}

impl WatchStatus {
    /// The status of a watch that has received nothing yet. `what` names it in the log.
    pub fn new(what: &'static str) -> Arc<Self> {
        Arc::new(WatchStatus {
            what,
            started: Instant::now(),
            connected: AtomicBool::new(false),
            revision: AtomicI64::new(0),
            expected: AtomicI64::new(0),
            begun_at: AtomicI64::new(0),
            heard: AtomicU64::new(0),
            problem: Mutex::default(),
        })
    }

    /// Whether the watch is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// The revision up to which every change is known.
    pub fn revision(&self) -> i64 {
        self.revision.load(Ordering::Relaxed)
    }

    /// Time since etcd last answered, or since this watch began if it never has.
    pub fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(heard)
    }

    /// Why changes do not come in, if they do not.
    pub fn problem(&self) -> Option<Arc<str>> {
        self.problem.lock().clone()
    }

    /// Records that another connection has seen this revision. That says nothing about the changes before it, but a history
    /// that ends earlier is another one.
    pub fn expect(&self, revision: i64) {
        self.expected.fetch_max(revision, Ordering::Relaxed);
    }

    /// The revision of etcd when the current watch began: other replicas know the changes up to here.
    pub fn begun_at(&self) -> i64 {
        self.begun_at.load(Ordering::Relaxed)
    }

    fn record_contact(&self, revision: i64) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Relaxed);
        self.revision.store(revision, Ordering::Relaxed);
        if !self.connected.swap(true, Ordering::Relaxed) {
            *self.problem.lock() = None;
            tracing::info!(what = self.what, revision, "watching etcd");
        }
    }

    fn record_loss(&self, failure: &EtcdError) {
        self.connected.store(false, Ordering::Relaxed);
        let text: Arc<str> = causes(failure).to_string().into();
        let logged = self.problem.lock().replace(Arc::clone(&text));
        // Logged once for each change, not for each attempt.
        if logged.as_ref() != Some(&text) {
            tracing::warn!(
                what = self.what,
                error = &*text,
                "etcd cannot be watched: its last known state stays in use"
            );
        }
    }
}

struct PrefixWatcher {
    etcd: SharedEtcd,
    /// The prefix of the keys, in full.
    prefix: String,
    known: Option<WatchPosition>,
    pauses: Pauses,
    status: Arc<WatchStatus>,
    updates: mpsc::Sender<Update>,
}

/// Why a connection was given up.
enum WatchEnd {
    /// It was lost; continue on another one.
    Lost(EtcdError),
    /// The keys must be listed again.
    Relist(Resync),
    /// The receiver of the updates is gone.
    NobodyListens,
}

impl From<EtcdError> for WatchEnd {
    fn from(failure: EtcdError) -> Self {
        match failure {
            // A list can use smaller pages.
            failure if failure.is_too_large() => WatchEnd::Relist(Resync::FarBehind),
            failure => WatchEnd::Lost(failure),
        }
    }
}

/// Follows the keys that start with `prefix` until the receiver is dropped.
pub async fn follow(etcd: SharedEtcd, prefix: String, status: Arc<WatchStatus>, updates: mpsc::Sender<Update>) {
    let (known, pauses) = (None, Pauses::default());
    let mut follower = PrefixWatcher { etcd, prefix, known, pauses, status, updates };
    loop {
        match follower.connection().await {
            WatchEnd::NobodyListens => return,
            WatchEnd::Lost(failure) => follower.status.record_loss(&failure),
            // A list has just not helped, so the next one comes after a pause.
            WatchEnd::Relist(_) => follower.known = None,
        }
        tokio::select! {
            () = follower.pauses.wait() => {}
            () = follower.updates.closed() => return,
        }
    }
}

impl PrefixWatcher {
    /// Lists and watches over one connection.
    async fn connection(&mut self) -> WatchEnd {
        let mut session = match self.etcd.connect().await {
            Ok(session) => session,
            Err(failure) => return WatchEnd::Lost(failure),
        };
        let mut relist = WatchPosition::relist(self.known.as_ref(), &session.position);
        loop {
            let listed = relist.is_some();
            if let Some(cause) = relist.take()
                && let Err(end) = self.list(&session, cause).await
            {
                return end;
            }
            match self.watch(&mut session).await {
                // Without a pause: only our state is outdated, and etcd works.
                WatchEnd::Relist(cause) if !listed => relist = Some(cause),
                end => return end,
            }
        }
    }

    async fn list(&mut self, session: &Session, cause: Resync) -> Result<(), WatchEnd> {
        let mut items = Vec::new();
        let (mut revision, mut limit) = (0, PAGE);
        let end = end_of(&self.prefix);
        let mut from = self.prefix.clone().into_bytes();
        loop {
            let options = GetOptions::new().with_range(end.clone()).with_limit(limit).with_revision(revision);
            let get = async |client: etcd_client::Client| {
                client.kv_client().max_decoding_message_size(MAX_MESSAGE).get(from.clone(), Some(options)).await
            };
            let page = match session.request(get).await {
                Err(failure) if failure.is_too_large() && limit > 1 => {
                    limit /= 2;
                    continue;
                }
                page => page.map_err(WatchEnd::Lost)?,
            };
            if revision == 0 {
                revision = page.header().map_or(0, etcd_client::ResponseHeader::revision);
            }
            items.extend(page.kvs().iter().map(|kv| self.item(kv)));
            match page.kvs().last() {
                Some(last) if page.more() => {
                    from = last.key().to_vec();
                    from.push(0);
                }
                _ => break,
            }
        }
        // A list comes from the leader, so a lower revision belongs to another history.
        let expected = self.status.expected.swap(revision, Ordering::Relaxed).max(self.revision());
        let cause = if revision < expected { Resync::Restored } else { cause };
        let (position, cluster, keys) = (session.position, session.position.cluster, items.len());
        self.tell(Update::Listed(Listing { cluster, revision, items, cause })).await?;
        self.known = Some(WatchPosition { position, revision, keys });
        self.status.record_contact(revision);
        Ok(())
    }

    async fn watch(&mut self, session: &mut Session) -> WatchEnd {
        match self.try_watch(session).await {
            Ok(()) => WatchEnd::Lost(EtcdError::Closed),
            Err(end) => end,
        }
    }

    async fn try_watch(&mut self, session: &mut Session) -> Result<(), WatchEnd> {
        let after = self.revision();
        let options = WatchOptions::new().with_prefix().with_start_revision(after + 1).with_progress_notify();
        let mut client = session.client.watch_client().max_decoding_message_size(MAX_MESSAGE);
        // The whole stream is kept, because etcd ends a watch whose sender was dropped.
        let mut stream = bounded(async { Ok(client.watch(self.prefix.as_str(), Some(options)).await?) }).await?;
        let mut silences = 0;
        let mut progress_owed = 0;
        let mut asked = Instant::now();
        loop {
            let is_silent = match tokio::time::timeout(SILENCE, stream.message()).await {
                Ok(message) => match message.map_err(EtcdError::from)? {
                    Some(response) => {
                        progress_owed = 0;
                        self.take(&response, session.position).await?;
                        false
                    }
                    None => return Ok(()),
                },
                Err(_) => true,
            };
            // Also if the stream is busy: it says nothing about the raft position, or about our permission.
            if is_silent || asked.elapsed() >= SILENCE {
                self.ask_member(session).await?;
                asked = Instant::now();
            }
            if is_silent {
                silences += 1;
                if silences % ASK_PROGRESS_AFTER == 0 {
                    ask_progress(&mut stream, &mut progress_owed).await?;
                }
                if self.updates.is_closed() {
                    return Err(WatchEnd::NobodyListens);
                }
            }
        }
    }

    /// Checks that the member answers and has a leader, and reads its raft position.
    async fn ask_member(&mut self, session: &mut Session) -> Result<(), EtcdError> {
        let options = GetOptions::new().with_prefix().with_count_only().with_limit(1);
        let prefix = self.prefix.as_str();
        session.request(async |mut client| client.get(prefix, Some(options)).await).await?;
        let position = session.look().await?;
        if let Some(known) = &mut self.known {
            known.position = position;
        }
        self.status.record_contact(self.revision());
        Ok(())
    }

    async fn take(&mut self, response: &WatchResponse, position: RaftPosition) -> Result<(), WatchEnd> {
        let response = self.read(response);
        let expected = self.status.expected.load(Ordering::Relaxed);
        let Some(known) = &mut self.known else { return Err(WatchEnd::Relist(Resync::Start)) };
        let at = response.at.unwrap_or(known.revision);
        match known.take(response, expected, position) {
            WatchOutcome::Failed(failure) => return Err(WatchEnd::Lost(failure)),
            WatchOutcome::Relist(cause) => return Err(WatchEnd::Relist(cause)),
            WatchOutcome::Created => {
                self.status.begun_at.store(at, Ordering::Relaxed);
                self.pauses.reset();
            }
            WatchOutcome::Changes(changes) if changes.is_empty() => {}
            WatchOutcome::Changes(changes) => self.tell(Update::Changed(changes)).await?,
        }
        self.status.record_contact(self.revision());
        Ok(())
    }

    fn read(&self, response: &WatchResponse) -> WatchMessage {
        // Checked first: a refused watch is reported as created and cancelled at once.
        let content = if response.canceled() {
            let (is_compacted, reason) = (response.compact_revision() > 0, response.cancel_reason().to_owned());
            WatchContent::Cancelled { is_compacted, reason }
        } else if response.created() {
            WatchContent::Created
        } else {
            WatchContent::Changes(response.events().iter().filter_map(|event| self.change(event)).collect())
        };
        let at = response.header().map(etcd_client::ResponseHeader::revision);
        WatchMessage { at, watch: response.watch_id(), content }
    }

    fn change(&self, event: &etcd_client::Event) -> Option<KeyChange> {
        let kv = event.kv()?;
        Some(match event.event_type() {
            EventType::Put => KeyChange::Put(self.item(kv)),
            EventType::Delete => KeyChange::Deleted { key: self.name(kv), revision: kv.mod_revision() },
        })
    }

    fn item(&self, kv: &KeyValue) -> KeyEntry {
        KeyEntry {
            key: self.name(kv),
            value: kv.value().to_vec(),
            lease: LeaseId::new(kv.lease()),
            revision: kv.mod_revision(),
            created: kv.create_revision(),
        }
    }

    fn name(&self, kv: &KeyValue) -> String {
        let key = String::from_utf8_lossy(kv.key());
        key.strip_prefix(&self.prefix).unwrap_or(&key).to_owned()
    }

    fn revision(&self) -> i64 {
        self.known.map_or(0, |known| known.revision)
    }

    async fn tell(&self, update: Update) -> Result<(), WatchEnd> {
        self.updates.send(update).await.map_err(|_| WatchEnd::NobodyListens)
    }
}

impl KeyChange {
    /// The revision of the change.
    pub fn revision(&self) -> i64 {
        match self {
            KeyChange::Put(item) => item.revision,
            KeyChange::Deleted { revision, .. } => *revision,
        }
    }
}

/// Requests a progress notification, which is only a sign of life. etcd 3.5.8 to 3.5.12 may never send it if nothing has
/// happened yet (etcd-io/etcd#17507), so a missing one only costs a new watch from R.
async fn ask_progress(stream: &mut WatchStream, owed: &mut u32) -> Result<(), EtcdError> {
    if *owed >= 2 {
        return Err(EtcdError::NoAnswer);
    }
    *owed += 1;
    Ok(stream.request_progress().await?)
}

/// The first key after all that start with `prefix`, as etcd expects the end of a range.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // Every prefix here ends in `/`, so this cannot overflow.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
