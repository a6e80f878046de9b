//! Faults of etcd and of the link to it. Traffic continues through all of them; later changes are seen.

use std::time::Instant;

use super::rig::{NODES, Rig, key};
use crate::support::client::get;
use crate::support::etcd::Etcd;
use crate::support::etcd::access::Access;
use crate::support::etcd::backup::ClusterId;
use crate::support::etcd::link::Link;
use crate::support::eventually;

/// So many keys other than nodes that a lost connection must not cause a complete listing.
fn more_than_a_page(etcd: &Etcd) {
    etcd.put_many((0..501).map(|number| (format!("{NODES}other/{number}"), "no node")));
}

#[test]
fn changes_that_etcd_has_forgotten_meanwhile_cost_one_list_at_once() {
    let etcd = Etcd::start();
    more_than_a_page(&etcd);
    let mut link = Link::to(etcd.endpoint(0));
    let endpoint = link.endpoint();
    let rig = Rig::launch(etcd, 3, &[endpoint], "");
    rig.clearcoat().ready();
    let reader = rig.reader();
    link.cut();
    rig.delete("web-3");
    rig.put("web-4", &rig.web[1].address.to_string());
    rig.put("web-1", &format!("{{\"address\":\"{}\",\"weight\":5}}", rig.web[0].address));
    rig.etcd.compact(rig.etcd.revision());
    rig.is_connected(false);
    assert_eq!(rig.ids(), ["web-1", "web-2", "web-3"]);
    let began = Instant::now();
    link.mend();
    rig.equals_etcd();
    println!("from the mended link to the fleet of etcd: {:?}", began.elapsed());
    assert_eq!(rig.metric("registry_resyncs_total{reason=\"compacted\"}"), 1.0);
    // A link that is cut for a while causes no listing.
    link.close();
    rig.is_connected(false);
    rig.put("web-5", &rig.web[0].address.to_string());
    link.mend();
    rig.equals_etcd();
    let lists = ["start", "compacted", "restored", "far_behind", "reconnected"]
        .map(|reason| rig.metric(&format!("registry_resyncs_total{{reason=\"{reason}\"}}")));
    assert_eq!(lists, [1.0, 1.0, 0.0, 0.0, 0.0]);
    reader.stop();
}

#[test]
fn an_etcd_that_was_restored_from_a_backup_has_the_fleet_of_the_backup() {
    for id in [ClusterId::Kept, ClusterId::New] {
        let mut rig = Rig::start(3);
        let backup = rig.etcd.snapshot();
        rig.another("web-4");
        rig.put("web-1", &format!("{{\"address\":\"{}\",\"weight\":5}}", rig.web[0].address));
        rig.equals_etcd();
        let reader = rig.reader();
        rig.etcd.restore(&backup, id);
        let began = Instant::now();
        rig.has_only(&["web-1", "web-2", "web-3"]);
        rig.equals_etcd();
        println!("{id:?}: from the restored etcd to its fleet: {:?}", began.elapsed());
        assert_eq!(rig.metric("registry_resyncs_total{reason=\"restored\"}"), 1.0, "{id:?}");
        rig.another("web-5");
        reader.stop();
    }
}

#[test]
fn a_restored_etcd_already_ahead_of_us_on_reconnect_has_its_own_fleet() {
    let etcd = Etcd::start();
    // It has some history.
    (0..300).for_each(|number| _ = etcd.put("/elsewhere", &number.to_string()));
    let mut link = Link::to(etcd.endpoint(0));
    let endpoint = link.endpoint();
    let mut rig = Rig::launch(etcd, 3, &[endpoint], "");
    rig.clearcoat().ready();
    let backup = rig.etcd.snapshot();
    rig.another("web-4");
    let known = rig.etcd.revision();
    link.close();
    rig.etcd.restore(&backup, ClusterId::Kept);
    rig.put("web-5", &rig.web[1].address.to_string());
    (0..20).for_each(|number| _ = rig.etcd.put("/elsewhere", &number.to_string()));
    assert!(rig.etcd.revision() > known, "no revision tells");
    link.mend();
    rig.equals_etcd();
    assert!(!rig.has("web-4") && rig.has("web-5"));
    assert_eq!(rig.metric("registry_resyncs_total{reason=\"restored\"}"), 1.0);
}

