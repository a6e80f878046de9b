//! The wall clock, in one place.
//!
//! For what is kept or shown: when a purge was accepted, when a process began. How long something takes is measured with
//! `Instant`. What one wall clock says is compared with that clock alone: no two machines' times meet.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, in milliseconds since 1970. A clock before 1970 says 0.
pub fn now_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}
