//! The request path: `handle` never fails, `try_handle` is what happens.

use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::buffers::Buffers;
use super::connection::Client;
use super::deadline::{Interrupt, Phase};
use super::failure::Failure;
use super::transfer::{Transfer, TransferError};
use super::{MAX_ANSWER_HEAD, Route};
use crate::fleet::Node;
use crate::http1::{
    BadHead, Forwarding, Framing, HeadScan, Method, Version, error_response, write_request, write_response,
};

/// How much is read at once while the head of an answer is awaited: enough that most answers come in one piece.
const ANSWER_READ: usize = 32 * 1024;

/// What becomes of the client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// The next request may come.
    KeepAlive,
    /// It ends, and there is nobody to wait for.
    Close,
    /// It ends once the client has everything: that may still be sending, even what nobody asked for.
    Linger,
    /// It is cut, so that what was sent does not look complete.
    Reset,
}

/// What is known of a request when it is over, for metrics and logs.
#[derive(Default)]
struct Outcome {
    /// The node that answered, and the status that the client saw. 0 while nothing was sent.
    node: Option<Arc<Node>>,
    status: u16,
}

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

/// Carries out the request whose head is `buffers.input[..len]`.
pub(super) async fn handle<R: Route>(client: &mut Client<R>, buffers: &mut Buffers, len: usize) -> After {
    let began = Instant::now();
    let mut outcome = Outcome::default();
    let after = match try_handle(client, buffers, len, &mut outcome).await {
        Ok(after) => after,
        Err(failure) => respond_to(client, buffers, &failure, &mut outcome).await,
    };
    count(client, &outcome, began);
    after
}

/// Answers bytes that never became a request.
pub(super) async fn refuse<R: Route>(client: &mut Client<R>, buffers: &mut Buffers, failure: &Failure) -> After {
    let began = Instant::now();
    let mut outcome = Outcome::default();
    buffers.request.method = Method::Get;
    let after = respond_to(client, buffers, failure, &mut outcome).await;
    count(client, &outcome, began);
    after
}

fn count<R: Route>(client: &Client<R>, outcome: &Outcome, began: Instant) {
    let listener = client.worker.shared.metrics.listener(R::ROLE);
    listener.duration.observe(began.elapsed().as_secs_f64());
    match &outcome.node {
        Some(node) if node.spec.role == R::ROLE => client.worker.pools.metrics(node).answered(outcome.status),
        Some(node) => listener.bypassed(outcome.status, node.id()),
        // A client that left before any answer counts as nginx counts it.
        None => listener.answered_by_us(if outcome.status == 0 { 499 } else { outcome.status }),
    }
}

async fn try_handle<R: Route>(
    client: &mut Client<R>,
    buffers: &mut Buffers,
    len: usize,
    outcome: &mut Outcome,
) -> Result<After, Failure> {
    buffers.request.parse(&buffers.input, len).map_err(Failure::BadHead)?;
    if !client.route.admits(buffers.request.method) {
        return Err(Failure::BadMethod);
    }
    let draw = client.worker.draw(client.route.key(&buffers.request, &buffers.input));
    let idempotent = buffers.request.method.is_idempotent();

    let mut node = {
        let fleet = client.worker.shared.fleet.load();
        client.route.pick(&fleet, draw, None).map_err(Failure::NoNode)?
    };
    let (mut fresh, mut elsewhere) = (false, false);
    loop {
        let Failed { failure, untouched, reused } = match attempt(client, buffers, &node, fresh, outcome).await {
            Ok(after) => return Ok(after),
            Err(failed) => failed,
        };
        client.worker.suspect(&node, &failure);
        let Some(reason) = failure.retry_reason(untouched, idempotent) else { return Err(failure) };
        if reused && matches!(failure, Failure::NoAnswer(_)) {
            // The node closed a connection that it had kept for us: its good right. The same node again.
            fresh = true;
        } else if elsewhere {
            return Err(failure);
        } else {
            elsewhere = true;
            let fleet = client.worker.shared.fleet.load();
            let Ok(next) = client.route.pick(&fleet, draw, Some(node.key)) else { return Err(failure) };
            node = next;
        }
        client.worker.shared.metrics.retried(R::ROLE, reason);
        tracing::debug!(node = %node.id(), reason, "request is tried again");
    }
}

/// A failed attempt, and what decides about another.
struct Failed {
    failure: Failure,
    /// Nothing of the request was consumed beyond what is still in the buffers.
    untouched: bool,
    /// The connection came from the pool.
    reused: bool,
}

