//! Writes heads: kept fields, our own fields, one canonical framing.

use std::borrow::Cow;
use std::net::SocketAddr;

use super::field::{Field, FieldKind, FieldWriter, STRICT_TRANSPORT};
use super::tags::{TagLines, is_tags, push_tags};
use super::{Framing, RequestHead, ResponseHead, Version};

/// The client's data for the next hop.
#[derive(Clone, Copy, Debug)]
pub struct Forwarding<'a> {
    /// The address of the peer, as text.
    pub peer: &'a str,
    /// `http` or `https`: the scheme that the peer used.
    pub proto: &'a str,
    /// Whether the peer's `X-Forwarded-*` fields are trusted (ours is appended) or replaced.
    pub trusted: bool,
    /// The address of the node: `Host` for a request that has none (HTTP/1.0), as nginx does.
    pub node: SocketAddr,
    /// The version that the peer spoke, for `Via`.
    pub received: Version,
    /// One more field, beside `X-Forwarded-Proto`, that says `https` of a peer that came that way. Magento calls it
    /// the offloader header.
    pub offload_header: Option<&'a str>,
    /// What the reader of the page remembers, for a cache that passes it on; empty for any other node.
    pub asked: &'a [u8],
    /// The value of `X-Request-ID`, in place of one that the request has; empty to leave that as it is.
    pub request_id: &'a [u8],
    /// The value of `traceparent`; empty to leave one that the request has as it is.
    pub traceparent: &'a [u8],
}

impl Forwarding<'_> {
    fn is_offload_header(&self, name: &[u8]) -> bool {
        self.offload_header.is_some_and(|header| name.eq_ignore_ascii_case(header.as_bytes()))
    }

    /// The host that the request is for.
    pub fn host<'h>(&self, head: &'h RequestHead) -> Cow<'h, [u8]> {
        head.host().map_or_else(|| self.node.to_string().into_bytes().into(), Cow::from)
    }
}

