//! The ordered, durable list of purges, and how far each Varnish has come in it.
//!
//! A purge is *accepted* when it is in the journal, not when a Varnish has heard of it: [`Journal::append`] resolves
//! once the purge would survive `kill -9`, and everything after that may take as long as a hung node makes it take.
//! So there is no queue per Varnish that could fill or be lost; a delivery is a cursor (a number) that walks along.
//!
//! Four decisions shape it:
//!
//! - **Readers never wait for a disk or a network.** What can be replayed is a bounded tail in memory; the store
//!   behind it is read once, at the start. A purge becomes readable, then head moves, then its sender is answered:
//!   whoever was woken by [`Journal::watch`] finds what it was woken for.
//! - **A cursor that is too old is no error.** It is [`Missed::Truncated`], and the caller sends one ban of everything.
//!   That is why the tail may be bounded at all: too much dropped is slow, too little is wrong.
//! - **What is marked is the exception.** Of a purge that nodes refused to its sender a mark is made durable before the
//!   answer; any other one counts as answered as done. So a purge pays for no second fsync, and whatever is lost in a crash is
//!   lost to the safe side. Each journal marks for itself: the one in memory until its process ends, that in etcd on this
//!   machine, as replicas tell each other.
//! - **A cursor that is too low is harmless** (bans are idempotent), so cursors are saved lazily, and only purges pay
//!   for an fsync.

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

pub use disk::{Damage, Disk, FILES_COMMAND, OpenError, Settings, serve_files};
pub use etcd::{Etcd, PurgeMessage};
pub use memory::Memory;
pub use named::{Named, NamedStore};
pub use readable::Readable;

/// A place in the journal; 0 is before the first. Positions grow, not always by one, and none is given twice.
pub type Position = u64;

/// Is told of each purge when it is durable, and before any reader of the journal can see it. Blocks the writer.
pub type PurgeObserver = Arc<dyn Fn(&Entry) + Send + Sync>;

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One purge and its place. Stored as JSON, so that an operator can read what was accepted and when; the position is
/// the key under which it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place.
    #[serde(skip)]
    pub position: Position,
    /// When it was accepted, in milliseconds since 1970. By the wall clock, so it may go backwards from one entry to
    /// the next; only retention looks at it.
    #[serde(rename = "at")]
    pub at_ms: u64,
    /// What is to go.
    pub purge: Purge,
    /// Its name among replicas, where there are any.
    #[serde(skip)]
    pub origin: Option<EntryOrigin>,
}

impl Entry {
    /// Reads an entry that was stored, here or in etcd. What this version cannot understand may be a purge of anything
    /// (a later version knows more kinds), so it is one of everything, and the error says why; where not even its time
    /// can be read, it is `now_ms`. Fields that are not known are passed over.
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

/// What an entry is called where several journals hold the same purges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryOrigin {
    /// Its name, the same in all of them.
    pub id: Arc<str>,
    /// When it came to be in etcd, as far as was known when it was appended here. Where it is not there yet, it is on its
    /// way.
    pub revision: Option<u64>,
    /// It was accepted by this process.
    pub ours: bool,
}

/// How far a Varnish has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// It has acknowledged every purge up to here.
    pub position: Position,
    /// The life of its cache in which it did, where somebody says.
    pub epoch: Option<Arc<str>>,
}

impl Cursor {
    /// What this cursor says of a cache that lives its life of this epoch.
    fn remembered(self, epoch: Option<&str>) -> CursorState {
        if is_another_life(self.epoch.as_deref(), epoch) {
            CursorState::CacheRestarted
        } else {
            CursorState::At(self.position)
        }
    }
}

/// What a journal knows of a Varnish that it meets again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CursorState {
    /// It had acknowledged every purge up to here.
    At(Position),
    /// It was here in another life: its cache began empty since.
    CacheRestarted,
    /// Nothing.
    Unknown,
}

/// How much lies after a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lag {
    /// How many purges; where the journal no longer holds all of them, those that it holds.
    pub entries: usize,
    /// When the oldest of them was accepted, in milliseconds since 1970. `None` where it is no longer held.
    pub oldest_ms: Option<u64>,
}

/// What lies after a cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missed {
    /// Everything after the cursor up to the head, in order. Empty when the cursor is at the head.
    Entries(Vec<Arc<Entry>>),
    /// The journal cannot say: it no longer holds all of it, or the cursor is of another journal.
    Truncated,
}

