//! The retry budgets of the listeners ([`RetryBudget`] says why there are any), for all workers.
//!
//! What counts is a request that a node may have begun to carry out: bytes of it were sent. It is load where it failed, perhaps still (a
//! hung node goes on when it wakes up), and load where it is sent next. What does not count:
//!
//! - **Nothing was sent**, as no connection could be opened. It is moved in any case, once.
//! - **A kept connection that its node closed.** The request is sent there again, on a new one. That is how idle connections end.
//!   But if that fails as well, so that it goes elsewhere, it counts.
//! - **A stale answer of a cache** ([`super::second_look`]): the promise that nobody sees an old page has no budget.
//!
//! Beyond the budget the failure is answered as it is (502). A request that waits for a node that went down is not refused but stays, as if
//! there was no other node: it may move when there is budget again.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::balance::{LEAST_RETRIES, RETRY_WINDOW, RetryBudget};
use crate::fleet::Role;
use crate::telemetry::{Metrics, RetryReason};

/// Seconds between two lines of the log.
const SAID_AGAIN: u64 = 10;

/// The budgets of both listeners.
#[derive(Debug)]
pub struct RetryBudgets {
    of_role: [Mutex<ListenerRetries>; 2],
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct ListenerRetries {
    budget: RetryBudget,
    /// When it was said that it is used up, and how many were refused since.
    said: Option<u64>,
    refused: u64,
}

impl RetryBudgets {
    /// Budgets of which nothing is used.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        RetryBudgets { of_role: Default::default(), metrics }
    }

    /// Notes requests that were taken in for nodes of this role. `second` counts from a fixed moment.
    pub(super) fn note_requests(&self, role: Role, second: u64, requests: u64) {
        if requests > 0 {
            self.of_role[role as usize].lock().budget.note_requests(second, requests);
        }
    }

    /// Whether a request could be retried now.
    pub(super) fn has_left(&self, role: Role, second: u64, share: f64) -> bool {
        self.of_role[role as usize].lock().budget.has_left(second, share)
    }

    /// Takes a retry out of the budget, if there is one left.
    pub(super) fn spend(&self, (role, reason): (Role, RetryReason), second: u64, share: f64) -> bool {
        let is_paid = self.of_role[role as usize].lock().budget.spend(second, share);
        if !is_paid {
            self.refuse((role, reason), second);
        }
        is_paid
    }

    /// Counts a retry that is not made, and says so now and then.
    pub(super) fn refuse(&self, (role, reason): (Role, RetryReason), second: u64) {
        let mut retries = self.of_role[role as usize].lock();
        retries.refused += 1;
        let is_said = retries.said.is_none_or(|said| said + SAID_AGAIN <= second);
        let refused = if is_said {
            retries.said = Some(second);
            std::mem::take(&mut retries.refused)
        } else {
            0
        };
        drop(retries);
        self.metrics.queue.count_refused_retry(role, reason);
        if is_said {
            tracing::warn!(
                %role, reason = reason.as_str(), refused, least = LEAST_RETRIES, seconds = RETRY_WINDOW,
                "the retry budget is used up: nodes fail in common, or drop what is too much for them"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_budget_refuses_is_counted_for_each_listener() {
        let metrics = Arc::new(Metrics::new().unwrap());
        let retries = RetryBudgets::new(Arc::clone(&metrics));
        retries.note_requests(Role::Web, 3, 100);
        let spend = |role| retries.spend((role, RetryReason::NoAnswer), 3, 0.2);
        assert_eq!((0..200).filter(|_| spend(Role::Web)).count() as u64, LEAST_RETRIES + 20);
        assert!(!retries.has_left(Role::Web, 3, 0.2) && retries.has_left(Role::Varnish, 3, 0.2));
        assert_eq!((0..200).filter(|_| spend(Role::Varnish)).count() as u64, LEAST_RETRIES);
        let text = String::from_utf8(metrics.render().unwrap()).unwrap();
        for (role, refused) in [("web", 80), ("varnish", 100)] {
            let series = format!("clearcoat_retries_refused_total{{reason=\"no_answer\",role=\"{role}\"}} {refused}\n");
            assert!(text.contains(&series), "{text}");
        }
    }
}
