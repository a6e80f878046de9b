//! The tunnel after a `101 Switching Protocols`: opaque bytes in both directions.
//!
//! A tunnel begins only after the node has agreed to it. Before its 101, all client input is HTTP: a proxy that passes
//! bytes on because a client asked for an upgrade can be used to smuggle requests (CVE-2026-2833).

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::deadline::{Deadline, Phase};
use super::failure::Failure;
use super::stream::Stream;
use super::trace::Trace;
use super::transfer::{Outgoing, Transfer, TransferError};
use super::worker::Worker;
use crate::http1::Framing;

/// One direction: when its source ends, so does its sink.
struct Direction {
    transfer: Transfer,
    ended: bool,
}

impl Direction {
    fn new(first: Vec<u8>) -> Self {
        Direction { transfer: Transfer::new(Framing::UntilClose, Outgoing::AsItIs, first), ended: false }
    }

    fn poll<S, D>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut S,
        sink: &mut D,
        scratch: &mut [u8],
    ) -> Poll<Result<(), TransferError>>
    where
        S: AsyncRead + Unpin,
        D: AsyncWrite + Unpin,
    {
        if !self.ended {
            // The body ends with its connection, so no bytes come after it.
            ready!(self.transfer.poll(cx, source, sink, scratch, &mut Vec::new()))?;
            ready!(Pin::new(sink).poll_shutdown(cx)).map_err(TransferError::Sink)?;
            self.ended = true;
        }
        Poll::Ready(Ok(()))
    }
}

/// Copies bytes until both sides have ended, or nothing moved for too long. Each side has its first bytes: for the node
/// the client's early input, for the client the head of the 101.
pub(super) async fn tunnel(
    worker: &Rc<Worker>,
    deadline: &Deadline,
    trace: &mut Trace,
    (client, early): (&mut Stream, Vec<u8>),
    (node, first): (&mut TcpStream, Vec<u8>),
) -> Result<(), Failure> {
    let (mut up, mut down) = (Direction::new(early), Direction::new(first));
    deadline.enter(Phase::Tunnel);
    std::future::poll_fn(|cx| {
        let mut scratch = worker.scratch.borrow_mut();
        let upwards = up.poll(cx, client, node, &mut scratch).map_err(|error| match error {
            TransferError::Source(error) => Failure::ClientGone(error),
            other => Failure::CutAnswer(reason(other)),
        });
        let downwards = down.poll(cx, node, client, &mut scratch).map_err(|error| match error {
            TransferError::Sink(error) => Failure::ClientGone(error),
            other => Failure::CutAnswer(reason(other)),
        });
        let (read, sent) = (up.transfer.take_moved(), down.transfer.take_moved());
        trace.body_read += read;
        trace.sent += sent;
        // Both, before either counts: one that broke off ends the other.
        let (upwards, downwards) = (upwards?, downwards?);
        if upwards.is_ready() && downwards.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if read + sent > 0 {
            deadline.advance(read + sent);
        }
        deadline.poll(cx).map(|_interrupt| Err(Failure::IdleTunnel))
    })
    .await
}

/// A tunnel has no framing and no limits, so a failure is one of its sockets.
fn reason(error: TransferError) -> io::Error {
    match error {
        TransferError::Source(error) | TransferError::Sink(error) => error,
        TransferError::Frame(_) | TransferError::TooLong => io::ErrorKind::InvalidData.into(),
    }
}
