//! Version 1: a line of text (section 2.1).
//!
//! A line that has ended is simply read. One that has not is harder: may it still become valid? Instead of a second
//! grammar for beginnings, the field that is under way is given the few shortest ends that a field can have, and the
//! parser for whole fields judges them. So the two cannot disagree.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{BadHeader, ConnectionSource, ParsedHeader};

/// With CR LF, in bytes.
const MAX_LINE: usize = 107;
const LINE_END: &[u8] = b"\r\n";
const START: &[u8] = b"PROXY ";
const UNKNOWN: &[u8] = b"UNKNOWN";

#[derive(Clone, Copy)]
enum AddressFamily {
    V4,
    V6,
}

pub(super) fn parse(bytes: &[u8]) -> Result<ParsedHeader, BadHeader> {
    let bytes = &bytes[..bytes.len().min(MAX_LINE)];
    let Some(end) = bytes.iter().position(|&byte| byte == b'\r') else {
        check_open_line(bytes)?;
        return Ok(ParsedHeader::Incomplete);
    };
    let source = read_line(&bytes[..end])?;
    let len = end + LINE_END.len();
    match bytes.get(end + 1) {
        _ if len > MAX_LINE => Err(BadHeader::LineTooLong),
        None => Ok(ParsedHeader::Incomplete),
        Some(b'\n') => Ok(ParsedHeader::Complete { len, source }),
        Some(_) => Err(BadHeader::LineEnd),
    }
}

/// Reads a line that has ended, without its CR LF.
fn read_line(line: &[u8]) -> Result<ConnectionSource, BadHeader> {
    let (protocol, fields) = split(line.strip_prefix(START).ok_or(BadHeader::Signature)?)?;
    if protocol == UNKNOWN {
        return Ok(ConnectionSource::Local);
    }
    let family = AddressFamily::named(protocol).ok_or(BadHeader::Protocol)?;
    let mut fields = fields.unwrap_or_default().split(|&byte| byte == b' ');
    let mut field = || fields.next().unwrap_or_default();
    let client = family.address(field()).ok_or(BadHeader::Address)?;
    family.address(field()).ok_or(BadHeader::Address)?;
    let client_port = port(field()).ok_or(BadHeader::Port)?;
    port(field()).ok_or(BadHeader::Port)?;
    match fields.next() {
        None => Ok(ConnectionSource::Proxied(SocketAddr::new(client, client_port))),
        Some(_) => Err(BadHeader::LineEnd),
    }
}

/// Says whether a line without its end can still become valid.
fn check_open_line(line: &[u8]) -> Result<(), BadHeader> {
    let Some(rest) = line.strip_prefix(START) else {
        return if START.starts_with(line) { Ok(()) } else { Err(BadHeader::Signature) };
    };
    let (protocol, fields) = split(rest)?;
    let missing = match (protocol, fields) {
        (word, None) => {
            let known = [UNKNOWN, b"TCP4", b"TCP6"].iter().any(|name| name.starts_with(word));
            return if known { Ok(()) } else { Err(BadHeader::Protocol) };
        }
        (UNKNOWN, Some(_)) => LINE_END.len(),
        (word, Some(fields)) => AddressFamily::named(word).ok_or(BadHeader::Protocol)?.missing(fields)?,
    };
    if line.len() + missing > MAX_LINE { Err(BadHeader::LineTooLong) } else { Ok(()) }
}

/// The protocol, and the fields behind it where the blank is there that ends it.
fn split(rest: &[u8]) -> Result<(&[u8], Option<&[u8]>), BadHeader> {
    if rest.contains(&b'\n') {
        return Err(BadHeader::LineEnd);
    }
    Ok(match rest.iter().position(|&byte| byte == b' ') {
        Some(blank) => (&rest[..blank], Some(&rest[blank + 1..])),
        None => (rest, None),
    })
}

impl AddressFamily {
    fn named(protocol: &[u8]) -> Option<Self> {
        match protocol {
            b"TCP4" => Some(AddressFamily::V4),
            b"TCP6" => Some(AddressFamily::V6),
            _ => None,
        }
    }

    /// A whole address. The standard library refuses leading zeros in IPv4 and zones in IPv6.
    fn address(self, field: &[u8]) -> Option<IpAddr> {
        let text = str::from_utf8(field).ok()?;
        match self {
            AddressFamily::V4 => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            AddressFamily::V6 => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        }
    }

    /// The least number of bytes, with CR LF, that make these fields a valid end of a line.
    fn missing(self, fields: &[u8]) -> Result<usize, BadHeader> {
        let mut fields = fields.split(|&byte| byte == b' ').enumerate().peekable();
        let mut missing = 0;
        while let Some((index, field)) = fields.next() {
            let under_way = fields.peek().is_none();
            let end = match index {
                0 | 1 if under_way => self.shortest_end(field).ok_or(BadHeader::Address)?,
                0 | 1 => self.address(field).map(|_| 0).ok_or(BadHeader::Address)?,
                2 | 3 if under_way && field.is_empty() => "0".len(),
                2 | 3 => port(field).map(|_| 0).ok_or(BadHeader::Port)?,
                _ => return Err(BadHeader::LineEnd),
            };
            missing = end + after(index);
        }
        Ok(missing)
    }

    /// The length of the shortest end that makes this beginning an address; none if no end does.
    ///
    /// The ends are enough. For IPv4 they are all there are, but for the values of the numbers. In IPv6 a beginning
    /// without `::` is completed by one, or is complete; one with it is complete, or lacks a last group; and what has
    /// begun a dotted quad ends as IPv4 does.
    fn shortest_end(self, field: &[u8]) -> Option<usize> {
        let ends: &[&str] = match self {
            AddressFamily::V4 => &["", "0", ".0", "0.0", ".0.0", "0.0.0", ".0.0.0", "0.0.0.0"],
            AddressFamily::V6 => &["", ":", "0", "::", ":0", ".0", "0.0", ".0.0", "0.0.0", ".0.0.0"],
        };
        let completes = |end: &&&str| self.address(&[field, end.as_bytes()].concat()).is_some();
        ends.iter().find(completes).map(|end| end.len())
    }
}

/// The least number of bytes that must follow the field of this index. Behind the first address there is room for all
/// of them in any case, so only its line end counts.
fn after(index: usize) -> usize {
    let ports = match index {
        1 => " 0 0",
        2 => " 0",
        _ => "",
    };
    ports.len() + LINE_END.len()
}

/// A whole port: one to five digits, no sign, no leading zero.
fn port(field: &[u8]) -> Option<u16> {
    let plain = field.iter().all(u8::is_ascii_digit) && (field == b"0" || !field.starts_with(b"0"));
    str::from_utf8(field).ok().filter(|_| plain)?.parse().ok()
}
