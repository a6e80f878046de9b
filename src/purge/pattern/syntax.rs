//! The part of PCRE's language that every Varnish reads alike, as a syntax tree.
//!
//! Varnish 6.0 has PCRE 8, a newer one PCRE2 of any version, and ours is a third. Constructs that one of them refuses
//! or reads differently are not common: lookbehind of variable length, `(?aD)`, `\N{U+63}`, `{,3}` and future ones. So
//! this is an allow-list, not a deny-list.
//!
//! A tree is always rewritten before it is sent: every byte is literal or escaped, so that blanks, quotes and `\Q..\E`
//! need no special handling.

use std::fmt::{self, Write};

use super::BadPattern;
use super::class::{Class, write_byte};

/// The deepest nesting of groups. Each level takes stack of a Varnish worker when it compiles the pattern (80 KiB, and
/// 64 KiB in Varnish 6.0), and one of its 20 levels when it matches, some of which the rest of the pattern needs.
pub(crate) const MAX_NESTING: usize = 16;

/// The largest number in `{n,m}`. PCRE expands the repeated part that many times.
const MAX_COUNT: u32 = 1000;

/// The allowed constructs, for the error message.
const ALLOWED: &str = "allowed are literals, `\\` before a character that is no letter or digit, \\d \\w \\s \\D \\W \\S \\t \
                       \\xHH \\b \\B \\A \\z \\Q..\\E, classes, `.` `^` `$` `|`, groups ( ) (?: ), lookahead and lookbehind of \
                       one length, the quantifiers ? * + {n} {n,} {n,m}, lazy too, and (?i) at the beginning";

/// A whole pattern.
#[derive(Clone, Debug)]
pub(super) struct Syntax {
    pub(super) caseless: bool,
    pub(super) alternatives: Alternatives,
}

pub(super) type Alternatives = Vec<Vec<PatternNode>>;

/// One item of a sequence.
#[derive(Clone, Debug)]
pub(super) enum PatternNode {
    Byte(u8),
    Class(Class),
    /// `^`
    Start,
    /// `$`
    End,
    /// `\b`, or `\B` if false.
    Border(bool),
    Group {
        captures: bool,
        /// The offset of its parenthesis in the sender's pattern.
        at: usize,
        alternatives: Alternatives,
    },
    Look {
        behind: bool,
        negative: bool,
        at: usize,
        alternatives: Alternatives,
    },
    Repeat {
        /// A byte, a class or a group.
        node: Box<PatternNode>,
        min: u32,
        /// `None` means unbounded; a group always has a bound.
        max: Option<u32>,
        lazy: bool,
        /// The offset of the quantifier.
        at: usize,
    },
}

impl PatternNode {
    /// What a node that always takes one byte takes.
    pub(super) fn class(&self) -> Option<Class> {
        match self {
            PatternNode::Byte(byte) => Some(Class::of(*byte)),
            PatternNode::Class(class) => Some(*class),
            _ => None,
        }
    }
}

/// Parses a pattern. An error names the disallowed construct and its offset.
pub(super) fn parse(pattern: &[u8]) -> Result<Syntax, BadPattern> {
    let mut parser = PatternParser { pattern, at: 0 };
    let caseless = parser.take(b"(?i)");
    let alternatives = parser.alternatives(0)?;
    match parser.peek() {
        None => Ok(Syntax { caseless, alternatives }),
        Some(_) => Err(parser.error(parser.at, ") closes no group")),
    }
}

struct PatternParser<'p> {
    pattern: &'p [u8],
    at: usize,
}