#[test]
fn a_restored_etcd_whose_other_history_is_as_long_has_its_own_fleet() {
    let etcd = Etcd::cluster(3);
    let mut links: Vec<Link> = etcd.endpoints().iter().map(|endpoint| Link::to(endpoint)).collect();
    let endpoints: Vec<String> = links.iter().map(Link::endpoint).collect();
    let mut rig = Rig::launch(etcd, 3, &endpoints, "");
    rig.clearcoat().ready();
    let backup = rig.etcd.snapshot();
    rig.another("web-4");
    rig.delete("web-3");
    links.iter_mut().for_each(Link::close);
    rig.etcd.restore(&backup, ClusterId::Kept);
    // Neither a revision nor the length of the log shows it.
    rig.put("web-5", &rig.web[1].address.to_string());
    (0..50).for_each(|number| _ = rig.etcd.put("/elsewhere", &number.to_string()));
    links.iter_mut().for_each(Link::mend);
    rig.equals_etcd();
    assert!(rig.has("web-3") && !rig.has("web-4") && rig.has("web-5"));
    let lists = |reason| rig.metric(&format!("registry_resyncs_total{{reason=\"{reason}\"}}"));
    assert_eq!(lists("reconnected") + lists("restored"), 1.0);
}

#[test]
fn a_quiet_fleet_in_a_busy_etcd_is_not_relisted_after_compactions() {
    let etcd = Etcd::start();
    more_than_a_page(&etcd);
    let mut link = Link::to(etcd.endpoint(0));
    let endpoint = link.endpoint();
    let rig = Rig::launch(etcd, 2, &[endpoint], "");
    rig.clearcoat().ready();
    (0..100).for_each(|number| _ = rig.etcd.put("/elsewhere", &number.to_string()));
    let busy = rig.etcd.revision();
    eventually("clearcoat has come along", || (rig.metric("registry_revision") == busy as f64).then_some(()));
    link.close();
    rig.etcd.compact(busy);
    rig.put("web-3", &rig.web[0].address.to_string());
    link.mend();
    rig.has_only(&["web-1", "web-2", "web-3"]);
    for (reason, lists) in [("compacted", 0.0), ("reconnected", 0.0), ("start", 1.0)] {
        assert_eq!(rig.metric(&format!("registry_resyncs_total{{reason=\"{reason}\"}}")), lists, "{reason}");
    }
}

#[test]
fn members_that_die_or_hang_cost_no_request_and_no_change() {
    let mut rig = Rig::start_with(Etcd::cluster(3), 2, "");
    let reader = rig.reader();
    let mut number = 0;
    let mut recovers = |rig: &Rig, what: &str| {
        number += 1;
        println!("{what}: {:?} to the next change", rig.another(&format!("new-{number}")));
        rig.equals_etcd();
    };
    let ours = rig.member();
    rig.etcd.kill(ours);
    recovers(&rig, "kill -9 of our member");
    rig.etcd.restart(ours);
    rig.etcd.healthy();
    let ours = rig.member();
    rig.etcd.hang(ours);
    recovers(&rig, "our member hangs");
    rig.etcd.resume(ours);
    rig.etcd.healthy();
    let leader = rig.etcd.leader();
    rig.etcd.kill(leader);
    recovers(&rig, "kill -9 of the leader");
    rig.etcd.restart(leader);
    rig.etcd.healthy();
    (0..3).for_each(|member| rig.etcd.hang(member));
    rig.is_connected(false);
    assert!(!rig.clearcoat().fleet()["registry"]["problem"].as_str().unwrap().is_empty());
    // It is reported, but clearcoat stays in service.
    assert!(rig.metric("registry_connected") == 0.0 && rig.metric("registry_last_contact_seconds") > 3.0);
    assert_eq!(get(rig.clearcoat().admin, "/readyz").expect("an answer").status, 200);
    rig.serves();
    (0..3).for_each(|member| rig.etcd.resume(member));
    rig.etcd.healthy();
    recovers(&rig, "all members hung");
    assert_eq!(rig.metric("registry_resyncs_total{reason=\"start\"}"), 1.0, "nothing was begun anew");
    reader.stop();
}

