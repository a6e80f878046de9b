//! Seals and questions on the wire.
//!
//! ```text
//! X-Clearcoat-Seal:  1 <stamp>[,<stamp>...] <id> <names>.
//! X-Clearcoat-Asked: 1 <stamp> <id> <path>
//! stamp:             <journal>.<run> <position>
//! ```
//!
//! Journal and id are 16 hexadecimal digits, the run 8; the position is decimal; names have eight characters each and
//! nothing between them. The full stop ends a seal, so that a truncated one is not mistaken for one with fewer names.

use super::{Name, Position, Run, Stamp};

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

/// The maximum number of stamps in a seal: one for each replica, of which a fleet has two or three, and some that are gone.
pub const MAX_STAMPS: usize = 36;

/// The maximum length of a stamp in a seal, in bytes, with the character after it.
pub const STAMP_LEN: usize = 16 + 1 + 8 + 1 + MAX_DECIMAL + 1;

/// The parsed seal of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal<'s> {
    /// The stamp of the journal by which the answer is judged, if it has one.
    pub own: Option<Stamp>,
    /// The random id of this answer.
    pub id: u64,
    stamps: &'s [u8],
    names: &'s [u8],
}

impl<'s> Seal<'s> {
    /// Parses a field value, for a reader that judges by `journal`; `None` if it is not a complete seal of this version.
    pub fn parse(value: &'s [u8], journal: u64) -> Option<Self> {
        let stamps = value.strip_prefix(VERSION)?.strip_suffix(b".")?;
        let (first, mut rest) = stamp(stamps)?;
        let mut own = Some(first).filter(|first| first.journal == journal);
        while let Some(more) = rest.strip_prefix(b",") {
            let (other, after) = stamp(more)?;
            own = own.or(Some(other).filter(|other| other.journal == journal));
            rest = after;
        }
        let stamps = &stamps[..stamps.len() - rest.len()];
        let (id, rest) = hexadecimal(rest.strip_prefix(b" ")?, 16)?;
        let names = rest.strip_prefix(b" ")?;
        names.len().is_multiple_of(Name::LEN).then_some(Seal { own, id, stamps, names })
    }

    /// The names of the page.
    pub fn names(&self) -> impl ExactSizeIterator<Item = Name> + use<'s> {
        self.names.as_chunks().0.iter().map(|text| Name::of_text(*text))
    }

    /// The stamp of this journal, if there is one.
    pub fn stamp_of(&self, journal: u64) -> Option<Stamp> {
        let stamps = self.stamps.split(|byte| *byte == b',').filter_map(|text| Some(stamp(text)?.0));
        stamps.into_iter().find(|stamp| stamp.journal == journal)
    }
}

/// The question of a request: what the reader of the page remembers, for the rendering of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked<'a> {
    /// The head of the reader's journal when the request arrived.
    pub stamp: Stamp,
    /// The id of the request.
    pub id: u64,
    /// The path of the request, without its query.
    pub path: &'a [u8],
}

impl<'a> Asked<'a> {
    /// Parses a field value; `None` if it is not a question of this version.
    pub fn parse(value: &'a [u8]) -> Option<Self> {
        let (stamp, rest) = stamp(value.strip_prefix(VERSION)?)?;
        let (id, rest) = hexadecimal(rest.strip_prefix(b" ")?, 16)?;
        let path = rest.strip_prefix(b" ")?;
        Some(Asked { stamp, id, path })
    }
}

/// Appends the seal of an answer with this id, which was rendered after every purge that `stamps` cover. Sorts and
/// deduplicates `names`.
pub fn write_seal(out: &mut Vec<u8>, stamps: impl Iterator<Item = Stamp>, id: u64, names: &mut Vec<Name>) {
    names.sort_unstable();
    names.dedup();
    out.reserve(VERSION.len() + STAMP_LEN + 16 + 1 + names.len() * Name::LEN + 1);
    out.extend_from_slice(VERSION);
    for (number, stamp) in stamps.take(MAX_STAMPS).enumerate() {
        if number > 0 {
            out.push(b',');
        }
        push_run(out, stamp.journal, stamp.run);
        out.extend_from_slice(itoa::Buffer::new().format(stamp.position).as_bytes());
    }
    out.push(b' ');
    push_hexadecimal(out, id, 16);
    out.push(b' ');
    names.iter().for_each(|name| out.extend_from_slice(name.as_bytes()));
    out.push(b'.');
}

