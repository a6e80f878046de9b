//! A request, from its first byte to the end of its answer, with its buffers.

use std::cell::RefCell;
use std::fmt;
use std::time::Instant;

use super::store::RenderMark;
use super::trace::Trace;
use crate::fleet::AskedCache;
use crate::http1::{HeadScan, RequestHead, ResponseHead};
use crate::seal::Position;

/// The most requests that a worker keeps for reuse. More exist only while more are in flight.
const MAX_SPARE: usize = 512;

/// A request with a buffer that grew beyond this many bytes is not kept: the spare ones of a worker hold at most 32
/// MiB, usually a tenth of that.
const MAX_SPARE_CAPACITY: usize = 16 * 1024;

/// Names a request in the lines of the log that are about it: 128 random bits. A span would carry it into every line by
/// itself, and costs an allocation for each request, whether or not a line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RequestId(u128);

impl RequestId {
    pub(super) fn new(high: u64, low: u64) -> Self {
        RequestId(u128::from(high) << 64 | u128::from(low))
    }

    /// Appends its text, as [`fmt::Display`] has it: 32 hexadecimal digits. Without what formatting costs, as it is in each
    /// line of the access log.
    pub(super) fn push_to(self, out: &mut Vec<u8>) {
        let digits = |byte: u8| [byte >> 4, byte & 0xf].map(|digit| b"0123456789abcdef"[usize::from(digit)]);
        out.extend_from_slice(self.0.to_be_bytes().map(digits).as_flattened());
    }

    /// Enough of it for a seal, which ends with its page.
    pub(super) fn short(self) -> u64 {
        self.0 as u64
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// One request and its answer.
#[derive(Debug)]
pub(super) struct Request {
    /// From the client: this request's head, the start of its body, and pipelined requests.
    pub(super) input: Vec<u8>,
    pub(super) input_scan: HeadScan,
    /// The head, once it is complete.
    pub(super) head: RequestHead,
    pub(super) id: RequestId,
    /// When its head was complete.
    pub(super) began: Instant,
    /// The most that its body may have, in bytes: the limit of when it began.
    pub(super) longest_body: u64,
    /// What was known before the request went to a node.
    pub(super) mark: RenderMark,
    /// At the edge: what its reader remembers ([`super::Freshness`]).
    pub(super) known: Position,
    /// At the edge: what was known of the cache when it was asked.
    pub(super) asked_cache: AskedCache,
    /// When a node was asked, while its answer has not begun and its latency is noted.
    pub(super) asked_node: Option<Instant>,
    /// The status sent to the client, once an answer has begun.
    pub(super) status: Option<u16>,
    /// What is noted for the access log and the metrics.
    pub(super) trace: Trace,
    /// From the node: the answer's head and the start of its body, until relayed.
    pub(super) answer: Vec<u8>,
    /// The last head from the node.
    pub(super) response: ResponseHead,
    /// To the node: the request's head and the start of its body.
    pub(super) to_node: Vec<u8>,
    /// To a cache: what the reader remembers, as text.
    pub(super) asked: Vec<u8>,
    /// To the client: the answer's head and the start of its body.
    pub(super) to_client: Vec<u8>,
}

impl Request {
    fn new() -> Self {
        Request {
            input: Vec::new(),
            input_scan: HeadScan::default(),
            head: RequestHead::default(),
            id: RequestId::default(),
            began: Instant::now(),
            longest_body: u64::MAX,
            mark: RenderMark::default(),
            known: 0,
            asked_cache: AskedCache::default(),
            asked_node: None,
            status: None,
            trace: Trace::default(),
            answer: Vec::new(),
            response: ResponseHead::default(),
            to_node: Vec::new(),
            asked: Vec::new(),
            to_client: Vec::new(),
        }
    }

    /// Bytes of the request that were read, with its head.
    pub(super) fn bytes_read(&self) -> u64 {
        let head = if self.trace.has_head { self.head.head_len() } else { self.input.len() };
        head as u64 + self.trace.body_read
    }

    /// Its name in a line of the log: that by which others know it, if it came with one.
    pub(super) fn name(&self) -> RequestName<'_> {
        RequestName(self)
    }

    /// Prepares for the next request; pipelined bytes are kept.
    pub(super) fn next(&mut self, consumed: usize) {
        self.input.drain(..consumed);
        self.input_scan = HeadScan::default();
        self.answer.clear();
        self.to_node.clear();
        self.to_client.clear();
    }
}

/// A request as a line of the log names it.
pub(super) struct RequestName<'r>(&'r Request);

impl fmt::Display for RequestName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match str::from_utf8(&self.0.trace.id) {
            Ok(id) if !id.is_empty() => f.write_str(id),
            _ => self.0.id.fmt(f),
        }
    }
}

/// A worker's spare requests, for reuse.
#[derive(Debug, Default)]
#[expect(clippy::vec_box, reason = "a request moves between the pool and connections: as a pointer, not as 600 bytes")]
pub(super) struct RequestPool(RefCell<Vec<Box<Request>>>);

impl RequestPool {
    pub(super) fn get(&self) -> Box<Request> {
        self.0.borrow_mut().pop().unwrap_or_else(|| Box::new(Request::new()))
    }

    pub(super) fn put(&self, mut request: Box<Request>) {
        let vectors = [&request.input, &request.answer, &request.to_node, &request.to_client];
        let largest = vectors.map(Vec::capacity).into_iter().max().unwrap_or_default();
        let mut spare = self.0.borrow_mut();
        if spare.len() < MAX_SPARE && largest <= MAX_SPARE_CAPACITY {
            let all = request.input.len();
            request.next(all);
            spare.push(request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_text() {
        for id in [RequestId::default(), RequestId::new(0x0123_4567_89ab_cdef, 7), RequestId::new(u64::MAX, u64::MAX)] {
            let mut text = Vec::new();
            id.push_to(&mut text);
            assert_eq!(String::from_utf8(text).unwrap(), id.to_string());
        }
    }
}
