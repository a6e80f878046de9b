//! The content of a body of any framing, as it arrives in pieces.

use super::{BadChunk, ChunkedDecoder, Framing};

/// Takes the frame off a body.
#[derive(Debug)]
pub struct BodyDecoder(BodyState);

#[derive(Debug)]
enum BodyState {
    Length(u64),
    Chunked(ChunkedDecoder),
    UntilClose { has_ended: bool },
}

impl BodyDecoder {
    /// For a body with this framing.
    pub fn new(framing: Framing) -> Self {
        BodyDecoder(match framing {
            Framing::None => BodyState::Length(0),
            Framing::Length(length) => BodyState::Length(length),
            Framing::Chunked => BodyState::Chunked(ChunkedDecoder::default()),
            Framing::UntilClose => BodyState::UntilClose { has_ended: false },
        })
    }

    /// Whether the last byte of the body has been seen.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            BodyState::Length(left) => *left == 0,
            BodyState::Chunked(decoder) => decoder.is_done(),
            BodyState::UntilClose { has_ended } => *has_ended,
        }
    }

    /// Moves the content of `piece` to its front. Returns how many bytes of content there are, and how many bytes of
    /// `piece` belonged to this body.
    ///
    /// # Errors
    /// [`BadChunk`] where a chunked body is malformed.
    pub fn decode_in_place(&mut self, piece: &mut [u8]) -> Result<(usize, usize), BadChunk> {
        match &mut self.0 {
            BodyState::Length(left) => {
                let content = usize::try_from(*left).map_or(piece.len(), |left| left.min(piece.len()));
                *left -= content as u64;
                Ok((content, content))
            }
            BodyState::Chunked(decoder) => decoder.decode_in_place(piece),
            BodyState::UntilClose { .. } => Ok((piece.len(), piece.len())),
        }
    }

    /// The connection has ended. Says whether that is the end of the body, and not a cut.
    pub fn end(&mut self) -> bool {
        if let BodyState::UntilClose { has_ended } = &mut self.0 {
            *has_ended = true;
        }
        self.is_done()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The content of these bytes, what follows it, whether it is whole, and whether it is once the connection ends.
    fn decoded(framing: Framing, bytes: &[u8]) -> (Vec<u8>, Vec<u8>, bool, bool) {
        let (mut decoder, mut piece) = (BodyDecoder::new(framing), bytes.to_vec());
        let (content, consumed) = decoder.decode_in_place(&mut piece).unwrap();
        let is_whole = decoder.is_done();
        (piece[..content].to_vec(), bytes[consumed..].to_vec(), is_whole, decoder.end())
    }

    #[test]
    fn every_framing_gives_the_content_and_knows_its_end() {
        let case = |framing, bytes: &str, content: &str, rest: &str, is_whole, ends| {
            let expected = (content.as_bytes().to_vec(), rest.as_bytes().to_vec(), is_whole, ends);
            assert_eq!(decoded(framing, bytes.as_bytes()), expected, "{framing:?} {bytes}");
        };
        case(Framing::None, "x", "", "x", true, true);
        case(Framing::Length(2), "abc", "ab", "c", true, true);
        case(Framing::Length(4), "abc", "abc", "", false, false);
        case(Framing::Chunked, "2\r\nab\r\n0\r\n\r\nc", "ab", "c", true, true);
        case(Framing::Chunked, "2\r\nab\r\n", "ab", "", false, false);
        case(Framing::UntilClose, "abc", "abc", "", false, true);
    }
}
