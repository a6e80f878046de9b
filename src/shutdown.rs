//! The end of the process, in order.
//!
//! The stages are visible to whoever holds a [`Shutdown`]: run, drain (no new connections, every answer says
//! `Connection: close`, `/readyz` has been failing for a moment), first what clients use, then what those answers need,
//! and last what others have to tell us as long as pages pass here, stop (what is not done by now is cut). One value in one `watch` channel, so that a task can wait for a stage,
//! or look at it without waiting.

use tokio::sync::watch;

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Everything works.
    Running,
    /// The process is about to drain: it is not ready any more, but takes everything still.
    Leaving,
    /// No new work; what is under way is finished, and Varnish still finds its backend for it.
    Draining,
    /// The edge has drained: no client waits for what Varnish would fetch. The origin drains.
    Emptying,
    /// The origin has drained: no page passes here any more, so nobody needs to tell us of purges. The control plane drains.
    Closing,
    /// End now.
    Stopping,
}

/// What tasks look at.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<Stage>);

/// What moves the stages on.
#[derive(Debug)]
pub struct ShutdownHandle(watch::Sender<Stage>);

/// A handle and what follows it.
pub fn channel() -> (ShutdownHandle, Shutdown) {
    let (sender, receiver) = watch::channel(Stage::Running);
    (ShutdownHandle(sender), Shutdown(receiver))
}

impl ShutdownHandle {
    /// Moves on to a stage; never back.
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
    /// The stage now. Without its handle, it is the end.
    pub fn stage(&self) -> Stage {
        if self.0.has_changed().is_err() { Stage::Stopping } else { *self.0.borrow() }
    }

    /// Returns when this stage is over.
    pub async fn left(&self, stage: Stage) {
        _ = self.0.clone().wait_for(|now| *now > stage).await;
    }

    /// Returns when this stage is reached (or the handle is gone, which is the end too).
    pub async fn reached(&self, stage: Stage) {
        _ = self.0.clone().wait_for(|now| *now >= stage).await;
    }
}
