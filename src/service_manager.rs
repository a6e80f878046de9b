//! The service manager that runs this process (systemd, or another one that speaks sd_notify(3)): it is told when we are ready,
//! reload, end, how things stand, and that we are alive.
//!
//! A message is a datagram to the socket that `NOTIFY_SOCKET` names; the crate `sd-notify` writes it. Without that variable there is
//! nobody to tell, and nothing here does anything.
//!
//! # What the watchdog proves
//!
//! `WATCHDOG=1` from a timer proves that the timer's thread lives, and a process that serves nobody would be kept. So every loop
//! that must go on counts its turns ([`Heartbeat`]), and the message is sent only if each of them has made one since the last
//! look: all workers, and the writer of the fleet. Whoever looks runs on the control plane's runtime, which is proved with them.
//! A disk or an etcd that hangs stops none of these loops: a restart would mend neither.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use sd_notify::NotifyState;

use crate::telemetry::causes;

/// Tells the service manager. Its clones tell the same one.
#[derive(Clone, Debug)]
pub struct ServiceManager(Arc<Told>);

#[derive(Debug)]
struct Told {
    /// How soon after the last sign of life the process is killed; `None`: it is not watched.
    watchdog: Option<Duration>,
    life: Mutex<Life>,
    /// That it cannot be told was logged.
    is_failing: AtomicBool,
}

/// What the service manager believes of us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Starting,
    Ready,
    Ending,
}

impl ServiceManager {
    /// The service manager that started this process, if one did.
    pub fn of_this_process() -> Self {
        ServiceManager(Arc::new(Told {
            watchdog: sd_notify::watchdog_enabled(),
            life: Mutex::new(Life::Starting),
            is_failing: AtomicBool::new(false),
        }))
    }

    /// How soon after the last sign of life it kills this process; `None`: never.
    pub fn watchdog(&self) -> Option<Duration> {
        self.0.watchdog
    }

    /// All that must serve serves. Said once; `status` is one line for people.
    pub fn ready(&self, status: &str) {
        let mut life = self.0.life.lock();
        if *life == Life::Starting {
            *life = Life::Ready;
            self.tell(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
        }
    }

    /// The configuration is read again. Before this process is ready that is part of its start, and nobody is told.
    pub fn reloading(&self) {
        if *self.0.life.lock() != Life::Ready {
            return;
        }
        match NotifyState::monotonic_usec_now() {
            // systemd compares it with the time at which it asked (sd_notify(3), RELOADING).
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(error) => self.failed(&error),
        }
    }

    /// The reload is over, whether it was taken or refused: this process serves as before.
    pub fn reloaded(&self) {
        if *self.0.life.lock() == Life::Ready {
            self.tell(&[NotifyState::Ready]);
        }
    }

    /// This process ends.
    pub fn ending(&self, status: &str) {
        *self.0.life.lock() = Life::Ending;
        self.tell(&[NotifyState::Stopping, NotifyState::Status(&one_line(status))]);
    }

    /// How things stand, in one line for people.
    pub fn status(&self, status: &str) {
        self.tell(&[NotifyState::Status(&one_line(status))]);
    }

    /// All that must go on has gone on.
    pub fn alive(&self) {
        self.tell(&[NotifyState::Watchdog]);
    }

    fn tell(&self, message: &[NotifyState<'_>]) {
        match sd_notify::notify(message) {
            Ok(()) => self.0.is_failing.store(false, Ordering::Relaxed),
            Err(error) => self.failed(&error),
        }
    }

    /// Logged once for each series of failures.
    fn failed(&self, error: &io::Error) {
        if !self.0.is_failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(error = %causes(error), "the service manager (NOTIFY_SOCKET) cannot be told");
        }
    }
}

/// A line feed would begin another message.
fn one_line(text: &str) -> String {
    text.replace(|character: char| character.is_control(), " ")
}

/// Counts the turns of a loop.
#[derive(Debug, Default)]
pub struct Heartbeat(AtomicU64);

impl Heartbeat {
    /// The loop has made a turn.
    pub fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn beats(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The loops that must go on.
#[derive(Debug, Default)]
pub struct Heartbeats(Vec<WatchedLoop>);

#[derive(Debug)]
struct WatchedLoop {
    name: String,
    heartbeat: Arc<Heartbeat>,
    /// Its turns at the last look.
    seen: u64,
}

impl Heartbeats {
    /// Watches one loop more, by this name. Returns what it counts with.
    pub fn watch(&mut self, name: impl Into<String>) -> Arc<Heartbeat> {
        let heartbeat = Arc::<Heartbeat>::default();
        self.0.push(WatchedLoop { name: name.into(), heartbeat: Arc::clone(&heartbeat), seen: 0 });
        heartbeat
    }

    /// The names of the loops that have made no turn since the last look.
    pub fn stalled(&mut self) -> Vec<&str> {
        let has_stalled = |watched: &mut WatchedLoop| {
            let beats = watched.heartbeat.beats();
            std::mem::replace(&mut watched.seen, beats) == beats
        };
        self.0.iter_mut().filter_map(|watched| has_stalled(watched).then_some(&*watched.name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stands_still_is_named_until_it_goes_on() {
        let mut loops = Heartbeats::default();
        let (worker, keeper) = (loops.watch("worker-0"), loops.watch("keeper"));
        assert_eq!(loops.stalled(), ["worker-0", "keeper"], "none has made a turn yet");
        worker.beat();
        keeper.beat();
        assert!(loops.stalled().is_empty());
        keeper.beat();
        assert_eq!(loops.stalled(), ["worker-0"]);
        worker.beat();
        assert_eq!(loops.stalled(), ["keeper"]);
    }

    #[test]
    fn a_status_is_one_line() {
        assert_eq!(one_line("a\nREADY=1\r\tb"), "a READY=1  b");
    }
}
