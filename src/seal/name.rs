//! The names of a page, as they are in a seal.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// The digits of a name, in ASCII order, so that sorted names are sorted texts.
const ALPHABET: &[u8; 64] = b"-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz";

/// The bits of a digit.
const DIGIT: u32 = 6;

/// An odd number without a pattern: it spreads the bits of eight letters over a whole word (Knuth, TAOCP 6.4).
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// A tag in a seal: 48 bits of its hash, as eight characters. Two tags of a page with the same name count as one, and a
/// purge of either concerns the page; with a million names known, one in 280 million is mistaken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name([u8; Name::LEN]);

impl Name {
    /// The length of its text in bytes.
    pub const LEN: usize = 8;

    /// The name of a tag, without blanks around it.
    pub fn of_tag(tag: &[u8]) -> Self {
        let hash = xxh3_64(tag);
        let digit = |at: u32| ALPHABET[(hash >> (u64::BITS - DIGIT * (at + 1)) & 0x3f) as usize];
        Name([0, 1, 2, 3, 4, 5, 6, 7].map(digit))
    }

    /// The name with this text; `None` if it is not one of the alphabet.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text: [u8; Name::LEN] = text.try_into().ok()?;
        text.iter().all(|byte| is_digit(*byte)).then_some(Name(text))
    }

    /// The name with this text, which came from [`Name::of_tag`] once.
    pub(super) fn of_text(text: [u8; Name::LEN]) -> Self {
        Name(text)
    }

    /// Its text.
    pub fn as_bytes(&self) -> &[u8; Name::LEN] {
        &self.0
    }

    /// Its key in an index, with its bits spread.
    pub(super) fn key(self) -> u64 {
        let spread = u64::from_be_bytes(self.0).wrapping_mul(SPREAD);
        spread ^ spread >> 32
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0.map(char::from).iter().collect()
    }
}

impl TryFrom<String> for Name {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Name::parse(text.as_bytes()).ok_or("a name has eight letters, digits, - or _")
    }
}

fn is_digit(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_alphabet_is_in_order_and_has_no_other_digit() {
        assert!(ALPHABET.is_sorted() && ALPHABET.iter().all(|byte| is_digit(*byte)));
        assert_eq!((0..=u8::MAX).filter(|byte| is_digit(*byte)).count(), ALPHABET.len());
    }

    #[test]
    fn names_and_their_keys_are_told_apart() {
        let names: Vec<Name> = (0..50_000).map(|n| Name::of_tag(format!("cat_p_{n}").as_bytes())).collect();
        let keys: HashSet<u64> = names.iter().map(|name| name.key()).collect();
        assert_eq!(keys.len(), names.len());
        // The index selects the bucket by the low bits, and distinguishes names by the high ones.
        let used = |bits: fn(u64) -> u64| keys.iter().map(|key| bits(*key)).collect::<HashSet<u64>>().len();
        assert!(used(|key| key & 0xfff) == 4096 && used(|key| key >> 52) == 4096);
    }

    #[test]
    fn only_eight_digits_are_a_name() {
        let name = Name::of_tag(b"cat_p_1");
        assert_eq!(Name::parse(name.as_bytes()), Some(name));
        for text in [&b"1234567"[..], b"123456789", b"1234567 ", b"1234567.", b"1234567\xff"] {
            assert_eq!(Name::parse(text), None);
        }
    }
}
