//! The tables of the file, and how a group is written to them.

use std::sync::Arc;

use redb::{Database, Durability, ReadableTable as _, StorageError, Table, TableDefinition, WriteTransaction};

use super::error::FORMAT;
use super::purged;
use crate::fleet::NodeId;
use crate::journal::{Cursor, Entry, EntryOrigin, Limits, Position};
use crate::seal::Name;

pub(super) const ENTRIES: TableDefinition<'_, Position, &[u8]> = TableDefinition::new("entries");
/// Each cursor with the time at which it was saved, in milliseconds since 1970.
pub(super) const CURSORS: TableDefinition<'_, &str, (Position, u64)> = TableDefinition::new("cursors");
/// The epochs of the cursors, if they have one.
pub(super) const EPOCHS: TableDefinition<'_, &str, &str> = TableDefinition::new("epochs");
/// Those of the nodes with a cursor whose cache was stored since answers are sealed, each with the time at which that cursor
/// was saved. A version of clearcoat that does not seal saves cursors and leaves this as it is: then the times differ, and
/// what came into the cache meanwhile is not known.
pub(super) const SEALED: TableDefinition<'_, &str, u64> = TableDefinition::new("sealed.at");
/// The nodes with a cursor whose cache relies on seals. A version of clearcoat that knows nothing of that saves cursors and leaves
/// this as it is: it does not empty such a cache, so it counts still.
pub(super) const RELYING: TableDefinition<'_, &str, ()> = TableDefinition::new("sealed.relying");
/// The head outlives the entries, so that no position is reused.
pub(super) const HEAD: TableDefinition<'_, (), Position> = TableDefinition::new("head");
/// All entries after this position are stored, and none up to it. Missing in files from before positions had gaps.
pub(super) const FLOOR: TableDefinition<'_, (), Position> = TableDefinition::new("floor");
/// The name of each entry, and its revision in etcd; 0 if it is not there.
pub(super) const ORIGINS: TableDefinition<'_, Position, (&str, u64)> = TableDefinition::new("origins");
/// The highest revision that any entry ever had.
pub(super) const NEWEST: TableDefinition<'_, (), u64> = TableDefinition::new("newest");
/// The revision up to which everything in etcd is here.
pub(super) const SEEN: TableDefinition<'_, (), u64> = TableDefinition::new("seen");
/// The purges that were refused to their senders.
pub(super) const REFUSED: TableDefinition<'_, Position, ()> = TableDefinition::new("refused");
/// The newest deleted purge that a flush may not cover.
pub(super) const UNCOVERED: TableDefinition<'_, (), Position> = TableDefinition::new("uncovered");
/// Whether an entry was deleted before it was in etcd, and is not replaced there yet.
pub(super) const OVERFLOWED: TableDefinition<'_, (), bool> = TableDefinition::new("overflowed");
/// The format of the file. Files of format 1 have no number.
pub(super) const FORMATS: TableDefinition<'_, (), u64> = TableDefinition::new("format");
/// The name of this journal, as in the [`Marker`](super::marker::Marker). Files of format 1 have none.
pub(super) const IDENTITY: TableDefinition<'_, (), &str> = TableDefinition::new("identity");
/// Padding, written to see whether the volume accepts as many bytes again.
const PROBE: TableDefinition<'_, (), &[u8]> = TableDefinition::new("probe");

/// The maximum number of entries that a commit deletes: more than it can add, so that deletion keeps up.
const MAX_RETIRED: usize = 4096;

/// The content of one transaction.
#[derive(Default)]
pub(super) struct Change {
    pub(super) now_ms: u64,
    /// The last valid position in the file. The entries follow it.
    pub(super) before: Position,
    /// The new head.
    pub(super) head: Position,
    /// Entries up to here are to be deleted.
    pub(super) floor: Position,
    /// The highest known revision.
    pub(super) newest: u64,
    /// Everything up to this revision is here.
    pub(super) seen: u64,
    /// An entry was deleted, now or before, that is not in etcd.
    pub(super) overflowed: bool,
    /// An entry is held that is not in etcd.
    pub(super) spooled: bool,
    pub(super) entries: Vec<Arc<Entry>>,
    /// Purges that were refused to their senders.
    pub(super) refused: Vec<Position>,
    /// The newest purge up to the floor that a flush may not cover; 0 if there is none.
    pub(super) uncovered: Position,
    /// The same for a new file, which has no earlier entries.
    pub(super) uncovered_if_new: Position,
    pub(super) cursors: Vec<(NodeId, Cursor)>,
    /// Tags that no seal shows.
    pub(super) unsealable: Vec<Name>,
    /// The revisions of entries; `None` if they are not in etcd.
    pub(super) found: Vec<(Position, Option<u64>)>,
    /// Bytes to write only to see whether the volume accepts as many again.
    pub(super) probe: Option<usize>,
}

/// Writes format and name into a new file, and creates the tables, so that no purge has to wait for that.
pub(super) fn name(transaction: &WriteTransaction, identity: &str) -> Result<(), redb::Error> {
    transaction.open_table(ENTRIES)?;
    transaction.open_table(ORIGINS)?;
    transaction.open_table(CURSORS)?;
    transaction.open_table(EPOCHS)?;
    for table in [HEAD, FLOOR, NEWEST, SEEN, UNCOVERED] {
        transaction.open_table(table)?;
    }
    transaction.open_table(REFUSED)?;
    transaction.open_table(OVERFLOWED)?;
    transaction.open_table(FORMATS)?.insert((), FORMAT)?;
    transaction.open_table(IDENTITY)?.insert((), identity)?;
    Ok(())
}

