//! The ordered, durable list of purges, with the cursor of each Varnish.
//!
//! A purge is *accepted* once it is in the journal, not when a Varnish has received it. [`Journal::append`] resolves once
//! the purge would survive `kill -9`; everything after that may take as long as a node hangs. So there is no queue per
//! Varnish that could overflow or be lost: a delivery is a cursor, a number that moves through the journal.
//!
//! Four decisions shape it:
//!
//! - **Readers never wait for a disk or a network.** The entries that can be replayed are a bounded tail in memory; the
//!   store behind it is read only at the start. A purge becomes readable, then the head moves, then its sender is answered.
//!   So a reader that was woken by [`Journal::watch`] finds the entry.
//! - **A cursor that is too old is not an error.** The result is [`Missed::Truncated`], and the caller sends one ban of
//!   everything. So the tail may be bounded: dropping too many pages is slow, dropping too few is wrong.
//! - **Only refused purges are marked.** If nodes refuse a purge, a mark is made durable before its sender is answered;
//!   without a mark, a purge counts as answered as done. So a purge needs no second fsync, and a mark that is lost in a
//!   crash errs on the safe side. Each journal has its own marks: in memory they end with the process, and with etcd they
//!   are on this machine, because replicas report refusals to each other.
//! - **A cursor that is too low is harmless**, because bans are idempotent. So cursors are saved lazily, and only purges
//!   need an fsync.

#[cfg(test)]
mod contract;
mod cursors;
mod disk;
mod etcd;
mod memory;
mod named;
mod position_map;
mod readable;
mod tail;

use std::collections::HashMap;
use std::error::Error;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::clock;
use crate::fleet::{NodeId, is_another_life};
use crate::purge::Purge;
use crate::seal::{Name, PurgedNames};

pub use crate::seal::Position;
pub use disk::{Damage, Disk, FILES_COMMAND, OpenError, Settings, serve_files};
pub use etcd::{Etcd, PurgeMessage};
pub use memory::Memory;
pub use named::{Named, NamedStore};
pub use readable::Readable;

/// Called with each purge once it is durable, before any reader of the journal can see it. Blocks the writer.
pub type PurgeObserver = Arc<dyn Fn(&Entry) + Send + Sync>;

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A purge with its position. Stored as JSON, so that an operator can read what was accepted and when; the position is its
/// key in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its position.
    #[serde(skip)]
    pub position: Position,
    /// When it was accepted, in milliseconds since 1970 by the wall clock. It may go backwards from one entry to the next;
    /// only retention uses it.
    #[serde(rename = "at")]
    pub at_ms: u64,
    /// The purge.
    pub purge: Purge,
    /// Its identity, if replicas exchange purges.
    #[serde(skip)]
    pub origin: Option<EntryOrigin>,
}

impl Entry {
    /// Reads a stored entry, from disk or etcd. An entry that this version does not understand may purge anything (a later
    /// version has more kinds), so it becomes a purge of everything, and the error says why. If even its time cannot be
    /// read, that is `now_ms`. Unknown fields are ignored.
    fn read(bytes: &[u8], now_ms: u64) -> (Entry, Option<serde_json::Error>) {
        #[derive(Deserialize)]
        struct Dated {
            at: u64,
        }
        match serde_json::from_slice(bytes) {
            Ok(entry) => (entry, None),
            Err(error) => {
                let at_ms = serde_json::from_slice(bytes).map_or(now_ms, |Dated { at }| at);
                (Entry { position: 0, at_ms, purge: Purge::everything(), origin: None }, Some(error))
            }
        }
    }
}

/// The identity of an entry that is in several journals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryOrigin {
    /// Its name, the same in all journals.
    pub id: Arc<str>,
    /// Its revision in etcd, as far as known when it was appended here. `None`: it was not in etcd yet.
    pub revision: Option<u64>,
    /// This process has accepted it.
    pub ours: bool,
}

