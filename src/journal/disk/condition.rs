//! The condition of the disk, readable at any time.
//!
//! A volume can fail in two ways: it reports an error (no space, an I/O error), or it does not answer (frozen, or its server
//! is gone). Both are one state here, set by the one task that gives the disk work. So the start and the end of a failure
//! are each logged once, however many purges are refused meanwhile.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::journal::WriteError;
use crate::telemetry::causes;

pub(super) struct Condition {
    path: Arc<Path>,
    patience: Duration,
    state: Mutex<DiskState>,
}

#[derive(Default)]
struct DiskState {
    /// When the current work began.
    began: Option<Instant>,
    /// It was logged that there is no answer.
    hung_logged: bool,
    /// The error of the last attempt, and the time since which attempts have failed.
    failing: Option<(Arc<str>, Instant)>,
}

impl Condition {
    pub(super) fn new(path: Arc<Path>, patience: Duration) -> Self {
        Condition { path, patience, state: Mutex::default() }
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Records that work begins.
    pub(super) fn begin(&self) {
        self.state.lock().began = Some(Instant::now());
    }

    /// Logs that the disk does not answer.
    pub(super) fn log_hung(&self) {
        let mut state = self.state.lock();
        if !std::mem::replace(&mut state.hung_logged, true) {
            tracing::error!(
                path = %self.path.display(),
                "the journal does not answer: purges are refused until it does (is its volume frozen, or its server gone?)"
            );
        }
    }

    /// Records the answer.
    pub(super) fn end(&self, result: &Result<(), WriteError>) {
        let mut state = self.state.lock();
        let took = state.began.take().map_or(Duration::ZERO, |began| began.elapsed());
        if std::mem::take(&mut state.hung_logged) {
            tracing::info!(path = %self.path.display(), seconds = took.as_secs(), "the journal answers again");
        }
        match result {
            Ok(()) => {
                if let Some((_, since)) = state.failing.take() {
                    let seconds = since.elapsed().as_secs();
                    tracing::info!(path = %self.path.display(), seconds, "the journal can be written again");
                }
            }
            Err(error) => {
                let cause: Arc<str> = causes(error).to_string().into();
                let (logged, since) = state.failing.take().unzip();
                if logged.as_ref() != Some(&cause) {
                    tracing::error!(error = &*cause, "the journal cannot be written: purges are refused until it can");
                }
                state.failing = Some((cause, since.unwrap_or_else(Instant::now)));
            }
        }
    }

    /// Whether the last attempt failed.
    pub(super) fn is_failing(&self) -> bool {
        self.state.lock().failing.is_some()
    }

    /// The error for purges while there is no answer.
    pub(super) fn hung(&self) -> WriteError {
        let after = self.state.lock().began.map_or(Duration::ZERO, |began| began.elapsed());
        WriteError::Hung { path: Arc::clone(&self.path), after }
    }

    /// The current problem, for people.
    pub(super) fn trouble(&self) -> Option<String> {
        let state = self.state.lock();
        let silence = state.began.map(|began| began.elapsed()).filter(|silence| *silence >= self.patience);
        match (silence, &state.failing) {
            (Some(silence), _) => Some(format!("no answer from {} for {} s", self.path.display(), silence.as_secs())),
            (None, Some((cause, _))) => Some(cause.to_string()),
            (None, None) => None,
        }
    }
}
