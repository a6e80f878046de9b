//! Seals and questions on the wire.
//!
//! ```text
//! X-Clearcoat-Seal:  1 <journal>.<run> <position> <id> <names>.
//! X-Clearcoat-Asked: 1 <journal> <position> <id> <path>
//! ```
//!
//! Journal and id are 16 hexadecimal digits, the run 8; the position is decimal; names have eight characters each and
//! nothing between them. The full stop ends a seal, so that a truncated one is not mistaken for one with fewer names.

use super::{Lineage, Name, Position, Run};

/// The version, which begins every value.
const VERSION: &[u8] = b"1 ";

/// The two hexadecimal digits of each byte.
const PAIRS: [[u8; 2]; 256] = {
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < pairs.len() {
        pairs[byte] = [b"0123456789abcdef"[byte >> 4], b"0123456789abcdef"[byte & 0xf]];
        byte += 1;
    }
    pairs
};

/// The value of each hexadecimal digit in lower case; above 15 for any other byte.
const VALUES: [u8; 256] = {
    let mut values = [0x10; 256];
    let mut value = 0;
    while value < 16 {
        values[b"0123456789abcdef"[value as usize] as usize] = value;
        value += 1;
    }
    values
};

/// The longest path of a question, in bytes: with it the header line stays below the default of Varnish's
/// `http_req_hdr_len`, 8 KiB.
const MAX_PATH: usize = 8_000;

/// The maximum number of digits of a position.
const MAX_DECIMAL: usize = 20;

/// The parsed seal of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal<'s> {
    /// The identity of the journal.
    pub journal: u64,
    /// The run of the journal.
    pub run: Run,
    /// Every purge up to here was known before the page was rendered.
    pub position: Position,
    /// The random id of this answer.
    pub id: u64,
    names: &'s [u8],
}

impl<'s> Seal<'s> {
    /// Parses a field value; `None` if it is not a complete seal of this version.
    pub fn parse(value: &'s [u8]) -> Option<Self> {
        let rest = value.strip_prefix(VERSION)?.strip_suffix(b".")?;
        let (journal, rest) = hexadecimal(rest, 16)?;
        let (run, rest) = hexadecimal(rest.strip_prefix(b".")?, 8)?;
        let (position, rest) = decimal(rest.strip_prefix(b" ")?)?;
        let (id, rest) = hexadecimal(rest.strip_prefix(b" ")?, 16)?;
        let names = rest.strip_prefix(b" ")?;
        // Eight digits, so it fits.
        let run = Run(run as u32);
        names.len().is_multiple_of(Name::LEN).then_some(Seal { journal, run, position, id, names })
    }

    /// The names of the page.
    pub fn names(&self) -> impl ExactSizeIterator<Item = Name> + use<'s> {
        self.names.as_chunks().0.iter().map(|text| Name::of_text(*text))
    }
}

/// The question of a request: the position that the reader of the page remembers, for the rendering of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked<'a> {
    /// The identity of the journal in which the position is.
    pub journal: u64,
    /// The highest position that was known when the request arrived.
    pub position: Position,
    /// The id of the request.
    pub id: u64,
    /// The path of the request, without its query.
    pub path: &'a [u8],
}

impl<'a> Asked<'a> {
    /// Parses a field value; `None` if it is not a question of this version.
    pub fn parse(value: &'a [u8]) -> Option<Self> {
        let (journal, rest) = hexadecimal(value.strip_prefix(VERSION)?, 16)?;
        let (position, rest) = decimal(rest.strip_prefix(b" ")?)?;
        let (id, rest) = hexadecimal(rest.strip_prefix(b" ")?, 16)?;
        let path = rest.strip_prefix(b" ")?;
        Some(Asked { journal, position, id, path })
    }
}

/// Appends the seal of an answer with this id, which was rendered when every purge up to `position` was known. Sorts
/// and deduplicates `names`.
pub fn write_seal(out: &mut Vec<u8>, lineage: &Lineage, position: Position, id: u64, names: &mut Vec<Name>) {
    names.sort_unstable();
    names.dedup();
    out.reserve(VERSION.len() + 16 + 1 + 8 + 1 + MAX_DECIMAL + 1 + 16 + 1 + names.len() * Name::LEN + 1);
    out.extend_from_slice(VERSION);
    push_hexadecimal(out, lineage.journal(), 16);
    out.push(b'.');
    push_hexadecimal(out, u64::from(lineage.run().0), 8);
    out.push(b' ');
    out.extend_from_slice(itoa::Buffer::new().format(position).as_bytes());
    out.push(b' ');
    push_hexadecimal(out, id, 16);
    out.push(b' ');
    names.iter().for_each(|name| out.extend_from_slice(name.as_bytes()));
    out.push(b'.');
}

