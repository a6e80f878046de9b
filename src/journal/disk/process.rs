//! Writes the journal's files from a separate process.
//!
//! A thread that writes to a frozen volume cannot be ended, not even by SIGKILL, and its process does not end before it.
//! Then everything that waits for the process (`docker stop`, systemd, a script) waits for the volume. So the process that
//! carries the shop's traffic never writes to the volume itself. It sends requests to a file process over a socket, and can
//! leave that behind; the file process ends after its pending write.
//!
//! The file process runs the same program (`/proc/self/exe`) with a command that is not in the help. It carries out one
//! request after another until the socket is closed. Then the main process has ended, killed or not, and the lock is
//! released. It ignores signals that are sent to the whole group (Ctrl-C, systemd).
//!
//! If the process cannot be started (no `/proc`, a limit), the main process writes the files itself, and logs that.
//!
//! redb writes a dozen pages for a purge before it asks for a sync, and only that makes them durable. So a write has no answer:
//! writes go over together with the next other request, and if one has failed, that request and all later ones do.
//!
//! ```text
//! request   operation: u8, argument: u64, length: u32, bytes
//! answer    to all but writes: code: i32 (0 done, above 0 an errno, below a kind of its own), value: u64, length: u32, bytes
//! ```

use std::io::{self, BufReader, Read, Write};
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use redb::{BackendError, Database, DatabaseError, StorageBackend};

use super::file::{Files, JournalFile, LocalFiles, builder};

/// The command that starts the file process.
pub const COMMAND: &str = "journal-files";

/// The maximum size of a message. redb writes pages and, at most, the table of a region.
const MAX_BYTES: usize = 1 << 30;

/// The size of gathered writes, in bytes, beyond which they are sent at once.
const GATHERED: usize = 1 << 20;

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Operation {
    Open,
    Close,
    Len,
    Read,
    Write,
    SetLen,
    Sync,
    Lock,
    Unlock,
    QueryLock,
    /// Sets the path for the next [`Operation::Replace`].
    Name,
    Replace,
}

const OPERATIONS: [Operation; 12] = [
    Operation::Open,
    Operation::Close,
    Operation::Len,
    Operation::Read,
    Operation::Write,
    Operation::SetLen,
    Operation::Sync,
    Operation::Lock,
    Operation::Unlock,
    Operation::QueryLock,
    Operation::Name,
    Operation::Replace,
];

/// Codes of errors without an errno.
const OTHER: i32 = -1;
const ENDS_TOO_EARLY: i32 = -2;

/// Files written by the file process, which is started when first needed.
#[derive(Default)]
pub(super) struct RemoteFiles {
    connection: Mutex<Option<Arc<Connection>>>,
}

/// The connection to the file process.
#[derive(Debug)]
struct Connection {
    sending: Mutex<Sending>,
    child: Mutex<Option<Child>>,
}

/// The main process's end of the socket.
#[derive(Debug)]
struct Sending {
    stream: UnixStream,
    /// Writes that go with the next request.
    gathered: Vec<u8>,
}

/// The database's file in the file process.
#[derive(Debug)]
struct RemoteFile(Arc<Connection>);

impl RemoteFiles {
    /// The file process, restarted if it has ended. `None` if it cannot be started.
    fn connection(&self) -> Option<Arc<Connection>> {
        let mut current = self.connection.lock();
        if let Some(connection) = current.as_ref().filter(|connection| connection.is_alive()) {
            return Some(Arc::clone(connection));
        }
        match Connection::start() {
            Ok(connection) => *current = Some(Arc::new(connection)),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "cannot start a process for the journal's files: a volume that hangs may keep this one from ending"
                );
                *current = None;
            }
        }
        current.clone()
    }
}

impl Files for RemoteFiles {
    fn open(&self, path: &Path) -> Result<Database, DatabaseError> {
        let Some(connection) = self.connection() else { return LocalFiles.open(path) };
        connection.ask(Operation::Open, 0, path.as_os_str().as_bytes())?;
        builder().create_with_backend(RemoteFile(connection))
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let Some(connection) = self.connection() else { return LocalFiles.replace(path, content) };
        connection.ask(Operation::Name, 0, path.as_os_str().as_bytes())?;
        connection.ask(Operation::Replace, 0, content).map(|_| ())
    }
}

