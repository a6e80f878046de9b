//! Purges that a Varnish refuses, though it accepts others: reported to their sender, without taking the cache out of
//! traffic. Conversely, a Varnish that accepts no purge gets credit for none.

use std::path::Path;
use std::thread;

use serde_json::json;

use crate::support::client::{Answer, exchange};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

const NODES: [&str; 2] = ["varnish-1", "varnish-2"];

/// Reactions of other VCLs to a `BAN`, selected by a header.
fn takes_bans_in_odd_ways(vcl: &str, _id: &str, _folder: &Path) -> String {
    let rule = "sub vcl_recv {\n    if (req.method == \"BAN\") {\n        \
         if (req.http.X-Odd ~ \"piped\") { return (pipe); }\n        \
         if (req.http.X-Odd ~ \"refused\") { return (synth(403, \"No\")); }\n        \
         if (req.http.X-Odd ~ \"failed\") { return (synth(501, \"Not implemented\")); }\n        \
         if (req.http.X-Odd ~ \"closed\") { set req.http.Connection = \"close\"; return (fail); }\n        \
         if (req.http.X-Odd ~ \"stuck\") { vtc.sleep(3s); }\n        \
         return (synth(200, \"Banned\"));\n    }\n";
    vcl.replacen("sub vcl_recv {\n", rule, 1).replacen("import std;", "import std;\nimport vtc;", 1)
}

/// Refuses everything while a file exists, as after the deployment of a wrong ACL.
fn second_can_refuse(vcl: &str, id: &str, folder: &Path) -> String {
    if id != "varnish-2" {
        return vcl.to_owned();
    }
    let rule = format!(
        "sub vcl_recv {{\n    if (req.method == \"PURGE\" && std.file_exists(\"{}\")) {{\n        \
         return (synth(405, \"Not allowed\"));\n    }}\n",
        folder.join("refuses").display()
    );
    vcl.replacen("sub vcl_recv {\n", &rule, 1)
}

fn ban(fleet: &Fleet, odd: &str) -> Answer {
    let request = format!("BAN / HTTP/1.1\r\nHost: shop.test\r\nX-Odd: {odd}\r\n\r\n");
    exchange(fleet.clearcoat.purge, request).expect("an answer")
}

fn purge_url(fleet: &Fleet, path: &str) -> Answer {
    let request = format!("PURGE {path} HTTP/1.1\r\nHost: shop.test\r\n\r\n");
    exchange(fleet.clearcoat.purge, request).expect("an answer")
}

fn all_current(fleet: &Fleet) {
    eventually("every Varnish is current", || {
        NODES.iter().all(|node| fleet.clearcoat.node(node)["current"] == true).then_some(())
    });
}

#[test]
fn a_request_that_every_varnish_refuses_gets_400_and_disables_none() {
    let fleet = Fleet::start(&Plan { varnish: 2, vcl: takes_bans_in_odd_ways, ack_timeout: "10s", ..Plan::default() });
    assert_eq!(ban(&fleet, "fine").json()["applied"], json!(NODES));
    for odd in ["piped", "refused", "failed", "closed", "stuck"] {
        // Two at once: on one connection, the second is lost with the first.
        let answers: Vec<Answer> = thread::scope(|scope| {
            let senders: Vec<_> = (0..2)
                .map(|n| {
                    scope.spawn({
                        let fleet = &fleet;
                        move || ban(fleet, &format!("{odd} {n}"))
                    })
                })
                .collect();
            senders.into_iter().map(|sender| sender.join().expect("an answer")).collect()
        });
        for answer in &answers {
            assert_eq!(answer.status, 400, "{odd}: {answer:?}");
            assert!(answer.text().contains("though they take others"), "{odd}: {answer:?}");
        }
        assert_eq!(fleet.purge_tag("cat_p_1").json()["applied"], json!(NODES), "{odd}");
        all_current(&fleet);
    }
    let passed_over =
        fleet.clearcoat.metric("clearcoat_purge_deliveries_total{node=\"varnish-1\",result=\"passed_over\"}");
    assert_eq!(passed_over, 10.0);
    assert!(fleet.clearcoat.log().has("\"sender\":\"127.0.0.1\""));
}

#[test]
fn a_request_sent_while_every_varnish_hangs_is_promised_to_nobody() {
    let stock = |vcl: &str, id: &str, folder: &Path| {
        // Magento's VCL knows no complete flush, and does not say that it has carried one out.
        takes_bans_in_odd_ways(vcl, id, folder).replace("X-Clearcoat-Flush", "X-Unknown")
    };
    let fleet = Fleet::start(&Plan { varnish: 2, vcl: stock, ..Plan::default() });
    fleet.varnish.iter().for_each(|varnish| varnish.hang());
    let answers = ["piped 1", "piped 2", "fine"].map(|odd| ban(&fleet, odd));
    for answer in &answers {
        assert_eq!(answer.status, 504, "{answer:?}");
        assert!(answer.text().contains("none of 2 Varnish has taken this request"), "{answer:?}");
    }
    fleet.varnish.iter().for_each(|varnish| varnish.resume());
    all_current(&fleet);
    assert_eq!(fleet.purge_tag("cat_p_1").json()["applied"], json!(NODES));
    assert_eq!(fleet.clearcoat.metric("clearcoat_purges_total{kind=\"url\",result=\"untaken\"}"), 3.0);
}

#[test]
fn a_url_refused_by_a_wrong_acl_is_purged_once_the_acl_is_right() {
    let fleet = Fleet::start(&Plan { varnish: 2, vcl: second_can_refuse, ..Plan::default() });
    let pages: Vec<String> = (1..=9).map(|page| format!("/p/{page}")).collect();
    pages.iter().for_each(|page| fleet.warm(page));
    let refuses = fleet.folder.path().join("refuses");
    std::fs::write(&refuses, "").expect("a file in our folder");
    eventually("it is down", || (fleet.clearcoat.node("varnish-2")["health"] == "down").then_some(()));
    for (number, page) in pages.iter().enumerate() {
        fleet.shop.set(number as u64 + 1, 7);
        let answer = purge_url(&fleet, page);
        assert_eq!(answer.json()["fenced"], json!(["varnish-2"]), "{answer:?}");
    }
    std::fs::remove_file(&refuses).expect("our file");
    all_current(&fleet);
    for page in &pages {
        assert_eq!(fleet.varnish[1].get(page).text(), "7", "{page}");
    }
}
