//! Request heads: parsed, checked, and ready to be written again.

use std::mem::MaybeUninit;

use super::authority::{Scheme, is_host};
use super::field::{Field, FieldKind, Fields, MAX_FIELDS, Span, classify_request, is_request_id};
use super::head::has_strict_lines;
use super::{BadHead, Framing, HeadLimits, HeadScan, Version};

/// The methods that a proxy has to distinguish.
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
    /// A method that makes a Varnish drop pages; none may pass the edge.
    Purging,
    /// CONNECT and TRACE, which a reverse proxy does not serve.
    Unsupported,
}

impl Method {
    /// Whether a request with this method may be retried after the node may have executed it: if the method is *safe*
    /// (RFC 9110 section 9.2.1). PUT and DELETE are idempotent by section 9.2.2, but not in shops: Magento places an
    /// order by PUT, and a second DELETE of a cart item is an error page.
    pub fn is_safe(self) -> bool {
        matches!(self, Method::Get | Method::Head | Method::Options)
    }

    /// Purging methods are matched regardless of case: a VCL may do so too, and no real method differs by case alone.
    /// These are the words of common VCLs; a listener's configured ones are checked with [`RequestHead::is_one_of`].
    fn classify(method: &[u8]) -> Self {
        const PURGING: [&str; 8] = ["PURGE", "BAN", "PURGEKEYS", "SOFTPURGE", "XKEY", "REFRESH", "URIBAN", "FULLBAN"];
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

/// A checked request head: its bytes and the spans of its parts.
#[derive(Debug, Default)]
pub struct RequestHead {
    /// Includes the empty line.
    pub(super) bytes: Vec<u8>,
    /// The class of the method.
    pub method: Method,
    pub(super) method_name: Span,
    target: Span,
    /// The target, if its canonical form is not in the bytes; else empty.
    rewritten: Vec<u8>,
    pub(super) host: Option<Span>,
    /// The version of the client.
    pub version: Version,
    /// How the body ends; never [`Framing::UntilClose`].
    pub framing: Framing,
    /// Whether the client wants to send another request after this one.
    pub keep_alive: bool,
    /// The protocol that the client offers to switch to (RFC 9110 section 7.8), if the offer is forwarded.
    pub(super) upgrade: Option<Span>,
    pub(super) fields: Fields,
}

impl RequestHead {
    /// Reads the head at the start of `input` into this struct, and gives its length with the blank line. `None` while it is
    /// incomplete: `scan`, new for each head, remembers how much was seen of it.
    ///
    /// # Errors
    /// [`BadHead`] for everything that is not strictly valid; the request must then be answered 400 and the connection
    /// closed, since the start of the next request is unknown.
    pub fn read(&mut self, input: &[u8], scan: &mut HeadScan, limits: HeadLimits) -> Result<Option<usize>, BadHead> {
        if scan.is_new() {
            self.clear();
            if let Some(len) = self.read_whole(input, limits) {
                return Ok(Some(len));
            }
        }
        let Some(len) = scan.find(input, limits.bytes)? else { return Ok(None) };
        self.parse(&input[..len], limits.fields)?;
        Ok(Some(len))
    }

    /// Reads a head that is there whole and good.
    fn read_whole(&mut self, input: &[u8], limits: HeadLimits) -> Option<usize> {
        let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut []);
        let input = &input[..input.len().min(limits.bytes)];
        let parsed = request.parse_with_uninit_headers(input, &mut headers[..limits.fields.min(MAX_FIELDS)]);
        let Ok(httparse::Status::Complete(len)) = parsed else { return None };
        let head = &input[..len];
        (has_strict_lines(head, request.headers) && self.take(head, &request).is_ok()).then_some(len)
    }

    /// Fills this struct from a complete head with its empty line. `max_fields` is at most 256.
    ///
    /// # Errors
    /// As of [`RequestHead::read`]. Line ends count as checked.
    pub fn parse(&mut self, head: &[u8], max_fields: usize) -> Result<(), BadHead> {
        self.clear();
        let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut []);
        match request.parse_with_uninit_headers(head, &mut headers[..max_fields.min(MAX_FIELDS)]) {
            Ok(httparse::Status::Complete(parsed)) if parsed == head.len() => self.take(head, &request),
            Ok(_) => Err(BadHead::Syntax("it ends early")),
            Err(error) => Err(refusal(error)),
        }
    }

    /// Resets to no head: nothing of the last request may remain, as the struct is reused. Not even its method, on which depends
    /// how an error is answered.
    pub fn clear(&mut self) {
        self.method = Method::default();
        (self.method_name, self.target, self.host, self.upgrade) = Default::default();
        self.rewritten.clear();
        self.fields.clear();
        self.bytes.clear();
    }

