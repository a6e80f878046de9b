//! The required result of an exchange: the head that each side sees, and the permitted endings.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use super::message::{Answer, Exchange, Exit, Field, Framing, Interim, Leave, Mishap, NodeCut, Request, Side, Version};
use super::parse::{Ending, Head, shown};

/// The fields that clearcoat adds, to a node and to a client.
const OWN: [&str; 10] = [
    "host",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-forwarded-host",
    "via",
    "content-length",
    "transfer-encoding",
    "connection",
    "x-clearcoat-asked",
    "x-clearcoat-seal",
];

/// Checks the request head that this node received.
pub fn check_request(head: &Head, request: &Request, node: SocketAddr) -> Result<(), String> {
    same_line(&head.first_line, &format!("{} {} HTTP/1.1", request.method, request.target))?;
    let host = request.host.clone().unwrap_or_else(|| node.to_string());
    for (name, value) in [
        ("Host", Some(host.as_str())),
        ("X-Forwarded-For", Some("127.0.0.1")),
        ("X-Forwarded-Proto", Some("http")),
        ("X-Forwarded-Host", Some(host.as_str())),
        ("Via", Some(via(request.version))),
        ("Connection", None),
    ] {
        same_value(head, name, value)?;
    }
    let expected = Some(request.body.framing).filter(|framing| *framing != Framing::None);
    same_framing(head, expected)?;
    same_fields(head, &request.fields)
}

/// Checks the head of an interim answer that the client received.
pub fn check_interim(head: &Head, interim: &Interim) -> Result<(), String> {
    same_line(&head.first_line, &format!("HTTP/1.1 {} {}", interim.status, interim.reason))?;
    same_value(head, "Via", Some(via(Version::Http11)))?;
    same_value(head, "Connection", None)?;
    same_framing(head, None)?;
    same_fields(head, &interim.fields)
}

/// Checks the answer head that the client received. Returns whether the client may reuse its connection.
pub fn check_answer(head: &Head, exchange: &Exchange) -> Result<bool, String> {
    let Answer { status, reason, fields, announced, .. } = &exchange.answer;
    same_line(&head.first_line, &format!("HTTP/1.1 {status} {reason}"))?;
    same_value(head, "Via", Some(via(Version::Http11)))?;
    let expected = match exchange.framing_for_client() {
        Framing::None => announced.map(Framing::Length),
        Framing::UntilClose => None,
        framed => Some(framed),
    };
    same_framing(head, expected)?;
    let is_tags = |field: &Field| field.name.eq_ignore_ascii_case("X-Magento-Tags");
    if !["GET", "HEAD"].contains(&exchange.request.method) && fields.iter().any(is_tags) {
        // No cache may store it, where answers are sealed.
        let rest = head.fields.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("Surrogate-Control")).cloned();
        same_fields(&Head { first_line: head.first_line.clone(), fields: rest.collect() }, fields)?;
    } else {
        same_fields(head, fields)?;
    }
    let kept = is_kept(head, exchange.request.version)?;
    match exchange.is_kept() {
        Some(expected) if expected != kept => {
            Err(format!("the connection is to be kept: {kept} instead of {expected}"))
        }
        _ => Ok(kept),
    }
}

/// Whether a final answer's head keeps its connection (RFC 9112 section 9.3).
pub fn is_kept(head: &Head, client: Version) -> Result<bool, String> {
    match (head.only("connection")?, client) {
        (Some(b"close"), _) => Ok(false),
        (None, Version::Http11) | (Some(b"keep-alive"), Version::Http10) => Ok(true),
        (other, _) => Err(format!("Connection: {:?} for a client of {client:?}", other.map(shown))),
    }
}

fn via(received: Version) -> &'static str {
    match received {
        Version::Http10 => "1.0 clearcoat",
        Version::Http11 => "1.1 clearcoat",
    }
}

fn same_line(came: &str, expected: &str) -> Result<(), String> {
    if came == expected { Ok(()) } else { Err(format!("the first line is {came:?}, not {expected:?}")) }
}

fn same_value(head: &Head, name: &str, expected: Option<&str>) -> Result<(), String> {
    let came = head.only(name)?;
    if came == expected.map(str::as_bytes) {
        return Ok(());
    }
    Err(format!("{name} is {:?}, not {expected:?}", came.map(shown)))
}

