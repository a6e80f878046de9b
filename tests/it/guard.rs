//! The guard on the origin path: a page rendered before a purge that reaches Varnish after it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::client::{Answer, exchange, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::upstream::{Gate, Then, Upstream};

const GUARDED: bool = true;
const UNGUARDED: bool = false;

fn ours(vcl: &str, _id: &str, _folder: &Path) -> String {
    vcl.to_owned()
}

/// Magento's own VCL: our backend and ACL, its subroutines.
fn stock(vcl: &str, _id: &str, _folder: &Path) -> String {
    let (before, _) = vcl.split_once("sub vcl_recv").expect("a backend and an ACL before the subroutines");
    before.to_owned() + include_str!("data/magento-stock.vcl")
}

/// Our VCL, without the part that prevents revalidation.
fn revalidating(vcl: &str, _id: &str, _folder: &Path) -> String {
    let vcl = vcl.replace("unset bereq.http.If-None-Match;", "").replace("unset bereq.http.If-Modified-Since;", "");
    assert!(!vcl.contains("unset bereq.http.If-"), "{vcl}");
    vcl
}

fn fleet(vcl: fn(&str, &str, &Path) -> String, guard: bool) -> Fleet {
    // The seal would catch what the guard lets through.
    let config = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n";
    Fleet::start(&Plan { varnish: 1, web: 1, ack_timeout: "20s", guard, config, vcl, ..Plan::default() })
}

/// A PURGE with these header lines.
fn purge(fleet: &Fleet, target: &str, headers: &str) {
    let request = format!("PURGE {target} HTTP/1.1\r\nHost: shop.test\r\n{headers}\r\n");
    let answer = exchange(fleet.clearcoat.purge, request).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
}

fn marked(fleet: &Fleet) -> f64 {
    fleet.clearcoat.metric("clearcoat_guard_marked_total")
}

fn said(answer: &Answer) -> (&str, &str) {
    (answer.cache(), answer.text())
}

/// A page is rendered in version 0; then it changes to 1 and `purge` is answered; then a second client requests it, and
/// waits in Varnish for the same fetch; then the render arrives. Returns both answers.
fn overtake(fleet: &Fleet, page: u64, purge: impl Fn()) -> [Answer; 2] {
    let (path, shop, varnish) = (&*format!("/p/{page}"), &fleet.shop, &fleet.varnish[0]);
    std::thread::scope(|scope| {
        let gate = shop.hold(page);
        let first = scope.spawn(|| fleet.get(path));
        gate.holds(1);
        shop.set(page, 1);
        purge();
        let waiting = varnish.counter("MAIN.busy_sleep");
        let second = scope.spawn(|| fleet.get(path));
        eventually("the second reader waits", || (varnish.counter("MAIN.busy_sleep") > waiting).then_some(()));
        drop(gate);
        [first, second].map(|reader| reader.join().expect("a reader"))
    })
}

/// Purges page 1 to 5 in every way, each while it is rendered.
fn assert_no_old_page_is_stored(fleet: &Fleet, ways: &[(&str, &str)]) {
    for (page, (target, headers)) in (1..).zip(ways) {
        let [first, second] = overtake(fleet, page, || purge(fleet, target, headers));
        let of = format!("{target} {headers}");
        assert_eq!(said(&first), ("UNCACHEABLE", "0"), "{of}");
        assert_eq!(second.text(), "1", "{of}");
        let next = fleet.get(&format!("/p/{page}"));
        assert_eq!(said(&next), ("HIT", "1"), "{of}");
        assert_eq!(marked(fleet), page as f64, "{of}");
    }
}

/// The ways of Magento's own VCL.
fn ways() -> [(&'static str, &'static str); 4] {
    let tags = format!("X-Magento-Tags-Pattern: {}|{}\r\n", tag("cat_p_1"), tag("cms_b_1"));
    [
        ("/", tags.leak()),
        ("/", "X-Magento-Tags-Pattern: cat_p_[0-9]+,\r\n"),
        ("/", "X-Pool: ^shop$\r\n"),
        ("/", "X-Magento-Tags-Pattern: .*\r\n"),
    ]
}

#[test]
fn a_page_rendered_before_a_purge_is_not_served_after_its_answer() {
    let fleet = fleet(ours, GUARDED);
    let mut ways = ways().to_vec();
    ways.push(("/p/5", ""));
    assert_no_old_page_is_stored(&fleet, &ways);
}

#[test]
fn nor_is_it_with_magentos_own_vcl() {
    assert_no_old_page_is_stored(&fleet(stock, GUARDED), &ways());
}

