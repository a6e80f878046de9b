//! Several clearcoats in front of one fleet, with a journal in etcd.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{Connection, exchange, get, purge, tag};
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};

/// Two replicas, two Varnish nodes.
fn plan() -> Plan {
    Plan { varnish: 2, replicas: 2, etcd: 1, journal: "etcd", ..Plan::default() }
}

fn read(clearcoat: &Clearcoat, path: &str) -> String {
    get(clearcoat.edge, path).expect("the edge answers").text().to_owned()
}

fn purge_by(clearcoat: &Clearcoat, name: &str) -> serde_json::Value {
    let answer = purge(clearcoat.purge, &tag(name)).expect("the purge listener answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// The heads of all journals.
fn heads(fleet: &Fleet) -> Vec<u64> {
    fleet.clearcoats().map(|clearcoat| clearcoat.fleet()["head"].as_u64().expect("a position")).collect()
}

/// Waits until every purge is in etcd, and all have the same journal.
fn same_journal(fleet: &Fleet) {
    eventually("all journals are one", || {
        let nothing_spooled = fleet.clearcoats().all(|clearcoat| clearcoat.fleet()["spooled"] == 0);
        (nothing_spooled && fleet.clearcoats().all(|clearcoat| clearcoat.fleet()["registry"].is_null())).then_some(())
    });
}

/// The number of purges in etcd.
fn purges_in_etcd(fleet: &mut Fleet) -> usize {
    fleet.etcd().list("/clearcoat/v1/purges/").keys().filter(|key| !key.ends_with("/floor")).count()
}

#[test]
fn a_purge_that_one_replica_answers_holds_behind_all_of_them() {
    let mut fleet = Fleet::start(&Plan { ack_timeout: "10s", ..plan() });
    fleet.warm("/p/1");
    let readers: Vec<Reader> =
        fleet.clearcoats().map(|clearcoat| Reader::start(clearcoat.edge, 1, Outage::None)).collect();
    for version in 1..=20 {
        fleet.shop.set(1, version);
        let clearcoat = fleet.replica(version as usize % 2);
        let answer = purge_by(clearcoat, "cat_p_1");
        assert_eq!(answer["applied"], serde_json::json!(["varnish-1", "varnish-2"]), "{answer}");
        assert!(answer["unconfirmed"].is_null(), "{answer}");
        readers.iter().for_each(|reader| reader.promise(version));
        let seen: Vec<String> = fleet.clearcoats().map(|clearcoat| read(clearcoat, "/p/1")).collect();
        assert_eq!(seen, [version.to_string(), version.to_string()]);
    }
    readers.into_iter().for_each(Reader::stop);
    // A position is the revision of its entry.
    let position = purge_by(&fleet.clearcoat, "cat_p_2")["position"].as_i64().expect("a position");
    let entries = fleet.etcd().entries("/clearcoat/v1/purges/");
    assert_eq!(entries.iter().map(|entry| entry.mod_revision()).max(), Some(position));
    assert_eq!(purges_in_etcd(&mut fleet), 21);
    eventually("both have it", || heads(&fleet).iter().all(|head| *head == position as u64).then_some(()));
}

#[test]
fn a_clearcoat_that_has_just_begun_tells_the_others_before_it_answers() {
    let mut fleet = Fleet::start(&Plan { ack_timeout: "30s", ..plan() });
    fleet.warm("/p/1");
    let (shop, other, known) = (fleet.shop.clone(), fleet.clearcoat.edge, fleet.journal_of(1).join("replicas.json"));
    let begins = fleet.replica(1);
    begins.kill();
    // It learns who was there when the test lets it.
    let content = std::fs::read(&known).expect("a file");
    std::fs::remove_file(&known).expect("a file");
    assert!(std::process::Command::new("mkfifo").arg(&known).status().expect("coreutils").success());
    shop.set(1, 1);
    begins.restart();
    let (listener, is_answered) = (begins.purge, AtomicBool::new(false));
    std::thread::scope(|scope| {
        let seen = scope.spawn(|| {
            let answer = purge(listener, &tag("cat_p_1")).expect("an answer");
            is_answered.store(true, Ordering::SeqCst);
            assert_eq!(answer.status, 200, "{answer:?}");
            get(other, "/p/1").expect("the edge answers").text().to_owned()
        });
        let is_there = || is_answered.load(Ordering::SeqCst) || begins.metric("clearcoat_purges_waiting") == 1.0;
        eventually("the purge is there", || is_there().then_some(()));
        // It has time enough to write it down.
        (0..100).for_each(|_| _ = begins.metric("clearcoat_purges_waiting"));
        assert!(!begins.log().text().contains("purge accepted"), "nobody could be told yet");
        // Whoever opens a pipe waits for the other end.
        std::fs::write(&known, content).expect("it is read");
        assert_eq!(seen.join().expect("no panic"), "1");
    });
}

#[test]
fn a_varnish_one_replica_could_not_purge_is_avoided_by_the_other_at_once() {
    let fleet = Fleet::start(&Plan { vcl: purges_can_fail, ..plan() });
    for page in 1..=40 {
        fleet.warm(&format!("/p/{page}"));
        fleet.shop.set(page, 7);
    }
    fail_purges(&fleet, "varnish-1", true);
    let tags: Vec<String> = (1..=40).map(|page| tag(&format!("cat_p_{page}"))).collect();
    let answer = purge(fleet.clearcoat.purge, &tags.join("|")).expect("an answer").json();
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-1"]), "{answer}");
    assert!(answer["unconfirmed"].is_null(), "{answer}");
    for page in 1..=40 {
        for clearcoat in fleet.clearcoats() {
            assert_eq!(read(clearcoat, &format!("/p/{page}")), "7");
        }
    }
    assert!(fleet.clearcoats().all(|clearcoat| clearcoat.node("varnish-1")["current"] == false));
    fail_purges(&fleet, "varnish-1", false);
    fleet.clearcoats().for_each(Clearcoat::current);
}

#[test]
fn what_a_replica_that_was_killed_had_accepted_is_delivered_by_the_other() {
    let mut fleet = Fleet::start(&Plan { vcl: purges_can_fail, ..plan() });
    fleet.warm("/p/1");
    fleet.shop.set(1, 7);
    ["varnish-1", "varnish-2"].iter().for_each(|node| fail_purges(&fleet, node, true));
    let head = heads(&fleet)[0];
    let mut magento = Connection::open(fleet.clearcoat.purge).expect("a connection");
    magento
        .send(format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {}\r\nHost: a\r\n\r\n", tag("cat_p_1")))
        .expect("sent");
    eventually("the purge is in etcd", || (fleet.etcd().list("/clearcoat/v1/purges/").len() == 1).then_some(()));
    fleet.clearcoat.kill();
    let began = Instant::now();
    ["varnish-1", "varnish-2"].iter().for_each(|node| fail_purges(&fleet, node, false));
    let other = &fleet.others[0];
    eventually("the other one has delivered it", || {
        let is_new = fleet.varnish.iter().all(|varnish| varnish.get("/p/1").text() == "7");
        (other.fleet()["head"].as_u64() > Some(head) && is_new).then_some(())
    });
    println!("delivered by the other {} ms after the kill", began.elapsed().as_millis());
    assert_eq!(read(other, "/p/1"), "7");
    // The dead one does not delay the next purge once it was noticed.
    purge_by(other, "cat_p_2");
    let began = Instant::now();
    let answer = purge_by(other, "cat_p_2");
    assert!(began.elapsed() < Duration::from_secs(1), "{answer} after {:?}", began.elapsed());
    fleet.clearcoat.restart();
    fleet.clearcoats().for_each(Clearcoat::ready);
    assert_eq!(read(&fleet.clearcoat, "/p/1"), "7");
    eventually("both have everything", || {
        let heads = heads(&fleet);
        (heads[0] == heads[1]).then_some(())
    });
}

#[test]
fn without_one_replica_varnish_fetches_through_the_other() {
    let mut fleet = Fleet::start(&plan());
    fleet.replica(1).kill();
    // At once, with pages that no Varnish has.
    for page in 1..=40 {
        assert_eq!(fleet.get(&format!("/p/{page}")).status, 200);
    }
    // A request that must not be retried goes to the right replica as soon as Varnish has noticed.
    eventually("every Varnish misses one", || {
        fleet.varnish.iter().all(|varnish| varnish.origins_up() == 1).then_some(())
    });
    for _ in 0..20 {
        let order = "POST /p/1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 1\r\n\r\nx";
        assert_eq!(exchange(fleet.clearcoat.edge, order).expect("an answer").status, 200);
    }
    fleet.replica(1).restart();
    fleet.origins_are_up();
}

#[test]
fn a_hung_replica_is_waited_for_once_and_resumes_without_old_pages() {
    let fleet = Fleet::start(&plan());
    fleet.warm("/p/1");
    let other = &fleet.others[0];
    crate::support::varnish::signal("-STOP", &[other.pid()]);
    fleet.shop.set(1, 1);
    let began = Instant::now();
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    let first = began.elapsed();
    assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
    assert!(first < Duration::from_secs(5), "{first:?}");
    let began = Instant::now();
    fleet.shop.set(1, 2);
    purge_by(&fleet.clearcoat, "cat_p_1");
    let next = began.elapsed();
    println!("a replica hangs: the first purge took {} ms, the next {} ms", first.as_millis(), next.as_millis());
    assert!(next < first, "{next:?}");
    assert!(fleet.clearcoat.metric("clearcoat_replica_unconfirmed_total") >= 2.0);
    crate::support::varnish::signal("-CONT", &[other.pid()]);
    fleet.know_each_other();
    assert_eq!(read(other, "/p/1"), "2");
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    assert!(answer["unconfirmed"].is_null(), "{answer}");
}

#[test]
fn purges_through_both_continue_without_etcd_and_both_end_up_with_all() {
    let mut fleet = Fleet::start(&plan());
    let pages = [1, 2];
    pages.iter().for_each(|page| fleet.warm(&format!("/p/{page}")));
    let readers: Vec<Reader> =
        fleet.clearcoats().map(|clearcoat| Reader::start(clearcoat.edge, 2, Outage::None)).collect();
    purge_by(&fleet.clearcoat, "cat_p_1");
    fleet.etcd().kill_all();
    let gone = Instant::now();
    // CLEARCOAT_OUTAGE_SECONDS makes it longer.
    let outage = std::env::var("CLEARCOAT_OUTAGE_SECONDS").map_or(3, |seconds| seconds.parse().expect("seconds"));
    let outage = Duration::from_secs(outage);
    let mut slowest = Duration::ZERO;
    let mut count = 1;
    for version in (1..).take_while(|version| *version <= 30 || gone.elapsed() < outage) {
        pages.iter().for_each(|page| fleet.shop.set(*page, version));
        let tags = pages.map(|page| tag(&format!("cat_p_{page}"))).join("|");
        let began = Instant::now();
        let clearcoat = fleet.replica(version as usize % 2);
        let answer = purge(clearcoat.purge, &tags).expect("an answer");
        assert_eq!(answer.status, 200, "{answer:?}");
        slowest = slowest.max(began.elapsed());
        count += 1;
        assert!(answer.json()["unconfirmed"].is_null(), "{answer:?}");
        readers.iter().for_each(|reader| reader.promise(version));
        for clearcoat in fleet.clearcoats() {
            for page in pages {
                assert_eq!(read(clearcoat, &format!("/p/{page}")), version.to_string());
            }
        }
    }
    println!("{} purges without etcd in {:?}, the slowest {} ms", count - 1, gone.elapsed(), slowest.as_millis());
    assert!(fleet.clearcoats().any(|clearcoat| clearcoat.fleet()["spooled"] != 0));
    fleet.etcd().restart_all();
    let back = Instant::now();
    same_journal(&fleet);
    println!("all purges are in etcd {} ms after it was back", back.elapsed().as_millis());
    assert_eq!(purges_in_etcd(&mut fleet), count);
    readers.into_iter().for_each(Reader::stop);
    // Later purges work as before.
    fleet.shop.set(1, 99_999);
    purge_by(&fleet.others[0], "cat_p_1");
    fleet.clearcoats().for_each(|clearcoat| assert_eq!(read(clearcoat, "/p/1"), "99999"));
}

#[test]
fn a_replica_started_without_etcd_keeps_its_state_and_gets_missed_purges() {
    let mut fleet = Fleet::start(&plan());
    fleet.warm("/p/1");
    fleet.etcd().kill_all();
    fleet.replica(1).kill();
    fleet.shop.set(1, 1);
    let answer = purge_by(&fleet.clearcoat, "cat_p_1");
    assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
    let reader = Reader::start(fleet.others[0].edge, 1, Outage::AtFirst);
    reader.promise(1);
    fleet.replica(1).restart();
    fleet.others[0].opened();
    eventually("the page was read", || (reader.reads() > 20).then_some(()));
    reader.stop();
    fleet.etcd().restart_all();
    same_journal(&fleet);
}

#[test]
fn replicas_without_a_journal_in_common_are_warned_of() {
    let fleet = Fleet::launch(&Plan { varnish: 0, config: "[registry]\nkind = \"etcd\"\n", journal: "disk", ..plan() });
    for clearcoat in fleet.clearcoats() {
        eventually("it is said", || clearcoat.log().has("no journal in common").then_some(()));
        let replicas = clearcoat.fleet()["replicas"].clone();
        assert!(replicas.to_string().contains("no journal in common"), "{replicas}");
    }
}
