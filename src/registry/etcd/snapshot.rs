//! The last fleet received from etcd, on disk, for a start without etcd.
//!
//! It contains the nodes with their resolved addresses, so that a start needs no DNS either, and their leases, so that
//! the first list of etcd, whenever it arrives, is compared with it as if the process had never stopped. An unreadable
//! file does not prevent the start: it is renamed for later inspection, and the process waits for etcd.
//!
//! Only changed nodes cause a write: the revision also grows with every purge that replicas share.

mod spec;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::record::NodeRecord;
use crate::atomic_file;
use crate::fleet::NodeSpec;
use crate::telemetry::causes;

/// The format number of the file. A file of another format is not read.
const FORMAT: u32 = 1;

/// The fleet at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedFleet {
    format: u32,
    /// The id of the etcd cluster.
    pub(super) cluster: u64,
    /// Its revision.
    pub(super) revision: i64,
    pub(super) nodes: Vec<SavedNode>,
}

/// One node of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedNode {
    pub(super) key: String,
    /// 0 if it had none.
    pub(super) lease: i64,
    pub(super) record: NodeRecord,
    #[serde(with = "spec")]
    pub(super) spec: NodeSpec,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum SnapshotError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("it has format {0}, and only {FORMAT} is known here")]
    Format(u32),
}

impl SavedFleet {
    pub(super) fn new(cluster: u64, revision: i64, nodes: Vec<SavedNode>) -> Self {
        SavedFleet { format: FORMAT, cluster, revision, nodes }
    }

    /// Reads the file; `None` if there is none.
    pub(super) fn read(path: &Path) -> Result<Option<SavedFleet>, SnapshotError> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        #[derive(Deserialize)]
        struct FormatOnly {
            format: u32,
        }
        let FormatOnly { format } = serde_json::from_slice(&bytes)?;
        if format != FORMAT {
            return Err(SnapshotError::Format(format));
        }
        Ok(Some(serde_json::from_slice(&bytes)?))
    }

    /// Writes the file atomically: a crash leaves either the old one or the new one.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        atomic_file::replace(path, &serde_json::to_vec(self)?)
    }
}

/// Reads and writes the file on blocking threads, since an fsync can take long.
pub(super) struct SnapshotStore {
    /// `None`: nothing is kept.
    path: Option<PathBuf>,
    /// The nodes in the file; `None` if unknown.
    nodes: Option<Vec<SavedNode>>,
    writing: JoinSet<io::Result<Vec<SavedNode>>>,
}

impl SnapshotStore {
    /// Uses the file at this path; without a path, nothing is stored.
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        SnapshotStore { path, nodes: None, writing: JoinSet::new() }
    }

    /// The content of the file; `None` if it cannot be used.
    pub(super) async fn read(&mut self) -> Option<SavedFleet> {
        let path = self.path.clone()?;
        let read = tokio::task::spawn_blocking({
            let path = path.clone();
            move || SavedFleet::read(&path)
        });
        match read.await {
            Ok(Ok(saved)) => {
                self.nodes = saved.as_ref().map(|saved| saved.nodes.clone());
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
    pub(super) fn write(&mut self, saved: SavedFleet) -> bool {
        let Some(path) = self.path.clone() else { return true };
        if !self.writing.is_empty() {
            return false;
        }
        if self.nodes.as_ref() != Some(&saved.nodes) {
            self.writing.spawn_blocking(move || saved.write(&path).map(|()| saved.nodes));
        }
        true
    }

    /// Waits for the end of a write and returns whether it succeeded; never returns while nothing is written.
    pub(super) async fn written(&mut self) -> bool {
        let Some(end) = self.writing.join_next().await else { return std::future::pending().await };
        match end.map_err(io::Error::other).flatten() {
            Ok(nodes) => {
                self.nodes = Some(nodes);
                true
            }
            Err(error) => {
                tracing::warn!(error = %causes(&error), "the fleet could not be written to disk; it is tried again");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{NodeId, Role};

    fn saved() -> SavedFleet {
        let (record, _) =
            NodeRecord::parse(Role::Varnish, br#"{"address":"varnish-1:6081","epoch":"e","zone":"a"}"#).unwrap();
        let spec = record.spec(Role::Varnish, NodeId::try_from("varnish-1").unwrap(), ([10, 0, 1, 5], 6081).into());
        SavedFleet::new(7, 42, vec![SavedNode { key: "varnish/varnish-1".to_owned(), lease: i64::MAX, record, spec }])
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/fleet.json");
        assert_eq!(SavedFleet::read(&path).unwrap(), None);
        saved().write(&path).unwrap();
        saved().write(&path).unwrap();
        assert_eq!(SavedFleet::read(&path).unwrap(), Some(saved()));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    /// Another release has written it, or will read it.
    #[test]
    fn a_file_of_format_1_is_read_and_written_as_it_always_was() {
        let text = concat!(
            r#"{"format":1,"cluster":7,"revision":42,"nodes":["#,
            r#"{"key":"varnish/v","lease":5,"record":{"address":"v:6081","weight":1,"drain":false,"delivery":"xkey","#,
            r#""header_limit":512,"send_proxy":"v2","epoch":"e","zone":"a","labels":{}},"#,
            r#""spec":{"source":"etcd","role":"varnish","id":"v","address":"10.0.1.5:6081","weight":1,"delivery":"xkey","#,
            r#""header_limit":512,"send_proxy":"v2","epoch":"e","zone":"a","labels":{}}},"#,
            r#"{"key":"web/w","lease":0,"record":{"address":"w:80","weight":2,"drain":true,"delivery":"magento","#,
            r#""header_limit":7680,"send_proxy":"off","epoch":null,"zone":null,"labels":{"rack":"7"}},"#,
            r#""spec":{"source":"etcd","role":"web","id":"w","address":"10.0.1.6:80","weight":0,"delivery":"magento","#,
            r#""header_limit":7680,"send_proxy":"off","epoch":null,"zone":null,"labels":{"rack":"7"}}}]}"#
        );
        let saved: SavedFleet = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&saved).unwrap(), text);
        let (varnish, web) = (&saved.nodes[0].spec, &saved.nodes[1].spec);
        let settings = varnish.varnish.as_ref().unwrap();
        assert_eq!((settings.header_limit, settings.epoch.as_deref()), (512, Some("e")));
        assert_eq!((web.role(), web.weight), (Role::Web, 0));
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_can_be_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fleet.json");
        for text in ["", "{\"format\":1}", "{\"format\":2,\"nodes\":[]}", "\0\0\0"] {
            fs::write(&path, text).unwrap();
            assert!(SavedFleet::read(&path).is_err(), "{text}");
        }
        let aside = atomic_file::set_aside(&path).unwrap();
        assert!(aside.exists() && !path.exists());
    }
}