#[test]
fn a_page_that_a_purge_does_not_concern_is_stored() {
    let fleet = fleet(ours, GUARDED);
    let other = format!("X-Magento-Tags-Pattern: {}\r\n", tag("cat_p_2"));
    let ways =
        [("/", &*other), ("/", "X-Magento-Tags-Pattern: cms_b_[0-9]\r\n"), ("/", "X-Pool: another\r\n"), ("/p/9", "")];
    for (page, (target, headers)) in (11..).zip(ways) {
        let [first, second] = overtake(&fleet, page, || purge(&fleet, target, headers));
        assert_eq!(said(&first), ("MISS", "0"), "{target} {headers}");
        assert_eq!(said(&second), ("HIT", "0"), "{target} {headers}");
    }
    assert_eq!(marked(&fleet), 0.0);
}

#[test]
fn without_the_guard_the_old_page_stays() {
    let fleet = fleet(ours, UNGUARDED);
    let [_, second] = overtake(&fleet, 1, || purge(&fleet, ways()[0].0, ways()[0].1));
    assert_eq!(said(&second), ("HIT", "0"));
    assert_eq!(said(&fleet.get("/p/1")), ("HIT", "0"));
    assert_eq!(marked(&fleet), 0.0);
}

/// A cached page expires; Varnish revalidates it and is answered 304; but before that answer arrives, the page changes
/// and is purged. Returns what a reader sees from then on.
fn revalidate(fleet: &Fleet, purged: &str) -> Answer {
    let shop = &fleet.shop;
    shop.revalidated.store(true, Ordering::SeqCst);
    assert_eq!(fleet.get("/p/1").text(), "0");
    let gate = shop.hold(1);
    eventually("Varnish asks whether the page has changed", || {
        assert_eq!(fleet.get("/p/1").text(), "0");
        (gate.held() == 1).then_some(())
    });
    shop.set(1, 1);
    purge(fleet, "/", &format!("X-Magento-Tags-Pattern: {}\r\n", tag(purged)));
    drop(gate);
    eventually("it heard that the page has not", || (shop.not_modified.load(Ordering::SeqCst) == 1).then_some(()));
    // Pages cached from now on do not expire.
    shop.revalidated.store(false, Ordering::SeqCst);
    fleet.get("/p/1")
}

#[test]
fn a_304_does_not_renew_a_page_that_was_purged_meanwhile() {
    for vcl in [revalidating, stock] {
        let fleet = fleet(vcl, GUARDED);
        assert_eq!(revalidate(&fleet, "cat_p_1").text(), "1");
        assert_eq!(said(&fleet.get("/p/1")), ("HIT", "1"));
        assert_eq!(marked(&fleet), 1.0);
    }
}

#[test]
fn without_the_guard_a_304_does() {
    let fleet = fleet(revalidating, UNGUARDED);
    assert_eq!(revalidate(&fleet, "cat_p_1").text(), "0");
}

/// A page whose head and first half have arrived when its tag is purged; its other half comes after the answer. Varnish
/// makes an object of a page with ESI only when it is complete.
#[test]
fn a_page_that_is_purged_while_its_body_comes_is_not_stored() {
    const TAGS: &str =
        "Content-Type: text/html\r\nCache-Control: public, max-age=86400\r\nX-Magento-Tags: cat_p_1,cat_p";
    for (framing, first, second) in [
        ("Content-Length: 8", "old ", "page"),
        ("Transfer-Encoding: chunked", "4\r\nold \r\n", "4\r\npage\r\n0\r\n\r\n"),
        ("Connection: close", "old ", "page"),
    ] {
        let (is_half_way, may_go_on) = (Gate::default(), Gate::default());
        let (half_way, go_on) = (is_half_way.clone(), may_go_on.clone());
        let is_first = AtomicBool::new(true);
        let web = Upstream::start(move |call| {
            if !is_first.swap(false, Ordering::SeqCst) {
                let page = format!("HTTP/1.1 200 OK\r\n{TAGS}\r\nContent-Length: 8\r\n\r\nnew page");
                return call.send_then(page, Then::KeepAlive);
            }
            call.send(format!("HTTP/1.1 200 OK\r\n{TAGS}\r\n{framing}\r\n\r\n{first}")).expect("sent");
            half_way.open();
            if !call.wait(&go_on) {
                return Then::Close;
            }
            call.send_then(second, if framing == "Connection: close" { Then::Close } else { Then::KeepAlive })
        });
        let node = format!("[[node]]\nrole = \"web\"\nid = \"slow\"\naddress = \"{}\"\n", web.address);
        let fleet = Fleet::start(&Plan { varnish: 1, web: 0, config: node.leak(), ..Plan::default() });
        let first = std::thread::scope(|scope| {
            let reader = scope.spawn(|| fleet.get("/p/1"));
            is_half_way.wait("half of the page has come");
            assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
            may_go_on.open();
            reader.join().expect("a reader")
        });
        assert_eq!(first.text(), "old page", "{framing}");
        let next = fleet.get("/p/1");
        assert_eq!(next.text(), "new page", "{framing}");
        assert_eq!(said(&fleet.get("/p/1")), ("HIT", "new page"), "{framing}");
    }
}
