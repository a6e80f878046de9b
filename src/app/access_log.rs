//! The access log: started as configured, and its losses said.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use prometheus::IntCounter;

use crate::config;
use crate::telemetry::access::{AccessLog, AccessOptions, AccessWriter, LineFormat, Redaction};
use crate::telemetry::{IncidentKind, Incidents, Metrics};

/// How often losses are looked for, and said while there are any.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// How long the end of the process waits for lines that are still to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The access log of the process, if it has one.
#[derive(Debug, Default)]
pub(super) struct RunningAccessLog {
    /// For the workers.
    pub(super) log: Option<Arc<AccessLog>>,
    writer: Option<AccessWriter>,
}

impl RunningAccessLog {
    /// # Errors
    /// If the system refuses a thread, or standard output is wanted and closed.
    pub(super) fn start(config: &config::Log, metrics: &Metrics) -> anyhow::Result<Self> {
        let format = match config.access {
            config::AccessFormat::Off => return Ok(RunningAccessLog::default()),
            config::AccessFormat::Json => LineFormat::Json,
            config::AccessFormat::Common => LineFormat::Common,
        };
        let options = AccessOptions {
            format,
            file: config.access_file.clone(),
            sample: config.access_sample,
            redaction: Redaction::new(config.redact_query.iter().map(String::as_str)),
        };
        let (log, writer) = AccessLog::start(options, metrics.access_log_dropped.clone()).context("log.access")?;
        Ok(RunningAccessLog { log: Some(log), writer: Some(writer) })
    }

    /// Has the file opened again, if there is an access log. Returns whether there is.
    pub(super) fn reopen(&self) -> bool {
        self.log.as_ref().inspect(|log| log.reopener().ask()).is_some()
    }

    /// Waits until all lines are written, once the workers have ended; not for long, as the disk may hang.
    pub(super) async fn end(self) {
        drop(self.log);
        let Some(writer) = self.writer else { return };
        let written = tokio::task::spawn_blocking(move || writer.wait(LAST_LINES)).await;
        if !written.unwrap_or(false) {
            tracing::warn!("the last lines of the access log could not be written");
        }
    }
}

/// Says how many lines were lost, as long as some are. Not said by a worker, which would wait for the log then, nor by the
/// thread that writes, which may hang.
pub(super) async fn say_losses(dropped: IntCounter, incidents: Arc<Incidents>) {
    let mut said = 0;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let lost = dropped.get() - said;
        if lost > 0 {
            said += lost;
            let words = format!("{lost} lines of the access log were lost: its file or pipe does not take them");
            incidents.note(IncidentKind::AccessLogLost, &words);
            tracing::warn!(lost, "lines of the access log were lost: its file or pipe does not take them");
        }
    }
}
