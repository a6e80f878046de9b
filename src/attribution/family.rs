//! The families of tags.
//!
//! Magento's tags consist of the kind of an entity and its number or name: `cat_p_2046` is product 2046,
//! `cms_b_footer_links` a block. The bare kind matches all of them, since pages carry it as well.

/// Magento's families and their meaning; a bare one drops every page with such an entity. From the `CACHE_TAG` of
/// Magento's models and of its GraphQL resolvers; the long names are those before Magento 2.2.
const KNOWN: [(&str, &str); 16] = [
    ("cat_c", "a category"),
    ("cat_c_p", "a list of the products of a category"),
    ("cat_p", "a product"),
    ("catalog_category", "a category"),
    ("catalog_category_product", "a list of the products of a category"),
    ("catalog_product", "a product"),
    ("cms_b", "a CMS block"),
    ("cms_block", "a CMS block"),
    ("cms_p", "a CMS page"),
    ("cms_page", "a CMS page"),
    ("gql_country", "countries (GraphQL)"),
    ("gql_currency", "currencies (GraphQL)"),
    ("gql_store_config", "the configuration of a store (GraphQL)"),
    ("store", "a store view"),
    ("store_group", "a store"),
    ("website", "a website"),
];

/// The number of known families.
pub(super) const KNOWN_FAMILIES: usize = KNOWN.len();

/// The name of a flush in place of a family.
pub(super) const EVERYTHING: &str = "everything";

/// The family of all tags whose family is not named, and the sender of all purges whose sender is not.
pub const OTHER: &str = "other";

/// Names that no family may have, because they have another meaning in the same place.
const RESERVED: [&str; 5] = [EVERYTHING, OTHER, "pattern", "pool", "url"];

/// The longest name of a family, in bytes. A longer one is not a kind of entity.
const LONGEST_NAME: usize = 48;

/// The family of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family<'t> {
    /// One of Magento's families.
    Known(&'static str),
    /// An extension's family.
    Extension(&'t str),
    /// No recognisable family.
    None,
}

/// The longest of Magento's names that is a prefix of the tag up to a `_`; otherwise the tag without its number.
pub(super) fn family(tag: &str) -> Family<'_> {
    let begins_with = |name: &str| tag.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
    let known = KNOWN.iter().map(|(name, _)| *name).filter(|name| begins_with(name));
    if let Some(name) = known.max_by_key(|name| name.len()) {
        return Family::Known(name);
    }
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let name = tag.rsplit_once('_').filter(|(_, number)| is_number(number)).map_or(tag, |(name, _)| name);
    let is_name = !name.is_empty() && name.len() <= LONGEST_NAME && !RESERVED.contains(&name);
    if is_name { Family::Extension(name) } else { Family::None }
}

/// The family, if the tag is a bare family.
pub(super) fn wide(tag: &str) -> Option<&'static str> {
    KNOWN.iter().map(|(name, _)| *name).find(|name| *name == tag)
}

/// Everything that a wide purge may drop.
pub fn wide_targets() -> impl Iterator<Item = &'static str> {
    KNOWN.into_iter().map(|(name, _)| name).chain([EVERYTHING])
}

/// Describes what a wide purge of this drops.
pub fn describe(what: &'static str) -> String {
    match KNOWN.iter().find(|(name, _)| *name == what) {
        Some((name, thing)) => format!("a purge of every page with {thing} (bare tag {name})"),
        None => "a flush: every page".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_of_magentos_tags_is_the_longest_known_name() {
        for (tag, name) in [
            ("cat_p_2046", "cat_p"),
            ("cat_p", "cat_p"),
            ("cat_c_3", "cat_c"),
            ("cat_c_p_14", "cat_c_p"),
            ("cat_c_p", "cat_c_p"),
            ("cms_b_footer_links_block", "cms_b"),
            ("cms_block_7", "cms_block"),
            ("store_group", "store_group"),
            ("catalog_category_product_5", "catalog_category_product"),
        ] {
            assert_eq!(family(tag), Family::Known(name), "{tag}");
        }
    }

    #[test]
    fn another_tag_is_of_its_name_without_the_number() {
        for (tag, name) in
            [("brand_7", "brand"), ("brand", "brand"), ("cat_pie_7", "cat_pie"), ("a_b_c", "a_b_c"), ("x_1_2", "x_1")]
        {
            assert_eq!(family(tag), Family::Extension(name), "{tag}");
        }
        let long = "x".repeat(LONGEST_NAME + 1);
        for tag in [long.as_str(), "everything", "url_7", "other_1", "_7"] {
            assert_eq!(family(tag), Family::None, "{tag}");
        }
    }

    #[test]
    fn only_a_bare_family_is_wide_and_its_words_say_what_goes() {
        assert_eq!((wide("cat_p"), wide("cat_p_1"), wide("brand")), (Some("cat_p"), None, None));
        assert_eq!(describe("cat_p"), "a purge of every page with a product (bare tag cat_p)");
        assert_eq!(describe(EVERYTHING), "a flush: every page");
    }
}
