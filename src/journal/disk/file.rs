//! Access to the files of a journal.
//!
//! All writes to the volume go through [`Files`], so that they can be made elsewhere: by a separate process
//! ([`super::process`]) if the volume may hang, or by a faulty disk in tests.

use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Bound;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{BackendError, Builder, Database, DatabaseError, StorageBackend};

use crate::atomic_file;

/// redb's default is 1 GiB. Nothing is read after the start, so the cache only has to hold the pages of a group.
const CACHE_BYTES: usize = 8 << 20;

/// The error text for a file that is no longer at its path.
const GONE: &str = "it was removed or replaced while it was in use";

/// Writes the files of a journal.
pub(super) trait Files: Send {
    /// Opens or creates a database, and has redb verify all of it: later, a damaged page would make redb panic.
    fn open(&self, path: &Path) -> Result<Database, DatabaseError>;

    /// Replaces a file atomically and durably.
    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()>;
}

/// Writes from this process.
pub(super) struct LocalFiles;

impl Files for LocalFiles {
    fn open(&self, path: &Path) -> Result<Database, DatabaseError> {
        builder().create_with_backend(JournalFile::open(path)?)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        atomic_file::replace(path, content)
    }
}

pub(super) fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

/// The database's file. A deleted file still accepts writes and fsyncs, and is gone at the next start. So with each fsync it
/// is checked that the path still leads to it.
#[derive(Debug)]
pub(super) struct JournalFile {
    file: FileBackend,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl JournalFile {
    /// Opens or creates the file and its directory: both may have been removed while in use.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                path.parent().map_or(Ok(()), fs::create_dir_all)?;
                options.create_new(true).open(path)?
            }
            opened => opened?,
        };
        let metadata = file.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        Ok(JournalFile { file: FileBackend::new(file).map_err(io::Error::other)?, path: path.to_owned(), identity })
    }

    fn is_still_there(&self) -> io::Result<()> {
        let metadata = fs::metadata(&self.path);
        if metadata.is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity) {
            Ok(())
        } else {
            Err(io::Error::other(GONE))
        }
    }
}

impl StorageBackend for JournalFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()?;
        self.is_still_there()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