/// How much can be replayed. Whichever limit is reached first, the oldest entries go.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long an entry is kept, and how long the cursor of a node that is no longer saved.
    pub retention: Duration,
    /// How many entries are held.
    pub max_entries: usize,
    /// How much memory the entries may take, in bytes, as near as it can be told.
    pub max_bytes: usize,
}

impl Default for Limits {
    /// An hour, and what a shop does not reach in it.
    fn default() -> Self {
        Limits { retention: Duration::from_secs(3600), max_entries: 100_000, max_bytes: 64 << 20 }
    }
}

impl Limits {
    /// Whether what was written at `at_ms` has been kept long enough. A time in the future (the clock was set back)
    /// counts as now: better to keep it too long than to lose it.
    fn retires(&self, at_ms: u64, now_ms: u64) -> bool {
        u128::from(now_ms.saturating_sub(at_ms)) > self.retention.as_millis()
    }
}

/// Why a journal does not go on where the one before it ended. What a Varnish has of the purges before is not known then,
/// so that each of them gets a ban of everything before it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anew {
    /// Nothing is there, and nothing says that there was.
    FirstStart,
    /// It ended with the process before this one.
    Memory,
    /// It is gone. Why that is known.
    Lost(String),
    /// What is there is not what was there. Why that is known.
    Replaced(String),
    /// It cannot be read, or not in full. What is wrong with which file.
    Damaged(String),
}

impl Anew {
    /// Every [`reason`](Anew::reason).
    pub const REASONS: [&'static str; 5] = ["first_start", "memory", "lost", "replaced", "damaged"];

    /// In a word, for metrics and names of files.
    pub fn reason(&self) -> &'static str {
        match self {
            Anew::FirstStart => "first_start",
            Anew::Memory => "memory",
            Anew::Lost(_) => "lost",
            Anew::Replaced(_) => "replaced",
            Anew::Damaged(_) => "damaged",
        }
    }

