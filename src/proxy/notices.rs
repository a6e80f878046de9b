//! How many lines a worker writes about what goes wrong with single requests.
//!
//! A line for each is what an operator needs who looks for one page, and too many once every page is concerned: then the
//! first ones say all there is to say, and the metrics how many there were.

use std::cell::Cell;

/// Lines that may be written at once.
const BURST: u32 = 20;

/// Lets a bounded number of lines pass, and counts the others.
#[derive(Debug)]
pub(super) struct Notices {
    left: Cell<u32>,
    unsaid: Cell<u64>,
}

impl Default for Notices {
    fn default() -> Self {
        Notices { left: Cell::new(BURST), unsaid: Cell::new(0) }
    }
}

impl Notices {
    /// Whether a line may be written: then with the number of those that were not since the last one.
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

    /// One more may be written. Called with each sweep, so that is how often one passes in the long run.
    pub(super) fn refill(&self) {
        self.left.set((self.left.get() + 1).min(BURST));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_as_many_as_are_refilled_with_the_number_of_the_others() {
        let notices = Notices::default();
        assert!((0..BURST).all(|_| notices.pass() == Some(0)));
        assert_eq!((notices.pass(), notices.pass()), (None, None));
        notices.refill();
        assert_eq!((notices.pass(), notices.pass()), (Some(2), None));
        (0..100).for_each(|_| notices.refill());
        assert_eq!(notices.pass(), Some(1));
        assert_eq!((1..BURST).filter(|_| notices.pass().is_some()).count(), BURST as usize - 1);
        assert_eq!(notices.pass(), None);
    }
}
