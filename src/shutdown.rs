//! The stages of an orderly shutdown.
//!
//! Run, leave (`/readyz` fails, everything is still accepted), drain (no new connections, every answer says
//! `Connection: close`), stop (unfinished work is cut). The edge drains first; then the origin, which the last answers
//! at the edge still need; then the control plane, because other replicas report purges to us as long as pages pass
//! here.
//!
//! The stage is one value in a `watch` channel, so a task that has a [`Shutdown`] can wait for it, or read it without
//! waiting.

use tokio::sync::watch;

/// A stage of the shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Normal operation.
    Running,
    /// About to drain: `/readyz` fails, but everything is still accepted.
    Leaving,
    /// No new work. Requests under way are finished, and Varnish still reaches its backend for them.
    Draining,
    /// The edge has drained: no client waits for a fetch of Varnish any more. The origin drains.
    Emptying,
    /// The origin has drained: no page passes here any more, so other replicas need not report purges to us. The
    /// control plane drains.
    Closing,
    /// Unfinished work is cut.
    Stopping,
}

/// Reads the stage, and waits for one.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<Stage>);

/// Sets the stage.
#[derive(Debug)]
pub struct ShutdownHandle(watch::Sender<Stage>);

/// A handle, and a [`Shutdown`] that follows it.
pub fn channel() -> (ShutdownHandle, Shutdown) {
    let (sender, receiver) = watch::channel(Stage::Running);
    (ShutdownHandle(sender), Shutdown(receiver))
}

impl ShutdownHandle {
    /// Advances to a stage. An earlier one than the current is ignored.
    pub fn advance(&self, stage: Stage) {
        self.0.send_if_modified(|now| {
            let later = stage > *now;
            if later {
                *now = stage;
            }
            later
        });
    }
}

impl Shutdown {
    /// The current stage: [`Stage::Stopping`] if the handle has been dropped.
    pub fn stage(&self) -> Stage {
        if self.0.has_changed().is_err() { Stage::Stopping } else { *self.0.borrow() }
    }

    /// Returns when this stage is over or the handle has been dropped.
    pub async fn left(&self, stage: Stage) {
        _ = self.0.clone().wait_for(|now| *now > stage).await;
    }

    /// Returns when this stage is reached or the handle has been dropped.
    pub async fn reached(&self, stage: Stage) {
        _ = self.0.clone().wait_for(|now| *now >= stage).await;
    }
}
