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

mod error;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::cursors::Cursors;
use super::ledger::Ledger;
use super::tail::Tail;
use super::{BoxFuture, Clock, Cursor, Journal, Lag, Limits, Missed, Origin, Position, WriteError, wall_clock};
use crate::fleet::NodeId;
use crate::purge::{Guard, Purge};
use store::{OpenDatabase, Store};
use writer::Command;

pub use error::{BadEntry, OpenError};

/// How many purges may wait for the next commit; more wait for a place in the queue, in their own tasks.
const QUEUE: usize = 1024;

/// A journal in `<path>/journal.redb`.
pub struct Disk {
    shared: Arc<Shared>,
    // Dropped in this order: the closed queue is what ends the writer.
    queue: mpsc::Sender<Command>,
    _writer: Writer,
}

/// What readers and the writer share.
struct Shared {
    tail: Tail,
    cursors: Cursors,
    ledger: Mutex<Ledger>,
    clock: Clock,
}

/// What another journal of the same purges has, or has not.
pub(super) struct Foreign {
    pub(super) origin: Origin,
    /// When it was accepted.
    pub(super) at_ms: u64,
    pub(super) purge: Purge,
    /// It comes in etcd's order: everything up to its revision is here with it.
    pub(super) in_order: bool,
}

/// The writer's thread. Dropping it waits until what was queued is committed and the file is closed.
struct Writer(Option<JoinHandle<()>>);

impl Disk {
    /// Opens the journal in the directory `path`, creating both where they are missing. Blocks on the disk. `guard` hears
    /// of every purge before a reader does.
    ///
    /// # Errors
    /// [`OpenError`] names the file and what is wrong with it. A journal that cannot be read in full is not opened:
    /// what it lost is a purge that somebody was told is done.
    pub fn open(path: &Path, limits: Limits, guard: Arc<Guard>) -> Result<Self, OpenError> {
        Disk::open_with_clock(path, limits, guard, wall_clock())
    }

    pub(super) fn open_with_clock(
        path: &Path,
        limits: Limits,
        guard: Arc<Guard>,
        clock: Clock,
    ) -> Result<Self, OpenError> {
        Disk::open_with(path, limits, guard, clock, Box::new(store::open_database))
    }

    fn open_with(
        path: &Path,
        limits: Limits,
        guard: Arc<Guard>,
        clock: Clock,
        open: OpenDatabase,
    ) -> Result<Self, OpenError> {
        let now_ms = clock();
        let (store, stored) = Store::open(path, limits, now_ms, open)?;
        let shared = Arc::new(Shared {
            tail: Tail::new(limits, guard, (stored.floor, stored.head), stored.entries, now_ms),
            cursors: Cursors::new(limits, stored.cursors),
            ledger: Mutex::new(stored.ledger),
            clock,
        });
        let (queue, commands) = mpsc::channel(QUEUE);
        let for_writer = Arc::clone(&shared);
        let writer = thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer::run(store, &for_writer, commands))
            .map_err(OpenError::Thread)?;
        Ok(Disk { shared, queue, _writer: Writer(Some(writer)) })
    }

    /// Appends what has a name. Resolves like [`Journal::append`], with the place that it has already where it was here
    /// before; what it says of its revision is noted either way.
    pub(super) async fn append_foreign(&self, foreign: Foreign) -> Result<Position, WriteError> {
        self.ask(|answer| Command::AppendForeign(foreign, answer)).await
    }

    /// The same for many, in their order.
    pub(super) async fn append_all(&self, foreign: Vec<Foreign>) -> Result<Vec<Position>, WriteError> {
        let mut answers = Vec::with_capacity(foreign.len());
        for foreign in foreign {
            let (answer, answered) = oneshot::channel();
            self.queue.send(Command::AppendForeign(foreign, answer)).await.map_err(|_| WriteError::Closed)?;
            answers.push(answered);
        }
        let mut positions = Vec::with_capacity(answers.len());
        for answered in answers {
            positions.push(answered.await.map_err(|_| WriteError::Closed)??);
        }
        Ok(positions)
    }

    /// Notes where in etcd entries are, or that they are not there.
    pub(super) async fn found(&self, revisions: Vec<(Position, Option<u64>)>) -> Result<(), WriteError> {
        self.ask(|answer| Command::Found(revisions, answer)).await
    }

    /// What lies before is not known, or not all of it: everything up to the head is a gap, and so is everything up to
    /// this revision.
    pub(super) async fn break_off(&self, revision: u64) -> Result<(), WriteError> {
        self.ask(|answer| Command::BreakOff(revision, answer)).await
    }

    /// Lets go of what is too old, also where nothing new comes. The file follows with the next purge.
    pub(super) fn retire(&self) {
        self.shared.tail.retire(self.now_ms());
        self.shared.ledger().trim(self.shared.tail.floor());
    }

    /// The origins of what is held. The writer's to change, but for what it does not know of.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.shared.ledger()
    }

    /// The time, as this journal has it.
    pub(super) fn now_ms(&self) -> u64 {
        (self.shared.clock)()
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
    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        Box::pin(self.ask(|answer| Command::Append(purge, answer)))
    }

    fn head(&self) -> Position {
        self.shared.tail.head()
    }

    fn watch(&self) -> watch::Receiver<Position> {
        self.shared.tail.watch()
    }

    fn since(&self, cursor: Position) -> Missed {
        self.shared.tail.since(cursor)
    }

    fn floor(&self) -> Position {
        self.shared.tail.floor()
    }

    fn lag(&self, cursor: Position) -> Lag {
        self.shared.tail.lag(cursor)
    }

    fn older_than(&self, age: Duration) -> Position {
        self.shared.tail.older_than(age, (self.shared.clock)())
    }

    fn cursors(&self) -> HashMap<NodeId, Cursor> {
        self.shared.cursors.all()
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        Box::pin(self.ask(|answer| Command::SaveCursors(cursors, answer)))
    }
}

impl Shared {
    /// It is whole after every statement, so a panic elsewhere leaves nothing half done.
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let ended = self.0.take().map(JoinHandle::join);
        if let Some(Err(_)) = ended {
            tracing::error!("the journal's writer panicked; what it had not answered was not accepted");
        }
    }
}
