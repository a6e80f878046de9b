//! What goes wrong with a file, in words that name it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fleet::InvalidNodeId;
use crate::journal::Position;

/// The format of a journal's files that this version writes. 1 was without a number; it is read all the same.
pub(super) const FORMAT: u64 = 2;

/// Why a journal was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory is not there and cannot be made, or cannot be synced.
    #[error("the journal's directory {} cannot be used{} (journal.path)", path.display(), hint(source))]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be opened for reading and writing.
    #[error("the journal {} cannot be opened for reading and writing{} (journal.path)", path.display(), hint(source))]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody holds its lock.
    #[error("another clearcoat uses the journal {}, or what is left of one whose volume hangs; each needs a \
             [journal] path of its own", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A later version has written it, in a way that this one may not understand.
    #[error("{} was written by a newer clearcoat: it has format {format}, and this one reads up to {FORMAT}; start the \
             newer one, or give this one a journal.path of its own", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u64,
    },
    /// It is no journal, or not a whole one.
    #[error("{} is not a journal, or it is damaged (move it away, or set journal.damaged = \"anew\": then a new one is \
             begun, and each Varnish drops all pages before it serves)", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Damage,
    },
    /// A new file cannot be written.
    #[error("the journal {} cannot be begun (journal.path)", path.display())]
    Begin {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The volume gives no answer.
    #[error("no answer from {} for {} s: is its volume frozen, or its server gone? (journal.path)", path.display(), after.as_secs())]
    NoAnswer {
        /// The directory.
        path: PathBuf,
        /// How long was waited.
        after: Duration,
    },
    /// The system gives no thread for the writer.
    #[error("the journal's writer cannot be started")]
    Thread(#[source] io::Error),
}

/// What is wrong with a journal's file.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// It is not a redb file, or one that is damaged.
    #[error("the database cannot be read")]
    Database(#[source] redb::Error),
    /// redb met what it thought impossible.
    #[error("the database cannot be read: {0}")]
    Panicked(String),
    /// Positions follow each other, and the head is the last one.
    #[error("at position {position}: position {expected} is expected there")]
    OutOfOrder {
        /// Where the entry is stored.
        position: Position,
        /// Where one should be.
        expected: Position,
    },
    /// A cursor of something that is no node.
    #[error("it holds a cursor of no node")]
    Cursor(#[source] InvalidNodeId),
}

impl OpenError {
    /// A file that the system does not give.
    pub(super) fn file(path: PathBuf, source: io::Error) -> Self {
        OpenError::File { path, source }
    }
}

/// Which error of redb means what.
pub(super) fn not_opened(path: &Path, error: redb::Error) -> OpenError {
    use io::ErrorKind::{InvalidData, UnexpectedEof};
    let path = path.to_owned();
    match error {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => OpenError::InUse { path },
        // redb says so of a file that does not begin as its files do, or that ends before its last page.
        redb::Error::Io(source) if !matches!(source.kind(), InvalidData | UnexpectedEof) => {
            OpenError::file(path, source)
        }
        source => OpenError::Damaged { path, source: Damage::Database(source) },
    }
}

/// What an operator can do about it: the container runs as a user that is not the volume's owner, most of the time.
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
