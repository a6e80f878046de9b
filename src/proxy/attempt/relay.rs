//! The second state of an attempt: the answer has begun, and is relayed to its end.

use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::super::client::Disposition;
use super::super::deadline::{AwaitedSide, Phase};
use super::super::failure::Failure;
use super::super::splice::{self, Splice};
use super::super::stream::Stream;
use super::super::trace::RequestPhase;
use super::super::transfer::{Transfer, TransferError};
use super::{Begun, Exchange, download_failure};
use crate::http1::Framing;
use crate::purge::Passage;

/// Bytes that the kernel sends without waiting for an acknowledgement: ten segments (RFC 6928). An answer no longer
/// than this arrives even if the connection is closed at once and the client turns out to have sent more.
const FIRST_FLIGHT: u64 = 12 * 1024;

/// An answer that was relayed completely.
pub(super) struct Relayed {
    /// The client may send another request after it.
    pub(super) keep_alive: bool,
    /// Bytes written of it.
    pub(super) sent: u64,
}

/// The body of an answer on its way to the client, preceded by its head.
pub(super) struct Download {
    pub(super) body: Transfer,
    /// The client may send another request after it.
    keep_alive: bool,
}

impl Download {
    /// A download before its first write.
    pub(super) fn new(framing: Framing, Begun { first, outgoing, keep_alive }: Begun) -> Self {
        Download { body: Transfer::new(framing, outgoing, first), keep_alive }
    }
}

/// An answer being relayed to the client.
pub(super) struct Relaying<'a, 'e> {
    exchange: &'a mut Exchange<'e>,
    download: Download,
    /// Bytes of the answer written so far.
    sent: u64,
    /// The client has sent something after its request, perhaps its end of stream.
    client_may_be_gone: bool,
}

impl<'a, 'e> Relaying<'a, 'e> {
    pub(super) fn new(exchange: &'a mut Exchange<'e>, download: Download) -> Self {
        Relaying { exchange, download, sent: 0, client_may_be_gone: false }
    }

    /// Relays the answer to its end.
    pub(super) async fn run(&mut self) -> Result<Relayed, Failure> {
        let worker = Rc::clone(&self.exchange.client.worker);
        let is_long = self.download.body.length_left().is_some_and(|left| left >= splice::WORTHWHILE);
        let mut splice = if is_long && self.exchange.client.stream.is_plain() {
            worker.pipes.begin(worker.shared.files_of(self.exchange.client.frontend.role).nodes)
        } else {
            None
        };
        let mut entered = false;
        let end = std::future::poll_fn(|cx| self.poll(cx, splice.as_mut(), &mut entered)).await;
        if let Some(splice) = splice {
            worker.pipes.put(splice);
        }
        end?;
        self.exchange.request.to_client = self.download.body.take_buffer();
        Ok(Relayed { keep_alive: self.download.keep_alive, sent: self.sent })
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        splice: Option<&mut Splice>,
        entered: &mut bool,
    ) -> Poll<Result<(), Failure>> {
        let polled = self.poll_both(cx, splice, entered);
        if matches!(polled, Poll::Ready(Err(_))) && self.download.body.has_come() {
            self.exchange.request.trace.phase = RequestPhase::Last;
        }
        polled
    }

