//! A key exists exactly as long as its node, whatever happens to it.

use std::time::Instant;

use crate::support::agent::{Agent, Node, is, is_gone, record, recorded};
use crate::support::etcd::Etcd;
use crate::support::etcd::backup::ClusterId;
use crate::support::etcd::link::Link;
use crate::support::eventually;

#[test]
fn a_revoked_lease_is_replaced_and_a_deleted_key_is_rewritten() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let _agent = Agent::start(node.arguments("web", "web-1", &etcd.endpoints()));
    let first = is(&etcd, "web/web-1", "up");

    let began = Instant::now();
    etcd.revoke(first.lease);
    let second = recorded(&etcd, "web/web-1", "is back", |record| record.lease != first.lease);
    println!("a key whose lease was revoked was back after {:?}, of a lease of 2 s", began.elapsed());
    assert_eq!(second.value, first.value);

    let began = Instant::now();
    assert!(etcd.delete("/clearcoat/v1/nodes/web/web-1"));
    let third = is(&etcd, "web/web-1", "up");
    println!("a key that was deleted was back after {:?}, of a lease of 2 s", began.elapsed());
    assert_eq!((third.lease, third.value), (second.lease, first.value));
}

#[test]
fn a_value_that_was_written_without_an_answer_is_still_our_own() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let mut agent = Agent::start(node.arguments("web", "web-1", &etcd.endpoints()));
    let first = is(&etcd, "web/web-1", "up");
    // As after a lost answer: our lease, with an unknown value.
    etcd.put_with_lease("/clearcoat/v1/nodes/web/web-1", r#"{"state":"unknown"}"#, first.lease);
    assert_eq!(is(&etcd, "web/web-1", "up").value, first.value);

    etcd.put_with_lease("/clearcoat/v1/nodes/web/web-1", r#"{"state":"unknown"}"#, first.lease);
    agent.signal("-TERM");
    assert_eq!(agent.status(), 0);
    assert!(record(&etcd, "web/web-1").is_none());
}

#[test]
fn a_key_is_never_away_while_members_of_etcd_die_one_after_the_other() {
    let mut etcd = Etcd::cluster(3);
    let node = Node::start(200);
    let mut arguments = node.arguments("web", "web-1", &etcd.endpoints());
    arguments.extend(["--ttl", "10s", "--fall", "1", "--check", &node.page()].map(str::to_owned));
    let _agent = Agent::start(arguments);
    let first = is(&etcd, "web/web-1", "up");
    for member in 0..3 {
        etcd.kill(member);
        for (status, state) in [(500, "drain"), (200, "up")] {
            node.answer(status);
            let later = is(&etcd, "web/web-1", state);
            assert_eq!((later.created, later.lease), (first.created, first.lease), "member {member}");
        }
        etcd.restart(member);
        etcd.healthy();
    }
}

#[test]
fn a_key_is_back_after_a_cut_that_outlasted_its_lease() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let mut link = Link::to(etcd.endpoint(0));
    let agent = Agent::start(node.arguments("web", "web-1", &[link.endpoint()]));
    let first = is(&etcd, "web/web-1", "up");
    link.cut();
    is_gone(&etcd, "web/web-1");
    eventually("the cut is noticed", || agent.log().has("not registered in etcd").then_some(()));
    let began = Instant::now();
    link.mend();
    let second = is(&etcd, "web/web-1", "up");
    println!("a key was back {:?} after a cut", began.elapsed());
    assert_ne!(second.lease, first.lease);
    assert_eq!(second.value, first.value);
}

#[test]
fn a_key_survives_a_restart_of_etcd_and_a_restore_from_before_it_existed() {
    let mut etcd = Etcd::start();
    let before = etcd.snapshot();
    let node = Node::start(200);
    let agent = Agent::start(node.arguments("web", "web-1", &etcd.endpoints()));
    let first = is(&etcd, "web/web-1", "up");
    etcd.kill(0);
    eventually("etcd is missed", || agent.log().has("not registered in etcd").then_some(()));
    etcd.restart(0);
    eventually("etcd is found again", || (agent.log().count("registered in etcd\"") >= 2).then_some(()));
    assert_eq!(is(&etcd, "web/web-1", "up").value, first.value);

    etcd.restore(&before, ClusterId::New);
    let later = is(&etcd, "web/web-1", "up");
    assert_eq!(later.value, first.value);
    assert!(etcd.lease_ttl(later.lease).is_some());
}

#[test]
fn the_newer_of_two_agents_with_one_name_has_the_key() {
    let etcd = Etcd::start();
    let (old, new) = (Node::start(200), Node::start(200));
    let mut older = Agent::start(old.arguments("web", "web-1", &etcd.endpoints()));
    is(&etcd, "web/web-1", "up");
    let of_new = |record: &crate::support::agent::Record| record.value["address"] == new.address.to_string();
    let mut newer = Agent::start(new.arguments("web", "web-1", &etcd.endpoints()));
    recorded(&etcd, "web/web-1", "is the newer one", of_new);
    eventually("the older one knows", || older.log().has("another process has registered").then_some(()));

    // Its own changes do not make it take the key back, and its end does not delete the key.
    older.signal("-TERM");
    assert_eq!(older.status(), 0);
    assert!(record(&etcd, "web/web-1").is_some_and(|record| of_new(&record)));

    let waiting = Agent::start(old.arguments("web", "web-1", &etcd.endpoints()));
    recorded(&etcd, "web/web-1", "is the third one", |record| !of_new(record));
    eventually("the second one knows", || newer.log().has("another process has registered").then_some(()));
    drop(waiting);
    // After a kill, only its lease ends the key. Then the key is free, and the second agent is still there.
    recorded(&etcd, "web/web-1", "is the second one's again", of_new);
    newer.signal("-TERM");
    assert_eq!(newer.status(), 0);
    assert!(record(&etcd, "web/web-1").is_none());
}

#[test]
fn an_agent_started_after_a_killed_one_keeps_the_key_beyond_its_lease() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let mut killed = Agent::start(node.arguments("web", "web-1", &etcd.endpoints()));
    let first = is(&etcd, "web/web-1", "up");
    killed.kill();
    let _next = Agent::start(node.arguments("web", "web-1", &etcd.endpoints()));
    let second = recorded(&etcd, "web/web-1", "is the next one's", |record| record.lease != first.lease);
    assert_eq!(second.created, first.created, "the key was away");
    eventually("the old lease has ended", || etcd.lease_ttl(first.lease).is_none().then_some(()));
    assert_eq!(record(&etcd, "web/web-1").map(|record| record.created), Some(first.created));
}
