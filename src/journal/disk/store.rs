//! The file: what is in it, how it is opened, and how a group is written to it.
//!
//! redb is a B-tree that never writes over a page that is in use, so a crash leaves either the last commit or the one
//! before, and a torn tail does not exist. What cannot be read at the start is therefore damage, and is refused.
//!
//! After an I/O error redb takes no more writes until the file is opened again, and the commit that failed may have
//! reached the disk all the same. So the file is closed, the next group opens it again, and before it writes it
//! deletes whatever is stored behind the published head: those senders were told that nothing was accepted. A restart
//! in between can bring such a purge back, which drops a page too many. What this does not mend is a disk that fails
//! an fsync and forgets the page while the kernel still shows it: opening again verifies what the kernel shows.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{
    Builder, Database, DatabaseError, Durability, ReadableTable, StorageError, Table, TableDefinition, WriteTransaction,
};

use super::error::{BadEntry, CommitError, OpenError};
use crate::fleet::NodeId;
use crate::journal::cursors::Saved;
use crate::journal::ledger::Ledger;
use crate::journal::{Cursor, Entry, Limits, Origin, Position};

const ENTRIES: TableDefinition<Position, &[u8]> = TableDefinition::new("entries");
/// The cursor, and when it was saved in milliseconds since 1970.
const CURSORS: TableDefinition<&str, (Position, u64)> = TableDefinition::new("cursors");
/// The epochs of those cursors that have one.
const EPOCHS: TableDefinition<&str, &str> = TableDefinition::new("epochs");
/// The head has a place of its own: it outlives the entries, so that no position is ever given twice.
const HEAD: TableDefinition<(), Position> = TableDefinition::new("head");
/// Nothing up to here is stored, and everything after it is. Files from before positions had holes have none.
const FLOOR: TableDefinition<(), Position> = TableDefinition::new("floor");
/// What entries are called in etcd, and their revision there; 0 where they are not there.
const ORIGINS: TableDefinition<Position, (&str, u64)> = TableDefinition::new("origins");
/// The highest revision that any entry ever had.
const NEWEST: TableDefinition<(), u64> = TableDefinition::new("newest");
/// The revision up to which everything in etcd has come here.
const SEEN: TableDefinition<(), u64> = TableDefinition::new("seen");
/// Whether an entry was deleted that was not in etcd yet, and etcd knows nothing of it.
const OVERFLOWED: TableDefinition<(), bool> = TableDefinition::new("overflowed");

/// The most entries that one commit deletes. More than a commit can add, so that deleting keeps up.
const MAX_RETIRED: usize = 4096;
/// redb's own default is 1 GiB. Nothing is read after the start, so it only has to hold what a group touches.
const CACHE_BYTES: usize = 8 << 20;

/// Opens the file as a database; an argument so that tests can put a failing disk beneath it.
pub(super) type OpenDatabase = Box<dyn Fn(&Path) -> Result<Database, DatabaseError> + Send>;

/// What was in the file when it was opened.
pub(super) struct Stored {
    pub(super) head: Position,
    pub(super) floor: Position,
    pub(super) entries: Vec<Arc<Entry>>,
    pub(super) cursors: HashMap<NodeId, Saved>,
    pub(super) ledger: Ledger,
}

/// What one transaction writes.
pub(super) struct Change<'g> {
    /// The time of the group.
    pub(super) now_ms: u64,
    /// The last published position. The entries follow it.
    pub(super) before: Position,
    /// The head from now on.
    pub(super) head: Position,
    /// What is not after this is not wanted any more.
    pub(super) floor: Position,
    /// The highest revision that was ever seen.
    pub(super) newest: u64,
    /// Everything up to this revision is here.
    pub(super) seen: u64,
    /// Something was, or is now, deleted that is not in etcd.
    pub(super) overflowed: bool,
    pub(super) entries: &'g [Arc<Entry>],
    pub(super) cursors: &'g [(NodeId, Cursor)],
    /// Where in etcd entries are, or that they are not there.
    pub(super) found: &'g [(Position, Option<u64>)],
}

