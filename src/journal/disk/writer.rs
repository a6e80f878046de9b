//! The task that assigns positions to purges and passes them to the disk in groups.
//!
//! It never waits for the disk without a timeout. If a commit takes longer than a purge can wait, the disk counts as hung:
//! waiting purges are answered with an error, later ones are refused at once (so that nothing accumulates), and the disk
//! gets no more work. The pending write takes effect once the disk answers. Its sender was told otherwise and could retry,
//! but Magento never does, and an extra purge only drops a page too many. It is not written again to that end: a write that
//! takes too long once (a purge of many tags, a slow disk) takes too long each time, and nothing else would ever be written.
//!
//! **A purge that is durable in etcd does not need the disk.** It is published even if the disk fails or hangs, and written
//! later; otherwise a replica with a hung disk would serve pages that the others have purged.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::change::Change;
use super::committer::Committer;
use super::condition::Condition;
use super::error::CommitError;
use super::group::{Command, Group, is_safe};
use crate::journal::tail::footprint;
use crate::journal::{Entry, Position, Readable, WriteError};

/// The maximum number of commands in a transaction, so that a storm cannot delay its first purge indefinitely.
const MAX_GROUP: usize = 1024;

/// The interval of probing a failing disk: while we report that we are not ready, no purge arrives to test it.
const PROBE: Duration = Duration::from_secs(1);

/// The maximum size of a probe in bytes.
const MAX_PROBE: usize = 1 << 20;

/// The result of a change.
type Committed = oneshot::Receiver<Result<(), CommitError>>;

/// Commits commands until every handle on the queue is dropped and the queue is empty.
pub(super) struct Writer<'s> {
    committer: Committer,
    readable: &'s Readable,
    condition: &'s Condition,
    commands: mpsc::Receiver<Command>,
    waiting: Vec<Command>,
    /// The head of the file.
    written: Position,
    /// Readable entries that are durable in etcd and not in the file yet, because the disk failed.
    unwritten: Vec<Arc<Entry>>,
    /// The approximate size of the last refused group in bytes.
    refused: usize,
}

impl<'s> Writer<'s> {
    pub(super) fn new(
        committer: Committer,
        readable: &'s Readable,
        condition: &'s Condition,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let written = readable.tail.head();
        Writer { committer, readable, condition, commands, waiting: vec![], written, unwritten: vec![], refused: 0 }
    }

    /// Runs to the end, and returns the committer to be closed.
    pub(super) async fn run(mut self) -> Committer {
        while let Some(group) = self.next().await {
            self.commit(group).await;
        }
        self.committer
    }

    /// The next group; `None` at the end.
    async fn next(&mut self) -> Option<Group> {
        let commands = self.commands.recv_many(&mut self.waiting, MAX_GROUP);
        // Also with commands that need no fsync, because those would report success.
        let (received, probe) = if self.condition.is_failing() {
            (timeout(PROBE, commands).await.ok(), Some(self.refused.clamp(1, MAX_PROBE)))
        } else {
            (Some(commands.await), None)
        };
        match received {
            Some(0) => None,
            Some(_) => Some(Group { probe, ..Group::new(self.waiting.drain(..), self.readable) }),
            None => Some(Group { probe, ..Group::empty(self.readable) }),
        }
    }

    async fn commit(&mut self, group: Group) {
        let before = self.readable.tail.head();
        let Some(late) = self.commit_in_time(group).await else { return };
        if self.readable.tail.head() == before {
            // The file has them behind the head, at the positions that come next.
            self.finish(Group::written(late, self.readable), Ok(()));
            return;
        }
        // Purges that are safe in etcd took these positions meanwhile. The next commit deletes what the file has there, and
        // writes it behind them. If it is late again, it is left: its sender was told that it was not accepted.
        self.commit_in_time(Group::again(late, self.readable)).await;
    }

