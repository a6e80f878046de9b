//! One attempt at one node: the body going up, the answer coming down, both from the client's task.
//!
//! An answer whose head comes in one piece, as nearly all do, is parsed where it was read, in the worker's scratch buffer.
//! Its head is written anew into the client's buffer, and leaves in one write with what came of the body: from where that
//! was read, or behind the head, where it is so short that a copy costs less.

mod head;
mod page;
mod patience;

use std::io;
use std::mem;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use head::{Came, Held};

use super::StorePolicy;
use super::buffers::Buffers;
use super::bypass;
use super::client::{After, Client};
use super::deadline::{Interrupt, Phase};
use super::failure::Failure;
use super::splice::{self, Splice};
use super::stream::Stream;
use super::transfer::{Transfer, TransferError};
use super::tunnel::tunnel;
use crate::balance::Draw;
use crate::files::is_ours;
use crate::fleet::{Node, SendProxy};
use crate::http1::{BadHead, Forwarding, Framing, HeadChanges, RequestHead, write_request, write_response};
use crate::proxy_protocol;
use crate::purge::Passage;
use crate::upstream::{Connection, Openness};

/// What is on its way to a client as soon as it is written, in bytes: ten segments (RFC 6928). An answer that is no longer
/// than this arrives also where the connection is closed at once and the client turns out to have sent more.
const FIRST_FLIGHT: u64 = 12 * 1024;

/// The most interim heads before an answer. Each starts the wait for the answer anew, so there must be an end of them.
const MAX_INTERIM: usize = 16;

/// A node is busy with a request until its answer is through, not only until it began.
struct Inflight<'n>(&'n Node);

impl<'n> Inflight<'n> {
    fn begin(node: &'n Node) -> Self {
        node.live.request_began();
        Inflight(node)
    }
}

impl Drop for Inflight<'_> {
    fn drop(&mut self) {
        self.0.live.request_ended();
    }
}

/// An attempt whose answer went through.
pub(super) struct Answered {
    pub(super) status: u16,
    pub(super) after: After,
}

/// A failed attempt, and what decides about another.
pub(super) struct Failed {
    pub(super) failure: Failure,
    /// The status of the answer, where one had begun.
    pub(super) status: Option<u16>,
    /// Nothing of the request was consumed beyond what is still in the buffers.
    pub(super) untouched: bool,
    /// Not a byte of the request was handed to the node, so it cannot have been carried out.
    pub(super) unsent: bool,
    /// The connection came from the pool.
    pub(super) reused: bool,
    /// Who can take the request, if that is known already.
    pub(super) other: Option<Arc<Node>>,
}

/// On what terms a request goes to a node.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    /// What it was chosen by.
    pub(super) draw: Draw,
    /// On a new connection.
    pub(super) fresh: bool,
    /// It may be carried out twice.
    pub(super) is_safe: bool,
    /// It may go to another node if this one goes down. Else it lives as long as its connection does.
    pub(super) may_move: bool,
}

/// Sends the request in `buffers` to this node and its answer to the client.
pub(super) async fn attempt(
    client: &mut Client,
    buffers: &mut Buffers,
    node: &Arc<Node>,
    terms: Terms,
) -> Result<Answered, Failed> {
    if node.spec.role != client.frontend.role {
        if !bypass::admits(&buffers.request) {
            let failure = Failure::BadMethod;
            return Err(Failed { failure, status: None, untouched: true, unsent: true, reused: false, other: None });
        }
        bypass::ask_for_whole(&mut buffers.request);
    }
    let _inflight = Inflight::begin(node);
    let owner = (node.spec.send_proxy == SendProxy::V2).then_some(client.peer.socket);
    // What may not be repeated is worth a question to the system whether the connection is open still.
    let ask = if terms.is_safe { Openness::AsKnown } else { Openness::Asked };
    let pooled = if terms.fresh { None } else { client.worker.pools.take(node, owner, ask) };
    let reused = pooled.is_some();
    let upstream = match pooled {
        Some(connection) => connection,
        None => connect(client, node).await.map_err(|failure| Failed {
            failure,
            status: None,
            untouched: true,
            unsent: true,
            reused,
            other: None,
        })?,
    };
    let mut first = mem::take(&mut buffers.to_node);
    first.clear();
    if let (Some(owner), false) = (owner, reused) {
        proxy_protocol::write_v2(&mut first, owner, node.spec.address);
    }
    write_head(&mut first, client, buffers, node);
    let request = &buffers.request;
    let max_body = client.worker.shared.limits.longest_body();
    let chunked = request.framing == Framing::Chunked;
    let upload = Transfer::new(client.body_framing(request.framing), chunked, first).at_most(max_body);
    let mut exchange = Exchange {
        client,
        buffers,
        node,
        terms,
        upstream,
        upload,
        unsent: true,
        upload_broken: false,
        node_was_reset: false,
        held: None,
        held_since: 0,
        is_page: false,
        client_may_be_gone: false,
        asked_for_life: false,
        other: None,
        download: Transfer::new(Framing::None, false, Vec::new()),
        status: None,
        keep_alive: false,
        sent: 0,
        beyond: Vec::new(),
        surplus: Vec::new(),
    };
    match exchange.run().await {
        Ok(answered) => {
            let Exchange { client, buffers, upstream, upload, download, surplus, .. } = exchange;
            // A connection on which a change of protocol was offered is a tunnel by now, or may be one behind the node: a
            // Varnish pipes it, taken or not, and what follows on it would pass its VCL by.
            let is_http = !buffers.request.offers_upgrade();
            if is_http && buffers.response.keep_alive && upload.is_done() && surplus.is_empty() {
                client.worker.pools.give(node, upstream, owner, Instant::now());
            }
            buffers.to_node = upload.into_buffer();
            buffers.to_client = download.into_buffer();
            Ok(answered)
        }
        Err(failure) => {
            let untouched = !exchange.upload.has_read;
            let Exchange { buffers, upload, status, unsent, other, .. } = exchange;
            buffers.to_node = upload.into_buffer();
            buffers.answer.clear();
            Err(Failed { failure, status, untouched, unsent, reused, other })
        }
    }
}

