//! The speed and the pieces of one side's reads or writes. Every choice comes from a seed.
//!
//! Most real messages arrive in one piece, and most faults are at boundaries between pieces: so a third is sent at
//! once, a third drips in single bytes for a while, and a third comes in pieces of any size. The number of pieces and
//! pauses of one message is limited, because ten thousand messages have to finish in seconds.

use std::time::{Duration, Instant};

use fastrand::Rng;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpSocket;

/// The most random pieces of one message. The rest is sent at once.
const PIECES: u32 = 24;

/// A pause longer than this is the last one of its message. On a busy machine a hundred clients need seconds for a turn
/// each, and clearcoat's limit for a head is ten seconds.
const SLOW: Duration = Duration::from_millis(200);

/// Shrinks a socket's buffers, so that its peer's writes have to wait (call before it is connected or listens). A small
/// receive buffer alone is not enough: because of the 64 KiB segments of the loopback interface, the kernel gives the
/// writer a buffer of some MiB.
pub fn narrow(socket: &TcpSocket) -> std::io::Result<()> {
    socket.set_recv_buffer_size(16 * 1024)?;
    socket2::SockRef::from(socket).set_tcp_mss(1000)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Whole,
    SingleBytes,
    AnySize,
}

/// The pace of one side of one message.
#[derive(Debug)]
pub struct Pace {
    random: Rng,
    cut: Cut,
    /// The remaining random pieces.
    pieces: u32,
    /// The remaining pauses, and the probability of one, in percent.
    pauses: u32,
    pause_percent: u8,
    /// How often to yield to other tasks.
    turns: u32,
}

impl Pace {
    pub fn new(random: &mut Rng) -> Self {
        let cut = [Cut::Whole, Cut::SingleBytes, Cut::AnySize][random.usize(..3)];
        // One in twenty is slow, so that the other side has to wait for it.
        let (pauses, pause_percent, turns) = if random.u8(..20) == 0 { (8, 60, 0) } else { (2, 8, 5) };
        Pace { random: random.fork(), cut, pieces: PIECES, pauses, pause_percent, turns }
    }

    /// Everything at once, without a pause.
    pub fn at_once() -> Self {
        Pace { random: Rng::with_seed(0), cut: Cut::Whole, pieces: 0, pauses: 0, pause_percent: 0, turns: 0 }
    }

    /// The size of the next piece, at most `most` bytes.
    pub fn piece(&mut self, most: usize) -> usize {
        if self.pieces == 0 || self.cut == Cut::Whole || most <= 1 {
            return most;
        }
        self.pieces -= 1;
        if self.cut == Cut::SingleBytes && self.pieces > 2 {
            return 1;
        }
        // Logarithmic: 1 to 2 is as likely as 1000 to 2000.
        let scale = self.random.u32(..=most.ilog2());
        self.random.usize(1..=most.min(2 << scale))
    }

    /// Yields to other tasks sometimes, and pauses briefly even more seldom.
    pub async fn pause(&mut self) {
        let began = Instant::now();
        let chance = self.random.u8(..100);
        if chance < self.pause_percent && self.pauses > 0 {
            self.pauses -= 1;
            tokio::time::sleep(Duration::from_micros(self.random.u64(..4000))).await;
        } else if chance < 50 && self.turns > 0 {
            self.turns -= 1;
            tokio::task::yield_now().await;
        }
        if began.elapsed() > SLOW {
            (self.pauses, self.turns) = (0, 0);
        }
    }

    /// Writes the bytes at this pace. The last `together` bytes are in one piece.
    pub async fn write<W: AsyncWrite + Unpin>(
        &mut self,
        sink: &mut W,
        bytes: &[u8],
        together: usize,
    ) -> std::io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let free = rest.len().saturating_sub(together);
            let size = if free == 0 { rest.len() } else { self.piece(free) };
            // Without cuts, the last bytes are not a separate piece either.
            let size = if size == free && self.cut == Cut::Whole { rest.len() } else { size };
            sink.write_all(&rest[..size]).await?;
            rest = &rest[size..];
            self.pause().await;
        }
        Ok(())
    }
}
