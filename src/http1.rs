//! HTTP/1.1 on the wire: strict in, canonical out.
//!
//! A proxy that is laxer than the server behind it can be used to smuggle requests past it; the servers behind this one
//! are Varnish and PHP, each with its own reading. So there is no leniency here: input that RFC 9112 leaves open or
//! merely discourages is refused, and accepted input is written in one canonical form.
//!
//! A head is its bytes and a list of spans into them. `httparse` splits it, our checks read the same bytes, and nothing
//! is copied into a map: forwarding writes the kept spans and adds ours. The bytes are a copy, in one value with the
//! spans, so that the spans of one head cannot be applied to the bytes of another; it costs a few hundred bytes of
//! `memcpy`. The structs are reused for every request, so that a connection under load does not allocate.

mod authority;
mod body;
mod chunked;
mod field;
mod head;
mod request;
mod response;
mod tags;
mod write;

pub use authority::{Scheme, bare_host};
pub use body::BodyDecoder;
pub use chunked::{BadChunk, ChunkedDecoder};
pub use head::{HeadLimits, HeadScan};
pub use request::{Method, RequestHead};
pub use response::ResponseHead;
pub use write::{
    Forwarding, OwnResponse, push_decimal, write_own_response, write_request, write_response, write_subrequest,
};

/// How the end of a message body is found (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    #[default]
    None,
    /// `Content-Length` bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// The body ends with the connection (responses only).
    UntilClose,
}

/// The protocol version of a message. Others are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    #[default]
    Http11,
    /// HTTP/2. No head on the wire here has it; a request from HTTP/2 is forwarded as HTTP/1.1.
    Http2,
}

/// Why a head is refused. The texts go to the peer, so they contain none of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    /// The head is longer than the limit.
    #[error("the head is too large")]
    TooLarge,
    /// More header fields than the limit.
    #[error("there are too many header fields")]
    TooManyFields,
    /// A line that ends without CR, or a lone CR.
    #[error("a line of the head does not end with CR LF")]
    LineEnd,
    /// The head does not parse.
    #[error("the head is malformed: {0}")]
    Syntax(&'static str),
    /// A version other than 1.0 and 1.1.
    #[error("the protocol version is not HTTP/1.0 or HTTP/1.1")]
    Version,
    /// A request target whose form or bytes are not allowed.
    #[error("the request target is malformed")]
    Target,
    /// Missing, repeated, malformed, or in conflict with the request target.
    #[error("the Host header is missing, repeated, malformed or in conflict with the request target")]
    Host,
    /// Not a single run of digits, or repeated.
    #[error("Content-Length is repeated or not a number")]
    ContentLength,
    /// Not exactly one `chunked`, or with HTTP/1.0.
    #[error("Transfer-Encoding is not exactly one chunked")]
    TransferEncoding,
    /// Both `Content-Length` and `Transfer-Encoding`.
    #[error("Content-Length and Transfer-Encoding exclude each other")]
    AmbiguousLength,
    /// A status code that is invalid here.
    #[error("the status code is not allowed here")]
    Status,
}
