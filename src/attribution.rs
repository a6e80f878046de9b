//! Attributes purges to their senders: to find out why a cache is empty again.
//!
//! Shops look for the extension, the cron job or the import that sends a bare `cat_p` every minute and so drops every
//! page with a product. So purged tags are counted by **family** (`cat_p` for `cat_p_2046`) and by **source** (the
//! sender's address), and a **wide** purge, a flush or a bare family, is logged with its source.
//!
//! Both come from outside, so all memory is bounded:
//!
//! - Families: Magento's always have a label of their own; so do the first others, and the rest count as `other`.
//! - Sources: as many as a large shop has web nodes. In the API the least recently seen one is evicted. Metric labels
//!   cannot be evicted (to Prometheus a counter that goes backwards is a restart): the first sources get one.
//! - A short sample of each recent purge is kept, without credentials, header values and query strings: a reader of the
//!   admin listener may not be allowed to purge.
//! - The log gets one line a second for each source and wide target, with the number of suppressed lines.

mod family;
mod ledger;
mod named;
mod throttle;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;

use crate::fleet::NodeId;

pub use family::{OTHER, describe, wide_targets};
pub use named::NamedTargets;
pub use throttle::Throttle;

/// The totals since the process started, and the newest purges.
#[derive(Debug, Default)]
pub struct Attribution(Mutex<ledger::PurgeHistory>);

/// The outcome of an accepted purge.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its journal position.
    pub position: u64,
    /// When it arrived, in milliseconds since 1970.
    pub at_ms: u64,
    /// The time from its arrival to its answer.
    pub took: Duration,
    /// The result, as its metric label.
    pub result: &'static str,
    /// The number of Varnish nodes that have it.
    pub applied: usize,
    /// The nodes that were fenced for it.
    pub fenced: Vec<NodeId>,
    /// The number of objects that the nodes reported as dropped.
    pub invalidated: u64,
}

/// The counts and log lines due for a purge. All labels are from bounded sets.
#[derive(Debug, PartialEq, Eq)]
pub struct Noted {
    /// The number of tags per family label.
    pub families: Vec<(Box<str>, u64)>,
    /// The label of its source.
    pub source: String,
    /// Its wide targets.
    pub wide: Vec<Wide>,
}

/// A flush, or a bare family.
#[derive(Debug, PartialEq, Eq)]
pub struct Wide {
    /// `everything`, or the family. [`describe`] explains it.
    pub what: &'static str,
    /// If a line is due: the number of similar lines suppressed since the last one.
    pub left_out: Option<u64>,
}

/// The complete report: `/api/v1/purges`.
#[derive(Debug, Serialize)]
pub struct PurgeReport {
    /// Totals by source, in the order of their addresses.
    pub sources: Vec<SourceTotal>,
    /// Totals by target, ordered by name.
    pub what: Vec<WhatTotal>,
    /// The newest purges, the newest first.
    pub newest: Vec<Arc<PurgeRecord>>,
}

/// Totals of one source.
#[derive(Debug, Serialize)]
pub struct SourceTotal {
    /// The address of the sender.
    pub source: IpAddr,
    /// Its purges.
    #[serde(flatten)]
    pub total: Total,
}

/// Totals of one target.
#[derive(Debug, Serialize)]
pub struct WhatTotal {
    /// A family of tags, `other` for all unnamed families, or the kind of a purge without tags: `everything`,
    /// `pattern`, `pool`, `url`.
    pub what: Box<str>,
    /// Purges with this target.
    #[serde(flatten)]
    pub total: Total,
}

/// A total since the process started, or since an evicted source returned.
#[derive(Clone, Debug, Serialize)]
pub struct Total {
    /// Purges.
    pub purges: u64,
    /// Tags in them.
    pub tags: u64,
    /// The number of them that were wide for this source or target.
    pub wide: u64,
    /// The last one (RFC 3339).
    #[serde(serialize_with = "rfc3339")]
    pub last_seen: u64,
}

/// One purge.
#[derive(Debug, Serialize)]
pub struct PurgeRecord {
    /// Its place in the journal.
    pub position: u64,
    /// When it arrived (RFC 3339).
    #[serde(rename = "time", serialize_with = "rfc3339")]
    pub at_ms: u64,
    /// The sender's address.
    pub source: IpAddr,
    /// The kind, as its metric label.
    pub kind: &'static str,
    /// Whether pages were to be kept for grace.
    pub soft: bool,
    /// The number of its tags.
    pub tags: u64,
    /// The number of its tags per family.
    pub families: BTreeMap<Box<str>, u64>,
    /// Its wide targets.
    pub wide: Vec<&'static str>,
    /// The first tags, or the pattern, truncated.
    pub sample: Vec<String>,
    /// The result, as its metric label.
    pub result: &'static str,
    /// The number of Varnish nodes that have it.
    pub applied: usize,
    /// The nodes that were fenced for it.
    pub fenced: Vec<NodeId>,
    /// The number of objects that the nodes reported as dropped.
    pub invalidated: u64,
    /// The time from its arrival to its answer, in milliseconds.
    pub duration_ms: u64,
}

impl Attribution {
    /// Records an accepted purge. Returns the counts and log lines due for it.
    pub fn note(&self, source: IpAddr, named: NamedTargets, ended: Ended) -> Noted {
        self.ledger().note(source, named, ended)
    }

    /// The complete report.
    pub fn report(&self) -> PurgeReport {
        self.ledger().report()
    }

    fn ledger(&self) -> parking_lot::MutexGuard<'_, ledger::PurgeHistory> {
        self.0.lock()
    }
}

fn rfc3339<S: serde::Serializer>(at_ms: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    let at = UNIX_EPOCH + Duration::from_millis(*at_ms);
    serializer.collect_str(&humantime::format_rfc3339_millis(at))
}
