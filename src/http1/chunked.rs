//! Chunked bodies (RFC 9112 section 7.1), checked byte by byte and stripped of their frame, so that they can be
//! written anew in one form. Extensions are read over: nobody uses them, and what is not passed on cannot be used
//! against anybody. Trailers are checked like the fields of a head and read over as well (RFC 9110 section 6.5.1 allows
//! it): Varnish up to 7 fails a message that has any, and a Varnish is at one end of nearly everything that passes here.

/// Why a chunked body is refused. Its connection cannot be used any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChunk {
    /// The size is missing, not hexadecimal or too large.
    #[error("a chunk size is malformed")]
    Size,
    /// An extension without a name, or with control bytes.
    #[error("a chunk extension is malformed")]
    Extension,
    /// A line that does not end with CR LF.
    #[error("a chunk does not end with CR LF")]
    LineEnd,
    /// Extensions or trailers longer than 16 KiB.
    #[error("chunk extensions or trailers are too long")]
    Overhead,
    /// Trailers that do not parse as header fields, or too many of them.
    #[error("a trailer is malformed")]
    Trailer,
}

/// The most bytes of extensions and trailers that a body may have between two bytes of content.
const MAX_OVERHEAD: u32 = 16 * 1024;

/// The most digits of a chunk size: the largest value has 16, and some servers write zeros before it.
const MAX_DIGITS: u8 = 32;

/// The most trailers that a body may have.
const MAX_TRAILERS: usize = 32;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum ChunkState {
    /// At the first digit of a size.
    #[default]
    SizeStart,
    Size,
    /// Blanks behind the size; only an extension may follow.
    Blank,
    /// Behind a semicolon, before the name of an extension.
    ExtensionStart,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a trailer line, or of the blank line that ends the body.
    TrailerStart,
    Trailer,
    TrailerLf,
    EndLf,
    End,
}

/// Takes the frame off a chunked body that arrives in pieces.
#[derive(Clone, Debug, Default)]
pub struct ChunkedDecoder {
    state: ChunkState,
    remaining: u64,
    digits: u8,
    overhead: u32,
    /// The trailer lines as they come.
    trailers: Vec<u8>,
}

impl ChunkedDecoder {
    /// Whether the last byte of the body has been seen.
    pub fn is_done(&self) -> bool {
        self.state == ChunkState::End
    }

    /// Moves the content of `piece` to its front. Returns how many bytes of content there are, and how many bytes of
    /// `piece` belonged to this body (fewer than all only where it ended).
    ///
    /// # Errors
    /// [`BadChunk`]; what was decoded before the fault is not to be used either.
    pub fn decode_in_place(&mut self, piece: &mut [u8]) -> Result<(usize, usize), BadChunk> {
        let (mut read, mut written) = (0, 0);
        while read < piece.len() && self.state != ChunkState::End {
            if self.state == ChunkState::Data {
                let available = (piece.len() - read) as u64;
                let take = self.remaining.min(available) as usize;
                piece.copy_within(read..read + take, written);
                read += take;
                written += take;
                self.remaining -= take as u64;
                if self.remaining == 0 {
                    self.state = ChunkState::DataCr;
                }
            } else {
                self.frame_byte(piece[read])?;
                read += 1;
            }
        }
        Ok((written, read))
    }

    fn frame_byte(&mut self, byte: u8) -> Result<(), BadChunk> {
        self.state = match (self.state, byte) {
            (ChunkState::SizeStart, _) => {
                self.remaining = hex_digit(byte)?;
                self.digits = 1;
                ChunkState::Size
            }
            (ChunkState::Size | ChunkState::Extension, b'\r') => ChunkState::SizeLf,
            (ChunkState::Size | ChunkState::Blank, b' ' | b'\t') => self.overhead_byte(ChunkState::Blank)?,
            (ChunkState::Size | ChunkState::Blank | ChunkState::Extension, b';') => ChunkState::ExtensionStart,
            (ChunkState::Blank, _) => return Err(BadChunk::Size),
            (ChunkState::Size, _) => {
                self.digits += 1;
                if self.digits > MAX_DIGITS || self.remaining >> 59 != 0 {
                    return Err(BadChunk::Size);
                }
                self.remaining = self.remaining * 16 + hex_digit(byte)?;
                ChunkState::Size
            }
            (ChunkState::SizeLf, b'\n') if self.remaining == 0 => ChunkState::TrailerStart,
            (ChunkState::SizeLf, b'\n') => {
                self.overhead = 0;
                ChunkState::Data
            }
            (ChunkState::DataCr, b'\r') => ChunkState::DataLf,
            (ChunkState::DataLf, b'\n') => ChunkState::SizeStart,
            (ChunkState::TrailerStart, b'\r') => ChunkState::EndLf,
            (ChunkState::Trailer, b'\r') => ChunkState::TrailerLf,
            (ChunkState::TrailerLf, b'\n') => {
                self.trailers.extend_from_slice(b"\r\n");
                ChunkState::TrailerStart
            }
            (ChunkState::EndLf, b'\n') => {
                check_trailers(&self.trailers)?;
                ChunkState::End
            }
            (ChunkState::ExtensionStart, b' ' | b'\t') => self.overhead_byte(ChunkState::ExtensionStart)?,
            (ChunkState::ExtensionStart, b'\r' | b'=' | b';') => return Err(BadChunk::Extension),
            (ChunkState::ExtensionStart | ChunkState::Extension, b'\n')
            | (ChunkState::TrailerStart | ChunkState::Trailer, b'\n') => {
                return Err(BadChunk::LineEnd);
            }
            (ChunkState::ExtensionStart | ChunkState::Extension, 0..=8 | 11..=31 | 127) => {
                return Err(BadChunk::Extension);
            }
            (ChunkState::ExtensionStart | ChunkState::Extension, _) => self.overhead_byte(ChunkState::Extension)?,
            (ChunkState::TrailerStart | ChunkState::Trailer, _) => {
                self.trailers.push(byte);
                self.overhead_byte(ChunkState::Trailer)?
            }
            _ => return Err(BadChunk::LineEnd),
        };
        Ok(())
    }

