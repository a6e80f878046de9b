//! Finding the end of a head that arrives in pieces.
//!
//! Nearly every head arrives whole, and then its end is where the parser stops: reading it first with a scan for the blank
//! line would cost as much as half of the parser. So [`RequestHead::read`](super::RequestHead::read) and
//! [`ResponseHead::read`](super::ResponseHead::read) parse first what looks whole, and scan only what turns out not to be,
//! or not to be good: an answer to bad input comes from one place.

use super::BadHead;

/// What a head may have at most.
#[derive(Clone, Copy, Debug)]
pub struct HeadLimits {
    /// Its length with the blank line, in bytes.
    pub bytes: usize,
    /// Its header fields, 256 at most.
    pub fields: usize,
}

/// Searches for the blank line, and refuses line ends that are not CR LF on the way: parsers disagree about a bare LF,
/// and request smuggling exploits that disagreement. Remembers its position, so that a head that arrives byte by byte is
/// scanned once.
#[derive(Debug, Default)]
pub struct HeadScan {
    scanned: usize,
}

/// How a line ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LineEnd {
    /// With CR LF.
    Line,
    /// With CR LF behind that of another line: it is blank.
    Head,
    /// With LF alone.
    Bare,
}

impl HeadScan {
    /// Whether nothing was scanned yet.
    pub(super) fn is_new(&self) -> bool {
        self.scanned == 0
    }

    /// The length of the head including its blank line, or `None` while it is incomplete. `buffer` must start with the
    /// bytes of the last call. A blank line before the head counts as part of it (RFC 9112 section 2.2).
    ///
    /// # Errors
    /// A bare LF, or a head (or an incomplete one) longer than `limit` bytes.
    pub(super) fn find(&mut self, buffer: &[u8], limit: usize) -> Result<Option<usize>, BadHead> {
        let from = self.scanned;
        for offset in memchr::memchr_iter(b'\n', &buffer[from..]) {
            let len = from + offset + 1;
            match line_end(&buffer[..len]) {
                LineEnd::Line => {}
                LineEnd::Bare => return Err(BadHead::LineEnd),
                LineEnd::Head if len == 4 => return Err(BadHead::Syntax("blank lines before the head")),
                LineEnd::Head if len > limit => return Err(BadHead::TooLarge),
                LineEnd::Head => {
                    self.scanned = len;
                    return Ok(Some(len));
                }
            }
        }
        self.scanned = buffer.len();
        if buffer.len() > limit { Err(BadHead::TooLarge) } else { Ok(None) }
    }
}