#[test]
fn an_etcd_that_begins_to_ask_for_passwords_gets_them_as_they_are_by_then() {
    let password_file = tempfile::NamedTempFile::new().unwrap();
    let keys = format!("username = \"clearcoat\"\npassword_file = {:?}", password_file.path().display().to_string());
    std::fs::write(password_file.path(), "first\n").unwrap();
    let mut rig = Rig::start_with(Etcd::start(), 2, &keys);
    let reader = rig.reader();
    rig.etcd.add_user("clearcoat", "first", &[("/clearcoat/v1/", Access::ReadWrite)]);
    rig.etcd.enable_auth("secret");
    println!("authentication is on: {:?} to the next change", rig.another("web-3"));
    // Open connections stay. The next one needs the password.
    rig.etcd.restart(0);
    println!("and with a new connection: {:?}", rig.another("web-4"));
    rig.etcd.change_password("clearcoat", "second");
    rig.etcd.restart(0);
    rig.etcd.healthy();
    eventually("the old password is refused", || {
        let problem = &rig.clearcoat().fleet()["registry"]["problem"];
        problem.as_str().unwrap().contains("authentication failed").then_some(())
    });
    std::fs::write(password_file.path(), "second\n").unwrap();
    println!("another password: {:?} to the next change", rig.another("web-5"));
    rig.equals_etcd();
    // Leases are queried as that user, too.
    let lease = rig.etcd.grant(600);
    rig.etcd.put_with_lease(&key("web-3"), &rig.web[0].address.to_string(), lease);
    rig.another("web-6");
    rig.etcd.revoke(lease);
    eventually("it is kept", || (rig.clearcoat().node("web-3")["retained"] == true).then_some(()));
    let lease = rig.etcd.grant(600);
    rig.etcd.put_with_lease(&key("web-4"), &rig.web[0].address.to_string(), lease);
    rig.another("web-7");
    rig.delete("web-4");
    eventually("it has left", || (!rig.has("web-4")).then_some(()));
    rig.etcd.disable_auth();
    rig.another("web-8");
    reader.stop();
}

#[test]
fn a_start_without_etcd_begins_with_the_last_fleet_and_goes_on_with_etcd() {
    let mut rig = Rig::start(3);
    let file = rig.fleet.folder.path().join("journal/fleet.json");
    let saved = |rig: &Rig, text: &str| {
        eventually("the fleet is on disk", || std::fs::read_to_string(&file).ok()?.contains(text).then_some(()));
        rig.equals_etcd();
    };
    rig.another("web-4");
    saved(&rig, "web-4");
    rig.fleet.clearcoat.kill();
    // A change that clearcoat does not see: it is found later by comparison with the last fleet.
    rig.delete("web-2");
    rig.etcd.kill_all();
    let began = Instant::now();
    rig.fleet.clearcoat.restart();
    rig.clearcoat().ready();
    println!("a start without etcd: {:?} to traffic", began.elapsed());
    assert_eq!(rig.ids(), ["web-1", "web-2", "web-3", "web-4"]);
    let reader = rig.reader();
    rig.etcd.restart_all();
    rig.etcd.healthy();
    rig.has_only(&["web-1", "web-3", "web-4"]);
    rig.equals_etcd();
    reader.stop();
    // An unreadable file does not prevent a start.
    rig.fleet.clearcoat.kill();
    std::fs::write(&file, "{\"format\":1,").unwrap();
    let etcd_is_away = rig.etcd.endpoints().len();
    (0..etcd_is_away).for_each(|member| rig.etcd.hang(member));
    rig.fleet.clearcoat.restart();
    eventually("it is said", || rig.clearcoat().log().has("cannot be read").then_some(()));
    (0..etcd_is_away).for_each(|member| rig.etcd.resume(member));
    rig.clearcoat().ready();
    rig.equals_etcd();
}
