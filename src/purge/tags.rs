//! The meaning of Magento's pattern: a set of tags.
//!
//! Magento writes `((^|,)TAG(,|$))` for every tag and joins them with `|`. As a regular expression that is a hundred
//! times more expensive for Varnish than the same set written well, and two patterns with the same tags in another
//! order are different bans. So exactly this form, and nothing that merely resembles it, is parsed into a set.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Magento's text before a tag.
pub(super) const BEFORE: &str = "((^|,)";
pub(super) const AFTER: &str = "(,|$))";

/// The pieces of Magento's group when split at `|`; the second has a tag between its two parts.
const PIECES: [(&[u8], &[u8]); 3] = [(b"((^", b""), (b",)", b"(,"), (b"$))", b"")];

/// Whether this piece has these two parts. Only the piece of a tag has text between them.
fn is_piece(piece: &[u8], before: &[u8], after: &[u8]) -> bool {
    let holds_tag = !after.is_empty();
    piece.len() >= before.len() + after.len()
        && piece.starts_with(before)
        && piece.ends_with(after)
        && (piece.len() > before.len() + after.len()) == holds_tag
}

/// A sorted set of literal tags.
///
/// It is one text, the tags separated by commas (no tag has one), because a journal holds a hundred thousand of these
/// sets, and a batch compiles thousands of tags while a purge waits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TagSet(Box<str>);

impl TagSet {
    /// Parses Magento's form; `None` for anything else, which then stays a regular expression.
    ///
    /// A tag with a special character of regular expressions is not literal (Magento does not escape), so its pattern
    /// is not a set.
    pub fn from_magento(pattern: &str) -> Option<Self> {
        let mut tags = Vec::new();
        let mut rest = pattern;
        loop {
            let tag_on = rest.strip_prefix(BEFORE)?;
            let end = tag_on.bytes().position(|byte| byte.is_ascii() && !is_literal(byte.into()))?;
            let (tag, after) = tag_on.split_at(end);
            if tag.is_empty() || !(tag.is_ascii() || is_tag(tag)) {
                return None;
            }
            tags.push(tag);
            rest = after.strip_prefix(AFTER)?;
            if rest.is_empty() {
                return Some(TagSet::of_literals(tags));
            }
            rest = rest.strip_prefix('|')?;
        }
    }

    /// A tag that no page has: it tests whether a purge of tags is accepted, and drops nothing.
    pub fn no_page_has() -> Self {
        TagSet("clearcoat_no_page_has".into())
    }

    /// The complete groups of a chunk that Magento 2.3 has cut out of its pattern; `None` for anything else.
    ///
    /// It splits its pattern at *every* `|` (`PurgeCache::splitTags`) and joins as many pieces as fit into 7,680 bytes,
    /// so that a chunk can begin and end anywhere among the three pieces of a group: `((^`, `,)TAG(,` and `$))`. A tag
    /// is within one piece, so it is in exactly one chunk, and the missing pieces around it are restored here. A chunk
    /// without a tag becomes an empty text.
    pub(super) fn mend_torn(chunk: &[u8]) -> Option<Vec<u8>> {
        let pieces: Vec<&[u8]> = chunk.split(|&byte| byte == b'|').collect();
        let start = PIECES.iter().position(|(before, after)| is_piece(pieces[0], before, after))?;
        let mut groups: Vec<Vec<u8>> = Vec::new();
        for (piece, (before, after)) in pieces.iter().zip(PIECES.iter().cycle().skip(start)) {
            if !is_piece(piece, before, after) {
                return None;
            }
            let tag = &piece[before.len()..piece.len() - after.len()];
            if !tag.is_empty() {
                groups.push([BEFORE.as_bytes(), tag, AFTER.as_bytes()].concat());
            }
        }
        Some(groups.join(&b'|'))
    }

    fn of_literals(mut tags: Vec<&str>) -> Self {
        sort(&mut tags);
        TagSet(tags.join(",").into())
    }

    /// Those of the tags that are wanted; `None` if there are none.
    pub fn filter(&self, mut is_wanted: impl FnMut(&str) -> bool) -> Option<Self> {
        let wanted: Vec<&str> = self.iter().filter(|tag| is_wanted(tag)).collect();
        (!wanted.is_empty()).then(|| TagSet(wanted.join(",").into()))
    }

    /// The tags in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        // Splitting an empty text yields one empty item, and no tag is empty.
        self.0.split(',').filter(|tag| !tag.is_empty())
    }

    /// The tags in order, separated by commas, as in a page's tag header.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
