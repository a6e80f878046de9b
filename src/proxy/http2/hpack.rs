//! Header blocks are decoded to maintain the dynamic table, and to check whether each block is well formed.
//!
//! [`super::screen`] says why. A block is written again with every field as a literal, without the table.

use std::collections::VecDeque;
use std::rc::Rc;

use http::{HeaderName, HeaderValue, Method, StatusCode};

use super::huffman;

/// The largest size of the table (RFC 9113 section 6.5.2: the default, and our settings do not change it).
const TABLE_SIZE: usize = 4096;

/// The overhead of an entry beside its name and value (RFC 7541 section 4.1).
const ENTRY: usize = 32;

/// The static table (RFC 7541 appendix A).
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// A block that cannot be decoded: the state of the table is unknown from here on (RFC 7541 section 2.3.3).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadHeaderBlock;

/// A block that was decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadBlock {
    /// h2 takes it, or refuses it as it should.
    WellFormed,
    /// It has more fields than it may, and those are left out: h2 refuses it.
    TooLong,
    /// It is malformed (RFC 9113 section 8.1.1) in a way that h2 treats as undecodable.
    Malformed,
}

/// Name and value.
type HeaderField = (Rc<[u8]>, Rc<[u8]>);

/// The dynamic table of one connection's requests.
#[derive(Debug)]
pub(super) struct Table {
    /// Newest first.
    entries: VecDeque<HeaderField>,
    size: usize,
    max: usize,
}

impl Table {
    pub(super) fn new() -> Self {
        Table { entries: VecDeque::new(), size: 0, max: TABLE_SIZE }
    }

    /// Decodes a complete block, and appends its fields to `out` as literals. Fields beyond `limit`, counted like
    /// SETTINGS_MAX_HEADER_LIST_SIZE, are left out.
    pub(super) fn rewrite(
        &mut self,
        block: &[u8],
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<ReadBlock, BadHeaderBlock> {
        let mut rest = Input(block);
        let (mut listed, mut is_well_formed, mut has_fields) = (0, true, false);
        while let Some(&first) = rest.0.first() {
            let (name, value) = match first {
                0x80.. => self.entry(rest.integer(7)?)?,
                0x40.. => {
                    let (name, value) = self.literal(&mut rest, 6)?;
                    self.insert(&name, &value);
                    (name, value)
                }
                0x20.. => {
                    let max = rest.integer(5)?;
                    if has_fields || max > TABLE_SIZE {
                        return Err(BadHeaderBlock);
                    }
                    self.max = max;
                    self.evict(0);
                    continue;
                }
                _ => self.literal(&mut rest, 4)?,
            };
            has_fields = true;
            if listed <= limit {
                listed += name.len() + value.len() + ENTRY;
                is_well_formed &= is_valid(&name, &value);
                out.push(0);
                put_string(out, &name);
                put_string(out, &value);
            }
        }
        Ok(match is_well_formed {
            false => ReadBlock::Malformed,
            true if listed > limit => ReadBlock::TooLong,
            true => ReadBlock::WellFormed,
        })
    }

    fn literal(&self, rest: &mut Input<'_>, bits: u32) -> Result<HeaderField, BadHeaderBlock> {
        let name = match rest.integer(bits)? {
            0 => rest.string()?,
            index => self.entry(index)?.0,
        };
        Ok((name, rest.string()?))
    }

    fn entry(&self, index: usize) -> Result<HeaderField, BadHeaderBlock> {
        let index = index.checked_sub(1).ok_or(BadHeaderBlock)?;
        match STATIC.get(index) {
            Some((name, value)) => Ok((name.as_bytes().into(), value.as_bytes().into())),
            None => self.entries.get(index - STATIC.len()).cloned().ok_or(BadHeaderBlock),
        }
    }

    fn insert(&mut self, name: &Rc<[u8]>, value: &Rc<[u8]>) {
        let size = name.len() + value.len() + ENTRY;
        self.evict(size);
        // An entry larger than the table empties it (RFC 7541 section 4.4).
        if size <= self.max {
            self.size += size;
            self.entries.push_front((Rc::clone(name), Rc::clone(value)));
        }
    }

    fn evict(&mut self, room: usize) {
        while self.size + room > self.max {
            let Some((name, value)) = self.entries.pop_back() else { return };
            self.size -= name.len() + value.len() + ENTRY;
        }
    }
}

/// The unread rest of a block.
struct Input<'b>(&'b [u8]);

