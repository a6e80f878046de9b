//! Reads the file when it is opened.
//!
//! Uses a read transaction, so that a start succeeds on a full volume.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use redb::{
    Database, Key, ReadOnlyTable, ReadTransaction, ReadableDatabase as _, ReadableTable as _, TableDefinition,
    TableError, Value,
};

use super::change::{
    CURSORS, ENTRIES, EPOCHS, FLOOR, FORMATS, HEAD, IDENTITY, NEWEST, ORIGINS, OVERFLOWED, REFUSED, RELYING, SEALED,
    SEEN, UNCOVERED,
};
use super::error::{Damage, FORMAT, OpenError, not_opened};
use crate::fleet::NodeId;
use crate::journal::cursors::SavedCursor;
use crate::journal::position_map::PositionMap;
use crate::journal::tail::Past;
use crate::journal::{Cursor, Entry, EntryOrigin, Limits, Position};

#[derive(Default)]
pub(super) struct Stored {
    /// The name of the journal; files of format 1 have none.
    pub(super) identity: Option<String>,
    pub(super) past: Past,
    pub(super) cursors: HashMap<NodeId, SavedCursor>,
    pub(super) position_map: PositionMap,
}

/// The names and etcd revisions of entries.
type Rows = BTreeMap<Position, (Arc<str>, Option<u64>)>;

/// Reads everything, without what is past its retention at `now_ms`.
pub(super) fn load(database: &Database, path: &Path, limits: Limits, now_ms: u64) -> Result<Stored, OpenError> {
    let transaction = database.begin_read().map_err(|error| not_opened(path, error.into()))?;
    let reader = Reader { transaction, path };
    let format = reader.single(FORMATS)?.unwrap_or(1);
    if format > FORMAT {
        return Err(OpenError::Newer { path: path.to_owned(), format });
    }
    let identity = match reader.table(IDENTITY)? {
        Some(table) => table.get(()).map_err(|error| reader.failed(error))?.map(|value| value.value().to_owned()),
        None => None,
    };
    let head = reader.single(HEAD)?.unwrap_or(0);
    let newest = reader.single(NEWEST)?.unwrap_or(0);
    let rows = reader.rows()?;
    // Gaps come from etcd. Without etcd, a gap means damage.
    let dense = rows.is_empty() && newest == 0;
    let loaded = reader.entries(head, dense, &rows, now_ms)?;
    let retired = loaded.iter().take_while(|entry| limits.retires(entry.at_ms, now_ms)).last();
    let before = loaded.first().map_or(head, |first| first.position - 1);
    let floor = reader.single(FLOOR)?.unwrap_or(before).max(retired.map_or(0, |retired| retired.position));
    let rows = rows.into_iter().map(|(position, (id, revision))| (position, id, revision));
    let mut position_map = PositionMap::new(rows, newest, reader.single(SEEN)?.unwrap_or(0));
    // Some entries may have expired while no process ran, before they were in etcd.
    position_map.trim(floor);
    if reader.single(OVERFLOWED)?.unwrap_or(false) {
        position_map.record_earlier_overflow();
    }
    let refused = reader.refused()?;
    let (gone, entries): (Vec<_>, Vec<_>) = loaded.into_iter().partition(|entry| entry.position <= floor);
    let in_doubt = gone.iter().filter(|entry| entry.purge.is_handed_on() && !refused.contains(&entry.position));
    let retired = in_doubt.map(|entry| entry.position).max().unwrap_or(0);
    let uncovered = reader.single(UNCOVERED)?.unwrap_or(0).max(retired);
    let past = Past { floor, head, entries, refused, uncovered, purged: None };
    Ok(Stored { identity, past, cursors: reader.cursors(limits, now_ms)?, position_map })
}

/// A read transaction on the file at a path.
struct Reader<'p> {
    transaction: ReadTransaction,
    path: &'p Path,
}