/// The common prefix of all questions in this run of this journal, built once because each request needs it.
pub fn asked_prefix(journal: u64, run: Run) -> Vec<u8> {
    let mut prefix = VERSION.to_vec();
    push_run(&mut prefix, journal, run);
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

/// Appends the beginning of a stamp.
fn push_run(out: &mut Vec<u8>, journal: u64, run: Run) {
    push_hexadecimal(out, journal, 16);
    out.push(b'.');
    push_hexadecimal(out, u64::from(run.0), 8);
    out.push(b' ');
}

/// The stamp at the beginning of a text, and what follows it.
fn stamp(text: &[u8]) -> Option<(Stamp, &[u8])> {
    let (journal, rest) = hexadecimal(text, 16)?;
    let (run, rest) = hexadecimal(rest.strip_prefix(b".")?, 8)?;
    let (position, rest) = decimal(rest.strip_prefix(b" ")?)?;
    // Eight digits, so it fits.
    Some((Stamp { journal, run: Run(run as u32), position }, rest))
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
    let end = text.iter().take(MAX_DECIMAL + 1).position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
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

    fn names(tags: &[String]) -> Vec<Name> {
        tags.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect()
    }

    fn sealed(stamps: &[Stamp], id: u64, tags: &[String]) -> Vec<u8> {
        let mut out = Vec::new();
        write_seal(&mut out, stamps.iter().copied(), id, &mut names(tags));
        out
    }

    prop_compose! {
        fn any_stamp()(journal in 0..4_u64, run: u32, position: u64) -> Stamp {
            Stamp { journal, run: Run(run), position }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_nothing_less(
            stamps in prop::collection::vec(any_stamp(), 1..5),
            id: u64,
            tags in prop::collection::vec("[a-z_0-9]{1,12}", 0..40),
        ) {
            let text = sealed(&stamps, id, &tags);
            let mut expected = names(&tags);
            expected.sort();
            expected.dedup();
            for journal in 0..5 {
                let first = stamps.iter().find(|stamp| stamp.journal == journal).copied();
                let seal = Seal::parse(&text, journal).unwrap();
                prop_assert_eq!((seal.own, seal.stamp_of(journal), seal.id), (first, first, id));
                prop_assert_eq!(seal.names().collect::<Vec<_>>(), expected.clone());
            }
            for end in 0..text.len() {
                prop_assert_eq!(Seal::parse(&text[..end], 0), None, "cut after {}", end);
            }
        }

        #[test]
        fn a_question_is_read_as_it_was_written(stamp in any_stamp(), id: u64, path in "/[!-~]{0,40}") {
            let mut text = Vec::new();
            let prefix = asked_prefix(stamp.journal, stamp.run);
            write_asked(&mut text, &prefix, stamp.position, id, format!("{path}?a=?").as_bytes());
            let path = path_of(path.as_bytes());
            prop_assert_eq!(Asked::parse(&text), Some(Asked { stamp, id, path }));
        }

        #[test]
        fn whatever_comes_is_read_or_refused(text in prop::collection::vec(any::<u8>(), 0..200)) {
            _ = Seal::parse(&text, 1);
            _ = Asked::parse(&text);
        }
    }

    #[test]
    fn what_resembles_a_seal_is_refused() {
        let stamp = Stamp { journal: 1, run: Run(2), position: 3 };
        let text = String::from_utf8(sealed(&[stamp], 4, &["a".to_owned()])).unwrap();
        assert!(Seal::parse(text.as_bytes(), 1).is_some(), "{text}");
        for (from, to) in [
            ("1 ", "2 "),
            (".0", ".g"),
            (" 3 ", "  "),
            (" 3 ", " 18446744073709551616 "),
            (".0", " 0"),
            (" 3 ", " 3, "),
        ] {
            let forged = text.replacen(from, to, 1);
            assert_eq!(Seal::parse(forged.as_bytes(), 1), None, "{forged}");
        }
        for extra in [format!("{text}."), format!("{text}, {text}"), format!(" {text}")] {
            assert_eq!(Seal::parse(extra.as_bytes(), 1), None, "{extra}");
        }
    }
}
