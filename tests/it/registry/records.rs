//! Records in etcd, and which of them are accepted.

use std::time::Instant;

use super::rig::{ELSEWHERE, NODES, Rig, key};
use crate::support::clearcoat::run;
use crate::support::client::get;
use crate::support::etcd::Etcd;
use crate::support::etcd::link::Link;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

#[test]
fn a_node_gets_traffic_a_moment_after_it_has_registered() {
    let rig = Rig::start(0);
    rig.clearcoat().opened();
    assert_ne!(get(rig.clearcoat().edge, "/p/1").expect("an answer").status, 200, "there is no node yet");
    let shop = std::sync::Arc::new(crate::support::web::Shop::default());
    let web = crate::support::web::Web::start(&shop);
    let began = Instant::now();
    rig.put("web-1", &web.address.to_string());
    eventually("the node serves", || {
        get(rig.clearcoat().edge, "/p/1").is_ok_and(|answer| answer.status == 200).then_some(())
    });
    println!("from the key to the first page: {:?}", began.elapsed());
    let node = rig.clearcoat().node("web-1");
    assert_eq!((&node["source"], &node["weight"]), (&"etcd".into(), &1.into()));
    assert!(node.get("retained").is_none() && node.get("zone").is_none() && node.get("labels").is_none(), "{node}");

    // A JSON record has more data, and the node stays the same.
    let value =
        format!("{{\"address\":\"{}\",\"weight\":7,\"zone\":\"a\",\"labels\":{{\"rack\":\"9\"}}}}", web.address);
    rig.put("web-1", &value);
    let node =
        eventually("it has another weight", || Some(rig.clearcoat().node("web-1")).filter(|node| node["weight"] == 7));
    assert_eq!((&node["zone"], &node["labels"]["rack"], &node["health"]), (&"a".into(), &"9".into(), &"up".into()));
    let registry = &rig.clearcoat().fleet()["registry"];
    assert_eq!(
        (&registry["kind"], &registry["connected"], &registry["problem"]),
        (&"etcd".into(), &true.into(), &"".into())
    );
    assert!(registry["revision"].as_i64().unwrap() >= 2, "{registry}");
    assert_eq!(rig.metric("registry_connected"), 1.0);

    // Even the last one can leave.
    rig.delete("web-1");
    rig.has_only(&[]);
}

#[test]
fn a_value_that_cannot_be_read_changes_nothing_but_a_number() {
    let rig = Rig::start(2);
    let reader = rig.reader();
    rig.put("web-1", "nonsense");
    rig.put("web-2", "{\"address\":\"10.0.0.5:80\",\"weight\":99999}");
    rig.put("web-3", "{");
    rig.etcd.put(&format!("{NODES}web/a/b"), ELSEWHERE);
    rig.etcd.put(&format!("{NODES}cache/a"), ELSEWHERE);
    // Once this change is seen, so are those before it on the same watch.
    rig.another("web-4");
    assert_eq!(rig.ids(), ["web-1", "web-2", "web-4"]);
    assert_eq!(rig.clearcoat().node("web-1")["address"], rig.web[0].address.to_string());
    assert_eq!(rig.metric("registry_rejected_total"), 5.0);
    let log = rig.clearcoat().log();
    log.waits_for("`nonsense`: neither HOST:PORT");
    log.waits_for("weight: must be 0 to 65535");
    log.waits_for_count("means nothing", 5);
    // A valid record is accepted again, and an unknown field is ignored.
    rig.put("web-3", &format!("{{\"address\":\"{}\",\"colour\":\"red\"}}", rig.web[0].address));
    rig.has_only(&["web-1", "web-2", "web-3", "web-4"]);
    rig.clearcoat().log().waits_for("colour");
    assert!(reader.reads() > 0);
    reader.stop();
}

