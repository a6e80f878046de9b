//! A journal that all replicas share, in etcd, with a copy of its end on this machine.
//!
//! ```text
//! append ──> etcd (one write) ──────────────┐ watch, in etcd's order
//!    └─ no answer in time ──> spool ────────┴──> the local journal (fsync) ──> tail, observer, head
//!                               └── uploaded when etcd is back
//! ```
//!
//! **The local journal is the one that is read.** It is [`Disk`], whole: its own order, its own head, the same deliveries
//! and the same fence on top of it. What is shared is what goes into it. So there is no second engine for the time when
//! etcd is away, and none for the way back: a purge that is only here is an entry like any other, and a restart without
//! etcd starts with all that this process knew.
//!
//! **A purge has a name**, which is its key in etcd. It may come in by its answer, by the watch, from another replica that
//! tells of it directly, from a list after a restart, and from our own spool; it is appended once, and written to etcd only
//! where there is no such key. So nothing has to be known about a write that got no answer: it is simply done again.
//!
//! **A position is the revision of its entry** as long as entries come in etcd's order, which is what an accepting replica
//! waits for a moment. Where that cannot be had (etcd is away, a backup was restored) positions go on growing by
//! themselves, and [`PositionMap`](super::position_map::PositionMap) translates.
//!
//! **Entries go by time, and leave a mark**: each replica dates them by its own clock when they come to it, because the
//! clocks of two machines may differ by anything. Whoever deletes them writes the last deleted revision to `purges/floor`
//! in the same transaction. A replica that was away for so long that it may have missed one sees the mark, and everything
//! before it is a gap.

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
use cursors::Published;
use uplink::Uplink;

/// The keys of the journal, and within them the mark of what was deleted.
const PURGES: &str = "purges/";
const FLOOR: &str = "floor";

/// How long the start waits for what etcd has. Then it goes on with what is here.
const START: Duration = Duration::from_secs(3);

/// How long an entry that is in etcd is waited for on the watch, so that it comes in its order.
const IN_ORDER: Duration = Duration::from_millis(100);

/// Changes that may wait to be taken in.
const UPDATES: usize = 64;

/// A journal in etcd.
pub struct Etcd {
    inner: Arc<Inner>,
    /// Aborted with this value. What they have begun with the local journal is finished by it.
    _tasks: JoinSet<()>,
}

/// What the tasks share.
struct Inner {
    local: Disk,
    names: Names,
    uplink: Uplink,
    published: Published,
    limits: Limits,
    etcd: SharedEtcd,
    link: Arc<WatchStatus>,
    /// The last position of a purge that was in etcd before our watch was.
    answered: watch::Sender<Position>,
}

/// A purge as one replica tells another one of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeMessage {
    /// Its name.
    pub id: String,
    /// Its revision, where it is in etcd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// When it was accepted, in milliseconds since 1970.
    #[serde(rename = "at")]
    pub at_ms: u64,
    /// What is to go. One that only a later version knows is one of everything, as in the journal.
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
            tracing::warn!(
                "another replica tells of a purge that this version does not know: it counts as one of everything"
            );
            Purge::everything()
        }
    })
}

/// Names for the purges of this process: by time, so that the oldest come first.
#[derive(Debug)]
pub(super) struct Names {
    /// Drawn at random: two processes with one configuration must not meet.
    process: u64,
    count: AtomicU64,
}

impl Names {
    /// Of a process that has given none yet.
    pub(super) fn new() -> Self {
        Names { process: fastrand::u64(..), count: AtomicU64::new(0) }
    }

    /// The next one, for a purge that was accepted now.
    pub(super) fn next(&self, at_ms: u64) -> Arc<str> {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        format!("{at_ms:012x}-{:016x}-{count:x}", self.process).into()
    }

    fn are_ours(&self, id: &str) -> bool {
        id.split('-').nth(1).and_then(|process| u64::from_str_radix(process, 16).ok()) == Some(self.process)
    }
}

impl Etcd {
    /// Opens the local part in the directory `path`, and takes in what etcd has; waits a moment for that, and no longer.
    ///
    /// # Errors
    /// [`OpenError`], of the local part. An etcd that cannot be had is none.
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
                "etcd does not answer: the journal starts with what is on this machine"
            );
        }
        Ok(Etcd { inner, _tasks: tasks })
    }

    /// The last position of a purge that had been in etcd before we could see it, for waiting until it moves: whoever
    /// accepted that has answered it, or is about to. What comes while we watch is not among them.
    pub fn answered(&self) -> watch::Receiver<Position> {
        self.inner.answered.subscribe()
    }
}