/// Writes a change; `records` are its encoded entries. `begun` is the name for a new file, which has none of the earlier
/// entries.
pub(super) fn write(
    database: &Database,
    change: &Change,
    records: &[Vec<u8>],
    limits: &Limits,
    begun: Option<&str>,
) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    if let Some(identity) = begun {
        name(&transaction, identity)?;
    } else if change.head == change.before
        && change.refused.is_empty()
        && change.unsealable.is_empty()
        && change.probe.is_none()
    {
        // Without an fsync: the next commit of a purge, or closing the file, makes this durable. A crash before that leaves
        // older cursors, which only replay more, and purges without their revisions, which etcd knows.
        transaction.set_durability(Durability::None)?;
    }
    if let Some(bytes) = change.probe {
        transaction.open_table(PROBE)?.insert((), vec![0; bytes].as_slice())?;
    }
    if change.head > change.before || begun.is_some() {
        write_entries(&transaction, change, records, begun.is_some())?;
        purged::note(&transaction, &change.entries, (change.before, change.head), limits.max_names)?;
        transaction.delete_table(PROBE)?;
    }
    if !change.refused.is_empty() {
        let mut refused = transaction.open_table(REFUSED)?;
        for position in change.refused.iter().filter(|position| **position > change.floor) {
            refused.insert(position, ())?;
        }
    }
    if !change.unsealable.is_empty() {
        purged::note_unsealable(&transaction, &change.unsealable)?;
    }
    if change.seen > 0 {
        transaction.open_table(SEEN)?.insert((), change.seen)?;
    }
    if !change.found.is_empty() {
        let mut origins = transaction.open_table(ORIGINS)?;
        for (position, revision) in &change.found {
            let id = origins.get(position)?.map(|row| row.value().0.to_owned());
            if let Some(id) = id {
                origins.insert(position, (&*id, revision.unwrap_or(0)))?;
            }
        }
    }
    if !change.cursors.is_empty() {
        let mut cursors = transaction.open_table(CURSORS)?;
        let mut epochs = transaction.open_table(EPOCHS)?;
        let mut sealed = transaction.open_table(SEALED)?;
        let mut relying = transaction.open_table(RELYING)?;
        for (node, Cursor { position, epoch, is_sealed, relies_on_seals }) in &change.cursors {
            cursors.insert(node.as_str(), (*position, change.now_ms))?;
            match epoch {
                Some(epoch) => epochs.insert(node.as_str(), &**epoch)?,
                None => epochs.remove(node.as_str())?,
            };
            if *is_sealed {
                sealed.insert(node.as_str(), change.now_ms)?;
            } else {
                sealed.remove(node.as_str())?;
            }
            if *relies_on_seals {
                relying.insert(node.as_str(), ())?;
            } else {
                relying.remove(node.as_str())?;
            }
        }
        forget_cursors(&mut cursors, (&mut epochs, &mut relying), &mut sealed, limits, change.now_ms)?;
    }
    Ok(transaction.commit()?)
}

fn write_entries(
    transaction: &WriteTransaction,
    change: &Change,
    records: &[Vec<u8>],
    is_new: bool,
) -> Result<(), redb::Error> {
    let mut entries = transaction.open_table(ENTRIES)?;
    let mut origins = transaction.open_table(ORIGINS)?;
    entries.retain_in(change.before + 1.., |_, _| false)?;
    origins.retain_in(change.before + 1.., |_, _| false)?;
    transaction.open_table(REFUSED)?.retain_in(change.before + 1.., |_, _| false)?;
    for (entry, record) in change.entries.iter().zip(records) {
        entries.insert(entry.position, record.as_slice())?;
        if let Some(EntryOrigin { id, revision, .. }) = &entry.origin {
            origins.insert(entry.position, (&**id, revision.unwrap_or(0)))?;
        }
    }
    delete_up_to(&mut entries, change.floor)?;
    delete_up_to(&mut origins, change.floor)?;
    delete_up_to(&mut transaction.open_table(REFUSED)?, change.floor)?;
    let (floor, uncovered) = if is_new {
        (change.floor.max(change.before), change.uncovered_if_new)
    } else {
        (change.floor, change.uncovered)
    };
    transaction.open_table(UNCOVERED)?.insert((), uncovered)?;
    transaction.open_table(HEAD)?.insert((), change.head)?;
    transaction.open_table(FLOOR)?.insert((), floor)?;
    let newest = change.entries.iter().filter_map(|entry| entry.origin.as_ref()?.revision).max();
    transaction.open_table(NEWEST)?.insert((), change.newest.max(newest.unwrap_or(0)))?;
    transaction.open_table(OVERFLOWED)?.insert((), change.overflowed || (is_new && change.spooled))?;
    Ok(())
}

/// Deletes cursors that were not saved within the retention.
fn forget_cursors(
    cursors: &mut Table<'_, &'static str, (Position, u64)>,
    (epochs, relying): (&mut Table<'_, &'static str, &'static str>, &mut Table<'_, &'static str, ()>),
    sealed: &mut Table<'_, &'static str, u64>,
    limits: &Limits,
    now_ms: u64,
) -> Result<(), StorageError> {
    for cursor in cursors.extract_if(|_, (_, at_ms)| limits.retires(at_ms, now_ms))? {
        let cursor = cursor?;
        let node = cursor.0.value();
        epochs.remove(node)?;
        relying.remove(node)?;
        sealed.remove(node)?;
    }
    Ok(())
}

/// Deletes the oldest entries up to `floor`, in a bounded number.
fn delete_up_to<V: redb::Value + 'static>(
    table: &mut Table<'_, Position, V>,
    floor: Position,
) -> Result<(), StorageError> {
    for deleted in table.extract_from_if(..=floor, |_, _| true)?.take(MAX_RETIRED) {
        deleted?;
    }
    Ok(())
}
