//! The accepted patterns, their rewritten form, and that no header makes them exceed Varnish's limits.

use pcre2::bytes::{Regex, RegexBuilder};
use proptest::prelude::*;

use super::*;

fn written(pattern: &str) -> String {
    Pattern::new(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}")).as_str().to_owned()
}

fn is_wider(pattern: &str) -> bool {
    Pattern::read(pattern.as_bytes()).unwrap().is_wider
}

fn refusal(pattern: &str) -> String {
    Pattern::new(pattern).expect_err(pattern).to_string()
}

#[test]
fn what_people_send_stays_as_it_came() {
    for pattern in [
        "cat_p_[0-9]+,",
        "^cat_",
        "cat_p_1(,|$)",
        "((^|,)cat_p_1.2(,|$))",
        "(^|,)(a|b|c)(,|$)",
        "(^|,)(?:cat_p_(?:1|2)|cms_b_home)(,|$)",
        "cms_(b|p)_1",
        "cat_p_[^,]*_9",
        "^shop1\\.example\\.com$",
        "(?i)SHOP",
        "a&&b",
        "&&",
        "cat_c_(1[0-9]{2}|2)(,|$)",
        "cat_p_1$|!",
        "(?<=cat_)p_1",
        "cat_p_(?!1,)",
        "\\bcat_p_1\\b",
        "[-a]x",
        "x{2}y",
    ] {
        let expected = pattern.replace("[-a]", "[\\-a]");
        assert_eq!((written(pattern).as_str(), is_wider(pattern)), (&*expected, false));
    }
    // Magento's form with hundreds of tags, one of which is not literal.
    let tags: Vec<String> = (0..300).map(|id| format!("((^|,)cat_p.{id}(,|$))")).collect();
    assert_eq!(written(&tags.join("|")), tags.join("|"));
}

#[test]
fn what_a_search_does_by_itself_is_left_out() {
    for (pattern, expected) in [
        (".*", ".*"),
        ("^.*$", ".*"),
        ("(.*)", ".*"),
        (".*|cat_p_1", ".*"),
        (".+", "."),
        (".*foo.*", "foo"),
        ("^.*foo.*$", "foo"),
        (".*?foo.+?", "foo."),
        ("cms_(b|p)_.*", "cms_(b|p)_"),
        ("cat_p_[0-9]+", "cat_p_[0-9]"),
        ("(^|.*,)cat_p_1(,.*|$)", "(^|,)cat_p_1(,|$)"),
        ("(.*,)cat_p_1|.*b", "(,)cat_p_1|b"),
    ] {
        assert_eq!((written(pattern).as_str(), is_wider(pattern)), (expected, false), "{pattern}");
    }
}

#[test]
fn a_gap_between_two_parts_leaves_the_part_that_says_more() {
    for (pattern, expected) in [
        ("cat_p_.*_1", "cat_p_"),
        ("c.*cms_block_12", "cms_block_12"),
        ("^a.*bc.*d$", "bc"),
        ("(foo.*ba|x.{0,100}yz)", "(foo|yz)"),
        ("((^|,)cat_p_.*(,|$))", "((^|,)cat_p_)"),
        ("^[^x]*foo", "foo"),
        ("cat_(p.*1|c)", "cat_(p|c)"),
        ("(a.*b|c)d", "(b|c)d"),
    ] {
        assert_eq!((written(pattern).as_str(), is_wider(pattern)), (expected, true), "{pattern}");
    }
}

#[test]
fn every_byte_stands_for_itself_and_in_ascii() {
    for (pattern, expected) in [
        ("foo bar", "foo\\x20bar"),
        ("foo\\ bar", "foo\\x20bar"),
        ("foo\\\\ bar", "foo\\\\\\x20bar"),
        ("[ \t]\"x", "[\\x09\\x20]\\x22x"),
        ("\\Qa b.\\E c", "a\\x20b\\.\\x20c"),
        ("\\Qab\\E+c", "ab+c"),
        ("a#'b", "a\\x23\\x27b"),
        ("\u{e4}", "\\xc3\\xa4"),
        ("\\d\\w[^\\W_]x", "[0-9][0-9A-Z_a-z][0-9A-Za-z]x"),
        ("[[:alpha:]]\\x2c", "[A-Za-z],"),
        ("a]}", "a\\]\\}"),
        ("x[\\d\\D][^\\d\\D]y", "x[\\x00-\\xff][^\\x00-\\xff]y"),
    ] {
        assert_eq!(written(pattern), expected);
    }
    let Ok(latin) = Pattern::read(b"caf\xe9,") else { panic!("refused") };
    assert_eq!(latin.patterns[0].as_str(), "caf\\xe9,");
}

