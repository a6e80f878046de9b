//! The thread that waits for the disk.
//!
//! An fsync blocks, on a frozen volume for ever, and a blocked thread cannot be ended. So this thread does nothing else,
//! every wait for it has a timeout, and the end of the process leaves it behind if necessary.

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

/// The timeout of opening. Every page of the file is read and verified, at some hundred MiB per second.
const OPENING: Duration = Duration::from_secs(30);

/// Passes work to the disk, one job at a time.
pub(super) struct Committer {
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

struct Job {
    change: Change,
    answer: oneshot::Sender<Result<(), CommitError>>,
}

impl Committer {
    /// Starts the thread, which first calls `open`. `directory` is for the error after a timeout.
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

    /// Commits a change. The result resolves once it is durable or has failed.
    pub(super) fn commit(&self, change: Change) -> oneshot::Receiver<Result<(), CommitError>> {
        let (answer, answered) = oneshot::channel();
        // If the thread has ended, the answer is dropped, which the receiver sees.
        _ = self.jobs.send(Job { change, answer });
        answered
    }

    /// Closes the file, without a timeout.
    pub(super) fn close(self) {
        drop(self.jobs);
        if self.thread.join().is_err() {
            tracing::error!("the journal's disk thread panicked; purges without an answer were not accepted");
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
