//! One attempt at one node: the body going up, the answer coming down, both from the client's task.

use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;

use super::buffers::Buffers;
use super::client::{After, Client};
use super::deadline::{Interrupt, Phase};
use super::failure::Failure;
use super::transfer::{Transfer, TransferError};
use super::{MAX_ANSWER_HEAD, Route};
use crate::fleet::Node;
use crate::http1::{BadHead, Forwarding, Framing, HeadScan, Version, write_request, write_response};

/// How much is read at once while the head of an answer is awaited: enough that most answers come in one piece.
const ANSWER_READ: usize = 32 * 1024;

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
    /// The connection came from the pool.
    pub(super) reused: bool,
}

/// Sends the request in `buffers` to this node and its answer to the client. `fresh`: on a new connection.
pub(super) async fn attempt<R: Route>(
    client: &mut Client<R>,
    buffers: &mut Buffers,
    node: &Arc<Node>,
    fresh: bool,
) -> Result<Answered, Failed> {
    let _inflight = Inflight::begin(node);
    let pooled = if fresh { None } else { client.worker.pools.take(node) };
    let reused = pooled.is_some();
    let upstream = match pooled {
        Some(stream) => stream,
        None => {
            connect(client, node).await.map_err(|failure| Failed { failure, status: None, untouched: true, reused })?
        }
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
    let mut exchange = Exchange {
        client,
        buffers,
        node,
        upstream,
        upload,
        upload_broken: false,
        status: None,
        reusable: false,
        beyond: Vec::new(),
    };
    match exchange.run().await {
        Ok(answered) => {
            if exchange.reusable {
                exchange.client.worker.pools.give(node, exchange.upstream, Instant::now());
            }
            Ok(answered)
        }
        Err(failure) => {
            let untouched = !exchange.upload.has_read;
            exchange.buffers.to_node = exchange.upload.into_buffer();
            exchange.buffers.answer.clear();
            Err(Failed { failure, status: exchange.status, untouched, reused })
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
    /// The status of the final answer, once its head is here.
    status: Option<u16>,
    /// The answer came to a clean end: the node's connection can take another request.
    reusable: bool,
    /// What the client sent beyond this request.
    beyond: Vec<u8>,
}

impl<R: Route> Exchange<'_, R> {
    async fn run(&mut self) -> Result<Answered, Failure> {
        let head_len = self.buffers.request.len;
        let body = self.upload.feed(&self.buffers.input[head_len..]).map_err(upload_failure)?;
        self.receive_head().await?;
        let status = self.buffers.response.status;
        self.status = Some(status);
        let after = self.forward_answer().await?;
        self.buffers.to_node =
            mem::replace(&mut self.upload, Transfer::new(Framing::None, false, Vec::new())).into_buffer();
        self.buffers.next_request(head_len + body);
        self.buffers.input.append(&mut self.beyond);
        Ok(Answered { status, after })
    }

    /// Sends the request and waits for the final head of the answer; interim ones are passed on (RFC 9110 section
    /// 15.2), so that a client that waits for `100 Continue` gets the node's and not ours.
    async fn receive_head(&mut self) -> Result<(), Failure> {
        for _ in 0..=MAX_INTERIM {
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
                self.client.send(to_client).await?;
            }
            answer.drain(..len);
        }
        Err(Failure::BadAnswer(BadHead::Status))
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
