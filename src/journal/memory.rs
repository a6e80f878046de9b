//! A journal that ends with its process, for tests and for who accepts that a restart empties the fleet.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::cursors::Cursors;
use super::disk::Foreign;
use super::ledger::Ledger;
use super::tail::{Past, Tail};
use super::{
    Anew, BoxFuture, Clock, Cursor, Entry, Journal, Lag, Limits, Missed, Position, PurgeObserver, WriteError,
    wall_clock,
};
use crate::fleet::NodeId;
use crate::purge::Purge;

/// A journal in memory only: durable means here that it is in memory.
pub struct Memory {
    tail: Tail,
    cursors: Cursors,
    clock: Clock,
    // Who holds it gives the next position, and knows the names.
    turn: Mutex<Ledger>,
    anew: Option<Anew>,
}

impl Memory {
    /// An empty journal that has promised nothing. `observer` is told of every purge before a reader is.
    pub fn new(limits: Limits, observer: PurgeObserver) -> Self {
        Memory::with_clock(limits, observer, wall_clock())
    }

    /// One that takes the place of a journal that nobody has any more: that of the process before this one. A first start
    /// cannot be told from any other, so this is how each begins.
    pub fn after_another(limits: Limits, observer: PurgeObserver) -> Self {
        let memory = Memory { anew: Some(Anew::Memory), ..Memory::new(limits, observer) };
        memory.tail.forget_up_to(1);
        Anew::Memory.log(Path::new(""));
        memory
    }

    pub(crate) fn with_clock(limits: Limits, observer: PurgeObserver, clock: Clock) -> Self {
        Memory {
            tail: Tail::new(limits, observer, Past::default(), clock()),
            cursors: Cursors::new(limits, HashMap::new()),
            clock,
            turn: Mutex::default(),
            anew: None,
        }
    }

    /// Appends what has a name, in this order, unless it is here already. Gives the places.
    pub(super) fn append_all(&self, foreign: Vec<Foreign>) -> Vec<Position> {
        let mut ledger = self.turn.lock();
        let mut positions = Vec::with_capacity(foreign.len());
        for Foreign { origin, at_ms, purge, .. } in foreign {
            positions.push(ledger.position(&origin.id).unwrap_or_else(|| {
                let position = self.tail.head() + 1;
                ledger.enter(position, &origin.id, None);
                self.tail.publish(vec![Arc::new(Entry { position, at_ms, purge, origin: Some(origin) })], at_ms);
                ledger.trim(self.tail.floor());
                position
            }));
        }
        positions
    }

    /// The place of a purge by its name, while it is held.
    pub(super) fn place_of(&self, id: &str) -> Option<Position> {
        self.turn.lock().position(id)
    }

    /// The name of a purge that is held.
    pub(super) fn name_of(&self, position: Position) -> Option<Arc<str>> {
        self.turn.lock().name(position)
    }

    /// The time, as this journal has it.
    pub(super) fn now_ms(&self) -> u64 {
        (self.clock)()
    }
}

impl Journal for Memory {
    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        Box::pin(async move {
            let _turn = self.turn.lock();
            let (position, at_ms) = (self.tail.head() + 1, (self.clock)());
            self.tail.publish(vec![Arc::new(Entry { position, at_ms, purge, origin: None })], at_ms);
            Ok(position)
        })
    }

    fn head(&self) -> Position {
        self.tail.head()
    }

    fn watch(&self) -> watch::Receiver<Position> {
        self.tail.watch()
    }

    fn since(&self, cursor: Position) -> Missed {
        self.tail.since(cursor)
    }

    fn floor(&self) -> Position {
        self.tail.floor()
    }

    fn lag(&self, cursor: Position) -> Lag {
        self.tail.lag(cursor)
    }

    fn older_than(&self, age: Duration) -> Position {
        self.tail.older_than(age, (self.clock)())
    }

    fn cursors(&self) -> HashMap<NodeId, Cursor> {
        self.cursors.all()
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        Box::pin(async move {
            self.cursors.save(cursors, (self.clock)());
            Ok(())
        })
    }

    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.tail.refuse(&positions);
        Box::pin(std::future::ready(Ok(())))
    }

    fn is_refused(&self, position: Position) -> bool {
        self.tail.is_refused(position)
    }

    fn uncovered(&self) -> Position {
        self.tail.uncovered()
    }

    fn anew(&self) -> Option<&Anew> {
        self.anew.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::contract;

    contract::suite!(
        |limits, observer, clock| Arc::new(Memory::with_clock(limits, observer, clock)) as Arc<dyn Journal>
    );
}
