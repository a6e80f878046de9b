//! Screens a client's HTTP/2 frames, so that one malformed request does not end the others on its connection.
//!
//! A malformed request is a stream error (RFC 9113 section 8.1.1). h2, on which hyper is built, follows that for errors
//! in a decoded field; but an invalid name or value (an upper-case letter, a control byte, an unknown pseudo field) is
//! found in its decoder, and there every error ends the connection with all its requests: if the client is a CDN, those
//! of all its readers. h2 has no setting for that. So header blocks are decoded here first. A well-formed block is
//! passed on with every field as a literal, so that h2 needs no table. A malformed one is replaced by one that h2
//! treats as a malformed request, and so answers, counts and forgets like any other.
//!
//! The same holds for frames that RFC 9113 makes stream errors and h2 connection errors: WINDOW_UPDATE by 0 (section
//! 6.9) and PRIORITY of a wrong length (section 6.3). Undecodable input is passed on for h2 to end the connection: a
//! block that is not valid HPACK (RFC 7541 section 2.3.3), frames that are too long or out of order.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::hpack::{BadHeaderBlock, ReadBlock, Table};

/// The length of the preface, `PRI * HTTP/2.0` and so on (RFC 9113 section 3.4), in bytes.
const PREFACE: usize = 24;

/// The length of a frame's head, and the longest payload (the default of SETTINGS_MAX_FRAME_SIZE), in bytes.
const FRAME_HEAD: usize = 9;
/// Where the kind of a frame stands in its head.
const FRAME_KIND: usize = 3;
const MAX_FRAME: usize = 16 * 1024;

/// The longest header block, in bytes and in frames. h2 has its own limits, but gets only complete blocks.
const MAX_BLOCK: usize = 256 * 1024;
const MAX_BLOCK_FRAMES: usize = 64;

/// More frames of one block than h2 accepts, whatever the head limit: at most 1 MiB of them, and a quarter more.
const TOO_MANY_FRAMES: usize = 128;

/// Bytes read at once.
const READ: usize = 8 * 1024;

const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const HAS_PRIORITY: u8 = 0x20;

/// `connection: x` as a literal: a field that h2 treats as a malformed request.
const MALFORMED: &[u8] = b"\0\x0aconnection\x01x";

/// An index that no table has.
const UNREADABLE: &[u8] = &[0x80];

/// What has passed a screen. h2 says nothing of a request whose head it refuses, and neither does hyper; but it must have
/// opened a stream, and is not served.
#[derive(Debug, Default)]
pub(super) struct ScreenedStreams {
    /// Streams that were opened with a complete header block.
    pub(super) opened: Cell<u64>,
    /// Those whose header block had more fields than it may.
    pub(super) too_long: Cell<u64>,
    /// h2 has read all of it, and wants more.
    pub(super) is_read: Cell<bool>,
    /// The head of which a part has come, by how many came before it. Nothing else can follow on the connection until it is
    /// complete (RFC 9113 section 4.3).
    pub(super) unfinished: Cell<Option<u64>>,
}

/// The client's side of a connection, screened.
#[derive(Debug)]
pub(super) struct Screen<S> {
    inner: S,
    frames: Frames,
    /// Output for h2, from `taken` on.
    ready: Vec<u8>,
    taken: usize,
}

impl<S> Screen<S> {
    /// `max_list`: SETTINGS_MAX_HEADER_LIST_SIZE, in bytes.
    pub(super) fn new(inner: S, max_list: usize) -> Self {
        Screen { inner, frames: Frames::new(max_list), ready: Vec::new(), taken: 0 }
    }

