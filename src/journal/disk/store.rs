//! The database file: opening it, and writing groups to it.
//!
//! redb is a B-tree that never overwrites a page in use. So a crash leaves either the last commit or the one before, and
//! never a torn tail. An unreadable file at the start is therefore damage ([`super::opening`]).
//!
//! After an I/O error redb accepts no writes until the file is reopened, and the failed commit may have reached the disk all
//! the same. So the file is closed, and the next group reopens it and first deletes all entries after the published head,
//! because their senders were told that they were not accepted. A restart in between can bring such a purge back, which
//! drops a page too many. This does not help against a disk that fails an fsync and loses the page while the kernel still
//! caches it: reopening verifies what the kernel shows.

use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase as _};

use super::change::{Change, FLOOR, HEAD, IDENTITY, SEALED, name, write};
use super::error::{CommitError, Damage, OpenError, not_opened};
use super::file::Files;
use super::load::{self, Stored};
use super::marker::Marker;
use super::purged;
use crate::journal::{Limits, Position};
use crate::seal::{Lineage, PurgedNames, Run};
use crate::telemetry::causes;

/// The maximum delay of the marker behind the journal while purges come, in milliseconds. Writing it costs an fsync.
const MARK_EVERY_MS: u64 = 10_000;

pub(super) struct Store {
    path: PathBuf,
    limits: Limits,
    files: Box<dyn Files>,
    identity: String,
    /// The last head that is durable.
    durable: Position,
    /// The head in the marker, and the time of the last attempt to write it. `None`: it may be missing.
    marked: Option<(Position, u64)>,
    /// `None` after a failure, until the next commit reopens it.
    database: Option<Database>,
}

impl Store {
    /// Reads the file at `path`, and creates it if it is missing.
    ///
    /// # Errors [`OpenError`]. A failed assertion in redb counts as damage.
    pub(super) fn read(
        files: &dyn Files,
        path: &Path,
        limits: Limits,
        now_ms: u64,
    ) -> Result<(Database, Stored), OpenError> {
        let read = || {
            let database = files.open(path).map_err(|error| not_opened(path, error.into()))?;
            let stored = load::load(&database, path, limits, now_ms)?;
            Ok((database, stored))
        };
        let read = panic::catch_unwind(AssertUnwindSafe(read));
        read.unwrap_or_else(|panicked| {
            let source = Damage::Panicked(text_of(&*panicked));
            Err(OpenError::Damaged { path: path.to_owned(), source })
        })
    }

    /// The store of a database that was read. `marked` is the head in its marker, with the time.
    pub(super) fn new(
        files: Box<dyn Files>,
        path: PathBuf,
        limits: Limits,
        identity: String,
        database: Database,
        marked: Option<(Position, u64)>,
    ) -> Store {
        Store { path, limits, files, identity, durable: 0, marked, database: Some(database) }
    }

    /// Names a journal without a name, begins it after `head` if that is given, and writes the marker.
    pub(super) fn begin(&mut self, head: Option<Position>, now_ms: u64) -> Result<(), CommitError> {
        let database = self.opened()?;
        let begun = (|| {
            let transaction = database.begin_write()?;
            name(&transaction, &self.identity)?;
            if let Some(head) = head {
                transaction.open_table(HEAD)?.insert((), head)?;
                transaction.open_table(FLOOR)?.insert((), head)?;
            }
            Ok(transaction.commit()?)
        })();
        begun.map_err(|error| self.not_written(error))?;
        self.database = Some(database);
        self.mark(head.unwrap_or(0), now_ms)
    }

    /// Begins our run on a journal that ends at `head`, and reads what is known of the purges before. Seals are judged by it.
    pub(super) fn begin_run(&mut self, head: Position, seals: bool) -> Result<PurgedNames, CommitError> {
        let database = self.opened()?;
        let run = Run(fastrand::u32(..));
        let begun = (|| {
            let transaction = database.begin_write()?;
            let begun = purged::begin_run(&transaction, head, run)?;
            if !seals {
                // What comes into a cache from now on has no seal.
                transaction.delete_table(SEALED)?;
            }
            transaction.commit()?;
            Ok(begun)
        })();
        let (ended, remembered) = begun.map_err(|error| self.not_written(error))?;
        self.database = Some(database);
        // The first half of it: 64 random bits.
        let journal = self.identity.get(..16).and_then(|half| u64::from_str_radix(half, 16).ok()).unwrap_or_default();
        Ok(PurgedNames::new(Lineage::new(journal, run, ended), self.limits.max_names, &remembered))
    }

