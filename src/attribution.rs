//! Who purges what: the question of everybody whose cache is empty once more.
//!
//! Shops look for the extension, the cron job or the import that sends a bare `cat_p` every minute and so drops every
//! page with a product. What a purge names is therefore counted by **family** (`cat_p` for `cat_p_2046`) and by
//! **source** (the address of the sender), and what is **wide**, a flush or a bare family, is told in the log with
//! its source.
//!
//! Both come from outside, so nothing here can grow with them:
//!
//! - Families: those of Magento always have a name here; of the others the first ones get one, the rest is `other`.
//! - Sources: as many as a large shop has web nodes. In the API the one that was unseen for longest gives way. Labels
//!   of metrics cannot give way (a counter that goes backwards is a restart to Prometheus): the first ones get one.
//! - Of each of the newest purges a short sample is kept. Credentials, header values and query strings are no part of
//!   it: whoever may read the admin listener need not be one who may purge.
//! - The log gets one line a second for each source and each wide thing, with the number of those that were left out.

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

pub use family::describe;
pub use named::NamedTargets;
pub use throttle::Throttle;

/// The books: totals since the process started, and the newest purges. Shared by who writes and who shows them.
#[derive(Debug, Default)]
pub struct Attribution(Mutex<ledger::PurgeHistory>);

/// How an accepted purge ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its place in the journal.
    pub position: u64,
    /// When it arrived, in milliseconds since 1970.
    pub at_ms: u64,
    /// How long it took to its answer.
    pub took: Duration,
    /// The result as the metrics have it.
    pub result: &'static str,
    /// How many Varnish nodes have it.
    pub applied: usize,
    /// The nodes that had to be fenced.
    pub fenced: Vec<NodeId>,
    /// How many objects the nodes said they dropped.
    pub invalidated: u64,
}

/// What is to be counted and told of a purge. Every label is one of a bounded number.
#[derive(Debug, PartialEq, Eq)]
pub struct Noted {
    /// Tags by the label of their family.
    pub families: Vec<(Box<str>, u64)>,
    /// The label of its source.
    pub source: String,
    /// The wide things that it names.
    pub wide: Vec<Wide>,
}

/// A flush, or a bare family.
#[derive(Debug, PartialEq, Eq)]
pub struct Wide {
    /// `everything`, or the family. [`describe`] says it in words.
    pub what: &'static str,
    /// Where a line is due: how many like it were left out since the last one.
    pub left_out: Option<u64>,
}

/// All there is to show: `/api/v1/purges`.
#[derive(Debug, Serialize)]
pub struct PurgeReport {
    /// Totals by source, in the order of their addresses.
    pub sources: Vec<SourceTotal>,
    /// Totals by what was named, in the order of the names.
    pub what: Vec<WhatTotal>,
    /// The newest purges, the newest first.
    pub newest: Vec<Arc<PurgeRecord>>,
}

/// Totals of one source.
#[derive(Debug, Serialize)]
pub struct SourceTotal {
    /// The address of the sender.
    pub source: IpAddr,
    /// What it sent.
    #[serde(flatten)]
    pub total: Total,
}

/// Totals of one thing that purges name.
#[derive(Debug, Serialize)]
pub struct WhatTotal {
    /// A family of tags, `other` for all that have no name here, or the kind of a purge without tags: `everything`,
    /// `pattern`, `pool`, `url`.
    pub what: Box<str>,
    /// How often it was named.
    #[serde(flatten)]
    pub total: Total,
}

/// A total since the process started, or since the source came back into the books.
#[derive(Clone, Debug, Serialize)]
pub struct Total {
    /// Purges.
    pub purges: u64,
    /// Tags that they named.
    pub tags: u64,
    /// How many of the purges were wide (here).
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
    /// Who sent it.
    pub source: IpAddr,
    /// What it is, as the metrics have it.
    pub kind: &'static str,
    /// Whether pages were to be kept for grace.
    pub soft: bool,
    /// How many tags it names.
    pub tags: u64,
    /// The same by family.
    pub families: BTreeMap<Box<str>, u64>,
    /// The wide things among what it names.
    pub wide: Vec<&'static str>,
    /// The first tags, or the pattern, cut off where they are long.
    pub sample: Vec<String>,
    /// The result as the metrics have it.
    pub result: &'static str,
    /// How many Varnish nodes have it.
    pub applied: usize,
    /// The nodes that had to be fenced.
    pub fenced: Vec<NodeId>,
    /// How many objects the nodes said they dropped.
    pub invalidated: u64,
    /// How long it took to its answer, in milliseconds.
    pub duration_ms: u64,
}

impl Attribution {
    /// Enters an accepted purge; says what is to be counted and told of it.
    pub fn note(&self, source: IpAddr, named: NamedTargets, ended: Ended) -> Noted {
        self.ledger().note(source, named, ended)
    }

    /// All there is to show.
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