async fn connect(client: &Client, node: &Arc<Node>) -> Result<Connection, Failure> {
    client.deadline.enter_with(Phase::Connect, node);
    let worker = &client.worker;
    let room = worker.shared.files_of(client.frontend.role).nodes;
    let file = match room.try_take(1) {
        Some(file) => file,
        None => {
            worker.close_unused();
            let file = while_connecting(client, room.take()).await.map_err(|interrupt| match interrupt {
                Interrupt::NodeDown => Failure::Connect(io::ErrorKind::TimedOut.into()),
                _ => Failure::NoFiles,
            })?;
            // The wait was ours, and takes nothing of the node's time.
            client.deadline.enter_with(Phase::Connect, node);
            file
        }
    };
    match while_connecting(client, worker.pools.connect(node, file)).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) if is_ours(&error) => Err(Failure::NoPort(error)),
        Ok(Err(error)) => Err(Failure::Connect(error)),
        Err(_interrupt) => {
            worker.pools.count_connect_error(node);
            Err(Failure::Connect(io::ErrorKind::TimedOut.into()))
        }
    }
}

/// Runs a step of connecting to its end or to the end of the wait. A node that left may take who comes now all the same.
async fn while_connecting<F: Future>(client: &Client, step: F) -> Result<F::Output, Interrupt> {
    let mut step = pin!(step);
    loop {
        match client.deadline.limit(step.as_mut()).await {
            Err(Interrupt::NodeGone) => client.deadline.go_on_without_node(),
            ended => return ended,
        }
    }
}

fn write_head(out: &mut Vec<u8>, client: &Client, buffers: &Buffers, node: &Node) {
    let fallback_host = fallback_host(&buffers.request, node);
    let forwarding = forwarding(client, &buffers.request, &fallback_host);
    write_request(out, &buffers.request, forwarding);
}

/// The host for a request that names none.
fn fallback_host(request: &RequestHead, node: &Node) -> String {
    if request.host().is_some() { String::new() } else { node.spec.address.to_string() }
}

/// What a node is told about the client.
fn forwarding<'f>(client: &'f Client, request: &RequestHead, fallback_host: &'f str) -> Forwarding<'f> {
    Forwarding {
        peer: &client.peer.text,
        proto: client.proto(),
        trusted: client.trusted,
        fallback_host,
        received: client.version(request.version),
        offload_header: &client.frontend.offload_header,
    }
}

