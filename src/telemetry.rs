//! What the process tells about itself: metrics and logs.

mod causes;
pub mod log;
pub mod metrics;

pub use causes::causes;
pub use metrics::{ListenerMetrics, Metrics, NodeMetrics, PurgeMetrics, Shortage, UpstreamFault, VarnishMetrics};
