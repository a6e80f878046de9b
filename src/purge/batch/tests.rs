//! The three forms against what the purges say, page by page.

use std::collections::BTreeSet;

use pcre2::bytes::Regex;
use proptest::prelude::*;

use super::*;
use crate::fleet::DEFAULT_HEADER_LIMIT;
use crate::purge::TagSet;

const FORMS: [PurgeDialect; 3] = [PurgeDialect::Magento, PurgeDialect::MagentoPlain, PurgeDialect::Xkey];

fn purge(target: Target) -> Purge {
    Purge { targets: vec![target], soft: false }
}

fn soft(target: Target) -> Purge {
    Purge { targets: vec![target], soft: true }
}

fn tags(tags: &[&str]) -> Target {
    Target::Tags(tags.iter().copied().collect())
}

fn pattern(pattern: &str) -> Target {
    Target::Pattern(Pattern::new(pattern).unwrap())
}

fn pool(pattern: &str) -> Target {
    Target::Pool(Pattern::new(pattern).unwrap())
}

fn forward(target: &str) -> Forward {
    Forward { method: "PURGE".into(), target: target.into(), headers: vec![] }
}

fn ban(pattern: &str, soft: bool) -> Ban {
    Ban::Tags { pattern: pattern.into(), soft }
}

fn keys(keys: &str, soft: bool) -> Ban {
    Ban::Keys { keys: keys.into(), soft }
}

fn magento(purges: &[Purge]) -> CompiledBans {
    compile(purges, PurgeDialect::Magento, DEFAULT_HEADER_LIMIT)
}

#[test]
fn the_tags_of_all_purges_become_one_ban_in_each_form() {
    let purges = [purge(tags(&["b_2", "b_1"])), purge(tags(&["c", "b_1"]))];
    for (delivery, expected) in [
        (PurgeDialect::Magento, ban("(^|,)(?:c|b_[12])(,|$)", false)),
        (PurgeDialect::MagentoPlain, ban("((^|,)b_1(,|$))|((^|,)b_2(,|$))|((^|,)c(,|$))", false)),
        (PurgeDialect::Xkey, keys("b_1 b_2 c", false)),
    ] {
        assert_eq!(compile(&purges, delivery, DEFAULT_HEADER_LIMIT), CompiledBans { bans: vec![expected], folded: 1 });
    }
}

#[test]
fn a_tag_with_white_space_is_no_key() {
    let purges = [purge(tags(&["a b", "c", "d\u{a0}e"])), soft(tags(&["s"])), purge(pattern("f.g"))];
    let expected = [keys("c", false), ban("(^|,)(?:a\\x20b|d\u{a0}e)(,|$)", false), ban("f.g", false), keys("s", true)];
    assert_eq!(compile(&purges, PurgeDialect::Xkey, DEFAULT_HEADER_LIMIT).bans, expected);
}

#[test]
fn a_purge_of_all_absorbs_whatever_is_no_request_of_somebody_elses() {
    let purges = [
        purge(tags(&["a", "b"])),
        soft(Target::Everything),
        purge(pool("p")),
        purge(Target::All),
        soft(pattern("a.c")),
        purge(Target::Forward(forward("/x"))),
    ];
    for delivery in FORMS {
        let batch = compile(&purges, delivery, DEFAULT_HEADER_LIMIT);
        assert_eq!(batch.bans, [Ban::Everything, Ban::Forward(forward("/x"))]);
    }
}

#[test]
fn a_flush_absorbs_tags_and_patterns_but_no_pool_and_no_url() {
    let purges = [
        purge(tags(&["a", "b"])),
        soft(pattern("a.c")),
        soft(tags(&["c"])),
        soft(Target::Everything),
        Purge { targets: vec![Target::Everything, pool("p")], soft: false },
        purge(Target::Forward(forward("/x"))),
        purge(Target::Forward(forward("/y"))),
        purge(Target::Forward(forward("/x"))),
    ];
    let pool = Ban::Pool { pattern: "p".into(), soft: false };
    let (x, y) = (Ban::Forward(forward("/x")), Ban::Forward(forward("/y")));
    for delivery in FORMS {
        let batch = compile(&purges, delivery, DEFAULT_HEADER_LIMIT);
        assert_eq!(batch, CompiledBans { bans: vec![ban(".*", false), pool.clone(), x.clone(), y.clone()], folded: 3 });
    }
}

#[test]
fn a_soft_flush_leaves_hard_purges_hard() {
    let purges = [purge(tags(&["a"])), soft(tags(&["a", "b"])), soft(Target::Everything)];
    let expected = CompiledBans { bans: vec![ban("(^|,)a(,|$)", false), ban(".*", true)], folded: 2 };
    assert_eq!(magento(&purges), expected);
}

