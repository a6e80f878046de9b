//! One attempt at one node: the body going up, the answer coming down, both from the client's task.
//!
//! It is in one of two states: [`AwaitingHead`] (nothing of an answer has been passed on, and the request may still go
//! elsewhere), then [`Relaying`]. What both need is the [`Exchange`].
//!
//! An answer whose head comes in one piece, as nearly all do, is parsed where it was read, in the worker's scratch buffer.
//! Its head is written anew into the client's buffer, and leaves in one write with what came of the body: from where that
//! was read, or behind the head, where it is so short that a copy costs less.

mod head;
mod page;
mod patience;
mod relay;
mod upload;

use std::io;
use std::mem;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use super::bypass;
use super::client::{Client, Disposition};
use super::deadline::{Interrupt, Phase};
use super::failure::Failure;
use super::request::Request;
use super::transfer::{Outgoing, Transfer, TransferError};
use super::tunnel::tunnel;
use crate::balance::LbContext;
use crate::files::is_ours;
use crate::fleet::{Node, SendProxy};
use crate::http1::{BadHead, Forwarding, Framing, HeadChanges, RequestHead, write_request, write_response};
use crate::proxy_protocol;
use crate::upstream::{NodeConnection, Openness};
use head::{Answer, AwaitingHead, Head};
use relay::Relaying;
use upload::Upload;

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

/// A failed attempt, and what decides about another.
pub(super) struct Failed {
    pub(super) failure: Failure,
    /// Nothing of the request was consumed beyond what is still in the buffers.
    pub(super) untouched: bool,
    /// Not a byte of the request was handed to the node, so it cannot have been carried out.
    pub(super) unsent: bool,
    /// The connection came from the pool.
    pub(super) reused: bool,
}

impl Failed {
    /// A failure before anything of the request was sent.
    fn at_once(failure: Failure) -> Self {
        Failed { failure, untouched: true, unsent: true, reused: false }
    }
}

/// On what terms a request goes to a node.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    /// What it was chosen by.
    pub(super) lb: LbContext,
    /// On a new connection.
    pub(super) fresh: bool,
    /// It may be carried out twice.
    pub(super) is_safe: bool,
    /// It may go to another node if this one goes down. Else it lives as long as its connection does.
    pub(super) may_move: bool,
}

/// Sends the request to this node and its answer to the client.
pub(super) async fn attempt(
    client: &mut Client,
    request: &mut Request,
    node: &Arc<Node>,
    terms: Terms,
) -> Result<Disposition, Failed> {
    if node.spec.role != client.frontend.role {
        if !bypass::admits(&request.head) {
            return Err(Failed::at_once(Failure::BadMethod));
        }
        bypass::ask_for_whole(&mut request.head);
    }
    let _inflight = Inflight::begin(node);
    let owner = (node.spec.send_proxy == SendProxy::V2).then_some(client.peer.socket);
    // What may not be repeated is worth a question to the system whether the connection is open still.
    let ask = if terms.is_safe { Openness::AsKnown } else { Openness::Asked };
    let pooled = if terms.fresh { None } else { client.worker.pools.get(node, owner, ask) };
    let reused = pooled.is_some();
    let upstream = match pooled {
        Some(connection) => connection,
        None => connect(client, node).await.map_err(Failed::at_once)?,
    };
    let mut first = mem::take(&mut request.to_node);
    first.clear();
    if let (Some(owner), false) = (owner, reused) {
        proxy_protocol::write_v2(&mut first, owner, node.spec.address);
    }
    write_head(&mut first, client, &request.head, node);
    let framing = request.head.framing;
    let outgoing = if framing == Framing::Chunked { Outgoing::Chunked } else { Outgoing::AsItIs };
    let body = Transfer::new(client.body_framing(framing), outgoing, first);
    let upload = Upload::new(body.at_most(client.worker.shared.limits.longest_body()));
    let mut exchange =
        Exchange { client, request, node, terms, upstream, upload, asked_for_life: false, surplus: Vec::new() };
    let ended = exchange.run().await;
    let Exchange { client, request, upstream, upload, surplus, asked_for_life, .. } = exchange;
    let (untouched, unsent) = (!upload.has_read(), upload.is_unsent());
    let after = match ended {
        Ok(after) => after,
        Err(failure) => {
            request.to_node = upload.into_buffer();
            request.answer.clear();
            return Err(Failed { failure, untouched, unsent, reused });
        }
    };
    // A connection on which a change of protocol was offered is a tunnel by now, or may be one behind the node: a
    // Varnish pipes it, taken or not, and what follows on it would pass its VCL by.
    let is_as_it_was = !request.head.offers_upgrade() && !asked_for_life;
    if is_as_it_was && request.response.keep_alive && upload.is_done() && surplus.is_empty() {
        client.worker.pools.put(node, upstream, owner, Instant::now());
    }
    request.to_node = upload.into_buffer();
    Ok(after)
}

