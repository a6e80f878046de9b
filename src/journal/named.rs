//! A journal on this machine alone, for replicas that exchange purges without etcd.
//!
//! Each replica has its own order and its own positions; purges are identified by their names. A purge of another replica is
//! appended once, however often it arrives, and becomes an entry like any other. The progress of another replica is a
//! position here, as for a Varnish, so nothing is translated between two journals.

use std::sync::Arc;

use super::disk::NamedPurge;
use super::etcd::Names;
use super::{
    BoxFuture, Cursor, Disk, EntryOrigin, Journal, Memory, Position, PurgeMessage, Readable, Shared, Trouble,
    WriteError,
};
use crate::fleet::NodeId;
use crate::purge::Purge;
use crate::seal::Name;

/// A journal on disk or in memory whose purges have names.
pub struct Named {
    local: NamedStore,
    names: Names,
}

/// The store of a named journal.
pub enum NamedStore {
    /// A file.
    Disk(Disk),
    /// The memory of the process.
    Memory(Box<Memory>),
}

impl Named {
    /// A journal that names new purges.
    pub fn new(local: NamedStore) -> Self {
        Named { local, names: Names::new() }
    }

    fn local(&self) -> &dyn Journal {
        match &self.local {
            NamedStore::Disk(disk) => disk,
            NamedStore::Memory(memory) => &**memory,
        }
    }

    /// Appends in this order. Resolves with the highest position.
    async fn append_all(&self, named: Vec<NamedPurge>) -> Result<Position, WriteError> {
        let positions = match &self.local {
            NamedStore::Disk(disk) => disk.append_all(named).await?,
            NamedStore::Memory(memory) => memory.append_all(named),
        };
        Ok(positions.into_iter().max().unwrap_or(0))
    }

    fn named(&self, id: Arc<str>, ours: bool, purge: Purge) -> NamedPurge {
        // Dated by our own clock, which also decides its retention.
        NamedPurge { origin: EntryOrigin { id, revision: None, ours }, at_ms: self.now_ms(), purge, in_order: false }
    }
}

impl Shared for Named {
    fn admit(&self, messages: Vec<PurgeMessage>) -> BoxFuture<'_, Result<Position, WriteError>> {
        let named = messages.into_iter().map(|message| self.named(message.id.into(), false, message.purge)).collect();
        Box::pin(self.append_all(named))
    }
}

impl Journal for Named {
    fn readable(&self) -> &Readable {
        self.local().readable()
    }

    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        let named = self.named(self.names.next(self.now_ms()), true, purge);
        Box::pin(self.append_all(vec![named]))
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.local().save_cursors(cursors)
    }

    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.local().refuse(positions)
    }

    fn note_unsealable(&self, names: Vec<Name>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.local().note_unsealable(names)
    }

    fn trouble(&self) -> Option<Trouble> {
        self.local().trouble()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Damaged, FirstStart};
    use crate::journal::contract::{self, entries, nobody, purge};
    use crate::journal::{Limits, Settings, wall_clock};

    mod in_memory {
        use super::*;
        contract::suite!(|limits, observer, clock| {
            Arc::new(Named::new(NamedStore::Memory(Box::new(Memory::with_clock(limits, observer, clock)))))
                as Arc<dyn Journal>
        });
    }

    async fn is_taken_in_once(journal: Named) {
        let message = |id: &str| PurgeMessage { id: id.to_owned(), revision: None, at_ms: 1, purge: purge(id) };
        let first = journal.append(purge("ours")).await.unwrap();
        let last = journal.admit(vec![message("a"), message("b"), message("a")]).await.unwrap();
        assert_eq!(journal.admit(vec![message("b")]).await.unwrap(), last);
        assert_eq!((journal.place_of("b"), journal.place_of("c")), (Some(last), None));
        let held = entries(&journal, 0);
        assert_eq!(held.len(), 3);
        let ours: Vec<bool> =
            held.iter().map(|entry| entry.origin.as_ref().is_some_and(|origin| origin.ours)).collect();
        assert_eq!(ours, [true, false, false]);
        let id = held[0].origin.as_ref().unwrap().id.to_string();
        // Sent back by a replica that had it from us.
        assert_eq!(journal.admit(vec![message(&id)]).await.unwrap(), first);
    }

    #[tokio::test]
    async fn what_another_one_tells_is_taken_in_once_in_memory() {
        is_taken_in_once(Named::new(NamedStore::Memory(Box::new(Memory::new(Limits::default(), nobody()))))).await;
    }

    #[tokio::test]
    async fn what_another_one_tells_is_taken_in_once_on_disk_also_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let settings = || Settings {
            limits: Limits::default(),
            observer: nobody(),
            first_start: FirstStart::Trust,
            damaged: Damaged::Refuse,
            seals: true,
            own_process: false,
            patience: Duration::from_secs(10),
        };
        let open = async || Named::new(NamedStore::Disk(Disk::open(folder.path(), settings()).await.unwrap()));
        is_taken_in_once(open().await).await;
        let again = open().await;
        let head = again.head();
        let message = PurgeMessage { id: "a".to_owned(), revision: None, at_ms: 1, purge: purge("a") };
        assert!(again.admit(vec![message]).await.unwrap() < head);
        assert_eq!(again.head(), head);
    }

    #[tokio::test]
    async fn names_are_known_for_as_long_as_their_purges_are_held() {
        let limits = Limits { max_entries: 2, ..Limits::default() };
        let journal = Named::new(NamedStore::Memory(Box::new(Memory::with_clock(limits, nobody(), wall_clock()))));
        for id in ["a", "b", "c"] {
            let message = PurgeMessage { id: id.to_owned(), revision: None, at_ms: 1, purge: purge(id) };
            journal.admit(vec![message]).await.unwrap();
        }
        assert_eq!((journal.place_of("a"), journal.place_of("c")), (None, Some(3)));
    }
}
