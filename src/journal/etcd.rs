//! A journal that all replicas share in etcd, with a copy of its tail on this machine.
//!
//! ```text
//! append ──> etcd (one write) ──────────────┐ watch, in etcd's order
//!    └─ no answer in time ──> spool ────────┴──> the local journal (fsync) ──> tail, observer, head
//!                               └── uploaded when etcd is back
//! ```
//!
//! **Reads use the local journal.** It is a complete [`Disk`] with its own order and head, and deliveries and the fence work
//! on it as usual. Only its input is shared. So there is no second engine for the time without etcd, nor for the return: a
//! purge that is only here is an entry like any other, and a restart without etcd begins with all that this process knew.
//!
//! **A purge has a name**, which is its key in etcd. It may arrive as the answer to a write, by the watch, directly from
//! another replica, from a list after a restart, or from our own spool. It is appended once, and written to etcd only if the
//! key is missing. So a write without an answer is simply repeated.
//!
//! **A position is the revision of its entry** as long as entries arrive in etcd's order, for which an accepting replica
//! waits a moment. Otherwise (etcd is away, a backup was restored) positions simply increase, and
//! [`PositionMap`](super::position_map::PositionMap) translates.
//!
//! **Entries expire by time, and leave a mark.** Each replica dates an entry by its own clock on arrival, because the clocks
//! of two machines may differ by anything. A replica that deletes entries writes the last deleted revision to `purges/floor`
//! in the same transaction. A replica that was away for so long that it may have missed one sees this mark, and treats
//! everything before it as a gap.

mod cursors;
mod retention;
mod sync;
#[cfg(test)]
mod tests;
mod unchanged;
mod uplink;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::disk::NamedPurge;
use super::{
    Anew, BoxFuture, Clock, Cursor, CursorState, Disk, EntryOrigin, Journal, Limits, OpenError, Position, Readable,
    Settings, Shared, Trouble, WriteError, wall_clock,
};
use crate::etcd::SharedEtcd;
use crate::etcd::follow::{WatchStatus, follow};
use crate::fleet::NodeId;
use crate::purge::Purge;
use crate::seal::Name;
use cursors::Published;
use uplink::Uplink;

/// The prefix of the journal's keys, and below it the mark of deleted entries.
const PURGES: &str = "purges/";
const FLOOR: &str = "floor";

/// The maximum wait for etcd at the start, which then continues with the local part.
const START: Duration = Duration::from_secs(3);

/// The maximum wait for the watch to deliver an entry in its order.
const IN_ORDER: Duration = Duration::from_millis(100);

/// The maximum number of updates that wait to be applied.
const UPDATES: usize = 64;

/// A journal in etcd.
pub struct Etcd {
    inner: Arc<Inner>,
    /// Everything that was in etcd is here.
    synced: watch::Receiver<bool>,
    /// Aborted with this value. Pending writes of the local journal are completed.
    _tasks: JoinSet<()>,
}

/// The state shared by the tasks.
struct Inner {
    local: Disk,
    names: Names,
    uplink: Uplink,
    published: Published,
    limits: Limits,
    etcd: SharedEtcd,
    link: Arc<WatchStatus>,
    /// The last position of a purge that was in etcd before our watch began.
    answered: watch::Sender<Position>,
}

/// A purge in a message between replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeMessage {
    /// Its name.
    pub id: String,
    /// Its revision, if it is in etcd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// When it was accepted, in milliseconds since 1970.
    #[serde(rename = "at")]
    pub at_ms: u64,
    /// The purge. If this version does not know its kind, it becomes one of everything, as in the journal.
    #[serde(deserialize_with = "purge_or_everything")]
    pub purge: Purge,
}

fn purge_or_everything<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Purge, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Read {
        Known(Purge),
        Unknown(IgnoredAny),
    }
    Ok(match Read::deserialize(deserializer)? {
        Read::Known(purge) => purge,
        Read::Unknown(IgnoredAny) => {
            tracing::warn!("a purge of another replica is unknown to this version: it counts as one of everything");
            Purge::everything()
        }
    })
}