/// Writes a request's head for the next hop: HTTP/1.1, the same method and origin-form target, hop-by-hop fields
/// removed, `X-Forwarded-For`, `-Proto`, `-Host` and `Via` set. An upgrade offer is forwarded if the head allows it.
pub fn write_request(out: &mut Vec<u8>, head: &RequestHead, forwarding: Forwarding<'_>) {
    push(out, &[head.method_name(), b" ", head.target(), b" HTTP/1.1\r\nHost: "]);
    write_request_fields(out, head, forwarding);
    if let Some(protocol) = head.upgrade {
        push_upgrade(out, protocol.bytes(&head.bytes));
    }
    match (head.framing, head.fields.content_length) {
        (Framing::Chunked, _) => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        (_, Some(length)) => push_length(out, length),
        _ => {}
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes the head of a GET for another target of the same host, on behalf of the same client: with the fields of this
/// request.
pub fn write_subrequest(out: &mut Vec<u8>, target: &[u8], head: &RequestHead, forwarding: Forwarding<'_>) {
    push(out, &[b"GET ", target, b" HTTP/1.1\r\nHost: "]);
    write_request_fields(out, head, forwarding);
    out.extend_from_slice(b"\r\n");
}

/// Writes the value of `Host`, the kept fields and those about the client.
fn write_request_fields(out: &mut Vec<u8>, head: &RequestHead, forwarding: Forwarding<'_>) {
    let bytes = &head.bytes[..];
    let host = forwarding.host(head);
    push(out, &[&host, b"\r\n"]);
    let trusted = forwarding.trusted;
    let mut fields = FieldWriter::new(bytes);
    let (mut has_proto, mut has_host, mut has_offload) = (false, false, false);
    for field in &head.fields.list {
        let believed = match field.kind {
            FieldKind::Kept | FieldKind::ForwardedOther if forwarding.is_offload_header(field.name.bytes(bytes)) => {
                has_offload |= trusted;
                trusted
            }
            FieldKind::Kept | FieldKind::Expect => true,
            FieldKind::ForwardedProto => {
                has_proto |= trusted;
                trusted
            }
            FieldKind::ForwardedHost => {
                has_host |= trusted;
                trusted
            }
            FieldKind::ForwardedOther => trusted,
            _ => false,
        };
        if believed {
            fields.push(out, field);
        }
    }
    fields.finish(out);
    out.extend_from_slice(b"X-Forwarded-For: ");
    if trusted {
        for field in head.fields.list.iter().filter(|field| field.kind == FieldKind::ForwardedFor) {
            push(out, &[field.value.bytes(bytes), b", "]);
        }
    }
    push(out, &[forwarding.peer.as_bytes(), b"\r\n"]);
    if !has_proto {
        push(out, &[b"X-Forwarded-Proto: ", forwarding.proto.as_bytes(), b"\r\n"]);
    }
    if !has_host {
        push(out, &[b"X-Forwarded-Host: ", &host, b"\r\n"]);
    }
    if let Some(header) = forwarding.offload_header.filter(|_| !has_offload && forwarding.proto == "https") {
        push(out, &[header.as_bytes(), b": https\r\n"]);
    }
    if !forwarding.asked.is_empty() {
        push(out, &[b"X-Clearcoat-Asked: ", forwarding.asked, b"\r\n"]);
    }
    if !forwarding.request_id.is_empty() {
        push(out, &[b"X-Request-ID: ", forwarding.request_id, b"\r\n"]);
    }
    if !forwarding.traceparent.is_empty() {
        push(out, &[b"traceparent: ", forwarding.traceparent, b"\r\n"]);
    }
    push_via(out, forwarding.received);
}

/// Writes a response's head for the client, and returns the framing of its body: if the length is unknown, chunked for
/// a client that can read it, else up to the end of the connection.
///
/// `keep_alive` is whether we are willing to keep the connection; the head tells the client in the form of its version.
/// It is returned as false if the framing does not allow it.
pub fn write_response(out: &mut Vec<u8>, head: &ResponseHead, client: Version, keep_alive: bool) -> (Framing, bool) {
    let bytes = &head.bytes[..];
    push_status(out, head.status);
    push(out, &[head.reason.bytes(bytes), b"\r\n"]);
    if head.no_store {
        push_no_store(out, head);
    }
    let is_written = |field: &Field| head.no_store && is_surrogate_control(field, bytes);
    let tag_lines = if head.joins_tags { TagLines::of(head) } else { TagLines::AsTheyCame };
    let mut fields = FieldWriter::new(bytes);
    for field in head.kept().filter(|field| !is_written(field)) {
        if tag_lines != TagLines::AsTheyCame && is_tags(field, bytes) {
            fields.finish(out);
            push_tags(out, tag_lines, field, head);
        } else {
            fields.push(out, field);
        }
    }
    fields.finish(out);
    for (name, value) in head.added_fields() {
        push(out, &[name.as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
    }
    if !head.seal.is_empty() {
        push(out, &[b"X-Clearcoat-Seal: ", &head.seal, b"\r\n"]);
    }
    if !head.request_id.is_empty() {
        push(out, &[b"X-Request-ID: ", &head.request_id, b"\r\n"]);
    }
    if !head.strict_transport.is_empty() {
        push(out, &[b"Strict-Transport-Security: ", &head.strict_transport, b"\r\n"]);
    }
    push_via(out, Version::Http11);
    let framing = match head.framing {
        Framing::Chunked | Framing::UntilClose if client == Version::Http11 => Framing::Chunked,
        Framing::Chunked | Framing::UntilClose => Framing::UntilClose,
        known => known,
    };
    match (framing, head.announced_length()) {
        (Framing::Chunked, _) => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        (Framing::Length(_) | Framing::None, Some(length)) => push_length(out, length),
        _ => {}
    }
    let keep_alive = keep_alive && framing != Framing::UntilClose;
    if let Some(protocol) = head.upgrade {
        push_upgrade(out, protocol.bytes(bytes));
    } else if !head.is_interim() {
        match (keep_alive, client) {
            (false, _) => out.extend_from_slice(b"Connection: close\r\n"),
            (true, Version::Http10) => out.extend_from_slice(b"Connection: keep-alive\r\n"),
            (true, _) => {}
        }
    }
    out.extend_from_slice(b"\r\n");
    (framing, keep_alive)
}

/// A response of our own: no node has answered.
#[derive(Clone, Copy, Debug)]
pub struct OwnResponse<'r> {
    /// The status code.
    pub status: u16,
    /// Its words.
    pub reason: &'r str,
    /// The media type of the body.
    pub content_type: &'r str,
    /// What is shown to a human.
    pub body: &'r [u8],
    /// When to come again, in seconds.
    pub retry_after: Option<u32>,
    /// Where to go instead; empty for nowhere.
    pub location: &'r [u8],
    /// The value of `Strict-Transport-Security`; empty for none.
    pub strict_transport: &'r str,
    /// The id of the request; empty if it has none.
    pub request_id: &'r [u8],
    /// The request was HEAD: what is said of the body is said, and it is not sent.
    pub head_only: bool,
}

impl OwnResponse<'_> {
    /// Calls `put` with each field but those that frame the response. Names are in lower case, as HTTP/2 requires.
    pub fn each_field(&self, mut put: impl FnMut(&'static str, &[u8])) {
        put("content-type", self.content_type.as_bytes());
        put("cache-control", b"no-store");
        if self.status == 405 {
            put("allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
        }
        if let Some(seconds) = self.retry_after {
            put("retry-after", itoa::Buffer::new().format(seconds).as_bytes());
        }
        for (name, value) in [
            ("location", self.location),
            (STRICT_TRANSPORT, self.strict_transport.as_bytes()),
            ("x-request-id", self.request_id),
        ] {
            if !value.is_empty() {
                put(name, value);
            }
        }
    }

    /// The bytes of the body that are sent.
    pub fn body_len(&self) -> u64 {
        if self.head_only { 0 } else { self.body.len() as u64 }
    }
}

/// Appends a response of our own. It always ends the connection.
pub fn write_own_response(out: &mut Vec<u8>, response: &OwnResponse<'_>) {
    push_status(out, response.status);
    push(out, &[response.reason.as_bytes(), b"\r\n"]);
    response.each_field(|name, value| push(out, &[name.as_bytes(), b": ", value, b"\r\n"]));
    push_length(out, response.body.len() as u64);
    out.extend_from_slice(b"Connection: close\r\n\r\n");
    if !response.head_only {
        out.extend_from_slice(response.body);
    }
}

/// Appends a number in decimal digits.
pub fn push_decimal(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

fn push(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

fn push_status(out: &mut Vec<u8>, status: u16) {
    out.extend_from_slice(b"HTTP/1.1 ");
    push_decimal(out, u64::from(status));
    out.push(b' ');
}

/// RFC 9110 section 7.8: `Upgrade` is sent with the `Connection` option that limits it to one hop.
fn push_upgrade(out: &mut Vec<u8>, protocol: &[u8]) {
    push(out, &[b"Connection: upgrade\r\nUpgrade: ", protocol, b"\r\n"]);
}

fn push_length(out: &mut Vec<u8>, length: u64) {
    out.extend_from_slice(b"Content-Length: ");
    push_decimal(out, length);
    out.extend_from_slice(b"\r\n");
}

/// `Surrogate-Control: no-store` (Edge Architecture Specification), before the node's own value, such as
/// `content="ESI/1.0"`. In one line, since VCL reads only the first line of a name.
fn push_no_store(out: &mut Vec<u8>, head: &ResponseHead) {
    out.extend_from_slice(b"Surrogate-Control: no-store");
    for field in head.kept().filter(|field| is_surrogate_control(field, &head.bytes)) {
        push(out, &[b", ", field.value.bytes(&head.bytes)]);
    }
    out.extend_from_slice(b"\r\n");
}

fn is_surrogate_control(field: &Field, bytes: &[u8]) -> bool {
    field.name.bytes(bytes).eq_ignore_ascii_case(b"surrogate-control")
}

/// RFC 9110 section 7.6.3: the received version, and our name. A separate line after those of other hops.
fn push_via(out: &mut Vec<u8>, received: Version) {
    out.extend_from_slice(match received {
        Version::Http10 => b"Via: 1.0 clearcoat\r\n",
        Version::Http11 => b"Via: 1.1 clearcoat\r\n",
        Version::Http2 => b"Via: 2.0 clearcoat\r\n",
    });
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::http1::{HeadLimits, HeadScan, Method};

    const LIMITS: HeadLimits = HeadLimits { bytes: 9999, fields: 100 };

    const PLAIN: Forwarding<'_> = Forwarding {
        peer: "192.0.2.7",
        proto: "http",
        trusted: false,
        node: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 80),
        received: Version::Http11,
        offload_header: None,
        asked: b"",
        request_id: b"",
        traceparent: b"",
    };

    fn request(bytes: &str, trusted: bool) -> String {
        let mut head = RequestHead::default();
        head.read(bytes.as_bytes(), &mut HeadScan::default(), LIMITS).unwrap().unwrap();
        let mut out = Vec::new();
        let forwarding = Forwarding { trusted, received: head.version, ..PLAIN };
        write_request(&mut out, &head, forwarding);
        String::from_utf8(out).unwrap()
    }

    fn response(bytes: &str, client: Version, keep_alive: bool) -> (String, Framing, bool) {
        let mut head = ResponseHead::default();
        head.read(bytes.as_bytes(), Method::Get, &mut HeadScan::default(), LIMITS).unwrap().unwrap();
        let mut out = Vec::new();
        let (framing, keep_alive) = write_response(&mut out, &head, client, keep_alive);
        (String::from_utf8(out).unwrap(), framing, keep_alive)
    }

    const FORGED: &str = "GET http://a/p HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.1.1.1\r\nX-Forwarded-Proto: https\r\n\
        X-Forwarded-Host: evil\r\nX_Forwarded_For: 2.2.2.2\r\nConnection: x-secret, close\r\nX-Secret: s\r\n\
        Keep-Alive: 5\r\nUpgrade: h2c\r\nTE: trailers\r\nCookie: c\r\nContent-Length: 3\r\n\r\n";

    #[test]
    fn untrusted_forwarded_fields_are_replaced_and_hop_by_hop_fields_dropped() {
        assert_eq!(
            request(FORGED, false),
            "GET /p HTTP/1.1\r\nHost: a\r\nCookie: c\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: http\r\n\
             X-Forwarded-Host: a\r\nVia: 1.1 clearcoat\r\nContent-Length: 3\r\n\r\n"
        );
    }

    #[test]
    fn a_trusted_proxys_forwarded_fields_are_kept_and_continued() {
        assert_eq!(
            request(FORGED, true),
            "GET /p HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil\r\nCookie: c\r\n\
             X-Forwarded-For: 1.1.1.1, 192.0.2.7\r\nVia: 1.1 clearcoat\r\nContent-Length: 3\r\n\r\n"
        );
    }

    #[test]
    fn the_offloader_header_says_https_once_and_nobody_else_may_say_it() {
        let bytes = "GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Ssl: https\r\n\r\n";
        let written = |proto: &str, trusted: bool| {
            let mut head = RequestHead::default();
            head.parse(bytes.as_bytes(), 100).unwrap();
            let mut out = Vec::new();
            let forwarding = Forwarding { proto, trusted, offload_header: Some("x-forwarded-ssl"), ..PLAIN };
            write_request(&mut out, &head, forwarding);
            String::from_utf8(out).unwrap().to_lowercase().matches("x-forwarded-ssl: https").count()
        };
        assert_eq!((written("http", false), written("https", false)), (0, 1));
        assert_eq!((written("http", true), written("https", true)), (1, 1));
    }

    #[test]
    fn a_request_without_host_gets_the_address_of_the_node() {
        let out = request("GET / HTTP/1.0\r\n\r\n", false);
        assert!(out.starts_with("GET / HTTP/1.1\r\nHost: 10.0.0.1:80\r\n"), "{out}");
        assert!(out.contains("Via: 1.0 clearcoat\r\n"), "{out}");
    }

    #[test]
    fn a_body_of_unknown_length_is_chunked_for_1_1_and_until_close_for_1_0() {
        let open = "HTTP/1.1 200 OK\r\nX: y\r\n\r\n";
        let (out, framing, keep_alive) = response(open, Version::Http11, true);
        assert_eq!(out, "HTTP/1.1 200 OK\r\nX: y\r\nVia: 1.1 clearcoat\r\nTransfer-Encoding: chunked\r\n\r\n");
        assert_eq!((framing, keep_alive), (Framing::Chunked, true));
        let (out, framing, keep_alive) = response(open, Version::Http10, true);
        assert_eq!(out, "HTTP/1.1 200 OK\r\nX: y\r\nVia: 1.1 clearcoat\r\nConnection: close\r\n\r\n");
        assert_eq!((framing, keep_alive), (Framing::UntilClose, false));
    }

    #[test]
    fn no_store_precedes_the_nodes_surrogate_control_in_the_same_line() {
        let marked = |fields: &str| {
            let bytes = format!("HTTP/1.1 200 OK\r\nA: b\r\n{fields}Content-Length: 0\r\n\r\n");
            let mut head = ResponseHead::default();
            head.parse(bytes.as_bytes(), Method::Get, 100).unwrap();
            head.forbid_storing();
            let mut out = Vec::new();
            write_response(&mut out, &head, Version::Http11, true);
            let out = String::from_utf8(out).unwrap();
            out.strip_suffix("Via: 1.1 clearcoat\r\nContent-Length: 0\r\n\r\n").unwrap().to_owned()
        };
        assert_eq!(marked(""), "HTTP/1.1 200 OK\r\nSurrogate-Control: no-store\r\nA: b\r\n");
        assert_eq!(
            marked("surrogate-control: content=\"ESI/1.0\"\r\nC: d\r\nSurrogate-Control: max-age=9\r\n"),
            "HTTP/1.1 200 OK\r\nSurrogate-Control: no-store, content=\"ESI/1.0\", max-age=9\r\nA: b\r\nC: d\r\n"
        );
    }

    #[test]
    fn a_known_length_is_passed_on_also_where_no_body_follows() {
        let (out, framing, _) =
            response("HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", Version::Http11, true);
        assert!(out.contains("Content-Length: 9\r\n"), "{out}");
        assert_eq!(framing, Framing::None);
        let (out, ..) = response("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Version::Http10, true);
        assert!(out.contains("Content-Length: 0\r\n") && out.contains("Connection: keep-alive\r\n"), "{out}");
    }
}
