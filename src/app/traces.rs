//! Traces: exported as configured.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use crate::config;
use crate::otlp::{ExportOptions, ExporterThread};
use crate::telemetry::Metrics;
use crate::telemetry::traces::Tracer;

/// How long the end of the process waits for spans that are still to be sent.
const LAST_SPANS: Duration = Duration::from_secs(1);

/// The traces of the process, if it has any.
#[derive(Debug, Default)]
pub(super) struct RunningTraces {
    /// For those who make spans.
    pub(super) tracer: Option<Arc<Tracer>>,
    exporter: Option<ExporterThread>,
}

impl RunningTraces {
    /// # Errors
    /// If the system refuses a thread.
    pub(super) fn start(config: &config::Traces, metrics: &Metrics) -> anyhow::Result<Self> {
        let Some(endpoint) = config.endpoint.clone() else { return Ok(RunningTraces::default()) };
        let (tracer, spans) = Tracer::new(config.sample, metrics.spans_dropped.clone());
        let config::Traces { ca, headers, service_name, .. } = config.clone();
        let dropped = metrics.spans_dropped.clone();
        let options = ExportOptions { endpoint, ca, headers, service_name, dropped };
        let exporter = ExporterThread::start(options, spans).context("traces")?;
        Ok(RunningTraces { tracer: Some(tracer), exporter: Some(exporter) })
    }

    /// Waits until all spans are sent, once nobody makes any; not for long, as the collector may hang.
    pub(super) async fn end(self) {
        let Some(exporter) = self.exporter else { return };
        let ended = tokio::task::spawn_blocking(move || exporter.end(LAST_SPANS)).await;
        if !ended.unwrap_or(false) {
            tracing::warn!("the last spans could not be exported");
        }
    }
}
