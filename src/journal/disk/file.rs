//! The files of a journal, and who touches them.
//!
//! Everything that is written to the volume goes through [`Files`], so that it can be done elsewhere: by a process of its
//! own ([`super::process`]) where the volume may hang, by a disk with faults where a test wants one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Bound;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{BackendError, Builder, Database, DatabaseError, StorageBackend};

/// redb's own default is 1 GiB. Nothing is read after the start, so it only has to hold what a group touches.
const CACHE_BYTES: usize = 8 << 20;

/// What `io::Error` says of a file that is not under its name any more.
const GONE: &str = "it was removed or replaced while it was in use";

/// How the files of a journal are written.
pub(super) trait Files: Send {
    /// Opens or creates a database, and has redb verify it in full: a damaged page would make it panic later.
    fn open(&self, path: &Path) -> Result<Database, DatabaseError>;

    /// Puts a whole file into the place of what is there: durable, and never half of it.
    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()>;
}

/// By this process.
pub(super) struct LocalFiles;

impl Files for LocalFiles {
    fn open(&self, path: &Path) -> Result<Database, DatabaseError> {
        builder().create_with_backend(JournalFile::open(path)?)
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }
}

/// How a database is opened.
pub(super) fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

/// The database's file. A file that was deleted takes writes and fsyncs as any other, and is gone at the next start: so
/// with each fsync it is looked whether the name still leads to it.
#[derive(Debug)]
pub(super) struct JournalFile {
    file: FileBackend,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl JournalFile {
    /// Opens or creates it, and its directory: both may have been removed while it was in use.
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
