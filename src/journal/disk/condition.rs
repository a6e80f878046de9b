//! Whether the disk answers, as everybody may ask at any moment.
//!
//! A volume can fail in two ways: it says so (no space, an I/O error), or it says nothing (frozen, a server that is
//! gone). Both are one state here, set by the one task that gives the disk its work, so that it is said once when it
//! begins and once when it ends, however many purges are refused meanwhile.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::journal::WriteError;
use crate::telemetry::causes;

/// What is known of the disk.
pub(super) struct Condition {
    path: Arc<Path>,
    /// An answer that takes longer counts as none.
    patience: Duration,
    state: Mutex<DiskState>,
}

#[derive(Default)]
struct DiskState {
    /// When the work was begun that is under way.
    began: Option<Instant>,
    /// It was said that there is no answer.
    hung_told: bool,
    /// Why the last attempt failed, and since when attempts fail.
    failing: Option<(Arc<str>, Instant)>,
}

impl Condition {
    pub(super) fn new(path: Arc<Path>, patience: Duration) -> Self {
        Condition { path, patience, state: Mutex::default() }
    }

    /// How long an answer may take.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// It gets something to do.
    pub(super) fn begin(&self) {
        self.lock().began = Some(Instant::now());
    }

    /// Nothing has come for too long.
    pub(super) fn say_hung(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.hung_told, true) {
            tracing::error!(
                path = %self.path.display(),
                "the journal does not answer: purges are refused until it does (is its volume frozen, or its server gone?)"
            );
        }
    }

    /// It has answered.
    pub(super) fn end(&self, result: &Result<(), WriteError>) {
        let mut state = self.lock();
        let took = state.began.take().map_or(Duration::ZERO, |began| began.elapsed());
        if std::mem::take(&mut state.hung_told) {
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
                let (told, since) = state.failing.take().unzip();
                if told.as_ref() != Some(&cause) {
                    tracing::error!(error = &*cause, "the journal cannot be written: purges are refused until it can");
                }
                state.failing = Some((cause, since.unwrap_or_else(Instant::now)));
            }
        }
    }

    /// Whether the last attempt failed.
    pub(super) fn is_failing(&self) -> bool {
        self.lock().failing.is_some()
    }

    /// What a purge is refused with while there is no answer.
    pub(super) fn hung(&self) -> WriteError {
        let after = self.lock().began.map_or(Duration::ZERO, |began| began.elapsed());
        WriteError::Hung { path: Arc::clone(&self.path), after }
    }

    /// What is wrong, for people.
    pub(super) fn trouble(&self) -> Option<String> {
        let state = self.lock();
        let silence = state.began.map(|began| began.elapsed()).filter(|silence| *silence >= self.patience);
        match (silence, &state.failing) {
            (Some(silence), _) => Some(format!("no answer from {} for {} s", self.path.display(), silence.as_secs())),
            (None, Some((cause, _))) => Some(cause.to_string()),
            (None, None) => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, DiskState> {
        self.state.lock()
    }
}