async fn attempt<R: Route>(
    client: &mut Client<R>,
    buffers: &mut Buffers,
    node: &Arc<Node>,
    fresh: bool,
    outcome: &mut Outcome,
) -> Result<After, Failed> {
    let _inflight = Inflight::begin(node);
    let pooled = if fresh { None } else { client.worker.pools.take(node) };
    let reused = pooled.is_some();
    let upstream = match pooled {
        Some(stream) => stream,
        None => connect(client, node).await.map_err(|failure| Failed { failure, untouched: true, reused })?,
    };
    let request = &buffers.request;
    let mut first = mem::take(&mut buffers.to_node);
    first.clear();
    let address;
    let fallback_host = match request.host {
        Some(_) => "",
        None => {
            address = node.spec.address.to_string();
            &address
        }
    };
    let forwarding = Forwarding { peer: &client.peer, proto: "http", trusted: client.trusted, fallback_host };
    write_request(&mut first, request, &buffers.input, forwarding);
    let upload = Transfer::new(request.framing, request.framing == Framing::Chunked, first);
    let mut exchange =
        Exchange { client, buffers, node, upstream, upload, upload_broken: false, reusable: false, beyond: Vec::new() };
    match exchange.run(outcome).await {
        Ok(after) => {
            if exchange.reusable {
                exchange.client.worker.pools.give(node, exchange.upstream, Instant::now());
            }
            Ok(after)
        }
        Err(failure) => {
            let untouched = !exchange.upload.has_read;
            exchange.buffers.to_node = exchange.upload.into_buffer();
            exchange.buffers.answer.clear();
            Err(Failed { failure, untouched, reused })
        }
    }
}

async fn connect<R: Route>(client: &Client<R>, node: &Arc<Node>) -> Result<TcpStream, Failure> {
    client.deadline.enter_with(Phase::Connect, node);
    match client.deadline.limit(client.worker.pools.connect(node)).await {
        Ok(connected) => connected.map_err(Failure::Connect),
        Err(_interrupt) => {
            client.worker.pools.count_connect_error(node);
            Err(Failure::Connect(io::ErrorKind::TimedOut.into()))
        }
    }
}

/// One request at one node: the body going up, the answer coming down, both from the client's task.
struct Exchange<'e, R> {
    client: &'e mut Client<R>,
    buffers: &'e mut Buffers,
    node: &'e Arc<Node>,
    upstream: TcpStream,
    upload: Transfer,
    /// The node takes no more of the body; its answer may come all the same.
    upload_broken: bool,
    /// The answer came to a clean end: the node's connection can take another request.
    reusable: bool,
    /// What the client sent beyond this request.
    beyond: Vec<u8>,
}