impl PatternParser<'_> {
    fn error(&self, at: usize, what: impl Into<String>) -> BadPattern {
        BadPattern::Syntax { at, what: what.into() }
    }

    fn not_allowed(&self, at: usize, end: usize) -> BadPattern {
        let text = String::from_utf8_lossy(&self.pattern[at..end.min(self.pattern.len())]);
        self.error(at, format!("{text} is not read alike by every Varnish; {ALLOWED}"))
    }

    fn peek(&self) -> Option<u8> {
        self.pattern.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn take(&mut self, text: &[u8]) -> bool {
        let is_there = self.pattern[self.at..].starts_with(text);
        self.at += if is_there { text.len() } else { 0 };
        is_there
    }

    fn alternatives(&mut self, depth: usize) -> Result<Alternatives, BadPattern> {
        let mut alternatives = vec![Vec::new()];
        loop {
            let Some(byte) = self.peek().filter(|&byte| byte != b')') else { return Ok(alternatives) };
            if byte == b'|' {
                self.at += 1;
                alternatives.push(Vec::new());
                continue;
            }
            let Some(sequence) = alternatives.last_mut() else { return Ok(alternatives) };
            if self.take(b"\\Q") {
                self.quoted(sequence)?;
                continue;
            }
            let node = self.node(depth)?;
            sequence.push(self.repeated(node)?);
        }
    }

    /// What stands behind `\Q`. A quantifier behind `\E` belongs to the last byte.
    fn quoted(&mut self, sequence: &mut Vec<PatternNode>) -> Result<(), BadPattern> {
        while !self.take(b"\\E") {
            let Some(byte) = self.next() else { return Ok(()) };
            sequence.push(PatternNode::Byte(byte));
        }
        if matches!(self.peek(), Some(b'?' | b'*' | b'+' | b'{')) {
            let last = sequence.pop().ok_or_else(|| self.error(self.at, "a quantifier behind nothing"))?;
            sequence.push(self.repeated(last)?);
        }
        Ok(())
    }

    fn node(&mut self, depth: usize) -> Result<PatternNode, BadPattern> {
        let at = self.at;
        Ok(match self.next() {
            Some(b'(') => return self.group(at, depth),
            Some(b'[') => PatternNode::Class(self.class(at)?),
            Some(b'.') => PatternNode::Class(Class::dot()),
            Some(b'^') => PatternNode::Start,
            Some(b'$') => PatternNode::End,
            Some(b'\\') => return self.escape(at),
            Some(b'?' | b'*' | b'+') => return Err(self.error(at, "a quantifier behind nothing")),
            Some(b'{') => return Err(self.error(at, "{ is no quantifier here; write \\{ for a brace")),
            Some(byte) => PatternNode::Byte(byte),
            None => return Err(self.error(at, "the pattern ends early")),
        })
    }

    fn group(&mut self, at: usize, depth: usize) -> Result<PatternNode, BadPattern> {
        if depth == MAX_NESTING {
            return Err(BadPattern::Nesting(at));
        }
        let look = [(&b"?="[..], false, false), (b"?!", false, true), (b"?<=", true, false), (b"?<!", true, true)];
        let look = look.into_iter().find(|(text, ..)| self.take(text));
        let captures = look.is_none() && !self.take(b"?:");
        if captures && matches!(self.peek(), Some(b'?' | b'*')) {
            return Err(self.not_allowed(at, at + 4));
        }
        let alternatives = self.alternatives(depth + 1)?;
        if !self.take(b")") {
            return Err(self.error(at, "missing closing parenthesis for this group"));
        }
        let Some((_, behind, negative)) = look else { return Ok(PatternNode::Group { captures, at, alternatives }) };
        if behind && width(&alternatives).is_none() {
            return Err(self.error(at, "what a lookbehind finds must have one length"));
        }
        Ok(PatternNode::Look { behind, negative, at, alternatives })
    }

    fn escape(&mut self, at: usize) -> Result<PatternNode, BadPattern> {
        let Some(byte) = self.next() else { return Err(self.error(at, "\\ at the end")) };
        Ok(match byte {
            b'b' | b'B' => PatternNode::Border(byte == b'b'),
            b'A' => PatternNode::Start,
            b'z' | b'Z' => PatternNode::End,
            _ => match self.escaped(at, byte)? {
                Escaped::Byte(byte) => PatternNode::Byte(byte),
                Escaped::Class(class) => PatternNode::Class(class),
            },
        })
    }

    /// An escape with the same meaning inside and outside a class.
    fn escaped(&mut self, at: usize, byte: u8) -> Result<Escaped, BadPattern> {
        let class = match byte.to_ascii_lowercase() {
            b'd' => Class::range(b'0', b'9'),
            b'w' => word(),
            b's' => Class::range(b'\t', b'\r').union(Class::of(b' ')),
            b't' if byte == b't' => return Ok(Escaped::Byte(b'\t')),
            b'x' if byte == b'x' => return self.hex(at).map(Escaped::Byte),
            _ if byte.is_ascii() && !byte.is_ascii_alphanumeric() => return Ok(Escaped::Byte(byte)),
            _ => return Err(self.not_allowed(at, at + 2)),
        };
        Ok(Escaped::Class(if byte.is_ascii_uppercase() { class.complement() } else { class }))
    }

    /// Two hexadecimal digits.
    fn hex(&mut self, at: usize) -> Result<u8, BadPattern> {
        let digits = self.pattern.get(self.at..self.at + 2).and_then(|digits| std::str::from_utf8(digits).ok());
        let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        self.at += 2;
        byte.ok_or_else(|| self.not_allowed(at, at + 4))
    }

    /// A class, after its opening bracket.
    fn class(&mut self, at: usize) -> Result<Class, BadPattern> {
        let negated = self.take(b"^");
        let mut class = Class::EMPTY;
        let mut is_first = true;
        loop {
            let from = self.at;
            match self.peek() {
                None => return Err(self.error(at, "missing closing bracket for this class")),
                Some(b']') if !is_first => break,
                _ => {}
            }
            is_first = false;
            let low = self.member()?;
            let is_range = self.peek() == Some(b'-') && !matches!(self.pattern.get(self.at + 1), None | Some(b']'));
            class = class.union(match low {
                Escaped::Class(_) if is_range => return Err(self.not_allowed(from, self.at + 2)),
                Escaped::Class(members) => members,
                Escaped::Byte(low) if is_range => {
                    self.at += 1;
                    match self.member()? {
                        Escaped::Byte(high) if low <= high => Class::range(low, high),
                        _ => return Err(self.not_allowed(from, self.at)),
                    }
                }
                Escaped::Byte(byte) => Class::of(byte),
            });
        }
        self.at += 1;
        Ok(if negated { class.complement() } else { class })
    }

    fn member(&mut self) -> Result<Escaped, BadPattern> {
        let at = self.at;
        match self.next() {
            Some(b'[') if matches!(self.peek(), Some(b':' | b'.' | b'=')) => self.named_class(at),
            Some(b'\\') => match self.next() {
                Some(byte) => self.escaped(at, byte),
                None => Err(self.error(at, "\\ at the end")),
            },
            Some(byte) => Ok(Escaped::Byte(byte)),
            None => Err(self.error(at, "the pattern ends early")),
        }
    }

    /// `[:alpha:]` and the like, after the bracket.
    fn named_class(&mut self, at: usize) -> Result<Escaped, BadPattern> {
        let (lower, upper) = (Class::range(b'a', b'z'), Class::range(b'A', b'Z'));
        let (alpha, digit) = (lower.union(upper), Class::range(b'0', b'9'));
        let names: [(&[u8], Class); 7] = [
            (b":alpha:]", alpha),
            (b":digit:]", digit),
            (b":alnum:]", alpha.union(digit)),
            (b":lower:]", lower),
            (b":upper:]", upper),
            (b":xdigit:]", digit.union(Class::range(b'a', b'f')).union(Class::range(b'A', b'F'))),
            (b":word:]", word()),
        ];
        match names.iter().find(|(name, _)| self.take(name)) {
            Some((_, class)) => Ok(Escaped::Class(*class)),
            None => Err(self.not_allowed(at, at + 10)),
        }
    }

    /// The node with the quantifier that follows it, if there is one.
    fn repeated(&mut self, node: PatternNode) -> Result<PatternNode, BadPattern> {
        let at = self.at;
        let (min, max) = match self.peek() {
            Some(b'?') => (0, Some(1)),
            Some(b'*') => (0, None),
            Some(b'+') => (1, None),
            Some(b'{') => return self.counted(node),
            _ => return Ok(node),
        };
        self.at += 1;
        self.quantified(node, (min, max), at)
    }

    fn counted(&mut self, node: PatternNode) -> Result<PatternNode, BadPattern> {
        let at = self.at;
        let rest = &self.pattern[at + 1..];
        let end = rest.iter().position(|&byte| byte == b'}').filter(|&end| {
            rest[0].is_ascii_digit() && rest[..end].iter().all(|&byte| byte.is_ascii_digit() || byte == b',')
        });
        let text = end.and_then(|end| std::str::from_utf8(&rest[..end]).ok());
        let Some(text) = text else { return Err(self.error(at, "{ is no quantifier here; write \\{ for a brace")) };
        let count = |digits: &str| digits.parse().ok().filter(|&count: &u32| count <= MAX_COUNT);
        let counts = match text.split_once(',') {
            None => count(text).map(|count| (count, Some(count))),
            Some((min, "")) => count(min).map(|min| (min, None)),
            Some((min, max)) => count(min).zip(count(max).map(Some)),
        };
        let counts = counts.filter(|(min, max)| max.is_none_or(|max| *min <= max));
        let counts = counts.ok_or_else(|| {
            self.error(at, format!("{{{text}}}: the smaller number first, and none above {MAX_COUNT}"))
        })?;
        self.at += text.len() + 2;
        self.quantified(node, counts, at)
    }

    fn quantified(
        &mut self,
        node: PatternNode,
        (min, max): (u32, Option<u32>),
        at: usize,
    ) -> Result<PatternNode, BadPattern> {
        match node {
            PatternNode::Byte(_) | PatternNode::Class(_) => {}
            PatternNode::Group { .. } if max.is_some() => {}
            PatternNode::Group { .. } => return Err(BadPattern::EndlessGroup(at)),
            _ => return Err(self.error(at, "a quantifier behind something that takes no text")),
        }
        let lazy = self.take(b"?");
        match self.peek() {
            Some(b'+' | b'*' | b'?') => Err(self.not_allowed(at, self.at + 1)),
            // Rewritten in the form of another quantifier, it would be read as one.
            Some(b'{') => Err(self.error(self.at, "a quantifier behind a quantifier; write \\{ for a brace")),
            _ => Ok(PatternNode::Repeat { node: Box::new(node), min, max, lazy, at }),
        }
    }
}

