//! A set of tags as one regular expression, written as a trie: `(^|,)cat_(?:c_p_(?:14|2)|p(?:_2046)?)(,|$)`.
//!
//! The regular expression is anchored and its branches all begin with another character, so a tag of a page is
//! followed down one path and the match fails at the first character that no purged tag has. It is also what makes
//! the purges of a whole reindex fit into a request or two: tags are long names that differ in their last digits.
//!
//! Written from the sorted slice itself: the tags below a node stand side by side in it, so that the recursion needs
//! two bounds and no tree. Varnish matches bytes and knows no UTF-8, so branches part between characters, and only an
//! ASCII character can stand in a class or before a `?`.

use std::fmt::Write;

const BEFORE: &str = "(^|,)";
const AFTER: &str = "(,|$)";

/// Groups within groups, each for a place where tags part. Real tags need about one for each of their digits. PCRE2
/// refuses more than 250; the PCRE of Varnish 6.0 descends on the stack of a worker, which is 48 KiB.
const MAX_DEPTH: usize = 20;

/// The longest regular expression in bytes, whatever the header limit. PCRE2 compiles to at most 64 KiB, and a class
/// of four characters takes 33 bytes there: this is what compiles however dense the classes stand.
pub(super) const MAX_PATTERN: usize = 8 * 1024;

/// The tags (sorted, each once) as regular expressions for the tag header of a page, none longer than `limit` bytes.
/// Each takes as many tags as fit; `None` where a single tag does not.
pub(super) fn patterns(tags: &[&str], limit: usize) -> Option<Vec<String>> {
    let limit = limit.min(MAX_PATTERN);
    let mut patterns = Vec::new();
    let mut rest = tags;
    while !rest.is_empty() {
        let (pattern, run) = longest_run(rest, limit)?;
        patterns.push(pattern);
        rest = &rest[run..];
    }
    Some(patterns)
}

/// The regular expression of the longest run of tags, from the first, that fits; and how many tags that is.
///
/// Adding a tag can change what was written for those before it, so there is nothing to add up. But where writing all
/// of them came to the limit is within a few tags of the answer: from there the search goes in growing steps.
fn longest_run(tags: &[&str], limit: usize) -> Option<(String, usize)> {
    let (whole, reached) = write(tags, limit);
    if let Some(pattern) = whole {
        return Some((pattern, tags.len()));
    }
    // What is known to fit, and what is known not to.
    let (mut fits, mut best, mut too_many) = (0, None, tags.len());
    let (mut guess, mut step) = (reached, 1);
    while too_many - fits > 1 {
        let run = guess.clamp(fits + 1, too_many - 1);
        let pattern = write(&tags[..run], limit).0;
        let bracketed = fits > 0 && too_many < tags.len();
        if pattern.is_some() {
            (fits, best) = (run, pattern);
            guess = if bracketed { usize::midpoint(fits, too_many) } else { run + step };
        } else {
            too_many = run;
            guess = if bracketed { usize::midpoint(fits, too_many) } else { run.saturating_sub(step) };
        }
        step *= 2;
    }
    best.map(|pattern| (pattern, fits))
}

/// The regular expression of all the tags if it fits, and about how many of them were written.
fn write(tags: &[&str], limit: usize) -> (Option<String>, usize) {
    let mut trie = Trie { out: String::new(), limit, written: 0 };
    trie.out.push_str(BEFORE);
    let result = trie.node(tags, 0, 0);
    trie.out.push_str(AFTER);
    let fits = result.is_ok() && trie.out.len() <= limit;
    (fits.then_some(trie.out), trie.written)
}

/// The limit is reached, so that there is no use in writing on.
struct Full;

struct Trie {
    out: String,
    limit: usize,
    written: usize,
}