impl<R: Route> Exchange<'_, R> {
    async fn run(&mut self, outcome: &mut Outcome) -> Result<After, Failure> {
        let head_len = self.buffers.request.len;
        let body = self.upload.feed(&self.buffers.input[head_len..]).map_err(upload_failure)?;
        self.receive_head().await?;
        outcome.node = Some(Arc::clone(self.node));
        outcome.status = self.buffers.response.status;
        let after = self.forward_answer().await?;
        self.buffers.to_node =
            mem::replace(&mut self.upload, Transfer::new(Framing::None, false, Vec::new())).into_buffer();
        self.buffers.next_request(head_len + body);
        self.buffers.input.append(&mut self.beyond);
        Ok(after)
    }

    /// Sends the request and waits for the final head of the answer; interim ones are passed on (RFC 9110 section
    /// 15.2), so that a client that waits for `100 Continue` gets the node's and not ours.
    async fn receive_head(&mut self) -> Result<(), Failure> {
        loop {
            let len = self.next_head().await?;
            let Buffers { answer, response, request, to_client, .. } = &mut *self.buffers;
            response.parse(answer, len, request.method).map_err(Failure::BadAnswer)?;
            if !response.is_interim() {
                return Ok(());
            }
            // We never ask for an upgrade: a switch of protocols is not an answer.
            if response.status == 101 {
                return Err(Failure::BadAnswer(BadHead::Status));
            }
            if request.version == Version::Http11 {
                to_client.clear();
                write_response(to_client, response, answer, Version::Http11, true);
                self.client.deadline.enter(Phase::Body);
                write_all(self.client, to_client).await?;
            }
            answer.drain(..len);
        }
    }

    async fn next_head(&mut self) -> Result<usize, Failure> {
        let mut scan = HeadScan::default();
        if let Some(len) = scan.find(&self.buffers.answer, MAX_ANSWER_HEAD).map_err(Failure::BadAnswer)? {
            return Ok(len);
        }
        let mut phase = Phase::Body;
        self.client.deadline.enter_with(phase, self.node);
        std::future::poll_fn(|cx| {
            self.poll_upload(cx)?;
            let deadline = &self.client.deadline;
            if phase == Phase::Body && (self.upload_broken || self.upload.is_done()) {
                phase = Phase::FirstByte;
                deadline.enter_with(phase, self.node);
            } else if mem::take(&mut self.upload.moved) {
                deadline.enter_with(phase, self.node);
            }
            while let Poll::Ready(read) = self.poll_answer(cx) {
                if read.map_err(Failure::NoAnswer)? == 0 {
                    return Poll::Ready(Err(Failure::NoAnswer(io::ErrorKind::UnexpectedEof.into())));
                }
                if let Some(len) = scan.find(&self.buffers.answer, MAX_ANSWER_HEAD).map_err(Failure::BadAnswer)? {
                    return Poll::Ready(Ok(len));
                }
            }
            self.client.deadline.poll(cx).map(|interrupt| {
                Err(match (interrupt, phase) {
                    (Interrupt::NodeDown, _) => Failure::NodeDown,
                    (_, Phase::Body) => Failure::ClientTimeout,
                    _ => Failure::NodeTimeout,
                })
            })
        })
        .await
    }

    /// Moves the request on. A node that takes no more may have answered already, so that is no failure yet.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Result<(), Failure> {
        if self.upload_broken || self.upload.is_done() {
            return Ok(());
        }
        let mut scratch = self.client.worker.scratch.borrow_mut();
        let stream = &mut self.client.stream;
        match self.upload.poll(cx, stream, &mut self.upstream, &mut scratch, &mut self.beyond) {
            Poll::Ready(Err(TransferError::Sink(_))) => {
                self.upload_broken = true;
                Ok(())
            }
            Poll::Ready(Err(error)) => Err(upload_failure(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut scratch = self.client.worker.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch[..ANSWER_READ]);
        match Pin::new(&mut self.upstream).poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(())) => {
                self.buffers.answer.extend_from_slice(buffer.filled());
                Poll::Ready(Ok(buffer.filled().len()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Passes the final answer on to its end, and finds out what both connections are good for afterwards.
    async fn forward_answer(&mut self) -> Result<After, Failure> {
        let Buffers { answer, response, request, to_client, .. } = &mut *self.buffers;
        let mut first = mem::take(to_client);
        first.clear();
        let willing = request.keep_alive && self.upload.is_done() && self.client.worker.stage() < R::DRAINS_AT;
        let (framing, keep_alive) = write_response(&mut first, response, answer, request.version, willing);
        let mut download = Transfer::new(response.framing, framing == Framing::Chunked, first);
        let body = download.feed(&answer[response.len..]).map_err(download_failure)?;
        let mut surplus = answer.split_off(response.len + body);

        self.client.deadline.enter(Phase::Body);
        std::future::poll_fn(|cx| {
            if self.poll_upload(cx).is_err() {
                // The client broke off its request, but may still read: the answer decides.
                self.upload_broken = true;
            }
            let mut scratch = self.client.worker.scratch.borrow_mut();
            let stream = &mut self.client.stream;
            let polled = download.poll(cx, &mut self.upstream, stream, &mut scratch, &mut surplus);
            if let Poll::Ready(result) = polled {
                return Poll::Ready(result.map_err(download_failure));
            }
            if mem::take(&mut download.moved) | mem::take(&mut self.upload.moved) {
                self.client.deadline.enter(Phase::Body);
            }
            let late = || Err(Failure::CutAnswer(io::ErrorKind::TimedOut.into()));
            self.client.deadline.poll(cx).map(|_| late())
        })
        .await?;

        self.buffers.to_client = download.into_buffer();
        let uploaded = self.upload.is_done();
        self.reusable = self.buffers.response.keep_alive && uploaded && surplus.is_empty();
        Ok(if keep_alive { After::KeepAlive } else { After::Linger })
    }
}

fn upload_failure(error: TransferError) -> Failure {
    match error {
        TransferError::Source(error) => Failure::ClientGone(error),
        TransferError::Frame(reason) => Failure::BadBody(reason),
        TransferError::Sink(error) => Failure::NoAnswer(error),
    }
}

fn download_failure(error: TransferError) -> Failure {
    match error {
        TransferError::Source(error) => Failure::CutAnswer(error),
        TransferError::Frame(reason) => Failure::BadAnswerBody(reason),
        TransferError::Sink(error) => Failure::ClientGone(error),
    }
}

/// Tells the client what it can be told: an answer where none has begun, a reset where one was cut.
async fn respond_to<R: Route>(
    client: &mut Client<R>,
    buffers: &mut Buffers,
    failure: &Failure,
    outcome: &mut Outcome,
) -> After {
    tracing::debug!(peer = %client.peer, %failure, "request failed");
    let Some(reply) = failure.reply() else { return After::Reset };
    outcome.status = reply.status;
    let Buffers { to_client, request, .. } = buffers;
    to_client.clear();
    error_response(to_client, reply.status, reply.reason, &reply.text, request.method == Method::Head);
    client.deadline.enter(Phase::Body);
    match write_all(client, to_client).await {
        // Who was too slow is not waited for any longer.
        Ok(()) if matches!(failure, Failure::ClientTimeout) => After::Close,
        Ok(()) => After::Linger,
        Err(_gone) => After::Close,
    }
}

async fn write_all<R: Route>(client: &mut Client<R>, bytes: &[u8]) -> Result<(), Failure> {
    let Client { stream, deadline, .. } = client;
    match deadline.limit(stream.write_all(bytes)).await {
        Ok(written) => written.map_err(Failure::ClientGone),
        Err(_interrupt) => Err(Failure::ClientGone(io::ErrorKind::TimedOut.into())),
    }
}
