//! `clearcoat serve`: run it.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::ConfigFile;
use crate::app::App;
use crate::config::{Config, ConfigSource, Log, LogFormat};
use crate::fleet::Role;
use crate::inherited::InheritedSockets;
use crate::service_manager::ServiceManager;
use crate::telemetry;

/// Threads of the control plane. Purges to a fleet of hundreds keep at most one busy; the second is for tasks that must
/// not wait for it.
const CONTROL_THREADS: usize = 2;

/// How long the process waits at its end for file writes that are still under way.
const LEFT_BEHIND: Duration = Duration::from_secs(1);

/// Run it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  clearcoat serve --config /etc/clearcoat/clearcoat.toml")]
pub(super) struct Serve {
    #[command(flatten)]
    config: ConfigFile,
}

impl Serve {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        // Before any other file is opened, and any thread started.
        let inherited = InheritedSockets::of_this_process()?;
        let source = self.config.source();
        let config = source.load()?;
        start_logging(&config.log);
        #[cfg(feature = "mutants")]
        let_mutant_live()?;
        say_what_was_read(&source, &config);
        let runtime = control_runtime()?;
        let served = runtime.block_on(serve(source, config, inherited));
        // Writes to a volume that hangs are abandoned.
        runtime.shutdown_timeout(LEFT_BEHIND);
        served
    }
}

/// Which configuration runs: a file in another folder is the first thing to look for when nothing is as expected.
fn say_what_was_read(source: &ConfigSource, config: &Config) {
    let file = source.file().map_or_else(|| "none".to_owned(), |file| file.display().to_string());
    let count = |role| config.nodes.iter().filter(|node| node.role == role).count();
    let (varnish, web) = (count(Role::Varnish), count(Role::Web));
    let (registry, journal) = (config.registry.kind, config.journal.kind);
    tracing::info!(file, varnish, web, ?registry, ?journal, "configuration read");
    for remark in source.remarks(config) {
        tracing::warn!("{remark}");
    }
}

async fn serve(source: ConfigSource, config: Config, inherited: InheritedSockets) -> anyhow::Result<()> {
    // Before anything listens: from here on a signal leads to an orderly shutdown.
    let mut signals = ServeSignals::new()?;
    let manager = ServiceManager::of_this_process();
    manager.status("starting: opens its journal");
    let mut app = tokio::select! {
        started = App::start(&config, inherited) => started?,
        // The start may wait for a disk or for etcd, so a signal must be able to interrupt it.
        signal = signals.ended(|| tracing::info!("SIGHUP: nothing is reloaded at the start"), || {}) => {
            tracing::info!(signal, "ending before anything was served");
            return Ok(());
        }
    };
    app.report_to(&manager);
    let reload = app.reload_from(source, config, &manager);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "clearcoat runs");
    let access_log = app.access_log_reopener();
    let reopen = || {
        if !access_log() {
            tracing::info!("SIGUSR1: there is no access log to open again");
        }
    };
    let signal = signals.ended(|| reload.notify_one(), &reopen).await;
    tracing::info!(signal, "ending: requests under way are finished; a second signal cuts them");
    manager.ending("ending: requests under way are finished");
    let too_late = || tracing::info!("SIGHUP: nothing is reloaded at the end");
    let next_signal = async || {
        signals.ended(too_late, &reopen).await;
    };
    app.stop(next_signal).await;
    tracing::info!("clearcoat ended");
    Ok(())
}

/// Breaks the part of the promise that `CLEARCOAT_MUTANT` names, if it names one.
#[cfg(feature = "mutants")]
fn let_mutant_live() -> anyhow::Result<()> {
    let Ok(name) = std::env::var("CLEARCOAT_MUTANT") else { return Ok(()) };
    let Some(mutant) = crate::mutants::Mutant::named(&name) else {
        anyhow::bail!("CLEARCOAT_MUTANT={name}: no such part")
    };
    tracing::error!(?mutant, "a part of this build is broken on purpose: it does not keep its promise");
    mutant.let_live();
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
    telemetry::log::start(log.level.targets(), log.format == LogFormat::Json);
}

/// The signals that the process obeys.
pub(super) struct ServeSignals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    user: tokio::signal::unix::Signal,
}

impl ServeSignals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(ServeSignals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            user: signal(SignalKind::user_defined1())?,
        })
    }

    /// Waits for SIGTERM or SIGINT and returns its name. Calls `reload` on each SIGHUP and `reopen` on each SIGUSR1 until
    /// then.
    pub(super) async fn ended(&mut self, reload: impl Fn(), reopen: impl Fn()) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return "SIGTERM",
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hang_up.recv() => reload(),
                _ = self.user.recv() => reopen(),
            }
        }
    }
}
