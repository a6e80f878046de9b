//! Random conversations, each generated from the seed of the run and its own number, so that one can be repeated alone.
//!
//! Generated messages are valid (`strict` tests invalid ones), but as odd as valid messages may be. Sizes are skewed:
//! most are ordinary, some are at the limits.

mod bytes;

use fastrand::Rng;

use super::message::{
    Afterwards, Answer, Body, Conversation, Exchange, Exit, Expect, Field, Framing, Interim, Leave, Mishap, NodeCut,
    Number, Request, Side, Version,
};
use bytes::{body_content, chunked, fields, head, host, line, target};

/// The largest size of a head's fields. clearcoat accepts 32 KiB in a request and 64 KiB in an answer, and adds to
/// both.
const REQUEST_FIELDS: usize = 24 * 1024;
const ANSWER_FIELDS: usize = 48 * 1024;

/// 200 is the most frequent; 204 and 304 have special rules.
const STATUSES: [u16; 17] = [200, 200, 200, 200, 200, 200, 200, 201, 204, 206, 301, 304, 304, 400, 404, 500, 503];

/// A generator for one purpose, independent of all others.
pub fn random(seed: u64, conversation: u32, purpose: u64) -> Rng {
    Rng::with_seed(bytes::mix(seed ^ bytes::mix(u64::from(conversation) << 8 | purpose)))
}

/// True with a probability of `percent`.
fn chance(random: &mut Rng, percent: u8) -> bool {
    random.u8(..100) < percent
}

pub fn conversation(seed: u64, number: u32) -> Conversation {
    let mut random = random(seed, number, 0);
    let random = &mut random;
    let side = if random.bool() { Side::Edge } else { Side::Origin };
    let most = if chance(random, 30) { 8 } else { 3 };
    let count = random.u32(1..=most);
    let pipelines = random.bool();
    let mut exchanges: Vec<Exchange> = (0..count)
        .map(|index| {
            let number = Number { conversation: number, index };
            let pipelined = index > 0 && pipelines && chance(random, 80);
            exchange(random, seed, number, side, pipelined)
        })
        .collect();
    if chance(random, 12) {
        leave(random, exchanges.last_mut().expect("at least one"));
    }
    Conversation {
        side,
        half_closes: chance(random, 30) && !exchanges[exchanges.len() - 1].is_left(),
        exchanges,
        stubborn: chance(random, 50),
        hurries: chance(random, 10),
        narrow: chance(random, 30),
    }
}

fn exchange(random: &mut Rng, seed: u64, number: Number, side: Side, pipelined: bool) -> Exchange {
    let request = request(random, seed, number);
    let mut answer = answer(random, seed, number, side, &request);
    let mishap = (side == Side::Origin && chance(random, 12)).then(|| node_cut(random, &answer));
    if let Some(Mishap::NodeCuts { at, exit, .. }) = mishap {
        // An early answer is only compatible with a node that resets in mid-answer while the request is still being
        // sent.
        let may_be_early = matches!(at, NodeCut::Body(_)) && exit == Exit::Reset && request.expect != Expect::Waits;
        let size = request.body.content.len();
        answer.early = (may_be_early && size > 0 && random.bool()).then(|| random.usize(..=size / 4));
        if request.expect == Expect::Waits && !answer.interim.iter().any(|interim| interim.status == 100) {
            answer.interim.insert(0, interim(random, 100, true));
        }
    }
    // clearcoat forwards a cut as a reset, which discards earlier answers that the client has not read.
    let pipelined = pipelined && !matches!(mishap, Some(Mishap::NodeCuts { at: NodeCut::Body(_), .. }));
    Exchange { number, pipelined, request, answer, mishap }
}

fn node_cut(random: &mut Rng, answer: &Answer) -> Mishap {
    let at = match random.u8(..8) {
        0 => NodeCut::BeforeBody,
        1 => NodeCut::BeforeAnswer,
        2 | 3 => NodeCut::Head(random.usize(1..answer.head.len())),
        _ if answer.body.wire.is_empty() => NodeCut::BeforeAnswer,
        // A cut within the last bytes is easily overlooked.
        4 => NodeCut::Body(answer.body.wire.len() - random.usize(1..=answer.body.wire.len().min(8))),
        _ => NodeCut::Body(random.usize(..answer.body.wire.len())),
    };
    // A close is the regular end of a body without a length, so it is not a visible cut.
    let looks_complete = matches!(at, NodeCut::Body(_)) && answer.body.framing == Framing::UntilClose;
    let exit = if looks_complete || random.bool() { Exit::Reset } else { Exit::HalfClose };
    Mishap::NodeCuts { at, exit, always: random.bool() }
}

