//! Errors of the journal's files, in texts that name the file.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fleet::InvalidNodeId;
use crate::journal::Position;

/// The format that this version writes. Format 1 had no number, and is still read.
pub(super) const FORMAT: u64 = 2;

/// Why a journal was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be created, used or synced.
    #[error("the journal's directory {} cannot be used{} (journal.path)", path.display(), hint(source))]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file cannot be opened for reading and writing.
    #[error("the journal {} cannot be opened for reading and writing{} (journal.path)", path.display(), hint(source))]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Another process has locked it.
    #[error("another clearcoat uses the journal {}, or what is left of one whose volume hangs; each needs a \
             [journal] path of its own", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a later version.
    #[error("{} was written by a newer clearcoat: it has format {format}, and this one reads up to {FORMAT}; start the \
             newer one, or give this one a journal.path of its own", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u64,
    },
    /// It is not a journal, or it is damaged.
    #[error("{} is not a journal, or it is damaged (move it away, or set journal.damaged = \"anew\": then a new one is \
             begun, and each Varnish drops all pages before it serves)", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damage.
        source: Damage,
    },
    /// A new file cannot be written.
    #[error("the journal {} cannot be begun (journal.path)", path.display())]
    Begin {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The volume does not answer.
    #[error("no answer from {} for {} s: is its volume frozen, or its server gone? (journal.path)", path.display(), after.as_secs())]
    NoAnswer {
        /// The directory.
        path: PathBuf,
        /// The time waited.
        after: Duration,
    },
    /// The system cannot start a thread for the writer.
    #[error("the journal's writer cannot be started")]
    Thread(#[source] io::Error),
}

/// The damage to a journal's file.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// It is not a redb file, or it is damaged.
    #[error("the database cannot be read")]
    Database(#[source] redb::Error),
    /// An assertion in redb failed.
    #[error("the database cannot be read: {0}")]
    Panicked(String),
    /// Positions must be consecutive, and the head must be the last one.
    #[error("at position {position}: position {expected} is expected there")]
    OutOfOrder {
        /// The position in the file.
        position: Position,
        /// The position that must be there.
        expected: Position,
    },
    /// A cursor whose node has an invalid name.
    #[error("it holds a cursor of no node")]
    Cursor(#[source] InvalidNodeId),
}

impl OpenError {
    /// An error of the system about a file.
    pub(super) fn file(path: PathBuf, source: io::Error) -> Self {
        OpenError::File { path, source }
    }
}

/// Translates an error of redb.
pub(super) fn not_opened(path: &Path, error: redb::Error) -> OpenError {
    use io::ErrorKind::{InvalidData, UnexpectedEof};
    let path = path.to_owned();
    match error {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => OpenError::InUse { path },
        // redb reports these kinds for a file that does not begin like its own, or that ends before its last page.
        redb::Error::Io(source) if !matches!(source.kind(), InvalidData | UnexpectedEof) => {
            OpenError::file(path, source)
        }
        source => OpenError::Damaged { path, source: Damage::Database(source) },
    }
}

/// The remedy: in most cases the container's user is not the owner of the volume.
fn hint(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let uid = rustix::process::geteuid().as_raw();
            format!("; clearcoat runs as uid {uid}: chown it to that, or run clearcoat as its owner")
        }
        _ => String::new(),
    }
}

/// Why a group was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommitError {
    #[error("{} cannot be written", path.display())]
    Storage { path: PathBuf, source: redb::Error },
    #[error("{} cannot be written: {reason}", path.display())]
    Panicked { path: PathBuf, reason: String },
    #[error("{} was replaced by another journal while it was in use", path.display())]
    Replaced { path: PathBuf },
    #[error("{} cannot be written", path.display())]
    Marker { path: PathBuf, source: io::Error },
    #[error("a purge cannot be encoded")]
    Encode(#[from] serde_json::Error),
}
