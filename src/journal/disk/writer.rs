//! The task that gives purges their places, and the disk its work, in groups.
//!
//! It never waits for the disk alone. When a commit takes longer than the sender of a purge can wait, the disk counts as
//! hung: who waits is answered, who comes later is refused at once (so that nothing grows), and the disk is given
//! nothing more. What was on its way then is written again and carried out once it answers: its sender was told
//! otherwise and may come again, but Magento never looks, and a purge more drops a page too many, which is slow and not
//! wrong.
//!
//! **What is safe in etcd needs no disk.** Such a purge is published though the disk refuses it or hangs, and written
//! here when that is over: a replica whose disk hangs would serve what the others have purged.

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

/// The most commands in one transaction, so that a storm cannot keep its first purge waiting without end.
const MAX_GROUP: usize = 1024;

/// How often a disk that refuses is asked whether it still does: nobody purges where we say that we are not ready.
const PROBE: Duration = Duration::from_secs(1);

/// How much a probe writes at most.
const MAX_PROBE: usize = 1 << 20;

/// What the disk says to a change.
type Committed = oneshot::Receiver<Result<(), CommitError>>;

/// Commits what is asked for until every handle on the queue is gone and the queue is empty.
pub(super) struct Writer<'s> {
    committer: Committer,
    readable: &'s Readable,
    condition: &'s Condition,
    commands: mpsc::Receiver<Command>,
    waiting: Vec<Command>,
    /// The head of the file.
    written: Position,
    /// What is readable after it, and not in the file yet: safe in etcd, and met a disk that did not take it.
    unwritten: Vec<Arc<Entry>>,
    /// About how much the disk refused last, in bytes.
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

    /// Returns the committer, to be closed.
    pub(super) async fn run(mut self) -> Committer {
        while let Some(group) = self.next().await {
            self.commit(group).await;
        }
        self.committer
    }

    /// The next group; `None` at the end.
    async fn next(&mut self) -> Option<Group> {
        let commands = self.commands.recv_many(&mut self.waiting, MAX_GROUP);
        // Also what needs no fsync by itself: it would find that all is well.
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

    async fn commit(&mut self, mut group: Group) {
        let condition = self.condition;
        loop {
            let mut committed = self.hand_over(&group);
            // Nobody needs the disk for what is safe already; a little, so that it mostly is on the disk all the same.
            let patience = if group.has_safe() { condition.patience() / 4 } else { condition.patience() };
            if let Ok(result) = timeout(patience, &mut committed).await {
                let result = self.answered(result);
                self.finish(group, result);
                return;
            }
            let began = Instant::now() - patience;
            let again = group.unsafe_entries();
            self.finish(group, Err(condition.hung()));
            let result = self.wait_for(committed, began).await;
            if result.is_err() || again.is_empty() {
                return;
            }
            // In the file after what is published there, so the next commit takes it out again, and puts it in.
            group = Group::again(again, self.readable);
        }
    }

    fn hand_over(&mut self, group: &Group) -> Committed {
        let change = self.change(group);
        self.refused = change.entries.iter().map(|entry| footprint(&entry.purge)).sum();
        self.condition.begin();
        self.committer.commit(change)
    }

    /// Waits for a disk that is late, and for nothing else: whoever comes meanwhile is answered without it.
    async fn wait_for(&mut self, mut committed: Committed, began: Instant) -> Result<(), WriteError> {
        let condition = self.condition;
        let late = sleep_until(began + condition.patience());
        let mut late = std::pin::pin!(late);
        let (mut is_open, mut told) = (true, false);
        loop {
            tokio::select! {
                result = &mut committed => return self.answered(result),
                () = &mut late, if !told => {
                    condition.say_hung();
                    told = true;
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
        // After the floor was read: what retires meanwhile is in doubt, too.
        let uncovered = self.readable.tail.uncovered_at(floor);
        let position_map = self.readable.position_map();
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
            found: group.found.clone(),
            probe: group.probe,
        }
    }

    /// Publishes what counts, and answers all of the group.
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
        // As bounded as what is held.
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
        // Published, and on the disk with the next commit, or learnt once more from etcd: whoever told of it goes on.
        group.noted.into_iter().for_each(|answer| _ = answer.send(Ok(())));
    }
}
