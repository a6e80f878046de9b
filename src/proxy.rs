//! The data path that edge and origin share: a connection comes in, its requests go out to nodes.
//!
//! # Shape
//!
//! A worker is one thread with one current-thread runtime, its own `SO_REUSEPORT` listeners and its own upstream
//! connections. Between reading a request and writing its answer there is no lock, no channel and no hop to another
//! task: both sockets of an exchange are driven from the client's task.
//!
//! The request path is two functions in `exchange`: `handle` never fails (it turns any failure into one answer, one
//! count and one log line), `try_handle` is straight code over attempts at nodes (`attempt`). A failure knows its side
//! and whether the request may be tried again.
//!
//! Memory is taken only while something happens: a worker reads into one large scratch buffer, a request under way
//! holds a set of buffers from the worker's stock, and a connection at rest holds nothing but its socket.
//!
//! What differs between edge and origin (who may be chosen, who is believed, what is refused) is behind [`Route`].

mod admission;
mod attempt;
mod buffers;
mod bypass;
mod client;
mod connection;
mod deadline;
mod exchange;
mod failure;
mod http2;
mod key;
mod listener;
mod notices;
mod spin;
mod splice;
mod stream;
mod transfer;
mod tunnel;
mod worker;

use std::net::IpAddr;
use std::sync::Arc;

use crate::balance::Draw;
use crate::fleet::{Node, Role, Snapshot};
use crate::http1::{Method, RequestHead, ResponseHead};
use crate::purge::{Ends, Passage};
use crate::shutdown::Stage;

pub use admission::Admission;
pub use key::{IgnoredParameters, request_key};
pub use listener::{Listener, bind, spawn};
pub use worker::{Shared, Worker};

/// What a listener decides about a request.
pub trait Route: 'static {
    /// The role of the nodes that this listener sends to.
    const ROLE: Role;

    /// From when on connections at rest are closed and no new ones are taken.
    const DRAINS_AT: Stage;

    /// Whether its clients are strangers, whose number and pace have a limit.
    const PUBLIC: bool;

    /// Whether the tags of a page are passed on in one line, for a cache that looks for them there.
    const JOINS_TAGS: bool;

    /// Whether this peer's connections begin with a PROXY header.
    fn expects_proxy_header(&self, peer: IpAddr) -> bool;

    /// A field that says `https` of clients that came that way, beside `X-Forwarded-Proto`; empty for none.
    fn offload_header(&self) -> &str;

    /// Whether the `X-Forwarded-*` fields of this peer are believed.
    fn trusts(&self, peer: IpAddr, fleet: &Snapshot) -> bool;

    /// Whether a request with this method may pass; others are answered 405.
    fn admits(&self, head: &RequestHead) -> bool;

    /// What this listener answers by itself, whatever the nodes do.
    fn own_answer(&self, head: &RequestHead) -> Option<OwnAnswer>;

    /// The hash of what is asked for, for policies that keep a key on a node.
    fn key(&self, head: &RequestHead) -> u64;

    /// Chooses a node other than `tried`.
    ///
    /// # Errors
    /// Why there is none, for the answer.
    fn pick(&self, fleet: &Snapshot, draw: Draw, tried: Option<u64>) -> Result<Arc<Node>, NoNode>;

    /// Where the purges are. Asked before a request goes to a node, and kept for [`Route::may_be_stored`].
    fn purges(&self) -> u64;

    /// Whether an answer to a request with this method is passed on only when all of it is here.
    fn holds(&self, method: Method, answer: &ResponseHead) -> bool;

    /// A client has connected. What it gives is asked for each answer that is written to this connection.
    fn connected(&self, ends: Ends) -> Option<Passage>;

    /// Whether a cache behind this listener may store an answer. Asked when its head is about to be written to `passage`.
    /// `began` is what [`Route::purges`] was.
    fn may_be_stored(
        &self,
        began: u64,
        passage: Option<&Passage>,
        request: &RequestHead,
        answer: &ResponseHead,
    ) -> bool;
}

/// An answer that no node gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnAnswer {
    /// Nothing is there: 404.
    NotFound,
    /// A whole answer in HTTP/1.1, with status 200, that closes the connection.
    Page(Vec<u8>),
}

/// Why no node can take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoNode {
    /// No node is up, or none beside the one that failed.
    NoneUp,
    /// Every Varnish misses a purge and the configuration says to refuse then.
    AllBehind,
    /// Nodes are up, but all of them have as many requests as they may.
    Busy,
}