    fn overhead_byte(&mut self, next: ChunkState) -> Result<ChunkState, BadChunk> {
        self.overhead += 1;
        if self.overhead > MAX_OVERHEAD { Err(BadChunk::Overhead) } else { Ok(next) }
    }
}

/// Checks trailer lines as strictly as the fields of a head.
fn check_trailers(lines: &[u8]) -> Result<(), BadChunk> {
    if lines.is_empty() {
        return Ok(());
    }
    let section = [lines, b"\r\n"].concat();
    let mut fields = [httparse::EMPTY_HEADER; MAX_TRAILERS];
    match httparse::parse_headers(&section, &mut fields) {
        Ok(httparse::Status::Complete(_)) => Ok(()),
        _ => Err(BadChunk::Trailer),
    }
}

fn hex_digit(byte: u8) -> Result<u64, BadChunk> {
    char::from(byte).to_digit(16).map(u64::from).ok_or(BadChunk::Size)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> Result<(Vec<u8>, usize, bool), BadChunk> {
        let mut piece = bytes.to_vec();
        let mut decoder = ChunkedDecoder::default();
        let (content, consumed) = decoder.decode_in_place(&mut piece)?;
        piece.truncate(content);
        Ok((piece, consumed, decoder.is_done()))
    }

    #[test]
    fn a_body_loses_its_frame_and_the_rest_stays() {
        let (content, consumed, done) = decode(b"5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX: y\r\n\r\nGET /").unwrap();
        assert_eq!((content.as_slice(), consumed, done), (&b"hello world"[..], 36, true));
    }

    #[test]
    fn a_cut_body_is_not_done() {
        let (content, _, done) = decode(b"5\r\nhel").unwrap();
        assert_eq!((content.as_slice(), done), (&b"hel"[..], false));
    }

    #[test]
    fn malformed_frames_are_refused() {
        for (bytes, verdict) in [
            (&b"x\r\n"[..], BadChunk::Size),
            (b"0x1\r\n", BadChunk::Size),
            (b"\r\n", BadChunk::Size),
            (b"-1\r\n", BadChunk::Size),
            (b"fffffffffffffffff\r\n", BadChunk::Size),
            (b"1\nab", BadChunk::Size),
            (b"5 5\r\n", BadChunk::Size),
            (b"5 \r\n", BadChunk::Size),
            (b"000000000000000000000000000000005\r\n", BadChunk::Size),
            (b"5;\r\n", BadChunk::Extension),
            (b"5; =b\r\n", BadChunk::Extension),
            (b"5;a\0\r\n", BadChunk::Extension),
            (b"1;a\nb", BadChunk::LineEnd),
            (b"1\r\nab\r\n", BadChunk::LineEnd),
            (b"1\r\na\n", BadChunk::LineEnd),
            (b"0\r\n\n", BadChunk::LineEnd),
            (b"0\r\na\n", BadChunk::LineEnd),
        ] {
            assert_eq!(decode(bytes).unwrap_err(), verdict, "{bytes:?}");
        }
        let mut long = b"1;".to_vec();
        long.resize(20_000, b'a');
        assert_eq!(decode(&long).unwrap_err(), BadChunk::Overhead);
    }

    #[test]
    fn trailers_are_read_over() {
        let wire = b"2\r\nok\r\n0\r\nServer-Timing:  db;dur=5 \r\nContent-Length: 3\r\nA_b: c\r\n\r\nGET";
        assert_eq!(decode(wire).unwrap(), (b"ok".to_vec(), wire.len() - 3, true));
    }

    #[test]
    fn malformed_trailers_are_refused() {
        for trailer in ["no colon", "a b: c", " folded: x", "a: b\0", ": x"] {
            let wire = format!("0\r\n{trailer}\r\n\r\n");
            assert_eq!(decode(wire.as_bytes()).unwrap_err(), BadChunk::Trailer, "{trailer}");
        }
        let many = format!("0\r\n{}\r\n", "a: b\r\n".repeat(MAX_TRAILERS + 1));
        assert_eq!(decode(many.as_bytes()).unwrap_err(), BadChunk::Trailer);
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_give_the_same_content(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..8),
            cut in 1_usize..40,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend(format!("{:x}\r\n", chunk.len()).bytes());
                wire.extend(chunk);
                wire.extend(b"\r\n");
            }
            wire.extend(b"0\r\n\r\n");
            let mut decoder = ChunkedDecoder::default();
            let mut content: Vec<u8> = Vec::new();
            for piece in wire.chunks(cut) {
                let mut piece = piece.to_vec();
                let (written, consumed) = decoder.decode_in_place(&mut piece).unwrap();
                prop_assert_eq!(consumed, piece.len());
                content.extend(&piece[..written]);
            }
            prop_assert!(decoder.is_done());
            prop_assert_eq!(content, chunks.concat());
        }
    }
}
