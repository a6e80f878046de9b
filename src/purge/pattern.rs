//! A regular expression that Varnish will compile, and that cannot be anything else but one.
//!
//! Magento's VCL pastes the header into `ban("obj.http.X-Magento-Tags ~ " + pattern)`. Varnish splits that text at
//! white space, takes quotes as string borders and joins conditions with `&&` (vmod_std(3), vcl(7) "Ban"). So a
//! pattern with a blank bans nothing, and `foo && req.url ~ x` bans something else, both with the answer
//! `200 Purged`. Here such a pattern is either written so that it means what its author meant, or refused.

use serde::{Deserialize, Serialize};

/// A pattern that compiles under PCRE2 and holds no white space and no quote, so that it stays one word in a ban.
///
/// Checked again where it is read, because not all that is read was written by us.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(Box<str>);

/// Why a pattern was refused.
#[derive(Debug, thiserror::Error)]
pub enum BadPattern {
    /// Nothing to match.
    #[error("the pattern is empty")]
    Empty,
    /// A second ban condition behind the pattern.
    #[error("`&&` after white space at byte {0} would start a second ban condition; write `\\x20` for a literal blank")]
    Condition(usize),
    /// White space whose meaning cannot be kept.
    #[error(
        "white space in a pattern with the option `x` (extended) cannot be sent to Varnish; remove the white space"
    )]
    Extended,
    /// A byte that cannot stand in a header.
    #[error("control character at byte {0}")]
    Control(usize),
    /// PCRE2 does not compile it.
    #[error("{0}")]
    Regex(#[from] pcre2::Error),
}

impl TryFrom<String> for Pattern {
    type Error = BadPattern;

    fn try_from(pattern: String) -> Result<Self, BadPattern> {
        Pattern::new(&pattern)
    }
}

impl Pattern {
    /// Checks a pattern and rewrites it so that it is one word: white space becomes `\x20`, quotes become `\x22`.
    ///
    /// # Errors
    /// [`BadPattern`] says what is wrong and where.
    pub fn new(pattern: &str) -> Result<Self, BadPattern> {
        if pattern.is_empty() {
            return Err(BadPattern::Empty);
        }
        if let Some(at) = pattern.bytes().position(|byte| byte.is_ascii_control() && byte != b'\t') {
            return Err(BadPattern::Control(at));
        }
        if let Some(at) = second_condition(pattern) {
            return Err(BadPattern::Condition(at));
        }
        compile(pattern)?;
        if !pattern.contains([' ', '\t', '"']) {
            return Ok(Pattern(pattern.into()));
        }
        if pattern.contains([' ', '\t']) && sets_extended(pattern) {
            return Err(BadPattern::Extended);
        }
        let word = as_one_word(pattern);
        compile(&word)?;
        Ok(Pattern(word.into()))
    }

