//! One direction of a body: read, check the framing, write it with our framing, at the pace of the slower side.
//!
//! The bytes stay where they were read, in the worker's scratch buffer, and are written from there: our framing is put
//! around them in place. Only bytes that the sink does not take at once are copied. A head before the body leaves in
//! the same write.

use std::io::{self, IoSlice};
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::http1::{BadChunk, ChunkedDecoder, Framing};

/// Room before the content for a chunk size (16 hexadecimal digits and CR LF), and after it for the end of a chunk and
/// of the body.
pub(super) const BEFORE: usize = 18;
const BEHIND: usize = 7;

/// The most that one body moves before the other direction and the worker's other connections get their turn. If both
/// sides are always ready, it would otherwise continue until tokio's budget ends it: after 16 MiB with reads of 256
/// KiB.
pub(super) const TURN: usize = 1024 * 1024;

/// Bytes read at once for a sink that is slower than its source, which bounds what it can make us buffer.
const SLOW_READ: usize = 64 * 1024;

/// A piece up to this length is copied behind the pending bytes, and not written beside them: gathering two pieces
/// costs the kernel more than copying so few bytes.
const COPIED: usize = 8 * 1024;

/// The part of the scratch buffer to read into, so that a frame can be put around the bytes in place.
pub(super) fn reading_room(scratch: &mut [u8]) -> &mut [u8] {
    let end = scratch.len() - BEHIND;
    &mut scratch[BEFORE..end]
}

/// Why a transfer failed, by side.
#[derive(Debug)]
pub(super) enum TransferError {
    /// The source aborted or failed.
    Source(io::Error),
    /// The framing from the source is malformed.
    Frame(BadChunk),
    /// The source exceeded its limit.
    TooLong,
    /// The sink failed.
    Sink(io::Error),
}

/// The remaining input.
#[derive(Debug)]
enum Unread {
    /// This many bytes.
    Length(u64),
    Chunked(ChunkedDecoder),
    /// Everything up to the end of the connection.
    UntilClose,
    /// The same after a write to the connection reported a reset: a clean end of its input is not trusted. (The kernel
    /// reports a reset once.)
    UntilReset,
    Nothing,
}

/// How the content is framed for the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    AsItIs,
    Chunked,
}

/// How fast the sink takes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SinkPace {
    /// It took the last piece at once.
    Prompt,
    /// It did not take the last piece at once.
    Slow,
    /// It has everything, but buffers some of it.
    Flushing,
}

/// A body being copied, preceded by `first`.
#[derive(Debug)]
pub(super) struct Transfer {
    incoming: Unread,
    outgoing: Outgoing,
    /// Bytes that the sink has not taken yet, from `written` on.
    pending: Vec<u8>,
    written: usize,
    pace: SinkPace,
    /// The most content that may still come, in bytes.
    allowance: u64,
    has_read: bool,
    /// Bytes written since this was last taken.
    moved: u64,
}

impl Transfer {
    /// A body with the framing `incoming` that is written as `outgoing`. `first` is written before everything else; its
    /// buffer is returned by [`Transfer::take_buffer`].
    pub(super) fn new(incoming: Framing, outgoing: Outgoing, first: Vec<u8>) -> Self {
        let incoming = match incoming {
            Framing::None | Framing::Length(0) => Unread::Nothing,
            Framing::Length(length) => Unread::Length(length),
            Framing::Chunked => Unread::Chunked(ChunkedDecoder::default()),
            Framing::UntilClose => Unread::UntilClose,
        };
        Transfer {
            incoming,
            outgoing,
            pending: first,
            written: 0,
            pace: SinkPace::Prompt,
            allowance: u64::MAX,
            has_read: false,
            moved: 0,
        }
    }

    /// Limits the content to `allowance` bytes.
    pub(super) fn at_most(self, allowance: u64) -> Self {
        Transfer { allowance, ..self }
    }

    /// How much content may still come, in bytes.
    pub(super) fn allowance_left(&self) -> u64 {
        self.allowance
    }

    /// Takes bytes that were read along with the head. Returns how many belong to this body.
    pub(super) fn feed(&mut self, body: &[u8]) -> Result<usize, TransferError> {
        if self.has_come() || body.is_empty() {
            return Ok(0);
        }
        let mut piece = vec![0; BEFORE + body.len() + BEHIND];
        piece[BEFORE..BEFORE + body.len()].copy_from_slice(body);
        let mut beyond = Vec::new();
        let (start, end) = self.take(&mut piece, (BEFORE, body.len()), &mut beyond)?;
        self.pending.extend_from_slice(&piece[start..end]);
        Ok(body.len() - beyond.len())
    }

