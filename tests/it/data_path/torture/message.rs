//! What an exchange is: everything that both sides will send, and what each must see of the other.
//!
//! An [`Exchange`] holds its bytes, so that nothing is decided while it runs except by the clock. The rules by which a
//! proxy changes a message are few, and they are written here a second time, from the RFC and not from the product:
//! fields that concern one connection stay behind, the rest goes on in its order, and a body is framed anew.

use std::fmt;

/// The place of an exchange in the run. It is a part of the target, so that a node knows what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number {
    pub conversation: u32,
    pub index: u32,
}

impl Number {
    /// From a target as [`super::generate`] makes them: `/CONVERSATION.INDEX/...`.
    pub fn of_target(target: &str) -> Option<Self> {
        let (conversation, index) = target.strip_prefix('/')?.split('/').next()?.split_once('.')?;
        Some(Number { conversation: conversation.parse().ok()?, index: index.parse().ok()? })
    }
}

/// Which listener a conversation uses, and so which nodes answer it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Its nodes keep every promise: a connection that they did not announce to close stays open. So nothing may fail.
    Edge,
    /// Its nodes cut, reset, and close what they seemed to keep.
    Origin,
}

/// One client and what it asks for, one after the other, on as many connections as that takes.
#[derive(Debug)]
pub struct Conversation {
    pub side: Side,
    pub exchanges: Vec<Exchange>,
    /// The client says that it will send no more as soon as it has sent its last request.
    pub half_closes: bool,
    /// The client sends what it began to send, also when it was answered meanwhile.
    pub stubborn: bool,
    /// The client goes without waiting for the end of a connection that was kept.
    pub hurries: bool,
    /// The client's connections take little at once, see [`super::pace::narrow`].
    pub narrow: bool,
}

/// One request and its answer.
#[derive(Debug)]
pub struct Exchange {
    pub number: Number,
    /// Sent without waiting for the answers to the requests before it.
    pub pipelined: bool,
    pub request: Request,
    pub answer: Answer,
    pub mishap: Option<Mishap>,
}

/// HTTP/1.0 or HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    Http10,
    Http11,
}

/// How the end of a body is found (RFC 9112 section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// No body, and nothing that announces one.
    None,
    Length(usize),
    Chunked,
    /// By the end of the connection (answers only).
    UntilClose,
}

/// One line of a head.
#[derive(Clone, Debug)]
pub struct Field {
    pub name: String,
    pub value: Vec<u8>,
    /// Blanks around the value, which do not belong to it (RFC 9112 section 5).
    pub blanks: [&'static str; 2],
    /// It concerns the message and not the connection (RFC 9110 section 7.6.1).
    pub end_to_end: bool,
}

#[derive(Debug)]
pub struct Body {
    pub framing: Framing,
    pub content: Vec<u8>,
    /// The content in its frame. A part of a chunked body to come (trailers) has its place here and in
    /// [`super::parse::BodyCheck`].
    pub wire: Vec<u8>,
}

/// What the client does about `Expect: 100-continue` (RFC 9110 section 10.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    No,
    /// Asks for it, and sends the body at once.
    SendsAtOnce,
    /// Sends the body after the 100, and not at all after a final answer.
    Waits,
}

#[derive(Debug)]
pub struct Request {
    pub method: &'static str,
    pub version: Version,
    /// The client wants to go on with the connection.
    pub keep_alive: bool,
    /// In origin form, as the node must see it.
    pub target: String,
    /// As the node must see it; `None` for the node's own address.
    pub host: Option<String>,
    pub fields: Vec<Field>,
    pub head: Vec<u8>,
    pub body: Body,
    pub expect: Expect,
}

impl Request {
    /// Whether it may be sent again after it may have been carried out (RFC 9110 section 9.2.1).
    pub fn is_safe(&self) -> bool {
        matches!(self.method, "GET" | "HEAD" | "OPTIONS")
    }
}

/// A 1xx before the answer.
#[derive(Debug)]
pub struct Interim {
    pub status: u16,
    pub reason: &'static str,
    pub fields: Vec<Field>,
    pub head: Vec<u8>,
    /// Sent before the node reads the body.
    pub before_body: bool,
}

