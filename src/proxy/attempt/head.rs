//! The heads of an answer: interim heads are forwarded, the final head begins the answer.
//!
//! **Some pages are held until they are complete.** A cache that processes ESI in a page creates the cache object only
//! when the page's last byte arrives; until then a ban does not match it. If the origin's guard were asked at the
//! page's head, a purge during the body would be too late for the guard and too early for the ban. So the head waits
//! for the body ([`StorePolicy::holds`](super::super::StorePolicy::holds)), and the guard is asked when the page is
//! complete. The cache loses nothing: it would not have begun to serve the page any earlier.
//!
//! A page that bypasses the caches is held as well ([`super::page`]): its fragments are requested once the node has
//! finished the page.

use std::io;
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use super::super::bypass;
use super::super::deadline::{AwaitedSide, Phase};
use super::super::failure::Failure;
use super::super::latency;
use super::super::node_permit::QueuedRequest;
use super::super::request::Request;
use super::super::stream::Stream;
use super::super::trace::RequestPhase;
use super::super::transfer::{BEFORE, Outgoing, Transfer, reading_room};
use super::relay::Download;
use super::{Exchange, download_failure};
use crate::fleet::Role;
use crate::http1::{BadHead, Framing, HeadScan, Version, write_response};
use crate::seal::StalePage;

/// Bytes read at once while waiting for an answer's head: most answers arrive complete, and most of a long one is left
/// to be spliced.
const HEAD_READ: usize = 32 * 1024;

/// The longest body of a held page, in bytes. Magento's pages are a tenth of it.
const LONGEST_HELD: usize = 1 << 20;

/// A head from the node.
pub(super) enum NodeHead {
    /// An interim head of this length, in `answer`.
    Interim(usize),
    /// The node switches protocols, with a head of this length, in `answer`.
    Switch(usize),
    /// The final head of an answer that has begun and is to be relayed.
    Begun(Download),
    /// The final head of a page whose ESI blocks are to be filled in; the body so far is in `answer`.
    Page,
    /// A block with tags that no seal shows and that have to be noted first; the body so far is in `answer`.
    Block,
}

/// The kind of a head.
enum HeadKind {
    Interim,
    Switch,
    Final,
}

/// The first state of an attempt: the request is sent, and no final head has arrived.
pub(super) struct AwaitingHead<'a, 'e> {
    pub(super) exchange: &'a mut Exchange<'e>,
    scan: HeadScan,
    /// The body of a held page, decoded only to find its end; the body so far is in `answer`.
    held: Option<Transfer>,
    /// Body bytes of the held page that arrived since the last check.
    held_lately: u64,
    /// The client may send more, or disconnect.
    watches_client: bool,
    /// Its place in the queue for another node, while this one is down and all others are full.
    pub(super) queued: Option<Box<QueuedRequest>>,
    /// The retry budget did not let it go to another node.
    pub(super) was_refused: bool,
}

impl<'a, 'e> AwaitingHead<'a, 'e> {
    pub(super) fn new(exchange: &'a mut Exchange<'e>) -> Self {
        AwaitingHead {
            exchange,
            scan: HeadScan::default(),
            held: None,
            held_lately: 0,
            watches_client: true,
            queued: None,
            was_refused: false,
        }
    }

