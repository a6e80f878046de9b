//! Bodies, compared while they arrive.

use tokio::io::AsyncRead;

use super::{Ending, Incoming, Trouble, canonical, shown};
use crate::data_path::torture::message::Framing;

#[derive(Clone, Copy, Debug)]
enum Frame {
    Length(usize),
    ChunkSize,
    /// Remaining bytes of a chunk.
    Chunk(usize),
    UntilClose,
    Done,
}

/// A body compared with the expected one while it arrives.
pub struct BodyCheck<'b> {
    expected: &'b [u8],
    /// The bytes received so far.
    pub at: usize,
    frame: Frame,
}

impl<'b> BodyCheck<'b> {
    pub fn new(framing: Framing, expected: &'b [u8]) -> Self {
        let frame = match framing {
            Framing::None => Frame::Done,
            Framing::Length(length) => Frame::Length(length),
            Framing::Chunked => Frame::ChunkSize,
            Framing::UntilClose => Frame::UntilClose,
        };
        BodyCheck { expected, at: 0, frame }
    }

    /// Reads up to this offset of the content, or the end of the body. Returns whether the body has ended.
    pub async fn advance<R: AsyncRead + Unpin>(
        &mut self,
        incoming: &mut Incoming<R>,
        place: usize,
    ) -> Result<bool, Trouble> {
        while self.at < place {
            self.frame = match self.frame {
                Frame::Done => break,
                Frame::Length(0) => Frame::Done,
                Frame::Length(left) => Frame::Length(left - self.content(incoming, left.min(place - self.at)).await?),
                Frame::ChunkSize => {
                    let size = canonical(&incoming.until(b"\r\n").await?, 16).map_err(Trouble::Wrong)?;
                    if size == 0 {
                        incoming.exactly(b"\r\n").await?;
                        Frame::Done
                    } else {
                        Frame::Chunk(size)
                    }
                }
                Frame::Chunk(0) => {
                    incoming.exactly(b"\r\n").await?;
                    Frame::ChunkSize
                }
                Frame::Chunk(left) => Frame::Chunk(left - self.content(incoming, left.min(place - self.at)).await?),
                Frame::UntilClose => match self.content(incoming, place - self.at).await {
                    Ok(_) => Frame::UntilClose,
                    Err(Trouble::Ended(Ending::Clean)) => Frame::Done,
                    Err(trouble) => return Err(trouble),
                },
            };
        }
        let done = matches!(self.frame, Frame::Done);
        if done && self.at < self.expected.len() {
            return Err(Trouble::Wrong(format!("the body ends after {} of {} bytes", self.at, self.expected.len())));
        }
        Ok(done)
    }

    async fn content<R: AsyncRead + Unpin>(
        &mut self,
        incoming: &mut Incoming<R>,
        limit: usize,
    ) -> Result<usize, Trouble> {
        let piece = incoming.some(limit).await?;
        let expected = &self.expected[self.at..];
        if !expected.starts_with(piece) {
            let same = piece.iter().zip(expected).take_while(|(came, expected)| came == expected).count();
            let (place, of) = (self.at + same, self.expected.len());
            let (came, expected) = (shown(&piece[same..]), shown(&expected[same..]));
            return Err(Trouble::Wrong(format!("at byte {place} of {of} of the body came {came}, not {expected}")));
        }
        self.at += piece.len();
        Ok(piece.len())
    }
}