#[test]
fn what_is_purged_hard_is_not_purged_softly_too() {
    let purges = [
        soft(tags(&["a", "b", "d"])),
        purge(tags(&["b", "c"])),
        soft(pattern("x.")),
        purge(pattern("x.")),
        soft(pool("p")),
        purge(pool("p")),
    ];
    let pool = Ban::Pool { pattern: "p".into(), soft: false };
    let bans = vec![ban("(^|,)[bc](,|$)", false), ban("x.", false), pool, ban("(^|,)[ad](,|$)", true)];
    assert_eq!(magento(&purges), CompiledBans { bans, folded: 1 });
}

#[test]
fn nothing_purged_is_no_ban() {
    for delivery in FORMS {
        assert_eq!(compile(&[], delivery, DEFAULT_HEADER_LIMIT), CompiledBans { bans: vec![], folded: 0 });
    }
}

#[test]
fn what_no_header_can_carry_becomes_a_ban_of_everything() {
    let long = "x".repeat(DEFAULT_HEADER_LIMIT + 1);
    let forward = forward("/x");
    for delivery in FORMS {
        for target in [pattern(&long), pool(&long), tags(&["a", &long])] {
            let purges = [purge(target), soft(tags(&["b"])), purge(Target::Forward(forward.clone()))];
            let bans = compile(&purges, delivery, DEFAULT_HEADER_LIMIT).bans;
            assert_eq!(bans, [Ban::Everything, Ban::Forward(forward.clone())]);
        }
    }
}

#[test]
fn a_regular_expression_of_tags_is_never_longer_than_pcre2_takes() {
    let set: Vec<String> = (0..20_000).map(|id| format!("cat_p_{}", id * 37)).collect();
    let target = Target::Tags(set.iter().map(String::as_str).collect());
    for delivery in [PurgeDialect::Magento, PurgeDialect::MagentoPlain] {
        for ban in compile(&[purge(target.clone())], delivery, 65_536).bans {
            let Ban::Tags { pattern, .. } = ban else { panic!("{ban:?}") };
            assert!(pattern.len() <= trie::MAX_PATTERN && Regex::new(&pattern).is_ok());
        }
    }
    let [Ban::Keys { keys, .. }, ..] = &compile(&[purge(target)], PurgeDialect::Xkey, 65_536).bans[..] else {
        panic!()
    };
    assert!(keys.len() > 65_500);
}

/// A page in a node's cache. Without a tag it has no tag header.
#[derive(Clone, Debug)]
struct StoredPage {
    tags: BTreeSet<String>,
    pool: &'static str,
}

/// The fate of a page. Later ones are stronger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Kept,
    Stale,
    Gone,
}

fn dropped(soft: bool) -> Fate {
    if soft { Fate::Stale } else { Fate::Gone }
}

impl StoredPage {
    fn header(&self) -> Option<String> {
        let tags: Vec<&str> = self.tags.iter().map(String::as_str).collect();
        (!tags.is_empty()).then(|| tags.join(","))
    }

    /// The page's fate according to the purges, target by target.
    fn purged(&self, purges: &[Purge]) -> Fate {
        let is_named = |target: &Target| match target {
            Target::All => true,
            Target::Everything => !self.tags.is_empty(),
            Target::Tags(tags) => tags.iter().any(|tag| self.tags.contains(tag)),
            Target::Pattern(pattern) => matches(pattern.as_str(), self.header()),
            Target::Pool(pattern) => matches(pattern.as_str(), Some(self.pool.to_owned())),
            Target::Forward(_) => false,
        };
        let fate = |purge: &Purge| if purge.targets.iter().any(is_named) { dropped(purge.soft) } else { Fate::Kept };
        purges.iter().map(fate).max().unwrap_or(Fate::Kept)
    }

    /// The page's fate according to the bans.
    fn banned(&self, bans: &[Ban]) -> Fate {
        let fate = |ban: &Ban| {
            let (is_banned, soft) = match ban {
                Ban::Tags { pattern, soft } => (matches(pattern, self.header()), *soft),
                Ban::Pool { pattern, soft } => (matches(pattern, Some(self.pool.to_owned())), *soft),
                Ban::Keys { keys, soft } => (keys.split(' ').any(|key| self.tags.contains(key)), *soft),
                Ban::Everything => (true, false),
                Ban::Forward(_) => (false, false),
            };
            if is_banned { dropped(soft) } else { Fate::Kept }
        };
        bans.iter().map(fate).max().unwrap_or(Fate::Kept)
    }
}

