//! A regular expression that every Varnish compiles, that breaks none of them, and that cannot be mistaken for anything
//! else.
//!
//! **It is one word.** Magento's VCL pastes the header into `ban("obj.http.X-Magento-Tags ~ " + pattern)`. Varnish splits
//! that text at white space, takes quotes as string borders and joins conditions with `&&` (vmod_std(3), vcl(7) "Ban"). So
//! a pattern with a blank bans nothing, and `foo && req.url ~ x` bans something else, both with the answer `200 Purged`.
//!
//! **It is read alike everywhere.** Magento's VCL also answers `200 Purged` to a pattern that Varnish's PCRE cannot
//! compile. Only the language common to PCRE 8 and every PCRE2 is accepted (`syntax.rs`).
//!
//! **It is harmless.** Varnish 7 limits the cost of one match, and its worker panics when a ban reaches the limit; all
//! Varnish nodes get the same ban, so one pattern takes the whole fleet down. In 6.0 the page is treated as not
//! matching. A pattern that could reach the limit with any page's tags is refused (`effort.rs`, and `trial.rs` as a
//! second net), after its needlessly expensive parts have been removed (`narrow.rs`).
//!
//! Any other pattern is refused, with the offset. Only a pattern with a gap is widened: these are written by hand
//! (`cat_p_.*_1`), one side has most of the meaning, and they worked on small pages. A pattern with repeated groups is
//! more often a mistake or an attack, and has no such side.

mod class;
mod effort;
mod narrow;
mod syntax;
#[cfg(test)]
mod tests;
mod trial;

use serde::{Deserialize, Serialize};

pub(crate) use syntax::MAX_NESTING;
use syntax::{Alternatives, Syntax};
#[cfg(test)]
pub(crate) use trial::limited;

/// A pattern of more bytes is split at its branches: Varnish's default limit for a header, as Magento assumes.
const LONGEST: usize = 7_680;

/// The most branches of each part of a split pattern.
const BRANCHES: usize = 256;

/// A pattern in our own form: one word of ASCII, within the language and the limits of every Varnish.
///
/// Checked again when it is deserialised, because the input may not be ours.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(Box<str>);

/// Why a pattern was refused.
#[derive(Debug, thiserror::Error)]
pub enum BadPattern {
    /// The pattern is empty.
    #[error("the pattern is empty")]
    Empty,
    /// A second ban condition after the pattern.
    #[error("`&&` after white space at byte {0} would start a second ban condition; write `\\x20` for a literal blank")]
    Condition(usize),
    /// A byte that is not allowed in a header.
    #[error("control character at byte {0}")]
    Control(usize),
    /// Not in the language common to every Varnish.
    #[error("at byte {at}: {what}")]
    Syntax {
        /// The offset in the pattern.
        at: usize,
        /// The problem there, and the allowed alternatives.
        what: String,
    },
    /// Groups nested too deeply.
    #[error("at byte {0}: more than {MAX_NESTING} groups in one another would overflow the stack of Varnish's workers")]
    Nesting(usize),
    /// A group with `*`, `+` or `{n,}`.
    #[error(
        "at byte {0}: a group that may repeat without end makes Varnish give up on a long tag list, and its worker \
         panics; allowed are ? {{n}} {{n,m}} behind a group, and * + behind a single character or class"
    )]
    EndlessGroup(usize),
    /// A repeat across tags that cannot be left out.
    #[error(
        "at byte {0}: a repeat that passes commas makes Varnish read a long tag list again and again; write [^,]* for \
         the rest of a tag; .* is allowed at the beginning, at the end, and between two parts of a pattern"
    )]
    Gap(usize),
    /// Varnish could give up while it matches.
    #[error(
        "at byte {0}: on some tag list there are more ways to match this than Varnish tries (pcre2_match_limit, \
         pcre2_depth_limit), and its worker panics; send fewer repeats that can take the same text, fewer groups in a \
         row, or several patterns"
    )]
    Effort(usize),
    /// PCRE2 does not compile it: it is too large.
    #[error(transparent)]
    Regex(#[from] pcre2::Error),
}

impl TryFrom<String> for Pattern {
    type Error = BadPattern;

