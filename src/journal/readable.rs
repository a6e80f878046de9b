//! The part of a journal in memory, which serves all reads and is the same for every kind.
//!
//! The kinds differ in how a purge is written, and where it is durable.

use parking_lot::Mutex;

use super::cursors::Cursors;
use super::position_map::PositionMap;
use super::tail::Tail;
use super::{Anew, Clock};

/// The state shared by the writer and the readers of a journal.
pub struct Readable {
    pub(super) tail: Tail,
    pub(super) cursors: Cursors,
    /// Changed by the writer only, except for what it does not know.
    pub(super) position_map: Mutex<PositionMap>,
    pub(super) clock: Clock,
    pub(super) anew: Option<Anew>,
}

impl Readable {
    /// The current time of the clock that dates purges, in ms since 1970.
    pub(super) fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    /// Drops what is past its retention, even if nothing new comes. A file follows with the next commit.
    pub(super) fn retire(&self) {
        self.tail.retire(self.now_ms());
        self.position_map.lock().trim(self.tail.floor());
    }
}