/// Generates the names of this process's purges, sorted by time.
#[derive(Debug)]
pub(super) struct Names {
    /// Random, so that two processes with one configuration differ.
    process: u64,
    count: AtomicU64,
}

impl Names {
    /// A generator for a new process.
    pub(super) fn new() -> Self {
        Names { process: fastrand::u64(..), count: AtomicU64::new(0) }
    }

    /// The name for a purge that is accepted now.
    pub(super) fn next(&self, at_ms: u64) -> Arc<str> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{at_ms:012x}-{:016x}-{count:x}", self.process).into()
    }

    fn are_ours(&self, id: &str) -> bool {
        id.split('-').nth(1).and_then(|process| u64::from_str_radix(process, 16).ok()) == Some(self.process)
    }
}

impl Etcd {
    /// Opens the local part in the directory `path`, and waits briefly for the content of etcd.
    ///
    /// # Errors [`OpenError`] if the local journal cannot be opened. An unreachable etcd is not an error.
    pub async fn open(path: &Path, settings: Settings, etcd: SharedEtcd) -> Result<Self, OpenError> {
        Etcd::open_with(path, settings, etcd, wall_clock()).await
    }

    async fn open_with(path: &Path, settings: Settings, etcd: SharedEtcd, clock: Clock) -> Result<Self, OpenError> {
        let limits = settings.limits;
        let link = WatchStatus::new("journal");
        let inner = Arc::new(Inner {
            local: Disk::open_with_clock(path, settings, clock).await?,
            names: Names::new(),
            uplink: Uplink::new(Arc::clone(&etcd)),
            published: Published::default(),
            limits,
            etcd: Arc::clone(&etcd),
            link: Arc::clone(&link),
            answered: watch::Sender::new(0),
        });
        let (updates_sender, updates) = mpsc::channel(UPDATES);
        let (synced_sender, mut synced) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(follow(Arc::clone(&etcd), etcd.key(PURGES), link, updates_sender));
        tasks.spawn(sync::run(Arc::clone(&inner), updates, synced_sender));
        tasks.spawn(uplink::run(Arc::clone(&inner)));
        tasks.spawn(cursors::run(Arc::clone(&inner)));
        tasks.spawn(retention::run(Arc::clone(&inner)));
        if tokio::time::timeout(START, synced.wait_for(|synced| *synced)).await.is_err() {
            tracing::warn!(
                head = inner.local.head(),
                "etcd has not given the journal in time: it starts with its local part"
            );
        }
        Ok(Etcd { inner, synced, _tasks: tasks })
    }

    /// The last position of a purge that was in etcd before our watch began, to wait for its moves: such a purge was
    /// answered, or is about to be, by the replica that accepted it. Purges that arrive by the watch are not included.
    pub fn answered(&self) -> watch::Receiver<Position> {
        self.inner.answered.subscribe()
    }
}

impl Inner {
    /// Accepts a purge: in etcd if that answers in time, otherwise in the spool.
    async fn accept(&self, purge: Purge) -> Result<Position, WriteError> {
        let at_ms = self.local.now_ms();
        let id = self.names.next(at_ms);
        let revision = self.uplink.put(&id, at_ms, &purge).await;
        self.link.expect(i64::try_from(revision.unwrap_or(0)).unwrap_or(i64::MAX));
        if revision.is_some()
            && let Ok(position) = tokio::time::timeout(IN_ORDER, self.comes_by_watch(&id)).await
        {
            return Ok(position);
        }
        let origin = EntryOrigin { id, revision, ours: true };
        let position = self.local.append_named(NamedPurge { origin, at_ms, purge, in_order: false }).await?;
        if revision.is_none() {
            self.uplink.tell_spooled();
            self.uplink.look_again();
        }
        Ok(position)
    }

