//! The thread that commits in groups.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::store::{Change, Store};
use super::{Foreign, Shared};
use crate::fleet::NodeId;
use crate::journal::ledger::{Ledger, next_position};
use crate::journal::{Cursor, Entry, Origin, Position, WriteError};
use crate::purge::Purge;

/// The most commands in one transaction, so that a storm cannot keep its first purge waiting without end.
const MAX_GROUP: usize = 1024;

/// Where the answer to a command goes.
type Answer<T> = oneshot::Sender<Result<T, WriteError>>;

/// What callers ask for.
pub(super) enum Command {
    /// Accept this purge.
    Append(Purge, Answer<Position>),
    /// Take over what another journal may have as well.
    AppendForeign(Foreign, Answer<Position>),
    /// Save these cursors.
    SaveCursors(Vec<(NodeId, Cursor)>, Answer<()>),
    /// Note where in etcd these are.
    Found(Vec<(Position, Option<u64>)>, Answer<()>),
    /// Everything up to the head, and up to this revision, is a gap.
    BreakOff(u64, Answer<()>),
}

/// Commits what is asked for until every handle on the queue is gone and the queue is empty.
pub(super) fn run(mut store: Store, shared: &Shared, mut commands: mpsc::Receiver<Command>) {
    let mut waiting = Vec::new();
    while commands.blocking_recv_many(&mut waiting, MAX_GROUP) > 0 {
        Group::new(waiting.drain(..), shared).commit(&mut store, shared);
    }
}

/// The commands of one transaction.
struct Group {
    now_ms: u64,
    head: Position,
    entries: Vec<Arc<Entry>>,
    /// The entries of this group that have a name.
    named: HashMap<Arc<str>, Position>,
    /// Whom to tell which position.
    appended: Vec<(Answer<Position>, Position)>,
    cursors: Vec<(NodeId, Cursor)>,
    found: Vec<(Position, Option<u64>)>,
    /// Everything up to this revision is here with this group.
    seen: u64,
    /// Up to here everything is a gap.
    broken_off: Option<Position>,
    done: Vec<Answer<()>>,
}

impl Group {
    /// Gives each purge its position. Positions belong to the group only once it is committed; a group that fails
    /// leaves them to the next.
    fn new(commands: impl Iterator<Item = Command>, shared: &Shared) -> Self {
        let mut group = Group {
            now_ms: (shared.clock)(),
            head: shared.tail.head(),
            entries: vec![],
            named: HashMap::new(),
            appended: vec![],
            cursors: vec![],
            found: vec![],
            seen: 0,
            broken_off: None,
            done: vec![],
        };
        let ledger = shared.ledger();
        for command in commands {
            match command {
                Command::Append(purge, answer) => {
                    let position = group.enter(group.now_ms, purge, None);
                    group.appended.push((answer, position));
                }
                Command::AppendForeign(foreign, answer) => {
                    let position = group.enter_foreign(foreign, &ledger);
                    group.appended.push((answer, position));
                }
                Command::SaveCursors(cursors, answer) => {
                    group.cursors.extend(cursors);
                    group.done.push(answer);
                }
                Command::Found(revisions, answer) => {
                    group.found.extend(revisions);
                    group.done.push(answer);
                }
                Command::BreakOff(revision, answer) => {
                    group.head = (group.head + 1).max(revision);
                    group.broken_off = Some(group.head);
                    group.seen = group.seen.max(revision);
                    group.done.push(answer);
                }
            }
        }
        group
    }

    fn enter(&mut self, at_ms: u64, purge: Purge, origin: Option<Origin>) -> Position {
        self.head = next_position(self.head, origin.as_ref());
        if let Some(origin) = &origin {
            self.named.insert(Arc::clone(&origin.id), self.head);
        }
        self.entries.push(Arc::new(Entry { position: self.head, at_ms, purge, origin }));
        self.head
    }

    /// What is here already has its place.
    fn enter_foreign(&mut self, Foreign { origin, at_ms, purge, in_order }: Foreign, ledger: &Ledger) -> Position {
        if in_order {
            self.seen = self.seen.max(origin.revision.unwrap_or(0));
        }
        match ledger.position(&origin.id).or_else(|| self.named.get(&origin.id).copied()) {
            Some(position) => {
                if origin.revision.is_some() {
                    self.found.push((position, origin.revision));
                }
                position
            }
            None => self.enter(at_ms, purge, Some(origin)),
        }
    }

    fn commit(mut self, store: &mut Store, shared: &Shared) {
        let floor = self.broken_off.unwrap_or_else(|| shared.tail.floor());
        let (newest, seen, overflowed) = {
            let ledger = shared.ledger();
            (ledger.newest(), ledger.seen().max(self.seen), ledger.overflows_at(floor))
        };
        let change = Change {
            now_ms: self.now_ms,
            before: shared.tail.head(),
            head: self.head,
            floor,
            newest,
            seen,
            overflowed,
            entries: &self.entries,
            cursors: &self.cursors,
            found: &self.found,
        };
        let refused = store.commit(&change).err().map(|error| WriteError::Failed(Arc::new(error)));
        if refused.is_some() {
            // What is safe in etcd needs no disk to be carried out.
            let is_safe = |entry: &Arc<Entry>| entry.origin.as_ref().is_some_and(|origin| origin.revision.is_some());
            self.entries.retain(is_safe);
        }
        let accepted: Vec<Position> = self.entries.iter().map(|entry| entry.position).collect();
        let before = shared.tail.head();
        self.publish(shared);
        if refused.is_none() && !self.cursors.is_empty() {
            shared.cursors.save(self.cursors, self.now_ms);
        }
        for (answer, position) in self.appended {
            let is_there = position <= before || accepted.binary_search(&position).is_ok();
            _ = answer.send(match &refused {
                Some(error) if !is_there => Err(error.clone()),
                _ => Ok(position),
            });
        }
        for answer in self.done {
            _ = answer.send(refused.clone().map_or(Ok(()), Err));
        }
    }

    fn publish(&mut self, shared: &Shared) {
        let mut ledger = shared.ledger();
        for Entry { position, origin, .. } in self.entries.iter().map(|entry| &**entry) {
            if let Some(Origin { id, revision, .. }) = origin {
                ledger.enter(*position, id, *revision);
            }
        }
        self.found.iter().for_each(|(position, revision)| _ = ledger.found(*position, *revision));
        drop(ledger);
        shared.tail.publish(std::mem::take(&mut self.entries), self.now_ms);
        if let Some(position) = self.broken_off {
            shared.tail.forget_up_to(position);
        }
        shared.ledger().trim(shared.tail.floor());
    }
}