    /// Writes a group. On success it is durable if it has an entry. On failure it counts as not written, and the next commit
    /// reopens the file.
    pub(super) fn commit(&mut self, change: &Change) -> Result<(), CommitError> {
        let committed = panic::catch_unwind(AssertUnwindSafe(|| self.try_commit(change)));
        committed.unwrap_or_else(|panicked| {
            Err(CommitError::Panicked { path: self.path.clone(), reason: text_of(&*panicked) })
        })
    }

    fn try_commit(&mut self, change: &Change) -> Result<(), CommitError> {
        let records: Vec<Vec<u8>> =
            change.entries.iter().map(|entry| serde_json::to_vec(&**entry)).collect::<Result<_, _>>()?;
        let is_closed = self.database.is_none();
        let database = self.opened()?;
        let is_new = is_closed && self.is_new(&database)?;
        write(&database, change, &records, &self.limits, is_new.then_some(&*self.identity))
            .map_err(|error| self.not_written(error))?;
        self.database = Some(database);
        if is_new {
            self.marked = None;
        }
        if change.head > change.before {
            self.durable = change.head;
        }
        match self.marked {
            None => self.mark(change.head, change.now_ms),
            Some((marked, at_ms)) if self.durable > marked && change.now_ms.abs_diff(at_ms) >= MARK_EVERY_MS => {
                self.mark_again(change.now_ms);
                Ok(())
            }
            Some(_) => Ok(()),
        }
    }

    /// Moves the marker to the durable head. If that fails, the marker vouches for less, and no purge is refused.
    fn mark_again(&mut self, now_ms: u64) {
        if let Err(error) = self.mark(self.durable, now_ms) {
            self.marked = self.marked.map(|(marked, _)| (marked, now_ms));
            tracing::warn!(error = %causes(&error), "the journal's marker file could not be written");
        }
    }

    /// The database, reopened after a failure. Moved out, so that a failure leaves it closed.
    fn opened(&mut self) -> Result<Database, CommitError> {
        match self.database.take() {
            Some(database) => Ok(database),
            None => self.files.open(&self.path).map_err(|error| self.not_written(error.into())),
        }
    }

    /// Whether the reopened file is new and empty, because ours was removed.
    fn is_new(&self, database: &Database) -> Result<bool, CommitError> {
        let read = || {
            let transaction = database.begin_read()?;
            match transaction.open_table(IDENTITY) {
                Ok(table) => Ok(table.get(())?.map(|identity| identity.value().to_owned())),
                Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
                Err(error) => Err(error.into()),
            }
        };
        match read().map_err(|error: redb::Error| self.not_written(error))? {
            None => Ok(true),
            Some(identity) if identity == self.identity => Ok(false),
            Some(_) => Err(CommitError::Replaced { path: self.path.clone() }),
        }
    }

    fn mark(&mut self, head: Position, now_ms: u64) -> Result<(), CommitError> {
        let path = Marker::path(self.path.parent().unwrap_or(Path::new(".")));
        let marker = Marker::new(self.identity.clone(), head);
        self.files.replace(&path, &marker.encode()).map_err(|source| CommitError::Marker { path, source })?;
        self.marked = Some((head, now_ms));
        Ok(())
    }

    fn not_written(&self, source: redb::Error) -> CommitError {
        CommitError::Storage { path: self.path.clone(), source }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some((marked, at_ms)) = self.marked
            && self.durable > marked
        {
            self.mark_again(at_ms);
        }
    }
}

/// The message of a panic.
fn text_of(panicked: &(dyn std::any::Any + Send)) -> String {
    let text = panicked.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panicked.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}