impl Input<'_> {
    /// An integer with a prefix of `bits` bits (RFC 7541 section 5.1).
    fn integer(&mut self, bits: u32) -> Result<usize, BadHeaderBlock> {
        let mask = (1 << bits) - 1;
        let mut value = usize::from(self.byte()? & mask);
        if value < usize::from(mask) {
            return Ok(value);
        }
        // Five bytes exceed any valid length.
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(BadHeaderBlock)
    }

    fn byte(&mut self) -> Result<u8, BadHeaderBlock> {
        let (&byte, rest) = self.0.split_first().ok_or(BadHeaderBlock)?;
        self.0 = rest;
        Ok(byte)
    }

    fn string(&mut self) -> Result<Rc<[u8]>, BadHeaderBlock> {
        let is_huffman = self.0.first().is_some_and(|byte| byte & 0x80 != 0);
        let length = self.integer(7)?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(BadHeaderBlock)?;
        self.0 = rest;
        if !is_huffman {
            return Ok(bytes.into());
        }
        let mut decoded = Vec::with_capacity(length * 8 / 5);
        huffman::decode(bytes, &mut decoded).ok_or(BadHeaderBlock)?;
        Ok(decoded.into())
    }
}

/// Whether h2 can decode this field, checked with the same functions. How h2 treats a decodable field is left to h2.
fn is_valid(name: &[u8], value: &[u8]) -> bool {
    match name {
        b":method" => Method::from_bytes(value).is_ok(),
        b":status" => StatusCode::from_bytes(value).is_ok(),
        b":authority" | b":scheme" | b":path" | b":protocol" => std::str::from_utf8(value).is_ok(),
        _ => HeaderName::from_lowercase(name).is_ok() && HeaderValue::from_bytes(value).is_ok(),
    }
}

/// Writes a string without Huffman coding.
fn put_string(out: &mut Vec<u8>, string: &[u8]) {
    let length = string.len();
    if length < 0x7f {
        out.push(length as u8);
    } else {
        out.push(0x7f);
        let mut rest = length - 0x7f;
        while rest >= 0x80 {
            out.push(0x80 | (rest & 0x7f) as u8);
            rest >>= 7;
        }
        out.push(rest as u8);
    }
    out.extend_from_slice(string);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let hex: String = hex.split_whitespace().collect();
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    fn written(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, value) in fields {
            out.push(0);
            put_string(&mut out, name.as_bytes());
            put_string(&mut out, value.as_bytes());
        }
        out
    }

    fn rewritten(table: &mut Table, block: &[u8]) -> Result<(bool, Vec<u8>), BadHeaderBlock> {
        let mut out = Vec::new();
        table.rewrite(block, 1 << 20, &mut out).map(|read| (read == ReadBlock::WellFormed, out))
    }

    #[test]
    fn the_requests_of_the_rfc_are_read_with_the_table_that_they_share() {
        // RFC 7541 appendix C.4.
        let mut table = Table::new();
        let get = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
        let block = bytes("8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff");
        assert_eq!(rewritten(&mut table, &block), Ok((true, written(&get))));
        let block = bytes("8286 84be 5886 a8eb 1064 9cbf");
        assert_eq!(
            rewritten(&mut table, &block),
            Ok((true, written(&[&get[..], &[("cache-control", "no-cache")]].concat())))
        );
        let block = bytes("8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf");
        let third = [
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/index.html"),
            (":authority", "www.example.com"),
            ("custom-key", "custom-value"),
        ];
        assert_eq!(rewritten(&mut table, &block), Ok((true, written(&third))));
        assert_eq!(table.size, 164);
    }

    #[test]
    fn what_is_malformed_is_told_and_the_table_goes_on() {
        let mut table = Table::new();
        for (name, value) in [
            ("Upper", "a"),
            ("a b", "a"),
            ("", "a"),
            ("a", "a\x01"),
            ("a", "a\x7f"),
            ("a", "a\nb"),
            (":foo", "a"),
            (":method", "GET?\u{0}"),
            (":method", ""),
            (":status", "20"),
        ] {
            // Also as a table entry, which the next block references.
            let mut block = written(&[(name, value)]);
            block[0] = 0x40;
            assert!(!rewritten(&mut table, &block).unwrap().0, "{name:?}: {value:?}");
            assert_eq!(rewritten(&mut table, &[0xbe]).unwrap(), (false, written(&[(name, value)])), "{name:?}");
        }
        assert_eq!(rewritten(&mut table, &[0x82]).unwrap(), (true, written(&[(":method", "GET")])));
    }

    #[test]
    fn what_cannot_be_read_ends_the_connection() {
        for block in ["80", "be", "ff ff ff ff ff ff", "00", "00 05 61", "00 81 ff 00", "3f ff ff 03", "82 20", "7f"] {
            assert_eq!(rewritten(&mut Table::new(), &bytes(block)), Err(BadHeaderBlock), "{block}");
        }
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        let mut table = Table::new();
        let mut block = written(&[("a", &"b".repeat(4000))]);
        block[0] = 0x40;
        block.resize(block.len() + 16_000, 0xbe);
        let mut out = Vec::new();
        assert_eq!(table.rewrite(&block, 32 * 1024, &mut out), Ok(ReadBlock::TooLong));
        assert!(out.len() < 40 * 1024, "{} bytes", out.len());
    }
}