impl<'a> FromIterator<&'a str> for TagSet {
    fn from_iter<I: IntoIterator<Item = &'a str>>(tags: I) -> Self {
        let tags: Vec<&str> = tags.into_iter().collect();
        assert!(tags.iter().all(|tag| is_tag(tag)), "{tags:?}");
        TagSet::of_literals(tags)
    }
}

impl Serialize for TagSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl<'de> Deserialize<'de> for TagSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let tags = Vec::<String>::deserialize(deserializer)?;
        if let Some(tag) = tags.iter().find(|tag| !is_tag(tag)) {
            return Err(de::Error::custom(format_args!(
                "{tag:?} is no literal tag: it must not be empty nor hold a comma, a control character or one of \
                 \\^$.|?*+()[]{{}}"
            )));
        }
        Ok(TagSet::of_literals(tags.iter().map(String::as_str).collect()))
    }
}

/// Sorts tags and drops duplicates.
///
/// Compiling a batch is mostly comparing tags, and the tags of a shop share a prefix. So the eight bytes after the
/// common prefix are compared as one number, and texts only if these are equal.
pub(super) fn sort(tags: &mut Vec<&str>) {
    let Some((first, others)) = tags.split_first() else { return };
    let alike = |bytes: usize, tag: &&str| {
        first.as_bytes()[..bytes].iter().zip(tag.as_bytes()).take_while(|(a, b)| a == b).count()
    };
    let shared = others.iter().fold(first.len(), alike);
    let key = |tag: &str| {
        let rest = tag.as_bytes()[shared..].iter().take(8);
        let free = 8 * (8 - rest.len());
        rest.fold(0_u64, |key, byte| key << 8 | u64::from(*byte)).checked_shl(free as u32).unwrap_or(0)
    };
    let mut keyed: Vec<(u64, &str)> = tags.iter().map(|tag| (key(tag), *tag)).collect();
    keyed.sort_unstable_by_key(|(key, _)| *key);
    keyed.chunk_by_mut(|(a, _), (b, _)| a == b).for_each(<[_]>::sort_unstable);
    tags.clear();
    tags.extend(keyed.into_iter().map(|(_, tag)| tag));
    tags.dedup();
}

