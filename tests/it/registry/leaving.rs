//! How nodes leave, and which of them do.

use std::sync::atomic::Ordering;

use super::rig::{Rig, key};
use crate::support::clearcoat::run;
use crate::support::eventually;

#[test]
fn a_node_whose_lease_is_gone_stays_while_it_is_well() {
    let rig = Rig::start(3);
    let (lost, deleted) = (rig.etcd.grant(600), rig.etcd.grant(600));
    rig.etcd.put_with_lease(&key("web-1"), &rig.web[0].address.to_string(), lost);
    rig.etcd.put_with_lease(&key("web-4"), &rig.web[1].address.to_string(), deleted);
    rig.has_only(&["web-1", "web-2", "web-3", "web-4"]);
    rig.clearcoat().ready();
    let reader = rig.reader();
    rig.etcd.revoke(lost);
    let retained = || rig.clearcoat().node("web-1")["retained"] == true;
    eventually("it is absent, and kept", || retained().then_some(()));
    // A node whose lease still exists was deleted explicitly, and leaves.
    rig.delete("web-4");
    rig.has_only(&["web-1", "web-2", "web-3"]);
    assert!(retained() && rig.clearcoat().node("web-1")["health"] == "up");
    let status = run(&["status", "--admin", &format!("http://{}", rig.clearcoat().admin)]);
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("registry etcd\n") && status.contains("retained (not registered any more)"), "{status}");
    // It is back, and its absence is forgotten.
    rig.put("web-1", &rig.web[0].address.to_string());
    eventually("it is back", || (!retained()).then_some(()));
    let again = rig.etcd.grant(600);
    rig.etcd.put_with_lease(&key("web-1"), &rig.web[0].address.to_string(), again);
    rig.another("web-5");
    rig.etcd.revoke(again);
    eventually("it is absent again", || retained().then_some(()));
    rig.web[0].healthy.store(false, Ordering::SeqCst);
    eventually("the ill one has left", || (!rig.has("web-1")).then_some(()));
    reader.stop();
}

#[test]
fn a_drained_node_gets_no_traffic_and_leaves_at_once_when_deleted() {
    let rig = Rig::start(2);
    let reader = rig.reader();
    let drain = |id: &str, web: usize| {
        rig.put(id, &format!("{{\"address\":\"{}\",\"state\":\"drain\"}}", rig.web[web].address));
        eventually("it is drained", || (rig.clearcoat().node(id)["weight"] == 0).then_some(()));
    };
    drain("web-1", 0);
    rig.delete("web-1");
    rig.has_only(&["web-2"]);
    assert_eq!(rig.metric("registry_held{role=\"web\"}"), 0.0);
    reader.stop();
    drain("web-2", 1);
    rig.delete("web-2");
    rig.has_only(&[]);
}

#[test]
fn most_of_a_role_that_goes_at_once_is_held_and_shouted_about() {
    let rig = Rig::start(4);
    let lease = rig.etcd.grant(600);
    rig.etcd.put_with_lease(&key("web-4"), &rig.web[3].address.to_string(), lease);
    rig.another("web-5");
    let reader = rig.reader();
    // All but one, each in a different way.
    rig.etcd.revoke(lease);
    (1..=3).for_each(|number| rig.delete(&format!("web-{number}")));
    eventually("they are held", || (rig.metric("registry_held{role=\"web\"}") == 4.0).then_some(()));
    rig.another("web-6");
    assert_eq!(rig.ids(), ["web-1", "web-2", "web-3", "web-4", "web-5", "web-6"]);
    rig.clearcoat().log().waits_for_count("lost most nodes of a role at once", 1);
    // Whatever their health.
    rig.web[0].healthy.store(false, Ordering::SeqCst);
    eventually("one is down", || (rig.clearcoat().node("web-1")["health"] == "down").then_some(()));
    assert_eq!(rig.clearcoat().node("web-1")["retained"], true);
    rig.web[0].healthy.store(true, Ordering::SeqCst);
    // They are back; then one is removed explicitly.
    (1..=3).for_each(|number| rig.put(&format!("web-{number}"), &rig.web[number - 1].address.to_string()));
    eventually("three are back", || (rig.metric("registry_held{role=\"web\"}") == 1.0).then_some(()));
    rig.put("web-4", &format!("{{\"address\":\"{}\",\"state\":\"drain\"}}", rig.web[3].address));
    eventually("it is drained", || (rig.clearcoat().node("web-4")["weight"] == 0).then_some(()));
    rig.delete("web-4");
    rig.has_only(&["web-1", "web-2", "web-3", "web-5", "web-6"]);
    assert_eq!(rig.metric("registry_held{role=\"web\"}"), 0.0);
    reader.stop();
}
