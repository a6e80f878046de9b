//! What a line says, and how: one JSON object, or the Common Log Format.
//!
//! Everything that a stranger chose is escaped, so that nobody writes a line of his own: quotes, backslashes and bytes
//! that are no printable ASCII.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Redaction;

/// The longest target, method and host in a line, in bytes, before they are escaped: collectors cut a line at 16 KiB. No
/// registered method is half as long, and no name in the DNS is longer (RFC 1035 section 2.3.4).
const LONGEST_TARGET: usize = 4096;
const LONGEST_METHOD: usize = 32;
const LONGEST_HOST: usize = 255;

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFormat {
    /// One JSON object.
    Json,
    /// The Common Log Format of NCSA httpd, which tools for statistics read.
    Common,
}

/// One request that has ended.
#[derive(Clone, Debug)]
pub struct AccessLine<'a> {
    /// The listener: `edge` or `origin`.
    pub listener: &'static str,
    /// The address of the client.
    pub client: &'a str,
    /// What its head says; `None` if it has none that could be read.
    pub request: Option<RequestLine<'a>>,
    /// The status that the client was sent; 499 if it left before that.
    pub status: u16,
    /// Bytes of the answer that were written to the client, with its head.
    pub bytes_down: u64,
    /// How many of them are the head.
    pub head_down: u64,
    /// Bytes of the request that were read from the client, with its head.
    pub bytes_up: u64,
    /// The node that answered, or failed last.
    pub node: Option<&'a str>,
    /// Attempts at nodes.
    pub tries: u32,
    /// What the cache did: `hit`, `miss` or `pass`.
    pub cache: Option<&'static str>,
    /// From the end of the request's head until its node was turned to.
    pub queue: Option<Duration>,
    /// Until there was a connection to it; zero for one that was kept.
    pub connect: Option<Duration>,
    /// From there to the head of its answer.
    pub first_byte: Option<Duration>,
    /// From the end of the request's head to the last byte of the answer.
    pub total: Duration,
    /// Who ended it, and in which phase.
    pub termination: [u8; 2],
    /// Why it failed.
    pub reason: Option<&'static str>,
    /// The value of `X-Request-ID`.
    pub request_id: &'a [u8],
}

/// The part of a line that was read from the client.
#[derive(Clone, Copy, Debug)]
pub struct RequestLine<'a> {
    /// As the client wrote it.
    pub method: &'a [u8],
    /// In origin form, or `*`.
    pub target: &'a [u8],
    /// `None` for HTTP/1.0 without one.
    pub host: Option<&'a [u8]>,
    /// Such as `HTTP/1.1`.
    pub protocol: &'static str,
}

/// Writes lines, and remembers the text of the second in which the last one began.
#[derive(Debug)]
pub(super) struct LineWriter {
    format: LineFormat,
    second: u64,
    second_text: String,
    target: Vec<u8>,
}

impl LineWriter {
    pub(super) fn new(format: LineFormat) -> Self {
        LineWriter { format, second: u64::MAX, second_text: String::new(), target: Vec::new() }
    }

    /// Appends a line of a request that ends at `now`.
    pub(super) fn write(&mut self, out: &mut Vec<u8>, line: &AccessLine<'_>, now: SystemTime, redaction: &Redaction) {
        let began = now.duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(line.total);
        self.target.clear();
        if let Some(request) = &line.request {
            redaction.push_target(&mut self.target, request.target);
        }
        if self.second != began.as_secs() {
            self.second = began.as_secs();
            self.second_text = second_text(self.format, began.as_secs());
        }
        match self.format {
            LineFormat::Json => self.write_json(out, line, began.subsec_millis()),
            LineFormat::Common => self.write_common(out, line),
        }
    }

    /// Written out member by member, so that each name is copied as a constant.
    fn write_json(&self, out: &mut Vec<u8>, line: &AccessLine<'_>, millis: u32) {
        let request = line.request.as_ref();
        out.extend_from_slice(b"{\"time\":\"");
        out.extend_from_slice(self.second_text.as_bytes());
        out.extend_from_slice(b".");
        push_three_digits(out, u64::from(millis));
        out.extend_from_slice(b"Z\",\"listener\":");
        push_own(out, Some(line.listener));
        out.extend_from_slice(b",\"client\":");
        push_own(out, Some(line.client));
        out.extend_from_slice(b",\"method\":");
        push_text(out, request.map(|request| request.method), LONGEST_METHOD);
        out.extend_from_slice(b",\"host\":");
        push_text(out, request.and_then(|request| request.host), LONGEST_HOST);
        out.extend_from_slice(b",\"target\":");
        push_text(out, request.map(|_| &*self.target), LONGEST_TARGET);
        out.extend_from_slice(b",\"protocol\":");
        push_own(out, request.map(|request| request.protocol));
        out.extend_from_slice(b",\"status\":");
        push_number(out, line.status.into());
        out.extend_from_slice(b",\"bytes_down\":");
        push_number(out, line.bytes_down);
        out.extend_from_slice(b",\"bytes_up\":");
        push_number(out, line.bytes_up);
        out.extend_from_slice(b",\"node\":");
        push_own(out, line.node);
        out.extend_from_slice(b",\"tries\":");
        push_number(out, line.tries.into());
        out.extend_from_slice(b",\"cache\":");
        push_own(out, line.cache);
        out.extend_from_slice(b",\"queue_ms\":");
        push_millis(out, line.queue);
        out.extend_from_slice(b",\"connect_ms\":");
        push_millis(out, line.connect);
        out.extend_from_slice(b",\"first_byte_ms\":");
        push_millis(out, line.first_byte);
        out.extend_from_slice(b",\"total_ms\":");
        push_millis(out, Some(line.total));
        out.extend_from_slice(b",\"termination\":\"");
        out.extend_from_slice(&line.termination);
        out.extend_from_slice(b"\",\"reason\":");
        push_own(out, line.reason);
        out.extend_from_slice(b",\"request_id\":");
        push_text(out, Some(line.request_id), usize::MAX);
        out.extend_from_slice(b"}\n");
    }

