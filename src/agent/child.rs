//! The process that the agent runs, and the orphans that it has to reap.
//!
//! In a container the agent is process 1: orphans become its children, and stay in the table of processes until it
//! waits for them. So it waits for any child, and checks whether it was its own. No other code of this program may wait
//! for a child: a status is returned once.
//!
//! The child has a process group of its own. The terminal's Ctrl-C then reaches the agent alone, which drains before it
//! ends the child; and a child that has to be killed is killed with its descendants.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, kill_process_group, wait};
use tokio::signal::unix::{SignalKind, signal};

use crate::telemetry::causes;

/// What a shell says of a command that does not exist, and of one that cannot be run.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// What a shell adds to the number of the signal that has ended a command.
const BY_SIGNAL: i32 = 128;

/// The agent's child, if it has one, and its foster children.
pub(super) struct Children {
    ended: tokio::signal::unix::Signal,
    child: Option<Pid>,
    status: Option<u8>,
}

/// The command could not be started.
#[derive(Debug, thiserror::Error)]
#[error("{}", command.display())]
pub(super) struct NotStarted {
    command: OsString,
    #[source]
    source: io::Error,
}

impl NotStarted {
    /// The exit status, as a shell would have it.
    pub(super) fn status(&self) -> u8 {
        if self.source.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE }
    }
}

impl Children {
    /// Without a child of our own.
    pub(super) fn none() -> io::Result<Self> {
        // From here on no end of a child goes unnoticed.
        Ok(Children { ended: signal(SignalKind::child())?, child: None, status: None })
    }

    /// Starts a command, with our standard streams and our environment.
    pub(super) fn start(&mut self, command: &[OsString]) -> Result<(), NotStarted> {
        let Some((program, arguments)) = command.split_first() else { return Ok(()) };
        let child = Command::new(program).args(arguments).process_group(0).spawn();
        let child = child.map_err(|source| NotStarted { command: program.clone(), source })?;
        // Dropping it does not wait for it; `bury` does.
        self.child = Some(Pid::from_child(&child));
        Ok(())
    }

    /// The process id of our own child.
    pub(super) fn pid(&self) -> Option<u32> {
        self.child.and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok())
    }

    /// Waits until our own child has ended, and returns its status; for ever without a child.
    pub(super) async fn child_ended(&mut self) -> u8 {
        loop {
            self.bury();
            if let Some(status) = self.status {
                return status;
            }
            self.ended.recv().await;
        }
    }

    /// Sends our child a signal, if it still runs.
    pub(super) fn signal(&self, signal: Signal) {
        self.send("signal", signal, |pid| kill_process(pid, signal));
    }

    /// Kills our child and all of its process group.
    pub(super) fn kill(&self) {
        self.send("kill", Signal::KILL, |pid| kill_process_group(pid, Signal::KILL));
    }

    fn send(&self, what: &str, signal: Signal, send: impl FnOnce(Pid) -> rustix::io::Result<()>) {
        // Once it was waited for, its process id may be reused.
        let Some(pid) = self.child.filter(|_| self.status.is_none()) else { return };
        if let Err(error) = send(pid) {
            tracing::warn!(pid = pid.as_raw_nonzero(), ?signal, error = %causes(&error), "cannot {what} the child");
        }
    }

    /// Reaps every child that has ended.
    fn bury(&mut self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if Some(pid) == self.child => self.status = Some(exit_status(status)),
                Ok(Some((pid, _))) => tracing::debug!(pid = pid.as_raw_nonzero(), "an orphan has ended"),
                Err(rustix::io::Errno::INTR) => {}
                // No (other) child has ended, or there is none.
                Ok(None) | Err(_) => return,
            }
        }
    }
}

fn exit_status(status: WaitStatus) -> u8 {
    let by_signal = status.terminating_signal().map(|signal| BY_SIGNAL + signal);
    let status = status.exit_status().or(by_signal).unwrap_or_default();
    u8::try_from(status).unwrap_or(u8::MAX)
}
