//! Replicas cut off from etcd or from each other, and leases that expire unnoticed.

use std::time::{Duration, Instant};

use super::rig::{REPLICAS, Rig, plan};
use crate::support::clearcoat::Clearcoat;
use crate::support::client::{get, purge, tag};
use crate::support::etcd::Etcd;
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};

fn lease_of(etcd: &Etcd, key: &str) -> i64 {
    etcd.entry(key).expect("the key is there").lease()
}

fn purge_by(clearcoat: &Clearcoat, pattern: &str) -> (serde_json::Value, Duration) {
    let began = Instant::now();
    let answer = purge(clearcoat.purge, pattern).expect("the purge listener answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    (answer.json(), began.elapsed())
}

/// Changes forty pages (different ones for each version) that are cached in a Varnish that refuses purges, and purges
/// them. No reader behind any replica gets an old one.
fn purges_hold_behind_all(fleet: &Fleet, by: &Clearcoat, version: u64) {
    let pages = || version * 100 + 1..=version * 100 + 40;
    pages().for_each(|page| fleet.warm(&format!("/p/{page}")));
    fail_purges(fleet, "varnish-1", true);
    pages().for_each(|page| fleet.shop.set(page, version));
    let tags: Vec<String> = pages().map(|page| tag(&format!("cat_p_{page}"))).collect();
    let (answer, _) = purge_by(by, &tags.join("|"));
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-1"]), "{answer}");
    assert!(answer["unconfirmed"].is_null(), "{answer}");
    for (page, clearcoat) in pages().flat_map(|page| fleet.clearcoats().map(move |clearcoat| (page, clearcoat))) {
        let text = get(clearcoat.edge, &format!("/p/{page}")).expect("an answer").text().to_owned();
        assert_eq!(text, version.to_string(), "page {page}");
    }
    fail_purges(fleet, "varnish-1", false);
    fleet.clearcoats().for_each(Clearcoat::current);
}

#[test]
fn a_replica_that_is_cut_off_from_etcd_alone_hears_of_every_purge() {
    let mut rig = Rig::start(&Plan { links: true, ..plan() });
    rig.fleet.links[1].etcd.iter().for_each(|link| link.cut());
    rig.suffer();
    rig.fleet.links[1].etcd.iter_mut().for_each(|link| link.mend());
    rig.recovers("a replica is cut off from etcd");
    rig.more(6);
    rig.ends("a replica is cut off from etcd");
}

#[test]
fn a_running_replica_without_its_key_in_etcd_still_gets_purges() {
    let mut fleet = Fleet::start(&Plan { links: true, vcl: purges_can_fail, ..plan() });
    fleet
        .clearcoats()
        .for_each(|clearcoat| eventually("the nodes are known", || (clearcoat.nodes().len() == 4).then_some(())));
    fleet.clearcoats().for_each(Clearcoat::ready);
    fleet.links[1].etcd.iter().for_each(|link| link.cut());
    let key = format!("{REPLICAS}clearcoat-2");
    let lease = lease_of(fleet.etcd(), &key);
    fleet.etcd().revoke(lease);
    eventually("its key is gone", || fleet.clearcoat.log().has("a replica is not registered any more").then_some(()));
    purges_hold_behind_all(&fleet, &fleet.clearcoat, 7);
    purges_hold_behind_all(&fleet, &fleet.others[0], 8);
    fleet.links[1].etcd.iter_mut().for_each(|link| link.mend());
    eventually("it is registered again", || fleet.etcd().get(&key));
    fleet.know_each_other();
    purges_hold_behind_all(&fleet, &fleet.clearcoat, 9);
    // A replica that has ended is neither waited for nor shown.
    fleet.replica(1).kill();
    fleet.links[1].others.close();
    let lease = lease_of(fleet.etcd(), &key);
    fleet.etcd().revoke(lease);
    eventually("it is not there any more", || {
        (fleet.clearcoat.fleet()["replicas"].as_array()?.len() == 1).then_some(())
    });
    let (answer, took) = purge_by(&fleet.clearcoat, &tag("cat_p_1"));
    assert!(answer["unconfirmed"].is_null() && took < Duration::from_secs(1), "{answer} after {took:?}");
}

#[test]
fn a_replica_that_restarts_without_etcd_tells_those_whom_it_knew() {
    let mut fleet = Fleet::start(&Plan { vcl: purges_can_fail, ..plan() });
    fleet
        .clearcoats()
        .for_each(|clearcoat| eventually("the nodes are known", || (clearcoat.nodes().len() == 4).then_some(())));
    fleet.clearcoats().for_each(Clearcoat::ready);
    let file = fleet.journal_of(1).join("fleet.json");
    eventually("the fleet is on disk", || std::fs::read_to_string(&file).ok()?.contains("web-2").then_some(()));
    for (number, other) in [(0, "clearcoat-2"), (1, "clearcoat-1")] {
        let file = fleet.journal_of(number).join("replicas.json");
        eventually("who else is there is on disk", || {
            std::fs::read_to_string(&file).ok()?.contains(other).then_some(())
        });
    }
    fleet.etcd().kill_all();
    // Including purges that it had accepted before, but could not pass on.
    fleet.replica(0).kill();
    fleet.warm("/p/1");
    fleet.shop.set(1, 7);
    purge_by(&fleet.others[0], &tag("cat_p_1"));
    fleet.replica(1).kill();
    fleet.replica(0).restart();
    fleet.replica(1).restart();
    fleet.clearcoats().for_each(Clearcoat::ready);
    let spooled = |clearcoat: &Clearcoat| (clearcoat.fleet()["spooled"] == 1).then_some(());
    fleet.clearcoats().for_each(|clearcoat| eventually("both have the purge", || spooled(clearcoat)));
    fleet.know_each_other();
    purges_hold_behind_all(&fleet, &fleet.others[0], 7);
    purges_hold_behind_all(&fleet, &fleet.clearcoat, 8);
    fleet.etcd().restart_all();
    fleet.know_each_other();
    fleet.clearcoats().for_each(|clearcoat| {
        eventually("everything is in etcd", || (clearcoat.fleet()["spooled"] == 0).then_some(()));
    });
}

#[test]
fn leases_that_end_behind_their_backs_cost_no_replica_and_no_node() {
    let mut rig = Rig::start(&plan());
    for replica in ["clearcoat-1", "clearcoat-2"] {
        let key = format!("{REPLICAS}{replica}");
        let lease = lease_of(rig.fleet.etcd(), &key);
        rig.fleet.etcd().revoke(lease);
        let began = Instant::now();
        eventually("it is registered again", || {
            rig.fleet.etcd().entry(&key).filter(|entry| entry.lease() != lease).map(drop)
        });
        println!("{replica} is registered again {} ms after its lease was revoked", began.elapsed().as_millis());
    }
    let key = "/clearcoat/v1/nodes/varnish/varnish-1";
    let address = rig.fleet.varnish[0].address.to_string();
    let lease = rig.fleet.etcd().grant(600);
    rig.fleet.etcd().put_with_lease(key, &address, lease);
    rig.more(6);
    rig.fleet.etcd().revoke(lease);
    for clearcoat in rig.fleet.clearcoats() {
        eventually("it is kept", || (clearcoat.node("varnish-1")["retained"] == true).then_some(()));
    }
    rig.more(6);
    rig.fleet.etcd().put(key, &address);
    rig.recovers("leases are revoked");
    rig.ends("leases are revoked");
}

#[test]
fn unreachable_replicas_are_waited_for_once_and_get_purges_through_etcd() {
    let mut fleet = Fleet::start(&Plan { links: true, vcl: purges_can_fail, ..plan() });
    fleet
        .clearcoats()
        .for_each(|clearcoat| eventually("the nodes are known", || (clearcoat.nodes().len() == 4).then_some(())));
    fleet.clearcoats().for_each(Clearcoat::ready);
    (1..=40).for_each(|page| fleet.warm(&format!("/p/{page}")));
    fleet.links[1].others.cut();
    let (answer, first) = purge_by(&fleet.clearcoat, &tag("cat_p_99"));
    assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
    let (answer, next) = purge_by(&fleet.clearcoat, &tag("cat_p_99"));
    assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
    println!(
        "cut off from each other: the first purge took {} ms, the next {} ms",
        first.as_millis(),
        next.as_millis()
    );
    assert!(first < Duration::from_millis(2_500) && next < Duration::from_millis(600), "{first:?} {next:?}");
    // It learns of the purge through etcd, and does not send readers to a Varnish that refuses purges.
    fail_purges(&fleet, "varnish-1", true);
    (1..=40).for_each(|page| fleet.shop.set(page, 7));
    let tags: Vec<String> = (1..=40).map(|page| tag(&format!("cat_p_{page}"))).collect();
    let (answer, _) = purge_by(&fleet.clearcoat, &tags.join("|"));
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-1"]), "{answer}");
    let began = Instant::now();
    let other = &fleet.others[0];
    eventually("the other one avoids it", || (other.node("varnish-1")["current"] == false).then_some(()));
    println!("the other one avoids a node {} ms after the answer", began.elapsed().as_millis());
    for page in 1..=40 {
        assert_eq!(get(other.edge, &format!("/p/{page}")).expect("an answer").text(), "7");
    }
    fail_purges(&fleet, "varnish-1", false);
    fleet.links[1].others.mend();
    fleet.know_each_other();
    purges_hold_behind_all(&fleet, &fleet.clearcoat, 8);
}
