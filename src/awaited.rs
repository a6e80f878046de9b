//! Waiting for others, for at most a given time.
//!
//! A purge is answered when everybody who can have it has it: each Varnish, and each other replica. Whoever lets a purge
//! time out is *late*, and later purges are answered without waiting for it until it has caught up. So a party that hangs
//! costs one timeout, and not one for each purge. Purges that are already waiting for it stop waiting, too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// Wakes the waiting purges after a change that one of them may depend on.
#[derive(Debug, Default)]
pub struct Progress(watch::Sender<()>);

impl Progress {
    /// Has every waiting purge look again.
    pub fn notify(&self) {
        self.0.send_replace(());
    }

    /// Changes from now on.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.0.subscribe()
    }

    /// Returns once the condition holds. It is evaluated now and after each [`Progress::notify`].
    pub async fn until(&self, condition: impl Fn() -> bool) {
        // Subscribed before the first look, so that no change is missed.
        let mut changes = self.0.subscribe();
        while !condition() {
            // Cannot fail: the sender is borrowed.
            _ = changes.changed().await;
        }
    }

    /// Waits for all of `awaited`, at most for `timeout`, then calls `mark_late` for each one that is not settled.
    pub async fn wait_for<P>(
        &self,
        awaited: &[P],
        timeout: Duration,
        is_settled: impl Fn(&P) -> bool,
        mark_late: impl Fn(&P),
    ) {
        let all_settled = self.until(|| awaited.iter().all(&is_settled));
        if tokio::time::timeout(timeout, all_settled).await.is_err() {
            awaited.iter().filter(|party| !is_settled(party)).for_each(mark_late);
            self.notify();
        }
    }
}

/// Whether a party is late. It is on time at first.
#[derive(Debug, Default)]
pub struct Lateness(AtomicBool);

impl Lateness {
    /// Whether purges are answered without this party.
    pub fn is_late(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Marks the party late. Returns whether that is new.
    pub fn mark_late(&self) -> bool {
        !self.0.swap(true, Ordering::SeqCst)
    }

    /// The party has caught up. Returns whether it was late.
    pub fn mark_on_time(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[derive(Default)]
    struct Party {
        has_it: AtomicBool,
        lateness: Lateness,
    }

    impl Party {
        fn is_settled(&self) -> bool {
            self.has_it.load(Ordering::SeqCst) || self.lateness.is_late()
        }
    }

    async fn wait(progress: &Progress, parties: &[Party], timeout: Duration) {
        progress.wait_for(parties, timeout, Party::is_settled, |party| _ = party.lateness.mark_late()).await;
    }

    #[tokio::test]
    async fn a_wait_ends_when_the_last_one_has_it_and_nobody_is_late() {
        let (progress, parties) = (Progress::default(), [Party::default(), Party::default()]);
        let arrivals = async {
            for party in &parties {
                tokio::task::yield_now().await;
                party.has_it.store(true, Ordering::SeqCst);
                progress.notify();
            }
        };
        tokio::join!(wait(&progress, &parties, LONG), arrivals);
        assert!(parties.iter().all(|party| party.has_it.load(Ordering::SeqCst) && !party.lateness.is_late()));
    }

    #[tokio::test]
    async fn a_timeout_marks_only_those_that_are_missing_and_ends_other_waits() {
        let (progress, parties) = (Progress::default(), [Party::default(), Party::default()]);
        parties[0].has_it.store(true, Ordering::SeqCst);
        tokio::join!(wait(&progress, &parties, Duration::from_millis(1)), wait(&progress, &parties, LONG));
        assert_eq!(parties.map(|party| party.lateness.is_late()), [false, true]);
    }

    #[test]
    fn a_change_of_lateness_is_reported_once() {
        let lateness = Lateness::default();
        assert!(!lateness.mark_on_time());
        assert_eq!((lateness.mark_late(), lateness.mark_late(), lateness.is_late()), (true, false, true));
        assert_eq!((lateness.mark_on_time(), lateness.mark_on_time()), (true, false));
    }
}