/// The progress of a Varnish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// It has acknowledged every purge up to here.
    pub position: Position,
    /// The epoch of its cache at that time, if known.
    pub epoch: Option<Arc<str>>,
    /// Everything in its cache was stored since answers are sealed.
    pub is_sealed: bool,
    /// A purge that a seal shows was told to it once: what its cache stored later, only its seal keeps from readers.
    pub relies_on_seals: bool,
}

impl Cursor {
    /// A cursor of a cache of which nothing else is known.
    pub fn at(position: Position) -> Self {
        Cursor { position, epoch: None, is_sealed: false, relies_on_seals: false }
    }

    /// Whether a cache with this epoch relies on seals.
    fn relies(&self, epoch: Option<&str>) -> bool {
        self.relies_on_seals && !is_another_life(self.epoch.as_deref(), epoch)
    }

    /// The state of a node whose cache has this epoch.
    fn remembered(self, epoch: Option<&str>) -> CursorState {
        if is_another_life(self.epoch.as_deref(), epoch) {
            CursorState::CacheRestarted
        } else {
            CursorState::At(self.position)
        }
    }
}

/// The progress of a Varnish that returns, as far as the journal knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CursorState {
    /// It had acknowledged every purge up to here.
    At(Position),
    /// Its cache has restarted since, and was empty.
    CacheRestarted,
    /// The node is unknown.
    Unknown,
}

/// The backlog of a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lag {
    /// The number of purges after it, without those that the journal no longer holds.
    pub entries: usize,
    /// When the oldest of them was accepted, in milliseconds since 1970. `None` if it is no longer held.
    pub oldest_ms: Option<u64>,
}

/// The entries after a cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// Everything after the cursor up to the head, in order. Empty if the cursor is at the head.
    Entries(Vec<Arc<Entry>>),
    /// Some entries are no longer held, or the cursor belongs to another journal.
    Truncated,
}

/// The limits of what can be replayed. Whichever is reached first, the oldest entries are dropped.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long an entry is kept, and the cursor of a node that is no longer saved.
    pub retention: Duration,
    /// The maximum number of entries.
    pub max_entries: usize,
    /// The approximate maximum size of the entries in memory, in bytes.
    pub max_bytes: usize,
    /// How many purged names are known, also of entries that are not held any more.
    pub max_names: usize,
}

impl Default for Limits {
    /// One hour, and sizes that a shop does not reach within it. The names are fewer than those of the configuration
    /// (`journal.names`), as their table takes its memory at once.
    fn default() -> Self {
        Limits { retention: Duration::from_secs(3600), max_entries: 100_000, max_bytes: 64 << 20, max_names: 10_000 }
    }
}

impl Limits {
    /// Whether an item written at `at_ms` is past its retention. A time in the future (the clock was set back) counts as
    /// now: keeping too long is better than losing.
    fn retires(&self, at_ms: u64, now_ms: u64) -> bool {
        u128::from(now_ms.saturating_sub(at_ms)) > self.retention.as_millis()
    }
}

/// Why a journal does not continue the one before it. Each Varnish may have missed any earlier purge, and gets a ban of
/// everything before it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anew {
    /// There is no journal, and no sign of an earlier one.
    FirstStart,
    /// The earlier one was in memory.
    Memory,
    /// The earlier one is gone, with the evidence of it.
    Lost(String),
    /// This is another journal than the earlier one, with the evidence of it.
    Replaced(String),
    /// It cannot be read in full, with the file and the problem.
    Damaged(String),
}

impl Anew {
    /// Every [`reason`](Anew::reason).
    pub const REASONS: [&'static str; 5] = ["first_start", "memory", "lost", "replaced", "damaged"];

    /// The reason as a word, for metrics and file names.
    pub fn reason(&self) -> &'static str {
        match self {
            Anew::FirstStart => "first_start",
            Anew::Memory => "memory",
            Anew::Lost(_) => "lost",
            Anew::Replaced(_) => "replaced",
            Anew::Damaged(_) => "damaged",
        }
    }

