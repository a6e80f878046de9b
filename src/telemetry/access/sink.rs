//! Where the lines go: standard output, or a file that is opened again when somebody asks.
//!
//! Nothing here ends the process or stops the thread: a file that cannot be opened or written is said once, costs the
//! lines of that time, and is tried again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use prometheus::IntCounter;

/// The least time between two attempts to open a file that could not be opened.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// After this long without a fault the next one is another, and is said again.
const OVER_AFTER: Duration = Duration::from_secs(10);

/// Who may read the file: it says who visits the shop.
const MODE: u32 = 0o640;

/// The destination of the access log.
#[derive(Debug)]
pub(super) struct Sink {
    /// The file; `None` for standard output.
    path: Option<PathBuf>,
    open: Option<File>,
    tried: Option<Instant>,
    /// The last fault, while it is not over.
    failed: Option<Instant>,
    /// The last line was written in part.
    is_torn: bool,
    dropped: IntCounter,
}

impl Sink {
    /// # Errors
    /// If standard output is wanted and closed.
    pub(super) fn new(path: Option<PathBuf>, dropped: IntCounter) -> io::Result<Self> {
        let open = match &path {
            // Its own file descriptor: what is printed by others does not lock it.
            None => Some(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
            Some(_) => None,
        };
        Ok(Sink { path, open, tried: None, failed: None, is_torn: false, dropped })
    }

    /// Closes the file, and opens the one that has its name now.
    pub(super) fn open_again(&mut self) {
        let Some(path) = &self.path else { return };
        tracing::info!(file = %path.display(), "the access log is opened again");
        (self.open, self.tried, self.is_torn) = (None, None, false);
        self.open = self.file();
    }

    /// Writes whole lines, or counts those that could not be written.
    pub(super) fn write(&mut self, text: &[u8], lines: u64) {
        let Some(mut file) = self.file() else { return self.dropped.inc_by(lines) };
        let mut written = 0;
        let result = (|| {
            if self.is_torn {
                // What comes next must not continue half a line.
                file.write_all(b"\n")?;
            }
            while written < text.len() {
                match file.write(&text[written..]) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(length) => written += length,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })();
        match result {
            Ok(()) => {
                self.is_torn = false;
                self.open = Some(file);
                self.record_success();
            }
            Err(error) => {
                self.is_torn = written > 0 && text[written - 1] != b'\n' || written == 0 && self.is_torn;
                self.dropped.inc_by(memchr::memchr_iter(b'\n', &text[written..]).count() as u64);
                if self.path.is_none() {
                    self.open = Some(file);
                }
                self.record_failure(&error);
            }
        }
    }

    /// Takes the file, opened if it is not.
    fn file(&mut self) -> Option<File> {
        if let Some(file) = self.open.take() {
            return Some(file);
        }
        let path = self.path.as_ref()?;
        if self.tried.is_some_and(|tried| tried.elapsed() < TRY_EVERY) {
            return None;
        }
        self.tried = Some(Instant::now());
        match OpenOptions::new().append(true).create(true).mode(MODE).open(path) {
            Ok(file) => Some(file),
            Err(error) => {
                self.record_failure(&error);
                None
            }
        }
    }

    fn record_failure(&mut self, error: &io::Error) {
        if self.failed.replace(Instant::now()).is_none() {
            let file = self.name();
            tracing::warn!(%file, %error, "the access log cannot be written: its lines are lost, and nothing else");
        }
    }

    fn record_success(&mut self) {
        if self.failed.is_some_and(|failed| failed.elapsed() > OVER_AFTER) {
            self.failed = None;
            tracing::info!(file = %self.name(), "the access log is written again");
        }
    }

    fn name(&self) -> String {
        self.path.as_ref().map_or_else(|| "standard output".to_owned(), |path| path.display().to_string())
    }
}