/// One request at one node: the body going up, the answer coming down, both from the client's task.
struct Exchange<'e> {
    client: &'e mut Client,
    buffers: &'e mut Buffers,
    node: &'e Arc<Node>,
    terms: Terms,
    upstream: Connection,
    upload: Transfer,
    /// Not a byte of the request was handed to the system for the node.
    unsent: bool,
    /// The node takes no more of the body; its answer may come all the same.
    upload_broken: bool,
    /// A write to the node failed.
    node_was_reset: bool,
    /// A page that waits for its end, and how much of it has come since that was last taken.
    held: Option<Held>,
    held_since: u64,
    /// The answer is a page that is to be filled in; what has come of its body is in `answer`.
    is_page: bool,
    /// The client has sent something behind its request, perhaps its end.
    client_may_be_gone: bool,
    /// The connection was asked whether the node is still there.
    asked_for_life: bool,
    /// The node that can take the request in place of this one, which went down.
    other: Option<Arc<Node>>,
    /// The body of the final answer, once its head is here.
    download: Transfer,
    /// The status of that answer.
    status: Option<u16>,
    /// The client may send another request after this answer.
    keep_alive: bool,
    /// How much of the answer was written.
    sent: u64,
    /// What the client sent beyond this request.
    beyond: Vec<u8>,
    /// What the node sent beyond its answer.
    surplus: Vec<u8>,
}