impl Connection {
    fn start() -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn()?;
        Ok(Connection::over(ours, Some(child)))
    }

    fn over(stream: UnixStream, child: Option<Child>) -> Self {
        Connection { sending: Mutex::new(Sending { stream, gathered: Vec::new() }), child: Mutex::new(child) }
    }

    fn is_alive(&self) -> bool {
        self.child.lock().as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Sends a request, behind all writes so far, and waits for the answer.
    fn ask(&self, operation: Operation, argument: u64, bytes: &[u8]) -> io::Result<(u64, Vec<u8>)> {
        let mut sending = self.sending.lock();
        sending.gather(operation, argument, bytes)?;
        sending.send()?;
        let (head, bytes) = receive::<12>(&mut sending.stream)?.ok_or(io::ErrorKind::BrokenPipe)?;
        let [a, b, c, d, value @ ..] = head;
        match i32::from_be_bytes([a, b, c, d]) {
            0 => Ok((u64::from_be_bytes(value), bytes)),
            ENDS_TOO_EARLY => Err(io::Error::new(io::ErrorKind::UnexpectedEof, String::from_utf8_lossy(&bytes))),
            OTHER => Err(io::Error::other(String::from_utf8_lossy(&bytes))),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Sending {
    fn gather(&mut self, operation: Operation, argument: u64, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.gathered.push(operation as u8);
        self.gathered.extend(argument.to_be_bytes());
        self.gathered.extend(length.to_be_bytes());
        self.gathered.extend(bytes);
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let sent = self.stream.write_all(&self.gathered);
        self.gathered.clear();
        sent
    }
}

impl Drop for Connection {
    /// Closing the socket ends the process. Not waited for here, because it may hang.
    fn drop(&mut self) {
        let Some(mut child) = self.child.lock().take() else { return };
        _ = self.sending.lock().stream.shutdown(std::net::Shutdown::Both);
        // Without a thread for waiting, the process stays a zombie until this one ends.
        _ = thread::Builder::new().name("journal-reaper".into()).spawn(move || child.wait());
    }
}

impl StorageBackend for RemoteFile {
    fn len(&self) -> io::Result<u64> {
        self.0.ask(Operation::Len, 0, &[]).map(|(length, _)| length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (_, bytes) = self.0.ask(Operation::Read, offset, &(out.len() as u64).to_be_bytes())?;
        if bytes.len() != out.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        out.copy_from_slice(&bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.ask(Operation::SetLen, len, &[]).map(|_| ())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.ask(Operation::Sync, 0, &[]).map(|_| ())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut sending = self.0.sending.lock();
        sending.gather(Operation::Write, offset, data)?;
        if sending.gathered.len() > GATHERED { sending.send() } else { Ok(()) }
    }

    fn close(&self) -> io::Result<()> {
        self.0.ask(Operation::Close, 0, &[]).map(|_| ())
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        Ok(self.0.ask(Operation::Lock, 0, &encode((start, end)))?.0 == 1)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.ask(Operation::Unlock, 0, &encode((start, end)))?;
        Ok(())
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        Ok(self.0.ask(Operation::QueryLock, 0, &encode((start, end)))?.0 == 1)
    }
}

/// Carries out requests from the socket on standard input until it is closed.
///
/// # Errors An invalid request, or an error of the socket.
pub fn serve() -> io::Result<()> {
    use std::os::fd::AsFd as _;
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _context = runtime.enter();
    // Caught and ignored: only the end of the socket ends this process.
    let _signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    answer_all(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
}

fn answer_all(stream: UnixStream) -> io::Result<()> {
    let mut server = Server::default();
    // Gathered writes come in one piece.
    let mut requests = BufReader::with_capacity(64 * 1024, stream);
    while let Some((head, bytes)) = receive::<9>(&mut requests)? {
        let [operation, argument @ ..] = head;
        let (operation, argument) = (operation_of(operation)?, u64::from_be_bytes(argument));
        if operation == Operation::Write {
            server.write(argument, &bytes);
            continue;
        }
        let (code, value, bytes) = match server.carry_out(operation, argument, &bytes) {
            Ok((value, bytes)) => (0, value, bytes),
            Err(error) => (code_of(&error), 0, error.to_string().into_bytes()),
        };
        let mut answer = Vec::with_capacity(16 + bytes.len());
        answer.extend(code.to_be_bytes());
        answer.extend(value.to_be_bytes());
        answer.extend(u32::try_from(bytes.len()).map_err(io::Error::other)?.to_be_bytes());
        answer.extend(bytes);
        requests.get_mut().write_all(&answer)?;
    }
    Ok(())
}

fn operation_of(byte: u8) -> io::Result<Operation> {
    OPERATIONS.get(usize::from(byte)).copied().ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The code of an error in an answer.
fn code_of(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(errno) => errno,
        None if error.kind() == io::ErrorKind::UnexpectedEof => ENDS_TOO_EARLY,
        None => OTHER,
    }
}

/// The open files of the file process.
#[derive(Default)]
struct Server {
    file: Option<JournalFile>,
    /// Why a write to the open file has failed. What the file holds is not known then, so nothing else is done with it.
    failed_write: Option<io::Error>,
    name: PathBuf,
}

impl Server {
    /// Writes to the open file, unless a write before has failed.
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        if self.failed_write.is_none() {
            let file = self.file.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into());
            self.failed_write = file.and_then(|file| file.write(offset, bytes)).err();
        }
    }

    fn carry_out(&mut self, operation: Operation, argument: u64, bytes: &[u8]) -> io::Result<(u64, Vec<u8>)> {
        let path = || PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()));
        match operation {
            Operation::Open => {
                // Closes the earlier one first, and releases its lock.
                (self.file, self.failed_write) = (None, None);
                self.file = Some(JournalFile::open(&path())?);
                return Ok((0, vec![]));
            }
            Operation::Name => {
                self.name = path();
                return Ok((0, vec![]));
            }
            Operation::Replace => return LocalFiles.replace(&self.name, bytes).map(|()| (0, vec![])),
            _ => {}
        }
        if let Some(error) = &self.failed_write {
            let failed = match error.raw_os_error() {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::new(error.kind(), error.to_string()),
            };
            if operation == Operation::Close {
                self.file = None;
            }
            return Err(failed);
        }
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let done = |()| (0, vec![]);
        match operation {
            Operation::Len => file.len().map(|length| (length, vec![])),
            Operation::Read => {
                let length = decode_u64(bytes)?;
                let length = usize::try_from(length).ok().filter(|length| *length <= MAX_BYTES);
                let mut out = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
                file.read(argument, &mut out)?;
                Ok((0, out))
            }
            Operation::SetLen => file.set_len(argument).map(done),
            Operation::Sync => file.sync_data().map(done),
            Operation::Lock => as_io(file.try_lock_range(decode(bytes, 0)?, decode(bytes, 9)?)).map(value),
            Operation::Unlock => as_io(file.unlock_range(decode(bytes, 0)?, decode(bytes, 9)?)).map(done),
            Operation::QueryLock => as_io(file.query_lock_range(decode(bytes, 0)?, decode(bytes, 9)?)).map(value),
            Operation::Close => {
                let closed = file.close();
                self.file = None;
                closed.map(done)
            }
            Operation::Open | Operation::Name | Operation::Replace | Operation::Write => {
                Err(io::ErrorKind::InvalidInput.into())
            }
        }
    }
}

fn value(holds: bool) -> (u64, Vec<u8>) {
    (holds.into(), vec![])
}

fn as_io<T>(result: Result<T, BackendError>) -> io::Result<T> {
    result.map_err(|error| match error {
        BackendError::Io(error) => error,
        error => io::Error::other(error.to_string()),
    })
}

/// A message: the fixed part before the length, and the bytes. `None` at the end of the stream.
fn receive<const FIXED: usize>(stream: &mut impl Read) -> io::Result<Option<([u8; FIXED], Vec<u8>)>> {
    let mut head = [0; FIXED];
    match stream.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Ok(Some((head, bytes)))
}

/// Encodes a range of bytes: the kind and the value of each end.
fn encode((start, end): (Bound<u64>, Bound<u64>)) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(18);
    for bound in [start, end] {
        let (kind, at) = match bound {
            Bound::Unbounded => (0, 0),
            Bound::Included(at) => (1, at),
            Bound::Excluded(at) => (2, at),
        };
        bytes.push(kind);
        bytes.extend(u64::to_be_bytes(at));
    }
    bytes
}

fn decode(bytes: &[u8], from: usize) -> io::Result<Bound<u64>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let at = decode_u64(bytes.get(from + 1..from + 9).ok_or_else(invalid)?)?;
    match bytes.get(from) {
        Some(0) => Ok(Bound::Unbounded),
        Some(1) => Ok(Bound::Included(at)),
        Some(2) => Ok(Bound::Excluded(at)),
        _ => Err(invalid()),
    }
}

