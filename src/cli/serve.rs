//! `clearcoat serve`: run it.

use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

use super::ConfigFile;
use crate::app::App;
use crate::config::{Config, Log, LogFormat, LogLevel};
use crate::telemetry;

/// Threads of the control plane. Purges to a fleet of hundreds keep one busy at most; the second is for whoever must
/// not wait for it.
const CONTROL_THREADS: usize = 2;

/// Run it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  clearcoat serve --config /etc/clearcoat/clearcoat.toml")]
pub(super) struct Serve {
    #[command(flatten)]
    config: ConfigFile,
}

impl Serve {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        start_logging(&config.log);
        control_runtime()?.block_on(serve(config))
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    // Before anything listens: a signal from here on ends in order.
    let mut signals = Signals::new()?;
    let app = App::start(&config).await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "clearcoat runs");
    let signal = signals.ended().await;
    tracing::info!(signal, "ending: requests under way are finished; a second signal cuts them");
    app.stop(async { _ = signals.ended().await }).await;
    tracing::info!("clearcoat ended");
    Ok(())
}

pub(super) fn control_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
}

pub(super) fn start_logging(log: &Log) {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    telemetry::log::start(level, log.format == LogFormat::Json);
}

/// The signals that end the process.
pub(super) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The name of the next signal to end.
    pub(super) async fn ended(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                // Whoever sends it wants a reload, and must not end the shop's traffic with it.
                _ = self.hang_up.recv() => tracing::warn!("SIGHUP: this version cannot reload; restart to change the configuration"),
            }
        }
    }
}
