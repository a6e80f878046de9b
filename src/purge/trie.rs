//! A set of tags as one regular expression, written as a trie: `(^|,)cat_(?:c_p_(?:2|14)|p(?:_2046)?)(,|$)`.
//!
//! The regular expression is anchored and its branches begin with different characters, so a tag of a page follows a
//! single path and fails at the first character that no purged tag has. It also makes the purges of a whole reindex fit
//! into a request or two: tags are long names that differ in their last digits.
//!
//! Written directly from the sorted slice: the tags below a node are adjacent in it, so that the recursion needs two
//! bounds and no tree. Varnish matches bytes and knows no UTF-8, so branches split between characters, and only an
//! ASCII character can be in a class or before a `?`.

use std::fmt::{self, Write};

const BEFORE: &str = "(^|,)";
const AFTER: &str = "(,|$)";

/// The deepest nesting of groups, one for each position where tags differ. Real tags need about one for each of their
/// digits. Varnish gives up on a match at a depth of 20 (`pcre2_depth_limit`, `pcre_match_limit_recursion`; PCRE2 with
/// JIT does not count it), and panics. A group costs two levels, one more if it is optional, and the text around all of
/// them two or three.
const MAX_DEPTH: usize = 6;

/// The longest regular expression in bytes, whatever the header limit. PCRE2 compiles to at most 64 KiB, and a class of
/// four characters takes 33 bytes there: this length compiles with the densest classes.
pub(super) const MAX_PATTERN: usize = 8 * 1024;

/// The tags (sorted, without duplicates) as regular expressions for a page's tag header, none longer than `limit`
/// bytes. Each takes as many tags as fit; `None` if a single tag does not.
pub(super) fn patterns(tags: &[&str], limit: usize) -> Option<Vec<String>> {
    let mut patterns = Vec::new();
    let mut rest = tags;
    while !rest.is_empty() {
        let mut trie = Trie { out: BEFORE.to_owned(), limit: limit.min(MAX_PATTERN), before: String::new() };
        let taken = trie.node(rest, 0, 0, AFTER.len());
        if taken == 0 {
            return None;
        }
        trie.out.push_str(AFTER);
        patterns.push(trie.out);
        rest = &rest[taken..];
    }
    Some(patterns)
}

/// Regex builder: accepts a tag only if the pattern, with every open group closed, stays within `limit`.
///
/// The form of a node depends on which of its tags fit. So the text around its branches is counted before each tag, and
/// written after the last.
struct Trie {
    out: String,
    limit: usize,
    /// A scratch buffer for [`Trie::close`], reused to avoid allocation.
    before: String,
}

/// The branches below a node so far.
#[derive(Clone, Copy)]
struct Below {
    /// Whether a tag ends at the node itself, which makes the branches optional.
    optional: bool,
    /// The characters with nothing after them, one bit each. They are one branch, a class.
    leaves: u128,
    /// The number of other branches.
    others: usize,
}

impl Trie {
    /// Writes the tags' text after their first `from` bytes, which they share, for as many of them as fit with
    /// `pending` bytes after them. Returns that number.
    fn node(&mut self, tags: &[&str], from: usize, depth: usize, pending: usize) -> usize {
        let (Some(first), Some(last)) = (tags.first(), tags.last()) else { return 0 };
        let start = self.out.len();
        let at = shared(first, last, from);
        push_literal(&mut self.out, &first[from..at]);
        let open = self.out.len();
        let mut below = Below { optional: first.len() == at, leaves: 0, others: 0 };
        let mut taken = usize::from(below.optional && self.out.len() + pending <= self.limit);
        // If a tag that ends here does not fit, no longer one does.
        if taken == usize::from(below.optional) {
            taken += self.branches(&tags[taken..], at, depth, pending, &mut below);
        }
        if taken == 0 {
            self.out.truncate(start);
        } else {
            self.close(open, below);
        }
        taken
    }

    /// Writes the branches that fit, without the text around them. Returns their number of tags.
    fn branches(&mut self, tags: &[&str], at: usize, depth: usize, pending: usize, below: &mut Below) -> usize {
        let mut taken = 0;
        for branch in (Branches { tags, at, apart: depth == MAX_DEPTH }) {
            let (written, mut with) = (self.out.len(), *below);
            let fit = if is_leaf(branch, at) {
                with.leaves |= 1 << branch[0].as_bytes()[at];
                usize::from(written + with.around() + pending <= self.limit)
            } else {
                with.others += 1;
                self.out.push_str(if below.others > 0 { "|" } else { "" });
                self.node(branch, at, depth + 1, pending + with.around())
            };
            if fit == 0 {
                self.out.truncate(written);
                break;
            }
            *below = with;
            taken += fit;
            if fit < branch.len() {
                break;
            }
        }
        taken
    }

