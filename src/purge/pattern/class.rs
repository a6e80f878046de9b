//! A set of bytes: what one position of a pattern matches.

use std::fmt::{self, Write};

/// A set of bytes, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Class([u128; 2]);

impl Class {
    pub(super) const EMPTY: Class = Class([0; 2]);
    pub(super) const ALL: Class = Class([u128::MAX; 2]);

    pub(super) fn of(byte: u8) -> Self {
        Class::range(byte, byte)
    }

    /// The bytes from `first` to `last`, both included.
    pub(super) fn range(first: u8, last: u8) -> Self {
        let mut class = Class::EMPTY;
        (first..=last).for_each(|byte| class.0[usize::from(byte >> 7)] |= 1 << (byte & 127));
        class
    }

    /// The bytes that `.` matches: all but a line feed.
    pub(super) fn dot() -> Self {
        Class::of(b'\n').complement()
    }

    pub(super) fn contains(self, byte: u8) -> bool {
        self.0[usize::from(byte >> 7)] & (1 << (byte & 127)) != 0
    }

    pub(super) fn union(self, other: Class) -> Self {
        Class([self.0[0] | other.0[0], self.0[1] | other.0[1]])
    }

    pub(super) fn complement(self) -> Self {
        Class([!self.0[0], !self.0[1]])
    }

    pub(super) fn meets(self, other: Class) -> bool {
        self.0[0] & other.0[0] != 0 || self.0[1] & other.0[1] != 0
    }

    pub(super) fn len(self) -> u32 {
        self.0[0].count_ones() + self.0[1].count_ones()
    }

    /// The set with every letter in both cases.
    pub(super) fn caseless(self) -> Self {
        let letters = (b'A'..=b'Z').filter(|&upper| self.contains(upper) || self.contains(upper | 0x20));
        letters.fold(self, |class, upper| class.union(Class::of(upper)).union(Class::of(upper | 0x20)))
    }

    pub(super) fn bytes(self) -> impl Iterator<Item = u8> {
        (0..=u8::MAX).filter(move |&byte| self.contains(byte))
    }
}

/// As written in a pattern: `.`, `[0-9]`, `[^,]`.
impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Class::dot() {
            return f.write_char('.');
        }
        // A class needs at least one member.
        let negated = (129..256).contains(&self.len()) || self.len() == 0;
        let listed = if negated { self.complement() } else { *self };
        f.write_str(if negated { "[^" } else { "[" })?;
        let mut bytes = listed.bytes().peekable();
        while let Some(first) = bytes.next() {
            let mut last = first;
            while bytes.next_if(|&byte| byte - 1 == last).is_some() {
                last += 1;
            }
            member(f, first)?;
            match last - first {
                0 => {}
                1 => member(f, last)?,
                _ => {
                    f.write_char('-')?;
                    member(f, last)?;
                }
            }
        }
        f.write_char(']')
    }
}

fn member(out: &mut impl Write, byte: u8) -> fmt::Result {
    if byte == b'-' { out.write_str("\\-") } else { write_byte(out, byte) }
}

/// Writes a literal byte as one word of ASCII: in hexadecimal if it could end the word that a ban takes for the
/// pattern, or is not read as the same character everywhere.
pub(super) fn write_byte(out: &mut impl Write, byte: u8) -> fmt::Result {
    match byte {
        b'"' | b'\'' | b'#' | 0..=b' ' | 0x7f.. => write!(out, "\\x{byte:02x}"),
        b'\\' | b'^' | b'$' | b'.' | b'|' | b'?' | b'*' | b'+' | b'(' | b')' | b'[' | b']' | b'{' | b'}' => {
            out.write_char('\\')?;
            out.write_char(byte.into())
        }
        _ => out.write_char(byte.into()),
    }
}
