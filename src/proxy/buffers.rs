//! What a request under way holds, and the stock it comes from.

use std::cell::RefCell;

use crate::http1::{HeadScan, RequestHead, ResponseHead};

/// The most sets a worker keeps for the next request. More exist only while more requests are under way.
const STOCK: usize = 512;

/// A set is not kept where one of its buffers grew beyond this for one odd request, in bytes: so the stock of a worker holds
/// 32 MiB at most, and as a rule a tenth of that.
const KEPT_CAPACITY: usize = 16 * 1024;

/// The buffers of one request: what was read from both sides, the heads as parsed from it, and what is to be written.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// From the client: this request's head, the start of its body, and perhaps requests behind it.
    pub(super) input: Vec<u8>,
    pub(super) input_scan: HeadScan,
    pub(super) request: RequestHead,
    /// The guard's sequence number before the request went to a node ([`super::StorePolicy::mark`]).
    pub(super) guard_mark: u64,
    /// From the node: the head of its answer and the start of its body.
    pub(super) answer: Vec<u8>,
    pub(super) response: ResponseHead,
    /// To be written to the node: the head of the request and the start of its body.
    pub(super) to_node: Vec<u8>,
    /// To be written to the client: the head of the answer and the start of its body.
    pub(super) to_client: Vec<u8>,
}

impl Buffers {
    /// Ready for the next request; what the client sent beyond the last one stays.
    pub(super) fn next_request(&mut self, consumed: usize) {
        self.input.drain(..consumed);
        self.input_scan = HeadScan::default();
        self.answer.clear();
        self.to_node.clear();
        self.to_client.clear();
    }
}

/// The spare sets of a worker.
#[derive(Debug, Default)]
#[expect(clippy::vec_box, reason = "a set moves between the stock and connections: as a pointer, not as 400 bytes")]
pub(super) struct Stock(RefCell<Vec<Box<Buffers>>>);

impl Stock {
    pub(super) fn take(&self) -> Box<Buffers> {
        self.0.borrow_mut().pop().unwrap_or_default()
    }

    pub(super) fn give_back(&self, mut buffers: Box<Buffers>) {
        let vectors = [&buffers.input, &buffers.answer, &buffers.to_node, &buffers.to_client];
        let largest = vectors.map(Vec::capacity).into_iter().max().unwrap_or_default();
        let mut stock = self.0.borrow_mut();
        if stock.len() < STOCK && largest <= KEPT_CAPACITY {
            let all = buffers.input.len();
            buffers.next_request(all);
            stock.push(buffers);
        }
    }
}