    /// Writes the text around the branches, which begin at `open`.
    fn close(&mut self, open: usize, below: Below) {
        if below.others == 0 {
            below.class(&mut self.out);
        } else {
            let (before, after) = if below.is_group() { ("(?:", ")") } else { ("", "") };
            self.before.push_str(before);
            below.class(&mut self.before);
            self.before.push_str(if below.leaves == 0 { "" } else { "|" });
            self.out.insert_str(open, &self.before);
            self.before.clear();
            self.out.push_str(after);
        }
        if below.optional && below.has_branches() {
            self.out.push('?');
        }
    }
}

impl Below {
    fn has_branches(self) -> bool {
        self.leaves != 0 || self.others > 0
    }

    /// Whether the branches need a group. A class does not.
    fn is_group(self) -> bool {
        self.others > 0 && (self.optional || self.leaves != 0 || self.others > 1)
    }

    /// The number of bytes that [`Trie::close`] adds.
    fn around(self) -> usize {
        let mut class = Count(0);
        self.class(&mut class);
        let group = if self.is_group() { "(?:)".len() } else { 0 };
        let between = usize::from(self.leaves != 0 && self.others > 0);
        let optional = usize::from(self.optional && self.has_branches());
        class.0 + group + between + optional
    }

    /// Writes one of the leaves: `a`, `[ac]`, `[a-c]`.
    fn class(self, out: &mut impl Write) {
        let (before, after) = if self.leaves.count_ones() > 1 { ("[", "]") } else { ("", "") };
        // Writing to memory or counting cannot fail.
        _ = out.write_str(before);
        let mut rest = self.leaves;
        while rest != 0 {
            let first = rest.trailing_zeros();
            let run = (rest >> first).trailing_ones();
            // A hyphen between two characters would be longer, and with three it saves nothing.
            let last = if run > 2 { first + run - 1 } else { first };
            member(out, first);
            if last > first {
                _ = out.write_char('-');
                member(out, last);
            }
            rest &= u128::MAX.checked_shl(last + 1).unwrap_or(0);
        }
        _ = out.write_str(after);
    }
}

/// A writer that only counts bytes.
struct Count(usize);

impl Write for Count {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len();
        Ok(())
    }
}

/// The groups of adjacent tags with the same next character; or each tag by itself.
struct Branches<'s, 't> {
    tags: &'s [&'t str],
    at: usize,
    apart: bool,
}

impl<'s, 't> Iterator for Branches<'s, 't> {
    type Item = &'s [&'t str];

    fn next(&mut self) -> Option<Self::Item> {
        let first = &self.tags.first()?[self.at..];
        let lead = *first.as_bytes().first()?;
        let len = if self.apart {
            1
        } else if lead.is_ascii() {
            let is_in = |tag: &&str| tag.as_bytes()[self.at] == lead;
            // Most branches are one tag, and checking the next is faster than a search.
            if self.tags.get(1).is_some_and(is_in) { self.tags.partition_point(is_in) } else { 1 }
        } else {
            let character = &first.as_bytes()[..first.chars().next()?.len_utf8()];
            self.tags.partition_point(|tag| tag.as_bytes()[self.at..].starts_with(character))
        };
        let (branch, rest) = self.tags.split_at(len);
        self.tags = rest;
        Some(branch)
    }
}

/// Whether this is one tag with one more byte, which is then ASCII.
fn is_leaf(branch: &[&str], at: usize) -> bool {
    matches!(branch, [tag] if tag.len() == at + 1)
}

/// The length of the common prefix of two tags, in whole characters. They share the first `from` bytes.
fn shared(a: &str, b: &str, from: usize) -> usize {
    let same = a.as_bytes()[from..].iter().zip(&b.as_bytes()[from..]).take_while(|(a, b)| a == b).count();
    let mut at = from + same;
    while !a.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Writes a text as a literal of a regular expression, in one word.
pub(super) fn push_literal(out: &mut String, text: &str) {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        out.push_str(text);
    } else {
        text.chars().for_each(|c| escape(out, c));
    }
}

/// Writes a character of a class, given by its ASCII code.
fn member(out: &mut impl Write, code: u32) {
    let c = char::from_u32(code).unwrap_or_default();
    if c == '-' {
        _ = out.write_char('\\');
    }
    escape(out, c);
}