/// Whether each line of a head that `httparse` has read ends with CR LF, which it does not insist on: a line ends right before
/// the name of a field, and the last two with the head. There is no line before the first.
pub(super) fn has_strict_lines(head: &[u8], fields: &[httparse::Header<'_>]) -> bool {
    let ends_strictly = |lines: &[u8]| lines.ends_with(b"\r\n");
    let before = |field: &httparse::Header<'_>| &head[..field.name.as_ptr() as usize - head.as_ptr() as usize];
    head.ends_with(b"\r\n\r\n")
        && !matches!(head[0], b'\r' | b'\n')
        && fields.iter().all(|field| ends_strictly(before(field)))
}

/// How the last line of `lines` ends, which is with LF.
fn line_end(lines: &[u8]) -> LineEnd {
    match lines {
        [.., b'\n', b'\r', _] => LineEnd::Head,
        [.., b'\r', _] => LineEnd::Line,
        _ => LineEnd::Bare,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http1::{Method, RequestHead, ResponseHead};

    fn whole(bytes: &[u8]) -> Result<Option<usize>, BadHead> {
        HeadScan::default().find(bytes, 100)
    }

    #[test]
    fn the_blank_line_ends_the_head() {
        assert_eq!(whole(b"GET / HTTP/1.1\r\nA: b\r\n\r\nbody"), Ok(Some(24)));
        assert_eq!(whole(b"GET / HTTP/1.1\r\nA: b\r\n"), Ok(None));
    }

    #[test]
    fn a_head_byte_by_byte_is_found_like_a_whole_one() {
        for head in [&b"GET / HTTP/1.1\r\nA: b\r\n\r\n"[..], b"\r\nGET / HTTP/1.1\r\n\r\n"] {
            let mut scan = HeadScan::default();
            for end in 0..head.len() {
                assert_eq!(scan.find(&head[..end], 100), Ok(None));
            }
            assert_eq!(scan.find(head, 100), Ok(Some(head.len())));
        }
    }

    #[test]
    fn one_blank_line_before_the_head_is_tolerated_and_no_more() {
        assert_eq!(whole(b"\r\nGET / HTTP/1.1\r\n\r\n"), Ok(Some(20)));
        assert!(whole(b"\r\n\r\nGET / HTTP/1.1\r\n\r\n").is_err());
    }

    #[test]
    fn a_bare_line_feed_is_refused() {
        for bytes in [&b"GET / HTTP/1.1\n"[..], b"\nGET", b"GET / HTTP/1.1\r\nA: b\n\r\n", b"GET / HTTP/1.1\r\n\n"] {
            assert_eq!(whole(bytes), Err(BadHead::LineEnd));
        }
    }

    #[test]
    fn a_head_over_the_limit_is_refused_complete_or_not() {
        assert_eq!(whole(&[b'a'; 101]), Err(BadHead::TooLarge));
        let mut head = vec![b'a'; 98];
        head.extend(b"\r\n\r\n");
        assert_eq!(whole(&head), Err(BadHead::TooLarge));
    }

    /// The same by lines.
    fn by_lines(buffer: &[u8], limit: usize) -> Result<Option<usize>, BadHead> {
        let (mut end, mut blank_before) = (0, false);
        for line in buffer.split_inclusive(|&byte| byte == b'\n') {
            if !line.ends_with(b"\n") {
                break;
            }
            if !line.ends_with(b"\r\n") {
                return Err(BadHead::LineEnd);
            }
            end += line.len();
            match (line, end) {
                (b"\r\n", 2) => blank_before = true,
                (b"\r\n", 4) if blank_before => return Err(BadHead::Syntax("blank lines before the head")),
                (b"\r\n", _) if end > limit => return Err(BadHead::TooLarge),
                (b"\r\n", _) => return Ok(Some(end)),
                _ => {}
            }
        }
        if buffer.len() > limit { Err(BadHead::TooLarge) } else { Ok(None) }
    }

    /// Pieces of which some make good heads, and most do not.
    fn pieces() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            8 => Just("\r\n"), 2 => Just("GET / HTTP/1.1\r\n"), 2 => Just("HTTP/1.1 200 OK\r\n"), 2 => Just("Host: a\r\n"),
            2 => Just("Content-Length: 3\r\n"), 1 => Just("A: b \r\n"), 1 => Just("A: b"), 1 => Just(" c\r\n"), 1 => Just("\n"),
            1 => Just("\r"), 1 => Just("A:\n"), 1 => Just("\t"), 1 => Just("HEAD http://a HTTP/1.0\r\n"), 1 => Just("HTTP/1.1 200\n"),
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat().into_bytes())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        /// That a head is parsed before it is scanned changes nothing: neither what is accepted, nor its length, nor the error.
        #[test]
        fn a_head_that_is_read_at_once_is_read_as_one_that_is_scanned_first(bytes in pieces(), limit in 10..120_usize) {
            let limits = HeadLimits { bytes: limit, fields: 4 };
            let found = HeadScan::default().find(&bytes, limit);
            let (mut at_once, mut after) = (RequestHead::default(), RequestHead::default());
            let read = at_once.read(&bytes, &mut HeadScan::default(), limits);
            let scanned = found.and_then(|len| len.map(|len| after.parse(&bytes[..len], 4).map(|()| len)).transpose());
            prop_assert_eq!(&read, &scanned);
            prop_assert_eq!(format!("{at_once:?}"), format!("{after:?}"));
            let (mut at_once, mut after) = (ResponseHead::default(), ResponseHead::default());
            let read = at_once.read(&bytes, Method::Get, &mut HeadScan::default(), limits);
            let scanned =
                found.and_then(|len| len.map(|len| after.parse(&bytes[..len], Method::Get, 4).map(|()| len)).transpose());
            prop_assert_eq!(&read, &scanned);
            prop_assert_eq!(format!("{at_once:?}"), format!("{after:?}"));
        }
    }

    proptest! {
        #[test]
        fn a_head_in_any_pieces_is_found_as_line_by_line(
            parts in prop::collection::vec(prop_oneof![
                8 => "[a-z]{0,90}",
                8 => Just("\r\n".to_owned()),
                1 => Just("\r".to_owned()),
                1 => Just("\n".to_owned()),
                1 => Just("\r\n\r\n".to_owned()),
            ], 0..40),
            cuts in prop::collection::vec(0..2_000_usize, 0..6),
            limit in 1..1_500_usize,
        ) {
            let bytes = parts.concat().into_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < bytes.len()).collect();
            cuts.sort_unstable();
            let mut scan = HeadScan::default();
            // The first piece that says anything has the last word.
            for cut in cuts.into_iter().chain([bytes.len()]) {
                let found = scan.find(&bytes[..cut], limit);
                prop_assert_eq!(&found, &by_lines(&bytes[..cut], limit), "up to {}", cut);
                if found != Ok(None) {
                    break;
                }
            }
        }
    }
}
