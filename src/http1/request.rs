//! Request heads: cut, checked, and known well enough to be written again.

use std::mem::MaybeUninit;

use super::field::{Fields, Kind, MAX_FIELDS, Span, classify_request};
use super::{BadHead, Framing, Version};

/// The methods that a proxy has to tell apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// GET
    #[default]
    Get,
    /// HEAD: its answer never has a body.
    Head,
    /// OPTIONS
    Options,
    /// Any other method.
    Other,
    /// A method that tells a Varnish to drop pages; none may pass the edge.
    Purging,
    /// CONNECT and TRACE, which a reverse proxy does not serve.
    Unsupported,
}

impl Method {
    /// Whether a request with this method may be sent again after it may have been carried out: if the method is *safe*
    /// (RFC 9110 section 9.2.1). PUT and DELETE are idempotent by section 9.2.2, and not by what shops make of them:
    /// Magento places an order by PUT, and a second DELETE of a cart item is an error page.
    pub fn is_safe(self) -> bool {
        matches!(self, Method::Get | Method::Head | Method::Options)
    }

    /// Purging methods are told in any case: a VCL may compare them in any, and no real method differs by case alone.
    fn classify(method: &[u8]) -> Self {
        const PURGING: [&str; 6] = ["PURGE", "BAN", "PURGEKEYS", "SOFTPURGE", "XKEY", "REFRESH"];
        match method {
            b"GET" => Method::Get,
            b"HEAD" => Method::Head,
            b"OPTIONS" => Method::Options,
            b"CONNECT" | b"TRACE" => Method::Unsupported,
            other if PURGING.iter().any(|name| other.eq_ignore_ascii_case(name.as_bytes())) => Method::Purging,
            _ => Method::Other,
        }
    }
}

/// A checked request head, as spans into the buffer it was parsed from.
#[derive(Debug, Default)]
pub struct RequestHead {
    /// The length of the head in bytes, with its blank line.
    pub len: usize,
    /// What kind of method it is.
    pub method: Method,
    /// The method as it was written.
    pub method_name: Span,
    /// The target in origin form (or `*`).
    pub target: Span,
    /// Host and port; `None` only with HTTP/1.0.
    pub host: Option<Span>,
    /// The version of the client.
    pub version: Version,
    /// How the body ends; never [`Framing::UntilClose`].
    pub framing: Framing,
    /// Whether the client wants to send another request after this one.
    pub keep_alive: bool,
    /// The protocol that the client offers to change to (RFC 9110 section 7.8), where that is passed on.
    pub upgrade: Option<Span>,
    pub(super) fields: Fields,
}