impl Inner {
    /// Accepts a purge: in etcd where that can be had in time, else in the spool.
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
            self.uplink.look_again();
        }
        Ok(position)
    }

    /// Takes in what another replica tells of, as [`Shared::admit`].
    async fn admit(&self, told: Vec<PurgeMessage>) -> Result<Position, WriteError> {
        let in_order = async {
            for PurgeMessage { id, revision, .. } in &told {
                if revision.is_some() {
                    self.comes_by_watch(id).await;
                }
            }
        };
        // All together as long as one.
        _ = tokio::time::timeout(IN_ORDER, in_order).await;
        // Dated by our clock, by which it will retire here: that of its sender may say anything.
        let at_ms = self.local.now_ms();
        let named = told.into_iter().map(|PurgeMessage { id, revision, purge, .. }| NamedPurge {
            origin: EntryOrigin { id: id.into(), revision, ours: false },
            at_ms,
            purge,
            in_order: false,
        });
        let positions = self.local.append_all(named.collect()).await?;
        self.uplink.look_again();
        Ok(positions.into_iter().max().unwrap_or(0))
    }

    /// Whether purges may have been lost that were durable here and in no etcd: then what others know of a node says
    /// nothing about those. A replica that was never here has lost none.
    fn lost_its_spool(&self) -> bool {
        matches!(self.local.anew(), Some(Anew::Lost(_) | Anew::Replaced(_) | Anew::Damaged(_)))
    }

    /// Returns when a purge has come in, with its place.
    async fn comes_by_watch(&self, id: &str) -> Position {
        let mut head = self.local.watch();
        loop {
            let now = *head.borrow_and_update();
            // In the position_map a moment before it can be read.
            if let Some(position) =
                self.local.readable().position_map().position(id).filter(|position| *position <= now)
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
    fn admit(&self, told: Vec<PurgeMessage>) -> BoxFuture<'_, Result<Position, WriteError>> {
        Box::pin(self.inner.admit(told))
    }

    fn in_common_up_to(&self) -> Option<Position> {
        let head = self.inner.local.head();
        let missing = self.inner.local.readable().position_map().missing();
        Some(missing.first().map_or(head, |(position, _)| head.min(position - 1)))
    }

    fn revision(&self, position: Position) -> Option<u64> {
        self.inner.local.readable().position_map().revision(position)
    }

    fn spooled(&self) -> Option<usize> {
        Some(self.inner.local.readable().position_map().missing().len())
    }
}

impl Journal for Etcd {
    fn readable(&self) -> &Readable {
        self.inner.local.readable()
    }

    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        let inner = Arc::clone(&self.inner);
        // On its own: it goes on when nobody waits for it any more.
        let accepted = tokio::spawn(async move { inner.accept(purge).await });
        Box::pin(async move { accepted.await.unwrap_or(Err(WriteError::Closed)) })
    }

    /// What was acknowledged to us, or to another replica, whichever is further: both are true.
    fn remembered(&self, node: &NodeId, epoch: Option<&str>) -> CursorState {
        let here = self.inner.local.remembered(node, epoch);
        if self.inner.lost_its_spool() {
            return here;
        }
        let elsewhere = self.inner.published.remembered(node, epoch, |revision| {
            self.inner.local.readable().position_map().covering(revision, self.inner.local.head())
        });
        match (here, elsewhere) {
            (CursorState::At(here), CursorState::At(elsewhere)) => CursorState::At(here.max(elsewhere)),
            (CursorState::At(position), _) | (_, CursorState::At(position)) => CursorState::At(position),
            (CursorState::CacheRestarted, _) | (_, CursorState::CacheRestarted) => CursorState::CacheRestarted,
            (CursorState::Unknown, CursorState::Unknown) => CursorState::Unknown,
        }
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.inner.published.offer(&cursors);
        self.inner.local.save_cursors(cursors)
    }

    /// On this machine: etcd says what was purged, and each replica how it was answered.
    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.inner.local.refuse(positions)
    }

    /// What etcd takes needs no disk here.
    fn trouble(&self) -> Option<Trouble> {
        let trouble = self.inner.local.trouble()?;
        Some(Trouble { refuses: self.inner.uplink.session().is_none(), ..trouble })
    }
}
