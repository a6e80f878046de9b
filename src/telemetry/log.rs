//! Logging: to standard error, as text for people or JSON for collectors.

use tracing_subscriber::filter::LevelFilter;

/// Starts logging for the whole process. A second call in one process (tests) changes nothing.
pub fn start(level: LevelFilter, json: bool) {
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let builder = tracing_subscriber::fmt().with_max_level(level).with_ansi(colours).with_target(false);
    let builder = builder.with_writer(std::io::stderr);
    let started = if json { builder.json().flatten_event(true).try_init() } else { builder.try_init() };
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
}