impl RequestHead {
    /// Fills this struct from a complete head, `buffer[..len]` as [`super::HeadScan`] found it. `max_fields` is at most
    /// 256.
    ///
    /// # Errors
    /// [`BadHead`] for everything that is not strictly right; the request must then be answered 400 and the
    /// connection closed, since nobody can say where the next request would begin.
    pub fn parse(&mut self, buffer: &[u8], len: usize, max_fields: usize) -> Result<(), BadHead> {
        // These structs are filled again and again: what the last request was says nothing about this one.
        self.method = Method::default();
        let head = &buffer[..len];
        let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut []);
        match request.parse_with_uninit_headers(head, &mut headers[..max_fields.min(MAX_FIELDS)]) {
            Ok(httparse::Status::Complete(parsed)) if parsed == len => {}
            Ok(_) => return Err(BadHead::Syntax("it ends early")),
            Err(error) => return Err(refusal(error)),
        }
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
            return Err(BadHead::Syntax("the request line is incomplete"));
        };
        self.len = len;
        self.version = if version == 0 { Version::Http10 } else { Version::Http11 };
        self.method = Method::classify(method.as_bytes());
        self.method_name = Span::of(buffer, method.as_bytes());
        self.fields.fill(buffer, request.headers, classify_request)?;
        self.find_target_and_host(buffer, Span::of(buffer, target.as_bytes()))?;
        self.framing = self.body_framing()?;
        let asked = self.fields.connection;
        self.keep_alive = !asked.close && (self.version == Version::Http11 || asked.keep_alive);
        self.upgrade = self.fields.upgrade.filter(|protocol| self.may_upgrade(protocol.bytes(buffer)));
        Ok(())
    }

    /// Whether an offer to change the protocol is passed on. Not with a body: where it would end is what the two sides
    /// would have to agree on. And never to HTTP itself (`h2c`): behind the 101, requests would pass unseen.
    fn may_upgrade(&self, protocol: &[u8]) -> bool {
        let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(byte);
        let is_http = protocol.len() >= 3
            && (protocol[..3].eq_ignore_ascii_case(b"h2c") || protocol[..3].eq_ignore_ascii_case(b"htt"));
        self.version == Version::Http11
            && self.method == Method::Get
            && self.framing == Framing::None
            && !protocol.is_empty()
            && protocol.iter().all(is_token)
            && !is_http
    }

    /// Whether the client offered to change to this protocol.
    pub fn offers(&self, protocol: &[u8], buffer: &[u8]) -> bool {
        self.upgrade.is_some_and(|offered| offered.bytes(buffer).eq_ignore_ascii_case(protocol))
    }

    /// The path of the target, without the query.
    pub fn path<'b>(&self, buffer: &'b [u8]) -> &'b [u8] {
        let target = self.target.bytes(buffer);
        &target[..memchr::memchr(b'?', target).unwrap_or(target.len())]
    }

    fn body_framing(&self) -> Result<Framing, BadHead> {
        match (self.fields.chunked, self.fields.content_length) {
            (true, _) if self.version == Version::Http10 => Err(BadHead::TransferEncoding),
            (true, _) => Ok(Framing::Chunked),
            (false, Some(0) | None) => Ok(Framing::None),
            (false, Some(length)) => Ok(Framing::Length(length)),
        }
    }

    /// Checks target and Host (RFC 9112 section 3.2) and leaves the origin form. An absolute target must agree with
    /// Host, because the server behind us may believe either.
    fn find_target_and_host(&mut self, buffer: &[u8], target: Span) -> Result<(), BadHead> {
        let mut hosts = self.fields.list.iter().filter(|field| field.kind == Kind::Host);
        let host = hosts.next().map(|field| field.value);
        if hosts.next().is_some() || (host.is_none() && self.version == Version::Http11) {
            return Err(BadHead::Host);
        }
        if host.is_some_and(|host| !is_host(host.bytes(buffer))) {
            return Err(BadHead::Host);
        }
        self.host = host;
        let bytes = target.bytes(buffer);
        // Every byte is looked at, without a way out: so it is done for many of them at once.
        let is_clean = |clean: bool, &byte: &u8| clean & (0x21..=0x7e).contains(&byte) & (byte != b'#');
        if !bytes.iter().fold(true, is_clean) {
            return Err(BadHead::Target);
        }
        self.target = match bytes {
            [b'/', ..] => target,
            // `host:port` alone. No listener admits the method, so nobody looks at it again.
            _ if self.method_name.bytes(buffer) == b"CONNECT" => target,
            b"*" if self.method_name.bytes(buffer) == b"OPTIONS" => target,
            _ => {
                let rest = strip_scheme(bytes).ok_or(BadHead::Target)?;
                let slash = rest.iter().position(|&byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
                let authority = &rest[..slash];
                if !is_host(authority) || host.is_some_and(|host| !host.bytes(buffer).eq_ignore_ascii_case(authority)) {
                    return Err(BadHead::Host);
                }
                if rest.get(slash) != Some(&b'/') {
                    return Err(BadHead::Target);
                }
                let skipped = bytes.len() - rest.len();
                self.host = host.or(Some(target.sub(skipped..skipped + slash)));
                target.sub(skipped + slash..bytes.len())
            }
        };
        Ok(())
    }
}