fn decode_u64(bytes: &[u8]) -> io::Result<u64> {
    let bytes = <[u8; 8]>::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(u64::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::disk::file::builder;
    use redb::{ReadableDatabase as _, TableDefinition};

    const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("t");

    /// The file process, as a thread.
    fn connect() -> Arc<Connection> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || answer_all(theirs).unwrap());
        Arc::new(Connection::over(ours, None))
    }

    fn open(connection: &Arc<Connection>, path: &Path) -> Result<Database, DatabaseError> {
        connection.ask(Operation::Open, 0, path.as_os_str().as_bytes())?;
        builder().create_with_backend(RemoteFile(Arc::clone(connection)))
    }

    #[test]
    fn a_database_over_there_is_like_one_here() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.redb");
        let connection = connect();
        let large = vec![7; 3 << 20];
        {
            let database = open(&connection, &path).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction.open_table(TABLE).unwrap().insert(1, large.as_slice()).unwrap();
            transaction.commit().unwrap();
            // Locked for other processes and for this one.
            assert!(matches!(open(&connect(), &path), Err(DatabaseError::DatabaseAlreadyOpen)));
            assert!(matches!(LocalFiles.open(&path), Err(DatabaseError::DatabaseAlreadyOpen)));
        }
        let database = LocalFiles.open(&path).unwrap();
        let transaction = database.begin_read().unwrap();
        assert_eq!(transaction.open_table(TABLE).unwrap().get(1).unwrap().unwrap().value(), large);
    }

    #[test]
    fn what_the_system_says_over_there_is_heard_here() {
        let folder = tempfile::tempdir().unwrap();
        let connection = connect();
        let is_a_directory = connection.ask(Operation::Open, 0, folder.path().as_os_str().as_bytes()).unwrap_err();
        assert_eq!(is_a_directory.to_string(), "Is a directory (os error 21)");
        let file = folder.path().join("cut");
        // The first bytes of a redb file.
        std::fs::write(&file, b"redb\x1a\x0a\xa9\x0d\x0a").unwrap();
        let cut = open(&connection, &file).err().unwrap();
        let DatabaseError::Storage(redb::StorageError::Io(error)) = cut else { panic!("{cut}") };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn nonsense_ends_the_other_side_and_does_not_hurt_it() {
        for message in [&[0xff; 13][..], &[3, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[1, 2, 3]] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(message).unwrap();
            ours.shutdown(std::net::Shutdown::Write).unwrap();
            _ = answer_all(theirs);
        }
        let mut server = Server::default();
        for operation in OPERATIONS {
            // A device is not a directory.
            let done = server.carry_out(operation, 0, b"/dev/null/\xff");
            assert!(done.is_err() || operation == Operation::Name, "{operation:?}");
        }
    }

    #[test]
    fn a_failed_write_fails_what_follows_until_the_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let (connection, path) = (connect(), folder.path().join("a"));
        let open = || connection.ask(Operation::Open, 0, path.as_os_str().as_bytes()).unwrap();
        open();
        let file = RemoteFile(Arc::clone(&connection));
        // No file can have a byte there.
        let beyond = i64::MAX as u64;
        file.write(0, b"before").unwrap();
        file.write(beyond, b"x").unwrap();
        file.write(0, b"behind").unwrap();
        let failed = file.sync_data().unwrap_err();
        assert!(failed.raw_os_error().is_some(), "{failed}");
        for also in [file.len().err(), file.read(0, &mut [0]).err(), file.sync_data().err(), file.close().err()] {
            assert_eq!(also.and_then(|error| error.raw_os_error()), failed.raw_os_error());
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"before", "nothing is written behind a failed write");
        open();
        file.write(0, b"after!").unwrap();
        file.sync_data().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"after!");
    }

    #[test]
    fn writes_are_in_the_file_before_what_is_asked_after_them() {
        let folder = tempfile::tempdir().unwrap();
        let (connection, path) = (connect(), folder.path().join("a"));
        connection.ask(Operation::Open, 0, path.as_os_str().as_bytes()).unwrap();
        let file = RemoteFile(connection);
        // More than is gathered, and more than the socket holds.
        let large = vec![7; 3 * GATHERED];
        file.write(1, &large).unwrap();
        file.write(0, b"a").unwrap();
        assert_eq!(file.len().unwrap(), large.len() as u64 + 1);
        let mut read = [0; 2];
        file.read(0, &mut read).unwrap();
        assert_eq!(read, [b'a', 7]);
    }

    #[test]
    fn who_is_gone_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let connection = Connection::over(ours, None);
        assert_eq!(connection.ask(Operation::Len, 0, &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(!connection.is_alive());
    }
}
