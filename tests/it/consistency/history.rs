//! The checker: compares promises with reads. It has no clock and no sockets, so that artificial histories can prove
//! that it is strict.

use std::time::Duration;

/// Time since the run began.
pub type Moment = Duration;

/// Contents of different pages use different numbers, so that an answer with another page's content is detected.
const PAGE: u64 = 1_000_000;

/// Promises kept for each page. A reader still in progress after 4096 more would be judged too mildly; no read lasts
/// that long.
const KEPT: usize = 4096;

/// The content of page `page` in its `number`th version.
pub fn content(page: u64, number: u64) -> u64 {
    page * PAGE + number
}

/// The history of one page. One writer owns the page, so versions and times increase.
#[derive(Debug)]
pub struct History {
    page: u64,
    latest: u64,
    promises: Vec<Promise>,
}

/// From `answered` on, no read may see a version older than `number`.
#[derive(Clone, Debug)]
pub struct Promise {
    pub number: u64,
    /// When the purge with the answer was sent.
    pub sent: Moment,
    pub answered: Moment,
    /// The answer, for debugging.
    pub answer: String,
}

/// A page as a reader saw it.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    /// Before the first byte of the request was sent.
    pub began: Moment,
    /// After the last byte of the answer was received.
    pub ended: Moment,
    pub content: u64,
}

impl std::fmt::Display for Promise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Promise { number, sent, answered, answer } = self;
        write!(f, "version {number} promised at {answered:?} (purge sent at {sent:?}, answer {answer})")
    }
}

impl std::fmt::Display for Read {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (page, number) = (self.content / PAGE, self.content % PAGE);
        write!(f, "read from {:?} to {:?}, saw page {page} version {number}", self.began, self.ended)
    }
}

/// The judgement of a read.
#[derive(Debug)]
pub enum Verdict<'h> {
    /// Correct.
    Fine,
    /// The read began after this promise, and saw something older.
    Stale(&'h Promise),
    /// This page never had that content: the harness is wrong, or answers were mixed up.
    Impossible,
}

impl History {
    /// A page at version 0.
    pub fn new(page: u64) -> Self {
        History { page, latest: 0, promises: Vec::new() }
    }

    /// The next version is about to be set at the shop: reads may see it from now on, but it is not promised. Returns
    /// its number.
    pub fn change(&mut self) -> u64 {
        self.latest += 1;
        self.latest
    }

    /// A purge was answered: it promises every version up to the one set when it was sent, including those whose own
    /// purges had no answer.
    pub fn promise(&mut self, promise: Promise) {
        if self.promises.len() == KEPT {
            self.promises.drain(..KEPT / 2);
        }
        self.promises.push(promise);
    }

    /// The page's content at the end.
    pub fn latest(&self) -> u64 {
        content(self.page, self.latest)
    }

    /// Judges a read by the promises made before it began. Promises made during it bind the next reader, not this one,
    /// which may have been answered before.
    pub fn judge(&self, read: Read) -> Verdict<'_> {
        let (page, number) = (read.content / PAGE, read.content % PAGE);
        if page != self.page || number > self.latest {
            return Verdict::Impossible;
        }
        let made_before = self.promises.partition_point(|promise| promise.answered < read.began);
        match self.promises[..made_before].last() {
            Some(promise) if number < promise.number => Verdict::Stale(promise),
            _ => Verdict::Fine,
        }
    }
}

/// The outages of clearcoat: each from just before a kill until it reported ready again.
#[derive(Debug, Default)]
pub struct Outages(Vec<(Moment, Option<Moment>)>);

impl Outages {
    pub fn begin(&mut self, at: Moment) {
        self.0.push((at, None));
    }

    pub fn end(&mut self, at: Moment) {
        self.0.last_mut().expect("an outage that began").1 = Some(at);
    }

