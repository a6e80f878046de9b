//! A file beside the journal that reveals a lost or replaced journal.
//!
//! `identity.json` contains the random name of the journal and a lower bound of its head. It is written periodically, after
//! the entries are durable, so it may be behind and is never ahead. A journal that is missing, has another name or ends
//! before that bound is not the one for which purges were promised.
//!
//! It cannot reveal a volume that is reset as a whole, including this file, by less than the retention. (If by more, the
//! cursors on it are too old to be used.)

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{FORMAT, OpenError};
use crate::journal::Position;

const NAME: &str = "identity.json";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Marker {
    /// The format of all files of this journal.
    format: u64,
    /// The name of the journal: 128 random bits in hexadecimal.
    pub(super) identity: String,
    /// A lower bound of its head.
    pub(super) head: Position,
}

#[derive(Debug)]
pub(super) enum Found {
    Nothing,
    Marker(Marker),
    /// It cannot be read, and why.
    Unreadable(String),
}

impl Marker {
    pub(super) fn new(identity: String, head: Position) -> Self {
        Marker { format: FORMAT, identity, head }
    }

    /// Its path in this directory.
    pub(super) fn path(directory: &Path) -> PathBuf {
        directory.join(NAME)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        // Cannot fail: a number and a string of hexadecimal digits.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads the file. A newer format or a missing permission is an error, because neither is evidence against the journal.
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