    /// The pattern as it goes to Varnish.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Compiles with the library that Varnish itself uses (PCRE2 since 7.0), on bytes as Varnish does.
fn compile(pattern: &str) -> Result<(), BadPattern> {
    pcre2::bytes::RegexBuilder::new().build(pattern)?;
    Ok(())
}

/// Where a word of its own starts with `&&`, as it must to join two conditions.
fn second_condition(pattern: &str) -> Option<usize> {
    let bytes = pattern.as_bytes();
    let starts_word = |at: usize| at > 0 && matches!(bytes[at - 1], b' ' | b'\t');
    (0..bytes.len()).find(|&at| bytes[at..].starts_with(b"&&") && starts_word(at))
}

/// Whether an inline option group such as `(?x)` or `(?i-s:x` sets the extended mode, in which white space is no text.
fn sets_extended(pattern: &str) -> bool {
    pattern.match_indices("(?").any(|(at, _)| {
        let options = pattern[at + 2..].split(|c: char| !c.is_ascii_alphabetic() && c != '^').next().unwrap_or("");
        options.contains('x')
    })
}

/// Writes blanks, tabs and quotes as hexadecimal escapes, wherever they stand: plain, after a backslash, or between
/// `\Q` and `\E`, where an escape would be text.
fn as_one_word(pattern: &str) -> String {
    let mut word = String::with_capacity(pattern.len() + 16);
    let mut chars = pattern.chars().peekable();
    let mut quoted = false;
    while let Some(c) = chars.next() {
        let escape = hex(if c == '\\' && !quoted { chars.peek().copied().unwrap_or(c) } else { c });
        match (c, escape) {
            ('\\', Some(escape)) if !quoted => {
                chars.next();
                word.push_str(escape);
            }
            ('\\', _) => {
                word.push(c);
                if let Some(next) = chars.next_if(|&next| !quoted || next == 'E') {
                    word.push(next);
                    quoted = if quoted { false } else { next == 'Q' };
                }
            }
            (_, Some(escape)) if quoted => word.extend(["\\E", escape, "\\Q"]),
            (_, Some(escape)) => word.push_str(escape),
            (_, None) => word.push(c),
        }
    }
    word
}

fn hex(c: char) -> Option<&'static str> {
    match c {
        ' ' => Some("\\x20"),
        '\t' => Some("\\x09"),
        '"' => Some("\\x22"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(pattern: &str) -> String {
        Pattern::new(pattern).unwrap().as_str().to_owned()
    }

    #[test]
    fn a_pattern_without_white_space_stays_as_it_came() {
        for pattern in ["cat_p_[0-9]+", "a&&b", "((^|,)cat_p_1.2(,|$))", "&&"] {
            assert_eq!(word(pattern), pattern);
        }
    }

    #[test]
    fn white_space_and_quotes_become_escapes_with_the_same_meaning() {
        assert_eq!(word("foo bar"), "foo\\x20bar");
        assert_eq!(word("foo\\ bar"), "foo\\x20bar");
        assert_eq!(word("foo\\\\ bar"), "foo\\\\\\x20bar");
        assert_eq!(word("[ \t]\"x"), "[\\x20\\x09]\\x22x");
        assert_eq!(word("\\Qa b\\E c"), "\\Qa\\E\\x20\\Qb\\E\\x20c");
    }

    #[test]
    fn the_rewritten_pattern_matches_what_the_original_matched() {
        let subjects = ["foo bar", "foobar", "a b c", "a  b", "x\"y z", "a\\ b", "a\tb"];
        for pattern in ["foo bar", "a\\ b", "\\Qa b\\E", "\\Qa\\ b\\E", "[ a]b", "x\" ?y z", "a[ \\t]b"] {
            let (naive, ours) = (pcre2::bytes::Regex::new(pattern).unwrap(), word(pattern));
            assert!(!ours.contains([' ', '\t', '"']), "{ours}");
            let ours = pcre2::bytes::Regex::new(&ours).unwrap();
            for subject in subjects {
                let (a, b) = (naive.is_match(subject.as_bytes()), ours.is_match(subject.as_bytes()));
                assert_eq!(a.unwrap(), b.unwrap(), "{pattern} on {subject}");
            }
        }
    }

    #[test]
    fn a_smuggled_condition_is_refused_with_its_place() {
        assert!(matches!(Pattern::new("foo && req.url ~ x"), Err(BadPattern::Condition(4))));
        assert!(matches!(Pattern::new("foo\t&&req.url"), Err(BadPattern::Condition(4))));
    }

    #[test]
    fn what_pcre2_refuses_is_refused_with_its_place() {
        let refusal = Pattern::new("((^|,)cat_p_1").unwrap_err().to_string();
        assert!(refusal.contains("offset 13") && refusal.contains("parenthes"), "{refusal}");
        assert!(matches!(Pattern::new(""), Err(BadPattern::Empty)));
        assert!(matches!(Pattern::new("(?x) a b"), Err(BadPattern::Extended)));
        assert!(matches!(Pattern::new("a\u{1}"), Err(BadPattern::Control(1))));
    }
}