impl Trie {
    /// What follows the first `from` bytes, which all the tags share.
    fn node(&mut self, tags: &[&str], from: usize, depth: usize) -> Result<(), Full> {
        let [first, .., last] = tags else {
            self.written += tags.len();
            return tags.iter().try_for_each(|tag| self.literal(&tag[from..]));
        };
        let at = shared(first, last, from);
        self.literal(&first[from..at])?;
        let (ends_here, below) = if first.len() == at { (true, &tags[1..]) } else { (false, tags) };
        self.written += usize::from(ends_here);
        if depth == MAX_DEPTH {
            self.alternation(below, at)?;
        } else {
            let (leaves, others) = census(below, at);
            if others == 0 {
                self.class(leaves)?;
            } else {
                self.out.push_str("(?:");
                self.branches(below, at, depth + 1, leaves)?;
                self.out.push(')');
            }
        }
        if ends_here {
            self.out.push('?');
        }
        Ok(())
    }

    /// One branch for each next character, and one for all those after which nothing follows.
    fn branches(&mut self, tags: &[&str], at: usize, depth: usize, mut leaves: u128) -> Result<(), Full> {
        let mut between = "";
        for branch in (Branches { tags, at }) {
            if is_leaf(branch, at) {
                if leaves != 0 {
                    self.out.push_str(between);
                    self.class(std::mem::take(&mut leaves))?;
                }
            } else {
                self.out.push_str(between);
                self.node(branch, at, depth)?;
            }
            between = "|";
        }
        Ok(())
    }

    /// The rest of each tag in full: larger, and flat.
    fn alternation(&mut self, tags: &[&str], at: usize) -> Result<(), Full> {
        let mut between = "(?:";
        for tag in tags {
            self.out.push_str(between);
            self.literal(&tag[at..])?;
            self.written += 1;
            between = "|";
        }
        self.out.push(')');
        Ok(())
    }

    /// One of these ASCII characters: `a`, `[ac]`, `[a-c]`.
    fn class(&mut self, characters: u128) -> Result<(), Full> {
        self.written += characters.count_ones() as usize;
        let one = characters.count_ones() == 1;
        self.out.push_str(if one { "" } else { "[" });
        let mut rest = characters;
        while rest != 0 {
            let first = rest.trailing_zeros();
            let run = (rest >> first).trailing_ones();
            // Two characters are shorter without a hyphen, and of three nothing is saved by leaving it out.
            let step = if run > 2 { run - 1 } else { 1 };
            for place in (first..first + run).step_by(step as usize) {
                if place > first && step > 1 {
                    self.out.push('-');
                }
                // Up to 127: a class is of ASCII characters.
                let c = char::from(place as u8);
                self.out.push_str(if c == '-' { "\\" } else { "" });
                escape(&mut self.out, c);
            }
            rest &= u128::MAX.checked_shl(first + run).unwrap_or(0);
        }
        self.out.push_str(if one { "" } else { "]" });
        self.check()
    }

    fn literal(&mut self, text: &str) -> Result<(), Full> {
        push_literal(&mut self.out, text);
        self.check()
    }

    fn check(&self) -> Result<(), Full> {
        if self.out.len() > self.limit { Err(Full) } else { Ok(()) }
    }
}

/// The slices of tags that go on with the same character.
struct Branches<'s, 't> {
    tags: &'s [&'t str],
    at: usize,
}

impl<'s, 't> Iterator for Branches<'s, 't> {
    type Item = &'s [&'t str];

    fn next(&mut self) -> Option<Self::Item> {
        let first = &self.tags.first()?[self.at..];
        let character = &first.as_bytes()[..first.chars().next()?.len_utf8()];
        let is_in = |tag: &&str| tag.as_bytes()[self.at..].starts_with(character);
        let (branch, rest) = self.tags.split_at(self.tags.partition_point(is_in));
        self.tags = rest;
        Some(branch)
    }
}

/// The characters after which nothing follows, one bit each, and how many other branches there are.
fn census(tags: &[&str], at: usize) -> (u128, usize) {
    let (mut leaves, mut others) = (0, 0);
    for branch in (Branches { tags, at }) {
        if is_leaf(branch, at) {
            leaves |= 1 << branch[0].as_bytes()[at];
        } else {
            others += 1;
        }
    }
    (leaves, others)
}

/// Whether this is one tag with one more byte, which is then ASCII.
fn is_leaf(branch: &[&str], at: usize) -> bool {
    matches!(branch, [tag] if tag.len() == at + 1)
}

