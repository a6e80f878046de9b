//! What the process tells about itself: metrics and logs.

pub mod log;
pub mod metrics;

pub use metrics::{ListenerMetrics, Metrics, NodeMetrics, PurgeMetrics, UpstreamFault, VarnishMetrics};
