//! Magento's pattern as what it means: a set of tags.
//!
//! Magento writes `((^|,)TAG(,|$))` for every tag and joins them with `|`. As a regular expression that is a hundred
//! times dearer for Varnish than the same set written well, and two patterns with the same tags in another order are
//! different bans. So exactly this form, and nothing that merely resembles it, is read back into a set.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

const BEFORE: &str = "((^|,)";
const AFTER: &str = "(,|$))";

/// A sorted set of literal tags.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TagSet(BTreeSet<Box<str>>);

impl TagSet {
    /// Reads Magento's form; `None` for anything else, which then stays the regular expression it is.
    ///
    /// A tag with a character that means something in a regular expression is not literal (Magento does not escape),
    /// so its pattern is not a set.
    pub fn from_magento(pattern: &str) -> Option<Self> {
        let mut tags = BTreeSet::new();
        let mut rest = pattern;
        loop {
            let tag_on = rest.strip_prefix(BEFORE)?;
            let end = tag_on.find(AFTER)?;
            let (tag, after) = tag_on.split_at(end);
            if tag.is_empty() || !tag.chars().all(is_literal) {
                return None;
            }
            tags.insert(tag.into());
            rest = &after[AFTER.len()..];
            if rest.is_empty() {
                return Some(TagSet(tags));
            }
            rest = rest.strip_prefix('|')?;
        }
    }

    /// The tags in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|tag| &**tag)
    }

    /// How many tags there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the tags of another set.
    pub fn extend(&mut self, other: &TagSet) {
        self.0.extend(other.0.iter().cloned());
    }
}

impl<'a> FromIterator<&'a str> for TagSet {
    fn from_iter<I: IntoIterator<Item = &'a str>>(tags: I) -> Self {
        TagSet(tags.into_iter().map(Box::from).collect())
    }
}

/// Whether a character stands for itself in PCRE, and can stand in a tag (a comma separates tags).
fn is_literal(c: char) -> bool {
    !c.is_control() && !"\\^$.|?*+()[]{},".contains(c)
}

/// The set in the form in which Magento writes it, for senders such as `clearcoat purge --tag`.
pub(crate) fn to_magento<'a>(tags: impl IntoIterator<Item = &'a str>) -> String {
    let terms: Vec<String> = tags.into_iter().map(|tag| format!("{BEFORE}{tag}{AFTER}")).collect();
    terms.join("|")
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn writing_and_reading_give_the_same_set() {
        let tags = ["cat_c_3", "cat_p_1", "cms b"];
        assert_eq!(read(&to_magento(tags)).unwrap(), tags);
    }
}
