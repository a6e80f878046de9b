//! Patterns against a real varnishd: accepted ones harm no worker and match correctly, whatever tags a page has.

use crate::support::client::{Answer, exchange, get, purge};
use crate::support::fleet::{Fleet, Plan};

fn one() -> Fleet {
    Fleet::start(&Plan { varnish: 1, web: 1, ack_timeout: "20s", ..Plan::default() })
}

/// Sends a pattern, reads every page, and returns the status of the purge. No worker may have died.
fn harmless(fleet: &Fleet, pattern: &str) -> u16 {
    let pages = ["/p/1", "/p/2", "/p/3"];
    pages.iter().for_each(|page| fleet.warm(page));
    let worker = fleet.varnish[0].worker();
    let answer = purge(fleet.clearcoat.purge, pattern).expect("an answer");
    for page in pages {
        assert_eq!(get(fleet.varnish[0].address, page).expect("an answer").status, 200, "{pattern}");
    }
    assert_eq!(fleet.varnish[0].worker(), worker, "{pattern}: {}", fleet.varnish[0].adm(&["panic.show"]));
    answer.status
}

/// A page with 50 KiB of tags, one that provokes repeats, and one with a tag that is not UTF-8.
fn with_provoking_pages() -> Fleet {
    let fleet = one();
    let list: String = (0..4_500).map(|id| format!("cat_p_{id},")).collect();
    fleet.shop.set_tags(1, &(list + "z,q"));
    fleet.shop.set_tags(2, &format!("cat_p_2,{}!,{}", "a".repeat(250), "x".repeat(250)));
    fleet.shop.set_tags(3, &"ab,abab,aab,b,a_1,".repeat(300));
    fleet
}

#[test]
fn what_could_make_varnish_give_up_is_answered_400_and_no_worker_ends() {
    let fleet = with_provoking_pages();
    for pattern in [
        "^(a+)+$",
        "(x+x+)+y",
        "(.*,)*.*z9",
        "((cat_p_1|a|x|,|!)*)*9",
        "(a|aa)+$",
        "(?:[^,]*,)*zq",
        "([a-z]|,)*zq",
        "(*LIMIT_MATCH=1)cat_(p|q)_9",
        "(*UTF)cat_p_9",
        "(*NO_JIT)a.*zq",
        "c[^,]*t[^,]*p[^,]*zq",
        "a.{1,60}.{1,60}zq",
        "((a?){18}a{18}){2}",
        "(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)b",
        "^(?!.*zq)x",
        "(?R)a",
        "((((((((((((((((((((((cat))))))))))))))))))))))",
    ] {
        assert_eq!(harmless(&fleet, pattern), 400, "{pattern}");
    }
    assert_eq!(fleet.clearcoat.fleet()["head"], 0);
}

#[test]
fn what_is_accepted_harms_no_worker_on_any_page() {
    let fleet = with_provoking_pages();
    let nested = format!("{}cat_p_99999{}", "(".repeat(15), ")".repeat(15));
    let branches: Vec<String> = (0..280).map(|id| format!("((^|,)cat_p.{id}x(,|$))")).collect();
    for pattern in [
        "c.*p.*zq",
        "_.*_.*zq",
        "^.*p_1.*zq$",
        "a.*zq",
        ".*.*.*.*=",
        "c.*t.*p.*_.*zq",
        "[^,]*zq",
        "[a-z]+[0-9]x",
        "\\w+zq",
        "(c|t)?(a|t)?(p|y)?zq",
        "(cat|dog){0,3}_x",
        "(^|.*,)zq(,.*|$)",
        "(?i)CAT_P_99999,",
        "(?<=cat_)p_99999",
        &nested,
        &branches.join("|"),
    ] {
        assert_eq!(harmless(&fleet, pattern), 200, "{pattern}");
    }
}