pub(super) fn refusal(error: httparse::Error) -> BadHead {
    match error {
        httparse::Error::TooManyHeaders => BadHead::TooManyFields,
        httparse::Error::Version => BadHead::Version,
        httparse::Error::HeaderName => BadHead::Syntax("a field name"),
        httparse::Error::HeaderValue => BadHead::Syntax("a field value"),
        httparse::Error::NewLine => BadHead::Syntax("a line end"),
        httparse::Error::Status => BadHead::Status,
        httparse::Error::Token => BadHead::Syntax("the first line"),
    }
}

fn strip_scheme(target: &[u8]) -> Option<&[u8]> {
    ["http://", "https://"].iter().find_map(|scheme| {
        let (start, rest) = target.split_at_checked(scheme.len())?;
        start.eq_ignore_ascii_case(scheme.as_bytes()).then_some(rest)
    })
}

/// `uri-host [ ":" port ]` (RFC 3986 section 3.2), without user information, without percent-encoding (no shop needs
/// it, and caches normalise it differently).
fn is_host(host: &[u8]) -> bool {
    let name_end = match host.first() {
        Some(b'[') => match host.iter().position(|&byte| byte == b']') {
            Some(end) if end > 1 && host[1..end].iter().all(|&b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')) => {
                end + 1
            }
            _ => return false,
        },
        _ => {
            let end = host.iter().position(|&byte| byte == b':').unwrap_or(host.len());
            let allowed = |&byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(&byte);
            if end == 0 || !host[..end].iter().all(allowed) {
                return false;
            }
            end
        }
    };
    match &host[name_end..] {
        [] => true,
        [b':', port @ ..] => is_port(port),
        _ => false,
    }
}

