//! What stands beside the journal, so that a journal that is lost or replaced is noticed.
//!
//! `identity.json` names the journal (at random, when it is created) and says how far it had come at least. It is written
//! after what it speaks of is durable, now and then, so it may be behind and is never ahead. A journal that is not
//! there, has another name or ends earlier is not the one that purges were promised on.
//!
//! What it cannot see: a volume that is set back as a whole, with this file on it, by less than the retention. (By more,
//! and the cursors on it are too old to be used.)

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{FORMAT, OpenError};
use crate::journal::Position;

/// The name of the file.
const NAME: &str = "identity.json";

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marker {
    /// Of all files of this journal.
    format: u64,
    /// The name of the journal: 128 random bits in hexadecimal.
    pub(super) identity: String,
    /// It had come to this position, at least.
    pub(super) head: Position,
}

/// What was found under the name.
#[derive(Debug)]
pub(super) enum Found {
    Nothing,
    Marker(Marker),
    /// Something was, and nobody can read it. Why.
    Unreadable(String),
}

impl Marker {
    pub(super) fn new(identity: String, head: Position) -> Self {
        Marker { format: FORMAT, identity, head }
    }

    /// Where it is for a journal in this directory.
    pub(super) fn path(directory: &Path) -> PathBuf {
        directory.join(NAME)
    }

    /// The bytes of the file.
    pub(super) fn encode(&self) -> Vec<u8> {
        // A number and a string of hexadecimal digits: nothing in it can fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what is there. One of a newer format, or one that may not be read, ends the start: it is no evidence
    /// against the journal.
    pub(super) fn read(directory: &Path) -> Result<Found, OpenError> {
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let path = Marker::path(directory);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(source) => return Err(OpenError::file(path, source)),
        };
        if let Ok(Format { format }) = serde_json::from_slice(&bytes)
            && format > FORMAT
        {
            return Err(OpenError::Newer { path, format });
        }
        Ok(match serde_json::from_slice(&bytes) {
            Ok(marker) => Found::Marker(marker),
            Err(error) => Found::Unreadable(format!("{} cannot be read: {error}", path.display())),
        })
    }
}
