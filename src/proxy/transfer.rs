//! One direction of a body: read, check its frame, write it anew, never faster than the slower side.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::http1::{BadChunk, ChunkedDecoder, Framing};

/// Room before the content for a chunk size (16 hexadecimal digits and CR LF), and behind it for the end of a chunk
/// and of the body.
const BEFORE: usize = 18;
const BEHIND: usize = 7;

/// The most that one body moves before the other direction, and the worker's other connections, have their turn. Where
/// both sides are always ready, it would otherwise go on until tokio calls a halt: with reads of 256 KiB, after 16 MiB.
const TURN: usize = 1024 * 1024;

/// Why a transfer failed, by side.
#[derive(Debug)]
pub(super) enum TransferError {
    /// The source broke off or failed.
    Source(io::Error),
    /// The source sent a malformed frame.
    Frame(BadChunk),
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
    pending: Vec<u8>,
    written: usize,
    /// Whether bytes were read from the source: then the request cannot be told again.
    pub(super) has_read: bool,
    /// Whether anything moved since this was last set to false.
    pub(super) moved: bool,
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
        Transfer { incoming, chunked_out, source_done, pending: first, written: 0, has_read: false, moved: false }
    }

    /// Takes what was already read with the head. Returns how many of the bytes belong to this body.
    pub(super) fn feed(&mut self, body: &[u8]) -> Result<usize, TransferError> {
        if self.source_done || body.is_empty() {
            return Ok(0);
        }
        let limit = self.read_limit(body.len());
        if let (Incoming::Length(left), false) = (&mut self.incoming, self.chunked_out) {
            *left -= limit as u64;
            self.source_done = *left == 0;
            self.pending.extend_from_slice(&body[..limit]);
            return Ok(limit);
        }
        let mut piece = vec![0; BEFORE + limit + BEHIND];
        piece[BEFORE..BEFORE + limit].copy_from_slice(&body[..limit]);
        let (content, consumed) = self.unframe(&mut piece, limit)?;
        let (start, end) = self.frame(&mut piece, content);
        self.pending.extend_from_slice(&piece[start..end]);
        Ok(consumed)
    }

    /// Whether everything was read and written.
    pub(super) fn is_done(&self) -> bool {
        self.source_done && self.written == self.pending.len()
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
            while self.written < self.pending.len() {
                self.written += ready!(write_some(cx, sink, &self.pending[self.written..]))?;
                self.moved = true;
            }
            self.pending.clear();
            self.written = 0;
            if self.source_done {
                return Poll::Ready(Ok(()));
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let limit = self.read_limit(scratch.len() - BEFORE - BEHIND);
            let mut buffer = ReadBuf::new(&mut scratch[BEFORE..BEFORE + limit]);
            ready!(Pin::new(&mut *source).poll_read(cx, &mut buffer)).map_err(TransferError::Source)?;
            let read = buffer.filled().len();
            moved += read;
            self.moved = true;
            self.has_read = true;
            let (content, consumed) = self.unframe(scratch, read)?;
            // Taken out before our frame is put around the content: that may be longer than the rest of theirs was.
            beyond.extend_from_slice(&scratch[BEFORE + consumed..BEFORE + read]);
            let (mut start, end) = self.frame(scratch, content);
            while start < end {
                match write_some(cx, sink, &scratch[start..end]) {
                    Poll::Ready(written) => start += written?,
                    Poll::Pending => {
                        self.pending.extend_from_slice(&scratch[start..end]);
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    /// Never reads beyond a body of known length: what follows it stays in the socket.
    fn read_limit(&self, room: usize) -> usize {
        match self.incoming {
            Incoming::Length(left) => usize::try_from(left).map_or(room, |left| left.min(room)),
            Incoming::Chunked(_) | Incoming::UntilClose => room,
        }
    }

    /// Takes the frame off `read` bytes at `piece[BEFORE..]`. Returns how many bytes of content are there now, and how
    /// many of the bytes belonged to the body.
    fn unframe(&mut self, piece: &mut [u8], read: usize) -> Result<(usize, usize), TransferError> {
        Ok(match &mut self.incoming {
            Incoming::UntilClose => {
                self.source_done = read == 0;
                (read, read)
            }
            _ if read == 0 => return Err(TransferError::Source(io::ErrorKind::UnexpectedEof.into())),
            Incoming::Length(left) => {
                *left -= read as u64;
                self.source_done = *left == 0;
                (read, read)
            }
            Incoming::Chunked(decoder) => {
                let piece = &mut piece[BEFORE..BEFORE + read];
                let decoded = decoder.decode_in_place(piece).map_err(TransferError::Frame)?;
                self.source_done = decoder.is_done();
                decoded
            }
        })
    }

    /// Puts our frame around the content at `piece[BEFORE..]`. Returns the range to write.
    fn frame(&self, piece: &mut [u8], content: usize) -> (usize, usize) {
        let (mut start, mut end) = (BEFORE, BEFORE + content);
        if self.chunked_out {
            if content > 0 {
                start -= put_chunk_size(&mut piece[..BEFORE], content);
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

fn write_some<D: AsyncWrite + Unpin>(
    cx: &mut Context<'_>,
    sink: &mut D,
    bytes: &[u8],
) -> Poll<Result<usize, TransferError>> {
    let written = match ready!(Pin::new(sink).poll_write(cx, bytes)) {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        other => other,
    };
    Poll::Ready(written.map_err(TransferError::Sink))
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