/// Digits up to 65535; RFC 3986 section 3.2.3 allows none at all.
fn is_port(port: &[u8]) -> bool {
    port.is_empty()
        || (port.iter().all(u8::is_ascii_digit)
            && std::str::from_utf8(port).is_ok_and(|port| port.parse::<u16>().is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http1::HeadScan;

    fn parse(bytes: &str) -> Result<RequestHead, BadHead> {
        let mut head = RequestHead::default();
        let len = HeadScan::default().find(bytes.as_bytes(), 32 * 1024)?.expect("complete");
        head.parse(bytes.as_bytes(), len, 100).map(|()| head)
    }

    fn get(fields: &str) -> Result<RequestHead, BadHead> {
        parse(&format!("GET /p?q=1 HTTP/1.1\r\nHost: a\r\n{fields}\r\n"))
    }

    #[test]
    fn a_plain_request_is_understood() {
        let bytes = "GET /p?q=1 HTTP/1.1\r\nHost: shop.test:8080\r\nAccept: */*\r\n\r\n";
        let head = parse(bytes).unwrap();
        assert_eq!(head.method, Method::Get);
        assert_eq!(head.target.bytes(bytes.as_bytes()), b"/p?q=1");
        assert_eq!(head.path(bytes.as_bytes()), b"/p");
        assert_eq!(head.host.unwrap().bytes(bytes.as_bytes()), b"shop.test:8080");
        assert_eq!((head.framing, head.keep_alive, head.len), (Framing::None, true, bytes.len()));
    }

    #[test]
    fn ambiguous_framing_is_refused() {
        use BadHead::{AmbiguousLength, ContentLength, TransferEncoding};
        for (fields, verdict) in [
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", AmbiguousLength),
            ("Transfer-Encoding: chunked\r\nContent-Length: 1\r\n", AmbiguousLength),
            ("Content-Length: 1\r\nContent-Length: 1\r\n", ContentLength),
            ("Content-Length: 1, 1\r\n", ContentLength),
            ("Content-Length: +1\r\n", ContentLength),
            ("Content-Length:\r\n", ContentLength),
            ("Content-Length: 99999999999999999999\r\n", ContentLength),
            ("Transfer-Encoding: identity, chunked\r\n", TransferEncoding),
            ("Transfer-Encoding: chunked, chunked\r\n", TransferEncoding),
            ("Transfer-Encoding: gzip\r\n", TransferEncoding),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", TransferEncoding),
        ] {
            assert_eq!(get(fields).unwrap_err(), verdict, "{fields}");
        }
        assert_eq!(get("Transfer-Encoding: Chunked\r\n").unwrap().framing, Framing::Chunked);
        assert_eq!(get("Content-Length: 5\r\n").unwrap().framing, Framing::Length(5));
        assert_eq!(
            parse("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap_err(),
            BadHead::TransferEncoding
        );
    }

    #[test]
    fn a_missing_repeated_or_odd_host_is_refused() {
        for head in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost:\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a/../b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a:http\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: []\r\n\r\n",
            "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert_eq!(parse(head).unwrap_err(), BadHead::Host, "{head}");
        }
        for host in ["a", "A.b-c.d:80", "[::1]", "[2001:db8::1]:8080", "a_b.test", "10.0.0.1:1"] {
            assert!(parse(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).is_ok(), "{host}");
        }
        assert!(parse("GET / HTTP/1.0\r\n\r\n").unwrap().host.is_none());
    }

    #[test]
    fn an_absolute_target_becomes_origin_form() {
        let bytes = "GET HTTP://Shop.test/p?q HTTP/1.1\r\nHost: shop.test\r\n\r\n";
        assert_eq!(parse(bytes).unwrap().target.bytes(bytes.as_bytes()), b"/p?q");
    }

    #[test]
    fn odd_targets_and_versions_are_refused() {
        for target in ["p", "*", "/a#b", "/\u{fc}", "ftp://a/", "a:80", "http://a"] {
            let refused = parse(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n"));
            assert!(refused.is_err(), "{target}");
        }
        for version in ["HTTP/1.2", "HTTP/2.0", "HTTP/0.9", "http/1.1", "HTTP/1.1 "] {
            assert!(parse(&format!("GET / {version}\r\nHost: a\r\n\r\n")).is_err(), "{version}");
        }
    }

    #[test]
    fn white_space_and_control_bytes_where_none_belong_are_refused() {
        for fields in ["A : b\r\n", " A: b\r\n", "A: b\r\n c\r\n", "A: b\0\r\n", "A: b\rc\r\n", ": b\r\n", "A\r\n"] {
            assert!(get(fields).is_err(), "{fields:?}");
        }
        assert!(parse("GET  / HTTP/1.1\r\nHost: a\r\n\r\n").is_err());
        assert!(parse("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n").is_err());
    }

    #[test]
    fn too_many_fields_are_refused() {
        assert!(get(&"A: b\r\n".repeat(99)).is_ok());
        assert_eq!(get(&"A: b\r\n".repeat(100)).unwrap_err(), BadHead::TooManyFields);
    }

    #[test]
    fn keep_alive_follows_version_and_connection() {
        assert!(!get("Connection: close\r\n").unwrap().keep_alive);
        assert!(!get("Connection: x, Close\r\n").unwrap().keep_alive);
        assert!(!parse("GET / HTTP/1.0\r\n\r\n").unwrap().keep_alive);
        assert!(parse("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").unwrap().keep_alive);
    }

    #[test]
    fn an_offer_to_change_the_protocol_is_passed_on_only_where_it_cannot_hide_requests() {
        let offered = |fields: &str| get(fields).unwrap().upgrade.is_some();
        assert!(offered("Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"));
        for fields in [
            "Upgrade: websocket\r\n",
            "Connection: Upgrade\r\n",
            "Connection: Upgrade\r\nUpgrade:\r\n",
            "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
            "Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: websocket\r\n",
            "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n",
            "Connection: Upgrade\r\nUpgrade: HTTP/2.0\r\n",
            "Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n",
        ] {
            assert!(!offered(fields), "{fields}");
        }
        let posted = parse("POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert!(posted.unwrap().upgrade.is_none());
    }

    #[test]
    fn purging_methods_are_known_in_any_case() {
        for method in ["PURGE", "purge", "Ban", "PURGEKEYS"] {
            let head = parse(&format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
            assert_eq!(head.method, Method::Purging, "{method}");
        }
    }
}
