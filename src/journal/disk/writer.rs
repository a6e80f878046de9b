//! The thread that commits in groups.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::store::{Change, Store};
use crate::fleet::NodeId;
use crate::journal::{Cursor, Entry, Position, WriteError};
use crate::purge::Purge;

/// The most commands in one transaction, so that a storm cannot keep its first purge waiting without end.
const MAX_GROUP: usize = 1024;

/// Where the answer to a command goes.
type Answer<T> = oneshot::Sender<Result<T, WriteError>>;

/// What callers ask for.
pub(super) enum Command {
    /// Accept this purge.
    Append(Purge, Answer<Position>),
    /// Save these cursors.
    SaveCursors(Vec<(NodeId, Cursor)>, Answer<()>),
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
    entries: Vec<Arc<Entry>>,
    appended: Vec<Answer<Position>>,
    cursors: Vec<(NodeId, Cursor)>,
    saved: Vec<Answer<()>>,
}

impl Group {
    /// Gives each purge its position. Positions belong to the group only once it is committed; a group that fails
    /// leaves them to the next.
    fn new(commands: impl Iterator<Item = Command>, shared: &Shared) -> Self {
        let now_ms = (shared.clock)();
        let mut group = Group { now_ms, entries: vec![], appended: vec![], cursors: vec![], saved: vec![] };
        let mut position = shared.tail.head();
        for command in commands {
            match command {
                Command::Append(purge, answer) => {
                    position += 1;
                    group.entries.push(Arc::new(Entry { position, at_ms: now_ms, purge }));
                    group.appended.push(answer);
                }
                Command::SaveCursors(cursors, answer) => {
                    group.cursors.extend(cursors);
                    group.saved.push(answer);
                }
            }
        }
        group
    }

    /// Makes the group durable, then readable, then answers: in this order, or a reader could follow a head that a
    /// crash takes back. An answer that nobody waits for any more is dropped; what it was about is committed.
    fn commit(self, store: &mut Store, shared: &Shared) {
        let change = Change {
            now_ms: self.now_ms,
            head: shared.tail.head(),
            first: shared.tail.first(),
            entries: &self.entries,
            cursors: &self.cursors,
        };
        if let Err(error) = store.commit(&change) {
            let error = WriteError::Failed(Arc::new(error));
            self.appended.into_iter().for_each(|answer| _ = answer.send(Err(error.clone())));
            self.saved.into_iter().for_each(|answer| _ = answer.send(Err(error.clone())));
            return;
        }
        let positions: Vec<Position> = self.entries.iter().map(|entry| entry.position).collect();
        shared.tail.publish(self.entries, self.now_ms);
        if !self.cursors.is_empty() {
            shared.cursors.save(self.cursors, self.now_ms);
        }
        for (answer, position) in self.appended.into_iter().zip(positions) {
            _ = answer.send(Ok(position));
        }
        self.saved.into_iter().for_each(|answer| _ = answer.send(Ok(())));
    }
}