async fn connect(client: &Client, node: &Arc<Node>) -> Result<NodeConnection, Failure> {
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

fn write_head(out: &mut Vec<u8>, client: &Client, head: &RequestHead, node: &Node) {
    write_request(out, head, forwarding(client, head, node));
}

/// What a node is told about the client.
fn forwarding<'f>(client: &'f Client, head: &RequestHead, node: &Node) -> Forwarding<'f> {
    Forwarding {
        peer: &client.peer.text,
        proto: client.proto(),
        trusted: client.trusted,
        node: node.spec.address,
        received: client.version(head.version),
        offload_header: client.frontend.offload_header.as_deref(),
    }
}

/// One request at one node.
struct Exchange<'e> {
    client: &'e mut Client,
    request: &'e mut Request,
    node: &'e Arc<Node>,
    terms: Terms,
    upstream: NodeConnection,
    upload: Upload,
    /// The connection was asked whether the node is still there, and has limits of its own since.
    asked_for_life: bool,
    /// What the node sent beyond its answer.
    surplus: Vec<u8>,
}

impl Exchange<'_> {
    async fn run(&mut self) -> Result<Disposition, Failure> {
        let head_len = self.request.head.head_len();
        let body = self.upload.feed(&self.request.input[head_len..])?;
        for _ in 0..=MAX_INTERIM {
            match AwaitingHead::new(self).next().await? {
                Head::Interim(len) => self.pass_interim(len).await?,
                Head::Switch(len) => return self.tunnel(head_len, len).await,
                Head::Final(answer) => {
                    let relayed = match answer {
                        Answer::Page => Box::pin(self.relay_page()).await?,
                        Answer::Begun(download) => Relaying::new(self, download).run().await?,
                    };
                    self.request.next(head_len + body);
                    self.upload.give_beyond(&mut self.request.input);
                    return Ok(self.after(relayed));
                }
            }
        }
        Err(Failure::BadAnswer(BadHead::Status))
    }

    /// Whether the answer comes past the caches: then no VCL sees it, and what that would do is done here.
    fn is_bypass(&self) -> bool {
        self.node.spec.role != self.client.frontend.role
    }

    /// Begins the answer: returns what goes before its body, how that is to be framed, and whether the client may send another
    /// request after it.
    fn begin(&mut self) -> Result<Begun, Failure> {
        let is_bypass = self.is_bypass();
        let Request { response, head, guard_mark, to_client, .. } = &mut *self.request;
        let added = if is_bypass { bypass::deliver(response, head) } else { &[] };
        let Client { frontend, passage, .. } = &*self.client;
        let store = frontend.store.as_ref();
        let may_be_stored =
            store.is_none_or(|store| store.may_be_stored(*guard_mark, passage.as_ref(), head, response));
        let changes = HeadChanges { no_store: !may_be_stored, joins_tags: store.is_some(), added };
        let mut first = mem::take(to_client);
        first.clear();
        let willing = head.keep_alive && self.upload.is_done() && self.client.worker.stage() < frontend.drains_at;
        let (outgoing, keep_alive) = self.client.begin_answer(&mut first, response, &changes, head.version, willing)?;
        self.request.status = Some(self.request.response.status);
        Ok(Begun { first, outgoing, keep_alive })
    }

    /// Passes the switch of protocols on, and after it whatever the two sides have to say to each other.
    async fn tunnel(&mut self, request_len: usize, head_len: usize) -> Result<Disposition, Failure> {
        let Request { input, answer, response, head, to_client, status, .. } = &mut *self.request;
        *status = Some(101);
        let mut first = mem::take(to_client);
        first.clear();
        write_response(&mut first, response, &HeadChanges::default(), head.version, true);
        first.extend_from_slice(&answer[head_len..]);
        let early = input.split_off(request_len);
        let Client { stream, deadline, worker, .. } = &mut *self.client;
        tunnel(worker, deadline, (stream, early), (&mut self.upstream.stream, first)).await?;
        Ok(Disposition::Close)
    }
}

/// The beginning of an answer.
struct Begun {
    first: Vec<u8>,
    outgoing: Outgoing,
    keep_alive: bool,
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