    /// Takes the `read` bytes at `scratch[at..]`, whose head may be overwritten now, and writes what the sink takes at
    /// once. Bytes after the end of the body are appended to `beyond`.
    pub(super) fn begin<D: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut D,
        scratch: &mut [u8],
        (at, read): (usize, usize),
        beyond: &mut Vec<u8>,
    ) -> Result<(), TransferError> {
        if self.has_come() || read == 0 {
            beyond.extend_from_slice(&scratch[at..at + read]);
            return Ok(());
        }
        match self.pass_on(cx, sink, scratch, (at, read), beyond) {
            Poll::Ready(Err(error)) => Err(error),
            // Bytes not written wait for the next poll.
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }

    /// Whether the body was read completely.
    pub(super) fn has_come(&self) -> bool {
        matches!(self.incoming, Unread::Nothing)
    }

    /// Whether bytes were read from the source, beyond those that it was fed.
    pub(super) fn has_read(&self) -> bool {
        self.has_read
    }

    /// Bytes written since the last call, including `first`.
    pub(super) fn take_moved(&mut self) -> u64 {
        mem::take(&mut self.moved)
    }

    /// Whether bytes were written since the last [`Transfer::take_moved`].
    pub(super) fn has_moved(&self) -> bool {
        self.moved > 0
    }

    /// Records a reset of the source: from now on a body that ends with its connection has no clean end.
    pub(super) fn source_was_reset(&mut self) {
        if let Unread::UntilClose = self.incoming {
            self.incoming = Unread::UntilReset;
        }
    }

    /// Whether the body was read and written completely.
    pub(super) fn is_done(&self) -> bool {
        self.has_come() && !self.is_pending()
    }

    /// Whether the transfer waits for the sink, not for the source.
    pub(super) fn waits_for_sink(&self) -> bool {
        self.pace == SinkPace::Flushing || self.is_pending()
    }

    fn is_pending(&self) -> bool {
        self.written < self.pending.len()
    }

    /// Whether the source has announced the length of the body, and owes more of it.
    pub(super) fn has_known_length(&self) -> bool {
        matches!(self.incoming, Unread::Length(_))
    }

    /// The remaining input of a body of known length that is relayed unchanged.
    pub(super) fn length_left(&self) -> Option<u64> {
        match self.incoming {
            Unread::Length(left) if self.outgoing == Outgoing::AsItIs => Some(left),
            _ => None,
        }
    }

    /// Records that `length` bytes of a body of known length were read by splice.
    pub(super) fn record_read(&mut self, length: u64) {
        if let Unread::Length(left) = &mut self.incoming {
            *left -= length;
            if *left == 0 {
                self.incoming = Unread::Nothing;
            }
            self.has_read = true;
        }
    }

    /// Records that `length` bytes were written by splice.
    pub(super) fn record_written(&mut self, length: u64) {
        self.moved += length;
    }

    /// Returns the buffer passed to [`Transfer::new`].
    pub(super) fn take_buffer(&mut self) -> Vec<u8> {
        self.pending.clear();
        mem::take(&mut self.pending)
    }

    /// Copies what can be copied now. Bytes of the source after the end of the body are appended to `beyond`.
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
            if self.has_come() {
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
                    // An encrypting sink may buffer bytes, which must leave before the source is awaited.
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
        match self.pace {
            _ if flushed.is_pending() => self.pace = SinkPace::Flushing,
            SinkPace::Flushing => self.pace = SinkPace::Slow,
            SinkPace::Prompt | SinkPace::Slow => {}
        }
        flushed
    }

    /// Writes the pending bytes.
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

    /// Checks and frames `read` bytes at `scratch[at..]`, and writes them. `Pending` if some of them have to wait.
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
        self.pace = SinkPace::Prompt;
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
                self.pace = SinkPace::Slow;
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
        if self.pace == SinkPace::Slow { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    /// Counts written bytes, those of `pending` first.
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

    /// Never reads beyond a body of known length: the bytes after it stay in the socket.
    fn read_limit(&self, room: usize) -> usize {
        let room = if self.pace == SinkPace::Prompt { room } else { room.min(SLOW_READ) };
        match self.incoming {
            Unread::Length(left) => usize::try_from(left).map_or(room, |left| left.min(room)),
            Unread::Chunked(_) | Unread::UntilClose | Unread::UntilReset | Unread::Nothing => room,
        }
    }

    /// Removes the source's framing from `read` bytes at `piece[at..]` and puts ours around the content. Returns the
    /// range to write; bytes after the end of the body are appended to `beyond`.
    fn take(
        &mut self,
        piece: &mut [u8],
        (at, read): (usize, usize),
        beyond: &mut Vec<u8>,
    ) -> Result<(usize, usize), TransferError> {
        let (content, consumed) = match &mut self.incoming {
            Unread::Nothing => (0, 0),
            Unread::UntilReset if read == 0 => {
                return Err(TransferError::Source(io::ErrorKind::ConnectionReset.into()));
            }
            Unread::UntilClose if read == 0 => {
                self.incoming = Unread::Nothing;
                (0, 0)
            }
            Unread::UntilClose | Unread::UntilReset => (read, read),
            _ if read == 0 => return Err(TransferError::Source(io::ErrorKind::UnexpectedEof.into())),
            Unread::Length(left) => {
                let content = usize::try_from(*left).map_or(read, |left| left.min(read));
                *left -= content as u64;
                if *left == 0 {
                    self.incoming = Unread::Nothing;
                }
                (content, content)
            }
            Unread::Chunked(decoder) => {
                let decoded = decoder.decode_in_place(&mut piece[at..at + read]).map_err(TransferError::Frame)?;
                if decoder.is_done() {
                    self.incoming = Unread::Nothing;
                }
                decoded
            }
        };
        self.allowance = self.allowance.checked_sub(content as u64).ok_or(TransferError::TooLong)?;
        // Copied before our framing is put around the content, which may be longer than the source's.
        beyond.extend_from_slice(&piece[at + consumed..at + read]);
        Ok(self.frame(piece, at, content))
    }

    /// Puts our framing around the content at `piece[at..]`. Returns the range to write.
    fn frame(&self, piece: &mut [u8], at: usize, content: usize) -> (usize, usize) {
        let (mut start, mut end) = (at, at + content);
        if self.outgoing == Outgoing::Chunked {
            if content > 0 {
                start -= put_chunk_size(&mut piece[..at], content);
                piece[end..end + 2].copy_from_slice(b"\r\n");
                end += 2;
            }
            if self.has_come() {
                piece[end..end + 5].copy_from_slice(b"0\r\n\r\n");
                end += 5;
            }
        }
        (start, end)
    }
}

/// Writes the size and CR LF at the end of `room`; returns their length.
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

    /// Runs a transfer over memory; a scratch buffer of matching size cuts the source into reads of `step` bytes.
    fn run(
        incoming: Framing,
        outgoing: Outgoing,
        source: &[u8],
        step: usize,
    ) -> (Result<(), TransferError>, Vec<u8>, Vec<u8>) {
        let mut transfer = Transfer::new(incoming, outgoing, b"HEAD ".to_vec());
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
            let (result, sink, beyond) = run(Framing::Length(5), Outgoing::AsItIs, b"helloGET /", step);
            assert!(result.is_ok() && beyond.is_empty());
            assert_eq!(text(&sink), "HEAD hello");
        }
    }

    #[test]
    fn a_chunked_body_is_written_anew_and_what_follows_it_is_kept() {
        let wire = b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nT: x\r\n\r\nGET /";
        let (result, sink, beyond) = run(Framing::Chunked, Outgoing::Chunked, wire, 100);
        assert!(result.is_ok());
        assert_eq!((text(&sink), text(&beyond)), ("HEAD 5\r\nhello\r\n0\r\n\r\n", "GET /"));
        let (_, sink, _) = run(Framing::Chunked, Outgoing::AsItIs, wire, 1);
        assert_eq!(text(&sink), "HEAD hello");
    }

    #[test]
    fn a_long_body_gives_others_their_turn_and_goes_on_afterwards() {
        let body = vec![b'x'; 5 * TURN / 2];
        let mut transfer = Transfer::new(Framing::Length(body.len() as u64), Outgoing::AsItIs, Vec::new());
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
            let (result, _, beyond) = run(Framing::Chunked, Outgoing::Chunked, wire, step);
            assert!(result.is_ok());
            // Bytes that the last read did not reach are still in the source.
            assert!(b"GET / HTTP/1.1\r\n".starts_with(&beyond), "reads of {step}: {}", text(&beyond));
        }
    }

    #[test]
    fn a_body_up_to_the_close_gets_an_end_of_its_own() {
        let (result, sink, _) = run(Framing::UntilClose, Outgoing::Chunked, b"0123456789abcdefg", 100);
        assert!(result.is_ok());
        assert_eq!(text(&sink), "HEAD 11\r\n0123456789abcdefg\r\n0\r\n\r\n");
    }

    #[test]
    fn a_cut_body_is_a_failure_of_its_source_and_never_looks_complete() {
        for (framing, wire) in [(Framing::Length(9), &b"hello"[..]), (Framing::Chunked, b"9\r\nhello")] {
            let (result, sink, _) = run(framing, Outgoing::Chunked, wire, 100);
            assert!(matches!(result, Err(TransferError::Source(_))));
            assert!(!text(&sink).ends_with("0\r\n\r\n"), "{}", text(&sink));
        }
    }

    #[test]
    fn what_came_with_the_head_is_part_of_the_body() {
        let mut transfer = Transfer::new(Framing::Length(5), Outgoing::AsItIs, b"HEAD ".to_vec());
        assert_eq!(transfer.feed(b"helloGET /").unwrap(), 5);
        assert!(transfer.has_come() && !transfer.is_done());
        let mut chunked = Transfer::new(Framing::Chunked, Outgoing::Chunked, Vec::new());
        assert_eq!(chunked.feed(b"1\r\na\r\n0\r\n\r\nGET /").unwrap(), 11);
        assert_eq!(text(&chunked.pending), "1\r\na\r\n0\r\n\r\n");
    }
}
