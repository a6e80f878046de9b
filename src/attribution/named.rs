//! The targets of one purge, in bounded size.

use std::collections::BTreeMap;

use super::family::{EVERYTHING, Family, OTHER, family, wide};
use crate::purge::{Forward, Purge, Target};

/// The maximum number of families per purge; further tags count as `other`.
pub(super) const FAMILIES: usize = 64;

/// The size of a sample: pieces (tags, patterns), and characters of each.
const PIECES: usize = 5;
const CHARS: usize = 120;

/// The targets of one purge. Taken before the journal consumes the purge.
#[derive(Clone, Debug)]
pub struct NamedTargets {
    pub(super) kind: &'static str,
    pub(super) soft: bool,
    pub(super) tags: u64,
    /// The number of tags per family.
    pub(super) families: BTreeMap<Box<str>, u64>,
    /// Its targets other than tags, by kind.
    pub(super) untagged: Vec<&'static str>,
    pub(super) wide: Vec<&'static str>,
    pub(super) sample: Vec<String>,
}

impl NamedTargets {
    /// The targets of this purge.
    pub fn of(purge: &Purge) -> Self {
        let mut named = NamedTargets {
            kind: purge.kind(),
            soft: purge.soft,
            tags: 0,
            families: BTreeMap::new(),
            untagged: Vec::new(),
            wide: Vec::new(),
            sample: Vec::new(),
        };
        purge.targets.iter().for_each(|target| named.add(target));
        named
    }

    fn add(&mut self, target: &Target) {
        match target {
            Target::All => {
                note_once(&mut self.wide, EVERYTHING);
                self.add_untagged(EVERYTHING, || "all".to_owned());
            }
            Target::Everything => {
                note_once(&mut self.wide, EVERYTHING);
                self.add_untagged(EVERYTHING, || ".*".to_owned());
            }
            Target::Tags(tags) => tags.iter().for_each(|tag| self.add_tag(tag)),
            Target::Pattern(pattern) => self.add_untagged("pattern", || pattern.as_str().to_owned()),
            Target::Pool(pattern) => self.add_untagged("pool", || pattern.as_str().to_owned()),
            Target::Forward(forward) => self.add_untagged("url", || shown(forward)),
        }
    }

    fn add_tag(&mut self, tag: &str) {
        let name = match family(tag) {
            Family::Known(name) | Family::Extension(name) => name,
            Family::None => OTHER,
        };
        if let Some(count) = self.families.get_mut(name) {
            *count += 1;
        } else {
            let name = if self.families.len() < FAMILIES { name } else { OTHER };
            *self.families.entry(name.into()).or_default() += 1;
        }
        self.tags += 1;
        if let Some(what) = wide(tag) {
            note_once(&mut self.wide, what);
        }
        self.show(|| tag.to_owned());
    }

    fn add_untagged(&mut self, kind: &'static str, piece: impl FnOnce() -> String) {
        note_once(&mut self.untagged, kind);
        self.show(piece);
    }

    fn show(&mut self, piece: impl FnOnce() -> String) {
        if self.sample.len() < PIECES {
            self.sample.push(cut(piece()));
        }
    }
}

fn note_once(list: &mut Vec<&'static str>, what: &'static str) {
    if !list.contains(&what) {
        list.push(what);
    }
}

fn cut(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(CHARS) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// A forwarded request without possible secrets: the names of its headers, no query, no user.
fn shown(forward: &Forward) -> String {
    let host = forward.headers.iter().find(|(name, _)| name == "host").map_or("", |(_, host)| host);
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    let (path, query) = forward.target.split_once('?').map_or((forward.target.as_str(), ""), |(path, _)| (path, "?…"));
    let mut text = format!("{} {host}{path}{query}", forward.method);
    for (name, _) in forward.headers.iter().filter(|(name, _)| name != "host") {
        text.push_str(&format!(" {name}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::{Pattern, TagSet};

    fn named(targets: Vec<Target>) -> NamedTargets {
        NamedTargets::of(&Purge { targets, soft: false })
    }

    fn tags(tags: &[&str]) -> NamedTargets {
        named(vec![Target::Tags(tags.iter().copied().collect::<TagSet>())])
    }

    #[test]
    fn tags_are_counted_by_family_and_bare_ones_are_wide() {
        let named = tags(&["cat_p", "cat_p_1", "cat_p_2", "cat_c_p_3", "brand_9", "url_1"]);
        let families: Vec<_> = named.families.iter().map(|(name, count)| (&**name, *count)).collect();
        assert_eq!(families, [("brand", 1), ("cat_c_p", 1), ("cat_p", 3), ("other", 1)]);
        assert_eq!((named.tags, named.wide.as_slice()), (6, &["cat_p"][..]));
        assert_eq!(named.sample, ["brand_9", "cat_c_p_3", "cat_p", "cat_p_1", "cat_p_2"]);
    }

    #[test]
    fn a_flush_is_wide_and_no_tag() {
        let pool = Target::Pool(Pattern::new("shop").unwrap());
        let named = named(vec![Target::Everything, pool, Target::Everything]);
        assert_eq!((named.tags, named.wide), (0, vec!["everything"]));
        assert_eq!(named.untagged, ["everything", "pool"]);
    }

    #[test]
    fn what_is_kept_of_a_purge_is_bounded() {
        let many: Vec<String> = (0..10_000).map(|n| format!("family{n}x_{}", "y".repeat(20))).collect();
        let named = tags(&many.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!((named.tags, named.families.len(), named.sample.len()), (10_000, FAMILIES + 1, PIECES));
        assert_eq!(named.families["other"], 10_000 - FAMILIES as u64);
        let long = named_pattern(&"ü".repeat(3000));
        assert_eq!(long.chars().count(), CHARS + 1);
    }

    fn named_pattern(pattern: &str) -> String {
        named(vec![Target::Pattern(Pattern::new(pattern).unwrap())]).sample[0].clone()
    }

    #[test]
    fn of_a_request_that_is_handed_on_no_secret_is_kept() {
        let forward = Forward {
            method: "BAN".into(),
            target: "/p/1?key=secret1".into(),
            headers: vec![("host".into(), "user:secret2@shop.test".into()), ("x-purge-key".into(), "secret3".into())],
        };
        assert_eq!(named(vec![Target::Forward(forward)]).sample, ["BAN shop.test/p/1?… x-purge-key"]);
    }
}
