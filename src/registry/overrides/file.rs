//! The copy of the overrides on disk.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::KnownOverrides;
use crate::atomic_file;
use crate::fleet::{NamedOverride, Overrides};
use crate::telemetry::causes;

/// The format number of the file. A file of another format is not read.
const FORMAT: u32 = 1;

/// The pause after a write that failed.
const AGAIN: Duration = Duration::from_secs(1);

#[derive(Serialize, Deserialize)]
struct SavedOverrides {
    format: u32,
    overrides: Vec<NamedOverride>,
}

/// Reads the file. One that cannot be read is set aside: no override of it is in effect.
pub(super) async fn read(path: PathBuf) -> Overrides {
    let read = tokio::task::spawn_blocking(move || {
        decode(&path).unwrap_or_else(|error| {
            let aside = atomic_file::set_aside(&path);
            let aside = aside.map_or_else(|error| error.to_string(), |aside| aside.display().to_string());
            tracing::error!(path = %path.display(), error = %causes(&error), aside, "what operators said of nodes cannot be read: none is drained by it");
            Overrides::default()
        })
    });
    read.await.unwrap_or_else(|error| {
        tracing::error!(error = %causes(&error), "what operators said of nodes was not read");
        Overrides::default()
    })
}

fn decode(path: &Path) -> io::Result<Overrides> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Overrides::default()),
        bytes => bytes?,
    };
    let SavedOverrides { format, overrides } = serde_json::from_slice(&bytes)?;
    if format != FORMAT {
        return Err(io::Error::other(format!("it has format {format}, and only {FORMAT} is known here")));
    }
    Ok(overrides.into_iter().collect())
}

/// Writes what is known whenever it changes, and again until that succeeds. `saved` gets the serial of what is on disk.
pub(super) async fn keep(path: PathBuf, mut known: watch::Receiver<Arc<KnownOverrides>>, saved: watch::Sender<u64>) {
    let mut is_logged = false;
    // What was read is there.
    while known.changed().await.is_ok() {
        loop {
            let now = Arc::clone(&known.borrow_and_update());
            let target = path.clone();
            let serial = now.serial;
            let written = tokio::task::spawn_blocking(move || write(&target, &now.overrides)).await;
            match written.unwrap_or_else(|panicked| Err(panicked.into())) {
                Ok(()) => {
                    is_logged = false;
                    saved.send_replace(serial);
                    break;
                }
                Err(error) => {
                    // Logged once for each series of failures.
                    if !std::mem::replace(&mut is_logged, true) {
                        tracing::warn!(path = %path.display(), error = %causes(&error), "what operators say of nodes cannot be written to disk; it is tried again");
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }
}

fn write(path: &Path, overrides: &Overrides) -> io::Result<()> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    let saved = SavedOverrides { format: FORMAT, overrides: overrides.to_named() };
    atomic_file::replace(path, &serde_json::to_vec(&saved)?)
}
