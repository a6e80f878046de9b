//! Draining: requests in flight are completed, and new ones are not accepted. The edge drains first; the origin serves
//! until no client at the edge can need a page that its Varnish does not have.

use std::net::{SocketAddr, TcpStream};

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Answer, Connection, Ending, get};
use crate::support::eventually;
use crate::support::upstream::{Gate, Then, Upstream};

/// Half of the long download.
const HALF: usize = 1024 * 1024;

/// The gates of a node's answers.
#[derive(Clone, Default)]
struct Held {
    /// The second half of `/long`.
    rest: Gate,
    /// All of `/late`.
    late: Gate,
}

fn node(held: &Held) -> Upstream {
    let held = held.clone();
    Upstream::start(move |call| {
        let path = call.path().to_owned();
        match path.as_str() {
            "/long" => {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 2 * HALF);
                let begun = call.send(head).is_ok() && call.send(vec![b'1'; HALF]).is_ok() && call.wait(&held.rest);
                if begun { call.send_then(vec![b'2'; HALF], Then::KeepAlive) } else { Then::Close }
            }
            "/late" => {
                call.wait(&held.late);
                call.answer(&path)
            }
            _ => call.answer(&path),
        }
    })
}

/// Clients of one listener in every relevant state.
struct Clients {
    listener: SocketAddr,
    silent: Connection,
    idle: Connection,
    long: Connection,
    long_head: Answer,
    late: Connection,
}

impl Clients {
    fn of(listener: SocketAddr) -> Self {
        let connect = || Connection::open(listener).expect("clearcoat accepts");
        let ask = |path: &str| {
            let mut client = connect();
            client.send(get_request(path)).expect("clearcoat reads");
            client
        };
        let silent = connect();
        let mut idle = ask("/idle");
        assert_eq!(idle.answer(false).expect("an answer").text(), "/idle");
        let mut long = ask("/long");
        let long_head = long.head().expect("half an answer");
        Clients { listener, silent, idle, long, long_head, late: ask("/late") }
    }

    /// Checks that each of them ends properly while the listener drains.
    fn end(mut self, held: &Held) {
        for resting in [&mut self.silent, &mut self.idle] {
            assert_eq!(resting.rest(), (Vec::new(), Ending::Clean), "a connection at rest");
        }
        eventually("new connections are refused", || TcpStream::connect(self.listener).is_err().then_some(()));
        held.late.open();
        let answer = self.late.answer(false).expect("an answer");
        assert_eq!((answer.text(), answer.header("Connection")), ("/late", Some("close")), "{answer:?}");
        assert_eq!(self.late.rest(), (Vec::new(), Ending::Clean), "who was told that it closes");
        held.rest.open();
        let mut body = Vec::new();
        let read = self.long.body_in_pieces(&self.long_head, |piece| body.extend_from_slice(piece));
        read.expect("the whole download");
        assert!(body == [vec![b'1'; HALF], vec![b'2'; HALF]].concat(), "{} bytes that are not right", body.len());
        assert_eq!(self.long.rest(), (Vec::new(), Ending::Clean), "a download that is through");
    }
}

#[test]
fn sigterm_completes_requests_in_flight_and_closes_the_rest_edge_first() {
    let (held_by_varnish, held_by_web) = (Held::default(), Held::default());
    let mut rig = Rig::start("[runtime]\nworkers = 2", vec![node(&held_by_varnish)], vec![node(&held_by_web)]);
    let (edge, origin) = (Clients::of(rig.clearcoat.edge), Clients::of(rig.clearcoat.origin));
    eventually("all requests are at the nodes", || (rig.inflight() == 4.0).then_some(()));

    rig.clearcoat.terminate();
    let admin = rig.clearcoat.admin;
    eventually("it says that it is not ready", || {
        get(admin, "/readyz").is_ok_and(|answer| answer.status == 503).then_some(())
    });
    // It still accepts requests until the balancer in front has noticed.
    assert_eq!(get(edge.listener, "/leaving").expect("accepted while it leaves").status, 200);
    edge_ends_before_the_origin(edge, &held_by_varnish, &origin);
    origin.end(&held_by_web);
    let status = rig.clearcoat.wait();
    assert!(status.success(), "{status}");
}

fn edge_ends_before_the_origin(edge: Clients, held: &Held, origin: &Clients) {
    eventually("the edge refuses new connections", || TcpStream::connect(edge.listener).is_err().then_some(()));
    let fetched = get(origin.listener, "/fetched").expect("the origin serves while the edge drains");
    assert_eq!((fetched.status, fetched.header("Connection")), (200, None), "{fetched:?}");
    edge.end(held);
}

