//! Long answers without a copy: `splice(2)` moves them from socket to pipe to socket inside the kernel.
//!
//! For a body of 1 MiB that halves the CPU it costs. It pays only for bodies that are long, of known length and written as
//! they come: a frame, a cipher or HTTP/2 need the bytes. The pipe is filled only when it is empty: then "would block" on
//! that side can only mean that the socket is empty, and never that the pipe is full, so that the runtime's idea of the
//! socket's readiness stays right.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::transfer::{TURN, Transfer, TransferError};
use crate::files::{FilePermit, Share};

/// What is left of a body from where on it is spliced, in bytes. Below it, the calls cost more than the copies.
pub(super) const WORTHWHILE: u64 = 64 * 1024;

/// The wanted size of a pipe in bytes: what an unprivileged process may have (`/proc/sys/fs/pipe-max-size`).
const PIPE_SIZE: usize = 1024 * 1024;

/// Its files.
const FILES: i64 = 2;

/// The most pipes a worker keeps for the next long answer.
const MAX_SPARE: usize = 16;

/// An empty pipe.
#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    _files: FilePermit,
}

/// The spare pipes of a worker.
#[derive(Debug, Default)]
pub(super) struct Pipes(RefCell<Vec<Pipe>>);

impl Pipes {
    /// Begins to splice. `None` if there is no room for a pipe, or the system gives none: the answer is copied then.
    pub(super) fn begin(&self, room: &Arc<Share>) -> Option<Splice> {
        let spare = self.0.borrow_mut().pop();
        let pipe = spare.or_else(|| {
            let opened = open(room.try_take(FILES)?).inspect_err(|error| tracing::debug!(%error, "no pipe"));
            opened.ok()
        });
        pipe.map(|pipe| Splice { pipe, filled: 0 })
    }

    /// Closes the spare ones: somebody needs the room.
    pub(super) fn close_unused(&self) {
        self.0.borrow_mut().clear();
    }

    /// Takes a pipe back that was emptied.
    pub(super) fn put(&self, splice: Splice) {
        let mut spare = self.0.borrow_mut();
        if splice.filled == 0 && spare.len() < MAX_SPARE {
            spare.push(splice.pipe);
        }
    }
}

fn open(files: FilePermit) -> io::Result<Pipe> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // Users with many pipes get no larger ones: what they get will do.
    if let Err(error) = fcntl_setpipe_size(&into, PIPE_SIZE) {
        tracing::debug!(%error, "a pipe stays small");
    }
    Ok(Pipe { out, into, _files: files })
}

/// A body on its way through a pipe.
#[derive(Debug)]
pub(super) struct Splice {
    pipe: Pipe,
    filled: usize,
}

impl Splice {
    /// Whether it is the sink that is waited for.
    pub(super) fn waits_for_sink(&self) -> bool {
        self.filled > 0
    }

    /// Moves the rest of a body of known length; what waits in `transfer` goes first.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        transfer: &mut Transfer,
        source: &TcpStream,
        sink: &mut TcpStream,
    ) -> Poll<Result<(), TransferError>> {
        ready!(transfer.write_pending(cx, sink))?;
        let mut moved = 0;
        loop {
            while self.filled > 0 {
                let emptied = ready!(self.empty(cx, sink)).map_err(TransferError::Sink)?;
                self.filled -= emptied;
                transfer.record_written(emptied as u64);
                moved += emptied;
            }
            let Some(left) = transfer.length_left() else { return Poll::Ready(Ok(())) };
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.filled = ready!(self.fill(cx, source, left)).map_err(TransferError::Source)?;
            if self.filled == 0 {
                return Poll::Ready(Err(TransferError::Source(io::ErrorKind::UnexpectedEof.into())));
            }
            transfer.record_read(self.filled as u64);
        }
    }

    fn fill(&self, cx: &mut Context<'_>, source: &TcpStream, left: u64) -> Poll<io::Result<usize>> {
        let most = usize::try_from(left).map_or(PIPE_SIZE, |left| left.min(PIPE_SIZE));
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        loop {
            ready!(source.poll_read_ready(cx))?;
            let moved = source.try_io(Interest::READABLE, || {
                splice(source, None, &self.pipe.into, None, most, flags).map_err(io::Error::from)
            });
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn empty(&self, cx: &mut Context<'_>, sink: &TcpStream) -> Poll<io::Result<usize>> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        loop {
            ready!(sink.poll_write_ready(cx))?;
            let moved = sink.try_io(Interest::WRITABLE, || {
                splice(&self.pipe.out, None, sink, None, self.filled, flags).map_err(io::Error::from)
            });
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                result => return Poll::Ready(result),
            }
        }
    }
}