enum Escaped {
    Byte(u8),
    Class(Class),
}

fn word() -> Class {
    Class::range(b'a', b'z').union(Class::range(b'A', b'Z')).union(Class::range(b'0', b'9')).union(Class::of(b'_'))
}

/// The number of bytes that each alternative takes, if it is the same for all.
fn width(alternatives: &Alternatives) -> Option<u32> {
    let width_of = |node: &PatternNode| match node {
        PatternNode::Byte(_) | PatternNode::Class(_) => Some(1),
        PatternNode::Start | PatternNode::End | PatternNode::Border(_) | PatternNode::Look { .. } => Some(0),
        PatternNode::Group { alternatives, .. } => width(alternatives),
        PatternNode::Repeat { node, min, max, .. } if Some(*min) == *max && node.class().is_some() => Some(*min),
        PatternNode::Repeat { .. } => None,
    };
    let mut widths = alternatives.iter().map(|sequence| sequence.iter().map(width_of).sum::<Option<u32>>());
    let first = widths.next()??;
    widths.all(|width| width == Some(first)).then_some(first)
}

impl fmt::Display for Syntax {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.caseless { "(?i)" } else { "" })?;
        write_alternatives(f, &self.alternatives)
    }
}

/// As it goes to Varnish: one word of ASCII.
pub(super) fn write_alternatives(out: &mut impl Write, alternatives: &[Vec<PatternNode>]) -> fmt::Result {
    for (index, sequence) in alternatives.iter().enumerate() {
        out.write_str(if index > 0 { "|" } else { "" })?;
        sequence.iter().try_for_each(|node| write_node(out, node))?;
    }
    Ok(())
}

