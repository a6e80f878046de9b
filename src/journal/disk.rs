//! A journal that outlives its process.
//!
//! An fsync costs from a tenth of a millisecond to many, and Magento's purges come in storms. So there is one writer,
//! a thread of its own because fsync blocks, and it commits **in groups**: whatever gathered while the last commit
//! was on its way goes into the next one. A single purge pays one fsync, a storm shares them, and nobody waits
//! longer for company. The order in the file, the order of positions and the order in the tail are one order, because
//! one thread makes all three.
//!
//! The file holds what the tail holds and is read only at the start. What the tail drops, the next commits delete.
//!
//! It is also what a journal in etcd ([`super::Etcd`]) keeps on this machine: then entries have names, an entry that is
//! here already is not appended twice, and one that is safe in etcd is taken even where the disk is full.

mod change;
mod committer;
mod condition;
mod error;
mod file;
mod group;
mod load;
mod marker;
mod opening;
mod process;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::cursors::Cursors;
use super::tail::Tail;
use super::{
    BoxFuture, Clock, Cursor, EntryOrigin, Journal, Limits, Position, PurgeObserver, Readable, Trouble, WriteError,
    wall_clock,
};
use crate::config::{Damaged, FirstStart};
use crate::fleet::NodeId;
use crate::purge::Purge;
use committer::Committer;
use condition::Condition;
use file::{Files, LocalFiles};
use group::Command;
use process::RemoteFiles;
use writer::Writer;

pub use error::{Damage, OpenError};
pub use process::{COMMAND as FILES_COMMAND, serve as serve_files};

/// How many purges may wait for the next commit; more wait for a place in the queue, in their own tasks.
const QUEUE: usize = 1024;

/// How long the end waits for the last commit. A disk that hangs is left behind.
const CLOSING: Duration = Duration::from_secs(2);

/// How a journal on disk is opened.
#[derive(Clone)]
pub struct Settings {
    /// How much of it can be replayed.
    pub limits: Limits,
    /// Is told of every purge before a reader is.
    pub observer: PurgeObserver,
    /// What a start without any journal does.
    pub first_start: FirstStart,
    /// What a start with a journal does that cannot be read.
    pub damaged: Damaged,
    /// The files are written by a process of their own, so that a volume that hangs does not keep this one from ending.
    /// That process is this program again: only where that is clearcoat.
    pub own_process: bool,
    /// How long a commit may take before the disk counts as hung: as long as the sender of a purge is kept waiting.
    pub patience: Duration,
}

/// A journal in `<path>/journal.redb`.
pub struct Disk {
    readable: Arc<Readable>,
    condition: Arc<Condition>,
    // Dropped in this order: the closed queue is what ends the writer.
    queue: mpsc::Sender<Command>,
    _end: End,
}

/// What another journal of the same purges has, or has not.
pub(super) struct NamedPurge {
    pub(super) origin: EntryOrigin,
    /// When it was accepted.
    pub(super) at_ms: u64,
    pub(super) purge: Purge,
    /// It comes in etcd's order: everything up to its revision is here with it.
    pub(super) in_order: bool,
}

/// The end of the writer. Dropping it waits until what was queued is committed and the file is closed, and no longer
/// than [`CLOSING`].
struct End {
    path: Arc<Path>,
    /// Closed when the writer has ended. Behind a lock because it cannot be shared otherwise; nobody else looks.
    ended: Mutex<Receiver<()>>,
}

impl Disk {
    /// Opens the journal in the directory `path`, creating both where they are missing. What blocks on the disk does so
    /// elsewhere: whoever waits may stop.
    ///
    /// # Errors
    /// [`OpenError`] names the file and what is wrong with it. What is no error: see [`Journal::anew`].
    pub async fn open(path: &Path, settings: Settings) -> Result<Self, OpenError> {
        Disk::open_with_clock(path, settings, wall_clock()).await
    }

    pub(super) async fn open_with_clock(path: &Path, settings: Settings, clock: Clock) -> Result<Self, OpenError> {
        let files: Box<dyn Files> =
            if settings.own_process { Box::new(RemoteFiles::default()) } else { Box::new(LocalFiles) };
        let path = path.to_owned();
        let opened = tokio::task::spawn_blocking(move || Disk::open_with(&path, settings, clock, files)).await;
        opened.unwrap_or_else(|panicked| Err(OpenError::Thread(std::io::Error::other(panicked))))
    }

