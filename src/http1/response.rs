//! Response heads from our own nodes, checked as strictly: a node can be compromised, or simply wrong, and an answer
//! whose end is in doubt must not reach a client as if it were complete.

use std::mem::{self, MaybeUninit};

use super::field::{Field, FieldKind, Fields, MAX_FIELDS, STRICT_TRANSPORT, Span, classify, is_request_id};
use super::head::has_strict_lines;
use super::request::refusal;
use super::{BadHead, Framing, HeadLimits, HeadScan, Method, Version};

/// A checked response head: its bytes, the spans of its parts, and the changes to make when it is written.
#[derive(Debug, Default)]
pub struct ResponseHead {
    /// Includes the empty line.
    pub(super) bytes: Vec<u8>,
    /// The status code.
    pub status: u16,
    /// How the body ends.
    pub framing: Framing,
    /// Whether the node will take another request on this connection.
    pub keep_alive: bool,
    pub(super) reason: Span,
    pub(super) fields: Fields,
    announced_length: Option<u64>,
    /// The protocol of a `101 Switching Protocols`.
    pub(super) upgrade: Option<Span>,
    /// Tells the next cache not to store the answer.
    pub(super) no_store: bool,
    /// Writes a page's tags in one line.
    pub(super) joins_tags: bool,
    added: &'static [(&'static str, &'static str)],
    /// The value of our seal; empty for an answer without.
    pub(super) seal: Vec<u8>,
    /// The value of `X-Request-ID`; empty to leave that of the node.
    pub(super) request_id: Vec<u8>,
    /// The value of `Strict-Transport-Security`; empty to leave that of the node.
    pub(super) strict_transport: Vec<u8>,
}

impl ResponseHead {
    /// Reads the head at the start of `input` into this struct, the answer to a request with `method`, and gives its length with
    /// the blank line. `None` while it is incomplete: `scan`, new for each head, remembers how much was seen of it.
    ///
    /// # Errors
    /// [`BadHead`] for everything that is not strictly valid: the client then gets a 502.
    pub fn read(
        &mut self,
        input: &[u8],
        method: Method,
        scan: &mut HeadScan,
        limits: HeadLimits,
    ) -> Result<Option<usize>, BadHead> {
        if scan.is_new() {
            self.clear();
            if let Some(len) = self.read_whole(input, method, limits) {
                return Ok(Some(len));
            }
        }
        let Some(len) = scan.find(input, limits.bytes)? else { return Ok(None) };
        self.parse(&input[..len], method, limits.fields)?;
        Ok(Some(len))
    }

