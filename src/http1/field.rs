//! Header fields as spans, and the ones that a proxy has to understand.

use std::ops::Range;

use super::BadHead;

/// The capacity for header fields of one head; the caller's limit is at most this.
pub(super) const MAX_FIELDS: usize = 256;

/// The field by which browsers are told to stay with https (RFC 6797).
pub(super) const STRICT_TRANSPORT: &str = "strict-transport-security";

/// A range of a head's bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Span {
    start: u32,
    end: u32,
}

impl Span {
    /// The span of `part` within `whole`, of which it must be a subslice.
    pub(super) fn of(whole: &[u8], part: &[u8]) -> Self {
        let start = part.as_ptr() as usize - whole.as_ptr() as usize;
        debug_assert!(start + part.len() <= whole.len());
        Span { start: start as u32, end: (start + part.len()) as u32 }
    }

    pub(super) fn len(self) -> usize {
        (self.end - self.start) as usize
    }

    /// The bytes of the span.
    pub(super) fn bytes<'b>(&self, buffer: &'b [u8]) -> &'b [u8] {
        &buffer[self.start as usize..self.end as usize]
    }

    pub(super) fn sub(self, range: Range<usize>) -> Self {
        Span { start: self.start + range.start as u32, end: self.start + range.end as u32 }
    }
}

/// How a proxy treats a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FieldKind {
    /// End to end: forwarded unchanged.
    Kept,
    /// Hop by hop (RFC 9110 section 7.6.1), or written by us: never forwarded.
    Dropped,
    Host,
    ContentLength,
    TransferEncoding,
    Connection,
    Expect,
    Upgrade,
    ForwardedFor,
    ForwardedProto,
    ForwardedHost,
    /// Our seal of an answer: read and written by us, never forwarded.
    Seal,
    /// Our note of what the reader of a page remembers: the same.
    Asked,
    /// Any other field about earlier hops: trusted under the same condition as those above.
    ForwardedOther,
}

/// One header field.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field {
    pub(super) name: Span,
    pub(super) value: Span,
    pub(super) kind: FieldKind,
}

/// Classifies a field by its name. Length and first letter are checked first, so that an ordinary field costs one
/// branch.
pub(super) fn classify(name: &[u8]) -> FieldKind {
    let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
    let Some(first) = name.first() else { return FieldKind::Kept };
    match (name.len(), first | 0x20) {
        (2, b't') if is("te") => FieldKind::Dropped,
        (4, b'h') if is("host") => FieldKind::Host,
        (6, b'e') if is("expect") => FieldKind::Expect,
        // No trailer is forwarded, so none is announced.
        (7, b't') if is("trailer") => FieldKind::Dropped,
        (7, b'u') if is("upgrade") => FieldKind::Upgrade,
        (9, b'f') if is("forwarded") => FieldKind::ForwardedOther,
        (10, b'c') if is("connection") => FieldKind::Connection,
        (10, b'k') if is("keep-alive") => FieldKind::Dropped,
        (14, b'c') if is("content-length") => FieldKind::ContentLength,
        (14, b'h') if is("http2-settings") => FieldKind::Dropped,
        (15, b'x') if is("x-forwarded-for") => FieldKind::ForwardedFor,
        (16, b'x') if is("x-forwarded-host") => FieldKind::ForwardedHost,
        (16, b'x') if is("x-clearcoat-seal") => FieldKind::Seal,
        (16, b'p') if is("proxy-connection") => FieldKind::Dropped,
        (17, b't') if is("transfer-encoding") => FieldKind::TransferEncoding,
        (17, b'x') if is("x-forwarded-proto") => FieldKind::ForwardedProto,
        (17, b'x') if is("x-clearcoat-asked") => FieldKind::Asked,
        (18, b'p') if is("proxy-authenticate") => FieldKind::Dropped,
        (19, b'p') if is("proxy-authorization") => FieldKind::Dropped,
        (13.., b'x') if name[..12].eq_ignore_ascii_case(b"x-forwarded-") => FieldKind::ForwardedOther,
        _ => FieldKind::Kept,
    }
}