#[test]
fn a_connection_during_the_drain_is_answered_or_refused_never_dropped() {
    for at_the_edge in [true, false] {
        let rig = Rig::start("[runtime]\nworkers = 2", vec![Upstream::echo()], vec![Upstream::echo()]);
        let (listener, node) =
            if at_the_edge { (rig.clearcoat.edge, &rig.varnish[0]) } else { (rig.clearcoat.origin, &rig.web[0]) };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(move || until_refused(listener));
            }
            eventually("requests are answered", || (node.calls().len() > 20).then_some(()));
            rig.clearcoat.terminate();
        });
    }
}

/// Clients of the edge that wait for `/late`, once their requests are at its node.
fn waiting_at_the_edge(rig: &Rig, count: usize) -> Vec<Connection> {
    let clients = (0..count).map(|_| {
        let mut client = rig.edge();
        client.send(get_request("/late")).expect("clearcoat reads");
        client
    });
    let clients = clients.collect();
    eventually("all are at the node", || (rig.inflight() == count as f64).then_some(()));
    clients
}

#[test]
fn what_is_not_finished_when_the_drain_is_over_is_cut_and_said_once() {
    let (held_by_varnish, held_by_web) = (Held::default(), Held::default());
    let config = "[shutdown]\nleave = \"0s\"\ndrain = \"100ms\"\n[runtime]\nworkers = 2";
    let mut rig = Rig::start(config, vec![node(&held_by_varnish)], vec![node(&held_by_web)]);
    let mut readers = waiting_at_the_edge(&rig, 2);
    let mut fetch = rig.origin();
    fetch.send(get_request("/late")).expect("clearcoat reads");
    eventually("the fetch is at its node", || (rig.inflight() == 3.0).then_some(()));
    let _resting = rig.edge();
    rig.clearcoat.terminate();
    assert!(rig.clearcoat.wait().success());
    for client in readers.iter_mut().chain([&mut fetch]) {
        assert!(client.answer(false).is_err(), "it was cut");
    }
    let log = rig.clearcoat.log();
    log.waits_for_count("requests that were still under way are cut: shutdown.drain is over", 1);
    assert!(log.has("\"edge\":2,\"origin\":1,\"purges\":0"), "{}", log.text());
}

#[test]
fn a_second_signal_cuts_what_is_under_way_at_once() {
    let held = Held::default();
    let config = "[shutdown]\nleave = \"10min\"\ndrain = \"1h\"";
    let mut rig = Rig::start(config, vec![node(&held)], vec![node(&held)]);
    let mut readers = waiting_at_the_edge(&rig, 1);
    rig.clearcoat.terminate();
    let admin = rig.clearcoat.admin;
    eventually("it says that it is not ready", || {
        get(admin, "/readyz").is_ok_and(|answer| answer.status == 503).then_some(())
    });
    // As long as `shutdown.leave` lasts.
    assert_eq!(get(rig.clearcoat.edge, "/leaving").expect("still accepted").status, 200);
    rig.clearcoat.terminate();
    assert!(rig.clearcoat.wait().success());
    assert!(readers[0].answer(false).is_err(), "it was cut");
    let log = rig.clearcoat.log();
    log.waits_for_count("requests that were still under way are cut: a second signal", 1);
    assert!(log.has("\"edge\":1,\"origin\":0,\"purges\":0"), "{}", log.text());
}

#[test]
fn an_end_that_cuts_nobody_says_so_of_nobody() {
    let mut rig = Rig::start("[shutdown]\nleave = \"0s\"", vec![Upstream::echo()], vec![Upstream::echo()]);
    assert_eq!(get(rig.clearcoat.edge, "/a").expect("an answer").status, 200);
    rig.clearcoat.terminate();
    assert!(rig.clearcoat.wait().success());
    rig.clearcoat.log().waits_for("clearcoat ended");
    assert!(!rig.clearcoat.log().has("are cut"), "{}", rig.clearcoat.log().text());
}

/// Sends requests, each on a new connection, until one is refused.
fn until_refused(listener: SocketAddr) {
    while let Ok(mut client) = Connection::open(listener) {
        let asked = client.send("GET /burst HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let answer = asked.and_then(|()| client.answer(false));
        let answer = answer.unwrap_or_else(|error| panic!("connected, and then {error}"));
        assert_eq!(answer.text(), "/burst");
    }
}