    /// Reads a head that is there whole and good.
    fn read_whole(&mut self, input: &[u8], method: Method, limits: HeadLimits) -> Option<usize> {
        let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut []);
        let input = &input[..input.len().min(limits.bytes)];
        let headers = &mut headers[..limits.fields.min(MAX_FIELDS)];
        let config = httparse::ParserConfig::default();
        let parsed = config.parse_response_with_uninit_headers(&mut response, input, headers);
        let Ok(httparse::Status::Complete(len)) = parsed else { return None };
        let head = &input[..len];
        (has_strict_lines(head, response.headers) && self.take(head, &response, method).is_ok()).then_some(len)
    }

    /// Fills this struct from a complete head with its empty line. `max_fields` is at most 256.
    ///
    /// # Errors
    /// As of [`ResponseHead::read`]. Line ends count as checked.
    pub fn parse(&mut self, head: &[u8], method: Method, max_fields: usize) -> Result<(), BadHead> {
        self.clear();
        // A server may skip an empty line before a request (RFC 9112 section 2.2), but not before an answer.
        if head.starts_with(b"\r\n") {
            return Err(BadHead::Syntax("blank lines before the head"));
        }
        let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut []);
        let headers = &mut headers[..max_fields.min(MAX_FIELDS)];
        let config = httparse::ParserConfig::default();
        match config.parse_response_with_uninit_headers(&mut response, head, headers) {
            Ok(httparse::Status::Complete(parsed)) if parsed == head.len() => self.take(head, &response, method),
            Ok(_) => Err(BadHead::Syntax("it ends early")),
            Err(error) => Err(refusal(error)),
        }
    }

    /// Resets to no head: nothing of the last answer may remain, as the struct is reused.
    fn clear(&mut self) {
        (self.reason, self.upgrade, self.added) = Default::default();
        (self.no_store, self.joins_tags) = (false, false);
        self.seal.clear();
        self.request_id.clear();
        self.strict_transport.clear();
        self.fields.clear();
        self.bytes.clear();
    }

    /// Takes over what `httparse` has found in a complete head, into a cleared struct.
    fn take(&mut self, head: &[u8], response: &httparse::Response<'_, '_>, method: Method) -> Result<(), BadHead> {
        self.bytes.extend_from_slice(head);
        let (Some(status), Some(version)) = (response.code, response.version) else {
            return Err(BadHead::Syntax("the status line is incomplete"));
        };
        if !(100..=599).contains(&status) {
            return Err(BadHead::Status);
        }
        self.status = status;
        let reason = response.reason.unwrap_or_default();
        self.reason = if reason.is_empty() { Span::default() } else { Span::of(head, reason.as_bytes()) };
        self.fields.fill(head, response.headers, classify)?;
        let version = if version == 0 { Version::Http10 } else { Version::Http11 };
        if self.fields.chunked && version == Version::Http10 {
            return Err(BadHead::TransferEncoding);
        }
        let bodyless = method == Method::Head || status < 200 || status == 204 || status == 304;
        self.framing = match (self.fields.chunked, self.fields.content_length) {
            _ if bodyless => Framing::None,
            (true, _) => Framing::Chunked,
            (false, Some(0)) => Framing::None,
            (false, Some(length)) => Framing::Length(length),
            (false, None) => Framing::UntilClose,
        };
        // RFC 9110 section 8.6: a 1xx or 204 must not carry a length, HEAD and 304 may announce one.
        self.announced_length = match status {
            ..200 | 204 => None,
            _ => self.fields.content_length,
        };
        let asked = self.fields.connection;
        let persistent = !asked.close && (version == Version::Http11 || asked.keep_alive);
        self.keep_alive = persistent && self.framing != Framing::UntilClose;
        self.upgrade = self.fields.upgrade.filter(|_| status == 101);
        if status == 101 && self.upgrade.is_none() {
            return Err(BadHead::Status);
        }
        Ok(())
    }

    /// The fields that are forwarded, without the body's length.
    pub fn kept_fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> + Clone {
        self.kept().map(|field| (field.name.bytes(&self.bytes), field.value.bytes(&self.bytes)))
    }

    /// Those of them whose names have a length that is wanted. Nothing is read of the others: for a search on every answer.
    pub fn kept_fields_of_length(&self, is_wanted: impl Fn(usize) -> bool) -> impl Iterator<Item = (&[u8], &[u8])> {
        let wanted = self.kept().filter(move |field| is_wanted(field.name.len()));
        wanted.map(|field| (field.name.bytes(&self.bytes), field.value.bytes(&self.bytes)))
    }

    pub(super) fn kept(&self) -> impl Iterator<Item = &Field> + Clone {
        self.fields.list.iter().filter(|field| is_kept_in_response(field.kind))
    }

    /// Drops fields with these names. Fields that frame the body are not affected.
    pub fn drop_fields(&mut self, is_dropped: impl Fn(&[u8]) -> bool) {
        let kept = self.fields.list.iter_mut().filter(|field| is_kept_in_response(field.kind));
        kept.filter(|field| is_dropped(field.name.bytes(&self.bytes)))
            .for_each(|field| field.kind = FieldKind::Dropped);
    }

    /// Tells the next cache not to store the answer.
    pub fn forbid_storing(&mut self) {
        self.no_store = true;
    }

    /// Writes a page's tags in one line.
    pub fn join_tags(&mut self) {
        self.joins_tags = true;
    }

    /// The length of the head as it came.
    pub fn head_len(&self) -> usize {
        self.bytes.len()
    }

    /// The seal that the answer came with; `None` if it has none, or several.
    pub fn seal(&self) -> Option<&[u8]> {
        Some(self.fields.seal.value()?.bytes(&self.bytes))
    }

    /// Has `write` append the seal that the answer is written with. Nothing is written if it appends nothing.
    pub fn seal_with(&mut self, write: impl FnOnce(&ResponseHead, &mut Vec<u8>)) {
        let mut seal = mem::take(&mut self.seal);
        write(self, &mut seal);
        self.seal = seal;
    }

    /// Writes this value of `X-Request-ID`, in place of the node's.
    pub fn set_request_id(&mut self, id: &[u8]) {
        if self.fields.has_request_id {
            self.drop_fields(is_request_id);
        }
        self.request_id.clear();
        self.request_id.extend_from_slice(id);
    }

    /// The value of `X-Request-ID` that replaces the node's; empty if none does.
    pub fn request_id(&self) -> &[u8] {
        &self.request_id
    }

    /// Writes this value of `Strict-Transport-Security`, in place of the node's: there is one (RFC 6797 section 7.1).
    pub fn set_strict_transport(&mut self, value: &str) {
        const NAME: &[u8] = STRICT_TRANSPORT.as_bytes();
        self.drop_fields(|name| name.len() == NAME.len() && name.eq_ignore_ascii_case(NAME));
        self.strict_transport.clear();
        self.strict_transport.extend_from_slice(value.as_bytes());
    }

    /// The value of `Strict-Transport-Security` that replaces the node's; empty if none does.
    pub fn strict_transport(&self) -> &[u8] {
        &self.strict_transport
    }

    /// Adds these fields after the forwarded ones; names are in lower case.
    pub fn add_fields(&mut self, added: &'static [(&'static str, &'static str)]) {
        self.added = added;
    }

    /// The fields added after the forwarded ones, with names in lower case.
    pub fn added_fields(&self) -> &'static [(&'static str, &'static str)] {
        self.added
    }

    /// Prepares for another body of unknown length, so none is announced. An answer without a body (HEAD) stays
    /// without.
    pub fn replace_body(&mut self) {
        self.announced_length = None;
        if self.framing != Framing::None {
            self.framing = Framing::UntilClose;
        }
    }

    /// The length of the body as the head announces it, also where no body follows (HEAD, 304).
    pub fn announced_length(&self) -> Option<u64> {
        self.announced_length
    }

    /// The protocol that a `101 Switching Protocols` switches to; empty for any other answer.
    pub fn upgrade_to(&self) -> &[u8] {
        self.upgrade.map_or(&[], |protocol| protocol.bytes(&self.bytes))
    }

    /// Whether another head follows this one for the same request. None follows a 101, which ends HTTP on its
    /// connection.
    pub fn is_interim(&self) -> bool {
        self.status < 200 && self.status != 101
    }
}