fn write_node(out: &mut impl Write, node: &PatternNode) -> fmt::Result {
    match node {
        PatternNode::Byte(byte) => write_byte(out, *byte),
        PatternNode::Class(class) => write!(out, "{class}"),
        PatternNode::Start => out.write_char('^'),
        PatternNode::End => out.write_char('$'),
        PatternNode::Border(is_border) => out.write_str(if *is_border { "\\b" } else { "\\B" }),
        PatternNode::Group { captures, alternatives, .. } => {
            out.write_str(if *captures { "(" } else { "(?:" })?;
            write_alternatives(out, alternatives)?;
            out.write_char(')')
        }
        PatternNode::Look { behind, negative, alternatives, .. } => {
            let before = if *behind { "(?<" } else { "(?" };
            write!(out, "{before}{}", if *negative { '!' } else { '=' })?;
            write_alternatives(out, alternatives)?;
            out.write_char(')')
        }
        PatternNode::Repeat { node, min, max, lazy, .. } => {
            write_node(out, node)?;
            match (*min, *max) {
                (0, Some(1)) => out.write_char('?'),
                (0, None) => out.write_char('*'),
                (1, None) => out.write_char('+'),
                (min, None) => write!(out, "{{{min},}}"),
                (min, Some(max)) if min == max => write!(out, "{{{min}}}"),
                (min, Some(max)) => write!(out, "{{{min},{max}}}"),
            }?;
            out.write_str(if *lazy { "?" } else { "" })
        }
    }
}
