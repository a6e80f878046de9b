//! The access log: one line for each request, written beside the request path.
//!
//! **No worker ever waits for it.** A worker writes lines into a buffer of its own, and hands full buffers to one thread
//! through a bounded queue; ten times a second it hands over what there is. The thread alone touches the file. If the
//! reader of a pipe or a disk hangs, the queue fills up, and further buffers are dropped and counted: an access log is
//! worth less than the traffic that it describes.
//!
//! A line is made on the worker and not on the thread: to pack what it is made of, and to unpack it there, costs as much
//! as to write it at once, and a text is what the thread can drop, count and write without looking at it.

mod line;
mod redaction;
mod sink;

use std::cell::{Cell, RefCell};
use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, SystemTime};

use prometheus::IntCounter;
use xxhash_rust::xxh3::xxh3_64;

pub use line::{AccessLine, LineFormat, RequestLine};
pub use redaction::Redaction;

use line::LineWriter;
use sink::Sink;

/// A buffer is handed over when it has this many bytes: some 150 lines, so that handing over costs a line nothing.
const FULL: usize = 64 * 1024;

/// The most buffers that wait for the thread: with [`FULL`] each, 16 MiB.
const QUEUE: usize = 256;

/// How often the thread looks for a request to open the file again while nothing is written.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How the access log is written.
#[derive(Clone, Debug)]
pub struct AccessOptions {
    /// How a line looks.
    pub format: LineFormat,
    /// The file; `None`: standard output.
    pub file: Option<PathBuf>,
    /// The share of requests that are written, 0 to 1. Those that failed always are.
    pub sample: f64,
    /// Whose values are no part of a line.
    pub redaction: Redaction,
}

/// The access log of the process, shared by its workers. The thread ends when the last of them has dropped it.
#[derive(Debug)]
pub struct AccessLog {
    format: LineFormat,
    redaction: Redaction,
    /// Requests whose id hashes to at most this are written.
    sampled: u64,
    queue: SyncSender<LineBatch>,
    dropped: IntCounter,
    reopen: ReopenAccessLog,
}

/// Whole lines.
#[derive(Debug)]
struct LineBatch {
    text: Vec<u8>,
    lines: u64,
}

/// Has the file opened again, after somebody has moved it away.
#[derive(Clone, Debug, Default)]
pub struct ReopenAccessLog(Arc<AtomicBool>);

impl ReopenAccessLog {
    /// Asks for it; it happens within a moment.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The thread that writes.
#[derive(Debug)]
pub struct AccessWriter(Receiver<()>);

impl AccessWriter {
    /// Waits until everything is written, once every [`AccessLog`] is dropped; at most this long, as the disk may hang.
    /// Returns whether it is.
    pub fn wait(&self, patience: Duration) -> bool {
        matches!(self.0.recv_timeout(patience), Err(RecvTimeoutError::Disconnected))
    }
}

impl AccessLog {
    /// Starts the thread. `dropped` counts lines that were lost.
    ///
    /// # Errors
    /// If the system refuses a thread, or standard output is closed.
    pub fn start(options: AccessOptions, dropped: IntCounter) -> io::Result<(Arc<AccessLog>, AccessWriter)> {
        let AccessOptions { format, file, sample, redaction } = options;
        let sink = Sink::new(file, dropped.clone())?;
        let (queue, batches) = sync_channel(QUEUE);
        let (running, ended) = sync_channel(0);
        let reopen = ReopenAccessLog::default();
        let asked = reopen.clone();
        std::thread::Builder::new().name("access-log".into()).spawn(move || {
            write_all(sink, &batches, &asked);
            drop::<SyncSender<()>>(running);
        })?;
        let sampled = (sample * u64::MAX as f64) as u64;
        let log = AccessLog { format, redaction, sampled, queue, dropped, reopen };
        Ok((Arc::new(log), AccessWriter(ended)))
    }

    /// What opens the file again.
    pub fn reopener(&self) -> ReopenAccessLog {
        self.reopen.clone()
    }

    /// Whether the request with this id is written although nothing is wrong with it. Every listener and every replica
    /// that the id reaches decides the same, so that a request is found everywhere or nowhere.
    pub fn is_sampled(&self, id: &[u8]) -> bool {
        self.sampled == u64::MAX || xxh3_64(id) < self.sampled
    }
}

fn write_all(mut sink: Sink, batches: &Receiver<LineBatch>, reopen: &ReopenAccessLog) {
    loop {
        let batch = batches.recv_timeout(LOOK_EVERY);
        if reopen.0.swap(false, Ordering::Relaxed) {
            sink.open_again();
        }
        match batch {
            Ok(LineBatch { text, lines }) => sink.write(&text, lines),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// One worker's part of the access log.
#[derive(Debug)]
pub struct AccessBuffer {
    log: Arc<AccessLog>,
    text: RefCell<Vec<u8>>,
    lines: Cell<u64>,
    writer: RefCell<LineWriter>,
}

impl AccessBuffer {
    /// An empty one.
    pub fn new(log: Arc<AccessLog>) -> Self {
        let writer = RefCell::new(LineWriter::new(log.format));
        AccessBuffer { log, text: RefCell::default(), lines: Cell::default(), writer }
    }

    /// Whether it is a part of this log.
    pub fn is_of(&self, log: &Arc<AccessLog>) -> bool {
        Arc::ptr_eq(&self.log, log)
    }

    /// The log that it is a part of.
    pub fn log(&self) -> &AccessLog {
        &self.log
    }

    /// Writes a line. Never waits.
    pub fn write(&self, line: &AccessLine<'_>) {
        let mut text = self.text.borrow_mut();
        self.writer.borrow_mut().write(&mut text, line, SystemTime::now(), &self.log.redaction);
        self.lines.set(self.lines.get() + 1);
        if text.len() >= FULL {
            drop(text);
            self.hand_over();
        }
    }

    /// Hands the lines so far to the thread, or drops them if it cannot take them. Never waits.
    pub fn hand_over(&self) {
        let lines = self.lines.take();
        if lines == 0 {
            return;
        }
        let text = mem::take(&mut *self.text.borrow_mut());
        // The next buffer is as large as this one was.
        self.text.borrow_mut().reserve(text.len());
        if self.log.queue.try_send(LineBatch { text, lines }).is_err() {
            self.log.dropped.inc_by(lines);
        }
    }
}

impl Drop for AccessBuffer {
    fn drop(&mut self) {
        self.hand_over();
    }
}

#[cfg(test)]
mod tests;