impl Exchange<'_> {
    async fn run(&mut self) -> Result<Answered, Failure> {
        let head_len = self.buffers.request.len();
        let body = self.upload.feed(&self.buffers.input[head_len..]).map_err(upload_failure)?;
        for _ in 0..=MAX_INTERIM {
            match self.next_head().await? {
                Came::Interim(len) => self.pass_interim(len).await?,
                Came::Switch(len) => {
                    self.tunnel(head_len, len).await?;
                    return Ok(Answered { status: 101, after: After::Close });
                }
                Came::Final => {
                    if self.is_page {
                        Box::pin(self.forward_page()).await?;
                    } else {
                        self.forward_answer().await?;
                    }
                    self.buffers.next_request(head_len + body);
                    self.buffers.input.append(&mut self.beyond);
                    return Ok(Answered { status: self.buffers.response.status, after: self.after() });
                }
            }
        }
        Err(Failure::BadAnswer(BadHead::Status))
    }

    fn after(&mut self) -> After {
        if self.keep_alive {
            After::KeepAlive
        } else if self.sent <= FIRST_FLIGHT
            && self.upload.is_done()
            && self.buffers.input.is_empty()
            && !self.client.stream.has_unread()
        {
            After::Close
        } else {
            After::Linger
        }
    }

    /// Moves the request on. A node that takes no more may have answered already, so that is no failure yet.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        if self.upload_broken || self.upload.is_done() {
            return Ok(());
        }
        let mut scratch = self.client.worker.scratch.borrow_mut();
        let stream = &mut self.client.stream;
        let polled = self.upload.poll(cx, stream, &mut self.upstream.stream, &mut scratch, &mut self.beyond);
        self.unsent = self.unsent && self.upload.moved == 0;
        match polled {
            Poll::Ready(Err(TransferError::Sink(_))) => {
                self.upload_broken = true;
                self.node_was_reset = true;
                Ok(())
            }
            Poll::Ready(Err(error)) => Err(upload_failure(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }

    /// Whether the answer comes past the caches: then no VCL sees it, and what that would do is done here.
    fn is_bypass(&self) -> bool {
        self.node.spec.role != self.client.frontend.role
    }

    /// Begins the answer.
    fn open_download(&mut self) -> Result<Transfer, Failure> {
        let framing = self.buffers.response.framing;
        let (first, chunked) = self.begin()?;
        Ok(Transfer::new(framing, chunked, first))
    }

    /// The same with a body of whatever kind: returns what goes before it, and whether it is to be chunked.
    fn begin(&mut self) -> Result<(Vec<u8>, bool), Failure> {
        let is_bypass = self.is_bypass();
        let Buffers { response, request, guard_mark, to_client, .. } = &mut *self.buffers;
        let added = if is_bypass { bypass::deliver(response, request) } else { &[] };
        let Client { frontend, passage, .. } = &*self.client;
        let may_be_stored =
            |store: &StorePolicy| store.may_be_stored(*guard_mark, passage.as_ref(), request, response);
        let no_store = !frontend.store.as_ref().is_none_or(may_be_stored);
        let changes = HeadChanges { no_store, joins_tags: frontend.store.is_some(), added };
        let mut first = mem::take(to_client);
        first.clear();
        let willing = request.keep_alive && self.upload.is_done() && self.client.worker.stage() < frontend.drains_at;
        let (chunked, keep_alive) = self.client.begin_answer(&mut first, response, &changes, request.version, willing)?;
        self.keep_alive = keep_alive;
        self.status = Some(response.status);
        Ok((first, chunked))
    }

    /// Passes the final answer on to its end.
    async fn forward_answer(&mut self) -> Result<(), Failure> {
        let worker = Rc::clone(&self.client.worker);
        let mut entered = false;
        let is_long = self.download.length_left().is_some_and(|left| left >= splice::WORTHWHILE);
        let mut splice = if is_long && self.client.stream.is_plain() {
            worker.pipes.begin(worker.shared.files_of(self.client.frontend.role).nodes)
        } else {
            None
        };
        let end = std::future::poll_fn(|cx| {
            if self.poll_upload(cx).is_err() {
                // The client broke off its request, but may still read: the answer decides.
                self.upload_broken = true;
            }
            if self.client.passage.as_ref().is_some_and(Passage::is_to_be_cut) {
                self.client.worker.shared.metrics.guard.cut.inc();
                tracing::info!(node = %self.node.id(), "an answer that a purge waits for has no end, and is cut");
                return Poll::Ready(Err(Failure::CutAnswer(io::ErrorKind::TimedOut.into())));
            }
            self.download.source_was_reset = self.node_was_reset;
            let polled = self.poll_download(cx, splice.as_mut());
            let sent = mem::take(&mut self.download.moved);
            self.sent += sent;
            if let Poll::Ready(result) = polled {
                return Poll::Ready(result.map_err(download_failure));
            }
            let moved = sent + mem::take(&mut self.upload.moved);
            if !entered {
                // Most answers never get here: they are through at the first try.
                entered = true;
                self.client.deadline.enter(Phase::Body);
            } else if moved > 0 {
                self.client.deadline.advance(moved);
            }
            let for_client = self.download.waits_for_sink() || splice.as_ref().is_some_and(Splice::waits_for_sink);
            let client_there = match self.poll_client_there(cx) {
                Ok(there) => there,
                Err(gone) => return Poll::Ready(Err(gone)),
            };
            let late = |_| {
                let late = io::ErrorKind::TimedOut.into();
                Err(if for_client || !client_there { Failure::ClientGone(late) } else { Failure::CutAnswer(late) })
            };
            self.client.deadline.poll_answer(cx, for_client, client_there).map(late)
        })
        .await;
        if let Some(splice) = splice {
            worker.pipes.give_back(splice);
        }
        end
    }

    /// Whether the client is certain to be there still: it has sent nothing since its request, no end either. Who has said
    /// that it ends may wait for its answer, or be gone; nobody knows before something is written to it.
    fn poll_client_there(&mut self, cx: &mut Context<'_>) -> Result<bool, Failure> {
        if !self.client_may_be_gone
            && self.upload.is_done()
            && let Poll::Ready(gone) = self.client.stream.poll_gone(cx)
        {
            gone.map_err(Failure::ClientGone)?;
            self.client_may_be_gone = true;
        }
        Ok(!self.client_may_be_gone && self.upload.is_done())
    }

    fn poll_download(&mut self, cx: &mut Context<'_>, splice: Option<&mut Splice>) -> Poll<Result<(), TransferError>> {
        if let (Some(splice), Stream::Plain(client)) = (splice, &mut self.client.stream) {
            return splice.poll(cx, &mut self.download, &self.upstream.stream, client);
        }
        let mut scratch = self.client.worker.scratch.borrow_mut();
        self.download.poll(cx, &mut self.upstream.stream, &mut self.client.stream, &mut scratch, &mut self.surplus)
    }

    /// Passes the switch of protocols on, and after it whatever the two sides have to say to each other.
    async fn tunnel(&mut self, request_len: usize, head_len: usize) -> Result<(), Failure> {
        let Buffers { input, answer, response, request, to_client, .. } = &mut *self.buffers;
        self.status = Some(101);
        let mut first = mem::take(to_client);
        first.clear();
        write_response(&mut first, response, &HeadChanges::default(), request.version, true);
        first.extend_from_slice(&answer[head_len..]);
        let early = input.split_off(request_len);
        let Client { stream, deadline, worker, .. } = &mut *self.client;
        tunnel(worker, deadline, (stream, early), (&mut self.upstream.stream, first)).await
    }
}

fn upload_failure(error: TransferError) -> Failure {
    match error {
        TransferError::Source(error) => Failure::ClientGone(error),
        TransferError::Frame(reason) => Failure::BadBody(reason),
        TransferError::TooLong => Failure::BodyTooLarge,
        TransferError::Sink(error) => Failure::NoAnswer(error),
    }
}

fn download_failure(error: TransferError) -> Failure {
    match error {
        TransferError::Source(error) => Failure::CutAnswer(error),
        TransferError::Frame(reason) => Failure::BadAnswerBody(reason),
        // Answers may be as long as they like.
        TransferError::TooLong => Failure::CutAnswer(io::ErrorKind::FileTooLarge.into()),
        TransferError::Sink(error) => Failure::ClientGone(error),
    }
}
