//! `[journal]`: where accepted purges are kept.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::text;

/// `[journal]`: the durable list of purges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Journal {
    /// Default `etcd` if the registry is etcd, else `disk`.
    pub kind: JournalKind,
    /// The directory of a journal on disk, and of what has to survive a restart without etcd. Default
    /// `/var/lib/clearcoat`.
    pub path: PathBuf,
    /// What a start without any journal thinks of the pages that the Varnish nodes hold. Default `flush`.
    pub first_start: FirstStart,
    /// What a start with a journal does that cannot be read. Default `refuse`.
    pub damaged: Damaged,
    /// How long a purge is kept for a Varnish that is away; one that was away for longer drops all its pages
    /// instead. Above 0, default 1h.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub retention: Duration,
    /// How many purged tags are remembered, also after their purges are gone from the journal; a page that was rendered
    /// before what is remembered counts as purged. About 64 bytes of memory for each, rounded up to a power of two: 64 MiB for a million. 1,000 to
    /// 16,777,216, default 1,000,000.
    pub names: usize,
}

impl Default for Journal {
    fn default() -> Self {
        Journal {
            kind: JournalKind::default(),
            path: PathBuf::from("/var/lib/clearcoat"),
            first_start: FirstStart::default(),
            damaged: Damaged::default(),
            retention: Duration::from_secs(60 * 60),
            names: 1_000_000,
        }
    }
}

/// What a start without any journal thinks of the pages that the Varnish nodes hold: a volume that was lost looks the
/// same as one that was never used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstStart {
    /// They may be old: each Varnish gets one ban of everything before it serves.
    #[default]
    Flush,
    /// They are as new as the shop: nothing was purged that they missed.
    Trust,
}

/// What a start with a journal does that cannot be read, other than one that was cut short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Damaged {
    /// It does not start: a disk that returns what was not written is for somebody to look at.
    #[default]
    Refuse,
    /// It puts the file aside and begins a new one, as if it were gone.
    Anew,
}

/// Where the journal is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JournalKind {
    /// In the process: lost with it, so every Varnish starts empty after a restart.
    Memory,
    /// In a file below `path`.
    #[default]
    Disk,
    /// In etcd, shared by all replicas, with a copy of its end below `path`.
    Etcd,
}

impl JournalKind {
    /// The name in configuration and the API.
    pub fn as_str(self) -> &'static str {
        match self {
            JournalKind::Memory => "memory",
            JournalKind::Disk => "disk",
            JournalKind::Etcd => "etcd",
        }
    }
}
