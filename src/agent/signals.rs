//! The signals that the agent is sent: which ones are for itself, and which it passes on.

use std::io;

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// What daemons take for other things than their end: reload, reopen the logs, upgrade, end gracefully.
const PASSED_ON: [Signal; 6] = [Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::WINCH, Signal::CONT];

/// What ends everything.
const ENDING: [Signal; 2] = [Signal::TERM, Signal::INT];

/// The signals, in the order in which they came.
pub(super) struct AgentSignals {
    received: mpsc::Receiver<Signal>,
    stop: Signal,
}

/// What a signal asks for.
pub(super) enum Wish {
    /// That we end.
    End,
    /// Nothing of us: it is the child's.
    PassOn(Signal),
}

impl AgentSignals {
    /// Listens from now on. `stop` ends the child, and is a request to end for us as well: a container runtime sends
    /// the stop signal of the image.
    pub(super) fn listen(stop: Signal) -> io::Result<Self> {
        // A few at once; several of one kind before the first is read count as one.
        let (sender, received) = mpsc::channel(PASSED_ON.len() + ENDING.len());
        for kind in PASSED_ON.into_iter().chain(ENDING) {
            let mut stream = signal(SignalKind::from_raw(kind.as_raw()))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if sender.send(kind).await.is_err() {
                        return;
                    }
                }
            });
        }
        Ok(AgentSignals { received, stop })
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Wish {
        match self.received.recv().await {
            Some(signal) if ENDING.contains(&signal) || signal == self.stop => Wish::End,
            Some(signal) => Wish::PassOn(signal),
            // The tasks that send end with the runtime, and so do we.
            None => std::future::pending().await,
        }
    }
}
