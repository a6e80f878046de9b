//! A journal that ends with its process, for tests and for operators who accept that a restart empties the fleet.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::cursors::Cursors;
use super::disk::NamedPurge;
use super::position_map::PositionMap;
use super::tail::{Past, Tail};
use super::{
    Anew, BoxFuture, Clock, Cursor, Entry, Journal, Limits, Position, PurgeObserver, Readable, WriteError, wall_clock,
};
use crate::fleet::NodeId;
use crate::purge::Purge;
use crate::seal::{Lineage, Name, PastNames, PurgedNames, Run};

/// A journal in memory: here, durable means to be in memory.
pub struct Memory {
    // Its position map is locked while a position is assigned.
    readable: Readable,
}

impl Memory {
    /// An empty journal without history. `observer` is called with every purge before it is readable.
    pub fn new(limits: Limits, observer: PurgeObserver) -> Self {
        Memory::with_clock(limits, observer, wall_clock())
    }

    /// A journal that replaces the lost one of an earlier process. A first start cannot be told from any other, so every
    /// start begins like this.
    pub fn after_another(limits: Limits, observer: PurgeObserver) -> Self {
        let mut memory = Memory::new(limits, observer);
        memory.readable.anew = Some(Anew::Memory);
        memory.readable.tail.forget_up_to(1);
        Anew::Memory.log(Path::new(""));
        memory
    }

    pub(crate) fn with_clock(limits: Limits, observer: PurgeObserver, clock: Clock) -> Self {
        let lineage = Lineage::new(fastrand::u64(..), Run(fastrand::u32(..)), Vec::new());
        let purged = PurgedNames::new(lineage, limits.max_names, &PastNames::default());
        Memory {
            readable: Readable {
                tail: Tail::new(limits, observer, Past { purged: Some(Arc::new(purged)), ..Past::default() }, clock()),
                cursors: Cursors::new(limits, HashMap::new()),
                position_map: Mutex::new(PositionMap::default()),
                clock,
                anew: None,
            },
        }
    }

    /// Appends named purges in this order, except those that are here already. Returns their positions.
    pub(super) fn append_all(&self, named: Vec<NamedPurge>) -> Vec<Position> {
        let Readable { tail, .. } = &self.readable;
        let mut position_map = self.readable.position_map.lock();
        let mut positions = Vec::with_capacity(named.len());
        for NamedPurge { origin, at_ms, purge, .. } in named {
            positions.push(position_map.position(&origin.id).unwrap_or_else(|| {
                let position = tail.head() + 1;
                position_map.enter(position, &origin.id, None);
                tail.publish(vec![Arc::new(Entry { position, at_ms, purge, origin: Some(origin) })], at_ms);
                position_map.trim(tail.floor());
                position
            }));
        }
        positions
    }
}

impl Journal for Memory {
    fn readable(&self) -> &Readable {
        &self.readable
    }

    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        Box::pin(async move {
            let _turn = self.readable.position_map.lock();
            let (position, at_ms) = (self.head() + 1, self.now_ms());
            self.readable.tail.publish(vec![Arc::new(Entry { position, at_ms, purge, origin: None })], at_ms);
            Ok(position)
        })
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        Box::pin(async move {
            self.readable.cursors.save(cursors, self.now_ms());
            Ok(())
        })
    }

    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.readable.tail.refuse(&positions);
        Box::pin(std::future::ready(Ok(())))
    }

    fn note_unsealable(&self, names: Vec<Name>) -> BoxFuture<'_, Result<(), WriteError>> {
        drop(names);
        Box::pin(std::future::ready(Ok(())))
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