/// What a node does with its connection when it has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Afterwards {
    Keeps,
    /// Closes, as the answer announced.
    Closes,
    /// Closes what the answer said to keep.
    ClosesUnannounced,
    /// Sends these bytes, which nobody asked for, right behind the answer. They look like an answer.
    Surplus(Vec<u8>),
}

#[derive(Debug)]
pub struct Answer {
    pub interim: Vec<Interim>,
    pub status: u16,
    pub reason: &'static str,
    pub fields: Vec<Field>,
    pub head: Vec<u8>,
    pub body: Body,
    /// A length that the head announces though no body follows (HEAD and 304).
    pub announced: Option<usize>,
    /// Answers when it has read this much of the content of the request, and reads on afterwards.
    pub early: Option<usize>,
    pub afterwards: Afterwards,
}

/// How one side goes where it should not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Says that no more will come, and reads on.
    HalfClose,
    Close,
    Reset,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// The node breaks off: the first time that it is asked, or always.
    NodeCuts { at: NodeCut, exit: Exit, always: bool },
    /// The client breaks off; always the last exchange of its conversation.
    ClientLeaves { at: Leave, exit: Exit },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeCut {
    /// When it has read the head of the request.
    BeforeBody,
    /// When it has read the whole request.
    BeforeAnswer,
    /// Behind so many bytes of the head of its answer.
    Head(usize),
    /// Behind so many bytes of the body of its answer, as it is framed.
    Body(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Behind so many bytes of the head of its request.
    Head(usize),
    /// Behind so many bytes of the body of its request, as it is framed.
    Body(usize),
    /// When it has read so many bytes of what is sent to it.
    Answer(usize),
}

impl Exchange {
    /// How the answer is framed for the client.
    pub fn framing_for_client(&self) -> Framing {
        match (self.answer.body.framing, self.request.version) {
            (Framing::Chunked | Framing::UntilClose, Version::Http11) => Framing::Chunked,
            (Framing::Chunked | Framing::UntilClose, Version::Http10) => Framing::UntilClose,
            (known, _) => known,
        }
    }

    /// Whether the client's connection is kept; `None` where it depends on how much of an upload was through when the
    /// answer came.
    pub fn is_kept(&self) -> Option<bool> {
        let goes_ahead = self.answer.interim.iter().any(|interim| interim.status == 100);
        if !self.request.keep_alive || self.framing_for_client() == Framing::UntilClose {
            Some(false)
        } else if self.answer.early.is_none() {
            Some(true)
        } else if self.request.expect == Expect::Waits && !goes_ahead {
            Some(false)
        } else {
            None
        }
    }

    /// Whether the client goes before it has its answer.
    pub fn is_left(&self) -> bool {
        matches!(self.mishap, Some(Mishap::ClientLeaves { .. }))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.conversation, self.index)
    }
}

/// The short form: what one must know to understand a failure. The bytes come from the seed.
impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Exchange { number, pipelined, request, answer, mishap } = self;
        let behind = if *pipelined { " pipelined" } else { "" };
        let keeps = if request.keep_alive { "keep" } else { "close" };
        let Request { method, version, body, expect, head, .. } = request;
        write!(f, "{number}{behind} {method} {version:?} {keeps}, head {} B, body {body}", head.len())?;
        if *expect != Expect::No {
            write!(f, ", expect {expect:?}")?;
        }
        let interim: Vec<u16> = answer.interim.iter().map(|interim| interim.status).collect();
        let Answer { status, head, body, early, afterwards, .. } = answer;
        write!(f, " -> {interim:?} {status}, head {} B, body {body}", head.len())?;
        if let Some(early) = early {
            write!(f, ", early after {early} B")?;
        }
        match afterwards {
            Afterwards::Surplus(bytes) => write!(f, ", surplus of {} B", bytes.len())?,
            other => write!(f, ", {other:?}")?,
        }
        mishap.map_or(Ok(()), |mishap| write!(f, "; {mishap:?}"))
    }
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} B (framed {} B)", self.framing, self.content.len(), self.wire.len())
    }
}

impl fmt::Display for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conversation { side, exchanges, half_closes, stubborn, hurries, narrow } = self;
        writeln!(f, "{side:?}, half-closes {half_closes}, stubborn {stubborn}, hurries {hurries}, narrow {narrow}")?;
        exchanges.iter().try_for_each(|exchange| writeln!(f, "  {exchange}"))
    }
}