/// The same for a request. A name with an underscore is dropped, as nginx does by default: CGI and PHP read
/// `X_Forwarded_For` and `X-Forwarded-For` as the same variable, so a client could forge our fields.
pub(super) fn classify_request(name: &[u8]) -> FieldKind {
    match classify(name) {
        FieldKind::Kept if has_underscore(name) => FieldKind::Dropped,
        kind => kind,
    }
}

/// Eight bytes at a time: a name has a dozen, too few for a search that prepares itself.
fn has_underscore(name: &[u8]) -> bool {
    let (chunks, rest) = name.as_chunks::<8>();
    let has = |bytes: &[u8]| bytes.iter().fold(false, |has, &byte| has | (byte == b'_'));
    chunks.iter().any(|chunk| has(chunk)) || has(rest)
}

/// Whether this is the name of the field with a request's id ([`Fields::has_request_id`]).
pub(super) fn is_request_id(name: &[u8]) -> bool {
    const NAME: &[u8] = b"x-request-id";
    name.len() == NAME.len() && name.eq_ignore_ascii_case(NAME)
}

impl Field {
    /// The complete line, if the buffer has it in our form: `name: value` and CR LF.
    pub(super) fn canonical_line(&self, buffer: &[u8]) -> Option<Span> {
        let is_canonical = self.value.start == self.name.end + 2
            && buffer[self.name.end as usize + 1] == b' '
            && buffer[self.value.end as usize] == b'\r';
        is_canonical.then_some(Span { start: self.name.start, end: self.value.end + 2 })
    }
}

/// Writes fields, and copies adjacent ones that are already in our form all at once.
pub(super) struct FieldWriter<'b> {
    buffer: &'b [u8],
    run: Span,
}

impl<'b> FieldWriter<'b> {
    pub(super) fn new(buffer: &'b [u8]) -> Self {
        FieldWriter { buffer, run: Span::default() }
    }

    pub(super) fn push(&mut self, out: &mut Vec<u8>, field: &Field) {
        match field.canonical_line(self.buffer) {
            Some(line) if line.start == self.run.end => self.run.end = line.end,
            line => self.push_apart(out, field, line),
        }
    }

    /// A field that does not continue the pending copy; `line` is the field in our form. Not inlined: most fields do
    /// continue it, and would pay for the registers of this.
    #[inline(never)]
    fn push_apart(&mut self, out: &mut Vec<u8>, field: &Field, line: Option<Span>) {
        self.finish(out);
        if let Some(line) = line {
            self.run = line;
            return;
        }
        for part in [field.name.bytes(self.buffer), b": ", field.value.bytes(self.buffer), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }

    /// Writes the pending copy.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.run.bytes(self.buffer));
        self.run = Span::default();
    }
}

/// The options in the `Connection` fields of a head.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ConnectionOptions {
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    pub(super) upgrade: bool,
}

/// The fields of a head, with the framing found in them.
#[derive(Debug, Default)]
pub(super) struct Fields {
    pub(super) list: Vec<Field>,
    pub(super) connection: ConnectionOptions,
    pub(super) content_length: Option<u64>,
    pub(super) chunked: bool,
    /// The protocol that the peer offers or switches to: the value of its one `Upgrade` field.
    pub(super) upgrade: Option<Span>,
    pub(super) seal: SoleField,
    pub(super) asked: SoleField,
    /// There are fields with a request's id. They are forwarded as any other, unless they are replaced.
    pub(super) has_request_id: bool,
}

/// The value of a field that counts only if there is one of it.
#[derive(Debug, Default)]
pub(super) struct SoleField {
    value: Span,
    count: usize,
}

impl SoleField {
    fn record(&mut self, value: Span) {
        self.value = value;
        self.count += 1;
    }

    pub(super) fn value(&self) -> Option<Span> {
        (self.count == 1).then_some(self.value)
    }
}

