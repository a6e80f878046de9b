//! The heads of an answer: interim ones are passed on, the final one begins the answer.
//!
//! **Some pages are held until they are whole.** A cache that looks for ESI in a page makes an object of it only when its
//! last byte has come, and until then a ban does not find it. The guard of the origin would say at the head of such a page
//! that nothing of it was purged, and a purge that came during its body would be too late to be noticed and too early
//! for the ban. So the head waits for the body ([`StorePolicy::holds`](super::super::StorePolicy::holds)), and the guard is asked when all of it is here. The cache
//! loses nothing: it would not have begun to serve the page any earlier.
//!
//! A page past the caches is held as well ([`super::page`]): its fragments are asked for when the node is through with it.

use std::io;
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use super::super::buffers::Buffers;
use super::super::bypass;
use super::super::deadline::Phase;
use super::super::failure::Failure;
use super::super::stream::Stream;
use super::super::transfer::{BEFORE, Transfer, reading_room};
use super::{Exchange, download_failure};
use crate::fleet::Role;
use crate::http1::{BadHead, Framing, HeadChanges, HeadScan, Version, write_response};

/// How much is read at once while the head of an answer is awaited: most answers come whole, and of a long one most is
/// left to be spliced.
const HEAD_READ: usize = 32 * 1024;

/// The longest body of a page that is held, in bytes. Magento's are a tenth of it.
const LONGEST_HELD: usize = 1 << 20;

/// A head that came from the node.
pub(super) enum Came {
    /// An interim head of this length, in `answer`.
    Interim(usize),
    /// The node changes the protocol, with a head of this length, in `answer`.
    Switch(usize),
    /// The final head; its answer has begun.
    Final,
}

/// A page that waits for its end.
#[derive(Debug)]
pub(super) struct Held {
    /// Its body, which is taken apart only to find its end; what has come of it is in `answer`.
    body: Transfer,
}

