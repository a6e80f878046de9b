//! What the journal counts, and the replicas that share it.

use prometheus::{IntCounter, IntGauge, Registry};

use super::family::{IntGauges, int_gauges};
use super::labels::AnewReason;
use super::purge::BUCKETS;
use super::sharded::DurationHistogram;
use super::{counter, histogram, register};

/// The metrics of the journal.
#[derive(Debug)]
pub struct JournalMetrics {
    /// The last durable position.
    pub head: IntGauge,
    /// How long it took to make a purge durable.
    pub append_duration: DurationHistogram,
    /// Whether the disk of the journal refuses, or does not answer.
    pub stalled: IntGauge,
    anew: IntGauges<AnewReason>,
    /// Purges that are not in etcd yet.
    pub spooled: IntGauge,
    /// Clearcoats before this fleet, as far as is known.
    pub replicas: IntGauge,
    /// Whether another clearcoat has the name of this one.
    pub same_id: IntGauge,
    /// Times another clearcoat did not know which of its purges were missing here.
    pub replica_gaps: IntCounter,
    /// Times a purge was answered though a replica had not confirmed it.
    pub unconfirmed: IntCounter,
}

impl JournalMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(JournalMetrics {
            head: register(r, IntGauge::new("journal_head_position", "The last durable position")?)?,
            append_duration: histogram(
                r,
                "journal_append_duration_seconds",
                "Time until a purge was durable",
                &BUCKETS,
            )?,
            stalled: register(
                r,
                IntGauge::new(
                    "journal_stalled",
                    "Whether the disk of the journal refuses what is written, or does not answer",
                )?,
            )?,
            anew: int_gauges(
                r,
                "journal_anew",
                "1 where this process began without the journal of the one before it, and why",
            )?,
            spooled: register(
                r,
                IntGauge::new("journal_spooled", "Purges that are durable here and not in etcd yet")?,
            )?,
            replicas: register(r, IntGauge::new("replicas", "Clearcoats before this fleet, with this one")?)?,
            same_id: register(
                r,
                IntGauge::new(
                    "replica_same_id",
                    "1 while another clearcoat before this fleet has the name of this one",
                )?,
            )?,
            replica_gaps: counter(
                r,
                "replica_gaps_total",
                "Times another replica did not know which of its purges were missing here, so that every Varnish dropped \
                 its pages",
            )?,
            unconfirmed: counter(
                r,
                "replica_unconfirmed_total",
                "Purges that were answered though another replica had not confirmed them",
            )?,
        })
    }

    /// Shows whether this is why the process began without the journal of the one before it.
    pub fn began_anew(&self, reason: &str, is_it: bool) {
        self.anew.get(&AnewReason(reason.into())).set(is_it.into());
    }
}