    /// Stores purges of another replica; see [`Shared::admit`].
    async fn admit(&self, messages: Vec<PurgeMessage>) -> Result<Position, WriteError> {
        let in_order = async {
            for PurgeMessage { id, revision, .. } in &messages {
                if revision.is_some() {
                    self.comes_by_watch(id).await;
                }
            }
        };
        // One timeout for all of them.
        _ = tokio::time::timeout(IN_ORDER, in_order).await;
        // Dated by our own clock, which also decides its retention. The sender's clock may differ by anything.
        let at_ms = self.local.now_ms();
        let named = messages.into_iter().map(|PurgeMessage { id, revision, purge, .. }| NamedPurge {
            origin: EntryOrigin { id: id.into(), revision, ours: false },
            at_ms,
            purge,
            in_order: false,
        });
        let positions = self.local.append_all(named.collect()).await?;
        self.uplink.look_again();
        Ok(positions.into_iter().max().unwrap_or(0))
    }

    /// Whether purges may be lost that were durable only here. Then the cursors in etcd say nothing about those. A first
    /// start has lost none.
    fn lost_its_spool(&self) -> bool {
        matches!(self.local.anew(), Some(Anew::Lost(_) | Anew::Replaced(_) | Anew::Damaged(_)))
    }

    /// Returns the position of this purge once it is readable.
    async fn comes_by_watch(&self, id: &str) -> Position {
        let mut head = self.local.watch();
        loop {
            let now = *head.borrow_and_update();
            // The position map has it a moment before it is readable.
            if let Some(position) =
                self.local.readable().position_map.lock().position(id).filter(|position| *position <= now)
            {
                return position;
            }
            if head.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

impl Shared for Etcd {
    fn admit(&self, messages: Vec<PurgeMessage>) -> BoxFuture<'_, Result<Position, WriteError>> {
        Box::pin(self.inner.admit(messages))
    }

    fn in_common_up_to(&self) -> Option<Position> {
        let head = self.inner.local.head();
        let missing = self.inner.local.readable().position_map.lock().missing();
        Some(missing.first().map_or(head, |(position, _)| head.min(position - 1)))
    }

    fn has_caught_up(&self) -> bool {
        *self.synced.borrow()
    }

    fn revision(&self, position: Position) -> Option<u64> {
        self.inner.local.readable().position_map.lock().revision(position)
    }

    fn spooled(&self) -> Option<usize> {
        Some(self.inner.local.readable().position_map.lock().missing().len())
    }
}

impl Journal for Etcd {
    fn readable(&self) -> &Readable {
        self.inner.local.readable()
    }

    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        let inner = Arc::clone(&self.inner);
        // In a task, so that it continues if the caller stops waiting.
        let accepted = tokio::spawn(async move { inner.accept(purge).await });
        Box::pin(async move { accepted.await.unwrap_or(Err(WriteError::Closed)) })
    }

    /// The higher of our cursor and that of other replicas, as both are valid.
    fn remembered(&self, node: &NodeId, epoch: Option<&str>) -> CursorState {
        let here = self.inner.local.remembered(node, epoch);
        if self.inner.lost_its_spool() {
            return here;
        }
        let elsewhere = self.inner.published.remembered(node, epoch, |revision| {
            self.inner.local.readable().position_map.lock().covering(revision, self.inner.local.head())
        });
        match (here, elsewhere) {
            (CursorState::At(here), CursorState::At(elsewhere)) => CursorState::At(here.max(elsewhere)),
            (CursorState::At(position), _) | (_, CursorState::At(position)) => CursorState::At(position),
            (CursorState::CacheRestarted, _) | (_, CursorState::CacheRestarted) => CursorState::CacheRestarted,
            (CursorState::Unknown, CursorState::Unknown) => CursorState::Unknown,
        }
    }

    /// If we or another replica has found so.
    fn relies_on_seals(&self, node: &NodeId, epoch: Option<&str>) -> bool {
        self.inner.local.relies_on_seals(node, epoch) || self.inner.published.relies_on_seals(node, epoch)
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.inner.published.offer(&cursors);
        self.inner.local.save_cursors(cursors)
    }

    /// On this machine only: etcd stores purges, and each replica stores the answers.
    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.inner.local.refuse(positions)
    }

    fn note_unsealable(&self, names: Vec<Name>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.inner.local.note_unsealable(names)
    }

    /// A purge in etcd does not need our disk.
    fn trouble(&self) -> Option<Trouble> {
        let trouble = self.inner.local.trouble()?;
        Some(Trouble { refuses: self.inner.uplink.session().is_none(), ..trouble })
    }
}
