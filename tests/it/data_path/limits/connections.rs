//! Limits of connections: in total, where clients wait, and per address, where the rest is refused.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Answer, Connection, Ending};
use crate::support::eventually;
use crate::support::upstream::{Gate, Then, Upstream};

/// A node that answers `/held` only when the gate is open.
fn holding(gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::start(move |call| {
        let path = call.path().to_owned();
        if path == "/held" && !call.wait(&gate) {
            return Then::Close;
        }
        call.answer(&path)
    })
}

fn asking(edge: SocketAddr, path: &str) -> Connection {
    let mut client = Connection::open(edge).expect("the kernel accepts");
    client.send(get_request(path)).expect("the kernel accepts");
    client
}

fn connections(rig: &Rig) -> f64 {
    rig.counter("clearcoat_edge_connections")
}

#[test]
fn where_all_places_are_at_work_new_connections_wait_and_none_is_refused() {
    const PLACES: usize = 4;
    let gate = Gate::default();
    let rig = Rig::start("[limits]\nmax_connections = 4", vec![holding(&gate)], vec![Upstream::echo()]);
    let edge = rig.clearcoat.edge;
    let working: Vec<_> = (0..PLACES).map(|_| asking(edge, "/held")).collect();
    eventually("all are at the node", || (rig.varnish[0].calls().len() == PLACES).then_some(()));
    let waiting: Vec<_> = (0..2 * PLACES).map(|number| asking(edge, &format!("/{number}"))).collect();
    // The origin has no such limit, and answers while they wait.
    for _ in 0..20 {
        assert_eq!(asking(rig.clearcoat.origin, "/origin").answer(false).unwrap().text(), "/origin");
    }
    assert_eq!((connections(&rig), rig.varnish[0].calls().len()), (4.0, PLACES));

    gate.open();
    for (number, mut client) in working.into_iter().enumerate() {
        assert_eq!(client.answer(false).unwrap().text(), "/held", "{number}");
    }
    // Each disconnects after its answer, and makes room for another.
    for (number, mut client) in waiting.into_iter().enumerate() {
        assert_eq!(client.answer(false).unwrap().text(), format!("/{number}"));
    }
    assert_eq!(rig.counter("clearcoat_edge_connections_refused_total"), 0.0);
    eventually("no connection is left", || (connections(&rig) == 0.0).then_some(()));
}

#[test]
fn connections_at_rest_end_to_make_room_and_those_at_work_do_not() {
    let gate = Gate::default();
    let rig = Rig::start("[limits]\nmax_connections = 4", vec![holding(&gate)], Vec::new());
    let edge = rig.clearcoat.edge;
    let mut working = asking(edge, "/held");
    let mut resting = [(); 2].map(|()| asking(edge, "/rest"));
    for client in &mut resting {
        assert_eq!(client.answer(false).unwrap().text(), "/rest");
    }
    let mut silent = Connection::open(edge).unwrap();
    eventually("all places are taken", || (connections(&rig) == 4.0).then_some(()));

    let began = Instant::now();
    let mut late = asking(edge, "/late");
    assert_eq!(late.answer(false).unwrap().text(), "/late");
    // They have been idle for a second by then, not for their usual limit of 75 s.
    assert!(began.elapsed() < Duration::from_secs(10), "after {:?}", began.elapsed());
    for client in resting.iter_mut().chain([&mut silent]) {
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    }
    gate.open();
    assert_eq!(working.answer(false).unwrap().text(), "/held");
    assert_eq!(rig.counter("clearcoat_edge_connections_refused_total"), 0.0);
    drop((working, late));
    eventually("no connection is left", || (connections(&rig) == 0.0).then_some(()));
}

#[test]
fn an_address_gets_no_more_than_its_places_which_are_freed_on_close() {
    let limits = "[limits]\nmax_connections_per_address = 2\n\
        [edge]\nlisten = [\"127.0.0.1:0\"]\ntrusted_proxies = [\"127.0.0.2/32\"]";
    let rig = Rig::start(limits, vec![Upstream::echo()], vec![Upstream::echo()]);
    let ask = |address: SocketAddr, last: u8| -> Option<(Connection, Answer)> {
        let mut client = Connection::open_from([127, 0, 0, last], address).expect("the kernel accepts");
        // Once refused, it may be closed before all is written.
        _ = client.send(get_request("/"));
        client.answer(false).ok().map(|answer| (client, answer))
    };
    let edge = rig.clearcoat.edge;
    let refused = || rig.counter("clearcoat_edge_connections_refused_total");
    let kept: Vec<_> = (0..2).map(|_| ask(edge, 3).expect("it has two places")).collect();
    for number in 1..=3 {
        let mut third = Connection::open_from([127, 0, 0, 3], edge).unwrap();
        let began = Instant::now();
        assert_eq!(third.rest(), (Vec::new(), Ending::Clean), "closed without a word from either side");
        assert!(began.elapsed() < Duration::from_secs(5), "after {:?}", began.elapsed());
        assert_eq!(refused(), f64::from(number));
    }
    // Other clients are not affected; proxies with many clients behind them have no limit, nor has the origin.
    let others: Vec<_> = (0..2).map(|_| ask(edge, 4)).chain((0..5).map(|_| ask(edge, 2))).collect();
    let varnish: Vec<_> = (0..5).map(|_| ask(rig.clearcoat.origin, 3)).collect();
    assert!(others.iter().chain(&varnish).all(Option::is_some));
    assert_eq!(refused(), 3.0);
    eventually("those that were refused are not counted", || (connections(&rig) == 9.0).then_some(()));

    drop(kept);
    let again = eventually("the place is free again", || ask(edge, 3));
    assert_eq!(again.1.status, 200);
    assert_eq!(rig.varnish[0].calls().len(), 10);
    drop((again, others));
    eventually("no connection is left", || (connections(&rig) == 0.0).then_some(()));
}