#[test]
fn what_only_begins_like_the_prefix_is_not_seen() {
    let etcd = Etcd::start();
    let neighbours =
        ["/clearcoat/v1/nodes2/web/x", "/clearcoat/v10/nodes/web/x", "/clearcoat/v1/nodesweb/x", "/a", "/z"];
    neighbours.iter().for_each(|key| _ = etcd.put(key, ELSEWHERE));
    let rig = Rig::start_with(etcd, 1, "");
    for key in neighbours {
        rig.etcd.put(key, "nonsense");
        rig.etcd.delete(key);
    }
    rig.another("web-2");
    assert_eq!(rig.ids(), ["web-1", "web-2"]);
    assert_eq!(rig.metric("registry_rejected_total"), 0.0);
}

#[test]
fn a_name_is_looked_up_and_one_that_does_not_resolve_holds_up_nobody() {
    let rig = Rig::start(1);
    rig.put("web-2", "no-such-host.invalid:80");
    rig.put("web-3", &format!("localhost:{}", rig.web[0].address.port()));
    rig.put("web-4", &rig.web[0].address.to_string());
    rig.has_only(&["web-1", "web-3", "web-4"]);
    eventually("it is said", || rig.clearcoat().log().has("node address does not resolve yet").then_some(()));
    rig.put("web-2", &rig.web[0].address.to_string());
    rig.has_only(&["web-1", "web-2", "web-3", "web-4"]);
}

#[test]
fn a_registered_varnish_is_purged_and_the_file_overrides_etcd() {
    let etcd = Etcd::start();
    let config = format!(
        "[registry]\nkind = \"etcd\"\n[registry.etcd]\nendpoints = {:?}\n\
         [purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"1s\"\nwait_for = \"varnish\"\n",
        etcd.endpoints()
    );
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config: config.leak(), ..Plan::default() });
    let record = |epoch| format!("{{\"address\":\"{}\",\"epoch\":\"{epoch}\"}}", fleet.varnish[0].address);
    // The same process under another name, and the configured name with another address.
    etcd.put(&format!("{NODES}varnish/again"), &record("1"));
    etcd.put(&format!("{NODES}varnish/varnish-1"), ELSEWHERE);
    etcd.put(&key("web-1"), ELSEWHERE);
    eventually("it is up", || {
        fleet.clearcoat.nodes().iter().any(|node| node["id"] == "again" && node["health"] == "up").then_some(())
    });
    fleet.clearcoat.current();
    let answer = fleet.purge_tag("cat_p_1").json();
    assert_eq!(answer["applied"], serde_json::json!(["again", "varnish-1"]), "{answer}");
    eventually("the file is said to count", || {
        (fleet.clearcoat.log().text().matches("a node of this name is known already").count() == 2).then_some(())
    });
    let node = fleet.clearcoat.node("varnish-1");
    assert_eq!((&node["source"], &node["health"]), (&"static".into(), &"up".into()));
    // Another epoch is another cache: it has nothing to catch up with, and continues.
    etcd.put(&format!("{NODES}varnish/again"), &record("2"));
    eventually("it has another epoch", || (fleet.clearcoat.node("again")["epoch"] == "2").then_some(()));
    fleet.clearcoat.current();
    assert_eq!(fleet.purge_tag("cat_p_1").json()["applied"], serde_json::json!(["again", "varnish-1"]));
}

#[test]
fn nothing_is_served_before_a_fleet_was_ever_seen() {
    let etcd = Etcd::start();
    let mut link = Link::to(etcd.endpoint(0));
    link.close();
    let endpoint = link.endpoint();
    let rig = Rig::launch(etcd, 1, &[endpoint], "");
    eventually("it has given up on the disk", || rig.clearcoat().log().has("no last fleet on disk").then_some(()));
    assert_eq!(get(rig.clearcoat().admin, "/readyz").expect("an answer").status, 503);
    let status = run(&["status", "--admin", &format!("http://{}", rig.clearcoat().admin)]);
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("registry etcd DISCONNECTED"), "{status}");
    link.mend();
    rig.clearcoat().ready();
    rig.serves();
    assert_eq!(rig.ids(), ["web-1"]);
}
