//! Who purges what: the admin listener, the metrics, the log and the command agree.

use crate::support::browser::Page;
use crate::support::clearcoat::run;
use crate::support::client::{exchange, get, purge, tag};
use crate::support::fleet::{Fleet, Plan};

/// The purge of a save of product 2046, as Magento wrote it: six tags, among them the bare `cat_p`.
const PRODUCT_SAVE: &[u8] = include_bytes!("data/magento/product-save-1.bin");
const FLUSH: &[u8] = include_bytes!("data/magento/flush-1.bin");

/// No Varnish is needed to purge, and without one the start costs nothing.
fn nobody(config: &'static str) -> Fleet {
    Fleet::start(&Plan { varnish: 0, web: 0, config, ..Plan::default() })
}

fn purges(fleet: &Fleet) -> serde_json::Value {
    get(fleet.clearcoat.admin, "/api/v1/purges").expect("an answer").json()
}

/// The totals of a row, without its time.
fn total(rows: &serde_json::Value, key: &str, value: &str) -> [u64; 3] {
    let row = rows.as_array().expect("rows").iter().find(|row| row[key] == value);
    let row = row.unwrap_or_else(|| panic!("no {value} in {rows}"));
    ["purges", "tags", "wide"].map(|column| row[column].as_u64().expect("a number"))
}

#[test]
fn who_empties_the_cache_is_in_the_api_the_metrics_the_log_and_the_table() {
    let fleet = nobody("");
    for request in [PRODUCT_SAVE, FLUSH, PRODUCT_SAVE] {
        assert_eq!(exchange(fleet.clearcoat.purge, request).expect("an answer").status, 200);
    }
    let url =
        "PURGE /p/1?key=secret1 HTTP/1.1\r\nHost: shop.test\r\nAuthorization: Bearer secret2\r\nX-Key: secret3\r\n\r\n";
    assert_eq!(exchange(fleet.clearcoat.purge, url).expect("an answer").status, 200);

    let report = purges(&fleet);
    assert_eq!(total(&report["sources"], "source", "127.0.0.1"), [4, 12, 3]);
    for (what, expected) in [
        ("cat_p", [2, 4, 2]),
        ("cat_c_p", [2, 6, 0]),
        ("cms_b", [2, 2, 0]),
        ("everything", [1, 0, 1]),
        ("url", [1, 0, 0]),
    ] {
        assert_eq!(total(&report["what"], "what", what), expected, "{what}");
    }
    let newest = report["newest"].as_array().expect("a list");
    let positions: Vec<_> = newest.iter().map(|entry| entry["position"].as_u64()).collect();
    assert_eq!(positions, [Some(4), Some(3), Some(2), Some(1)]);
    let (save, of_url) = (&newest[3], &newest[0]);
    assert_eq!(save["families"], serde_json::json!({"cat_c_p": 3, "cat_p": 2, "cms_b": 1}));
    assert_eq!((&save["wide"], &save["result"]), (&serde_json::json!(["cat_p"]), &"applied".into()), "{save}");
    assert_eq!(of_url["sample"], serde_json::json!(["PURGE shop.test/p/1?… x-key"]));
    assert!(!report.to_string().contains("secret"), "{report}");

    for (series, value) in [
        ("purge_tags_total{family=\"cat_p\"}", 4.0),
        ("purge_sources_total{source=\"127.0.0.1\"}", 4.0),
        ("purge_wide_total{what=\"cat_p\"}", 2.0),
        ("purge_wide_total{what=\"everything\"}", 1.0),
        ("purges_waiting", 0.0),
    ] {
        assert_eq!(fleet.clearcoat.metric(&format!("clearcoat_{series}")), value, "{series}");
    }

    fleet.clearcoat.log().waits_for("a flush: every page");
    fleet.clearcoat.log().waits_for("a purge of every page with a product (bare tag cat_p)");
    let log = fleet.clearcoat.log().text();
    let told = |what: &str| {
        let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
        lines.filter(|line| line["message"] == what && line["level"] == "INFO").collect::<Vec<_>>()
    };
    let flush = told("a flush: every page");
    assert_eq!((flush.len(), &flush[0]["source"], &flush[0]["position"]), (1, &"127.0.0.1".into(), &2.into()));
    // The second line is suppressed if it comes within a second of the first; on a slow machine it does not.
    let products = told("a purge of every page with a product (bare tag cat_p)");
    assert!((1..=2).contains(&products.len()), "{products:?}");
    assert_eq!((&products[0]["source"], &products[0]["left_out"]), (&"127.0.0.1".into(), &0.into()));

    let output = run(&["status", "--purges", "--admin", &format!("http://{}", fleet.clearcoat.admin)]);
    let table = String::from_utf8(output.stdout).expect("text");
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().take(4).collect()).collect();
    for row in [["127.0.0.1", "4", "12", "3"], ["cat_p", "2", "4", "2"], ["everything", "1", "0", "1"]] {
        assert!(rows.contains(&row.to_vec()), "no {row:?} in\n{table}");
    }
}