    /// Reads what [`Pattern::read`] has accepted.
    fn try_from(pattern: String) -> Result<Self, BadPattern> {
        Ok(checked(&understood(pattern.as_bytes())?.syntax)?.0)
    }
}

/// Patterns that together match what a sender's pattern matches.
#[derive(Debug)]
pub(crate) struct Understood {
    /// One pattern, unless it was too long for a header.
    pub(crate) patterns: Vec<Pattern>,
    /// Whether they match more.
    pub(crate) is_wider: bool,
}

impl Pattern {
    /// Checks a pattern and rewrites it in our form.
    ///
    /// # Errors
    /// [`BadPattern`] with the problem and its offset.
    pub fn new(pattern: &str) -> Result<Self, BadPattern> {
        let read = understood(pattern.as_bytes())?;
        tried(&read.syntax)
    }

    /// Reads the value of a header: any bytes, since Varnish matches bytes.
    ///
    /// # Errors
    /// [`BadPattern`] with the problem and its offset.
    pub(crate) fn read(pattern: &[u8]) -> Result<Understood, BadPattern> {
        let ReadPattern { syntax, is_wider } = understood(pattern)?;
        let as_one = tried(&syntax);
        let is_short = as_one.as_ref().is_ok_and(|pattern| pattern.as_str().len() <= LONGEST);
        if is_short || syntax.alternatives.len() == 1 {
            return Ok(Understood { patterns: vec![as_one?], is_wider });
        }
        let cut = cut(syntax).iter().map(tried).collect::<Result<_, _>>();
        Ok(Understood { patterns: cut?, is_wider })
    }

    /// A pattern that would be refused.
    #[cfg(test)]
    pub(crate) fn unchecked(pattern: &str) -> Self {
        Pattern(pattern.into())
    }

    /// The pattern as sent to Varnish.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

struct ReadPattern {
    syntax: Syntax,
    is_wider: bool,
}

fn understood(pattern: &[u8]) -> Result<ReadPattern, BadPattern> {
    if pattern.is_empty() {
        return Err(BadPattern::Empty);
    }
    if let Some(at) = pattern.iter().position(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err(BadPattern::Control(at));
    }
    if let Some(at) = second_condition(pattern) {
        return Err(BadPattern::Condition(at));
    }
    let mut syntax = syntax::parse(pattern)?;
    let is_wider = narrow::narrow(&mut syntax)?;
    Ok(ReadPattern { syntax, is_wider })
}

/// The pattern in our form, and the largest cost of one position of a header.
fn checked(syntax: &Syntax) -> Result<(Pattern, u64), BadPattern> {
    let calls = effort::check(syntax)?;
    let is_anything = syntax.alternatives.iter().any(Vec::is_empty);
    let written = if is_anything { ".*".to_owned() } else { syntax.to_string() };
    pcre2::bytes::RegexBuilder::new().build(&written)?;
    Ok((Pattern(written.into()), calls))
}

fn tried(syntax: &Syntax) -> Result<Pattern, BadPattern> {
    let (pattern, calls) = checked(syntax)?;
    trial::run(pattern.as_str(), syntax, calls)?;
    Ok(pattern)
}

/// Splits a pattern into parts that fit into a header, unless a single branch is longer.
fn cut(syntax: Syntax) -> Vec<Syntax> {
    let Syntax { caseless, alternatives } = syntax;
    let mut parts: Vec<Alternatives> = Vec::new();
    let mut length = usize::MAX;
    for branch in alternatives {
        let alone = Syntax { caseless, alternatives: vec![branch] };
        let more = alone.to_string().len() + 1;
        match parts.last_mut() {
            Some(part) if length.saturating_add(more) <= LONGEST && part.len() < BRANCHES => {
                part.extend(alone.alternatives);
                length += more;
            }
            _ => {
                parts.push(alone.alternatives);
                length = more;
            }
        }
    }
    parts.into_iter().map(|alternatives| Syntax { caseless, alternatives }).collect()
}

/// The offset of a separate word that starts with `&&`, which would join a second condition.
fn second_condition(pattern: &[u8]) -> Option<usize> {
    let starts_word = |at: usize| at > 0 && matches!(pattern[at - 1], b' ' | b'\t');
    (0..pattern.len()).find(|&at| pattern[at..].starts_with(b"&&") && starts_word(at))
}
