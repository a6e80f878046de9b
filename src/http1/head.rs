//! Finds the end of a head that arrives in pieces.

use super::BadHead;

/// Searches for the empty line, and refuses line ends other than CR LF on the way: parsers disagree about a bare LF,
/// and request smuggling lives on that disagreement. It remembers its place, so that a head that arrives byte by byte
/// is scanned once.
#[derive(Debug, Default)]
pub struct HeadScan {
    line_start: usize,
    scanned: usize,
}

impl HeadScan {
    /// The length of the head with its empty line, or `None` if it is incomplete. `buffer` must begin with the bytes of
    /// the last call. Empty lines before the head count as part of it (RFC 9112 section 2.2).
    ///
    /// # Errors
    /// A bare LF, or a head (complete or not) longer than `limit` bytes.
    pub fn find(&mut self, buffer: &[u8], limit: usize) -> Result<Option<usize>, BadHead> {
        let mut seen_a_line = self.line_start > 2;
        let unseen = self.scanned;
        for offset in memchr::memchr_iter(b'\n', &buffer[unseen..]) {
            let newline = unseen + offset;
            if newline == self.line_start || buffer[newline - 1] != b'\r' {
                return Err(BadHead::LineEnd);
            }
            let blank = newline == self.line_start + 1;
            self.scanned = newline + 1;
            self.line_start = newline + 1;
            if blank && seen_a_line {
                return if self.scanned > limit { Err(BadHead::TooLarge) } else { Ok(Some(self.scanned)) };
            }
            if blank && self.line_start > 2 {
                return Err(BadHead::Syntax("blank lines before the head"));
            }
            seen_a_line |= !blank;
        }
        self.scanned = buffer.len();
        if buffer.len() > limit { Err(BadHead::TooLarge) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
