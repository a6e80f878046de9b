//! The purges between a cursor and the head, compiled into the bans that one Varnish gets.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::{Forward, Pattern, Purge, TagSet, Target};

/// One instruction to one Varnish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ban {
    /// Drop every page whose tag header matches.
    Tags {
        /// The regular expression, one word, within the header limit.
        pattern: String,
        /// Keep the pages for grace where the node can.
        soft: bool,
    },
    /// Drop every page whose `X-Pool` header matches.
    Pool {
        /// The regular expression, one word, within the header limit.
        pattern: String,
        /// Keep the pages for grace where the node can.
        soft: bool,
    },
    /// Drop everything there is: what a node with a gap in its history gets, or one that missed more than a replay
    /// is worth. Stronger than Magento's flush, which leaves pages without tags alone.
    Everything,
    /// Repeat this request.
    Forward(Forward),
}

#[derive(Default)]
struct Union {
    everything: bool,
    tags: TagSet,
    patterns: BTreeSet<Pattern>,
    pools: BTreeSet<Pattern>,
}

/// Compiles purges into the fewest bans: tag sets united, equal patterns folded, tags and patterns absorbed by a
/// flush. Soft and hard ones stay apart, except that a hard flush covers the soft ones too.
///
/// `header_limit` is the longest pattern in bytes that the node takes. A tag set is split there; a single pattern
/// that is longer cannot be, so the whole batch becomes [`Ban::Everything`]: too much dropped is slow, too little is
/// wrong.
pub fn compile<'p>(purges: impl IntoIterator<Item = &'p Purge>, header_limit: usize) -> Vec<Ban> {
    let (mut hard, mut soft) = (Union::default(), Union::default());
    let mut forwards: Vec<&Forward> = Vec::new();
    for purge in purges {
        let union = if purge.soft { &mut soft } else { &mut hard };
        for target in &purge.targets {
            match target {
                Target::Everything => union.everything = true,
                Target::Tags(tags) => union.tags.extend(tags),
                Target::Pattern(pattern) => _ = union.patterns.insert(pattern.clone()),
                Target::Pool(pattern) => _ = union.pools.insert(pattern.clone()),
                Target::Forward(forward) if !forwards.contains(&forward) => forwards.push(forward),
                Target::Forward(_) => {}
            }
        }
    }
    let mut bans = Vec::new();
    let hard_flush = hard.everything;
    hard.into_bans(false, false, header_limit, &mut bans);
    soft.into_bans(true, hard_flush, header_limit, &mut bans);
    let too_long = |ban: &Ban| match ban {
        Ban::Tags { pattern, .. } | Ban::Pool { pattern, .. } => pattern.len() > header_limit,
        Ban::Everything | Ban::Forward(_) => false,
    };
    if bans.iter().any(too_long) {
        bans = vec![Ban::Everything];
    }
    bans.extend(forwards.into_iter().cloned().map(Ban::Forward));
    bans
}

impl Union {
    fn into_bans(self, soft: bool, covered: bool, header_limit: usize, bans: &mut Vec<Ban>) {
        if self.everything && !covered {
            bans.push(Ban::Tags { pattern: ".*".into(), soft });
        }
        if !self.everything && !covered {
            bans.extend(tag_patterns(&self.tags, header_limit).into_iter().map(|pattern| Ban::Tags { pattern, soft }));
            bans.extend(self.patterns.iter().map(|pattern| Ban::Tags { pattern: pattern.as_str().into(), soft }));
        }
        bans.extend(self.pools.iter().map(|pattern| Ban::Pool { pattern: pattern.as_str().into(), soft }));
    }
}

/// The set as regular expressions `(^|,)(?:a|b)(,|$)`, none longer than the limit unless a single tag is.
fn tag_patterns(tags: &TagSet, header_limit: usize) -> Vec<String> {
    const BEFORE: &str = "(^|,)(?:";
    const AFTER: &str = ")(,|$)";
    let mut patterns = Vec::new();
    let mut open = String::new();
    for tag in tags.iter() {
        let term = escape(tag);
        if !open.is_empty() && open.len() + 1 + term.len() + AFTER.len() > header_limit {
            open.push_str(AFTER);
            patterns.push(std::mem::take(&mut open));
        }
        open.push_str(if open.is_empty() { BEFORE } else { "|" });
        open.push_str(&term);
    }
    if !open.is_empty() {
        open.push_str(AFTER);
        patterns.push(open);
    }
    patterns
}

