//! A fleet on free ports, and ways to look at it: gates, raw clients, faults.
//!
//! Everything here ends with its value: processes are killed, folders removed, also when a test fails.

pub mod clearcoat;
pub mod client;
pub mod faults;
pub mod fleet;
pub mod reader;
pub mod simulated;
pub mod upstream;
pub mod varnish;
pub mod web;

use std::time::{Duration, Instant};

/// How long a gate waits before the test fails. Far longer than anything takes on a busy machine with two cores.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` gives a value.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < PATIENCE, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
