//! One attempt at one node: request body up, answer down, both from the client's task.
//!
//! An attempt is in one of two states: [`AwaitingHead`] (the client has seen no final head, and the request may still
//! be retried on another node), then [`Relaying`]. Both share the [`Exchange`].
//!
//! An answer whose head arrives in one read, as nearly all do, is parsed in place, in the worker's scratch buffer. Its
//! head is rewritten into the client's buffer and sent in one write with the part of the body already read: directly
//! from the scratch buffer, or copied behind the head if it is so short that a copy costs less.

mod head;
mod page;
mod patience;
mod relay;
mod upload;

use std::io;
use std::mem;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use prometheus::IntGauge;

use super::Frontend;
use super::bypass;
use super::client::{Client, Disposition};
use super::deadline::{Interrupt, Phase};
use super::failure::Failure;
use super::request::Request;
use super::trace::{RequestPhase, Trace};
use super::transfer::{Outgoing, Transfer, TransferError};
use super::tunnel::tunnel;
use super::worker::Worker;
use crate::balance::LbContext;
use crate::files::is_ours;
use crate::fleet::{AskedCache, Node, Role, SendProxy};
use crate::http1::{BadHead, Forwarding, Framing, RequestHead, ResponseHead, write_request, write_response};
use crate::proxy_protocol;
use crate::upstream::{Openness, UpstreamConnection};
use head::{AwaitingHead, NodeHead};
use relay::Relaying;
use upload::Upload;

/// The most interim heads before an answer. Each restarts the timeout for the answer, so their number must be bounded.
const MAX_INTERIM: usize = 16;

/// A request that waits for a file.
struct AwaitsFile<'g>(&'g IntGauge);

impl<'g> AwaitsFile<'g> {
    fn begin(length: &'g IntGauge) -> Self {
        length.inc();
        AwaitsFile(length)
    }
}

impl Drop for AwaitsFile<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A failed attempt, with what decides whether to retry.
pub(super) struct FailedAttempt {
    pub(super) failure: Failure,
    /// No part of the request was consumed, except what is still in the buffers.
    pub(super) untouched: bool,
    /// No byte of the request was sent to the node, so the node cannot have executed it.
    pub(super) unsent: bool,
    /// The connection came from the pool.
    pub(super) reused: bool,
}

impl FailedAttempt {
    /// A failure before any byte of the request was sent.
    fn at_once(failure: Failure) -> Self {
        FailedAttempt { failure, untouched: true, unsent: true, reused: false }
    }
}

/// How a request may be sent to a node, and what has become of it before.
#[derive(Default)]
pub(super) struct Terms {
    /// The input of the node selection.
    pub(super) lb: LbContext,
    /// Use a new connection, not a pooled one.
    pub(super) fresh: bool,
    /// The request may be executed twice.
    pub(super) is_safe: bool,
    /// A stale answer of a cache is taken as it is.
    pub(super) takes_stale: bool,
    /// Another node was asked before.
    pub(super) elsewhere: bool,
    /// A node may have begun to carry it out.
    pub(super) may_have_begun: bool,
}

impl Terms {
    /// Whether the request may be retried on another node if this one goes down. Otherwise it lives as long as its connection.
    fn may_move(&self) -> bool {
        self.is_safe && !self.elsewhere
    }
}

/// Sends the request to this node, where it is counted ([`NodePermit`](super::node_permit::NodePermit)), and its answer to the client.
pub(super) async fn attempt(
    client: &mut Client,
    request: &mut Request,
    node: &Arc<Node>,
    terms: &Terms,
) -> Result<Disposition, FailedAttempt> {
    if node.spec.role() != client.frontend.role {
        if !bypass::admits(&request.head) {
            return Err(FailedAttempt::at_once(Failure::BadMethod));
        }
        bypass::ask_for_whole(&mut request.head);
    }
    request.asked_cache = AskedCache::default();
    note_asked_cache(client, request, node);
    // What may not be repeated is worth a question to the system whether the connection is open still.
    let ask = if terms.is_safe { Openness::AsKnown } else { Openness::Asked };
    let pooled = || client.worker.pools.get(node, owner(client, node), ask);
    let (upstream, reused) = match (!terms.fresh).then(pooled).flatten() {
        Some(connection) => (connection, true),
        None => (Box::pin(connect(client, node, &mut request.trace)).await.map_err(FailedAttempt::at_once)?, false),
    };
    request.trace.phase = RequestPhase::Headers;
    let upload = begin_upload(client, request, node, owner(client, node).filter(|_| !reused));
    let mut exchange =
        Exchange { client, request, node, terms, upstream, upload, asked_for_life: false, surplus: Vec::new() };
    let ended = exchange.run().await;
    let Exchange { request, upload, surplus, asked_for_life, .. } = &mut exchange;
    // A tunnel has counted its own.
    let body = request.longest_body - upload.allowance_left();
    request.trace.body_read = request.trace.body_read.max(body);
    let after = match ended {
        Ok(after) => after,
        Err(failure) => {
            let (untouched, unsent) = (!upload.has_read(), upload.is_unsent());
            request.to_node = upload.take_buffer();
            request.answer.clear();
            return Err(FailedAttempt { failure, untouched, unsent, reused });
        }
    };
    // A connection on which an upgrade was offered may be a tunnel by now, perhaps only behind the node: Varnish pipes
    // such a request whether the upgrade is accepted or not, and later requests on it would bypass its VCL.
    let is_as_it_was = !request.head.offers_upgrade() && !*asked_for_life;
    let is_kept = is_as_it_was && request.response.keep_alive && upload.is_done() && surplus.is_empty();
    request.to_node = upload.take_buffer();
    if is_kept {
        exchange.client.worker.pools.put(node, exchange.upstream, owner(exchange.client, node));
    }
    Ok(after)
}

