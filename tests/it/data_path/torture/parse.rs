//! A strict parser for clearcoat's output. It accepts only the canonical form, and shares no code with the product,
//! since a shared mistake would go unnoticed.

mod body;
mod head;

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::pace::Pace;
use crate::support::PATIENCE;
pub use body::BodyCheck;
pub use head::Head;

/// The longest head before it counts as endless, in bytes.
const LONGEST_HEAD: usize = 128 * 1024;

/// The largest read, in bytes.
pub const LONGEST_READ: usize = 64 * 1024;

/// How a peer ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Clean,
    Reset,
}

/// Why a message could not be read completely.
#[derive(Debug)]
pub enum Trouble {
    /// The peer ended the connection.
    Ended(Ending),
    /// The reader has read as much as planned, and leaves.
    Left,
    /// The peer's bytes are invalid, or nothing arrives.
    Wrong(String),
}

/// The receiving half of a connection, with its unparsed bytes.
pub struct Incoming<R> {
    source: R,
    pace: Pace,
    scratch: Vec<u8>,
    buffer: Vec<u8>,
    /// The start of the unparsed bytes in `buffer`.
    start: usize,
    /// How many bytes are still read before the reader leaves.
    pub allowance: Option<usize>,
    /// Whether writing to this peer has failed. The kernel reports a reset only once: if the write reported it, the
    /// read sees what looks like a clean end.
    pub write_failed: Rc<Cell<bool>>,
}

impl<R: AsyncRead + Unpin> Incoming<R> {
    pub fn new(source: R, pace: Pace) -> Self {
        let (scratch, buffer) = (vec![0; LONGEST_READ], Vec::new());
        Incoming { source, pace, scratch, buffer, start: 0, allowance: None, write_failed: Rc::default() }
    }

    /// The bytes already read.
    pub fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    /// Switches to another message's pace.
    pub fn set_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Waits for the first byte of a message, without a time limit.
    pub async fn begin(&mut self) -> Result<(), Trouble> {
        if self.buffered().is_empty() { self.fill_within(Duration::MAX).await } else { Ok(()) }
    }

    async fn fill(&mut self) -> Result<(), Trouble> {
        self.fill_within(PATIENCE).await
    }

    async fn fill_within(&mut self, patience: Duration) -> Result<(), Trouble> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let allowance = self.allowance.unwrap_or(usize::MAX);
        if allowance == 0 {
            return Err(Trouble::Left);
        }
        self.pace.pause().await;
        let size = self.pace.piece(LONGEST_READ).min(allowance);
        let read = tokio::time::timeout(patience, self.source.read(&mut self.scratch[..size])).await;
        match read {
            Err(_elapsed) => Err(Trouble::Wrong(format!("nothing came for {patience:?}"))),
            Ok(Ok(0)) if self.write_failed.get() => Err(Trouble::Ended(Ending::Reset)),
            Ok(Ok(0)) => Err(Trouble::Ended(Ending::Clean)),
            Ok(Ok(read)) => {
                self.buffer.extend_from_slice(&self.scratch[..read]);
                self.allowance = self.allowance.map(|allowance| allowance - read);
                Ok(())
            }
            Ok(Err(error)) if is_reset(&error) => Err(Trouble::Ended(Ending::Reset)),
            Ok(Err(error)) => Err(Trouble::Wrong(format!("reading fails: {error}"))),
        }
    }

    /// The next bytes, at least one and at most `limit`.
    pub async fn some(&mut self, limit: usize) -> Result<&[u8], Trouble> {
        if self.buffered().is_empty() {
            self.fill().await?;
        }
        let end = self.buffer.len().min(self.start.saturating_add(limit));
        let piece = &self.buffer[self.start..end];
        self.start = end;
        Ok(piece)
    }

    /// The bytes up to this mark, which is consumed but not returned.
    async fn until(&mut self, mark: &[u8]) -> Result<Vec<u8>, Trouble> {
        loop {
            if let Some(at) = memchr::memmem::find(self.buffered(), mark) {
                let before = self.buffered()[..at].to_vec();
                self.start += at + mark.len();
                return Ok(before);
            }
            if self.buffered().len() > LONGEST_HEAD {
                return Err(Trouble::Wrong(format!("no {} in {LONGEST_HEAD} bytes", mark.escape_ascii())));
            }
            self.fill().await?;
        }
    }

    /// Reads exactly these bytes.
    async fn exactly(&mut self, expected: &[u8]) -> Result<(), Trouble> {
        while self.buffered().len() < expected.len() {
            self.fill().await?;
        }
        let came = &self.buffered()[..expected.len()];
        if came != expected {
            let (came, expected) = (came.escape_ascii(), expected.escape_ascii());
            return Err(Trouble::Wrong(format!("{came} came instead of {expected}")));
        }
        self.start += expected.len();
        Ok(())
    }

    pub async fn head(&mut self) -> Result<Head, Trouble> {
        let bytes = self.until(b"\r\n\r\n").await?;
        Head::parse(&bytes).map_err(|what| Trouble::Wrong(format!("{what}: {}", shown(&bytes))))
    }
}