    /// Sends the request and waits for the next head of the answer.
    pub(super) async fn next(&mut self) -> Result<NodeHead, Failure> {
        // Bytes after an interim head may be the next head.
        if let Some(head) = self.take_kept_head()? {
            return Ok(head);
        }
        let mut entered = None;
        std::future::poll_fn(|cx| self.poll(cx, &mut entered)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>, entered: &mut Option<bool>) -> Poll<Result<NodeHead, Failure>> {
        let Exchange { client, upload, upstream, node, .. } = &mut *self.exchange;
        upload.poll(cx, client, &mut upstream.stream)?;
        let sent = upload.needs_no_more();
        let owing = if upload.waits_for_node() { AwaitedSide::Node } else { AwaitedSide::Client };
        let moved = upload.take_moved() + mem::take(&mut self.held_lately);
        if *entered != Some(sent) {
            *entered = Some(sent);
            // The client has not seen the first byte of a held page either.
            client.deadline.enter_with(if sent { Phase::FirstByte } else { Phase::Body(owing) }, node);
        } else if moved > 0 {
            client.deadline.advance(moved);
        }
        while let Poll::Ready(head) = self.poll_head(cx) {
            if let Some(head) = head? {
                return Poll::Ready(Ok(head));
            }
        }
        let Exchange { client, .. } = &mut *self.exchange;
        // An HTTP/2 stream can be cancelled at any time; on a plain socket only a read shows that, and it is done here.
        if (sent || matches!(client.stream, Stream::Http2(_)))
            && self.watches_client
            && let Poll::Ready(gone) = client.stream.poll_gone(cx)
        {
            gone.map_err(Failure::ClientGone)?;
            // The client half-closed, or pipelined another request: both wait for this answer.
            self.watches_client = false;
        }
        self.poll_patience(cx, (!sent).then_some(owing)).map(Err)
    }

    /// Reads once from the node. A complete final head then begins its answer in place.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<NodeHead>, Failure>> {
        let worker = Rc::clone(&self.exchange.client.worker);
        let scratch = &mut worker.scratch.borrow_mut()[..];
        let room = reading_room(scratch);
        let limit = room.len().min(HEAD_READ);
        let mut buffer = ReadBuf::new(&mut room[..limit]);
        ready!(Pin::new(&mut self.exchange.upstream.stream).poll_read(cx, &mut buffer)).map_err(Failure::NoAnswer)?;
        let read = buffer.filled().len();
        let bytes = &reading_room(scratch)[..read];
        match self.held.take() {
            Some(_) if read == 0 && self.exchange.request.response.framing == Framing::UntilClose => {
                return Poll::Ready(self.pass_held());
            }
            Some(mut body) if read > 0 => {
                body.feed(bytes).map_err(download_failure)?;
                self.exchange.request.answer.extend_from_slice(bytes);
                self.held_lately += read as u64;
                return Poll::Ready(self.hold(body));
            }
            _ => {}
        }
        if read == 0 {
            return Poll::Ready(Err(Failure::NoAnswer(io::ErrorKind::UnexpectedEof.into())));
        }
        if self.exchange.request.answer.is_empty()
            && let Some(len) = self.read_head(bytes)?
        {
            if let HeadKind::Final = self.classify_head()?
                && !self.is_to_be_held(read - len)
                && !self.has_tags_to_note()
            {
                let mut download = self.begin()?;
                let body = (BEFORE + len, read - len);
                let Exchange { client, surplus, .. } = &mut *self.exchange;
                let begun = download.body.begin(cx, &mut client.stream, scratch, body, surplus);
                if begun.is_err() && download.body.has_come() {
                    self.exchange.request.trace.phase = RequestPhase::Last;
                }
                let head = NodeHead::Begun(download);
                return Poll::Ready(begun.map_err(download_failure).map(|()| Some(head)));
            }
            self.scan = HeadScan::default();
        }
        self.exchange.request.answer.extend_from_slice(bytes);
        Poll::Ready(self.take_kept_head())
    }

    fn read_head(&mut self, bytes: &[u8]) -> Result<Option<usize>, Failure> {
        let Exchange { client, request, .. } = &mut *self.exchange;
        let limits = client.worker.limits().of_answers();
        request.response.read(bytes, request.head.method, &mut self.scan, limits).map_err(Failure::BadAnswer)
    }

    /// Looks for a head in the buffered part of the answer.
    fn take_kept_head(&mut self) -> Result<Option<NodeHead>, Failure> {
        let mut answer = mem::take(&mut self.exchange.request.answer);
        let found = self.read_head(&answer)?;
        let Some(len) = found else {
            self.exchange.request.answer = answer;
            return Ok(None);
        };
        let kind = self.classify_head()?;
        if let HeadKind::Final = kind {
            answer.drain(..len);
        }
        self.exchange.request.answer = answer;
        match kind {
            HeadKind::Interim => Ok(Some(NodeHead::Interim(len))),
            HeadKind::Switch => Ok(Some(NodeHead::Switch(len))),
            HeadKind::Final if self.is_to_be_held(self.exchange.request.answer.len()) => {
                let mut body = Transfer::new(self.exchange.request.response.framing, Outgoing::AsItIs, Vec::new());
                body.feed(&self.exchange.request.answer).map_err(download_failure)?;
                self.hold(body)
            }
            HeadKind::Final => self.finish_kept().map(Some),
        }
    }

    /// Begins an answer whose body so far is in `answer`, unless its tags have to be noted first.
    fn finish_kept(&mut self) -> Result<NodeHead, Failure> {
        if self.has_tags_to_note() {
            return Ok(NodeHead::Block);
        }
        self.begin_kept().map(NodeHead::Begun)
    }

    /// Whether the answer goes to a cache with tags that no seal shows, and that are not known yet.
    fn has_tags_to_note(&self) -> bool {
        let Request { mark, head, response, .. } = &*self.exchange.request;
        let store = self.exchange.client.frontend.store.as_ref();
        store.is_some_and(|store| !store.tags_to_note(mark, head, response).is_empty())
    }

    /// Begins an answer whose body so far is in `answer`.
    fn begin_kept(&mut self) -> Result<Download, Failure> {
        let mut download = self.begin()?;
        let Exchange { request, surplus, .. } = &mut *self.exchange;
        let body = download.body.feed(&request.answer).map_err(download_failure)?;
        surplus.extend_from_slice(&request.answer[body..]);
        Ok(download)
    }