impl Fields {
    /// Resets to a head without fields.
    pub(super) fn clear(&mut self) {
        self.list.clear();
        self.connection = ConnectionOptions::default();
        self.content_length = None;
        self.chunked = false;
        self.upgrade = None;
        (self.seal.count, self.asked.count) = (0, 0);
        self.has_request_id = false;
    }

    /// Takes the fields from `httparse` into a cleared list, checks those about framing, and marks those that must not be
    /// forwarded.
    pub(super) fn fill(
        &mut self,
        buffer: &[u8],
        headers: &[httparse::Header<'_>],
        classify: impl Fn(&[u8]) -> FieldKind,
    ) -> Result<(), BadHead> {
        let mut upgrades = 0;
        let mut named_by_connection = false;
        for header in headers {
            let (name, value) = (header.name.as_bytes(), trim(header.value));
            let kind = classify(name);
            match kind {
                FieldKind::ContentLength => {
                    let length = parse_length(value).ok_or(BadHead::ContentLength)?;
                    if self.content_length.replace(length).is_some() {
                        return Err(BadHead::ContentLength);
                    }
                }
                FieldKind::TransferEncoding => {
                    if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                        return Err(BadHead::TransferEncoding);
                    }
                    self.chunked = true;
                }
                FieldKind::Connection => named_by_connection |= self.connection.read(value),
                FieldKind::Upgrade => {
                    upgrades += 1;
                    self.upgrade = Some(Span::of(buffer, value));
                }
                FieldKind::Seal => self.seal.record(Span::of(buffer, value)),
                FieldKind::Asked => self.asked.record(Span::of(buffer, value)),
                FieldKind::Kept => self.has_request_id |= is_request_id(name),
                _ => {}
            }
            self.list.push(Field { name: Span::of(buffer, name), value: Span::of(buffer, value), kind });
        }
        if self.chunked && self.content_length.is_some() {
            return Err(BadHead::AmbiguousLength);
        }
        if !self.connection.upgrade || upgrades != 1 {
            self.upgrade = None;
        }
        if named_by_connection {
            self.drop_named_by_connection(buffer);
        }
        Ok(())
    }

    /// Drops the fields named by a `Connection` field (RFC 9110 section 7.6.1), except those that we check or write
    /// ourselves.
    fn drop_named_by_connection(&mut self, buffer: &[u8]) {
        for at in 0..self.list.len() {
            if self.list[at].kind != FieldKind::Connection {
                continue;
            }
            for option in list_items(self.list[at].value.bytes(buffer)) {
                let names = |field: &&mut Field| {
                    field.kind == FieldKind::Kept && field.name.bytes(buffer).eq_ignore_ascii_case(option)
                };
                self.list.iter_mut().filter(names).for_each(|field| field.kind = FieldKind::Dropped);
            }
        }
    }
}

impl ConnectionOptions {
    /// Reads one field value; returns whether it names fields beside the common options.
    fn read(&mut self, value: &[u8]) -> bool {
        let mut others = false;
        for option in list_items(value) {
            if option.eq_ignore_ascii_case(b"close") {
                self.close = true;
            } else if option.eq_ignore_ascii_case(b"keep-alive") {
                self.keep_alive = true;
            } else if option.eq_ignore_ascii_case(b"upgrade") {
                self.upgrade = true;
            } else {
                others = true;
            }
        }
        others
    }
}

/// The items of a comma-separated list, trimmed; empty ones are left out (RFC 9110 section 5.6.1).
pub(super) fn list_items(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(trim).filter(|item| !item.is_empty())
}

/// Only digits, no sign, no list, no overflow (RFC 9110 section 8.6).
fn parse_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    value.iter().try_fold(0_u64, |sum, digit| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0')))
}

pub(super) fn trim(value: &[u8]) -> &[u8] {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    // httparse has already trimmed most values.
    if !value.first().is_some_and(blank) && !value.last().is_some_and(blank) {
        return value;
    }
    let start = value.iter().position(|byte| !blank(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    &value[start..end]
}