/// Makes the client leave during this exchange.
fn leave(random: &mut Rng, exchange: &mut Exchange) {
    let Exchange { request, answer, mishap, .. } = exchange;
    let at = match random.u8(..4) {
        0 => Leave::Head(random.usize(1..request.head.len())),
        1 => Leave::Answer(random.usize(..answer.head.len() + answer.body.wire.len())),
        _ if request.body.wire.is_empty() => Leave::Head(request.head.len() - 1),
        2 => Leave::Body(request.body.wire.len() - random.usize(1..=request.body.wire.len().min(8))),
        _ => Leave::Body(random.usize(..request.body.wire.len())),
    };
    // A client that is reading is still there.
    let gone = usize::from(matches!(at, Leave::Answer(_)));
    let exit = [Exit::HalfClose, Exit::Close, Exit::Reset][random.usize(gone..3)];
    answer.early = None;
    *mishap = Some(Mishap::ClientLeaves { at, exit });
    if request.expect == Expect::Waits {
        request.expect = Expect::SendsAtOnce;
    }
    if exit != Exit::HalfClose {
        // A client that leaves for good would also lose the answers to earlier requests.
        exchange.pipelined = false;
    }
}

fn request(random: &mut Rng, seed: u64, number: Number) -> Request {
    let method = ["GET", "GET", "GET", "HEAD", "POST", "POST", "PUT", "DELETE", "OPTIONS"][random.usize(..9)];
    let version = if chance(random, 15) { Version::Http10 } else { Version::Http11 };
    let with_body = chance(random, if matches!(method, "POST" | "PUT") { 95 } else { 10 });
    let content = if with_body { body_content(random, seed, number, 0) } else { Vec::new() };
    let framing = match version {
        _ if !with_body => Framing::None,
        Version::Http11 if random.bool() => Framing::Chunked,
        _ => Framing::Length(content.len()),
    };
    let body = framed(random, framing, content);
    let keep_alive = chance(random, if version == Version::Http10 { 60 } else { 85 });
    let expect = match random.u8(..10) {
        0 if version == Version::Http11 && !body.wire.is_empty() => Expect::Waits,
        1 if version == Version::Http11 && !body.wire.is_empty() => Expect::SendsAtOnce,
        _ => Expect::No,
    };
    let target = target(random, number);
    let absolute = chance(random, 5);
    let host_field = (version == Version::Http11 || chance(random, 70)).then(|| host(random));
    let authority = host_field.clone().unwrap_or_else(|| host(random));
    let mut lines = fields(random, REQUEST_FIELDS, false);
    if let Some(host) = &host_field {
        line(random, &mut lines, "Host", host);
    }
    framing_line(random, &mut lines, framing);
    if expect != Expect::No {
        let at = line(random, &mut lines, "Expect", "100-continue");
        lines[at].end_to_end = true;
    }
    connection_lines(random, &mut lines, version, keep_alive);
    let form = if absolute { format!("http://{authority}{target}") } else { target.clone() };
    let protocol = if version == Version::Http10 { "HTTP/1.0" } else { "HTTP/1.1" };
    let mut wire = head(&format!("{method} {form} {protocol}"), &lines);
    // RFC 9112 section 2.2: old clients sent a blank line after a body.
    if number.index > 0 && chance(random, 3) {
        wire.splice(0..0, *b"\r\n");
    }
    let host = if absolute { Some(authority) } else { host_field };
    Request { method, version, keep_alive, target, host, fields: lines, head: wire, body, expect }
}

/// The sender's wish for the connection, and hop-by-hop fields.
fn connection_lines(random: &mut Rng, lines: &mut Vec<Field>, version: Version, keep_alive: bool) {
    let mut options = Vec::new();
    match (version, keep_alive) {
        (_, false) if version == Version::Http11 || random.bool() => options.push("close"),
        (Version::Http10, true) => options.push("keep-alive"),
        (Version::Http11, true) if chance(random, 20) => options.push("Keep-Alive"),
        _ => {}
    }
    if chance(random, 10) {
        options.push("X-One-Hop");
        line(random, lines, "X-One-Hop", "only for you");
    }
    if chance(random, 5) {
        line(random, lines, "Keep-Alive", "timeout=5");
    }
    if chance(random, 5) {
        line(random, lines, "Proxy-Connection", "keep-alive");
    }
    if !options.is_empty() {
        let comma = [", ", ",", " , "][random.usize(..3)];
        line(random, lines, "Connection", &options.join(comma));
    }
}