#[test]
fn what_makes_a_worker_panic_is_refused_with_its_place() {
    for (pattern, at) in [
        ("^(a+)+$", "at byte 5: a group that may repeat"),
        ("(x+x+)+y", "at byte 6: a group"),
        ("(.*,)*.*z9", "at byte 5: a group"),
        ("((cat_p_1|a|x|,|!)*)*9", "at byte 18: a group"),
        ("(?:a|b){2,}c", "at byte 7: a group"),
        ("(?:[a-z]{1,30}){1,30}9", "at byte 15: "),
        ("1[^,]*[^,]*9", "at byte 10: "),
        ("c\\w+\\d+x", "at byte 6: "),
        ("c.{1,60}.{1,60}zq", "at byte 9: "),
        ("(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?(a|b)?c", "at byte "),
        ("(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)b", "at byte "),
        ("^(?!.*cms).*", "at byte 5: a repeat that passes commas"),
        ("^(.*foo|bar)", "at byte 3: a repeat"),
        ("(,.*)?x(.*b)?c", "at byte 3: a repeat"),
        ("(((((((((((((((((((((a)))))))))))))))))))))", "at byte 16: more than 16 groups"),
    ] {
        assert!(refusal(pattern).starts_with(at), "{pattern}: {}", refusal(pattern));
    }
}

#[test]
fn what_not_every_pcre_reads_alike_is_refused_with_its_place() {
    for (pattern, at) in [
        ("(?<=cat_p?_)1", "at byte 0: what a lookbehind finds"),
        ("(?<=t|at_p)_1", "at byte 0: what a lookbehind finds"),
        ("(?aD)cat_p_1", "at byte 0: (?aD is not"),
        ("(*scan_substring:(0)x)|cat_p_1", "at byte 0: (*sc is not"),
        ("(?<=a.{0,3}_)1", "at byte 0: what"),
        ("\\N{U+63}at_p_1", "at byte 0: \\N is not"),
        ("(?xx)cat_p_1", "at byte 0: "),
        ("[[:<:]]cat_p_1", "at byte 1: "),
        ("(?[\\w])at_p_1", "at byte 0: "),
        ("(*LIMIT_MATCH=1)cat_(p|q)_9", "at byte 0: "),
        ("(*UTF)cat_p_9", "at byte 0: "),
        ("(*NO_JIT)cat", "at byte 0: "),
        ("a(?i)b", "at byte 1: "),
        ("(?<n>a)\\k<n>", "at byte 0: "),
        ("(a)\\1", "at byte 3: "),
        ("a(?R)?b", "at byte 1: "),
        ("(?(1)a|b)", "at byte 0: "),
        ("(?>a)b", "at byte 0: "),
        ("a(?#x)", "at byte 1: "),
        ("(?C1)a", "at byte 0: "),
        ("\\Ca", "at byte 0: "),
        ("a\\Kb", "at byte 1: "),
        ("\\p{L}", "at byte 0: "),
        ("\\x{e9}", "at byte 0: "),
        ("\\o{12}", "at byte 0: "),
        ("\\012", "at byte 0: "),
        ("\\R", "at byte 0: "),
        ("a++b", "at byte 1: "),
        ("a{,3}b", "at byte 1: { is no quantifier"),
        ("a{ 1, 2 }b", "at byte 1: { is no quantifier"),
        ("a{2}{3}", "at byte 4: a quantifier behind a quantifier"),
        ("a{3,2}", "at byte 1: "),
        ("a{1001}", "at byte 1: "),
        ("^*a", "at byte 1: a quantifier behind something that takes no text"),
        ("*a", "at byte 0: a quantifier behind nothing"),
        ("\\Q\\E*", "at byte 4: a quantifier behind nothing"),
        ("[a-\\d]", "at byte 1: "),
        ("[z-a]", "at byte 1: "),
        ("a\\", "at byte 1: "),
        ("[]", "at byte 0: missing closing bracket"),
        ("((^|,)cat_p_1", "at byte 0: missing closing parenthesis"),
        ("a)b", "at byte 1: ) closes no group"),
        ("", "the pattern is empty"),
        ("a\u{1}", "control character at byte 1"),
        ("foo && req.url ~ x", "`&&` after white space at byte 4"),
        ("foo\t&&req.url", "`&&` after white space at byte 4"),
    ] {
        assert!(refusal(pattern).starts_with(at), "{pattern}: {}", refusal(pattern));
    }
}