async fn connect(client: &Client, node: &Arc<Node>, trace: &mut Trace) -> Result<UpstreamConnection, Failure> {
    client.deadline.enter_with(Phase::Connect, node);
    let mut began = Instant::now();
    let worker = &client.worker;
    let room = worker.shared.files_of(client.frontend.role).nodes;
    let file = match room.try_take(1) {
        Some(file) => file,
        None => {
            worker.close_unused();
            trace.phase = RequestPhase::Queue;
            let waiting = AwaitsFile::begin(worker.shared.metrics.queue.for_files(client.frontend.role));
            let file = while_connecting(client, room.take()).await.map_err(|interrupt| match interrupt {
                Interrupt::NodeDown => Failure::Connect(io::ErrorKind::TimedOut.into()),
                other => Failure::interrupted(other, Failure::NoFiles),
            })?;
            drop(waiting);
            // Time spent waiting for a free file is not charged to the node.
            client.deadline.enter_with(Phase::Connect, node);
            trace.phase = RequestPhase::Connect;
            let waited_until = Instant::now();
            trace.waited = waited_until - began;
            began = waited_until;
            file
        }
    };
    let connected = while_connecting(client, worker.pools.connect(node, file)).await;
    trace.connected = began.elapsed();
    match connected {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) if is_ours(&error) => Err(Failure::NoPort(error)),
        Ok(Err(error)) => Err(Failure::Connect(error)),
        Err(Interrupt::Overdue) => Err(Failure::DeadlineExceeded),
        Err(_late_or_down) => {
            worker.pools.count_connect_error(node);
            Err(Failure::Connect(io::ErrorKind::TimedOut.into()))
        }
    }
}

/// Runs a step of connecting until it completes or times out. A node that has left the fleet may still take the
/// connection.
async fn while_connecting<F: Future>(client: &Client, step: F) -> Result<F::Output, Interrupt> {
    let mut step = pin!(step);
    loop {
        match client.deadline.limit(step.as_mut()).await {
            Err(Interrupt::NodeGone) => client.deadline.go_on_without_node(),
            ended => return ended,
        }
    }
}

/// Notes what is known of a cache whose answer is judged.
fn note_asked_cache(client: &Client, request: &mut Request, node: &Node) {
    if client.frontend.freshness.is_some() && node.spec.role() == Role::Varnish {
        request.asked_cache = node.live.asked_cache(request.asked_cache);
    }
}

fn write_head(out: &mut Vec<u8>, client: &Client, request: &mut Request, node: &Node) {
    // It may be another one since it was picked.
    note_asked_cache(client, request, node);
    let Request { head, id, known, asked, trace, .. } = request;
    asked.clear();
    if let Some(freshness) = client.frontend.freshness.as_ref().filter(|_| node.spec.role() == Role::Varnish) {
        freshness.write_asked(asked, id.short(), *known, head);
    }
    write_request(out, head, Forwarding { asked, ..forwarding(client, head, trace, node) });
}

/// The only client that may use a connection to this node, if the node is told the client's address.
fn owner(client: &Client, node: &Node) -> Option<SocketAddr> {
    (node.spec.send_proxy() == SendProxy::V2).then_some(client.peer.socket)
}

/// The upload of the request to this node. `new_owner`: the connection is new, and begins with this client's address.
fn begin_upload(client: &Client, request: &mut Request, node: &Node, new_owner: Option<SocketAddr>) -> Upload {
    let mut first = mem::take(&mut request.to_node);
    first.clear();
    if let Some(owner) = new_owner {
        proxy_protocol::write_v2(&mut first, owner, node.spec.address);
    }
    write_head(&mut first, client, request, node);
    let framing = request.head.framing;
    let outgoing = if framing == Framing::Chunked { Outgoing::Chunked } else { Outgoing::AsItIs };
    let body = Transfer::new(client.body_framing(framing), outgoing, first);
    Upload::new(body.at_most(request.longest_body))
}

/// What a node is told about the client and its request.
fn forwarding<'f>(client: &'f Client, head: &RequestHead, trace: &'f Trace, node: &Node) -> Forwarding<'f> {
    Forwarding {
        peer: &client.peer.text,
        proto: client.proto(),
        trusted: client.trusted,
        node: node.spec.address,
        received: client.version(head.version),
        offload_header: client.frontend.offload_header.as_deref(),
        asked: b"",
        request_id: &trace.id,
        traceparent: trace.traceparent(),
    }
}

