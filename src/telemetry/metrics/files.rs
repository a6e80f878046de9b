//! What the process itself uses, and is out of: that is counted each time, and said once while it lasts.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use prometheus::{IntCounter, IntGauge, Registry};

use super::family::{Counters, IntGauges, counters, int_gauges};
use super::labels::{FileShare, ShortageAt};
use crate::telemetry::{IncidentKind, Incidents};

/// After this long without a shortage the next one is another, in seconds.
const OVER_AFTER: u64 = 10;

/// The files of the traffic, and what there was too little of.
#[derive(Debug)]
pub struct FileMetrics {
    used: IntGauges<FileShare>,
    limit: IntGauges<FileShare>,
    shortages: Counters<ShortageAt>,
    incidents: Arc<Incidents>,
    /// Connections that could not be accepted.
    pub accept: Shortage,
    /// Connections to nodes that could not be opened, and not because of the node.
    pub connect: Shortage,
    /// Health checks that could not be carried out.
    pub probe: Shortage,
}

impl FileMetrics {
    pub(super) fn new(r: &Registry, incidents: &Arc<Incidents>) -> prometheus::Result<Self> {
        let help = "Times that this process was out of files, ports or memory, by what wanted them";
        let shortages = counters(r, "shortages_total", help)?;
        let shortage = |at| Shortage::new(at, &shortages, incidents);
        Ok(FileMetrics {
            used: int_gauges(r, "files", "Open files of the traffic, by what they are for")?,
            limit: int_gauges(r, "files_limit", "How many there may be")?,
            accept: shortage(ShortageAt::Accept),
            connect: shortage(ShortageAt::Connect),
            probe: shortage(ShortageAt::Probe),
            shortages,
            incidents: Arc::clone(incidents),
        })
    }

    /// How many open files there are of a share of the traffic, and how many there may be.
    pub fn share(&self, share: FileShare) -> (IntGauge, IntGauge) {
        (self.used.get(&share), self.limit.get(&share))
    }

    /// Shortages of a share of the traffic.
    pub fn shortage(&self, share: FileShare) -> Shortage {
        Shortage::new(ShortageAt::Share(share), &self.shortages, &self.incidents)
    }
}

/// Shortages at one place.
#[derive(Debug)]
pub struct Shortage {
    at: ShortageAt,
    count: IntCounter,
    incidents: Arc<Incidents>,
    started: Instant,
    /// Seconds after `started`, plus one; 0 is never.
    last: AtomicU64,
}

impl Shortage {
    fn new(at: ShortageAt, shortages: &Counters<ShortageAt>, incidents: &Arc<Incidents>) -> Self {
        let (count, incidents) = (shortages.get(&at), Arc::clone(incidents));
        Shortage { at, count, incidents, started: Instant::now(), last: AtomicU64::new(0) }
    }

    /// Counts one, and says so where it is the first.
    pub fn note(&self, reason: &dyn Display) {
        self.count.inc();
        let now = self.started.elapsed().as_secs() + 1;
        let last = self.last.swap(now, Ordering::Relaxed);
        if last == now {
            // In the same second as the one before.
            return;
        }
        self.incidents.note(IncidentKind::Shortage, &format!("{}: {reason}", self.at.as_str()));
        if last == 0 || now.saturating_sub(last) > OVER_AFTER {
            tracing::warn!(at = self.at.as_str(), %reason, "this process is short of something; see clearcoat_shortages_total and LimitNOFILE");
        }
    }
}