#[test]
fn a_pattern_that_no_header_holds_is_cut_at_its_branches() {
    let branches: Vec<String> = (0..5_000).map(|id| format!("((^|,)cat.p_{id}(,|$))")).collect();
    let read = Pattern::read(branches.join("|").as_bytes()).unwrap();
    assert!(read.patterns.len() > 10 && read.patterns.iter().all(|pattern| pattern.as_str().len() <= LONGEST));
    let together: Vec<&str> = read.patterns.iter().flat_map(|pattern| pattern.as_str().split(")|(")).collect();
    assert_eq!(together.len(), branches.len());
    // An error is found in any branch.
    let bad = format!("{}|(a+)+", branches.join("|"));
    assert!(matches!(Pattern::read(bad.as_bytes()), Err(BadPattern::EndlessGroup(_))));
}

/// Plausible patterns: nested, repeated, overlapping.
fn patterns() -> impl Strategy<Value = String> {
    let atom = prop_oneof![
        4 => "[abc_,0-9]{1,4}",
        1 => Just(".".to_owned()),
        1 => Just("[^,]".to_owned()),
        1 => Just("[a-c]".to_owned()),
        1 => Just("\\d".to_owned()),
        1 => Just("\\w".to_owned()),
        1 => Just("[^a]".to_owned()),
        1 => Just("^".to_owned()),
        1 => Just("$".to_owned()),
        1 => Just("\\b".to_owned()),
        1 => Just(" ".to_owned()),
        1 => Just("\u{e4}".to_owned()),
        1 => Just("(^|,)".to_owned()),
        1 => Just("(,|$)".to_owned()),
    ];
    let quantifier = prop_oneof![
        6 => Just(""), 1 => Just("?"), 1 => Just("*"), 1 => Just("+"), 1 => Just("{2}"), 1 => Just("{0,3}"), 1 => Just("*?"),
        1 => Just("{1,40}"),
    ];
    atom.prop_recursive(5, 60, 6, move |inner| {
        let sequence = prop::collection::vec((inner, quantifier.clone()), 1..6)
            .prop_map(|items| items.into_iter().map(|(item, times)| item + times).collect::<String>());
        prop::collection::vec(sequence, 1..4).prop_flat_map(|branches| {
            let joined = branches.join("|");
            prop_oneof![
                Just(joined.clone()),
                Just(format!("({joined})")),
                Just(format!("(?:{joined})")),
                Just(format!("(?={joined})")),
                Just(format!("(?!{joined})")),
            ]
        })
    })
}

/// Tag lists over the same few letters, so that patterns match far before they fail.
fn headers() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[abc_,0-9 \u{e4}]{0,40}", 8)
}

fn naive(pattern: &str) -> Option<Regex> {
    RegexBuilder::new().build(pattern).ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn ours_finds_what_the_senders_finds_and_more_only_if_it_says_so(pattern in patterns(), headers in headers()) {
        let Ok(read) = Pattern::read(pattern.as_bytes()) else { return Ok(()) };
        let theirs = naive(&pattern).expect("ours is a part of PCRE2's language");
        let ours: Vec<Regex> = read.patterns.iter().map(|pattern| naive(pattern.as_str()).unwrap()).collect();
        for header in headers {
            let Ok(expected) = theirs.is_match(header.as_bytes()) else { continue };
            let found = ours.iter().any(|regex| regex.is_match(header.as_bytes()).unwrap());
            prop_assert!(found || !expected, "{:?} is lost by {:?}", header, read);
            prop_assert!(expected || !found || read.is_wider, "{:?} is found by {:?}", header, read);
        }
    }

    #[test]
    fn what_is_accepted_is_read_again_as_the_same(pattern in patterns()) {
        let Ok(read) = Pattern::read(pattern.as_bytes()) else { return Ok(()) };
        for pattern in read.patterns {
            let json = serde_json::to_string(&pattern).unwrap();
            prop_assert_eq!(serde_json::from_str::<Pattern>(&json).unwrap(), pattern.clone());
            prop_assert!(pattern.as_str().bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"'));
        }
    }

    #[test]
    fn no_header_makes_varnishs_limits_trip(pattern in patterns(), piece in "[abc_,0-9]{1,12}") {
        let Ok(read) = Pattern::read(pattern.as_bytes()) else { return Ok(()) };
        let many = 3_000 / piece.len();
        let subjects = [
            piece.repeat(many), format!("{}!", piece.repeat(many)), format!("{piece},").repeat(many),
            "a".repeat(250), "a".repeat(250) + "!", format!("{},", "a1_b".repeat(60)).repeat(10), "0".repeat(255) + ",",
        ];
        for pattern in &read.patterns {
            let regex = trial::limited(pattern.as_str()).unwrap();
            for subject in &subjects {
                prop_assert!(regex.is_match(subject.as_bytes()).is_ok(), "{:?} on {:?}", pattern, subject);
            }
        }
    }
}
