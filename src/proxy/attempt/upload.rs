//! The body of a request on its way to the node.

use std::task::{Context, Poll};

use tokio::net::TcpStream;

use super::super::client::Client;
use super::super::failure::Failure;
use super::super::transfer::{Transfer, TransferError};

/// How it stands with a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    /// It goes on, or has come to its end.
    Running,
    /// The client broke it off. The answer decides what becomes of the request.
    GivenUp,
    /// A write to the node failed. Its answer may come all the same.
    Refused,
}

/// A request's body, with its head before it.
pub(super) struct Upload {
    body: Transfer,
    course: Course,
    /// Not a byte was handed to the system for the node.
    is_unsent: bool,
    /// What the client sent beyond this request.
    beyond: Vec<u8>,
}

impl Upload {
    /// An upload of which nothing was sent.
    pub(super) fn new(body: Transfer) -> Self {
        Upload { body, course: Course::Running, is_unsent: true, beyond: Vec::new() }
    }

    /// Takes what was read with the head. Returns how many of the bytes belong to this body.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<usize, Failure> {
        self.body.feed(bytes).map_err(failure)
    }

    /// Moves the body on.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Client,
        node: &mut TcpStream,
    ) -> Result<(), Failure> {
        if self.needs_no_more() {
            return Ok(());
        }
        let mut scratch = client.worker.scratch.borrow_mut();
        let polled = self.body.poll(cx, &mut client.stream, node, &mut scratch, &mut self.beyond);
        self.is_unsent &= !self.body.has_moved();
        match polled {
            Poll::Ready(Err(TransferError::Sink(_))) => {
                self.course = Course::Refused;
                Ok(())
            }
            Poll::Ready(Err(error)) => Err(failure(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }

    /// Gives the rest of the body up.
    pub(super) fn give_up(&mut self) {
        self.course = Course::GivenUp;
    }

    /// Bytes that were written since this was last asked.
    pub(super) fn take_moved(&mut self) -> u64 {
        self.body.take_moved()
    }

    /// Whether the node has all of it, or takes no more.
    pub(super) fn needs_no_more(&self) -> bool {
        self.course != Course::Running || self.body.is_done()
    }

    /// Whether the node has all of it.
    pub(super) fn is_done(&self) -> bool {
        self.body.is_done()
    }

    /// Whether a write to the node failed. The system tells of a reset once: a read may see a clean end then.
    pub(super) fn was_refused(&self) -> bool {
        self.course == Course::Refused
    }

    /// Whether not a byte of the request was handed to the node.
    pub(super) fn is_unsent(&self) -> bool {
        self.is_unsent
    }

    /// Whether bytes were read from the client beyond those that came with the head: then the request cannot be repeated.
    pub(super) fn has_read(&self) -> bool {
        self.body.has_read()
    }

    /// Whether it is the node that is waited for, and not the client.
    pub(super) fn waits_for_node(&self) -> bool {
        self.body.waits_for_sink()
    }

    /// Appends what the client sent beyond this request.
    pub(super) fn give_beyond(&mut self, input: &mut Vec<u8>) {
        input.append(&mut self.beyond);
    }

    /// The buffer that the body was made with.
    pub(super) fn into_buffer(self) -> Vec<u8> {
        self.body.into_buffer()
    }
}

fn failure(error: TransferError) -> Failure {
    match error {
        TransferError::Source(error) => Failure::ClientGone(error),
        TransferError::Frame(reason) => Failure::BadBody(reason),
        TransferError::TooLong => Failure::BodyTooLarge,
        TransferError::Sink(error) => Failure::NoAnswer(error),
    }
}
