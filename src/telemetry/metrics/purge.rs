//! What the purge listener counts.

use prometheus::{IntCounter, IntGauge, Registry};

use super::family::{Counters, counters};
use super::labels::{PurgeKind, PurgeResult, Sender, TagFamily, WideTarget};
use super::sharded::DurationHistogram;
use super::{histogram, register};
use crate::attribution::{OTHER, wide_targets};
use crate::purge::Purge;

/// From one fsync to a fleet that hangs, in seconds.
pub(super) const BUCKETS: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// The kind of a request that came to no purge.
const NONE: &str = "none";

/// How such a request ends.
const NO_PURGE: [PurgeResult; 3] = [PurgeResult::Refused, PurgeResult::Empty, PurgeResult::Forbidden];

/// All ways in which purge requests end: each is there from the start, so that the first of its kind is a rise and not a
/// new series.
fn requests() -> impl Iterator<Item = (PurgeKind, PurgeResult)> {
    let of_kind = |kind: &'static str| {
        let is_purge = kind != NONE;
        let results = PurgeResult::ALL.into_iter().filter(move |result| NO_PURGE.contains(result) != is_purge);
        results.map(move |result| (PurgeKind(kind.into()), result))
    };
    Purge::KINDS.into_iter().chain([NONE]).flat_map(of_kind)
}

/// The metrics of the purge listener.
#[derive(Debug)]
pub struct PurgeMetrics {
    requests: Counters<(PurgeKind, PurgeResult)>,
    tags: Counters<TagFamily>,
    sources: Counters<Sender>,
    wide: Counters<WideTarget>,
    /// Tags that needed no place in a ban, because something else in the batch covered them.
    pub tags_folded: IntCounter,
    /// Purges that are under way: accepted, or about to be, and not answered yet.
    pub waiting: IntGauge,
    /// How long an accepted purge took to its answer.
    pub ack_duration: DurationHistogram,
}

impl PurgeMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(PurgeMetrics {
            requests: counters(r, "purges_total", "Purge requests by kind and result")?.with(requests()),
            tags: counters(r, "purge_tags_total", "Tags in accepted purges by their family")?
                .with([TagFamily(OTHER.into())]),
            sources: counters(r, "purge_sources_total", "Accepted purges by the address of the sender")?
                .with([Sender(OTHER.into())]),
            wide: counters(r, "purge_wide_total", "Accepted purges of everything, or of a bare family")?
                .with(wide_targets().map(|what| WideTarget(what.into()))),
            tags_folded: register(
                r,
                IntCounter::new(
                    "purge_tags_folded_total",
                    "Tags that needed no place in a ban, because another purge of the batch covered them",
                )?,
            )?,
            waiting: register(r, IntGauge::new("purges_waiting", "Purges that are not answered yet")?)?,
            ack_duration: histogram(
                r,
                "purge_ack_duration_seconds",
                "Time from an accepted purge request to its answer",
                &BUCKETS,
            )?,
        })
    }

    /// Counts a purge request. `kind` is [`crate::purge::Purge::kind`], or `none` if it came to no purge.
    pub fn requested(&self, kind: &'static str, result: PurgeResult) {
        self.requests.get(&(PurgeKind(kind.into()), result)).inc();
    }

    /// Counts tags of an accepted purge. `family` is one of a bounded number ([`crate::attribution`]).
    pub fn named(&self, family: &str, tags: u64) {
        self.tags.get(&TagFamily(family.into())).inc_by(tags);
    }

    /// Counts an accepted purge for its sender. `source` is one of a bounded number ([`crate::attribution`]).
    pub fn sent_by(&self, source: &str) {
        self.sources.get(&Sender(source.into())).inc();
    }

    /// Counts a wide purge. `what` is [`crate::attribution::Wide::what`].
    pub fn wide(&self, what: &'static str) {
        self.wide.get(&WideTarget(what.into())).inc();
    }
}