fn matches(pattern: &str, header: Option<String>) -> bool {
    header.is_some_and(|header| Regex::new(pattern).unwrap().is_match(header.as_bytes()).unwrap())
}

/// A small alphabet, so that tags collide: each character is special somewhere, and two multibyte ones begin alike.
fn a_tag() -> impl Strategy<Value = String> {
    prop_oneof![3 => "[ab1_]{1,4}", 1 => "[ab \"'#:=-]{1,4}", 1 => "[aäö\u{a0}]{1,3}"]
}

fn a_target() -> impl Strategy<Value = Target> {
    let pool_name = prop::sample::select(vec!["shop", "^sho", "other", ".*"]);
    let regex = prop::sample::select(vec!["a.", "^b", "1$", "a|b_", "(^|,)a b(,|$)", "[^a]", "x"]);
    let path = prop::sample::select(vec!["/a", "/b"]);
    prop_oneof![
        1 => Just(Target::Everything),
        12 => prop::collection::vec(a_tag(), 1..12).prop_map(|tags| {
            Target::Tags(tags.iter().map(String::as_str).collect())
        }),
        2 => regex.prop_map(pattern),
        2 => pool_name.prop_map(pool),
        2 => path.prop_map(|path| Target::Forward(forward(path))),
    ]
}

fn a_purge() -> impl Strategy<Value = Purge> {
    let targets = prop::collection::vec(a_target(), 1..3);
    (targets, any::<bool>()).prop_map(|(targets, soft)| Purge { targets, soft })
}

fn a_page() -> impl Strategy<Value = StoredPage> {
    let tags = prop::collection::btree_set(a_tag(), 0..6);
    (tags, prop::sample::select(vec!["shop", "another"])).prop_map(|(tags, pool)| StoredPage { tags, pool })
}

fn sizes(bans: &[Ban]) -> Vec<usize> {
    let size = |ban: &Ban| match ban {
        Ban::Tags { pattern: value, .. } | Ban::Pool { pattern: value, .. } | Ban::Keys { keys: value, .. } => {
            value.len()
        }
        Ban::Everything | Ban::Forward(_) => 0,
    };
    bans.iter().map(size).collect()
}

/// Whatever the form, a tag pattern is one word of the request.
fn assert_one_word(bans: &[Ban]) {
    for ban in bans {
        if let Ban::Tags { pattern, .. } = ban {
            assert!(!pattern.contains([' ', '\t', '"', '\'', '#']), "{pattern}");
        }
    }
}