    fn open_with(path: &Path, settings: Settings, clock: Clock, files: Box<dyn Files>) -> Result<Self, OpenError> {
        let Settings { limits, observer, first_start, damaged, patience, own_process: _ } = settings;
        let now_ms = clock();
        let directory = path.to_owned();
        let (committer, stored, anew) =
            Committer::start(path, move || opening::open(&directory, limits, now_ms, files, (first_start, damaged)))?;
        let path: Arc<Path> = path.join(opening::JOURNAL).into();
        if let Some(anew) = &anew {
            anew.log(&path);
        }
        let readable = Arc::new(Readable {
            tail: Tail::new(limits, observer, stored.past, now_ms),
            cursors: Cursors::new(limits, stored.cursors),
            position_map: Mutex::new(stored.position_map),
            clock,
            anew,
        });
        let condition = Arc::new(Condition::new(Arc::clone(&path), patience));
        let (queue, commands) = mpsc::channel(QUEUE);
        let (ending, ended) = sync_channel(0);
        // A runtime of its own: a purge is not to wait for whatever else the control plane is busy with.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().map_err(OpenError::Thread)?;
        let for_writer = (Arc::clone(&readable), Arc::clone(&condition));
        let run = move || {
            let _ending = ending;
            let (readable, condition) = for_writer;
            let committer = runtime.block_on(Writer::new(committer, &readable, &condition, commands).run());
            committer.close();
        };
        thread::Builder::new().name("journal".into()).spawn(run).map_err(OpenError::Thread)?;
        Ok(Disk { readable, condition, queue, _end: End { path, ended: Mutex::new(ended) } })
    }

    /// Appends what has a name. Resolves like [`Journal::append`], with the place that it has already where it was here
    /// before; what it says of its revision is noted either way.
    pub(super) async fn append_named(&self, named: NamedPurge) -> Result<Position, WriteError> {
        self.ask(|answer| Command::AppendNamed(named, answer)).await
    }

    /// The same for many, in their order.
    pub(super) async fn append_all(&self, named: Vec<NamedPurge>) -> Result<Vec<Position>, WriteError> {
        let mut answers = Vec::with_capacity(named.len());
        for named in named {
            let (answer, answered) = oneshot::channel();
            self.queue.send(Command::AppendNamed(named, answer)).await.map_err(|_| WriteError::Closed)?;
            answers.push(answered);
        }
        let mut positions = Vec::with_capacity(answers.len());
        for answered in answers {
            positions.push(answered.await.map_err(|_| WriteError::Closed)??);
        }
        Ok(positions)
    }

    /// Notes where in etcd entries are, or that they are not there. Holds also where the disk does not take it: a process
    /// that finds none of it on the disk finds it in etcd again.
    ///
    /// # Errors
    /// [`WriteError::Closed`].
    pub(super) async fn found(&self, revisions: Vec<(Position, Option<u64>)>) -> Result<(), WriteError> {
        self.ask(|answer| Command::Found(revisions, answer)).await
    }

    /// What lies before is not known, or not all of it: everything up to the head is a gap, and so is everything up to
    /// this revision. Holds also where the disk does not take it, as `found` does.
    ///
    /// # Errors
    /// [`WriteError::Closed`].
    pub(super) async fn break_off(&self, revision: u64) -> Result<(), WriteError> {
        self.ask(|answer| Command::BreakOff(revision, answer)).await
    }

    /// Hands a command to the writer and waits for its answer.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, WriteError>>) -> Command,
    ) -> Result<T, WriteError> {
        let (answer, answered) = oneshot::channel();
        self.queue.send(command(answer)).await.map_err(|_| WriteError::Closed)?;
        answered.await.map_err(|_| WriteError::Closed)?
    }
}

impl Journal for Disk {
    fn readable(&self) -> &Readable {
        &self.readable
    }

    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        Box::pin(self.ask(|answer| Command::Append(purge, answer)))
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        Box::pin(self.ask(|answer| Command::SaveCursors(cursors, answer)))
    }

    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.readable.tail.refuse(&positions);
        Box::pin(self.ask(|answer| Command::Refuse(positions, answer)))
    }

    fn trouble(&self) -> Option<Trouble> {
        self.condition.trouble().map(|reason| Trouble { reason, refuses: true })
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let ended = self.ended.get_mut();
        if ended.recv_timeout(CLOSING) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let path = self.path.display();
            tracing::error!(%path, "the journal does not answer: it is left as it is, and verified at the next start");
        }
    }
}
