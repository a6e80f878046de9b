//! A journal that outlives its process.
//!
//! An fsync takes from a tenth of a millisecond to many, and Magento's purges come in storms. So there is one writer, on its
//! own thread because fsync blocks, and it commits **in groups**: all purges that arrive during a commit form the next
//! group. A single purge costs one fsync, the purges of a storm share them, and none waits for others to join. Entries have
//! the same order in the file, by position and in the tail, because one thread writes all three.
//!
//! The file holds the entries of the tail, and is read only at the start. Entries that the tail drops are deleted by the
//! next commits.
//!
//! It is also the local part of a journal in etcd ([`super::Etcd`]). Then entries have names, an existing entry is not
//! appended again, and an entry that is durable in etcd is appended even if the disk is full.

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
mod purged;
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
use crate::seal::Name;
use committer::Committer;
use condition::Condition;
use file::{Files, LocalFiles};
use group::Command;
use opening::StartRules;
use process::RemoteFiles;
use writer::Writer;

pub use error::{Damage, OpenError};
pub use process::{COMMAND as FILES_COMMAND, serve as serve_files};

/// The maximum number of purges in the queue for the next commit. Further purges wait to enter the queue, in their own
/// tasks.
const QUEUE: usize = 1024;

/// The maximum wait for the last commit at the end. A disk that hangs is left behind.
const CLOSING: Duration = Duration::from_secs(2);

/// The settings of a journal on disk.
#[derive(Clone)]
pub struct Settings {
    /// The limits of what can be replayed.
    pub limits: Limits,
    /// Called with every purge before it is readable.
    pub observer: PurgeObserver,
    /// What to do if there is no journal.
    pub first_start: FirstStart,
    /// What to do if the journal cannot be read.
    pub damaged: Damaged,
    /// Answers are sealed in this process, and blocks of pages noted. If not, no cache counts as sealed after it.
    pub seals: bool,
    /// Write the files from a separate process, so that a volume that hangs cannot keep this one from ending. That process
    /// runs this program, so this is only possible in clearcoat itself.
    pub own_process: bool,
    /// The duration of a commit after which the disk counts as hung: the maximum wait of a purge's sender.
    pub patience: Duration,
}

/// A journal in `<path>/journal.redb`.
pub struct Disk {
    readable: Arc<Readable>,
    condition: Arc<Condition>,
    // Dropped in this order: closing the queue ends the writer.
    queue: mpsc::Sender<Command>,
    _end: End,
}

/// A purge that other journals may have under the same name.
pub(super) struct NamedPurge {
    pub(super) origin: EntryOrigin,
    pub(super) at_ms: u64,
    pub(super) purge: Purge,
    /// It arrives in etcd's order, so everything up to its revision is here.
    pub(super) in_order: bool,
}

/// Waits on drop until the queue is committed and the file is closed, for at most [`CLOSING`].
struct End {
    path: Arc<Path>,
    /// Closed when the writer ends. In a mutex only because a receiver cannot be shared.
    ended: Mutex<Receiver<()>>,
}

impl Disk {
    /// Opens the journal in the directory `path`, creating both if they are missing. Blocks a separate thread, so the future
    /// may be dropped.
    ///
    /// # Errors [`OpenError`] names the file and the problem. For what is not an error, see [`Journal::anew`].
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
        let Settings { limits, observer, first_start, damaged, seals, patience, own_process: _ } = settings;
        let rules = StartRules { first_start, damaged, seals };
        let now_ms = clock();
        let directory = path.to_owned();
        let (committer, stored, anew) =
            Committer::start(path, move || opening::open(&directory, limits, now_ms, files, rules))?;
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
        // Its own runtime, so that a purge does not wait for other tasks of the control plane.
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

    /// Appends a named purge. Resolves like [`Journal::append`], with the existing position if the purge is here already.
    /// Its revision is recorded in any case.
    pub(super) async fn append_named(&self, named: NamedPurge) -> Result<Position, WriteError> {
        self.ask(|answer| Command::AppendNamed(named, answer)).await
    }

    /// Appends many in order.
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

    /// Records the revisions of entries; `None` if they are not in etcd. Valid even if the disk fails, because a later
    /// process finds them in etcd again.
    ///
    /// # Errors [`WriteError::Closed`].
    pub(super) async fn found(&self, revisions: Vec<(Position, Option<u64>)>) -> Result<(), WriteError> {
        self.ask(|answer| Command::Found(revisions, answer)).await
    }

    /// Records that entries are missing: everything up to the head, and up to this revision, is a gap. Valid even if the
    /// disk fails, like `found`.
    ///
    /// # Errors [`WriteError::Closed`].
    pub(super) async fn break_off(&self, revision: u64) -> Result<(), WriteError> {
        self.ask(|answer| Command::BreakOff(revision, answer)).await
    }

    /// Sends a command to the writer and waits for its answer.
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

    fn note_unsealable(&self, names: Vec<Name>) -> BoxFuture<'_, Result<(), WriteError>> {
        Box::pin(self.ask(|answer| Command::Unsealable(names, answer)))
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
