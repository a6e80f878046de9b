//! How the VCL's probe is answered at the origin, and by that: whether Varnish still sends this clearcoat requests.
//!
//! A Varnish that has several clearcoats takes turns among them (`vcl/origins.vcl`). It asks the next one for a GET that
//! failed, but sends no POST twice: one that it sends to a clearcoat whose origin has just closed is a shopper's 503. And
//! while the origin is open, uploads begin that last longer than the process may. So a clearcoat that ends refuses the
//! probe from the beginning of its end, and its origin closes when each Varnish has noticed.
//!
//! It does so only while another clearcoat stays. A Varnish without any that it believes in fetches from none, and the
//! last requests at the edge need what it fetches.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// By then each Varnish has asked three times and knows: `.interval`, `.timeout` and `.window` of the probe in
/// `vcl/origins.vcl`, and some room for a busy machine. Whoever has not asked for as long does not ask.
pub const NOTICED: Duration = Duration::from_secs(4);

/// Whether the probe is refused, and whether anybody asks.
#[derive(Debug)]
pub struct LeaveNotice {
    started: Instant,
    /// When it was asked last, in milliseconds since the start and one; 0 if never.
    asked: AtomicU64,
    refuses: AtomicBool,
}

impl Default for LeaveNotice {
    fn default() -> Self {
        LeaveNotice { started: Instant::now(), asked: AtomicU64::new(0), refuses: AtomicBool::new(false) }
    }
}

impl LeaveNotice {
    /// A Varnish asks whether this clearcoat is there. Returns whether it is refused.
    pub(super) fn refuses_probe(&self) -> bool {
        self.asked.store(self.now() + 1, Relaxed);
        self.refuses.load(Relaxed)
    }

    /// Says what probes are told from now on.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Relaxed);
    }

    /// Whether any Varnish has asked of late.
    pub fn is_asked(&self) -> bool {
        let asked = self.asked.load(Relaxed);
        asked > 0 && u128::from(self.now() + 1 - asked) < NOTICED.as_millis()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
    }
}