    /// Takes over what `httparse` has found in a complete head, into a cleared struct.
    fn take(&mut self, head: &[u8], request: &httparse::Request<'_, '_>) -> Result<(), BadHead> {
        self.bytes.extend_from_slice(head);
        let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
            return Err(BadHead::Syntax("the request line is incomplete"));
        };
        self.version = if version == 0 { Version::Http10 } else { Version::Http11 };
        self.method = Method::classify(method.as_bytes());
        self.method_name = Span::of(head, method.as_bytes());
        self.fields.fill(head, request.headers, classify_request)?;
        self.find_target_and_host(head, Span::of(head, target.as_bytes()))?;
        self.framing = self.body_framing()?;
        let asked = self.fields.connection;
        self.keep_alive = !asked.close && (self.version == Version::Http11 || asked.keep_alive);
        self.upgrade = self.fields.upgrade.filter(|protocol| self.may_upgrade(protocol.bytes(head)));
        Ok(())
    }

    /// The length of the head in bytes, with its empty line.
    pub fn head_len(&self) -> usize {
        self.bytes.len()
    }

    /// The method as the client wrote it.
    pub fn method_name(&self) -> &[u8] {
        self.method_name.bytes(&self.bytes)
    }

    /// Host and port; `None` only with HTTP/1.0.
    pub fn host(&self) -> Option<&[u8]> {
        self.host.map(|host| host.bytes(&self.bytes))
    }

    /// Whether an upgrade offer of the client is forwarded.
    pub fn offers_upgrade(&self) -> bool {
        self.upgrade.is_some()
    }

    /// Whether an upgrade offer is forwarded. Not with a body: both sides would have to agree on its end. And never to
    /// HTTP itself (`h2c`): after the 101, requests would pass unchecked.
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

    /// Whether the client offered to switch to this protocol.
    pub fn offers(&self, protocol: &[u8]) -> bool {
        self.upgrade.is_some_and(|offered| offered.bytes(&self.bytes).eq_ignore_ascii_case(protocol))
    }

    /// Whether its method is one of these, regardless of case. Only for methods of [`Method::Other`].
    pub fn is_one_of(&self, methods: &[String]) -> bool {
        let name = self.method_name();
        self.method == Method::Other && methods.iter().any(|method| method.as_bytes().eq_ignore_ascii_case(name))
    }

    /// The target in origin form, or `*`.
    pub fn target(&self) -> &[u8] {
        if self.rewritten.is_empty() { self.target.bytes(&self.bytes) } else { &self.rewritten }
    }

    /// The path of the target, without the query.
    pub fn path(&self) -> &[u8] {
        let target = self.target();
        &target[..memchr::memchr(b'?', target).unwrap_or(target.len())]
    }

    /// The values of `X-Forwarded-For`, in their order. Who wrote them is not known here.
    pub fn forwarded_for(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        let fields = self.fields.list.iter().filter(|field| field.kind == FieldKind::ForwardedFor);
        fields.map(|field| field.value.bytes(&self.bytes))
    }

    /// The value of the first `X-Forwarded-Proto`. Who wrote it is not known here.
    pub fn forwarded_proto(&self) -> Option<&[u8]> {
        let field = self.fields.list.iter().find(|field| field.kind == FieldKind::ForwardedProto);
        field.map(|field| field.value.bytes(&self.bytes))
    }

    /// The value of the first field with this name that is forwarded, perhaps only if its sender is trusted.
    pub fn field(&self, name: &str) -> Option<&[u8]> {
        let is_wanted = |field: &&Field| {
            matches!(field.kind, FieldKind::Kept | FieldKind::ForwardedOther)
                && field.name.bytes(&self.bytes).eq_ignore_ascii_case(name.as_bytes())
        };
        self.fields.list.iter().find(is_wanted).map(|field| field.value.bytes(&self.bytes))
    }

    /// What a reader of a page remembers, as the edge wrote it and a cache passed it on; `None` if that is not said, or more
    /// than once.
    pub fn asked(&self) -> Option<&[u8]> {
        Some(self.fields.asked.value()?.bytes(&self.bytes))
    }

    /// Appends the value of `X-Request-ID` to `out`, if there is one such field and its value can be an id: printable, and
    /// not longer than ids are.
    pub fn copy_request_id(&self, out: &mut Vec<u8>) {
        const LONGEST: usize = 128;
        let mut ids = self.kept_fields().filter(|(name, _)| is_request_id(name)).map(|(_, value)| value);
        let Some(id) = ids.next() else { return };
        if ids.next().is_none() && id.len() <= LONGEST && id.iter().all(u8::is_ascii_graphic) {
            out.extend_from_slice(id);
        }
    }

    /// Drops `X-Request-ID`.
    pub fn drop_request_id(&mut self) {
        if self.fields.has_request_id {
            self.drop_fields(is_request_id);
        }
    }

    /// The fields that are forwarded unchanged, name and value.
    pub fn kept_fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> + Clone {
        let kept = self.fields.list.iter().filter(|field| matches!(field.kind, FieldKind::Kept | FieldKind::Expect));
        kept.map(|field| (field.name.bytes(&self.bytes), field.value.bytes(&self.bytes)))
    }

    /// Drops fields with these names. Fields that are checked or written by us are not affected.
    pub fn drop_fields(&mut self, is_dropped: impl Fn(&[u8]) -> bool) {
        let kept =
            self.fields.list.iter_mut().filter(|field| matches!(field.kind, FieldKind::Kept | FieldKind::Expect));
        kept.filter(|field| is_dropped(field.name.bytes(&self.bytes)))
            .for_each(|field| field.kind = FieldKind::Dropped);
    }

    /// Whether the client waits for `100 Continue` before it sends its body (RFC 9110 section 10.1.1).
    pub fn expects_continue(&self) -> bool {
        let is_continue = |field: &Field| {
            field.kind == FieldKind::Expect && field.value.bytes(&self.bytes).eq_ignore_ascii_case(b"100-continue")
        };
        self.fields.list.iter().any(is_continue)
    }

    fn body_framing(&self) -> Result<Framing, BadHead> {
        match (self.fields.chunked, self.fields.content_length) {
            (true, _) if self.version == Version::Http10 => Err(BadHead::TransferEncoding),
            (true, _) => Ok(Framing::Chunked),
            (false, Some(0) | None) => Ok(Framing::None),
            (false, Some(length)) => Ok(Framing::Length(length)),
        }
    }

    /// Checks target and Host (RFC 9112 section 3.2) and reduces the target to origin form.
    fn find_target_and_host(&mut self, buffer: &[u8], target: Span) -> Result<(), BadHead> {
        let mut hosts = self.fields.list.iter().filter(|field| field.kind == FieldKind::Host);
        let host = hosts.next().map(|field| field.value);
        if hosts.next().is_some() || (host.is_none() && self.version == Version::Http11) {
            return Err(BadHead::Host);
        }
        if host.is_some_and(|host| !is_host(host.bytes(buffer))) {
            return Err(BadHead::Host);
        }
        self.host = host;
        let bytes = target.bytes(buffer);
        // No early exit, so that the loop is vectorised.
        let is_clean = |clean: bool, &byte: &u8| clean & (0x21..=0x7e).contains(&byte) & (byte != b'#');
        if !bytes.iter().fold(true, is_clean) {
            return Err(BadHead::Target);
        }
        self.target = target;
        match bytes {
            [b'/', ..] => Ok(()),
            // `host:port` alone. No listener admits the method, so the target is not used.
            _ if self.method_name.bytes(buffer) == b"CONNECT" => Ok(()),
            b"*" if self.method_name.bytes(buffer) == b"OPTIONS" => Ok(()),
            _ => self.take_absolute(buffer, target),
        }
    }

    /// Takes host and path from an absolute target (RFC 9112 section 3.2.2), which decides the host. If `Host` is
    /// equivalent but written differently, the shortest form is forwarded. A different `Host` is refused, not
    /// overruled, because another hop may believe either.
    fn take_absolute(&mut self, buffer: &[u8], target: Span) -> Result<(), BadHead> {
        let bytes = target.bytes(buffer);
        let (scheme, rest) = Scheme::strip(bytes).ok_or(BadHead::Target)?;
        let end = rest.iter().position(|&byte| matches!(byte, b'/' | b'?')).unwrap_or(rest.len());
        let authority = &rest[..end];
        if !is_host(authority) || self.host.is_some_and(|host| !scheme.is_same_host(host.bytes(buffer), authority)) {
            return Err(BadHead::Host);
        }
        let skipped = bytes.len() - rest.len();
        let meant = scheme.without_default_port(authority);
        let says = |host: Span, text: &[u8]| host.bytes(buffer).eq_ignore_ascii_case(text);
        self.host = match self.host {
            Some(host) if says(host, authority) || says(host, meant) => Some(host),
            Some(_) => Some(target.sub(skipped..skipped + meant.len())),
            None => Some(target.sub(skipped..skipped + end)),
        };
        match &rest[end..] {
            [b'/', ..] => self.target = target.sub(skipped + end..bytes.len()),
            // "OPTIONS of the server, not of a page" has its own form (section 3.2.4).
            [] if self.method_name.bytes(buffer) == b"OPTIONS" => self.rewritten.push(b'*'),
            query => {
                self.rewritten.push(b'/');
                self.rewritten.extend_from_slice(query);
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    const LIMITS: HeadLimits = HeadLimits { bytes: 32 * 1024, fields: 100 };

    fn parse(bytes: &str) -> Result<RequestHead, BadHead> {
        let mut head = RequestHead::default();
        let read = head.read(bytes.as_bytes(), &mut HeadScan::default(), LIMITS);
        read.map(|len| len.expect("complete")).map(|_| head)
    }

    fn get(fields: &str) -> Result<RequestHead, BadHead> {
        parse(&format!("GET /p?q=1 HTTP/1.1\r\nHost: a\r\n{fields}\r\n"))
    }

    #[test]
    fn a_plain_request_is_understood() {
        let bytes = "GET /p?q=1 HTTP/1.1\r\nHost: shop.test:8080\r\nAccept: */*\r\n\r\n";
        let head = parse(bytes).unwrap();
        assert_eq!(head.method, Method::Get);
        assert_eq!(head.target(), b"/p?q=1");
        assert_eq!(head.path(), b"/p");
        assert_eq!(head.host().unwrap(), b"shop.test:8080");
        assert_eq!((head.framing, head.keep_alive, head.head_len()), (Framing::None, true, bytes.len()));
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
        for (line, host, expected) in [
            ("GET HTTP://Shop.test/p?q", "shop.test", ("shop.test", "/p?q")),
            ("GET http://a", "a", ("a", "/")),
            ("GET http://a?q=/x", "a", ("a", "/?q=/x")),
            ("OPTIONS http://a", "a", ("a", "*")),
            ("OPTIONS http://a?q", "a", ("a", "/?q")),
            ("OPTIONS http://a/", "a", ("a", "/")),
            ("GET http://a/", "a:80", ("a", "/")),
            ("GET http://a:80/", "a", ("a", "/")),
            ("GET http://a:/", "a:080", ("a", "/")),
            ("GET https://a/", "a:443", ("a", "/")),
            ("GET https://a:80/", "a:80", ("a:80", "/")),
            ("GET http://[::1]/", "[::1]:80", ("[::1]", "/")),
            ("GET http://[::1]:80/", "[::1]:80", ("[::1]:80", "/")),
        ] {
            let bytes = format!("{line} HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let head = parse(&bytes).unwrap_or_else(|error| panic!("{line}: {error}"));
            let text = |part: &[u8]| String::from_utf8_lossy(part).into_owned();
            let found = (text(head.host().unwrap()), text(head.target()));
            assert_eq!((found.0.as_str(), found.1.as_str()), expected, "{line}");
        }
        for (target, host) in [
            ("http://a:81/", "a"),
            ("http://a/", "a:443"),
            ("https://a/", "a:80"),
            ("http://u@a/", "a"),
            ("http://u:p@a", "a"),
            ("http://", "a"),
            ("http://?q", "a"),
            ("http:///p", "a"),
        ] {
            assert_eq!(parse(&format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")).unwrap_err(), BadHead::Host);
        }
    }

    #[test]
    fn a_target_that_was_rewritten_is_not_the_next_requests() {
        let (first, second) = ("GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", "GET /p HTTP/1.1\r\nHost: a\r\n\r\n");
        let mut head = parse(first).unwrap();
        head.parse(second.as_bytes(), 100).unwrap();
        assert_eq!(head.target(), b"/p");
    }

    #[test]
    fn odd_targets_and_versions_are_refused() {
        for target in ["p", "*", "/a#b", "/\u{fc}", "ftp://a/", "a:80", "http:/a", "http:a"] {
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
    fn one_printable_id_of_a_request_is_an_id() {
        let long = format!("X-Request-ID: {}\r\n", "a".repeat(129));
        for (fields, expected) in [
            ("x-request-id: 7f-3/a+b=\r\n", "7f-3/a+b="),
            ("", ""),
            ("X-Request-ID:\r\n", ""),
            ("X-Request-ID: a b\r\n", ""),
            ("X-Request-ID: \u{e9}\r\n", ""),
            ("X-Request-ID: a\r\nX-Request-ID: b\r\n", ""),
            (&long, ""),
        ] {
            let mut head = get(fields).unwrap();
            let mut id = Vec::new();
            head.copy_request_id(&mut id);
            assert_eq!(id, expected.as_bytes(), "{fields}");
            head.drop_request_id();
            assert_eq!(head.kept_fields().count(), 0, "{fields}");
        }
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
    fn an_upgrade_offer_is_forwarded_only_if_it_cannot_hide_requests() {
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

    #[test]
    fn configured_methods_match_in_any_case_except_ordinary_ones() {
        let named = ["FLUSHKEYS".to_owned(), "GET".to_owned()];
        for (method, expected) in [("FLUSHKEYS", true), ("flushKeys", true), ("FLUSHKEY", false), ("GET", false)] {
            let bytes = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
            assert_eq!(parse(&bytes).unwrap().is_one_of(&named), expected, "{method}");
        }
    }
}
