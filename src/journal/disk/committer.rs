//! The thread that waits for the disk.
//!
//! An fsync blocks, on a frozen volume for ever, and nobody can take a thread out of it. So this one does nothing else,
//! nobody waits for it without a limit, and at the end of the process it is left behind if need be.

use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::oneshot;

use super::change::Change;
use super::error::{CommitError, OpenError};
use super::load::Stored;
use super::opening::Opened;
use super::store::Store;
use crate::journal::Anew;

/// How long opening may take. Every page of the file is read and verified: some hundred MiB a second.
const OPENING: Duration = Duration::from_secs(30);

/// Takes work for the disk, one piece at a time.
pub(super) struct Committer {
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

struct Job {
    change: Change,
    answer: oneshot::Sender<Result<(), CommitError>>,
}

impl Committer {
    /// Starts the thread, which begins with `open`. `directory` is for the error of one that does not come back.
    pub(super) fn start(
        directory: &Path,
        open: impl FnOnce() -> Result<Opened, OpenError> + Send + 'static,
    ) -> Result<(Committer, Stored, Option<Anew>), OpenError> {
        let (jobs, work) = mpsc::channel();
        let (opened, opening) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("journal-disk".into()).spawn(move || match open() {
            Ok(Opened { store, stored, anew }) => {
                _ = opened.send(Ok((stored, anew)));
                run(store, &work);
            }
            Err(error) => _ = opened.send(Err(error)),
        });
        let thread = thread.map_err(OpenError::Thread)?;
        match opening.recv_timeout(OPENING) {
            Ok(opened) => opened.map(|(stored, anew)| (Committer { jobs, thread }, stored, anew)),
            Err(RecvTimeoutError::Timeout) => Err(OpenError::NoAnswer { path: directory.to_owned(), after: OPENING }),
            Err(RecvTimeoutError::Disconnected) => Err(OpenError::Thread(std::io::Error::other("it panicked"))),
        }
    }

    /// Hands over a change; what is returned resolves when it is durable, or is not.
    pub(super) fn commit(&self, change: Change) -> oneshot::Receiver<Result<(), CommitError>> {
        let (answer, answered) = oneshot::channel();
        // Without its thread the answer is dropped, which says it.
        _ = self.jobs.send(Job { change, answer });
        answered
    }

    /// Closes the file, however long that takes.
    pub(super) fn close(self) {
        drop(self.jobs);
        if self.thread.join().is_err() {
            tracing::error!("the journal's disk thread panicked; what it had not answered was not accepted");
        }
    }
}

fn run(mut store: Store, work: &mpsc::Receiver<Job>) {
    while let Ok(Job { change, answer }) = work.recv() {
        _ = answer.send(store.commit(&change));
    }
    if panic::catch_unwind(AssertUnwindSafe(|| drop(store))).is_err() {
        tracing::error!("the journal's file could not be closed; the next start verifies it");
    }
}