    /// Logs the reason at the start. `path` is that of the journal.
    fn log(&self, path: &Path) {
        let path = path.display();
        match self {
            Anew::FirstStart => tracing::info!(
                %path,
                "there is no journal yet: each Varnish with an unknown cursor gets one ban of everything before \
                 it serves, as it may hold pages that were purged before (journal.first_start)"
            ),
            Anew::Memory => tracing::warn!(
                "the journal is in memory: earlier purges are unknown, so each Varnish gets one ban \
                 of everything before it serves (journal.kind)"
            ),
            Anew::Lost(cause) | Anew::Replaced(cause) => tracing::warn!(
                %path, cause, reason = self.reason(),
                "the journal is not the one that was here: each Varnish gets one ban of everything before it serves"
            ),
            Anew::Damaged(cause) => tracing::error!(
                %path, cause,
                "the journal is damaged: a new one is begun, and each Varnish gets one ban of everything before it serves"
            ),
        }
    }
}

/// A current problem of a journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The problem with its path, for people.
    pub reason: String,
    /// Purges are refused because of it. Otherwise they are durable elsewhere.
    pub refuses: bool,
}

/// Why a write failed. Nothing of it was accepted, and the next attempt starts afresh.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    /// The store reported an error. All purges of the same commit share it.
    #[error("the journal could not be written")]
    Failed(#[source] Arc<dyn Error + Send + Sync>),
    /// The store does not answer. If it answers later, the pending write is carried out all the same: an extra purge only
    /// drops a page too many. Later writes are refused at once, and not carried out.
    #[error("no answer from {} for {:.1} s", path.display(), after.as_secs_f64())]
    Hung {
        /// The file.
        path: Arc<Path>,
        /// The time since the request.
        after: Duration,
    },
    /// The writer is gone: the process is shutting down, or the writer has panicked.
    #[error("the journal no longer takes anything")]
    Closed,
}

