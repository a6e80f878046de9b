//! The retry budget: how many requests may be sent to another node after one has failed them.
//!
//! A retry is the right answer to one node that fails, and the wrong one to a fleet that does. If every node drops requests because it
//! has too many, each that is tried again makes two of one: what was a peak stays, as the retries alone keep the fleet at its limit, when
//! the readers that began it are long gone (Bronson, Aghayev, Charapko and Zhu, "Metastable Failures in Distributed Systems").
//! So retries are at most a share of the requests, 20 % as in Envoy, Finagle and linkerd.
//!
//! **A share of what.** Envoy counts the retries that are under way, and allows 20 % of the requests under way, at least three
//! (`retry_budget`, `min_retry_concurrency`). Of two nodes one that is killed fails half of what is under way in the same moment: three in
//! five of its readers would be told of a failure, though the other node could have served all of them. That is the
//! promise that must not break. As in Finagle (`RetryBudget`) the share is therefore one of time: retries of the last [`WINDOW`] against
//! requests of the last [`WINDOW`]. Requests without a retry are saved up, for at most so long, and pay for what a node
//! fails at once when it dies: at 1,000 requests a second there are 2,000 retries for it. While all requests are answered within
//! four seconds, no half of what is under way is more than that. A fleet that fails every request gets up to twice its load for two
//! seconds, and from then on 1.2 times.
//!
//! **At least [`LEAST`]**, whatever the share: ten a second, as in Finagle, are no storm, and a shop with few requests has nothing saved.
//!
//! **What counts** is decided by who asks: a request that no node may have begun to carry out (no connection could be
//! opened, none of its bytes was sent) is moved in any case. It was no load where it failed, and is moved once.
//!
//! Pure: the caller has the clock. It is for all workers, behind a lock that is taken when something has failed, and ten times a
//! second by each worker to say what it has taken in.

/// How far back retries and requests count, in seconds.
pub const WINDOW: u64 = 10;

/// The retries that are always allowed within [`WINDOW`].
pub const LEAST: u64 = 100;

/// What was asked and asked again of the nodes of a listener.
#[derive(Debug, Default)]
pub struct RetryBudget {
    /// The second `s` stands at `s` modulo [`WINDOW`].
    seconds: [BudgetSecond; WINDOW as usize],
}

#[derive(Clone, Copy, Debug, Default)]
struct BudgetSecond {
    /// Which it is.
    second: u64,
    requests: u64,
    retries: u64,
}

impl RetryBudget {
    /// Notes requests that were taken in.
    pub fn note_requests(&mut self, second: u64, requests: u64) {
        self.at(second).requests += requests;
    }

    /// Whether one more request may be retried now. `share`: 0 to 1.
    pub fn has_left(&self, second: u64, share: f64) -> bool {
        let counts = |of: &&BudgetSecond| of.second + WINDOW > second && of.second <= second;
        let (requests, retries) = self
            .seconds
            .iter()
            .filter(counts)
            .fold((0, 0), |(requests, retries), of| (requests + of.requests, retries + of.retries));
        retries < LEAST + (share * requests as f64) as u64
    }

    /// Takes one retry out of it, if there is one left.
    pub fn spend(&mut self, second: u64, share: f64) -> bool {
        let has_left = self.has_left(second, share);
        if has_left {
            self.at(second).retries += 1;
        }
        has_left
    }

    fn at(&mut self, second: u64) -> &mut BudgetSecond {
        let slot = &mut self.seconds[(second % WINDOW) as usize];
        // Of a worker that stood still, the slot may have a later one by now.
        if slot.second < second {
            *slot = BudgetSecond { second, ..BudgetSecond::default() };
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARE: f64 = 0.2;

    /// How many are allowed of this many that want to be retried.
    fn spent(budget: &mut RetryBudget, second: u64, wanted: u64) -> u64 {
        (0..wanted).filter(|_| budget.spend(second, SHARE)).count() as u64
    }

    #[test]
    fn a_fleet_that_fails_everything_gets_a_fifth_more_than_its_requests() {
        let mut budget = RetryBudget::default();
        let mut retries = Vec::new();
        for second in 1..=60 {
            budget.note_requests(second, 1000);
            retries.push(spent(&mut budget, second, 1000));
        }
        // What was saved up, which is little at the start of a process, and then the share.
        for (second, window) in retries.windows(WINDOW as usize).enumerate() {
            let most = LEAST + 200 * WINDOW;
            assert!(window.iter().sum::<u64>() <= most, "{window:?} from second {second} on");
        }
        assert_eq!(retries[20..].iter().sum::<u64>(), 40 * 200 + 4 * LEAST, "{retries:?}");
    }

    #[test]
    fn all_that_a_node_of_two_has_at_1000_requests_a_second_is_moved() {
        let mut budget = RetryBudget::default();
        (1..=10).for_each(|second| budget.note_requests(second, 1000));
        // Each takes four seconds.
        assert_eq!(spent(&mut budget, 10, 2000), 2000);
        assert_eq!(spent(&mut budget, 10, 2000), LEAST);
    }

    #[test]
    fn a_shop_with_few_requests_has_the_least_and_saves_nothing_for_long() {
        let mut budget = RetryBudget::default();
        assert_eq!(spent(&mut budget, 0, 1000), LEAST);
        budget.note_requests(3, 1_000_000);
        assert_eq!(spent(&mut budget, 3 + WINDOW, 1000), LEAST, "what was saved is gone, and what was spent as well");
        assert_eq!(spent(&mut budget, 2 + 2 * WINDOW, 1000), 0);
        assert_eq!(spent(&mut budget, 3 + 2 * WINDOW, 1000), LEAST);
    }

    #[test]
    fn a_share_of_0_leaves_the_least_and_one_of_1_allows_all() {
        for (share, expected) in [(0.0, LEAST), (1.0, LEAST + 500)] {
            let mut budget = RetryBudget::default();
            budget.note_requests(5, 500);
            assert_eq!((0..1000).filter(|_| budget.spend(5, share)).count() as u64, expected, "{share}");
        }
    }

    #[test]
    fn a_worker_that_is_late_does_not_wipe_what_others_noted() {
        let mut budget = RetryBudget::default();
        budget.note_requests(21, 1000);
        // The old second is still in the window, and its slot its own.
        budget.note_requests(20, 1000);
        assert_eq!(spent(&mut budget, 21, 1000), LEAST + 400);
        // One that stood still for as long as the window.
        budget.note_requests(11, 0);
        assert!(!budget.has_left(21, SHARE));
    }
}
