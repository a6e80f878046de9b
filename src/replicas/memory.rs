//! Who the others were, for a start without etcd.
//!
//! A replica that starts while etcd is away accepts purges, and whoever it knew then is to hear of them. So those are
//! written down beside the journal, and told and asked like any replica whose key is gone. Nothing hangs on the file: where
//! it cannot be read or written, a start without etcd knows nobody until etcd is back.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::Record;
use crate::fleet::NodeId;

type Records = BTreeMap<NodeId, Record>;

/// What is on disk.
pub(super) struct Memory {
    path: Option<PathBuf>,
    known: Records,
}

impl Memory {
    /// Reads it.
    pub(super) async fn open(path: Option<PathBuf>) -> Self {
        let Some(file) = path.clone() else { return Memory { path, known: Records::new() } };
        let read = tokio::task::spawn_blocking(move || std::fs::read(file)).await;
        let known = match read.unwrap_or_else(|panicked| Err(panicked.into())) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(?path, %error, "which replicas there were cannot be read");
                Records::new()
            }),
            Err(error) => {
                // A first start has none.
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(?path, %error, "which replicas there were cannot be read");
                }
                Records::new()
            }
        };
        Memory { path, known }
    }

    /// Who there was.
    pub(super) fn known(&self) -> &Records {
        &self.known
    }

    /// Writes down who there is, where that is news.
    pub(super) async fn keep(&mut self, records: Records) {
        if self.known == records {
            return;
        }
        self.known = records.clone();
        let Some(path) = self.path.clone() else { return };
        let written = tokio::task::spawn_blocking(move || write(&path, &records)).await;
        if let Err(error) = written.unwrap_or_else(|panicked| Err(panicked.into())) {
            tracing::warn!(path = ?self.path, %error, "which replicas there are cannot be written down");
        }
    }
}

/// All of it or nothing.
fn write(path: &Path, records: &Records) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, serde_json::to_vec(records)?)?;
    std::fs::rename(&new, path)
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
        let mut memory = Memory::open(path.clone()).await;
        assert!(memory.known().is_empty());
        memory.keep(records.clone()).await;
        assert_eq!(*Memory::open(path.clone()).await.known(), records);
        std::fs::write(file, "{").unwrap();
        assert!(Memory::open(path).await.known().is_empty());
    }
}