    /// What has passed so far.
    pub(super) fn passed(&self) -> Rc<ScreenedStreams> {
        Rc::clone(&self.frames.passed)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Screen<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // h2 reads on until there is nothing more, so whoever comes here last has read all.
        this.frames.passed.is_read.set(this.taken == this.ready.len());
        while this.taken == this.ready.len() {
            // An idle connection holds no buffer.
            (this.ready, this.taken) = (Vec::new(), 0);
            let mut piece = [0; READ];
            let mut read = ReadBuf::new(&mut piece);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.frames.take(read.filled(), &mut this.ready);
            this.frames.passed.is_read.set(this.ready.is_empty());
            this.frames.passed.unfinished.set(this.frames.unfinished());
        }
        let length = buffer.remaining().min(this.ready.len() - this.taken);
        buffer.put_slice(&this.ready[this.taken..this.taken + length]);
        this.taken += length;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Screen<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// The parser of a client's frames.
#[derive(Debug)]
struct Frames {
    table: Table,
    max_list: usize,
    /// An incomplete frame.
    input: Vec<u8>,
    /// Bytes of the current frame that are passed on unchanged.
    pass: usize,
    /// An incomplete header block.
    block: Option<HeaderBlock>,
    /// The highest stream opened so far.
    highest: u32,
    /// h2 will end the connection for what it was given: all further input is passed on unchanged.
    blind: bool,
    /// Complete header blocks so far.
    blocks: u64,
    passed: Rc<ScreenedStreams>,
}

#[derive(Debug)]
struct HeaderBlock {
    stream: u32,
    /// It opens the stream: it is no trailers.
    opens: bool,
    end_stream: u8,
    /// The stream depends on itself.
    malformed: bool,
    bytes: Vec<u8>,
    frames: usize,
}

/// A frame's head.
#[derive(Clone, Copy)]
struct FrameHead {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl FrameHead {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, flags, d, e, f, g] = bytes.first_chunk::<FRAME_HEAD>()?;
        let stream = u32::from_be_bytes([d, e, f, g]) & 0x7fff_ffff;
        Some(FrameHead { length: u32::from_be_bytes([0, a, b, c]) as usize, kind, flags, stream })
    }
}

impl Frames {
    fn new(max_list: usize) -> Self {
        Frames {
            table: Table::new(),
            max_list,
            input: Vec::new(),
            pass: PREFACE,
            block: None,
            highest: 0,
            blind: false,
            blocks: 0,
            passed: Rc::default(),
        }
    }

    /// Takes input; the output is appended to `out`.
    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let kept = std::mem::take(&mut self.input);
        let joined;
        let mut rest = bytes;
        if !kept.is_empty() {
            joined = [&kept[..], bytes].concat();
            rest = &joined;
        }
        while !rest.is_empty() {
            if self.blind {
                return out.extend_from_slice(rest);
            }
            if self.pass > 0 {
                let (passed, behind) = rest.split_at(self.pass.min(rest.len()));
                out.extend_from_slice(passed);
                self.pass -= passed.len();
                rest = behind;
                continue;
            }
            match self.frame(rest, out) {
                Some(taken) => rest = &rest[taken..],
                None => return self.input = rest.to_vec(),
            }
        }
    }

    /// The header block that has begun, by how many were complete before it.
    fn unfinished(&self) -> Option<u64> {
        // Its first frame is taken when it is whole.
        let has_begun = self.block.is_some() || self.input.get(FRAME_KIND) == Some(&HEADERS);
        has_begun.then_some(self.blocks)
    }

    /// Handles the frame that begins here, or leaves it to be passed on. `None` if it needs more input.
    fn frame(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        let head = FrameHead::parse(bytes)?;
        let follows = self.block.as_ref().is_some_and(|block| head.kind == CONTINUATION && head.stream == block.stream);
        if head.length > MAX_FRAME || (self.block.is_some() && !follows) {
            if let Some(HeaderBlock { stream, end_stream, .. }) = self.block.take() {
                // h2 learns that a block has begun, and rejects the frame after it.
                put_head(out, 0, HEADERS, end_stream, stream);
            }
            self.blind = true;
            return Some(0);
        }
        let is_known = head.stream != 0 && head.stream <= self.highest;
        let is_looked_at = match head.kind {
            HEADERS => head.stream % 2 == 1,
            CONTINUATION => follows,
            WINDOW_UPDATE => is_known && head.length == 4,
            PRIORITY => head.stream != 0 && head.length != 5,
            _ => false,
        };
        if !is_looked_at {
            self.pass = FRAME_HEAD + head.length;
            return Some(0);
        }
        let whole = FRAME_HEAD + head.length;
        let payload = bytes.get(FRAME_HEAD..whole)?;
        match head.kind {
            HEADERS => self.begin_block(head, payload, out),
            CONTINUATION => self.continue_block(head, payload, out),
            WINDOW_UPDATE if payload.iter().any(|&byte| byte != 0) => out.extend_from_slice(&bytes[..whole]),
            // For a stream that is not open yet, this error could not be reported.
            PRIORITY if !is_known => {}
            _ => put_block(out, head.stream, 0, MALFORMED),
        }
        Some(whole)
    }

    fn begin_block(&mut self, head: FrameHead, payload: &[u8], out: &mut Vec<u8>) {
        let opens = head.stream > self.highest;
        self.highest = self.highest.max(head.stream);
        let Some((bytes, depends_on)) = fragment(head.flags, payload) else {
            // The padding exceeds the frame.
            put_block(out, head.stream, 0, UNREADABLE);
            self.blind = true;
            return;
        };
        let (end_stream, malformed) = (head.flags & END_STREAM, depends_on == Some(head.stream));
        let block = HeaderBlock { stream: head.stream, opens, end_stream, malformed, bytes: bytes.to_vec(), frames: 1 };
        self.end_block(head, block, out);
    }