/// One request on one node.
struct Exchange<'e> {
    client: &'e mut Client,
    request: &'e mut Request,
    node: &'e Arc<Node>,
    terms: &'e Terms,
    upstream: UpstreamConnection,
    upload: Upload,
    /// Keepalive probes were enabled on the connection, which changed its socket options.
    asked_for_life: bool,
    /// Bytes from the node after the end of its answer.
    surplus: Vec<u8>,
}

impl Exchange<'_> {
    /// Rare steps are boxed, so that the state of a request stays small: it is allocated for each, see `handle`.
    async fn run(&mut self) -> Result<Disposition, Failure> {
        let head_len = self.request.head.head_len();
        let body = self.upload.feed(&self.request.input[head_len..])?;
        for _ in 0..=MAX_INTERIM {
            let head = AwaitingHead::new(self).next().await?;
            let relayed = match head {
                NodeHead::Interim(len) => {
                    Box::pin(self.pass_interim(len)).await?;
                    continue;
                }
                NodeHead::Switch(len) => return Box::pin(self.tunnel(head_len, len)).await,
                NodeHead::Page => Box::pin(self.relay_page()).await?,
                NodeHead::Block => {
                    let download = Box::pin(self.note_block()).await?;
                    Relaying::new(self, download).run().await?
                }
                NodeHead::Begun(download) => Relaying::new(self, download).run().await?,
            };
            self.request.next(head_len + body);
            self.upload.give_beyond(&mut self.request.input);
            return Ok(self.after(relayed));
        }
        Err(Failure::BadAnswer(BadHead::Status))
    }

    /// Whether the answer bypasses the caches: no VCL sees it, so the VCL's work is done here.
    fn is_bypass(&self) -> bool {
        self.node.spec.role() != self.client.frontend.role
    }

    /// Begins the answer: returns the answer's head, the framing of its body, and whether the client may send another
    /// request after it.
    fn begin(&mut self) -> Result<Begun, Failure> {
        let is_bypass = self.is_bypass();
        let Request { response, head, id, mark, to_client, trace, .. } = &mut *self.request;
        if is_bypass {
            bypass::deliver(response, head);
        }
        let strict_transport = self.client.strict_transport(head);
        if !strict_transport.is_empty() {
            response.set_strict_transport(strict_transport);
        }
        let Client { frontend, passage, worker, .. } = &*self.client;
        note_answer(worker, frontend, trace, response);
        if let Some(store) = &frontend.store {
            store.prepare(mark, id.short(), passage.as_ref(), head, response);
        }
        let mut first = mem::take(to_client);
        first.clear();
        let willing = head.keep_alive && self.upload.is_done() && self.client.worker.stage() < frontend.drains_at;
        let (outgoing, keep_alive) = self.client.begin_answer(&mut first, response, head.version, willing)?;
        self.request.status = Some(self.request.response.status);
        self.request.trace.head_sent = first.len() as u64;
        Ok(Begun { first, outgoing, keep_alive })
    }

    /// Forwards the 101, then all bytes in both directions.
    async fn tunnel(&mut self, request_len: usize, head_len: usize) -> Result<Disposition, Failure> {
        let Request { input, answer, response, head, to_client, status, trace, .. } = &mut *self.request;
        let Client { stream, deadline, worker, frontend, .. } = &mut *self.client;
        *status = Some(101);
        note_answer(worker, frontend, trace, response);
        let mut first = mem::take(to_client);
        first.clear();
        write_response(&mut first, response, head.version, true);
        trace.head_sent = first.len() as u64;
        first.extend_from_slice(&answer[head_len..]);
        let early = input.split_off(request_len);
        let ended = tunnel(worker, deadline, trace, (stream, early), (&mut self.upstream.stream, first)).await;
        ended?;
        Ok(Disposition::Close)
    }
}

/// Notes that the head of the answer is complete, and names the request in it.
fn note_answer(worker: &Worker, frontend: &Frontend, trace: &mut Trace, response: &mut ResponseHead) {
    trace.phase = RequestPhase::Data;
    if worker.has_access_log() {
        trace.answered = Some(Instant::now());
        // A cache would keep the id with the page, and the edge has one for each reader.
        if frontend.role == Role::Varnish {
            response.set_request_id(&trace.id);
        }
    }
}

/// The start of an answer.
struct Begun {
    first: Vec<u8>,
    outgoing: Outgoing,
    keep_alive: bool,
}

fn download_failure(error: TransferError) -> Failure {
    match error {
        TransferError::Source(error) => Failure::CutAnswer(error),
        TransferError::Frame(reason) => Failure::BadAnswerBody(reason),
        // An answer's length is not limited.
        TransferError::TooLong => Failure::CutAnswer(io::ErrorKind::FileTooLarge.into()),
        TransferError::Sink(error) => Failure::ClientGone(error),
    }
}
