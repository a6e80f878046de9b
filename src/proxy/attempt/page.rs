//! A page that bypasses the caches, with its ESI fragments filled in.
//!
//! The page is held until it is complete ([`super::head`]), so its node has no other work for this client and is asked
//! for the fragments one at a time. A page longer than the hold limit is read incrementally, at most one tag ahead.
//! Completed parts are sent at once: the reader sees the top of a page while its last fragment is rendered.

use std::io;
use std::mem;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::super::bypass::{self, fragment};
use super::super::client::Client;
use super::super::deadline::{AwaitedSide, Phase};
use super::super::failure::Failure;
use super::super::request::Request;
use super::super::trace::Trace;
use super::super::transfer::Outgoing;
use super::relay::Relayed;
use super::{Begun, Exchange, forwarding};
use crate::esi::{EsiParser, Piece};
use crate::fleet::Node;
use crate::http1::{BodyDecoder, RequestHead, write_subrequest};
use fragment::{DEEPEST, Fragment, LeftOut, MOST, OfPage};

/// Bytes gathered for one write, and read at once.
const PIECE: usize = 32 * 1024;

/// A page or a fragment, from the first byte that was not yet passed on.
struct Document {
    bytes: Vec<u8>,
    taken: usize,
    parser: EsiParser,
    /// Its request target, to resolve relative addresses.
    target: Vec<u8>,
}

impl Document {
    fn next(&mut self, is_whole: bool) -> Option<Piece<'_>> {
        let (piece, taken) = self.parser.next(&self.bytes[self.taken..], is_whole)?;
        self.taken += taken;
        Some(piece)
    }

    /// Drops what was passed on.
    fn waiting(&mut self) -> &mut Vec<u8> {
        self.bytes.drain(..mem::take(&mut self.taken));
        &mut self.bytes
    }
}

/// The page as read from the node.
struct PageSource<'p> {
    upstream: &'p mut TcpStream,
    /// The page is complete, and the connection may carry another request.
    is_free: bool,
    decoder: BodyDecoder,
    /// Bytes from the node after the page's end.
    surplus: &'p mut Vec<u8>,
}

impl PageSource<'_> {
    /// Removes the framing from bytes that were read.
    fn take(&mut self, mut piece: Vec<u8>, into: &mut Vec<u8>) -> Result<(), Failure> {
        let (content, consumed) = self.decoder.decode_in_place(&mut piece).map_err(Failure::BadAnswerBody)?;
        into.extend_from_slice(&piece[..content]);
        self.surplus.extend_from_slice(&piece[consumed..]);
        Ok(())
    }

    /// The connection, if the page is complete and the connection is kept alive.
    fn connection(&mut self) -> Option<OfPage<'_>> {
        let is_free = self.is_free && self.decoder.is_done() && self.surplus.is_empty();
        is_free.then_some(OfPage { stream: self.upstream, is_free: &mut self.is_free })
    }

    async fn read(&mut self, client: &Client, into: &mut Vec<u8>) -> Result<(), Failure> {
        let mut piece = Vec::with_capacity(PIECE);
        client.deadline.enter(Phase::Body(AwaitedSide::Node));
        let read = client.deadline.limit(self.upstream.read_buf(&mut piece)).await;
        let late = |interrupt| Failure::interrupted(interrupt, Failure::CutAnswer(io::ErrorKind::TimedOut.into()));
        match read.map_err(late)? {
            Ok(0) if !self.decoder.end() => Err(Failure::CutAnswer(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => self.take(piece, into),
            Err(error) => Err(Failure::CutAnswer(error)),
        }
    }
}

/// The answer as sent to the client.
struct PageSink<'p> {
    client: &'p mut Client,
    /// The head, until it is sent.
    wire: Vec<u8>,
    gathered: Vec<u8>,
    outgoing: Outgoing,
    sent: u64,
}

impl PageSink<'_> {
    async fn push(&mut self, text: &[u8]) -> Result<(), Failure> {
        for piece in text.chunks(PIECE) {
            self.gathered.extend_from_slice(piece);
            if self.gathered.len() >= PIECE {
                self.flush(false).await?;
            }
        }
        Ok(())
    }

    async fn flush(&mut self, is_end: bool) -> Result<(), Failure> {
        if !self.gathered.is_empty() && self.outgoing == Outgoing::Chunked {
            self.wire.extend_from_slice(format!("{:x}\r\n", self.gathered.len()).as_bytes());
            self.wire.append(&mut self.gathered);
            self.wire.extend_from_slice(b"\r\n");
        }
        self.wire.append(&mut self.gathered);
        if is_end && self.outgoing == Outgoing::Chunked {
            self.wire.extend_from_slice(b"0\r\n\r\n");
        }
        self.client.deadline.enter(Phase::Body(AwaitedSide::Client));
        self.client.send(&self.wire).await?;
        self.sent += self.wire.len() as u64;
        self.wire.clear();
        Ok(())
    }
}

