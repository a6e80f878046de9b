//! Logging: to standard error, as text for people or JSON for collectors.

use std::sync::OnceLock;

use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt as _;

/// The filter of the process, which has one log.
static FILTER: OnceLock<Handle<Targets, Registry>> = OnceLock::new();

/// Starts logging for the whole process. A second call in one process (tests) changes nothing.
pub fn start(filter: &Targets, json: bool) {
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let (filter, handle) = reload::Layer::new(filter.clone());
    let lines = tracing_subscriber::fmt::layer().with_ansi(colours).with_writer(std::io::stderr);
    let lines = if json { lines.json().flatten_event(true).boxed() } else { lines.boxed() };
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        _ = FILTER.set(handle);
    } else {
        tracing::debug!("logging was started before");
    }
}

/// Other lines are written from now on. Changes nothing in a process whose log was not started here.
pub fn set_filter(filter: &Targets) {
    if let Some(handle) = FILTER.get() {
        // Fails only once the subscriber is gone, which lives as long as the process.
        _ = handle.reload(filter.clone());
    }
}