#[test]
fn a_pattern_drops_the_pages_it_names_whatever_it_was_simplified_to() {
    let fleet = one();
    fleet.shop.set_tags(1, "cat_p_1,cat_p,cms_b_home");
    fleet.shop.set_tags(2, "cat_p_2,other");
    for (pattern, dropped) in [
        (".*cms_b.*", true),
        ("cms_(b|p)_.*", true),
        ("^cat_p_1", true),
        ("^cat_p,", false),
        ("(^|.*,)cat_p(,.*|$)", true),
        ("(^|,)(cms_b_home|x)(,|$)", true),
        ("cat_p_[0-9]+,cat_p,", true),
        ("cat_p_1.*home$", true),
        ("(?<=cms_)b_home", true),
        ("CMS_B", false),
        ("(?i)CMS_B", true),
        ("\\bcms_b_home\\b", true),
        ("\\Qcms_b_home\\E", true),
        ("[[:alpha:]]+_home", true),
    ] {
        fleet.warm("/p/1");
        fleet.warm("/p/2");
        assert_eq!(purge(fleet.clearcoat.purge, pattern).expect("an answer").status, 200, "{pattern}");
        assert_eq!(fleet.cached("/p/1"), [if dropped { "MISS" } else { "HIT" }], "{pattern}");
        let drops_other = pattern == "cat_p_1.*home$" && fleet.cached("/p/2") == ["MISS"];
        assert!(drops_other || fleet.cached("/p/2") == ["HIT"], "{pattern}");
    }
}

#[test]
fn tags_behind_blanks_and_in_chunks_torn_by_magento_2_3_are_purged() {
    let fleet = one();
    fleet.shop.set_tags(1, "a_1, b_1 ,my tag,\tc_1");
    for (pattern, dropped) in [
        ("((^|,)b_1(,|$))", true),
        ("((^|,)my tag(,|$))", true),
        ("((^|,)c_1(,|$))", true),
        (",)c_1(,|$))|((^", true),
        ("$))|((^|,)x(,|$))|((^|,)b_1(,", true),
        (",)x(,|$))|((^|,)y(,", false),
        ("$))", false),
    ] {
        fleet.warm("/p/1");
        assert_eq!(purge(fleet.clearcoat.purge, pattern).expect("an answer").status, 200, "{pattern}");
        assert_eq!(fleet.cached("/p/1"), [if dropped { "MISS" } else { "HIT" }], "{pattern}");
    }
}

#[test]
fn requests_that_no_varnish_takes_are_refused_before_the_journal() {
    let fleet = one();
    let send = |head: String| -> Answer { exchange(fleet.clearcoat.purge, head).expect("an answer") };
    let ban = |fields: &str| send(format!("BAN /p HTTP/1.1\r\nHost: a\r\n{fields}\r\n"));
    let long = "x".repeat(8_190);
    let many = |count: usize| (0..count).map(|id| format!("X-{id}: y\r\n")).collect::<String>();
    let nested = format!("X-Url: {}a{}\r\n", "(".repeat(120), ")".repeat(120));
    for (answer, status, text) in [
        (ban(&format!("X-Url: {long}\r\n")), 413, "http_req_hdr_len"),
        (ban(&many(60)), 413, "http_max_hdr"),
        (ban(&many(10_000)), 413, "more than 100 header fields"),
        (ban(&nested), 400, "x-url: at byte 16"),
        (ban("X-Url: ^/(a+)+$\r\n"), 400, "x-url: at byte 6"),
        (send("PURGE /p/a<b HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()), 400, "the request is malformed"),
        (send("PURGE a:80 HTTP/1.1\r\nHost: a\r\nX-Url: a\r\n\r\n".to_owned()), 400, "the request target"),
    ] {
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.json()["error"].as_str().is_some_and(|error| error.contains(text)), "{text}: {answer:?}");
    }
    assert_eq!(fleet.clearcoat.fleet()["head"], 0);
    // A pattern within the limits is accepted: Varnish itself answers.
    let answer = ban(&many(46));
    assert!(
        answer.status == 400 && answer.json()["error"].as_str().is_some_and(|error| error.contains("405")),
        "{answer:?}"
    );
    let answer = ban(&format!("X-Url: {}\r\n", &long[..8_100]));
    assert!(answer.json()["error"].as_str().is_some_and(|error| error.contains("405")), "{answer:?}");
}