    /// Whether an outage explains a failure: one overlaps the time from the opening of the connection to its failure.
    /// (A connection older than a kill cannot survive it, whenever its owner notices.)
    pub fn explain(&self, opened: Moment, failed: Moment) -> bool {
        self.0.iter().rev().any(|&(from, to)| from <= failed && to.is_none_or(|to| to >= opened))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn promise(number: u64, answered: u32) -> Promise {
        Promise { number, sent: MS * (answered - 1), answered: MS * answered, answer: String::new() }
    }

    /// Page 7: version 1 is set, and its purge answered at 10 ms; version 2 is set, and its purge answered at 20 ms.
    fn history() -> History {
        let mut history = History::new(7);
        for answered in [10, 20] {
            let number = history.change();
            history.promise(promise(number, answered));
        }
        history
    }

    fn verdict(history: &History, number: u64, began: u32, ended: u32) -> &'static str {
        let read = Read { began: MS * began, ended: MS * ended, content: content(7, number) };
        match history.judge(read) {
            Verdict::Fine => "fine",
            Verdict::Stale(_) => "stale",
            Verdict::Impossible => "impossible",
        }
    }

    #[test]
    fn a_read_that_began_after_an_answer_and_saw_an_older_version_is_stale() {
        assert_eq!(verdict(&history(), 0, 11, 12), "stale");
        assert_eq!(verdict(&history(), 1, 21, 22), "stale");
        assert_eq!(verdict(&history(), 0, 1000, 1001), "stale");
    }

    #[test]
    fn the_promise_that_was_broken_is_the_newest_before_the_read() {
        let read = Read { began: MS * 30, ended: MS * 31, content: content(7, 0) };
        let history = history();
        let Verdict::Stale(promise) = history.judge(read) else { panic!("not stale") };
        assert_eq!(promise.number, 2);
    }

    #[test]
    fn a_read_begun_before_the_answer_may_see_either_version() {
        for number in [0, 1, 2] {
            assert_eq!(verdict(&history(), number, 9, 1000), "fine");
            assert_eq!(verdict(&history(), number, 10, 1000), "fine");
        }
        assert_eq!(verdict(&history(), 1, 19, 1000), "fine");
        assert_eq!(verdict(&history(), 0, 19, 1000), "stale");
    }

    #[test]
    fn a_read_may_see_a_version_before_its_purge_is_answered() {
        assert_eq!(verdict(&history(), 2, 11, 12), "fine");
    }

    #[test]
    fn a_purge_without_an_answer_promises_nothing() {
        let mut history = history();
        history.change();
        assert_eq!(verdict(&history, 2, 1000, 1001), "fine");
        assert_eq!(verdict(&history, 3, 1000, 1001), "fine");
    }

    #[test]
    fn a_later_answer_covers_the_versions_whose_purges_had_none() {
        let mut history = history();
        history.change();
        let number = history.change();
        history.promise(promise(number, 40));
        assert_eq!(verdict(&history, 2, 39, 50), "fine");
        assert_eq!(verdict(&history, 2, 41, 50), "stale");
        assert_eq!(verdict(&history, 3, 41, 50), "stale");
        assert_eq!(verdict(&history, 4, 41, 50), "fine");
    }

    #[test]
    fn what_was_never_written_on_this_page_cannot_be_seen() {
        assert_eq!(verdict(&history(), 3, 1, 2), "impossible");
        let of_another_page = Read { began: MS, ended: MS * 2, content: content(6, 1) };
        assert!(matches!(history().judge(of_another_page), Verdict::Impossible));
    }

    #[test]
    fn forgetting_old_promises_forgives_no_new_read() {
        let mut history = History::new(7);
        for answered in 1..=3 * KEPT {
            let number = history.change();
            history.promise(promise(number, answered as u32));
        }
        assert!(history.promises.len() <= KEPT);
        let last = 3 * KEPT as u64;
        assert_eq!(verdict(&history, last - 1, last as u32 + 1, last as u32 + 2), "stale");
        assert_eq!(verdict(&history, last - 1, last as u32, last as u32 + 2), "fine");
    }

    #[test]
    fn only_an_outage_during_its_connection_explains_a_failure() {
        let mut outages = Outages::default();
        assert!(!outages.explain(MS, MS * 2));
        outages.begin(MS * 10);
        assert!(outages.explain(MS * 5, MS * 11), "killed under it");
        assert!(outages.explain(MS * 12, MS * 13), "nobody there");
        assert!(!outages.explain(MS * 5, MS * 9), "failed before");
        outages.end(MS * 20);
        assert!(outages.explain(MS * 5, MS * 100), "noticed late");
        assert!(outages.explain(MS * 19, MS * 100), "opened before it was ready");
        assert!(!outages.explain(MS * 21, MS * 100), "opened when it was ready");
    }
}