    /// Commits a group. If that takes longer than a purge can wait, its senders are told so, and what was written for them
    /// all the same is returned.
    async fn commit_in_time(&mut self, group: Group) -> Option<Vec<Arc<Entry>>> {
        let condition = self.condition;
        let mut committed = self.hand_over(&group);
        // Entries that are durable in etcd hardly need the disk, so the wait is short: usually it is enough to write
        // them, too.
        let patience = if group.has_safe() { condition.patience() / 4 } else { condition.patience() };
        if let Ok(result) = timeout(patience, &mut committed).await {
            let result = self.answered(result);
            self.finish(group, result);
            return None;
        }
        let began = Instant::now() - patience;
        let late = group.unsafe_entries();
        self.finish(group, Err(condition.hung()));
        let result = self.wait_for(committed, began).await;
        (result.is_ok() && !late.is_empty()).then_some(late)
    }

    fn hand_over(&mut self, group: &Group) -> Committed {
        let change = self.change(group);
        self.refused = change.entries.iter().map(|entry| footprint(&entry.purge)).sum();
        self.condition.begin();
        self.committer.commit(change)
    }

    /// Waits for a late commit. Commands that arrive meanwhile are answered without the disk.
    async fn wait_for(&mut self, mut committed: Committed, began: Instant) -> Result<(), WriteError> {
        let condition = self.condition;
        let late = sleep_until(began + condition.patience());
        let mut late = std::pin::pin!(late);
        let (mut is_open, mut logged) = (true, false);
        loop {
            tokio::select! {
                result = &mut committed => return self.answered(result),
                () = &mut late, if !logged => {
                    condition.log_hung();
                    logged = true;
                }
                count = self.commands.recv_many(&mut self.waiting, MAX_GROUP), if is_open => {
                    is_open = count > 0;
                    let group = Group::new(self.waiting.drain(..), self.readable);
                    self.finish(group, Err(condition.hung()));
                }
            }
        }
    }

    fn answered(&self, result: Result<Result<(), CommitError>, oneshot::error::RecvError>) -> Result<(), WriteError> {
        let result = result
            .map_or(Err(WriteError::Closed), |result| result.map_err(|error| WriteError::Failed(Arc::new(error))));
        self.condition.end(&result);
        result
    }

    fn change(&self, group: &Group) -> Change {
        let floor = group.broken_off.unwrap_or_else(|| self.readable.tail.floor());
        // Read after the floor, so that entries dropped meanwhile count as uncovered, too.
        let uncovered = self.readable.tail.uncovered_at(floor);
        let position_map = self.readable.position_map.lock();
        Change {
            now_ms: group.now_ms,
            before: self.written,
            head: group.head,
            floor,
            newest: position_map.newest(),
            seen: position_map.seen().max(group.seen),
            overflowed: position_map.overflows_at(floor),
            spooled: position_map.has_missing(),
            entries: self.unwritten.iter().chain(&group.entries).map(Arc::clone).collect(),
            refused: group.refused.clone(),
            uncovered,
            uncovered_if_new: self.readable.tail.uncovered_by_nothing(),
            cursors: group.cursors.clone(),
            unsealable: group.unsealable.clone(),
            found: group.found.clone(),
            probe: group.probe,
        }
    }

    /// Publishes the accepted entries, and answers all commands of the group.
    fn finish(&mut self, mut group: Group, result: Result<(), WriteError>) {
        let (readable, refused) = (self.readable, result.err());
        match refused {
            None => {
                self.written = group.head;
                self.unwritten.clear();
            }
            Some(_) => {
                group.entries.retain(is_safe);
                self.unwritten.extend(group.entries.iter().map(Arc::clone));
            }
        }
        let accepted: Vec<Position> = group.entries.iter().map(|entry| entry.position).collect();
        let before = readable.tail.head();
        group.publish(readable);
        // Bounded like the tail.
        let floor = readable.tail.floor();
        self.unwritten.retain(|entry| entry.position > floor);
        if refused.is_none() && !group.cursors.is_empty() {
            readable.cursors.save(group.cursors, group.now_ms);
        }
        for (answer, position) in group.appended {
            let is_there = position <= before || accepted.binary_search(&position).is_ok();
            _ = answer.send(match &refused {
                Some(error) if !is_there => Err(error.clone()),
                _ => Ok(position),
            });
        }
        for answer in group.saved {
            _ = answer.send(refused.clone().map_or(Ok(()), Err));
        }
        // They are published, and reach the disk with the next commit, or are learnt from etcd again.
        group.noted.into_iter().for_each(|answer| _ = answer.send(Ok(())));
    }
}