/// A literal tag as one word of a regular expression.
fn escape(tag: &str) -> String {
    let mut escaped = String::with_capacity(tag.len());
    for c in tag.chars() {
        match c {
            ' ' | '"' | '\'' | '#' => _ = write!(escaped, "\\x{:02x}", u32::from(c)),
            c if "\\^$.|?*+()[]{}".contains(c) => escaped.extend(['\\', c]),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::DEFAULT_HEADER_LIMIT;

    fn tags(tags: &[&str]) -> Purge {
        Purge { targets: vec![Target::Tags(tags.iter().copied().collect())], soft: false }
    }

    fn hard(pattern: &str) -> Ban {
        Ban::Tags { pattern: pattern.into(), soft: false }
    }

    #[test]
    fn the_tags_of_all_purges_become_one_ban() {
        let bans = compile(&[tags(&["b", "a"]), tags(&["c", "a"])], DEFAULT_HEADER_LIMIT);
        assert_eq!(bans, [hard("(^|,)(?:a|b|c)(,|$)")]);
    }

    #[test]
    fn a_flush_absorbs_tags_and_patterns_but_no_pool_and_no_url() {
        let pool = Pattern::new("p").unwrap();
        let forward = Forward { method: "PURGE".into(), target: "/x".into(), headers: vec![] };
        let purges = [
            tags(&["a"]),
            Purge { targets: vec![Target::Pattern(Pattern::new("a.c").unwrap())], soft: true },
            Purge { targets: vec![Target::Everything, Target::Pool(pool)], soft: false },
            Purge { targets: vec![Target::Forward(forward.clone())], soft: false },
            Purge { targets: vec![Target::Forward(forward.clone())], soft: false },
        ];
        let pool = Ban::Pool { pattern: "p".into(), soft: false };
        assert_eq!(compile(&purges, DEFAULT_HEADER_LIMIT), [hard(".*"), pool, Ban::Forward(forward)]);
    }

    #[test]
    fn a_soft_flush_leaves_hard_purges_hard() {
        let purges = [tags(&["a"]), Purge { targets: vec![Target::Everything], soft: true }];
        let soft = Ban::Tags { pattern: ".*".into(), soft: true };
        assert_eq!(compile(&purges, DEFAULT_HEADER_LIMIT), [hard("(^|,)(?:a)(,|$)"), soft]);
    }

    #[test]
    fn what_no_header_can_carry_becomes_a_ban_of_everything() {
        let long = "x".repeat(DEFAULT_HEADER_LIMIT + 1);
        let purge = Purge { targets: vec![Target::Pattern(Pattern::new(&long).unwrap())], soft: false };
        assert_eq!(compile(&[purge], DEFAULT_HEADER_LIMIT), [Ban::Everything]);
        assert_eq!(compile(&[tags(&[&long])], DEFAULT_HEADER_LIMIT), [Ban::Everything]);
    }

    proptest! {
        #[test]
        fn compiled_bans_match_exactly_what_the_tags_match(
            purged in prop::collection::vec("[a-c_. \"#-]{1,4}", 1..30),
            page in prop::collection::vec("[a-c_. \"#-]{1,4}", 0..8),
            limit in 40_usize..200,
        ) {
            let set: Vec<&str> = purged.iter().map(String::as_str).collect();
            let header = page.join(",");
            let naive = page.iter().any(|tag| purged.contains(tag));
            let mut matched = false;
            for ban in compile(&[tags(&set)], limit) {
                let Ban::Tags { pattern, .. } = ban else { panic!("{ban:?}") };
                prop_assert!(pattern.len() <= limit);
                prop_assert!(!pattern.contains([' ', '"']));
                matched |= pcre2::bytes::Regex::new(&pattern).unwrap().is_match(header.as_bytes()).unwrap();
            }
            prop_assert_eq!(matched, naive);
        }
    }
}