    fn poll_both(
        &mut self,
        cx: &mut Context<'_>,
        splice: Option<&mut Splice>,
        entered: &mut bool,
    ) -> Poll<Result<(), Failure>> {
        let Exchange { client, request, upload, upstream, node, .. } = &mut *self.exchange;
        if upload.poll(cx, client, &mut upstream.stream).is_err() {
            // The client may still be reading.
            upload.give_up();
        }
        if client.passage.as_ref().is_some_and(Passage::is_to_be_cut) {
            client.worker.shared.metrics.guard.cut.inc();
            tracing::info!(request = %request.name(), node = %node.id(), "an endless answer delays a purge, and is cut");
            return Poll::Ready(Err(Failure::GuardCut));
        }
        if upload.was_refused() {
            self.download.body.source_was_reset();
        }
        let mut waits_for_client = false;
        let polled = self.poll_download(cx, splice, &mut waits_for_client);
        let sent = self.download.body.take_moved();
        self.sent += sent;
        self.exchange.request.trace.sent += sent;
        if let Poll::Ready(result) = polled {
            return Poll::Ready(result.map_err(download_failure));
        }
        let Exchange { client, upload, .. } = &mut *self.exchange;
        let moved = sent + upload.take_moved();
        if let Some(passage) = &client.passage
            && passage.poll_to_be_cut(cx).is_ready()
        {
            cx.waker().wake_by_ref();
        }
        let client_there = match self.poll_client_there(cx) {
            Ok(there) => there,
            Err(gone) => return Poll::Ready(Err(gone)),
        };
        let awaited = self.awaited(waits_for_client, client_there);
        let deadline = &self.exchange.client.deadline;
        if !*entered {
            // Most answers never get here: they complete at the first poll.
            *entered = true;
            deadline.enter(Phase::Body(awaited));
        } else if moved > 0 {
            deadline.advance(moved);
        }
        deadline.poll_body(cx, awaited).map(|interrupt| {
            let late = io::ErrorKind::TimedOut.into();
            let late = match awaited {
                AwaitedSide::Client | AwaitedSide::Either => Failure::ClientGone(late),
                AwaitedSide::Node | AwaitedSide::Event => Failure::CutAnswer(late),
            };
            Err(Failure::interrupted(interrupt, late))
        })
    }

    /// Who owes the next piece. An answer of announced length is no event stream: who has begun it has it.
    fn awaited(&self, waits_for_client: bool, client_there: bool) -> AwaitedSide {
        if waits_for_client {
            AwaitedSide::Client
        } else if self.download.body.has_known_length() {
            AwaitedSide::Node
        } else if client_there {
            AwaitedSide::Event
        } else {
            AwaitedSide::Either
        }
    }

    fn poll_download(
        &mut self,
        cx: &mut Context<'_>,
        splice: Option<&mut Splice>,
        waits_for_client: &mut bool,
    ) -> Poll<Result<(), TransferError>> {
        let Exchange { client, upstream, surplus, .. } = &mut *self.exchange;
        let body = &mut self.download.body;
        let (polled, in_pipe) = match (splice, &mut client.stream) {
            (Some(splice), Stream::Plain(socket)) => {
                let polled = splice.poll(cx, body, &upstream.stream, socket);
                (polled, splice.waits_for_sink())
            }
            (_, stream) => {
                let mut scratch = client.worker.scratch.borrow_mut();
                (body.poll(cx, &mut upstream.stream, stream, &mut scratch, surplus), false)
            }
        };
        *waits_for_client = body.waits_for_sink() || in_pipe;
        polled
    }

    /// Whether the client is certainly still there: it has sent nothing since its request, nor closed. A client that
    /// half-closed may be waiting for its answer or be gone; only a write can tell.
    fn poll_client_there(&mut self, cx: &mut Context<'_>) -> Result<bool, Failure> {
        let Exchange { client, upload, .. } = &mut *self.exchange;
        if !self.client_may_be_gone
            && upload.is_done()
            && let Poll::Ready(gone) = client.stream.poll_gone(cx)
        {
            gone.map_err(Failure::ClientGone)?;
            self.client_may_be_gone = true;
        }
        Ok(!self.client_may_be_gone && upload.is_done())
    }
}

impl Exchange<'_> {
    /// The disposition of the client's connection after this answer. Call it once the input is that of the next
    /// request.
    pub(super) fn after(&mut self, Relayed { keep_alive, sent }: Relayed) -> Disposition {
        if keep_alive {
            Disposition::KeepAlive
        } else if sent <= FIRST_FLIGHT
            && self.upload.is_done()
            && self.request.input.is_empty()
            && !self.client.stream.has_unread()
        {
            Disposition::Close
        } else {
            Disposition::Linger
        }
    }
}