    fn begin(&mut self) -> Result<Download, Failure> {
        let framing = self.exchange.request.response.framing;
        Ok(Download::new(framing, self.exchange.begin()?))
    }

    /// Whether to wait for the end of a page before it is relayed; `come` bytes of its body have arrived.
    fn is_to_be_held(&self, come: usize) -> bool {
        let Request { head, response, .. } = &*self.exchange.request;
        if self.is_to_be_filled_in() {
            return true;
        }
        let is_whole = match response.framing {
            Framing::None => true,
            Framing::Length(length) => come as u64 >= length || length > LONGEST_HELD as u64,
            Framing::Chunked | Framing::UntilClose => false,
        };
        let store = self.exchange.client.frontend.store.as_ref();
        !is_whole && store.is_some_and(|store| store.holds(head.method, response))
    }

    /// Whether the ESI blocks of a page are filled in here.
    fn is_to_be_filled_in(&self) -> bool {
        let Exchange { client, request, upload, .. } = &*self.exchange;
        let Request { head, response, .. } = &**request;
        if !self.exchange.is_bypass() || response.framing == Framing::None || !upload.is_done() {
            return false;
        }
        let body = bypass::body_of(head, response);
        if body == bypass::Body::Encoded {
            client.worker.shared.metrics.fragments.hidden.inc();
        }
        body == bypass::Body::Page
    }

    /// Continues to wait for the end of a page, or begins its answer if it is complete or too long.
    fn hold(&mut self, body: Transfer) -> Result<Option<NodeHead>, Failure> {
        if !body.has_come() && self.exchange.request.answer.len() <= LONGEST_HELD {
            self.held = Some(body);
            return Ok(None);
        }
        self.pass_held()
    }

    fn pass_held(&mut self) -> Result<Option<NodeHead>, Failure> {
        if self.is_to_be_filled_in() {
            return Ok(Some(NodeHead::Page));
        }
        self.finish_kept().map(Some)
    }

    /// What is to become of the head that was read.
    fn classify_head(&mut self) -> Result<HeadKind, Failure> {
        if self.exchange.request.response.is_interim() {
            return Ok(HeadKind::Interim);
        }
        let Exchange { client, request, node, .. } = &mut *self.exchange;
        latency::note_answer(&client.worker, request, node);
        let Request { response, head, .. } = &**request;
        if response.status != 101 {
            return self.find_stale().map_or(Ok(HeadKind::Final), |page| Err(Failure::Stale(page)));
        }
        // A switch that the client did not offer, or to another protocol, is not a valid answer.
        if head.offers(response.upgrade_to()) { Ok(HeadKind::Switch) } else { Err(Failure::BadAnswer(BadHead::Status)) }
    }
}

impl AwaitingHead<'_, '_> {
    /// The page, if a cache answered with one that is older than a purge.
    fn find_stale(&self) -> Option<Box<StalePage>> {
        let Exchange { client, request, node, terms, .. } = &*self.exchange;
        let freshness = client.frontend.freshness.as_ref()?;
        if terms.takes_stale || node.spec.role() != Role::Varnish {
            return None;
        }
        let asked = (request.known, request.asked_cache);
        freshness.find_stale(&request.head, &request.response, asked, node, || client.worker.pools.metrics(node))
    }
}

impl Exchange<'_> {
    /// Notes the tags of a block before its head goes to the cache, and begins its answer. If they cannot be noted, the cache
    /// is told not to store it.
    pub(super) async fn note_block(&mut self) -> Result<Download, Failure> {
        let Request { mark, head, response, .. } = &mut *self.request;
        if let Some(store) = &self.client.frontend.store {
            let names = store.tags_to_note(mark, head, response);
            self.client.deadline.enter(Phase::FirstByte);
            if !store.note_tags(names).await {
                response.forbid_storing();
            }
        }
        AwaitingHead::new(self).begin_kept()
    }

    /// Forwards an interim head (RFC 9110 section 15.2), so that a client that waits for `100 Continue` gets the node's
    /// and not ours.
    ///
    /// From a web node only `100 Continue` is forwarded, and only to a client that expects it: Varnish up to 7 takes
    /// any interim head for the answer, and fails the fetch. (Varnish never expects one: it answers `Expect` itself and
    /// does not forward it.) A page that bypasses the caches loses its `Link` fields, so a `103` would have no content.
    pub(super) async fn pass_interim(&mut self, len: usize) -> Result<(), Failure> {
        let Request { answer, response, head, to_client, .. } = &mut *self.request;
        let passes = self.node.spec.role() == Role::Varnish || (response.status == 100 && head.expects_continue());
        if passes && self.client.version(head.version) == Version::Http11 {
            to_client.clear();
            write_response(to_client, response, Version::Http11, true);
            self.client.deadline.enter(Phase::Body(AwaitedSide::Client));
            self.client.send(to_client).await?;
        }
        answer.drain(..len);
        Ok(())
    }
}