/// Writes a literal character. White space, quotes and `#` are escaped, because they would end the word that a ban
/// takes for the expression.
fn escape(out: &mut impl Write, c: char) {
    match c {
        ' ' | '"' | '\'' | '#' => _ = write!(out, "\\x{:02x}", u32::from(c)),
        '\\' | '^' | '$' | '.' | '|' | '?' | '*' | '+' | '(' | ')' | '[' | ']' | '{' | '}' => {
            _ = out.write_char('\\');
            _ = out.write_char(c);
        }
        c => _ = out.write_char(c),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pcre2::bytes::Regex;
    use proptest::prelude::*;

    use super::*;

    const NO_LIMIT: usize = usize::MAX;

    fn trie(tags: &[&str]) -> String {
        let patterns = patterns(tags, NO_LIMIT).unwrap();
        assert_eq!(patterns.len(), 1);
        let inside = patterns[0].strip_prefix(BEFORE).and_then(|rest| rest.strip_suffix(AFTER));
        inside.unwrap().to_owned()
    }

    fn compiled(patterns: &[String]) -> Vec<Regex> {
        patterns.iter().map(|pattern| Regex::new(pattern).unwrap()).collect()
    }

    fn matches(regexes: &[Regex], header: &str) -> bool {
        regexes.iter().any(|regex| regex.is_match(header.as_bytes()).unwrap())
    }

    #[test]
    fn what_tags_begin_with_is_written_once() {
        assert_eq!(trie(&["cat_p_1"]), "cat_p_1");
        assert_eq!(trie(&["cat_c_p_14", "cat_c_p_2", "cat_p", "cat_p_2046"]), "cat_(?:c_p_(?:2|14)|p(?:_2046)?)");
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
        // The first bytes are equal.
        assert_eq!(trie(&["ä", "ö"]), "(?:ä|ö)");
        assert_eq!(trie(&["a", "aä"]), "a(?:ä)?");
        let regexes = compiled(&patterns(&["a", "aä"], NO_LIMIT).unwrap());
        assert!(matches(&regexes, "aä") && matches(&regexes, "a"));
        assert!(!matches(&regexes, "aö"));
    }

    #[test]
    fn tags_that_are_prefixes_of_one_another_compile_and_match() {
        let tags: Vec<String> = (1..=1000).map(|len| "a".repeat(len)).collect();
        let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
        let patterns = patterns(&tags, 7_680).unwrap();
        assert!(patterns.iter().all(|pattern| pattern.len() <= 7_680));
        assert!(patterns.iter().all(|pattern| deepest(pattern) <= MAX_DEPTH + 1));
        let regexes = compiled(&patterns);
        for tag in &tags {
            assert!(matches(&regexes, tag) && matches(&regexes, &format!("b,{tag},b")), "{}", tag.len());
        }
        for other in ["", "b", &"a".repeat(1001), "ab", "ba", &format!("{}b", tags[500])] {
            assert!(!matches(&regexes, other), "{other}");
        }
    }

    #[test]
    fn the_deepest_tries_stay_below_the_depth_at_which_varnish_gives_up() {
        // At each position a tag ends, and others continue in several ways.
        let ends = ["", "b", "bc", "bcd", "c", "cb", "cbb"];
        let mut tags: Vec<String> =
            (1..40).flat_map(|len| ends.map(|end| format!("{}{end}", "a".repeat(len)))).collect();
        tags.sort_unstable();
        let sorted: Vec<&str> = tags.iter().map(String::as_str).collect();
        for pattern in patterns(&sorted, 7_680).unwrap() {
            // Two below the limit, for a PCRE that counts differently.
            let regex = Regex::new(&format!("(*LIMIT_DEPTH=18){pattern}")).unwrap();
            for tag in &tags {
                for header in [format!("{tag},x"), format!("x,{tag}!"), format!("{tag}a!,{tag}b!,{tag}bc!")] {
                    assert!(regex.is_match(header.as_bytes()).is_ok(), "{pattern} on {header}");
                }
            }
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
        for limit in [60, 512, 1000, 7_680] {
            let patterns = patterns(&tags, limit).unwrap();
            assert!(patterns.iter().all(|pattern| pattern.len() <= limit));
            // The first expression has as many tags as fit, and no more.
            let first = |count: usize| super::patterns(&tags[..count], limit).unwrap();
            let counts: Vec<usize> = (1..tags.len()).collect();
            let fit = counts.partition_point(|count| first(*count).len() == 1);
            assert_eq!(first(fit), patterns[..1]);
            let unlimited = super::patterns(&tags[..=fit], NO_LIMIT).unwrap();
            assert!(unlimited[0].len() > limit);
        }
    }

    #[test]
    fn the_densest_classes_that_a_header_can_hold_compile() {
        // The densest classes have two characters, after one that separates them.
        let characters: Vec<char> = ('a'..='z').chain('A'..='Z').chain('0'..='9').collect();
        let mut tags = Vec::new();
        for (a, b) in characters.iter().flat_map(|a| characters.iter().map(move |b| (a, b))) {
            tags.extend(['0', '2'].map(|last| format!("{a}{b}{last}")));
        }
        tags.sort_unstable();
        let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
        let patterns = patterns(&tags, NO_LIMIT).unwrap();
        assert!(patterns[0].len() > MAX_PATTERN - 10);
        assert_eq!(compiled(&patterns).len(), patterns.len());
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
            let regexes = compiled(&patterns);
            let pages: BTreeSet<&String> = others.iter().chain(&purged).collect();
            for page in pages {
                let header = format!("x,{page},y");
                let matched = matches(&regexes, &header);
                let expected = [page.as_str(), "x", "y"].iter().any(|tag| purged.contains(*tag));
                prop_assert_eq!(matched, expected, "{:?} by {:?}", page, patterns);
            }
        }
    }
}