impl Exchange<'_> {
    /// Sends the request and waits for the next head of the answer.
    pub(super) async fn next_head(&mut self) -> Result<Came, Failure> {
        let mut scan = HeadScan::default();
        // What came with an interim head may be the next one.
        if let Some(came) = self.take_kept_head(&mut scan)? {
            return Ok(came);
        }
        let mut entered = None;
        let mut watched = true;
        std::future::poll_fn(|cx| {
            self.poll_upload(cx)?;
            let sent = self.upload_broken || self.upload.is_done();
            // Of a page that is held the client has not seen the first byte either.
            let phase = if sent { Phase::FirstByte } else { Phase::Body };
            let moved = mem::take(&mut self.upload.moved) + mem::take(&mut self.held_since);
            if entered != Some(phase) {
                entered = Some(phase);
                self.client.deadline.enter_with(phase, self.node);
            } else if moved > 0 {
                self.client.deadline.advance(moved);
            }
            while let Poll::Ready(came) = self.poll_head(cx, &mut scan) {
                if let Some(came) = came? {
                    return Poll::Ready(Ok(came));
                }
            }
            // A stream among others can be given up at any time; of a socket only a read would tell, and it is read here.
            if (phase == Phase::FirstByte || matches!(self.client.stream, Stream::Http2(_)))
                && watched
                && let Poll::Ready(gone) = self.client.stream.poll_gone(cx)
            {
                gone.map_err(Failure::ClientGone)?;
                // It closed its sending side, or sent another request: both wait for this answer.
                watched = false;
            }
            let for_client = !sent && !self.upload.waits_for_sink();
            self.poll_patience(cx, for_client).map(Err)
        })
        .await
    }

    /// Reads once from the node. A final head that is complete then begins its answer from where it stands.
    fn poll_head(&mut self, cx: &mut Context<'_>, scan: &mut HeadScan) -> Poll<Result<Option<Came>, Failure>> {
        let worker = Rc::clone(&self.client.worker);
        let scratch = &mut worker.scratch.borrow_mut()[..];
        let room = reading_room(scratch);
        let limit = room.len().min(HEAD_READ);
        let mut buffer = ReadBuf::new(&mut room[..limit]);
        ready!(Pin::new(&mut self.upstream.stream).poll_read(cx, &mut buffer)).map_err(Failure::NoAnswer)?;
        let read = buffer.filled().len();
        let bytes = &reading_room(scratch)[..read];
        match self.held.take() {
            Some(_) if read == 0 && self.buffers.response.framing == Framing::UntilClose => {
                return Poll::Ready(self.pass_held());
            }
            Some(mut held) if read > 0 => {
                held.body.feed(bytes).map_err(download_failure)?;
                self.buffers.answer.extend_from_slice(bytes);
                self.held_since += read as u64;
                return Poll::Ready(self.hold(held));
            }
            _ => {}
        }
        if read == 0 {
            return Poll::Ready(Err(Failure::NoAnswer(io::ErrorKind::UnexpectedEof.into())));
        }
        if self.buffers.answer.is_empty()
            && let Some(len) = scan.find(bytes, worker.shared.limits.max_answer_head).map_err(Failure::BadAnswer)?
        {
            if let came @ Came::Final = self.parse_head(&bytes[..len])?
                && !self.is_to_be_held(read - len)
            {
                self.download = self.open_download()?;
                let body = (BEFORE + len, read - len);
                let begun = self.download.begin(cx, &mut self.client.stream, scratch, body, &mut self.surplus);
                return Poll::Ready(begun.map_err(download_failure).map(|()| Some(came)));
            }
            *scan = HeadScan::default();
        }
        self.buffers.answer.extend_from_slice(bytes);
        Poll::Ready(self.take_kept_head(scan))
    }

    /// Looks for a head in what was kept of the answer.
    fn take_kept_head(&mut self, scan: &mut HeadScan) -> Result<Option<Came>, Failure> {
        let limit = self.client.worker.shared.limits.max_answer_head;
        let Some(len) = scan.find(&self.buffers.answer, limit).map_err(Failure::BadAnswer)? else { return Ok(None) };
        let mut answer = mem::take(&mut self.buffers.answer);
        let came = self.parse_head(&answer[..len])?;
        if matches!(came, Came::Final) {
            answer.drain(..len);
        }
        self.buffers.answer = answer;
        match came {
            Came::Final if self.is_to_be_held(self.buffers.answer.len()) => {
                let mut body = Transfer::new(self.buffers.response.framing, false, Vec::new());
                body.feed(&self.buffers.answer).map_err(download_failure)?;
                self.hold(Held { body })
            }
            Came::Final => self.begin_kept().map(|()| Some(came)),
            Came::Interim(_) | Came::Switch(_) => Ok(Some(came)),
        }
    }

    /// Begins the answer of which the body so far is in `answer`.
    fn begin_kept(&mut self) -> Result<(), Failure> {
        self.download = self.open_download()?;
        let answer = &self.buffers.answer;
        let body = self.download.feed(answer).map_err(download_failure)?;
        self.surplus.extend_from_slice(&answer[body..]);
        Ok(())
    }

    /// Whether the end of a page, of whose body so many bytes have come, is to be waited for before it is passed on.
    fn is_to_be_held(&self, come: usize) -> bool {
        let Buffers { request, response, .. } = &*self.buffers;
        if self.is_to_be_filled_in() {
            return true;
        }
        let is_whole = match response.framing {
            Framing::None => true,
            Framing::Length(length) => come as u64 >= length || length > LONGEST_HELD as u64,
            Framing::Chunked | Framing::UntilClose => false,
        };
        !is_whole && self.client.frontend.store.as_ref().is_some_and(|store| store.holds(request.method, response))
    }

    /// Whether the blocks of a page are filled in here.
    fn is_to_be_filled_in(&self) -> bool {
        let Buffers { request, response, .. } = &*self.buffers;
        if !self.is_bypass() || response.framing == Framing::None || !self.upload.is_done() {
            return false;
        }
        let body = bypass::body_of(request, response);
        if body == bypass::Body::Encoded {
            self.client.worker.shared.metrics.fragments.hidden.inc();
        }
        body == bypass::Body::Page
    }

    /// Goes on waiting for the end of a page, or begins its answer where all of it is here, or too much.
    fn hold(&mut self, held: Held) -> Result<Option<Came>, Failure> {
        if !held.body.has_come() && self.buffers.answer.len() <= LONGEST_HELD {
            self.held = Some(held);
            return Ok(None);
        }
        self.pass_held()
    }

    fn pass_held(&mut self) -> Result<Option<Came>, Failure> {
        self.is_page = self.is_to_be_filled_in();
        if !self.is_page {
            self.begin_kept()?;
        }
        Ok(Some(Came::Final))
    }

    fn parse_head(&mut self, head: &[u8]) -> Result<Came, Failure> {
        let Buffers { response, request, .. } = &mut *self.buffers;
        let max_fields = self.client.worker.shared.limits.max_fields;
        response.parse(head, request.method, max_fields).map_err(Failure::BadAnswer)?;
        if response.is_interim() {
            return Ok(Came::Interim(head.len()));
        }
        if response.status != 101 {
            return Ok(Came::Final);
        }
        // A switch that nobody asked for, or to something else, is not an answer.
        if request.offers(response.upgrade_to()) {
            Ok(Came::Switch(head.len()))
        } else {
            Err(Failure::BadAnswer(BadHead::Status))
        }
    }

    /// Passes an interim head on (RFC 9110 section 15.2), so that a client that waits for `100 Continue` gets the node's
    /// and not ours.
    ///
    /// Of a web node that is all that passes, and only to who waits for it: Varnish up to 7 takes any interim head for the
    /// answer, and fails the fetch. (It waits for none: it answers `Expect` by itself and does not pass it on.) Past the
    /// caches a page shows no `Link` either, and a `103` is nothing else.
    pub(super) async fn pass_interim(&mut self, len: usize) -> Result<(), Failure> {
        let Buffers { answer, response, request, to_client, .. } = &mut *self.buffers;
        let passes =
            self.node.spec.role == Role::Varnish || (response.status == 100 && request.expects_continue());
        if passes && self.client.version(request.version) == Version::Http11 {
            to_client.clear();
            write_response(to_client, response, &HeadChanges::default(), Version::Http11, true);
            self.client.deadline.enter(Phase::Body);
            self.client.send(to_client).await?;
        }
        answer.drain(..len);
        Ok(())
    }
}
