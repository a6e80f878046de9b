//! The limits of the purge listener: connections, and concurrent purges.

use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::support::client::{Connection, get, purge, tag};
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};

/// The most concurrent purges, and more connections than allowed.
const UNDER_WAY: usize = clearcoat::purge_api::MAX_UNDER_WAY;
const CONNECTIONS: usize = 2100;

/// Magento's timeout for an answer.
const MAGENTO_WAITS: Duration = Duration::from_secs(10);

/// Raises the limit of open files of this process and its children to the maximum.
fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("no more than the maximum");
}

#[test]
fn connections_that_want_nothing_keep_no_purge_out() {
    allow_many_files();
    let fleet = Fleet::start(&Plan { varnish: 0, web: 0, ..Plan::default() });
    let silent: Vec<_> =
        (0..CONNECTIONS).map(|_| Connection::open(fleet.clearcoat.purge).expect("a connection")).collect();
    let began = Instant::now();
    assert_eq!(purge(fleet.clearcoat.purge, &tag("cat_p_1")).expect("an answer").status, 200);
    let took = began.elapsed();
    println!("a purge behind {CONNECTIONS} connections at rest took {took:?}");
    assert!(took < MAGENTO_WAITS, "it took {took:?}");
    drop(silent);
}

#[test]
fn a_purge_too_many_is_not_accepted_and_told_to_come_again() {
    allow_many_files();
    // One address may have fewer connections than there may be concurrent purges.
    let config = "[purge]\nlisten = [\"127.0.0.1:0\", \"127.0.0.1:0\", \"127.0.0.1:0\"]\nack_timeout = \"60s\"\nwait_for = \"varnish\"\n";
    let fleet =
        Fleet::start(&Plan { varnish: 1, web: 0, config, journal: "memory", vcl: purges_can_fail, ..Plan::default() });
    fleet.clearcoat.current();
    // A journal in memory begins after a gap.
    let first = fleet.clearcoat.fleet()["head"].as_u64().expect("a position");
    fail_purges(&fleet, "varnish-1", true);
    let addresses = fleet.clearcoat.listening("purge");
    let waiting = || fleet.clearcoat.metric("clearcoat_purges_waiting") as usize;
    let request = format!("PURGE / HTTP/1.1\r\nHost: a\r\nX-Magento-Tags-Pattern: {}\r\n\r\n", tag("cat_p_1"));
    let mut clients = Vec::new();
    for address in &addresses[..2] {
        for _ in 0..UNDER_WAY / 2 {
            let mut client = Connection::open(*address).expect("a connection");
            client.send(&request).expect("sent");
            clients.push(client);
        }
        eventually("all of these are under way", || (waiting() == clients.len()).then_some(()));
    }

    for _ in 0..20 {
        let answer = purge(addresses[2], &tag("cat_p_2")).expect("an answer");
        assert_eq!((answer.status, answer.header("Retry-After")), (503, Some("1")), "{answer:?}");
        assert!(answer.json()["error"].as_str().is_some_and(|error| error.contains("not accepted")), "{answer:?}");
    }
    assert_eq!(fleet.clearcoat.fleet()["head"], first + UNDER_WAY as u64);
    assert_eq!(waiting(), UNDER_WAY);
    assert_eq!(fleet.clearcoat.metric("clearcoat_purges_total{kind=\"tags\",result=\"overload\"}"), 20.0);
    fleet.clearcoat.log().waits_for("a purge was not accepted");
    let lines = fleet.clearcoat.log().count("a purge was not accepted");
    assert!((1..20).contains(&lines), "{lines} lines of 20");
    assert_eq!(get(addresses[2], "/healthz").expect("an answer").status, 200);

    fail_purges(&fleet, "varnish-1", false);
    for client in &mut clients {
        assert_eq!(client.answer(false).expect("an answer").status, 200);
    }
    eventually("none is under way any more", || (waiting() == 0).then_some(()));
    let answer = purge(addresses[2], &tag("cat_p_2")).expect("an answer");
    assert_eq!((answer.status, answer.json()["position"].as_u64()), (200, Some(first + UNDER_WAY as u64 + 1)));
}
