//! What the process tells about itself: metrics and logs.

pub mod access;
mod causes;
mod incidents;
pub mod log;
pub mod metrics;
pub mod traces;

pub use causes::causes;
pub use incidents::{Incident, IncidentKind, Incidents};
pub use metrics::{
    Answers, CacheResult, Durations, FailureReason, FileShare, HandshakeResult, JournalMetrics, ListenerMetrics,
    Metrics, NodeMetrics, PurgeMetrics, PurgeResult, QueueMetrics, ReloadResult, Resync, RetryReason, SealVerdict,
    Shortage, UpstreamFault, VarnishMetrics, VclMetrics,
};
