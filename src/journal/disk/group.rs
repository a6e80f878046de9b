//! The commands of one transaction, and the positions that they are given.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::NamedPurge;
use crate::fleet::NodeId;
use crate::journal::position_map::{PositionMap, next_position};
use crate::journal::{Cursor, Entry, EntryOrigin, Position, Readable, WriteError};
use crate::purge::Purge;
use crate::seal::Name;

/// The channel for the answer to a command.
type Responder<T> = oneshot::Sender<Result<T, WriteError>>;

/// A request to the writer.
pub(super) enum Command {
    Append(Purge, Responder<Position>),
    /// Append a purge that may be here already.
    AppendNamed(NamedPurge, Responder<Position>),
    /// Mark these as refused to their senders.
    Refuse(Vec<Position>, Responder<()>),
    /// Note tags that no seal shows.
    Unsealable(Vec<Name>, Responder<()>),
    SaveCursors(Vec<(NodeId, Cursor)>, Responder<()>),
    /// Record the revisions of these.
    Found(Vec<(Position, Option<u64>)>, Responder<()>),
    /// Declare everything up to the head, and up to this revision, a gap.
    BreakOff(u64, Responder<()>),
}

/// Whether it is durable in etcd.
pub(super) fn is_safe(entry: &Arc<Entry>) -> bool {
    entry.origin.as_ref().is_some_and(|origin| origin.revision.is_some())
}

/// The commands of one transaction.
#[derive(Default)]
pub(super) struct Group {
    /// The time of its creation.
    pub(super) now_ms: u64,
    /// The head with this group.
    pub(super) head: Position,
    pub(super) entries: Vec<Arc<Entry>>,
    /// The named entries of this group.
    pub(super) named: HashMap<Arc<str>, Position>,
    /// The positions to answer with.
    pub(super) appended: Vec<(Responder<Position>, Position)>,
    pub(super) refused: Vec<Position>,
    pub(super) cursors: Vec<(NodeId, Cursor)>,
    /// Tags that no seal shows.
    pub(super) unsealable: Vec<Name>,
    /// Revisions to record; `None` if the entry is not in etcd.
    pub(super) found: Vec<(Position, Option<u64>)>,
    /// The revision up to which everything is here with this group.
    pub(super) seen: u64,
    /// Everything up to here is a gap.
    pub(super) broken_off: Option<Position>,
    /// Bytes to write only to see whether the disk accepts them.
    pub(super) probe: Option<usize>,
    /// Commands to answer once they are on disk.
    pub(super) saved: Vec<Responder<()>>,
    /// Commands to answer even if the disk fails, because etcd has the same data.
    pub(super) noted: Vec<Responder<()>>,
}

impl Group {
    pub(super) fn empty(readable: &Readable) -> Self {
        Group { now_ms: readable.now_ms(), head: readable.tail.head(), ..Group::default() }
    }

    /// Assigns a position to each purge. They are final once the group is committed; a group that fails leaves them to the
    /// next.
    pub(super) fn new(commands: impl Iterator<Item = Command>, readable: &Readable) -> Self {
        let mut group = Group::empty(readable);
        let position_map = readable.position_map.lock();
        for command in commands {
            match command {
                Command::Append(purge, answer) => {
                    let position = group.enter(group.now_ms, purge, None);
                    group.appended.push((answer, position));
                }
                Command::AppendNamed(named, answer) => {
                    let position = group.enter_named(named, &position_map);
                    group.appended.push((answer, position));
                }
                Command::Refuse(positions, answer) => {
                    group.refused.extend(positions);
                    group.saved.push(answer);
                }
                Command::Unsealable(names, answer) => {
                    group.unsealable.extend(names);
                    group.saved.push(answer);
                }
                Command::SaveCursors(cursors, answer) => {
                    group.cursors.extend(cursors);
                    group.saved.push(answer);
                }
                Command::Found(revisions, answer) => {
                    group.found.extend(revisions);
                    group.noted.push(answer);
                }
                Command::BreakOff(revision, answer) => {
                    group.head = (group.head + 1).max(revision);
                    group.broken_off = Some(group.head);
                    group.seen = group.seen.max(revision);
                    group.noted.push(answer);
                }
            }
        }
        group
    }

    /// A group of these entries, which the file has behind the head, without answers.
    pub(super) fn written(entries: Vec<Arc<Entry>>, readable: &Readable) -> Self {
        let group = Group::empty(readable);
        let head = entries.last().map_or(group.head, |entry| entry.position);
        Group { head, entries, ..group }
    }

    /// A group that writes these entries again, without answers.
    pub(super) fn again(entries: Vec<Arc<Entry>>, readable: &Readable) -> Self {
        let mut group = Group::empty(readable);
        let position_map = readable.position_map.lock();
        for entry in entries {
            let Entry { at_ms, purge, origin, .. } = Arc::unwrap_or_clone(entry);
            match origin {
                None => _ = group.enter(at_ms, purge, None),
                Some(origin) => {
                    _ = group.enter_named(NamedPurge { origin, at_ms, purge, in_order: false }, &position_map);
                }
            }
        }
        group
    }

    /// Whether any of it is durable in etcd.
    pub(super) fn has_safe(&self) -> bool {
        self.entries.iter().any(is_safe)
    }

    /// The entries that are not durable in etcd.
    pub(super) fn unsafe_entries(&self) -> Vec<Arc<Entry>> {
        self.entries.iter().filter(|entry| !is_safe(entry)).map(Arc::clone).collect()
    }

    fn enter(&mut self, at_ms: u64, purge: Purge, origin: Option<EntryOrigin>) -> Position {
        self.head = next_position(self.head, origin.as_ref());
        if let Some(origin) = &origin {
            self.named.insert(Arc::clone(&origin.id), self.head);
        }
        self.entries.push(Arc::new(Entry { position: self.head, at_ms, purge, origin }));
        self.head
    }

    /// Returns the existing position if the purge is here already.
    fn enter_named(
        &mut self,
        NamedPurge { origin, at_ms, purge, in_order }: NamedPurge,
        position_map: &PositionMap,
    ) -> Position {
        if in_order {
            self.seen = self.seen.max(origin.revision.unwrap_or(0));
        }
        match position_map.position(&origin.id).or_else(|| self.named.get(&origin.id).copied()) {
            Some(position) => {
                if origin.revision.is_some() {
                    self.found.push((position, origin.revision));
                }
                position
            }
            None => self.enter(at_ms, purge, Some(origin)),
        }
    }

    /// Makes the remaining entries readable.
    pub(super) fn publish(&mut self, readable: &Readable) {
        let mut position_map = readable.position_map.lock();
        for Entry { position, origin, .. } in self.entries.iter().map(|entry| &**entry) {
            if let Some(EntryOrigin { id, revision, .. }) = origin {
                position_map.enter(*position, id, *revision);
            }
        }
        self.found.iter().for_each(|(position, revision)| _ = position_map.set_revision(*position, *revision));
        drop(position_map);
        readable.tail.publish(std::mem::take(&mut self.entries), self.now_ms);
        if let Some(position) = self.broken_off {
            readable.tail.forget_up_to(position);
        }
        readable.position_map.lock().trim(readable.tail.floor());
    }
}
