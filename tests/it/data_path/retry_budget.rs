//! The retry budget: a fleet that fails in common is not given double the load, and a single node that dies costs nobody anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, get};
use crate::support::eventually;
use crate::support::upstream::{Gate, Then, Upstream};

/// The retries that are always allowed in ten seconds.
const LEAST: f64 = 100.0;

/// Nobody is ejected, and checks pass: all that is left is the budget.
const TOLERANT: &str = "[health.web]\ninterval = \"60s\"\nfall = 1000\neject_after = 0\n";

fn refused(rig: &Rig) -> f64 {
    rig.counter("clearcoat_retries_refused_total{reason=\"no_answer\",role=\"web\"}")
}

#[test]
fn a_fleet_that_closes_every_request_gets_a_bounded_number_of_retries() {
    const REQUESTS: usize = 500;
    let nodes = [0, 1, 2].map(|_| Upstream::start(|_| Then::Close));
    let config =
        format!("[origin]\nlisten = [\"127.0.0.1:0\"]\nretry_budget = 0.1\n[runtime]\nworkers = 2\n{TOLERANT}");
    let rig = Rig::start(&config, Vec::new(), nodes.into());
    let began = std::time::Instant::now();
    for number in 0..REQUESTS {
        assert_eq!(get(rig.clearcoat.origin, &format!("/{number}")).unwrap().status, 502);
    }
    let windows = (began.elapsed().as_secs() / 10 + 1) as f64;
    let retries = rig.retries("web", "no_answer");
    let most = windows * LEAST + 0.1 * REQUESTS as f64;
    assert!(retries >= LEAST && retries <= most, "{retries} retries, {most} at most");
    assert_eq!(refused(&rig), REQUESTS as f64 - retries);
    let attempts: usize = rig.web.iter().map(|node| node.calls().len()).sum();
    assert_eq!(attempts as f64, REQUESTS as f64 + retries);
    rig.clearcoat.log().waits_for("the retry budget is used up");
    assert!(
        rig.clearcoat.log().count("the retry budget is used up") <= windows as usize + 1,
        "it is said now and then"
    );
}

#[test]
fn no_connection_is_moved_whatever_the_budget() {
    const REQUESTS: usize = 400;
    let config =
        format!("[origin]\nlisten = [\"127.0.0.1:0\"]\nretry_budget = 0.0\npolicy = \"round_robin\"\n{TOLERANT}");
    let mut rig = Rig::start(&config, Vec::new(), vec![Upstream::echo(), Upstream::echo()]);
    drop(rig.web.remove(0));
    for number in 0..REQUESTS {
        let path = format!("/{number}");
        assert_eq!(get(rig.clearcoat.origin, &path).unwrap().text(), path);
    }
    let retries = rig.retries("web", "connect");
    assert!(retries > LEAST, "{retries}: this shows nothing");
    assert_eq!(refused(&rig), 0.0);
}

#[test]
fn a_node_of_two_that_dies_with_requests_in_flight_costs_no_reader() {
    const CLIENTS: usize = 300;
    // Both hold their requests. Connections are warm, as in a shop.
    let (arrived, go_on) = (Arc::new(AtomicUsize::new(0)), Gate::default());
    let nodes = [0, 1].map(|_| {
        let (arrived, go_on) = (Arc::clone(&arrived), go_on.clone());
        Upstream::start(move |call| {
            let path = call.path().to_owned();
            if path.starts_with("/held/") {
                arrived.fetch_add(1, Ordering::SeqCst);
                if !call.wait(&go_on) {
                    return Then::Close;
                }
            }
            call.answer(&path)
        })
    });
    let config =
        format!("[origin]\nlisten = [\"127.0.0.1:0\"]\npolicy = \"round_robin\"\n[runtime]\nworkers = 2\n{TOLERANT}");
    let mut rig = Rig::start(&config, Vec::new(), nodes.into());
    let mut clients: Vec<Connection> = (0..CLIENTS).map(|_| rig.origin()).collect();
    for client in &mut clients {
        client.send(get_request("/warm")).unwrap();
        assert_eq!(client.answer(false).unwrap().status, 200);
    }
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(get_request(&format!("/held/{number}"))).unwrap();
    }
    eventually("all are at the nodes", || (arrived.load(Ordering::SeqCst) == CLIENTS).then_some(()));
    let at_the_first = rig.web[0].open_connections();
    drop(rig.web.remove(0));
    eventually("all of the dead node are at the other one", || (rig.web[0].calls().len() >= CLIENTS).then_some(()));
    go_on.open();
    for (number, client) in clients.iter_mut().enumerate() {
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.status, answer.text()), (200, &*format!("/held/{number}")));
    }
    assert!(at_the_first > 0);
    for reason in ["no_answer", "connect", "node_down"] {
        let series = format!("clearcoat_retries_refused_total{{reason=\"{reason}\",role=\"web\"}}");
        assert_eq!(rig.counter(&series), 0.0, "{reason}");
    }
}
