//! What of a journal is in memory, and so all of it that is read: the same for every kind.
//!
//! The kinds differ in how a purge gets in, and in where it is durable then.

use parking_lot::{Mutex, MutexGuard};

use super::cursors::Cursors;
use super::position_map::PositionMap;
use super::tail::Tail;
use super::{Anew, Clock};

/// What the readers of a journal share with its writer.
pub struct Readable {
    pub(super) tail: Tail,
    pub(super) cursors: Cursors,
    pub(super) position_map: Mutex<PositionMap>,
    pub(super) clock: Clock,
    pub(super) anew: Option<Anew>,
}

impl Readable {
    /// The names of what is held. The writer's to change, but for what it does not know of.
    pub(super) fn position_map(&self) -> MutexGuard<'_, PositionMap> {
        self.position_map.lock()
    }

    /// The time by the clock that dates purges, in ms since 1970.
    pub(super) fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    /// Lets go of what is too old, also if nothing new comes. A file follows with the next purge.
    pub(super) fn retire(&self) {
        self.tail.retire(self.now_ms());
        self.position_map().trim(self.tail.floor());
    }
}
