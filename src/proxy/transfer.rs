//! One direction of a body: read, check its frame, write it anew, never faster than the slower side.
//!
//! The bytes stay where they were read, in the worker's scratch buffer, and are written from there: our own frame is put
//! around them in place. Only what the sink does not take at once is copied, to wait for it. What goes before the body (a
//! head) leaves in the same write.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::http1::{BadChunk, ChunkedDecoder, Framing};

/// Room before the content for a chunk size (16 hexadecimal digits and CR LF), and behind it for the end of a chunk
/// and of the body.
pub(super) const BEFORE: usize = 18;
const BEHIND: usize = 7;

/// The most that one body moves before the other direction, and the worker's other connections, have their turn. Where
/// both sides are always ready, it would otherwise go on until tokio calls a halt: with reads of 256 KiB, after 16 MiB.
pub(super) const TURN: usize = 1024 * 1024;

/// How much is read at once for a sink that is slower than its source: that is what it can make us hold.
const SLOW_READ: usize = 64 * 1024;

/// A piece that is no longer than this is written behind what waits before it, and not beside it: to gather two pieces
/// costs the kernel more than to copy so few bytes.
const COPIED: usize = 8 * 1024;

/// Where a read into the scratch buffer goes, so that a frame can be put around it in place.
pub(super) fn reading_room(scratch: &mut [u8]) -> &mut [u8] {
    let end = scratch.len() - BEHIND;
    &mut scratch[BEFORE..end]
}

/// Why a transfer failed, by side.
#[derive(Debug)]
pub(super) enum TransferError {
    /// The source broke off or failed.
    Source(io::Error),
    /// The source sent a malformed frame.
    Frame(BadChunk),
    /// The source sent more than it may.
    TooLong,
    /// The sink does not take more.
    Sink(io::Error),
}

#[derive(Debug)]
enum Incoming {
    Length(u64),
    Chunked(ChunkedDecoder),
    UntilClose,
}

/// A body on its way, with what is to be written before it.
#[derive(Debug)]
pub(super) struct Transfer {
    incoming: Incoming,
    chunked_out: bool,
    source_done: bool,
    /// What the sink has not taken yet, from `written` on.
    pending: Vec<u8>,
    written: usize,
    /// The sink did not take the last piece at once.
    slow_sink: bool,
    /// The sink has everything, and holds some of it back.
    flushing: bool,
    /// How much content may still come.
    allowance: u64,
    /// Whether bytes were read from the source: then the request cannot be told again.
    pub(super) has_read: bool,
    /// The source was reset, as a write to it was told. The system tells of a reset once: the end that is read afterwards
    /// looks like a clean one, and is none.
    pub(super) source_was_reset: bool,
    /// Bytes that moved since this was last taken.
    pub(super) moved: u64,
}

impl Transfer {
    /// A body framed `incoming` that goes out `chunked_out` or plain. `first` is written before everything else, and
    /// comes back from [`Transfer::into_buffer`].
    pub(super) fn new(incoming: Framing, chunked_out: bool, first: Vec<u8>) -> Self {
        let (incoming, source_done) = match incoming {
            Framing::None => (Incoming::Length(0), true),
            Framing::Length(length) => (Incoming::Length(length), length == 0),
            Framing::Chunked => (Incoming::Chunked(ChunkedDecoder::default()), false),
            Framing::UntilClose => (Incoming::UntilClose, false),
        };
        Transfer {
            incoming,
            chunked_out,
            source_done,
            pending: first,
            written: 0,
            slow_sink: false,
            flushing: false,
            allowance: u64::MAX,
            has_read: false,
            source_was_reset: false,
            moved: 0,
        }
    }

    /// The same for a body that may not have more bytes than this.
    pub(super) fn at_most(self, allowance: u64) -> Self {
        Transfer { allowance, ..self }
    }

    /// Takes what was already read with the head. Returns how many of the bytes belong to this body.
    pub(super) fn feed(&mut self, body: &[u8]) -> Result<usize, TransferError> {
        if self.source_done || body.is_empty() {
            return Ok(0);
        }
        let mut piece = vec![0; BEFORE + body.len() + BEHIND];
        piece[BEFORE..BEFORE + body.len()].copy_from_slice(body);
        let mut beyond = Vec::new();
        let (start, end) = self.take(&mut piece, (BEFORE, body.len()), &mut beyond)?;
        self.pending.extend_from_slice(&piece[start..end]);
        Ok(body.len() - beyond.len())
    }