/// The open file.
pub(super) struct Store {
    path: PathBuf,
    limits: Limits,
    open: OpenDatabase,
    /// `None` after a failure, until the next commit opens it again.
    database: Option<Database>,
}

/// Opens or creates the file, and has redb verify it in full: a damaged page would make it panic later.
pub(super) fn open_database(path: &Path) -> Result<Database, DatabaseError> {
    builder().create(path)
}

/// How the file is opened.
pub(super) fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

impl Store {
    /// Opens the file in `directory`, reads everything, and deletes what is too old at `now_ms`.
    pub(super) fn open(
        directory: &Path,
        limits: Limits,
        now_ms: u64,
        open: OpenDatabase,
    ) -> Result<(Store, Stored), OpenError> {
        let unusable = |source| OpenError::Directory { path: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(unusable)?;
        let path = directory.join("journal.redb");
        let database = open(&path).map_err(|error| not_opened(&path, error.into()))?;
        // The file may be new, and what is in it is worth nothing while its name is not durable.
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(unusable)?;
        let stored = load(&database, &path, limits, now_ms)?;
        Ok((Store { path, limits, open, database: Some(database) }, stored))
    }

    /// Writes a group. On success it is durable if it holds an entry; on failure it counts as not written, and the
    /// next commit starts by opening the file again.
    pub(super) fn commit(&mut self, change: &Change<'_>) -> Result<(), CommitError> {
        let records: Vec<Vec<u8>> =
            change.entries.iter().map(|entry| serde_json::to_vec(&**entry)).collect::<Result<_, _>>()?;
        let database = match self.database.take() {
            Some(database) => database,
            None => (self.open)(&self.path).map_err(|error| self.not_written(error.into()))?,
        };
        write(&database, change, &records, &self.limits).map_err(|error| self.not_written(error))?;
        self.database = Some(database);
        Ok(())
    }

    fn not_written(&self, source: redb::Error) -> CommitError {
        CommitError::Storage { path: self.path.clone(), source }
    }
}

fn not_opened(path: &Path, error: redb::Error) -> OpenError {
    let path = path.to_owned();
    match error {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => OpenError::InUse { path },
        // redb says so of a file that does not begin as its files do.
        redb::Error::Io(source) if source.kind() != io::ErrorKind::InvalidData => OpenError::File { path, source },
        source => OpenError::NotAJournal { path, source },
    }
}

fn load(database: &Database, path: &Path, limits: Limits, now_ms: u64) -> Result<Stored, OpenError> {
    let transaction = database.begin_write().map_err(|error| not_opened(path, error.into()))?;
    let stored = load_from(&transaction, path, limits, now_ms)?;
    transaction.commit().map_err(|error| not_opened(path, error.into()))?;
    Ok(stored)
}

fn load_from(transaction: &WriteTransaction, path: &Path, limits: Limits, now_ms: u64) -> Result<Stored, OpenError> {
    let failed = |error: redb::Error| not_opened(path, error);
    let table_failed = |error: redb::TableError| not_opened(path, error.into());
    let single = |table| {
        let table = transaction.open_table(table)?;
        Ok::<_, redb::Error>(table.get(())?.map(|value| value.value()))
    };
    let mut entries = transaction.open_table(ENTRIES).map_err(table_failed)?;
    let mut cursors = transaction.open_table(CURSORS).map_err(table_failed)?;
    let mut epochs = transaction.open_table(EPOCHS).map_err(table_failed)?;
    let mut origins = transaction.open_table(ORIGINS).map_err(table_failed)?;
    let head = single(HEAD).map_err(failed)?.unwrap_or(0);
    let floor = single(FLOOR).map_err(failed)?;
    let newest = single(NEWEST).map_err(failed)?.unwrap_or(0);
    let seen = single(SEEN).map_err(failed)?.unwrap_or(0);
    let overflowed = transaction.open_table(OVERFLOWED).map_err(table_failed)?;
    let overflowed = overflowed.get(()).map_err(|error| failed(error.into()))?.is_some_and(|value| value.value());
    let rows = load_origins(&origins, path)?;
    // Holes come from etcd; where it never had a part in this, a hole is damage.
    let dense = rows.is_empty() && newest == 0;
    let loaded = load_entries(&entries, head, dense, &rows, path)?;
    let retired = loaded.iter().take_while(|entry| limits.retires(entry.at_ms, now_ms)).last();
    let before = loaded.first().map_or(head, |first| first.position - 1);
    let floor = floor.unwrap_or(before).max(retired.map_or(0, |retired| retired.position));
    delete_up_to(&mut entries, floor).map_err(|error| failed(error.into()))?;
    delete_up_to(&mut origins, floor).map_err(|error| failed(error.into()))?;
    let rows = rows.into_iter().map(|(position, (id, revision))| (position, id, revision));
    let mut ledger = Ledger::new(rows, newest, seen);
    // Some may have retired while nobody ran, and never got to etcd.
    ledger.trim(floor);
    if overflowed {
        ledger.overflowed_before();
    }
    let cursors = load_cursors(&mut cursors, &mut epochs, limits, now_ms, path)?;
    let entries = loaded.into_iter().filter(|entry| entry.position > floor).collect();
    Ok(Stored { head, floor, entries, cursors, ledger })
}

type Rows = BTreeMap<Position, (Arc<str>, Option<u64>)>;

fn load_origins(table: &impl ReadableTable<Position, (&'static str, u64)>, path: &Path) -> Result<Rows, OpenError> {
    let failed = |error: StorageError| not_opened(path, error.into());
    let mut rows = Rows::new();
    for record in table.iter().map_err(failed)? {
        let (position, origin) = record.map_err(failed)?;
        let (id, revision) = origin.value();
        rows.insert(position.value(), (id.into(), Some(revision).filter(|&revision| revision > 0)));
    }
    Ok(rows)
}

/// `dense`: positions have no holes.
fn load_entries(
    table: &impl ReadableTable<Position, &'static [u8]>,
    head: Position,
    dense: bool,
    rows: &Rows,
    path: &Path,
) -> Result<Vec<Arc<Entry>>, OpenError> {
    let failed = |error: StorageError| not_opened(path, error.into());
    let mut entries: Vec<Arc<Entry>> = Vec::new();
    for record in table.iter().map_err(failed)? {
        let (position, record) = record.map_err(failed)?;
        let position = position.value();
        let damaged = |source| OpenError::Entry { path: path.to_owned(), position, source };
        if let Some(last) = entries.last().map(|last| last.position)
            && dense
            && position != last + 1
        {
            return Err(damaged(BadEntry::OutOfOrder(last + 1)));
        }
        let entry: Entry = serde_json::from_slice(record.value()).map_err(|error| damaged(error.into()))?;
        let origin = rows.get(&position).map(|(id, revision)| {
            // Whom it was told to is not known any more. What is in etcd has been told by that; what is not is ours to tell.
            Origin { id: Arc::clone(id), revision: *revision, ours: revision.is_none() }
        });
        entries.push(Arc::new(Entry { position, origin, ..entry }));
    }
    match entries.last() {
        Some(last) if last.position > head || (dense && last.position != head) => {
            let (position, source) = (last.position, BadEntry::OutOfOrder(head));
            Err(OpenError::Entry { path: path.to_owned(), position, source })
        }
        _ => Ok(entries),
    }
}

fn load_cursors(
    table: &mut Table<'_, &'static str, (Position, u64)>,
    epochs: &mut Table<'_, &'static str, &'static str>,
    limits: Limits,
    now_ms: u64,
    path: &Path,
) -> Result<HashMap<NodeId, Saved>, OpenError> {
    let failed = |error: StorageError| not_opened(path, error.into());
    forget_cursors(table, epochs, &limits, now_ms).map_err(failed)?;
    let mut cursors = HashMap::new();
    for record in table.iter().map_err(failed)? {
        let (node, saved) = record.map_err(failed)?;
        let epoch = epochs.get(node.value()).map_err(failed)?.map(|epoch| epoch.value().into());
        let node =
            NodeId::try_from(node.value()).map_err(|source| OpenError::Cursor { path: path.to_owned(), source })?;
        let (position, at_ms) = saved.value();
        cursors.insert(node, Saved { cursor: Cursor { position, epoch }, at_ms });
    }
    Ok(cursors)
}

fn write(database: &Database, change: &Change<'_>, records: &[Vec<u8>], limits: &Limits) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    if change.head == change.before {
        // Without an fsync: the next purge's commit takes this to the disk with it, and so does closing the file. A crash
        // before that leaves older cursors, and an older cursor only replays more; and it leaves purges that are not
        // known to be in etcd, and etcd knows better.
        transaction.set_durability(Durability::None)?;
    }
    if change.head > change.before {
        let mut entries = transaction.open_table(ENTRIES)?;
        let mut origins = transaction.open_table(ORIGINS)?;
        entries.retain_in(change.before + 1.., |_, _| false)?;
        origins.retain_in(change.before + 1.., |_, _| false)?;
        for (entry, record) in change.entries.iter().zip(records) {
            entries.insert(entry.position, record.as_slice())?;
            if let Some(Origin { id, revision, .. }) = &entry.origin {
                origins.insert(entry.position, (&**id, revision.unwrap_or(0)))?;
            }
        }
        delete_up_to(&mut entries, change.floor)?;
        delete_up_to(&mut origins, change.floor)?;
        transaction.open_table(HEAD)?.insert((), change.head)?;
        transaction.open_table(FLOOR)?.insert((), change.floor)?;
        let newest = change.entries.iter().filter_map(|entry| entry.origin.as_ref()?.revision).max();
        transaction.open_table(NEWEST)?.insert((), change.newest.max(newest.unwrap_or(0)))?;
        transaction.open_table(OVERFLOWED)?.insert((), change.overflowed)?;
    }
    if change.seen > 0 {
        transaction.open_table(SEEN)?.insert((), change.seen)?;
    }
    if !change.found.is_empty() {
        let mut origins = transaction.open_table(ORIGINS)?;
        for (position, revision) in change.found {
            let id = origins.get(position)?.map(|row| row.value().0.to_owned());
            if let Some(id) = id {
                origins.insert(position, (&*id, revision.unwrap_or(0)))?;
            }
        }
    }
    if !change.cursors.is_empty() {
        let mut cursors = transaction.open_table(CURSORS)?;
        let mut epochs = transaction.open_table(EPOCHS)?;
        for (node, Cursor { position, epoch }) in change.cursors {
            cursors.insert(node.as_str(), (*position, change.now_ms))?;
            match epoch {
                Some(epoch) => epochs.insert(node.as_str(), &**epoch)?,
                None => epochs.remove(node.as_str())?,
            };
        }
        forget_cursors(&mut cursors, &mut epochs, limits, change.now_ms)?;
    }
    Ok(transaction.commit()?)
}

/// Forgets the nodes whose cursor was not saved for too long.
fn forget_cursors(
    cursors: &mut Table<'_, &'static str, (Position, u64)>,
    epochs: &mut Table<'_, &'static str, &'static str>,
    limits: &Limits,
    now_ms: u64,
) -> Result<(), StorageError> {
    for cursor in cursors.extract_if(|_, (_, at_ms)| limits.retires(at_ms, now_ms))? {
        epochs.remove(cursor?.0.value())?;
    }
    Ok(())
}

/// Deletes the oldest entries up to `floor`, a bounded number of them.
fn delete_up_to<V: redb::Value + 'static>(
    table: &mut Table<'_, Position, V>,
    floor: Position,
) -> Result<(), StorageError> {
    for deleted in table.extract_from_if(..=floor, |_, _| true)?.take(MAX_RETIRED) {
        deleted?;
    }
    Ok(())
}
