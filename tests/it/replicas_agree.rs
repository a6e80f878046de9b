//! The answers of several clearcoats to one purge, if they do not reach the same nodes.

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{get, purge, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// The last clearcoat can be cut off from the first Varnish.
fn plan() -> Plan {
    // Long enough for every live replica on a busy machine.
    Plan { varnish: 2, replicas: 2, own_way: true, etcd: 1, journal: "etcd", ack_timeout: "4s", ..Plan::default() }
}

fn purge_by(clearcoat: &Clearcoat, name: &str) -> serde_json::Value {
    let answer = purge(clearcoat.purge, &tag(name)).expect("the purge listener answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// The number of bans that this clearcoat has sent to the first Varnish.
fn bans(clearcoat: &Clearcoat) -> f64 {
    clearcoat.metric("clearcoat_bans_sent_total{node=\"varnish-1\"}")
}

/// Cuts the last clearcoat off from the first Varnish, and waits until it has noticed.
fn cut(fleet: &Fleet) {
    fleet.own_way.as_ref().expect("a plan with it").cut();
    let last = fleet.clearcoats().last().expect("a clearcoat");
    eventually("the last one has noticed", || {
        purge_by(&fleet.clearcoat, "before");
        (last.node("varnish-1")["current"] == false).then_some(())
    });
    eventually("all others confirm, and reach it", || {
        let answer = purge_by(&fleet.clearcoat, "before");
        let named = answer["fenced_at"].as_object().is_some_and(|named| named.len() == 1);
        (answer["unconfirmed"].is_null() && named).then_some(())
    });
}

#[test]
fn a_node_another_replica_has_not_reached_is_named_and_purged_again() {
    for plan in [plan(), Plan { etcd: 0, journal: "disk", ..plan() }] {
        let fleet = Fleet::start(&plan);
        let answer = purge_by(&fleet.clearcoat, "of_all");
        assert_eq!(answer["applied"], serde_json::json!(["varnish-1", "varnish-2"]), "{answer}");
        cut(&fleet);
        let before = bans(&fleet.clearcoat);
        let answer = purge_by(&fleet.clearcoat, "cat_p_77");
        assert_eq!(answer["applied"], serde_json::json!(["varnish-2"]), "{answer}");
        assert_eq!(answer["fenced"], serde_json::json!(["varnish-1"]), "{answer}");
        assert_eq!(answer["fenced_at"], serde_json::json!({"clearcoat-2": ["varnish-1"]}), "{answer}");
        assert!(answer["unconfirmed"].is_null(), "{answer}");
        // A page may have passed there, so by the time of the answer it has had the ban twice, and continues to serve.
        assert!(bans(&fleet.clearcoat) >= before + 2.0, "told once");
        assert_eq!(fleet.clearcoat.node("varnish-1")["current"], true);
    }
}

#[test]
fn a_node_the_accepting_replica_cannot_reach_is_purged_again_by_others() {
    let fleet = Fleet::start(&plan());
    cut(&fleet);
    let before = bans(&fleet.clearcoat);
    let answer = purge_by(&fleet.others[0], "cat_p_77");
    assert_eq!(answer["fenced"], serde_json::json!(["varnish-1"]), "{answer}");
    assert!(answer["fenced_at"].is_null() && answer["unconfirmed"].is_null(), "{answer}");
    assert!(bans(&fleet.clearcoat) >= before + 2.0, "told once");
    eventually("it counts there", || (fleet.clearcoat.node("varnish-1")["current"] == true).then_some(()));
}

#[test]
fn of_three_replicas_the_two_reaching_a_node_purge_it_again_for_the_third() {
    let fleet = Fleet::start(&Plan { replicas: 3, ..plan() });
    cut(&fleet);
    let before = [bans(&fleet.clearcoat), bans(&fleet.others[0])];
    let answer = purge_by(&fleet.others[0], "cat_p_77");
    assert_eq!(answer["fenced_at"], serde_json::json!({"clearcoat-3": ["varnish-1"]}), "{answer}");
    for (clearcoat, before) in [&fleet.clearcoat, &fleet.others[0]].into_iter().zip(before) {
        assert!(bans(clearcoat) >= before + 2.0, "told once");
        eventually("it counts there", || (clearcoat.node("varnish-1")["current"] == true).then_some(()));
    }
    assert_eq!(fleet.others[1].node("varnish-1")["current"], false);
}

#[test]
fn two_replicas_of_one_name_are_an_error_at_both_and_a_restart_is_none() {
    let mut fleet = Fleet::start(&Plan { own_way: false, ..plan() });
    // The key of its previous process still exists.
    fleet.replica(1).kill();
    fleet.replica(1).restart();
    fleet.clearcoats().for_each(Clearcoat::ready);
    fleet.know_each_other();
    for clearcoat in fleet.clearcoats() {
        assert!(!clearcoat.log().has("is also used by"));
        assert_eq!(clearcoat.metric("clearcoat_replica_same_id"), 0.0);
    }
    fleet.replica(1).kill();
    let config = fleet.others[0].config();
    fleet.others[0].configure(&config.replacen("id = \"clearcoat-2\"", "id = \"clearcoat-1\"", 1));
    fleet.replica(1).restart();
    let addresses = [fleet.clearcoat.purge.to_string(), fleet.others[0].purge.to_string()];
    let says_both = |text: &str| addresses.iter().all(|address| text.contains(address));
    for clearcoat in fleet.clearcoats() {
        eventually("both say it", || {
            let own = clearcoat.fleet()["replicas"][0]["problem"].to_string();
            (says_both(&own) && clearcoat.metric("clearcoat_replica_same_id") == 1.0).then_some(())
        });
        assert_eq!(clearcoat.log().count("is also used by"), 1);
    }
    // Other replicas use the newer one, which has the key; readers must not be sent to the older one.
    let refused = get(fleet.clearcoat.admin, "/readyz").expect("an answer");
    assert!(refused.status == 503 && says_both(refused.text()), "{refused:?}");
    fleet.others[0].opened();
    fleet.others[0].terminate();
    fleet.replica(1).wait();
    fleet.clearcoat.opened();
    assert_eq!(fleet.clearcoat.metric("clearcoat_replica_same_id"), 0.0);
    assert!(fleet.clearcoat.log().has("is its own again"));
}
