//! Recently purged patterns, compiled, to be matched against answers.
//!
//! The list is bounded like the index: evicting an entry raises a floor. Workers read one atomic. Only if a pattern was
//! purged while their page was rendered do they take a lock, to clone a pointer; the patterns run outside the lock.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use pcre2::bytes::{Regex, RegexBuilder};

use crate::purge::Pattern;

/// The number of patterns kept.
const KEPT: usize = 256;

/// The longest pattern kept, in bytes: Varnish's default limit for a header.
const LONGEST: usize = 8 * 1024;

/// The most steps of a PCRE2 match from one position, so that no pattern blocks a worker: as in Varnish
/// (`pcre2_match_limit`). No accepted pattern needs that many.
const STEPS: u32 = 10_000;

/// The header that a pattern matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// `X-Magento-Tags`
    Tags = 0,
    /// `X-Pool`
    Pool = 1,
}

/// Recently purged patterns.
#[derive(Default)]
pub(super) struct Patterns {
    newest: AtomicU64,
    recent: RwLock<Arc<Recent>>,
}

#[derive(Clone, Default)]
struct Recent {
    /// The newest sequence of an evicted pattern.
    floor: u64,
    /// Oldest first.
    list: Vec<Arc<Purged>>,
}

struct Purged {
    sequence: u64,
    subject: Subject,
    pattern: Pattern,
    regex: Arc<Regex>,
}

impl Patterns {
    /// Records that a pattern is purged with this sequence. Sequences do not decrease, and there is one caller at a
    /// time. Returns false for a pattern that is too long, or does not compile with the limit: its pages are unknown.
    #[must_use]
    pub(super) fn insert(&self, subject: Subject, pattern: &Pattern, sequence: u64) -> bool {
        let mut recent = Recent::clone(&self.recent());
        let known = recent.list.iter().position(|one| one.subject == subject && one.pattern == *pattern);
        let regex = match known {
            Some(at) => Arc::clone(&recent.list.remove(at).regex),
            None => match compile(pattern) {
                Some(regex) => Arc::new(regex),
                None => return false,
            },
        };
        if recent.list.len() == KEPT {
            recent.floor = recent.list.remove(0).sequence;
        }
        recent.list.push(Arc::new(Purged { sequence, subject, pattern: pattern.clone(), regex }));
        *self.recent.write() = Arc::new(recent);
        self.newest.store(sequence, Ordering::Release);
        true
    }

    /// Whether a pattern purged with a sequence after `began` matches one of these values; if PCRE2 gives up, that
    /// counts as a match.
    ///
    /// `values` are the page's header values for each subject.
    pub(super) fn match_since<'v>(&self, began: u64, values: impl FnOnce() -> [Vec<Cow<'v, [u8]>>; 2]) -> bool {
        if self.newest.load(Ordering::Acquire) <= began {
            return false;
        }
        let recent = self.recent();
        let mut since = recent.list.iter().rev().take_while(|purged| purged.sequence > began);
        let values = values();
        let matches = |purged: &Purged| {
            let mut values = values[purged.subject as usize].iter();
            values.any(|value| purged.regex.is_match(value).unwrap_or(true))
        };
        recent.floor > began || since.any(|purged| matches(purged))
    }

    fn recent(&self) -> Arc<Recent> {
        Arc::clone(&self.recent.read())
    }
}

/// Compiles as [`Pattern`] does when it is checked, prefixed with the limit of [`STEPS`] (pcre2pattern(3)).
fn compile(pattern: &Pattern) -> Option<Regex> {
    let text = pattern.as_str();
    let limited = || RegexBuilder::new().build(&format!("(*LIMIT_MATCH={STEPS}){text}")).ok();
    if text.len() > LONGEST { None } else { limited() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn purged(patterns: &Patterns, pattern: &str, sequence: u64) -> bool {
        patterns.insert(Subject::Tags, &Pattern::new(pattern).unwrap(), sequence)
    }

    fn matches(patterns: &Patterns, tags: &str, began: u64) -> bool {
        patterns.match_since(began, || [vec![Cow::Borrowed(tags.as_bytes())], Vec::new()])
    }

    #[test]
    fn a_pattern_counts_for_who_began_before_it_and_for_its_own_header() {
        let patterns = Patterns::default();
        assert!(purged(&patterns, "cat_p_[0-9]+", 5));
        assert!(patterns.insert(Subject::Pool, &Pattern::new("cms").unwrap(), 6));
        assert!(matches(&patterns, "cat_p_12", 4) && !matches(&patterns, "cat_p_12", 5));
        assert!(!matches(&patterns, "cms_b_1", 4));
    }

    #[test]
    fn what_fell_out_of_the_list_counts_for_everybody_who_began_before_it() {
        let patterns = Patterns::default();
        (1..=KEPT as u64 + 1).for_each(|n| assert!(purged(&patterns, &format!("^tag_{n}$"), n)));
        assert!(matches(&patterns, "other", 0));
        assert!(!matches(&patterns, "other", 1) && matches(&patterns, "tag_2", 1));
    }

    #[test]
    fn a_pattern_that_is_purged_again_takes_no_second_place() {
        let patterns = Patterns::default();
        (1..=2000).for_each(|n| assert!(purged(&patterns, &format!("^tag_{}$", n % 3), n)));
        assert!(!matches(&patterns, "other", 0) && matches(&patterns, "tag_1", 0));
    }

    #[test]
    fn a_match_that_would_take_too_long_counts_as_one() {
        let patterns = Patterns::default();
        assert!(patterns.insert(Subject::Tags, &Pattern::unchecked("^(a+)+$"), 1));
        assert!(matches(&patterns, &format!("{}!", "a".repeat(40)), 0));
        assert!(!matches(&patterns, "b", 0));
    }

    #[test]
    fn a_pattern_that_no_header_holds_is_not_kept() {
        assert!(!purged(&Patterns::default(), &"x".repeat(LONGEST + 1), 1));
    }
}