proptest! {
    #[test]
    fn a_batch_drops_exactly_what_its_purges_name(
        purges in prop::collection::vec(a_purge(), 0..12),
        pages in prop::collection::vec(a_page(), 1..12),
        limit in 28_usize..200,
    ) {
        for delivery in FORMS {
            let CompiledBans { bans, .. } = compile(&purges, delivery, limit);
            prop_assert!(sizes(&bans).iter().all(|size| *size <= limit), "{bans:?}");
            assert_one_word(&bans);
            // The longest tag fits: four escaped characters in Magento's form.
            prop_assert!(!bans.contains(&Ban::Everything));
            for page in &pages {
                prop_assert_eq!(page.banned(&bans), page.purged(&purges), "{:?} by {:?}", page, bans);
            }
            let asked: BTreeSet<&Forward> = purges.iter().flat_map(|purge| &purge.targets).filter_map(|target| {
                if let Target::Forward(forward) = target { Some(forward) } else { None }
            }).collect();
            let sent: Vec<&Forward> =
                bans.iter().filter_map(|ban| if let Ban::Forward(forward) = ban { Some(forward) } else { None }).collect();
            prop_assert_eq!(sent, asked.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_tag_is_written_once_and_counted_as_folded_otherwise(purges in prop::collection::vec(a_purge(), 0..12)) {
        let named: usize = purges.iter().flat_map(|purge| &purge.targets).map(|target| {
            if let Target::Tags(tags) = target { tags.iter().count() } else { 0 }
        }).sum();
        // In this form the tags that were written can be counted.
        let CompiledBans { bans, folded } = compile(&purges, PurgeDialect::MagentoPlain, DEFAULT_HEADER_LIMIT);
        let written: usize = bans.iter().map(|ban| match ban {
            Ban::Tags { pattern, .. } => pattern.matches(BEFORE).count(),
            _ => 0,
        }).sum();
        prop_assert_eq!(folded as usize, named - written);
    }
}

/// Sets in which many tags are prefixes of others and ids lie as in a shop.
fn many_tags() -> impl Strategy<Value = BTreeSet<String>> {
    let id = prop_oneof![0_u32..300, 0_u32..60_000];
    let tag = prop_oneof![
        8 => (prop::sample::select(vec!["cat_p_", "cat_c_p_", "cms_b_", ""]), id)
            .prop_map(|(kind, id)| format!("{kind}{id}")),
        1 => a_tag(),
        1 => "a{1,60}",
    ];
    prop_oneof![prop::collection::btree_set(tag.clone(), 1..50), prop::collection::btree_set(tag, 1..5_000)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn thousands_of_tags_match_exactly_the_pages_that_have_one(
        purged in many_tags(),
        others in prop::collection::vec(a_tag(), 1..40),
        limit in prop_oneof![100_usize..1_000, 1_000_usize..65_536],
    ) {
        let set: TagSet = purged.iter().map(String::as_str).collect();
        // Pages with a purged tag, and with similar tags: longer, shorter, the next one.
        let near = purged.iter().step_by(1 + purged.len() / 20).flat_map(|tag| {
            let last = tag.char_indices().last().map_or(0, |(at, _)| at);
            [tag.clone(), format!("{tag}0"), tag[..last].to_owned(), format!("{}9", &tag[..last]), format!("x{tag}")]
        });
        let pages: Vec<String> = near.chain(others).filter(|tag| !tag.is_empty()).collect();
        for delivery in FORMS {
            let CompiledBans { bans, folded } = compile(&[purge(Target::Tags(set.clone()))], delivery, limit);
            prop_assert_eq!(folded, 0);
            prop_assert!(sizes(&bans).iter().all(|size| *size <= limit));
            assert_one_word(&bans);
            let nodes: Vec<StoredBan> = bans.iter().map(StoredBan::of).collect();
            for (page, neighbour) in pages.iter().zip(pages.iter().cycle().skip(1)) {
                let expected = purged.contains(page) || purged.contains(neighbour);
                let dropped = nodes.iter().any(|node| node.drops(&[page, neighbour]));
                prop_assert_eq!(dropped, expected, "{:?} with {:?} by {:?}", page, neighbour, delivery);
            }
        }
    }
}

/// A ban as a node holds it: compiled once.
enum StoredBan<'b> {
    Ban(Regex),
    Keys(BTreeSet<&'b str>),
}

impl<'b> StoredBan<'b> {
    fn of(ban: &'b Ban) -> Self {
        match ban {
            Ban::Tags { pattern, .. } => StoredBan::Ban(Regex::new(pattern).unwrap()),
            Ban::Keys { keys, .. } => StoredBan::Keys(keys.split(' ').collect()),
            other => panic!("{other:?}"),
        }
    }

    fn drops(&self, tags: &[&str]) -> bool {
        match self {
            StoredBan::Ban(regex) => regex.is_match(tags.join(",").as_bytes()).unwrap(),
            StoredBan::Keys(keys) => tags.iter().any(|tag| keys.contains(tag)),
        }
    }
}

/// Tags that branch late and often, for tries of the greatest depth.
fn entangled() -> impl Strategy<Value = BTreeSet<String>> {
    let tag = prop_oneof!["[ab]{1,24}", "(cat_p_)?[0-9]{1,9}", "a{1,60}", "[a ]{0,8}b{0,3}c"];
    prop::collection::btree_set(tag, 1..160)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn no_ban_of_tags_comes_near_the_limits_of_varnish(
        purged in entangled(), others in entangled(), header_limit in prop_oneof![Just(500_usize), Just(7_680), Just(64_000)],
    ) {
        let set: TagSet = purged.iter().map(String::as_str).collect();
        let purges = [purge(Target::Tags(set))];
        let list = |tags: &BTreeSet<String>, between: &str| tags.iter().cloned().collect::<Vec<_>>().join(between);
        let long = list(&purged, ",").repeat(1 + 4_000 / (1 + list(&purged, ",").len()));
        let subjects = [list(&others, ","), list(&others, "!,"), list(&purged, "!,"), list(&purged, "a,") + "!", long + "!"];
        for delivery in [PurgeDialect::Magento, PurgeDialect::MagentoPlain] {
            for ban in compile(&purges, delivery, header_limit).bans {
                let Ban::Tags { pattern, .. } = ban else { panic!("no tags: {ban:?}") };
                let regex = crate::purge::pattern::limited(&pattern).unwrap();
                for subject in &subjects {
                    prop_assert!(regex.is_match(subject.as_bytes()).is_ok(), "{} on {}", pattern, subject);
                }
            }
        }
    }
}