/// The ordered list of purges. Used as `Arc<dyn Journal>`; dropping the last handle completes pending writes.
/// Implementations differ in how entries are written, and share how they are read.
pub trait Journal: Send + Sync + 'static {
    /// The part in memory, which answers all reads.
    fn readable(&self) -> &Readable;

    /// Accepts a purge. Resolves with its position once it is durable and readable.
    ///
    /// The future may be dropped: a purge that has entered the queue (at the first poll, unless the queue is full) is
    /// committed in any case.
    ///
    /// # Errors [`WriteError`]: the purge was not accepted, no position was used up, and head did not move.
    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>>;

    /// Saves cursors, and keeps those of other nodes. A node whose cursor was not saved for [`Limits::retention`] is
    /// forgotten, so the unchanged cursors of current nodes must be saved, too.
    ///
    /// # Errors [`WriteError`]: the older cursors stay valid, and a restart replays more.
    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>>;

    /// Marks these purges as refused to their senders. Valid in memory at once, even on an error; durable when this
    /// resolves. A later process assumes that a purge without a mark was answered as done. So a lost mark breaks no promise,
    /// but empties the cache of a node that refuses the purge.
    ///
    /// # Errors [`WriteError`]: a later process may not know of it.
    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>>;

    /// Notes tags that no seal shows ([`crate::seal::UnsealableTags`]); resolves when they are durable.
    ///
    /// # Errors
    /// [`WriteError`]: the next process may not know of them.
    fn note_unsealable(&self, names: Vec<Name>) -> BoxFuture<'_, Result<(), WriteError>>;

    /// The current problem, without waiting.
    fn trouble(&self) -> Option<Trouble> {
        None
    }

    /// The known progress of a node whose cache has this epoch.
    fn remembered(&self, node: &NodeId, epoch: Option<&str>) -> CursorState {
        self.cursors().remove(node).map_or(CursorState::Unknown, |cursor| cursor.remembered(epoch))
    }

    /// Whether the cache of this node, with this epoch, relies on seals, as was saved with its cursor.
    fn relies_on_seals(&self, node: &NodeId, epoch: Option<&str>) -> bool {
        self.cursors().remove(node).is_some_and(|cursor| cursor.relies(epoch))
    }

    /// The last durable position; 0 before the first.
    fn head(&self) -> Position {
        self.readable().tail.head()
    }

    /// The head, to wait for its moves.
    fn watch(&self) -> watch::Receiver<Position> {
        self.readable().tail.watch()
    }

    /// The entries after `cursor`. Consistent: the last entry is the head at that moment.
    fn since(&self, cursor: Position) -> Missed {
        self.readable().tail.since(cursor)
    }

    /// All entries after this position can be replayed, and none up to it.
    fn floor(&self) -> Position {
        self.readable().tail.floor()
    }

    /// The backlog of `cursor`.
    fn lag(&self, cursor: Position) -> Lag {
        self.readable().tail.lag(cursor)
    }

    /// The last position that is older than this; if all held entries are younger, the position before the oldest.
    fn older_than(&self, age: Duration) -> Position {
        self.readable().tail.older_than(age, self.now_ms())
    }

    /// Whether a purge that is no longer held may be younger than this.
    fn may_have_dropped(&self, age: Duration) -> bool {
        self.readable().tail.may_have_dropped(age, self.now_ms())
    }

    /// The saved cursors, of this process or an earlier one.
    fn cursors(&self) -> HashMap<NodeId, Cursor> {
        self.readable().cursors.all()
    }

    /// Whether this purge was refused to its sender, if it is held.
    fn is_refused(&self, position: Position) -> bool {
        self.readable().tail.is_refused(position)
    }

    /// The newest purge that is no longer held, was not refused, and is not covered by a ban of everything (a forwarded
    /// request); 0 if there is none. Does not include purges that this journal never held.
    fn uncovered(&self) -> Position {
        self.readable().tail.uncovered()
    }

    /// Whether any promise was ever made, by this journal or one that it replaces. A journal that began [anew](Anew) has a
    /// history without entries.
    fn has_history(&self) -> bool {
        self.head() > 0
    }

    /// What the seals of answers are judged by; `None` if the file could not say what was purged before, or not note that
    /// it is used by us.
    fn purged(&self) -> Option<&Arc<PurgedNames>> {
        self.readable().tail.purged()
    }

    /// Why it does not continue the journal before it; `None` if it does.
    fn anew(&self) -> Option<&Anew> {
        self.readable().anew.as_ref()
    }

    /// The current time of the clock that dates purges, in ms since 1970.
    fn now_ms(&self) -> u64 {
        self.readable().now_ms()
    }
}

/// A journal whose purges have names, so that replicas can exchange them.
pub trait Shared: Journal {
    /// Stores purges of another replica. Resolves with the highest of their positions once all are durable and readable.
    ///
    /// # Errors [`WriteError`]: not all of them were stored.
    fn admit(&self, messages: Vec<PurgeMessage>) -> BoxFuture<'_, Result<Position, WriteError>>;

    /// The position of a held purge by its name.
    fn place_of(&self, id: &str) -> Option<Position> {
        self.readable().position_map.lock().position(id)
    }

    /// The name of a held purge.
    fn name_of(&self, position: Position) -> Option<Arc<str>> {
        self.readable().position_map.lock().name(position)
    }

    /// The position up to which other replicas find every purge without us. `None` if they know only what they are sent.
    fn in_common_up_to(&self) -> Option<Position> {
        None
    }

    /// Whether every purge is here that the shared journal held when this process began.
    fn has_caught_up(&self) -> bool {
        true
    }

    /// The etcd revision of the entry at this position.
    fn revision(&self, _position: Position) -> Option<u64> {
        None
    }

    /// The number of purges that are not in etcd yet. `None` if there is no etcd.
    fn spooled(&self) -> Option<usize> {
        None
    }
}

/// The wall clock in milliseconds since 1970, as an argument so that tests can set it.
pub(crate) type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

fn wall_clock() -> Clock {
    Arc::new(clock::now_ms)
}