    fn continue_block(&mut self, head: FrameHead, payload: &[u8], out: &mut Vec<u8>) {
        let Some(mut block) = self.block.take() else { return };
        block.bytes.extend_from_slice(payload);
        block.frames += 1;
        if block.bytes.len() > MAX_BLOCK || block.frames > MAX_BLOCK_FRAMES {
            // h2 has its own limit, and reports the error.
            put_head(out, 0, HEADERS, block.end_stream, block.stream);
            (0..TOO_MANY_FRAMES).for_each(|_| put_head(out, 0, CONTINUATION, 0, block.stream));
            self.blind = true;
            return;
        }
        self.end_block(head, block, out);
    }

    /// Passes a block on if this was its last frame.
    fn end_block(&mut self, head: FrameHead, block: HeaderBlock, out: &mut Vec<u8>) {
        if head.flags & END_HEADERS == 0 {
            self.block = Some(block);
            return;
        }
        self.blocks += 1;
        let mut fields = Vec::with_capacity(2 * block.bytes.len());
        let read = self.table.rewrite(&block.bytes, self.max_list, &mut fields);
        if block.opens {
            let count = |counter: &Cell<u64>, by: bool| counter.set(counter.get() + u64::from(by));
            count(&self.passed.opened, true);
            count(&self.passed.too_long, read == Ok(ReadBlock::TooLong));
        }
        let block_or_error = match read {
            Ok(ReadBlock::WellFormed | ReadBlock::TooLong) if !block.malformed => &fields[..],
            Ok(_) => MALFORMED,
            Err(BadHeaderBlock) => {
                self.blind = true;
                UNREADABLE
            }
        };
        put_block(out, block.stream, block.end_stream, block_or_error);
    }
}

/// The part of a HEADERS frame that belongs to the block, and the stream that it depends on. `None` if the padding
/// exceeds the frame.
fn fragment(flags: u8, mut payload: &[u8]) -> Option<(&[u8], Option<u32>)> {
    let mut padding = 0;
    if flags & PADDED != 0 {
        let (&length, rest) = payload.split_first()?;
        (padding, payload) = (usize::from(length), rest);
    }
    let mut depends_on = None;
    if flags & HAS_PRIORITY != 0 {
        let (priority, rest) = payload.split_first_chunk::<5>()?;
        let &[a, b, c, d, _weight] = priority;
        depends_on = Some(u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff);
        payload = rest;
    }
    Some((&payload[..payload.len().checked_sub(padding)?], depends_on))
}

/// Writes a header block in as many frames as it needs.
fn put_block(out: &mut Vec<u8>, stream: u32, end_stream: u8, block: &[u8]) {
    let first = &block[..block.len().min(MAX_FRAME)];
    let mut rest = &block[first.len()..];
    let end = |rest: &[u8]| if rest.is_empty() { END_HEADERS } else { 0 };
    put_head(out, first.len(), HEADERS, end_stream | end(rest), stream);
    out.extend_from_slice(first);
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(rest.len().min(MAX_FRAME));
        rest = behind;
        put_head(out, piece.len(), CONTINUATION, end(rest), stream);
        out.extend_from_slice(piece);
    }
}

fn put_head(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    out.extend_from_slice(&(length as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_unfinished_from_its_first_byte_to_its_last() {
        let mut wire = vec![b' '; PREFACE];
        let block = [0x82, 0x87, 0x84];
        put_head(&mut wire, block.len(), HEADERS, END_STREAM, 1);
        wire.extend_from_slice(&block);
        let first = wire.len();
        put_head(&mut wire, 0, CONTINUATION, END_HEADERS, 1);
        let continued = wire.len();
        // Frames of other kinds are not heads, whole or not.
        put_head(&mut wire, 4, WINDOW_UPDATE, 0, 0);
        wire.extend_from_slice(&[0, 0, 0, 1]);
        let updated = wire.len();
        put_head(&mut wire, block.len(), HEADERS, END_STREAM | END_HEADERS, 3);
        wire.extend_from_slice(&block);
        let mut frames = Frames::new(4096);
        let mut out = Vec::new();
        for (at, byte) in wire.iter().enumerate() {
            frames.take(&[*byte], &mut out);
            // How much there is now, and from where the kind of a frame is known.
            let len = at + 1;
            let expected = match len {
                len if len > PREFACE + FRAME_KIND && len < continued => Some(0),
                len if len > updated + FRAME_KIND && len < wire.len() => Some(1),
                _ => None,
            };
            assert_eq!(frames.unfinished(), expected, "{len} bytes, of {first} and {continued} and {updated}");
        }
    }
}