/// Whether a response field is forwarded to the client. Fields that only have a meaning in requests are forwarded like
/// any other.
fn is_kept_in_response(kind: FieldKind) -> bool {
    !matches!(
        kind,
        FieldKind::Dropped
            | FieldKind::Connection
            | FieldKind::Upgrade
            | FieldKind::ContentLength
            | FieldKind::TransferEncoding
            | FieldKind::Seal
            | FieldKind::Asked
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &str, method: Method) -> Result<ResponseHead, BadHead> {
        let mut head = ResponseHead::default();
        let limits = HeadLimits { bytes: 64 * 1024, fields: 100 };
        let read = head.read(bytes.as_bytes(), method, &mut HeadScan::default(), limits);
        read.map(|len| len.expect("complete")).map(|_| head)
    }

    fn framing(status: &str, fields: &str, method: Method) -> Framing {
        parse(&format!("HTTP/1.1 {status}\r\n{fields}\r\n"), method).unwrap().framing
    }

    #[test]
    fn the_end_of_the_body_follows_the_rfc() {
        assert_eq!(framing("200 OK", "Content-Length: 5\r\n", Method::Get), Framing::Length(5));
        assert_eq!(framing("200 OK", "Transfer-Encoding: chunked\r\n", Method::Get), Framing::Chunked);
        assert_eq!(framing("200 OK", "", Method::Get), Framing::UntilClose);
        assert_eq!(framing("200 OK", "Content-Length: 5\r\n", Method::Head), Framing::None);
        assert_eq!(framing("304 Not Modified", "Content-Length: 5\r\n", Method::Get), Framing::None);
        assert_eq!(framing("204 No Content", "", Method::Get), Framing::None);
        assert_eq!(framing("200", "Content-Length: 0\r\n", Method::Get), Framing::None);
    }

    #[test]
    fn hostile_framing_is_refused() {
        for fields in [
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "Content-Length: 5\r\nContent-Length: 6\r\n",
            "Content-Length: -1\r\n",
            "Transfer-Encoding: chunked, gzip\r\n",
        ] {
            assert!(parse(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n"), Method::Get).is_err(), "{fields}");
        }
        assert!(parse("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Method::Get).is_err());
        assert!(parse("HTTP/1.1 999 Odd\r\n\r\n", Method::Get).is_err());
    }

    #[test]
    fn a_connection_is_kept_only_where_both_the_node_and_the_framing_allow_it() {
        let keeps = |head: &str| parse(head, Method::Get).unwrap().keep_alive;
        assert!(keeps("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\n\r\n"));
        assert!(!keeps("HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n"));
    }
}