fn is_tag(text: &str) -> bool {
    !text.is_empty()
        && (text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') || text.chars().all(is_literal))
}

/// Whether a character is literal in PCRE, and allowed in a tag (a comma separates tags).
fn is_literal(c: char) -> bool {
    let is_special =
        matches!(c, '\\' | '^' | '$' | '.' | '|' | '?' | '*' | '+' | '(' | ')' | '[' | ']' | '{' | '}' | ',');
    !is_special && !c.is_control()
}

/// Whether this is one literal tag: no pattern, no control character, and no comma, which separates tags.
pub(crate) fn is_literal_tag(tag: &str) -> bool {
    !tag.contains(',') && TagSet::from_magento(&to_magento([tag])).is_some_and(|set| set.iter().eq([tag]))
}

/// The set in Magento's form, for senders such as `clearcoat purge --tag`.
pub(crate) fn to_magento<'a>(tags: impl IntoIterator<Item = &'a str>) -> String {
    let terms: Vec<String> = tags.into_iter().map(|tag| format!("{BEFORE}{tag}{AFTER}")).collect();
    terms.join("|")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn read(pattern: &str) -> Option<Vec<String>> {
        TagSet::from_magento(pattern).map(|set| set.iter().map(str::to_owned).collect())
    }

    #[test]
    fn magentos_pattern_is_a_sorted_set_without_duplicates() {
        let pattern = "((^|,)cat_p_2046(,|$))|((^|,)cat_p(,|$))|((^|,)cat_p_2046(,|$))";
        assert_eq!(read(pattern).unwrap(), ["cat_p", "cat_p_2046"]);
    }

    #[test]
    fn what_only_resembles_the_form_is_no_set() {
        for pattern in [
            "",
            ".*",
            "cat_p_1",
            "((^|,)cat_p_1(,|$)",
            "((^|,)cat_p_1(,|$))|",
            "((^|,)(,|$))",
            "((^|,)cat_p_.*(,|$))",
            "((^|,)a,b(,|$))",
            "((^|,)a(,|$))((^|,)b(,|$))",
            " ((^|,)a(,|$))",
            "((^|,)a|b(,|$))",
        ] {
            assert_eq!(read(pattern), None, "{pattern}");
        }
    }

    fn mended(chunk: &str) -> Option<String> {
        TagSet::mend_torn(chunk.as_bytes()).map(|groups| String::from_utf8(groups).unwrap())
    }

    #[test]
    fn a_torn_chunk_gets_back_what_was_torn_off_and_nothing_else_is_one() {
        for (chunk, groups) in [
            ("((^|,)a(,", "((^|,)a(,|$))"),
            (",)a(,|$))|((^|,)b(,|$))", "((^|,)a(,|$))|((^|,)b(,|$))"),
            ("$))|((^|,)b(,|$))|((^", "((^|,)b(,|$))"),
            (",)a.b(,", "((^|,)a.b(,|$))"),
            ("((^|,)a(,|$))", "((^|,)a(,|$))"),
            ("$))", ""),
            ("((^", ""),
            ("$))|((^", ""),
        ] {
            assert_eq!(mended(chunk).as_deref(), Some(groups), "{chunk}");
        }
        for chunk in [
            "",
            ",)(,",
            "((^|,)a",
            "((^,)a(,",
            ",)a(,|((^",
            "$))|,)a(,",
            "((^|,)a(,|$))|",
            "|((^",
            "a|b",
            ",)a(,|$))|.*",
        ] {
            assert_eq!(mended(chunk), None, "{chunk}");
        }
    }

    /// `splitTags` of Magento 2.3 (`Magento\\CacheInvalidate\\Model\\PurgeCache`), with its counting.
    fn split_as_magento_2_3(pattern: &str, request_size: usize) -> Vec<String> {
        let (mut chunks, mut chunk, mut size) = (Vec::new(), Vec::new(), 0);
        for piece in pattern.split('|') {
            if size + piece.len() + chunk.len() + 1 > request_size {
                chunks.push(chunk.join("|"));
                chunk.clear();
                size = 0;
            }
            size += piece.len();
            chunk.push(piece);
        }
        if !chunk.is_empty() {
            chunks.push(chunk.join("|"));
        }
        chunks
    }

    #[test]
    fn a_set_is_stored_as_a_list_and_read_from_any_list_of_tags() {
        let set: TagSet = ["b", "a c", "\u{e4}"].into_iter().collect();
        assert_eq!(serde_json::to_string(&set).unwrap(), "[\"a c\",\"b\",\"\u{e4}\"]");
        let read = |json: &str| serde_json::from_str::<TagSet>(json);
        assert_eq!(read("[\"\u{e4}\",\"b\",\"a c\",\"b\"]").unwrap(), set);
        assert_eq!(read("[]").unwrap(), TagSet::default());
        assert_eq!(TagSet::default().iter().count(), 0);
    }

    #[test]
    fn a_stored_list_that_is_no_set_of_tags_is_refused() {
        for bad in ["[\"a,b\"]", "[\"\"]", "[\"a\",\"b.c\"]", "[\"a\\n\"]", "[1]", "\"a\"", "{}"] {
            assert!(serde_json::from_str::<TagSet>(bad).is_err(), "{bad}");
        }
        let error = serde_json::from_str::<TagSet>("[\"a,b\"]").unwrap_err().to_string();
        assert!(error.starts_with("\"a,b\" is no literal tag: "), "{error}");
    }

    #[test]
    fn writing_and_reading_give_the_same_set() {
        let tags = ["cat_c_3", "cat_p_1", "cms b"];
        assert_eq!(read(&to_magento(tags)).unwrap(), tags);
    }

    proptest! {
        #[test]
        fn all_chunks_of_magento_2_3_parse_and_together_name_exactly_the_tags(
            tags in prop::collection::btree_set("(cat_p_|cat_c_p_|cms_b_)?[0-9A-Za-z]{1,12}( x)?", 1..120),
            request_size in 30_usize..700,
        ) {
            let whole = to_magento(tags.iter().map(String::as_str));
            let mut named = BTreeSet::new();
            for chunk in split_as_magento_2_3(&whole, request_size) {
                let groups = mended(&chunk);
                prop_assert!(groups.is_some(), "{}", chunk);
                let groups = groups.unwrap();
                let set = if groups.is_empty() { Some(Vec::new()) } else { read(&groups) };
                prop_assert!(set.is_some(), "{}", groups);
                named.extend(set.unwrap());
            }
            prop_assert_eq!(named, tags);
        }

        #[test]
        fn tags_are_in_the_order_of_texts_and_there_once(
            tags in prop::collection::vec("(cat_p_){0,2}[0-9aä]{1,12}", 0..40),
        ) {
            let expected: Vec<&str> = tags.iter().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect();
            let mut sorted: Vec<&str> = tags.iter().map(String::as_str).collect();
            sort(&mut sorted);
            prop_assert_eq!(sorted, expected);
        }
    }
}
