//! Limits a worker's log lines about failed single requests.
//!
//! One line per failure helps an operator who investigates one page, and is too much when every page fails: then the
//! first lines are enough, and the metrics count the rest.

use std::cell::Cell;

/// Lines that may be written at once.
const BURST: u32 = 20;

/// Sweeps until one more may be written: ten seconds. So a storm is one line an interval, with how many it stands for.
const SWEEPS: u32 = 100;

/// Lets a bounded number of lines pass, and counts the rest.
#[derive(Debug)]
pub(super) struct Notices {
    left: Cell<u32>,
    unsaid: Cell<u64>,
    sweeps: Cell<u32>,
}

impl Default for Notices {
    fn default() -> Self {
        Notices { left: Cell::new(BURST), unsaid: Cell::new(0), sweeps: Cell::new(0) }
    }
}

impl Notices {
    /// Whether a line may be written: if so, the number of suppressed lines since the last one.
    pub(super) fn pass(&self) -> Option<u64> {
        match self.left.get() {
            0 => {
                self.unsaid.set(self.unsaid.get() + 1);
                None
            }
            left => {
                self.left.set(left - 1);
                Some(self.unsaid.take())
            }
        }
    }

    /// Called with each sweep: after [`SWEEPS`] of them one more line is allowed.
    pub(super) fn refill(&self) {
        self.sweeps.set(self.sweeps.get() + 1);
        if self.sweeps.get() == SWEEPS {
            self.sweeps.set(0);
            self.left.set((self.left.get() + 1).min(BURST));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_refill_rate_with_the_number_suppressed() {
        let notices = Notices::default();
        assert!((0..BURST).all(|_| notices.pass() == Some(0)));
        assert_eq!((notices.pass(), notices.pass()), (None, None));
        (1..SWEEPS).for_each(|_| notices.refill());
        assert_eq!(notices.pass(), None);
        notices.refill();
        assert_eq!((notices.pass(), notices.pass()), (Some(3), None));
        (0..100 * SWEEPS).for_each(|_| notices.refill());
        assert_eq!(notices.pass(), Some(1));
        assert_eq!((1..BURST).filter(|_| notices.pass().is_some()).count(), BURST as usize - 1);
        assert_eq!(notices.pass(), None);
    }
}