/// Requests the fragments of a page from its node.
struct Asking<'p> {
    node: &'p Node,
    head: &'p RequestHead,
    trace: &'p Trace,
    /// The number of fragments requested so far.
    count: usize,
    /// One fragment timed out. The rest is skipped, so that a page cannot occupy a node without limit.
    is_late: bool,
}

impl Asking<'_> {
    /// Fetches the fragment at this address, relative to `base`, at this nesting depth.
    async fn fragment(
        &mut self,
        client: &Client,
        of_page: Option<OfPage<'_>>,
        (source, base): (&[u8], &[u8]),
        depth: usize,
    ) -> Result<Document, LeftOut> {
        if depth > DEEPEST {
            return Err(LeftOut::TooDeep);
        }
        if self.count == MOST {
            return Err(LeftOut::TooMany);
        }
        if self.is_late {
            return Err(LeftOut::Late);
        }
        self.count += 1;
        let forwarding = forwarding(client, self.head, self.trace, self.node);
        let target = fragment::target_of(source, &forwarding.host(self.head), base).ok_or(LeftOut::Foreign)?;
        let mut out = Vec::new();
        write_subrequest(&mut out, &target, self.head, forwarding);
        let fetched = fragment::fetch(client, self.node, of_page, &out).await;
        self.is_late = matches!(fetched, Err(LeftOut::Late));
        let Fragment { body, is_markup } = fetched?;
        let parser = if is_markup { EsiParser::default() } else { EsiParser::plain() };
        Ok(Document { bytes: body, taken: 0, parser, target })
    }

    /// Logs why a fragment is missing from a page.
    fn report(&self, client: &Client, source: &[u8], reason: &LeftOut) {
        if let Some(unsaid) = client.worker.notices.pass() {
            let path = String::from_utf8_lossy(self.head.path());
            let source = source.split(|&byte| byte == b'?').next().unwrap_or_default();
            let source = String::from_utf8_lossy(source);
            tracing::info!(
                node = %self.node.id(), %path, fragment = %source, %reason, unsaid,
                "a fragment is left out of a page that bypasses the caches"
            );
        }
    }
}

impl Exchange<'_> {
    /// Relays a page whose body so far is in `answer`.
    pub(super) async fn relay_page(&mut self) -> Result<Relayed, Failure> {
        // Must run before the head is rewritten for the page as it is sent.
        let decoder = BodyDecoder::new(self.request.response.framing);
        let Begun { first: wire, outgoing, keep_alive } = self.begin()?;
        bypass::ask_for_fragments(&mut self.request.head);
        let Request { head, response, answer, trace, .. } = &mut *self.request;
        let mut asking = Asking { node: self.node, head, trace, count: 0, is_late: false };
        let is_free = response.keep_alive && !head.offers_upgrade();
        let upstream = &mut self.upstream.stream;
        let mut source = PageSource { upstream, is_free, decoder, surplus: &mut self.surplus };
        let mut sink = PageSink { client: &mut *self.client, wire, gathered: Vec::new(), outgoing, sent: 0 };
        let mut page =
            Document { bytes: Vec::new(), taken: 0, parser: EsiParser::default(), target: head.target().to_vec() };
        source.take(mem::take(answer), &mut page.bytes)?;
        let filled_in = fill_in(&mut source, &mut sink, &mut asking, page).await;
        trace.sent = sink.sent;
        filled_in?;
        response.keep_alive = source.is_free;
        Ok(Relayed { keep_alive, sent: sink.sent })
    }
}

/// Relays a page with its fragments filled in.
async fn fill_in(
    source: &mut PageSource<'_>,
    sink: &mut PageSink<'_>,
    asking: &mut Asking<'_>,
    page: Document,
) -> Result<(), Failure> {
    // The page and the nested open fragments: no more than `DEEPEST`.
    let mut open = vec![page];
    loop {
        let depth = open.len();
        let Some(last) = open.last_mut() else { return sink.flush(true).await };
        let is_whole = depth > 1 || source.decoder.is_done();
        match last.next(is_whole) {
            Some(Piece::Text(text)) => sink.push(text).await?,
            Some(Piece::Nothing) => {}
            Some(Piece::Include(address)) => {
                sink.flush(false).await?;
                let asked = asking.fragment(sink.client, source.connection(), (&address, &last.target), depth).await;
                let includes = &sink.client.worker.shared.metrics.fragments;
                match asked {
                    Ok(fragment) => {
                        includes.included.inc();
                        open.push(fragment);
                    }
                    Err(reason) => {
                        includes.left_out.inc();
                        asking.report(sink.client, &address, &reason);
                    }
                }
            }
            None if is_whole => drop(open.pop()),
            None => source.read(sink.client, last.waiting()).await?,
        }
    }
}