    /// `client - - [time] "request" status bytes`, the bytes without the head.
    fn write_common(&self, out: &mut Vec<u8>, line: &AccessLine<'_>) {
        push(out, &[line.client.as_bytes(), b" - - [", self.second_text.as_bytes(), b" +0000] \""]);
        match &line.request {
            Some(request) => {
                push_cut(out, request.method, LONGEST_METHOD, hex_escape);
                out.push(b' ');
                push_cut(out, &self.target, LONGEST_TARGET, hex_escape);
                push(out, &[b" ", request.protocol.as_bytes()]);
            }
            None => out.push(b'-'),
        }
        out.extend_from_slice(b"\" ");
        push_number(out, line.status.into());
        out.push(b' ');
        match line.bytes_down.saturating_sub(line.head_down) {
            0 => out.push(b'-'),
            bytes => push_number(out, bytes),
        }
        out.push(b'\n');
    }
}

/// A second as RFC 3339 without its zone, or as the Common Log Format has it.
fn second_text(format: LineFormat, second: u64) -> String {
    let text = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(second)).to_string();
    let text = text.trim_end_matches('Z');
    let (date, time) = text.split_once('T').unwrap_or_default();
    match (format, date.split('-').collect::<Vec<_>>().as_slice()) {
        (LineFormat::Common, [year, month, day]) => {
            let month = month.parse::<usize>().ok().and_then(|month| MONTHS.get(month.checked_sub(1)?));
            format!("{day}/{}/{year}:{time}", month.unwrap_or(&"???"))
        }
        _ => text.to_owned(),
    }
}

fn push(out: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

fn push_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Milliseconds with three decimals, or `null`.
fn push_millis(out: &mut Vec<u8>, time: Option<Duration>) {
    let Some(time) = time else { return out.extend_from_slice(b"null") };
    // Not `as_micros`, which divides 128 bits.
    let micros = time.as_secs() * 1_000_000 + u64::from(time.subsec_micros());
    push_number(out, micros / 1000);
    out.push(b'.');
    push_three_digits(out, micros % 1000);
}

fn push_three_digits(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&[number / 100, number / 10 % 10, number % 10].map(|digit| b'0' + digit as u8));
}

/// A string of ours, which needs no escape, or `null`.
fn push_own(out: &mut Vec<u8>, value: Option<&str>) {
    let Some(value) = value else { return out.extend_from_slice(b"null") };
    out.push(b'"');
    out.extend_from_slice(value.as_bytes());
    out.push(b'"');
}

/// A string, cut after this many bytes, or `null`.
fn push_text(out: &mut Vec<u8>, value: Option<&[u8]>, longest: usize) {
    let Some(value) = value else { return out.extend_from_slice(b"null") };
    out.push(b'"');
    push_cut(out, value, longest, json_escape);
    out.push(b'"');
}

/// Appends as much of a text as a line may have of it.
fn push_cut(out: &mut Vec<u8>, text: &[u8], longest: usize, escape: impl Fn(&mut Vec<u8>, u8)) {
    push_escaped(out, &text[..text.len().min(longest)], escape);
    if text.len() > longest {
        out.extend_from_slice(b"...");
    }
}

/// Appends a text; `escape` writes each byte of it that is not harmless within quotes.
fn push_escaped(out: &mut Vec<u8>, text: &[u8], escape: impl Fn(&mut Vec<u8>, u8)) {
    let is_harmless = |byte: u8| matches!(byte, b' '..=b'~') & (byte != b'"') & (byte != b'\\');
    // No early exit, so that the loop is vectorised: nearly every text is harmless.
    if text.iter().fold(true, |harmless, &byte| harmless & is_harmless(byte)) {
        return out.extend_from_slice(text);
    }
    for &byte in text {
        if is_harmless(byte) { out.push(byte) } else { escape(out, byte) }
    }
}

fn digits(byte: u8) -> [u8; 2] {
    [byte >> 4, byte & 0xf].map(|digit| b"0123456789abcdef"[usize::from(digit)])
}

/// RFC 8259 section 7. A byte that is no ASCII is taken for a character of Latin-1: what it was meant to be is unknown.
fn json_escape(out: &mut Vec<u8>, byte: u8) {
    match byte {
        b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
        _ => push(out, &[b"\\u00", &digits(byte)]),
    }
}

/// As Apache and nginx do.
fn hex_escape(out: &mut Vec<u8>, byte: u8) {
    push(out, &[b"\\x", &digits(byte)]);
}
