//! The status of a registry that follows several names or services, for the status page and metrics.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The status of all names, or services, together.
#[derive(Debug)]
pub struct SourceStatus {
    started: Instant,
    connected: AtomicBool,
    /// Milliseconds from `started` to the last answer.
    heard: AtomicU64,
    problem: Mutex<Option<Arc<str>>>,
}

impl Default for SourceStatus {
    /// Nothing was answered yet.
    fn default() -> Self {
        SourceStatus {
            started: Instant::now(),
            connected: AtomicBool::new(false),
            heard: AtomicU64::new(0),
            problem: Mutex::default(),
        }
    }
}

impl SourceStatus {
    /// Whether each of them was answered the last time that it was asked for.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Time since one was last answered, or since the first question if none ever was.
    pub fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(heard)
    }

    /// Those that are not answered, and why, if there are any.
    pub fn problem(&self) -> Option<Arc<str>> {
        self.problem.lock().clone()
    }

    pub(super) fn record_contact(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Relaxed);
    }

    /// `failing` are those that are not answered, with the reasons; `complete`: each was asked for.
    pub(super) fn set(&self, complete: bool, failing: &BTreeMap<usize, String>) {
        self.connected.store(complete && failing.is_empty(), Ordering::Relaxed);
        let problem: Vec<&str> = failing.values().map(String::as_str).collect();
        *self.problem.lock() = (!problem.is_empty()).then(|| problem.join("; ").into());
    }
}