    /// Takes `read` bytes that stand at `scratch[at..]`, where the head that they came with is not needed any more, and
    /// writes what the sink takes at once. Bytes behind the end of the body are appended to `beyond`.
    pub(super) fn begin<D: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut D,
        scratch: &mut [u8],
        (at, read): (usize, usize),
        beyond: &mut Vec<u8>,
    ) -> Result<(), TransferError> {
        if self.source_done || read == 0 {
            beyond.extend_from_slice(&scratch[at..at + read]);
            return Ok(());
        }
        match self.pass_on(cx, sink, scratch, (at, read), beyond) {
            Poll::Ready(Err(error)) => Err(error),
            // What was not written waits for the next poll.
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }

    /// Whether everything was read.
    pub(super) fn has_come(&self) -> bool {
        self.source_done
    }

    /// Whether everything was read and written.
    pub(super) fn is_done(&self) -> bool {
        self.source_done && self.written == self.pending.len()
    }

    /// Whether it is the sink that is waited for, and not the source.
    pub(super) fn waits_for_sink(&self) -> bool {
        self.flushing || self.is_pending()
    }

    fn is_pending(&self) -> bool {
        self.written < self.pending.len()
    }

    /// What is still to be read of a body that has a known length and is passed on as it comes.
    pub(super) fn length_left(&self) -> Option<u64> {
        match self.incoming {
            Incoming::Length(left) if left > 0 && !self.chunked_out => Some(left),
            _ => None,
        }
    }

    /// So much of the body was moved by other means.
    pub(super) fn skip(&mut self, length: u64) {
        if let Incoming::Length(left) = &mut self.incoming {
            *left -= length;
            self.source_done = *left == 0;
            self.has_read = true;
        }
    }

    /// Gives back the buffer that came with [`Transfer::new`].
    pub(super) fn into_buffer(mut self) -> Vec<u8> {
        self.pending.clear();
        self.pending
    }

    /// Moves what can be moved. Bytes of the source behind the end of the body are appended to `beyond`.
    pub(super) fn poll<S, D>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        sink: &mut D,
        scratch: &mut [u8],
        beyond: &mut Vec<u8>,
    ) -> Poll<Result<(), TransferError>>
    where
        S: AsyncRead + Unpin,
        D: AsyncWrite + Unpin,
    {
        let mut moved = 0;
        loop {
            ready!(self.write_pending(cx, sink))?;
            if self.source_done {
                return self.flush(cx, sink);
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let room = reading_room(scratch);
            let limit = self.read_limit(room.len());
            let mut buffer = ReadBuf::new(&mut room[..limit]);
            match Pin::new(&mut *source).poll_read(cx, &mut buffer) {
                Poll::Ready(read) => read.map_err(TransferError::Source)?,
                Poll::Pending => {
                    // A sink that encrypts may hold bytes back: nobody would ask for them before the source goes on.
                    ready!(self.flush(cx, sink))?;
                    return Poll::Pending;
                }
            }
            let read = buffer.filled().len();
            moved += read;
            self.has_read = true;
            ready!(self.pass_on(cx, sink, scratch, (BEFORE, read), beyond))?;
        }
    }

    fn flush<D: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, sink: &mut D) -> Poll<Result<(), TransferError>> {
        let flushed = Pin::new(sink).poll_flush(cx).map_err(TransferError::Sink);
        self.flushing = flushed.is_pending();
        flushed
    }

    /// Writes what the sink has not taken yet.
    pub(super) fn write_pending<D: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut D,
    ) -> Poll<Result<(), TransferError>> {
        while self.is_pending() {
            let written = ready!(Pin::new(&mut *sink).poll_write(cx, &self.pending[self.written..]));
            self.count(written)?;
        }
        if self.pending.capacity() > SLOW_READ {
            self.pending = Vec::new();
        }
        self.pending.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    /// Checks and frames `read` bytes at `scratch[at..]`, and writes them. `Pending` where some of it has to wait.
    fn pass_on<D: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut D,
        scratch: &mut [u8],
        (at, read): (usize, usize),
        beyond: &mut Vec<u8>,
    ) -> Poll<Result<(), TransferError>> {
        let (start, end) = self.take(scratch, (at, read), beyond)?;
        let mut piece = &scratch[start..end];
        self.slow_sink = false;
        if piece.len() <= COPIED && self.is_pending() {
            self.pending.extend_from_slice(piece);
            return self.write_pending(cx, sink);
        }
        while !piece.is_empty() {
            let waiting = &self.pending[self.written..];
            let polled = if waiting.is_empty() {
                Pin::new(&mut *sink).poll_write(cx, piece)
            } else {
                Pin::new(&mut *sink).poll_write_vectored(cx, &[IoSlice::new(waiting), IoSlice::new(piece)])
            };
            let Poll::Ready(written) = polled else {
                self.slow_sink = true;
                break;
            };
            self.count(written)?;
            if let Some(of_the_piece) = self.written.checked_sub(self.pending.len()) {
                piece = &piece[of_the_piece..];
                self.pending.clear();
                self.written = 0;
            }
        }
        self.pending.extend_from_slice(piece);
        if self.slow_sink { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    /// Counts what was written, of `pending` first.
    fn count(&mut self, written: io::Result<usize>) -> Result<(), TransferError> {
        let written = match written {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            other => other,
        };
        let written = written.map_err(TransferError::Sink)?;
        self.written += written;
        self.moved += written as u64;
        Ok(())
    }

    /// Never reads beyond a body of known length: what follows it stays in the socket.
    fn read_limit(&self, room: usize) -> usize {
        let room = if self.slow_sink { room.min(SLOW_READ) } else { room };
        match self.incoming {
            Incoming::Length(left) => usize::try_from(left).map_or(room, |left| left.min(room)),
            Incoming::Chunked(_) | Incoming::UntilClose => room,
        }
    }

    /// Takes the frame off `read` bytes at `piece[at..]` and puts ours around the content. Returns the range to write;
    /// what follows the end of the body is appended to `beyond`.
    fn take(
        &mut self,
        piece: &mut [u8],
        (at, read): (usize, usize),
        beyond: &mut Vec<u8>,
    ) -> Result<(usize, usize), TransferError> {
        let (content, consumed) = match &mut self.incoming {
            Incoming::UntilClose if read == 0 && self.source_was_reset => {
                return Err(TransferError::Source(io::ErrorKind::ConnectionReset.into()));
            }
            Incoming::UntilClose => {
                self.source_done = read == 0;
                (read, read)
            }
            _ if read == 0 => return Err(TransferError::Source(io::ErrorKind::UnexpectedEof.into())),
            Incoming::Length(left) => {
                let content = usize::try_from(*left).map_or(read, |left| left.min(read));
                *left -= content as u64;
                self.source_done = *left == 0;
                (content, content)
            }
            Incoming::Chunked(decoder) => {
                let decoded = decoder.decode_in_place(&mut piece[at..at + read]).map_err(TransferError::Frame)?;
                self.source_done = decoder.is_done();
                decoded
            }
        };
        self.allowance = self.allowance.checked_sub(content as u64).ok_or(TransferError::TooLong)?;
        // Taken out before our frame is put around the content: that may be longer than the rest of theirs was.
        beyond.extend_from_slice(&piece[at + consumed..at + read]);
        Ok(self.frame(piece, at, content))
    }

    /// Puts our frame around the content at `piece[at..]`. Returns the range to write.
    fn frame(&self, piece: &mut [u8], at: usize, content: usize) -> (usize, usize) {
        let (mut start, mut end) = (at, at + content);
        if self.chunked_out {
            if content > 0 {
                start -= put_chunk_size(&mut piece[..at], content);
                piece[end..end + 2].copy_from_slice(b"\r\n");
                end += 2;
            }
            if self.source_done {
                piece[end..end + 5].copy_from_slice(b"0\r\n\r\n");
                end += 5;
            }
        }
        (start, end)
    }
}

/// Writes the size and CR LF at the end of `room`; returns how many bytes that took.
fn put_chunk_size(room: &mut [u8], size: usize) -> usize {
    let mut at = room.len() - 2;
    room[at..].copy_from_slice(b"\r\n");
    let mut rest = size;
    while rest > 0 {
        at -= 1;
        room[at] = b"0123456789abcdef"[rest % 16];
        rest /= 16;
    }
    room.len() - at
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use super::*;

    /// Runs a transfer over memory; the source is cut into reads of `step` bytes by the size of the scratch buffer.
    fn run(
        incoming: Framing,
        chunked_out: bool,
        source: &[u8],
        step: usize,
    ) -> (Result<(), TransferError>, Vec<u8>, Vec<u8>) {
        let mut transfer = Transfer::new(incoming, chunked_out, b"HEAD ".to_vec());
        let (mut source, mut sink, mut beyond) = (source, Vec::new(), Vec::new());
        let mut scratch = vec![0; BEFORE + step + BEHIND];
        let mut cx = Context::from_waker(Waker::noop());
        match transfer.poll(&mut cx, &mut source, &mut sink, &mut scratch, &mut beyond) {
            Poll::Ready(result) => (result, sink, beyond),
            Poll::Pending => unreachable!("memory never waits"),
        }
    }

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_body_of_known_length_ends_where_it_ends_and_nothing_is_read_beyond() {
        for step in [1, 3, 100] {
            let (result, sink, beyond) = run(Framing::Length(5), false, b"helloGET /", step);
            assert!(result.is_ok() && beyond.is_empty());
            assert_eq!(text(&sink), "HEAD hello");
        }
    }

    #[test]
    fn a_chunked_body_is_written_anew_and_what_follows_it_is_kept() {
        let wire = b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nT: x\r\n\r\nGET /";
        let (result, sink, beyond) = run(Framing::Chunked, true, wire, 100);
        assert!(result.is_ok());
        assert_eq!((text(&sink), text(&beyond)), ("HEAD 5\r\nhello\r\n0\r\n\r\n", "GET /"));
        let (_, sink, _) = run(Framing::Chunked, false, wire, 1);
        assert_eq!(text(&sink), "HEAD hello");
    }

    #[test]
    fn a_long_body_gives_others_their_turn_and_goes_on_afterwards() {
        let body = vec![b'x'; 5 * TURN / 2];
        let mut transfer = Transfer::new(Framing::Length(body.len() as u64), false, Vec::new());
        let (mut source, mut sink, mut beyond) = (body.as_slice(), Vec::new(), Vec::new());
        let mut scratch = vec![0; BEFORE + TURN / 4 + BEHIND];
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        for turn in 1..=2 {
            assert!(transfer.poll(&mut cx, &mut source, &mut sink, &mut scratch, &mut beyond).is_pending());
            assert_eq!((sink.len(), woken.0.load(Ordering::Relaxed)), (turn * TURN, turn));
        }
        assert!(transfer.poll(&mut cx, &mut source, &mut sink, &mut scratch, &mut beyond).is_ready());
        assert_eq!(sink, body);
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_follows_a_chunked_body_is_kept_wherever_the_reads_are_cut() {
        let wire = b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\nGET / HTTP/1.1\r\n";
        for step in 1..wire.len() {
            let (result, _, beyond) = run(Framing::Chunked, true, wire, step);
            assert!(result.is_ok());
            // What the last read did not reach is still in the source.
            assert!(b"GET / HTTP/1.1\r\n".starts_with(&beyond), "reads of {step}: {}", text(&beyond));
        }
    }

    #[test]
    fn a_body_up_to_the_close_gets_an_end_of_its_own() {
        let (result, sink, _) = run(Framing::UntilClose, true, b"0123456789abcdefg", 100);
        assert!(result.is_ok());
        assert_eq!(text(&sink), "HEAD 11\r\n0123456789abcdefg\r\n0\r\n\r\n");
    }

    #[test]
    fn a_cut_body_is_a_failure_of_its_source_and_never_looks_complete() {
        for (framing, wire) in [(Framing::Length(9), &b"hello"[..]), (Framing::Chunked, b"9\r\nhello")] {
            let (result, sink, _) = run(framing, true, wire, 100);
            assert!(matches!(result, Err(TransferError::Source(_))));
            assert!(!text(&sink).ends_with("0\r\n\r\n"), "{}", text(&sink));
        }
    }

    #[test]
    fn what_came_with_the_head_is_part_of_the_body() {
        let mut transfer = Transfer::new(Framing::Length(5), false, b"HEAD ".to_vec());
        assert_eq!(transfer.feed(b"helloGET /").unwrap(), 5);
        assert!(transfer.source_done && !transfer.is_done());
        let mut chunked = Transfer::new(Framing::Chunked, true, Vec::new());
        assert_eq!(chunked.feed(b"1\r\na\r\n0\r\n\r\nGET /").unwrap(), 11);
        assert_eq!(text(&chunked.pending), "1\r\na\r\n0\r\n\r\n");
    }
}