#[test]
fn a_fenced_node_is_named_and_a_refused_purge_is_nobodys() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 0, ..Plan::default() });
    fleet.varnish[1].hang();
    assert_eq!(purge(fleet.clearcoat.purge, &tag("cat_p_1")).expect("an answer").status, 200);
    let entry = purges(&fleet)["newest"][0].take();
    let expected = ("fenced", 1, serde_json::json!(["varnish-2"]));
    let (result, applied) = (entry["result"].as_str().expect("text"), entry["applied"].as_u64().expect("a number"));
    assert_eq!((result, applied, entry["fenced"].clone()), expected, "{entry}");
    // The purge waited for the hanging node.
    assert!(entry["duration_ms"].as_u64() >= Some(900), "{entry}");
    assert_eq!(purge(fleet.clearcoat.purge, "(").expect("an answer").status, 400);
    assert_eq!(total(&purges(&fleet)["sources"], "source", "127.0.0.1"), [1, 1, 0]);
    fleet.varnish[1].resume();

    let fleet = nobody("[purge]\nlisten = [\"127.0.0.1:0\"]\nallow = [\"192.0.2.0/24\"]\n");
    assert_eq!(purge(fleet.clearcoat.purge, ".*").expect("an answer").status, 403);
    assert_eq!(purges(&fleet), serde_json::json!({"sources": [], "what": [], "newest": []}));
}

#[test]
fn purges_sent_to_any_clearcoat_are_shown_and_who_is_silent_is_named() {
    let mut fleet = Fleet::start(&Plan { varnish: 1, web: 1, replicas: 2, ack_timeout: "15s", ..Plan::default() });
    assert_eq!(purge(fleet.clearcoat.purge, &tag("cat_p_1")).expect("an answer").status, 200);
    for name in ["cat_p_2", "cat_c_3"] {
        assert_eq!(purge(fleet.others[0].purge, &tag(name)).expect("an answer").status, 200);
    }
    let said = get(fleet.clearcoat.admin, "/api/v1/purges/all").expect("an answer").json();
    let replicas = said["replicas"].as_array().expect("a list").iter();
    let ids: Vec<&str> = replicas.map(|of| of["id"].as_str().expect("text")).collect();
    assert_eq!((ids, &said["missing"]), (vec!["clearcoat-1", "clearcoat-2"], &serde_json::json!([])));
    let table = |fleet: &Fleet| {
        let admin = format!("http://{}", fleet.clearcoat.admin);
        String::from_utf8(run(&["status", "--purges", "--admin", &admin]).stdout).expect("text")
    };
    let has = |table: &str, row: [&str; 3]| {
        table.lines().any(|line| line.split_whitespace().take(3).collect::<Vec<_>>() == row)
    };
    let both = table(&fleet);
    for row in [["127.0.0.1", "3", "3"], ["cat_p", "2", "2"], ["cat_c", "1", "1"]] {
        assert!(has(&both, row), "no {row:?} in\n{both}");
    }
    let mut page = Page::open(fleet.clearcoat.admin, "/");
    let row = page.waits_for("#purges", "to clearcoat-2");
    assert!(row.contains("cat_p_1") && row.contains("cat_p_2") && row.contains("cat_c_3"), "{row}");
    fleet.replica(1).kill();
    let one = table(&fleet);
    assert!(has(&one, ["127.0.0.1", "1", "1"]), "{one}");
    assert!(one.contains("Not in these tables: what was sent to clearcoat-2 ("), "{one}");
    page.waits_for("#purges-of", "all clearcoats but clearcoat-2");
}