impl Reader<'_> {
    fn failed(&self, error: impl Into<redb::Error>) -> OpenError {
        not_opened(self.path, error.into())
    }

    fn damaged(&self, source: Damage) -> OpenError {
        OpenError::Damaged { path: self.path.to_owned(), source }
    }

    /// A table; `None` if it was never written.
    fn table<K: Key + 'static, V: Value + 'static>(
        &self,
        table: TableDefinition<'_, K, V>,
    ) -> Result<Option<ReadOnlyTable<K, V>>, OpenError> {
        match self.transaction.open_table(table) {
            Ok(table) => Ok(Some(table)),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// The value of a table with one entry.
    fn single<V>(&self, table: TableDefinition<'_, (), V>) -> Result<Option<V>, OpenError>
    where
        V: for<'v> Value<SelfType<'v> = V> + 'static,
    {
        let Some(table) = self.table(table)? else { return Ok(None) };
        Ok(table.get(()).map_err(|error| self.failed(error))?.map(|value| value.value()))
    }

    fn rows(&self) -> Result<Rows, OpenError> {
        let mut rows = Rows::new();
        let Some(table) = self.table(ORIGINS)? else { return Ok(rows) };
        for record in table.iter().map_err(|error| self.failed(error))? {
            let (position, origin) = record.map_err(|error| self.failed(error))?;
            let (id, revision) = origin.value();
            rows.insert(position.value(), (id.into(), Some(revision).filter(|&revision| revision > 0)));
        }
        Ok(rows)
    }

    fn refused(&self) -> Result<BTreeSet<Position>, OpenError> {
        let Some(table) = self.table(REFUSED)? else { return Ok(BTreeSet::new()) };
        let records = table.iter().map_err(|error| self.failed(error))?;
        records.map(|record| Ok(record.map_err(|error| self.failed(error))?.0.value())).collect()
    }

    /// The entries in order. `dense`: positions must have no gaps.
    fn entries(&self, head: Position, dense: bool, rows: &Rows, now_ms: u64) -> Result<Vec<Arc<Entry>>, OpenError> {
        let mut entries: Vec<Arc<Entry>> = Vec::new();
        let mut unknown = Vec::new();
        if let Some(table) = self.table(ENTRIES)? {
            for record in table.iter().map_err(|error| self.failed(error))? {
                let (position, record) = record.map_err(|error| self.failed(error))?;
                let position = position.value();
                let expected = entries.last().map_or(position, |last| last.position + 1);
                if dense && position != expected {
                    return Err(self.damaged(Damage::OutOfOrder { position, expected }));
                }
                let (entry, error) = Entry::read(record.value(), now_ms);
                unknown.extend(error.map(|error| (position, error)));
                let origin = rows.get(&position).map(|(id, revision)| {
                    // It is unknown which replicas were sent it. If it is in etcd, they have it from there; otherwise this
                    // process must send it.
                    EntryOrigin { id: Arc::clone(id), revision: *revision, ours: revision.is_none() }
                });
                entries.push(Arc::new(Entry { position, origin, ..entry }));
            }
        }
        if let Some((position, error)) = unknown.first() {
            tracing::warn!(
                path = %self.path.display(), position, count = unknown.len(), %error,
                "some purges in the journal are unknown to this version; each counts as one of everything"
            );
        }
        match entries.last().map(|last| last.position) {
            Some(last) if last > head || (dense && last != head) => {
                Err(self.damaged(Damage::OutOfOrder { position: last, expected: head }))
            }
            _ => Ok(entries),
        }
    }

    fn cursors(&self, limits: Limits, now_ms: u64) -> Result<HashMap<NodeId, SavedCursor>, OpenError> {
        let (Some(table), epochs) = (self.table(CURSORS)?, self.table(EPOCHS)?) else { return Ok(HashMap::new()) };
        let (sealed, relying) = (self.table(SEALED)?, self.table(RELYING)?);
        let mut cursors = HashMap::new();
        for record in table.iter().map_err(|error| self.failed(error))? {
            let (node, saved) = record.map_err(|error| self.failed(error))?;
            let (position, at_ms) = saved.value();
            if limits.retires(at_ms, now_ms) {
                continue;
            }
            let epoch = match &epochs {
                Some(epochs) => epochs.get(node.value()).map_err(|error| self.failed(error))?,
                None => None,
            };
            let epoch = epoch.map(|epoch| epoch.value().into());
            let is_sealed = match &sealed {
                Some(sealed) => {
                    let sealed = sealed.get(node.value()).map_err(|error| self.failed(error))?;
                    sealed.is_some_and(|sealed| sealed.value() == at_ms)
                }
                None => false,
            };
            let relies_on_seals = match &relying {
                Some(relying) => relying.get(node.value()).map_err(|error| self.failed(error))?.is_some(),
                // Before there was such a table.
                None => is_sealed,
            };
            let node = NodeId::try_from(node.value()).map_err(|source| self.damaged(Damage::Cursor(source)))?;
            cursors.insert(node, SavedCursor { cursor: Cursor { position, epoch, is_sealed, relies_on_seals }, at_ms });
        }
        Ok(cursors)
    }
}
