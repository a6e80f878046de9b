//! The last steps of a node's cursor, for whoever shows when a purge was applied where.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::journal::Position;

/// The number of steps that are remembered of each node.
const REMEMBERED: usize = 128;

/// The cursor of a node moved: it has acknowledged the purges after one position, up to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CursorStep {
    /// It had everything up to here.
    pub after: Position,
    /// It has everything up to here.
    pub last: Position,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// The bans and requests that it took for this.
    pub bans: u64,
}

/// The newest steps of one node.
#[derive(Debug, Default)]
pub(super) struct CursorSteps(Mutex<VecDeque<CursorStep>>);

impl CursorSteps {
    pub(super) fn record(&self, step: CursorStep) {
        let mut steps = self.0.lock();
        if steps.len() == REMEMBERED {
            steps.pop_front();
        }
        steps.push_back(step);
    }

    /// The oldest first.
    pub(super) fn list(&self) -> Vec<CursorStep> {
        self.0.lock().iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_steps_are_remembered_and_no_more() {
        let steps = CursorSteps::default();
        for last in 1..=2 * REMEMBERED as u64 {
            steps.record(CursorStep { after: last - 1, last, at_ms: last, bans: 1 });
        }
        let list = steps.list();
        assert_eq!((list.len(), list[0].last), (REMEMBERED, REMEMBERED as u64 + 1));
    }
}