/// The common prefix of all questions of this journal, built once because each request needs it.
pub fn asked_prefix(journal: u64) -> Vec<u8> {
    let mut prefix = VERSION.to_vec();
    push_hexadecimal(&mut prefix, journal, 16);
    prefix.push(b' ');
    prefix
}

/// Appends a question's text after its [prefix](asked_prefix). Only the path of the request's `target` is written.
/// Writes nothing if the path is so long that a Varnish would refuse the request.
pub fn write_asked(out: &mut Vec<u8>, prefix: &[u8], position: Position, id: u64, target: &[u8]) {
    let path = path_of(target);
    if path.len() > MAX_PATH {
        return;
    }
    out.extend_from_slice(prefix);
    out.extend_from_slice(itoa::Buffer::new().format(position).as_bytes());
    out.push(b' ');
    push_hexadecimal(out, id, 16);
    out.push(b' ');
    out.extend_from_slice(path);
}

/// A target without its query.
pub(super) fn path_of(target: &[u8]) -> &[u8] {
    memchr::memchr(b'?', target).map_or(target, |end| &target[..end])
}

/// Appends the last `digits` hexadecimal digits of a number, 16 at most.
fn push_hexadecimal(out: &mut Vec<u8>, number: u64, digits: usize) {
    let mut text = [0; 16];
    for (pair, byte) in text.as_chunks_mut().0.iter_mut().zip(number.to_be_bytes()) {
        *pair = PAIRS[usize::from(byte)];
    }
    out.extend_from_slice(&text[text.len() - digits..]);
}

fn hexadecimal(text: &[u8], digits: usize) -> Option<(u64, &[u8])> {
    let (number, rest) = text.split_at_checked(digits)?;
    let mut value = 0;
    let mut others = 0;
    for byte in number {
        let digit = VALUES[usize::from(*byte)];
        others |= digit;
        value = value << 4 | u64::from(digit);
    }
    (others < 16).then_some((value, rest))
}

fn decimal(text: &[u8]) -> Option<(u64, &[u8])> {
    let end = text.iter().take(MAX_DECIMAL + 1).position(|byte| !byte.is_ascii_digit())?;
    let (number, rest) = text.split_at(end);
    if number.is_empty() {
        return None;
    }
    let number = number.iter().try_fold(0_u64, |sum, digit| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0')));
    Some((number?, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sealed(lineage: &Lineage, position: Position, id: u64, tags: &[String]) -> Vec<u8> {
        let mut names = tags.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect();
        let mut out = Vec::new();
        write_seal(&mut out, lineage, position, id, &mut names);
        out
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_nothing_less(
            journal: u64, run: u32, position: u64, id: u64, tags in prop::collection::vec("[a-z_0-9]{1,12}", 0..40),
        ) {
            let text = sealed(&Lineage::new(journal, Run(run), vec![]), position, id, &tags);
            let seal = Seal::parse(&text).unwrap();
            prop_assert_eq!((seal.journal, seal.run, seal.position, seal.id), (journal, Run(run), position, id));
            let mut names: Vec<Name> = tags.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect();
            names.sort();
            names.dedup();
            prop_assert_eq!(seal.names().collect::<Vec<_>>(), names);
            for end in 0..text.len() {
                prop_assert_eq!(Seal::parse(&text[..end]), None, "cut after {}", end);
            }
        }

        #[test]
        fn a_question_is_read_as_it_was_written(journal: u64, position: u64, id: u64, path in "/[!-~]{0,40}") {
            let mut text = Vec::new();
            write_asked(&mut text, &asked_prefix(journal), position, id, format!("{path}?a=?").as_bytes());
            let path = path_of(path.as_bytes());
            prop_assert_eq!(Asked::parse(&text), Some(Asked { journal, position, id, path }));
        }

        #[test]
        fn whatever_comes_is_read_or_refused(text in prop::collection::vec(any::<u8>(), 0..200)) {
            _ = Seal::parse(&text);
            _ = Asked::parse(&text);
        }
    }

    #[test]
    fn what_resembles_a_seal_is_refused() {
        let text = String::from_utf8(sealed(&Lineage::new(1, Run(2), vec![]), 3, 4, &["a".to_owned()])).unwrap();
        assert!(Seal::parse(text.as_bytes()).is_some(), "{text}");
        for (from, to) in [("1 ", "2 "), (".0", ".g"), (" 3 ", "  "), (" 3 ", " 18446744073709551616 "), (".0", " 0")] {
            let forged = text.replacen(from, to, 1);
            assert_eq!(Seal::parse(forged.as_bytes()), None, "{forged}");
        }
        for extra in [format!("{text}."), format!("{text}, {text}"), format!(" {text}")] {
            assert_eq!(Seal::parse(extra.as_bytes()), None, "{extra}");
        }
    }
}