    /// Says it, once, at the start. `path`: where the journal is.
    fn log(&self, path: &Path) {
        let path = path.display();
        match self {
            Anew::FirstStart => tracing::info!(
                %path,
                "there is no journal yet: each Varnish of which nobody knows how far it is gets one ban of everything before \
                 it serves, as it may hold pages that were purged before (journal.first_start)"
            ),
            Anew::Memory => tracing::warn!(
                "the journal is in memory: what was purged before this start is not known, so each Varnish gets one ban \
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

/// Why a journal does not work as it should at present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What is wrong, with the path, for people.
    pub reason: String,
    /// Purges are refused for it. Otherwise they are durable elsewhere.
    pub refuses: bool,
}

/// Why something was not written. Nothing of it was accepted, and the next attempt starts afresh.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    /// The store refused. Every purge that was to be committed together carries the same source.
    #[error("the journal could not be written")]
    Failed(#[source] Arc<dyn Error + Send + Sync>),
    /// The store does not answer. What was being written then is carried out all the same once it answers and has it:
    /// a purge that nobody relies on drops a page too many. What comes later is refused at once and for good.
    #[error("no answer from {} for {:.1} s", path.display(), after.as_secs_f64())]
    Hung {
        /// The file.
        path: Arc<Path>,
        /// Since it was asked.
        after: Duration,
    },
    /// The writer is gone: the process is shutting down, or the writer has panicked.
    #[error("the journal no longer takes anything")]
    Closed,
}

/// The ordered list of purges. Used as `Arc<dyn Journal>`; dropping the last handle finishes what was begun. A kind of journal
/// says how something gets in; what is in it is read in one way.
pub trait Journal: Send + Sync + 'static {
    /// What it has in memory, from which everything that is asked is answered.
    fn readable(&self) -> &Readable;

    /// Accepts a purge; resolves with its position once it is durable and readable.
    ///
    /// The future may be dropped: a purge that has been taken into the queue (with the first poll, unless the queue
    /// is full) is committed whether or not anybody waits for it.
    ///
    /// # Errors
    /// [`WriteError`]: the purge was not accepted, no position was used up, and head did not move.
    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>>;

    /// Saves cursors beside those that are saved already. A node whose cursor was not saved for
    /// [`Limits::retention`] is forgotten, so the unchanged cursors of registered nodes are to be saved too.
    ///
    /// # Errors
    /// [`WriteError`]: the older cursors stand, and a restart replays more.
    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>>;

    /// Notes that the senders of these purges were told that nodes do not take them. Holds at once, also where it cannot be
    /// made durable; it is durable when this resolves. Of an unmarked purge a process after this one believes that it was
    /// answered as done: a mark that is lost costs a node that does not take the purge its cache, and no promise.
    ///
    /// # Errors
    /// [`WriteError`]: the next process may not know of it.
    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>>;

    /// What is wrong with it at present, asked without waiting.
    fn trouble(&self) -> Option<Trouble> {
        None
    }

    /// What is known of a node whose cache lives its life of this epoch.
    fn remembered(&self, node: &NodeId, epoch: Option<&str>) -> CursorState {
        self.cursors().remove(node).map_or(CursorState::Unknown, |cursor| cursor.remembered(epoch))
    }

    /// The last durable position; 0 while there is none.
    fn head(&self) -> Position {
        self.readable().tail.head()
    }

    /// The head, for waiting until it moves.
    fn watch(&self) -> watch::Receiver<Position> {
        self.readable().tail.watch()
    }

    /// What lies after `cursor`. Asked and answered at one moment: the last entry is the head of that moment.
    fn since(&self, cursor: Position) -> Missed {
        self.readable().tail.since(cursor)
    }

    /// Everything after this is held and can be replayed; of what lies before, nothing is.
    fn floor(&self) -> Position {
        self.readable().tail.floor()
    }

    /// How much lies after `cursor`.
    fn lag(&self, cursor: Position) -> Lag {
        self.readable().tail.lag(cursor)
    }

    /// The last position that was given longer ago than this; the one before the oldest entry held where all are younger.
    fn older_than(&self, age: Duration) -> Position {
        self.readable().tail.older_than(age, self.now_ms())
    }

    /// The cursors as they were last saved here, in this process or before it.
    fn cursors(&self) -> HashMap<NodeId, Cursor> {
        self.readable().cursors.all()
    }

    /// Whether the sender of this purge was told that nodes do not take it, as far as it is held.
    fn is_refused(&self, position: Position) -> bool {
        self.readable().tail.is_refused(position)
    }

    /// The newest purge that is not held any more, was not refused to its sender, and that a ban of everything may leave (a
    /// request that was handed on as it came); 0 if there is none. What this journal never held is not in it.
    fn uncovered(&self) -> Position {
        self.readable().tail.uncovered()
    }

    /// Whether anything was ever promised, by this journal or by one that it took the place of. One without history has
    /// promised nothing to anybody; one that began [anew](Anew) has a history, of which it holds nothing.
    fn has_history(&self) -> bool {
        self.head() > 0
    }

    /// Why it does not go on where the journal before it ended; `None` where it does.
    fn anew(&self) -> Option<&Anew> {
        self.readable().anew.as_ref()
    }

    /// The time by the clock that dates purges, in ms since 1970.
    fn now_ms(&self) -> u64 {
        self.readable().now_ms()
    }
}

/// A journal whose purges have names, so that replicas can tell each other of them.
pub trait Shared: Journal {
    /// Takes in what another replica tells of; resolves with the last of their places once all are durable and readable.
    ///
    /// # Errors
    /// [`WriteError`]: not all of them were taken in.
    fn admit(&self, told: Vec<PurgeMessage>) -> BoxFuture<'_, Result<Position, WriteError>>;

    /// The place of a purge by its name, while it is held.
    fn place_of(&self, id: &str) -> Option<Position> {
        self.readable().position_map().position(id)
    }

    /// The name of the purge at this position, while it is held.
    fn name_of(&self, position: Position) -> Option<Arc<str>> {
        self.readable().position_map().name(position)
    }

    /// Up to where the other replicas find every purge without us. `None` where they know only what they are told.
    fn in_common_up_to(&self) -> Option<Position> {
        None
    }

    /// Where in etcd the entry at this position is.
    fn revision(&self, _position: Position) -> Option<u64> {
        None
    }

    /// How many purges are not in etcd yet. `None` where they need not get there.
    fn spooled(&self) -> Option<usize> {
        None
    }
}

/// The wall clock in milliseconds since 1970, as an argument so that tests can turn it.
pub(crate) type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

fn wall_clock() -> Clock {
    Arc::new(clock::now_ms)
}
