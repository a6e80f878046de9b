//! The known replicas, on disk for a start without etcd.
//!
//! A replica that starts while etcd is away accepts purges, and must send them to the replicas that it knew before. So these
//! are saved beside the journal, and treated like replicas whose key is gone. The file is not essential: without it, a start
//! without etcd knows no replicas until etcd is back.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::Record;
use super::names::KnownJournals;
use crate::atomic_file;
use crate::fleet::NodeId;

type Records = BTreeMap<NodeId, Record>;

/// The maximum wait for a write.
const PATIENCE: Duration = Duration::from_secs(1);

/// The format of the file. A file without a number has only the records; later formats are not read.
const FORMAT: u64 = 1;

/// What is in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedReplicas {
    format: u64,
    /// Those that were there.
    pub(super) replicas: Records,
    /// Those that have to be met before what is saved of caches is believed ([`super::names`]). A file without that has it of
    /// all replicas.
    #[serde(default)]
    known: Option<KnownJournals>,
}

impl SavedReplicas {
    pub(super) fn new(replicas: Records, known: KnownJournals) -> Self {
        SavedReplicas { format: FORMAT, replicas, known: Some(known) }
    }

    /// The replicas that have to be met.
    pub(super) fn known(&self) -> KnownJournals {
        self.known.clone().unwrap_or_else(|| self.replicas.keys().map(|id| (id.clone(), None)).collect())
    }
}

fn decode(bytes: &[u8]) -> Result<SavedReplicas, serde_json::Error> {
    #[derive(Deserialize)]
    struct Format {
        format: u64,
    }
    match serde_json::from_slice(bytes) {
        Ok(Format { format: FORMAT }) => serde_json::from_slice(bytes),
        Ok(Format { format }) => {
            Err(serde::de::Error::custom(format_args!("it has format {format}, and only {FORMAT} is known here")))
        }
        // A replica may be named `format`, but its record is not a number.
        Err(_) => {
            let replicas = serde_json::from_slice(bytes)?;
            Ok(SavedReplicas { format: FORMAT, replicas, known: None })
        }
    }
}

/// The known replicas and their file.
pub(super) struct KnownReplicas {
    path: Option<PathBuf>,
    saved: SavedReplicas,
    /// A write that the disk has not completed.
    writing: Option<JoinHandle<io::Result<()>>>,
}

impl KnownReplicas {
    pub(super) async fn open(path: Option<PathBuf>) -> Self {
        let Some(file) = path.clone() else {
            return KnownReplicas { path, saved: SavedReplicas::default(), writing: None };
        };
        let read = tokio::task::spawn_blocking(move || std::fs::read(file)).await;
        let saved = match read.unwrap_or_else(|panicked| Err(panicked.into())) {
            Ok(bytes) => decode(&bytes).unwrap_or_else(|error| {
                tracing::warn!(?path, %error, "the known replicas cannot be read");
                SavedReplicas::default()
            }),
            Err(error) => {
                // Before the first start there is no file.
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(?path, %error, "the known replicas cannot be read");
                }
                SavedReplicas::default()
            }
        };
        KnownReplicas { path, saved, writing: None }
    }

    pub(super) fn saved(&self) -> &SavedReplicas {
        &self.saved
    }

    /// Saves the replicas if they have changed.
    pub(super) async fn keep(&mut self, now: SavedReplicas) {
        if self.saved == now {
            return;
        }
        // A volume that hangs must not delay news of replicas. What is not written now is written with the next change.
        if let Some(writing) = &mut self.writing
            && tokio::time::timeout(PATIENCE, writing).await.is_err()
        {
            return;
        }
        self.writing = None;
        self.saved = now.clone();
        let Some(path) = self.path.clone() else { return };
        let mut writing = tokio::task::spawn_blocking(move || atomic_file::replace(&path, &serde_json::to_vec(&now)?));
        match tokio::time::timeout(PATIENCE, &mut writing).await {
            Ok(written) => {
                if let Err(error) = written.map_err(io::Error::other).flatten() {
                    tracing::warn!(path = ?self.path, %error, "the known replicas cannot be saved");
                }
            }
            Err(_) => {
                tracing::warn!(path = ?self.path, "no answer from the disk: the known replicas are not saved yet");
                self.writing = Some(writing);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::JournalKind;

    #[tokio::test]
    async fn who_was_there_is_known_again_and_a_file_that_nobody_can_read_is_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("replicas.json");
        let path = Some(file.clone());
        let records = Records::from([(
            NodeId::try_from("clearcoat-2").unwrap(),
            Record::new("10.0.0.2:6081".to_owned(), JournalKind::Etcd),
        )]);
        let mut memory = KnownReplicas::open(path.clone()).await;
        assert_eq!(memory.saved().replicas, Records::new());
        let id = NodeId::try_from("clearcoat-2").unwrap();
        let now = SavedReplicas::new(records.clone(), KnownJournals::from([(id.clone(), Some(u64::MAX))]));
        memory.keep(now.clone()).await;
        assert_eq!(*KnownReplicas::open(path.clone()).await.saved(), now);
        // The format without a number, one that says nothing of journals, then a later one.
        let before = serde_json::to_string(&records).unwrap();
        for older in [before.clone(), format!(r#"{{"format":1,"replicas":{before}}}"#)] {
            std::fs::write(&file, older).unwrap();
            let memory = KnownReplicas::open(path.clone()).await;
            let known = KnownJournals::from([(id.clone(), None)]);
            assert_eq!((&memory.saved().replicas, memory.saved().known()), (&records, known));
        }
        for unreadable in ["{", r#"{"format":2,"replicas":{}}"#] {
            std::fs::write(&file, unreadable).unwrap();
            assert_eq!(*KnownReplicas::open(path.clone()).await.saved(), SavedReplicas::default());
        }
    }
}
