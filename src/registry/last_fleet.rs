//! The last fleet on disk, `fleet.json`, so that a process can start while its registry is away.
//!
//! Each registry writes what it needs to go on from there, in a format with a number of its own. The file of another registry,
//! whose kind was configured before, is ignored, and overwritten when there is something to write.

pub(super) mod spec;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::atomic_file;
use crate::telemetry::causes;

/// The number of the format of etcd's.
pub(super) const OF_ETCD: u32 = 1;

/// That of Kubernetes'.
pub(super) const OF_KUBERNETES: u32 = 2;

/// A fleet as a registry writes it. Its JSON has the format in the field `format`.
pub(super) trait LastFleet: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// The number of the format.
    const FORMAT: u32;

    /// Whether it is not worth while to write this one over the other one.
    fn has_same_nodes(&self, other: &Self) -> bool;
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum LastFleetError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("it has format {0}, and only {1} is known here")]
    Format(u32, u32),
}

/// Reads the file; `None` if there is none, or that of another registry.
pub(super) fn read<F: LastFleet>(path: &Path) -> Result<Option<F>, LastFleetError> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    #[derive(Deserialize)]
    struct FormatOnly {
        format: u32,
    }
    let FormatOnly { format } = serde_json::from_slice(&bytes)?;
    if format == F::FORMAT {
        return Ok(Some(serde_json::from_slice(&bytes)?));
    }
    if ![OF_ETCD, OF_KUBERNETES].contains(&format) {
        return Err(LastFleetError::Format(format, F::FORMAT));
    }
    tracing::info!(path = %path.display(), "the last fleet on disk is of another kind of registry, and is not used");
    Ok(None)
}

/// Writes the file atomically: a crash leaves either the old one or the new one.
pub(super) fn write<F: LastFleet>(fleet: &F, path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    atomic_file::replace(path, &serde_json::to_vec(fleet)?)
}

/// Reads and writes the file on blocking threads, since an fsync can take long.
pub(super) struct LastFleetStore<F> {
    /// `None`: nothing is kept.
    path: Option<PathBuf>,
    /// What is in the file; `None` if unknown.
    on_disk: Option<F>,
    writing: JoinSet<io::Result<F>>,
}

impl<F: LastFleet> LastFleetStore<F> {
    /// Uses the file at this path; without a path, nothing is stored.
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        LastFleetStore { path, on_disk: None, writing: JoinSet::new() }
    }

    /// The content of the file; `None` if it cannot be used.
    pub(super) async fn read(&mut self) -> Option<F> {
        let path = self.path.clone()?;
        let reading = tokio::task::spawn_blocking({
            let path = path.clone();
            move || read::<F>(&path)
        });
        match reading.await {
            Ok(Ok(saved)) => {
                self.on_disk.clone_from(&saved);
                saved
            }
            Ok(Err(reason)) => {
                let aside = atomic_file::set_aside(&path)
                    .map_or_else(|error| error.to_string(), |path| path.display().to_string());
                tracing::error!(path = %path.display(), reason = %causes(&reason), aside, "the last fleet on disk cannot be read");
                None
            }
            Err(error) => {
                tracing::error!(path = %path.display(), error = %causes(&error), "the last fleet on disk was not read");
                None
            }
        }
    }

    /// Starts a write, unless the file has these nodes already. Returns `false` if the previous write is still running:
    /// then nothing was started.
    pub(super) fn write(&mut self, fleet: F) -> bool {
        let Some(path) = self.path.clone() else { return true };
        if !self.writing.is_empty() {
            return false;
        }
        if !self.on_disk.as_ref().is_some_and(|on_disk| on_disk.has_same_nodes(&fleet)) {
            self.writing.spawn_blocking(move || write(&fleet, &path).map(|()| fleet));
        }
        true
    }

    /// Waits for the end of a write and returns whether it succeeded; never returns while nothing is written.
    pub(super) async fn written(&mut self) -> bool {
        let Some(end) = self.writing.join_next().await else { return std::future::pending().await };
        match end.map_err(io::Error::other).flatten() {
            Ok(fleet) => {
                self.on_disk = Some(fleet);
                true
            }
            Err(error) => {
                tracing::warn!(error = %causes(&error), "the fleet could not be written to disk; it is tried again");
                false
            }
        }
    }
}
