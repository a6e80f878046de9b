//! The request body on its way to the node.

use std::task::{Context, Poll};

use tokio::net::TcpStream;

use super::super::client::Client;
use super::super::failure::Failure;
use super::super::transfer::{Transfer, TransferError};

/// The state of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    /// It is running, or complete.
    Running,
    /// The client aborted it. The answer decides the outcome of the request.
    GivenUp,
    /// A write to the node failed. Its answer may still arrive.
    Refused,
}

/// A request's body, preceded by its head.
pub(super) struct Upload {
    body: Transfer,
    course: Course,
    /// No byte was handed to the kernel for the node.
    is_unsent: bool,
    /// Bytes from the client after this request.
    beyond: Vec<u8>,
}

impl Upload {
    /// An upload before its first write.
    pub(super) fn new(body: Transfer) -> Self {
        Upload { body, course: Course::Running, is_unsent: true, beyond: Vec::new() }
    }

    /// Takes bytes read along with the head. Returns how many belong to this body.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<usize, Failure> {
        self.body.feed(bytes).map_err(failure)
    }

    /// Copies what can be copied now.
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

    /// Abandons the rest of the body.
    pub(super) fn give_up(&mut self) {
        self.course = Course::GivenUp;
    }

    /// Bytes written since the last call.
    pub(super) fn take_moved(&mut self) -> u64 {
        self.body.take_moved()
    }

    /// How much longer the body may be than what was read of it, in bytes.
    pub(super) fn allowance_left(&self) -> u64 {
        self.body.allowance_left()
    }

    /// Whether the node has the complete body, or takes no more.
    pub(super) fn needs_no_more(&self) -> bool {
        self.course != Course::Running || self.body.is_done()
    }

    /// Whether the node has the complete body.
    pub(super) fn is_done(&self) -> bool {
        self.body.is_done()
    }

    /// Whether a write to the node failed. The kernel reports a reset once: a later read may see a clean end.
    pub(super) fn was_refused(&self) -> bool {
        self.course == Course::Refused
    }

    /// Whether no byte of the request was sent to the node.
    pub(super) fn is_unsent(&self) -> bool {
        self.is_unsent
    }

    /// Whether bytes were read from the client beyond those with the head: then the request cannot be repeated.
    pub(super) fn has_read(&self) -> bool {
        self.body.has_read()
    }

    /// Whether the upload waits for the node, not for the client.
    pub(super) fn waits_for_node(&self) -> bool {
        self.body.waits_for_sink()
    }

    /// Appends the client's bytes after this request to `input`.
    pub(super) fn give_beyond(&mut self, input: &mut Vec<u8>) {
        input.append(&mut self.beyond);
    }

    /// The buffer passed to the constructor.
    pub(super) fn take_buffer(&mut self) -> Vec<u8> {
        self.body.take_buffer()
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
