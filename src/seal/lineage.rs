//! The journal and the run that a position belongs to.

use serde::{Deserialize, Serialize};

use super::Position;

/// One process on a journal: 32 random bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run(pub u32);

/// A position with the journal and the run that it belongs to: every purge up to it was durable there at that time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// The identity of the journal.
    pub journal: u64,
    /// The run of the journal.
    pub run: Run,
    /// The position.
    pub position: Position,
}

/// A journal and its runs.
///
/// Within a run a position is never assigned twice. Across runs it may be: a volume that is restored from an older
/// copy, with the same journal, continues from an earlier head. So positions of a run are trusted only up to the head
/// that the next run found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    journal: u64,
    run: Run,
    /// Each earlier run, with the head at which it ended.
    ended: Vec<(Run, Position)>,
}

impl Lineage {
    /// The journal with this identity, in its run `run`. `ended`: the runs before it with the head at which each ended,
    /// in any order. Any other run counts as one of another journal.
    pub fn new(journal: u64, run: Run, ended: Vec<(Run, Position)>) -> Self {
        Lineage { journal, run, ended }
    }

    /// The identity of the journal.
    pub fn journal(&self) -> u64 {
        self.journal
    }

    /// The present run.
    pub fn run(&self) -> Run {
        self.run
    }

    /// Whether a stamp is of our journal, whose head is `head`.
    pub fn covers(&self, stamp: Stamp, head: Position) -> bool {
        let Stamp { journal, run, position } = stamp;
        if journal != self.journal {
            return false;
        }
        if run == self.run {
            return position <= head;
        }
        self.ended.iter().any(|(ended, end)| *ended == run && position <= *end)
    }

    /// The stamp of a position in the present run.
    pub fn stamp(&self, position: Position) -> Stamp {
        Stamp { journal: self.journal, run: self.run, position }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_counts_up_to_the_end_of_its_run() {
        let lineage = Lineage::new(7, Run(3), vec![(Run(1), 10), (Run(2), 20)]);
        for (journal, run, position, is_covered) in [
            (7, 3, 30, true),
            (7, 3, 31, false),
            (7, 2, 20, true),
            (7, 2, 21, false),
            (7, 1, 10, true),
            (7, 1, 11, false),
            (7, 4, 1, false),
            (8, 3, 1, false),
        ] {
            let stamp = Stamp { journal, run: Run(run), position };
            assert_eq!(lineage.covers(stamp, 30), is_covered, "{stamp:?}");
        }
    }
}