pub fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// The first bytes, for an error message.
pub fn shown(bytes: &[u8]) -> String {
    let (start, more) = (&bytes[..bytes.len().min(400)], if bytes.len() > 400 { "..." } else { "" });
    format!("\"{}{more}\" ({} B)", start.escape_ascii(), bytes.len())
}

/// A number in canonical form: lower case, no leading zero, no sign.
fn canonical(digits: &[u8], radix: u32) -> Result<usize, String> {
    let text = String::from_utf8_lossy(digits);
    let number = usize::from_str_radix(&text, radix).map_err(|_| format!("{text:?} is not a number"))?;
    let again = if radix == 16 { format!("{number:x}") } else { number.to_string() };
    if again == text { Ok(number) } else { Err(format!("the number {text:?} is not in canonical form")) }
}

#[cfg(test)]
mod tests {
    use super::super::message::Framing;
    use super::*;

    fn on<T>(bytes: &[u8], test: impl AsyncFnOnce(&mut Incoming<&[u8]>) -> T) -> T {
        let mut incoming = Incoming::new(bytes, Pace::at_once());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(test(&mut incoming))
    }

    fn body(framing: Framing, bytes: &[u8], expected: &[u8]) -> Result<bool, Trouble> {
        on(bytes, async |incoming| BodyCheck::new(framing, expected).advance(incoming, usize::MAX).await)
    }

    #[test]
    fn a_canonical_body_passes_and_any_other_content_does_not() {
        let all = [
            (Framing::Length(5), &b"hello"[..]),
            (Framing::Chunked, b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
            (Framing::UntilClose, b"hello"),
        ];
        for (framing, bytes) in all {
            assert!(matches!(body(framing, bytes, b"hello"), Ok(true)), "{framing:?}");
            for other in [&b"hellO"[..], b"hell", b"hello!"] {
                assert!(matches!(body(framing, bytes, other), Err(Trouble::Wrong(_))), "{framing:?}");
            }
        }
    }

    #[test]
    fn a_body_that_breaks_off_is_not_complete() {
        let end = Ending::Clean;
        for bytes in
            ["", "5", "5\r\nhel", "5\r\nhello", "5\r\nhello\r\n", "5\r\nhello\r\n0\r\n", "5\r\nhello\r\n0\r\n\r"]
        {
            let result = body(Framing::Chunked, bytes.as_bytes(), b"hello");
            assert!(matches!(result, Err(Trouble::Ended(ending)) if ending == end), "{bytes}");
        }
        assert!(matches!(body(Framing::Length(5), b"hell", b"hello"), Err(Trouble::Ended(_))));
    }

    #[test]
    fn a_frame_that_is_not_canonical_is_wrong() {
        for bytes in
            ["05\r\nhello\r\n0\r\n\r\n", "5;a\r\nhello\r\n0\r\n\r\n", "5\r\nhello0\r\n\r\n", "+5\r\nhello\r\n0\r\n\r\n"]
        {
            assert!(matches!(body(Framing::Chunked, bytes.as_bytes(), b"hello"), Err(Trouble::Wrong(_))), "{bytes}");
        }
        assert!(matches!(
            body(Framing::Chunked, b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
            Err(Trouble::Wrong(_))
        ));
        assert!(matches!(body(Framing::Chunked, b"0\r\nT: x\r\n\r\n", b""), Err(Trouble::Wrong(_))));
    }

    #[test]
    fn a_head_that_is_not_canonical_is_wrong() {
        let head = |bytes: &str| on(bytes.as_bytes(), async |incoming| incoming.head().await);
        assert_eq!(head("GET / HTTP/1.1\r\nA: \r\nB: c d\r\n\r\n").unwrap().fields.len(), 2);
        for line in ["A:b", "A:  b", "A: b ", "A : b", ": b", "A", "A: b\rc", "A: b\nC: d", "A: b\0", " A: b"] {
            assert!(matches!(head(&format!("GET / HTTP/1.1\r\n{line}\r\n\r\n")), Err(Trouble::Wrong(_))), "{line:?}");
        }
        for framing in [
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            "Content-Length: 01",
            "Content-Length: 1\r\ncontent-length: 1",
            "Transfer-Encoding: gzip",
        ] {
            assert!(head(&format!("GET / HTTP/1.1\r\n{framing}\r\n\r\n")).unwrap().framing().is_err(), "{framing}");
        }
    }
}
