//! What goes wrong with a file, in words that name it.

use std::io;
use std::path::PathBuf;

use crate::fleet::InvalidNodeId;
use crate::journal::Position;

/// Why a journal was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory is not there and cannot be made, or cannot be synced.
    #[error("the journal's directory {} cannot be used", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be opened for reading and writing.
    #[error("the journal {} cannot be opened for reading and writing", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody holds its lock.
    #[error("another clearcoat uses the journal {}; each needs a [journal] path of its own", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It is not a redb file, or one that is damaged or of another version.
    #[error("{} is not a journal, or it is damaged; move it away to start with an empty one", path.display())]
    NotAJournal {
        /// The file.
        path: PathBuf,
        /// What redb said.
        source: redb::Error,
    },
    /// An entry that nobody can read.
    #[error("the journal {} is damaged at position {position}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// Where the entry is stored.
        position: Position,
        /// What is wrong with it.
        source: BadEntry,
    },
    /// A cursor of something that is no node.
    #[error("the journal {} holds a cursor of no node", path.display())]
    Cursor {
        /// The file.
        path: PathBuf,
        /// What is wrong with the id.
        source: InvalidNodeId,
    },
    /// The system gives no thread for the writer.
    #[error("the journal's writer cannot be started")]
    Thread(#[source] io::Error),
}

/// What is wrong with a stored entry.
#[derive(Debug, thiserror::Error)]
pub enum BadEntry {
    /// Not what this version writes.
    #[error("it is no purge that this version knows")]
    Unreadable(#[from] serde_json::Error),
    /// Positions follow each other, and the head is the last one.
    #[error("position {0} is expected there")]
    OutOfOrder(Position),
}

/// Why a group was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommitError {
    #[error("{} cannot be written", path.display())]
    Storage { path: PathBuf, source: redb::Error },
    #[error("a purge cannot be encoded")]
    Encode(#[from] serde_json::Error),
}