fn same_framing(head: &Head, expected: Option<Framing>) -> Result<(), String> {
    let came = head.framing()?;
    if came == expected { Ok(()) } else { Err(format!("the head announces {came:?}, not {expected:?}")) }
}

/// Checks the end-to-end fields and their order.
fn same_fields(head: &Head, sent: &[Field]) -> Result<(), String> {
    let is_own = |name: &str| OWN.iter().any(|own| own.eq_ignore_ascii_case(name));
    let mut came = head.fields.iter().filter(|(name, _)| !is_own(name));
    let shown_field = |name: &str, value: &[u8]| format!("{name}: {}", shown(value));
    for Field { name, value, .. } in sent.iter().filter(|field| field.end_to_end) {
        let expected = shown_field(name, value);
        match came.next() {
            Some((came_name, came_value)) if came_name == name && came_value == value => {}
            Some((name, value)) => return Err(format!("the field {} came, not {expected}", shown_field(name, value))),
            None => return Err(format!("the field {expected} is missing")),
        }
    }
    came.next().map_or(Ok(()), |(name, value)| Err(format!("the field {} is too much", shown_field(name, value))))
}

/// The end of an exchange as seen by the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The complete answer, byte by byte.
    Whole,
    /// Part of the answer or nothing, and then an end that cannot be mistaken for a regular one.
    Cut(Ending),
    /// clearcoat's own 502.
    BadGateway,
    /// The client left.
    Left,
}

/// How often a node may have seen an exchange.
#[derive(Clone, Debug)]
pub struct Arrivals {
    pub begun: RangeInclusive<u32>,
    /// In complete form.
    pub complete: RangeInclusive<u32>,
}

/// The most attempts of a request: on a pooled connection, on a new one to the same node, on another node.
const TRIES: u32 = 3;

/// Whether an exchange may end like this, and if so how often its nodes must have seen it. `None` if it may not.
pub fn judge(exchange: &Exchange, side: Side, outcome: Outcome) -> Option<Arrivals> {
    let Exchange { request, answer, mishap, .. } = exchange;
    let arrivals = |begun, complete| Some(Arrivals { begun, complete });
    let has_body = !request.body.wire.is_empty();
    // A node of the origin may have closed the connection on which the request was sent. A request that is no longer in
    // memory, or must not be repeated, is then lost.
    let repeatable = request.is_safe() && !has_body;
    let may_be_lost = side == Side::Origin && !repeatable;
    match (mishap, outcome) {
        (None, Outcome::Whole) if answer.early.is_some() => arrivals(1..=1, 0..=1),
        (None, Outcome::Whole) => arrivals(1..=1, 1..=1),
        (None, Outcome::BadGateway) if may_be_lost => arrivals(0..=0, 0..=0),
        (None, _) => None,
        (Some(Mishap::NodeCuts { at, exit, always }), outcome) => {
            let tries = if request.is_safe() { TRIES } else { 1 };
            let in_body = matches!(at, NodeCut::Body(_));
            // A reset also discards unread data sent before it: perhaps the whole answer.
            let least = u32::from(answer.early.is_none());
            // A page with tags is not forwarded before its end either, up to the hold limit.
            let is_tags = |field: &Field| field.name.eq_ignore_ascii_case("X-Magento-Tags");
            let is_held = side == Side::Origin
                && request.method == "GET"
                && answer.status == 200
                && answer.fields.iter().any(is_tags);
            let before_answer = !in_body || is_held || *exit == Exit::Reset;
            match outcome {
                Outcome::Whole if before_answer && !always && tries > 1 => arrivals(2..=tries, least..=tries),
                Outcome::Cut(_) if in_body => arrivals(1..=tries, least..=tries),
                Outcome::BadGateway if may_be_lost || (before_answer && (*always || !repeatable)) => {
                    arrivals(0..=tries, 0..=tries)
                }
                _ => None,
            }
        }
        (Some(Mishap::ClientLeaves { at, .. }), outcome) => {
            let complete = if matches!(at, Leave::Answer(_)) { 0..=1 } else { 0..=0 };
            let begun = if matches!(at, Leave::Head(_)) { 0..=0 } else { 0..=1 };
            let allowed = match outcome {
                Outcome::Left => true,
                Outcome::BadGateway => may_be_lost && *begun.end() > 0,
                Outcome::Whole => complete == (0..=1),
                Outcome::Cut(_) => false,
            };
            if allowed { arrivals(begun, complete) } else { None }
        }
    }
}