fn framing_line(random: &mut Rng, lines: &mut Vec<Field>, framing: Framing) {
    match framing {
        Framing::Length(length) => _ = line(random, lines, "Content-Length", &length.to_string()),
        Framing::Chunked => {
            let value = ["chunked", "Chunked", "CHUNKED"][random.usize(..3)];
            line(random, lines, "Transfer-Encoding", value);
        }
        Framing::None | Framing::UntilClose => {}
    }
}

fn framed(random: &mut Rng, framing: Framing, content: Vec<u8>) -> Body {
    let wire = if framing == Framing::Chunked { chunked(random, &content) } else { content.clone() };
    Body { framing, content, wire }
}

fn answer(random: &mut Rng, seed: u64, number: Number, side: Side, request: &Request) -> Answer {
    let status = STATUSES[random.usize(..STATUSES.len())];
    let bodiless = request.method == "HEAD" || status == 204 || status == 304;
    let content = body_content(random, seed, number, 1);
    let length = content.len();
    // An HTTP/1.0 node knows no chunks, and keeps a connection only if it says so.
    let old = chance(random, 5);
    let framing = match random.u8(..10) {
        _ if status == 204 => Framing::None,
        0..4 => Framing::Length(length),
        4..8 if !old => Framing::Chunked,
        _ => Framing::UntilClose,
    };
    let mut lines = fields(random, ANSWER_FIELDS, true);
    framing_line(random, &mut lines, framing);
    // Without a body, the end of the connection has no meaning.
    let must_close = framing == Framing::UntilClose && !bodiless;
    let afterwards = match random.u8(..20) {
        _ if must_close && random.bool() => Afterwards::Closes,
        _ if must_close => Afterwards::ClosesUnannounced,
        0 | 1 => Afterwards::Closes,
        2 | 3 if side == Side::Origin => Afterwards::ClosesUnannounced,
        4 => Afterwards::Surplus(forged(random)),
        _ => Afterwards::Keeps,
    };
    let version = if old { Version::Http10 } else { Version::Http11 };
    let keeps = afterwards != Afterwards::Closes && !(old && must_close);
    connection_lines(random, &mut lines, version, keeps);
    let reason = ["OK", "", "Fine", "Not  what you\twanted", "0"][random.usize(..5)];
    let protocol = if old { "HTTP/1.0" } else { "HTTP/1.1" };
    let wire = head(&format!("{protocol} {status} {reason}"), &lines);
    let announced = match framing {
        Framing::Length(length) if bodiless => Some(length),
        _ => None,
    };
    let body = if bodiless {
        Body { framing: Framing::None, content: Vec::new(), wire: Vec::new() }
    } else {
        framed(random, framing, content)
    };
    let can_be_early = !request.body.wire.is_empty();
    let early = (can_be_early && chance(random, 15)).then(|| random.usize(..=request.body.content.len()));
    let interim = interims(random, request, early.is_some());
    // A client whose expected 100 never arrives sends no body.
    let refused = request.expect == Expect::Waits && !interim.iter().any(|interim| interim.status == 100);
    let early = if refused { Some(0) } else { early };
    Answer { interim, status, reason, fields: lines, head: wire, body, announced, early, afterwards }
}

fn interims(random: &mut Rng, request: &Request, early: bool) -> Vec<Interim> {
    let mut interims = Vec::new();
    for _ in 0..if chance(random, 12) { random.usize(1..=3) } else { 0 } {
        let before_body = early || random.bool();
        let status = [102, 103, 103][random.usize(..3)];
        interims.push(interim(random, status, before_body));
    }
    let refuses = early && random.bool();
    let goes_ahead = match request.expect {
        Expect::Waits => !refuses,
        Expect::SendsAtOnce => random.bool(),
        Expect::No => !request.body.wire.is_empty() && chance(random, 3),
    };
    if goes_ahead {
        interims.push(interim(random, 100, true));
    }
    // In the order in which the node sends them.
    interims.sort_by_key(|interim| !interim.before_body);
    interims
}

fn interim(random: &mut Rng, status: u16, before_body: bool) -> Interim {
    let fields = if status == 100 { Vec::new() } else { fields(random, 600, true) };
    let reason = ["Early Hints", "Continue", "Wait"][random.usize(..3)];
    let head = head(&format!("HTTP/1.1 {status} {reason}"), &fields);
    Interim { status, reason, fields, head, before_body }
}

/// An unsolicited answer.
fn forged(random: &mut Rng) -> Vec<u8> {
    let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged";
    whole[..if random.bool() { whole.len() } else { random.usize(1..whole.len()) }].to_vec()
}