/// The length of what two tags have in common, in whole characters. They have the first `from` bytes.
fn shared(a: &str, b: &str, from: usize) -> usize {
    let same = a.as_bytes()[from..].iter().zip(&b.as_bytes()[from..]).take_while(|(a, b)| a == b).count();
    let mut at = from + same;
    while !a.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// A text as it stands in a regular expression, in one word.
pub(super) fn push_literal(out: &mut String, text: &str) {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        out.push_str(text);
    } else {
        text.chars().for_each(|c| escape(out, c));
    }
}

/// A character as it stands in a regular expression, in a class (but for the hyphen) and outside. White space, quotes and `#` would end the
/// word that a ban takes for the expression.
fn escape(out: &mut String, c: char) {
    match c {
        ' ' | '"' | '\'' | '#' => _ = write!(out, "\\x{:02x}", u32::from(c)),
        c if "\\^$.|?*+()[]{}".contains(c) => out.extend(['\\', c]),
        c => out.push(c),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const NO_LIMIT: usize = usize::MAX;

    fn trie(tags: &[&str]) -> String {
        let patterns = patterns(tags, NO_LIMIT).unwrap();
        assert_eq!(patterns.len(), 1);
        let inside = patterns[0].strip_prefix(BEFORE).and_then(|rest| rest.strip_suffix(AFTER));
        inside.unwrap().to_owned()
    }

    fn matches(patterns: &[String], header: &str) -> bool {
        let is_match = |pattern: &String| pcre2::bytes::Regex::new(pattern).unwrap().is_match(header.as_bytes());
        patterns.iter().any(|pattern| is_match(pattern).unwrap())
    }

    #[test]
    fn what_tags_begin_with_is_written_once() {
        assert_eq!(trie(&["cat_p_1"]), "cat_p_1");
        assert_eq!(trie(&["cat_c_p_14", "cat_c_p_2", "cat_p", "cat_p_2046"]), "cat_(?:c_p_(?:14|2)|p(?:_2046)?)");
        assert_eq!(trie(&["a", "b", "cd"]), "(?:[ab]|cd)");
        assert_eq!(trie(&["a1", "a20", "a3"]), "a(?:[13]|20)");
    }

    #[test]
    fn single_characters_are_a_class_and_an_optional_one_needs_no_group() {
        assert_eq!(trie(&["a1", "a2"]), "a[12]");
        assert_eq!(trie(&["a1", "a2", "a3"]), "a[1-3]");
        assert_eq!(trie(&["a0", "a1", "a3", "a4", "a5", "a6", "ab"]), "a[013-6b]");
        assert_eq!(trie(&["a", "ab"]), "ab?");
        assert_eq!(trie(&["a", "ab", "ac"]), "a[bc]?");
        assert_eq!(trie(&["a", "abc"]), "a(?:bc)?");
    }

    #[test]
    fn what_means_something_in_a_regular_expression_or_in_a_ban_is_escaped() {
        assert_eq!(trie(&["a b\"c'd#e.f"]), r"a\x20b\x22c\x27d\x23e\.f");
        assert_eq!(trie(&["a-", "a[", "a\\", "a]", "a^"]), r"a[\-\[-\^]");
        assert_eq!(trie(&["a", "a ", "a!", "a\"", "a#"]), r"a[\x20-\x23]?");
    }

    #[test]
    fn a_character_of_several_bytes_is_never_cut_and_stands_in_no_class() {
        // The first bytes are the same.
        assert_eq!(trie(&["ä", "ö"]), "(?:ä|ö)");
        assert_eq!(trie(&["a", "aä"]), "a(?:ä)?");
        let patterns = patterns(&["a", "aä"], NO_LIMIT).unwrap();
        assert!(matches(&patterns, "aä") && matches(&patterns, "a"));
        assert!(!matches(&patterns, "aö"));
    }

    #[test]
    fn tags_that_are_prefixes_of_one_another_compile_and_match() {
        let tags: Vec<String> = (1..=1000).map(|len| "a".repeat(len)).collect();
        let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
        let patterns = patterns(&tags, 7_680).unwrap();
        assert!(patterns.iter().all(|pattern| pattern.len() <= 7_680));
        assert!(patterns.iter().all(|pattern| deepest(pattern) <= MAX_DEPTH + 1));
        for tag in &tags {
            assert!(matches(&patterns, tag) && matches(&patterns, &format!("b,{tag},b")), "{}", tag.len());
        }
        for other in ["", "b", &"a".repeat(1001), "ab", "ba", &format!("{}b", tags[500])] {
            assert!(!matches(&patterns, other), "{other}");
        }
    }

    fn deepest(pattern: &str) -> usize {
        let depth = |depth: &mut usize, byte| {
            *depth = *depth + usize::from(byte == b'(') - usize::from(byte == b')');
            Some(*depth)
        };
        pattern.bytes().scan(0, depth).max().unwrap_or(0)
    }

    #[test]
    fn as_many_tags_as_fit_go_into_one_expression() {
        let tags: Vec<String> = (10_000..60_000).step_by(23).map(|id| format!("cat_p_{id}")).collect();
        let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
        let mut rest = &tags[..];
        for limit in [512, 1000, 7_680] {
            let (pattern, run) = longest_run(rest, limit).unwrap();
            assert!(pattern.len() <= limit);
            assert!(write(&rest[..=run], limit).0.is_none(), "{run} of {}", rest.len());
            rest = &rest[run..];
        }
    }

    #[test]
    fn the_densest_classes_that_a_header_can_hold_compile() {
        // A class takes most where it has the fewest characters: two, after one that parts it from the others.
        let characters: Vec<char> = ('a'..='z').chain('A'..='Z').chain('0'..='9').collect();
        let mut tags = Vec::new();
        for (a, b) in characters.iter().flat_map(|a| characters.iter().map(move |b| (a, b))) {
            tags.extend(['0', '2'].map(|last| format!("{a}{b}{last}")));
        }
        tags.sort_unstable();
        let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
        let patterns = patterns(&tags, NO_LIMIT).unwrap();
        assert!(patterns[0].len() > MAX_PATTERN - 10);
        assert!(patterns.iter().all(|pattern| pcre2::bytes::Regex::new(pattern).is_ok()));
    }

    #[test]
    fn a_tag_that_does_not_fit_leaves_no_expressions() {
        let long = "x".repeat(600);
        assert_eq!(patterns(&["a", &long, "y"], 512), None);
        assert_eq!(patterns(&["a", "y"], 10), None);
        assert_eq!(patterns(&["a", "y"], 11).unwrap(), ["(^|,)a(,|$)", "(^|,)y(,|$)"]);
        assert_eq!(patterns(&[], 512).unwrap(), [""; 0]);
    }

    proptest! {
        #[test]
        fn any_texts_match_as_themselves_and_as_nothing_else(
            purged in prop::collection::btree_set("[ -+\\--~äö€]{1,3}|[a\\-\\]^\\[]{1,6}|a{1,40}", 1..80),
            others in prop::collection::vec("[ -+\\--~äö€]{1,3}|[a\\-\\]^\\[]{1,6}|a{1,40}", 1..20),
            limit in 170_usize..2_000,
        ) {
            let sorted: Vec<&str> = purged.iter().map(String::as_str).collect();
            let patterns = patterns(&sorted, limit).unwrap();
            prop_assert!(patterns.iter().all(|pattern| pattern.len() <= limit));
            let regexes: Vec<_> =
                patterns.iter().map(|pattern| pcre2::bytes::Regex::new(pattern).unwrap()).collect();
            let pages: BTreeSet<&String> = others.iter().chain(&purged).collect();
            for page in pages {
                let header = format!("x,{page},y");
                let matched = regexes.iter().any(|regex| regex.is_match(header.as_bytes()).unwrap());
                let expected = [page.as_str(), "x", "y"].iter().any(|tag| purged.contains(*tag));
                prop_assert_eq!(matched, expected, "{:?} by {:?}", page, patterns);
            }
        }
    }
}
