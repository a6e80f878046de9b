//! Limits of nodes and the queue before them: nodes that hold what they get, until the test lets it go.

use std::collections::BTreeSet;
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use h2::Reason;
use serde_json::Value;

use crate::data_path::reload::{reloaded, set};
use crate::data_path::rig::{Rig, get_request};
use crate::data_path::tls::Secure;
use crate::support::client::{Connection, Ending, get};
use crate::support::eventually;
use crate::support::http2::{Http2, request};
use crate::support::upstream::{Checks, Gate, Then, Upstream};

/// Requests at some nodes, in the order in which they came. Each is answered with its path when the test says so.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<Inside>>);

#[derive(Default)]
struct Inside {
    came: Vec<(String, Gate)>,
    let_go: usize,
    /// How many are there now, and were at most.
    now: usize,
    most: usize,
    holds_no_more: bool,
}

impl Held {
    fn node(&self) -> Upstream {
        let held = self.clone();
        Upstream::start(move |call| {
            let path = call.path().to_owned();
            if call.body().is_err() {
                return Then::Close;
            }
            let gate = held.enter(&path);
            let goes_on = call.wait(&gate);
            held.0.lock().unwrap().now -= 1;
            if goes_on { call.answer(&path) } else { Then::Close }
        })
    }

    fn enter(&self, path: &str) -> Gate {
        let mut inside = self.0.lock().unwrap();
        inside.now += 1;
        inside.most = inside.most.max(inside.now);
        let gate = if inside.holds_no_more { Gate::opened() } else { Gate::default() };
        inside.came.push((path.to_owned(), gate.clone()));
        gate
    }

    /// The paths of all that came so far.
    fn came(&self) -> Vec<String> {
        self.0.lock().unwrap().came.iter().map(|(path, _)| path.clone()).collect()
    }

    fn waits_for(&self, count: usize) {
        eventually(&format!("{count} requests came"), || (self.came().len() >= count).then_some(()));
    }

    /// Lets go the one that came first of those that are there.
    fn let_one_go(&self) {
        let mut inside = self.0.lock().unwrap();
        let (_, gate) = &inside.came[inside.let_go];
        gate.open();
        inside.let_go += 1;
    }

    fn let_all_go(&self) {
        let mut inside = self.0.lock().unwrap();
        inside.holds_no_more = true;
        inside.came.iter().for_each(|(_, gate)| gate.open());
    }
}

/// How many requests wait for nodes of this role.
fn waiting(rig: &Rig, role: &str) -> f64 {
    rig.counter(&format!("clearcoat_queue_length{{role=\"{role}\",waits_for=\"node\"}}"))
}

fn wait_in_line(rig: &Rig, role: &str, count: usize) {
    eventually(&format!("{count} requests wait"), || (waiting(rig, role) == count as f64).then_some(()));
}

fn failures(rig: &Rig, listener: &str, reason: &str) -> f64 {
    rig.counter(&format!("clearcoat_{listener}_failures_total{{reason=\"{reason}\"}}"))
}

/// An origin listener with these keys, and as many workers, before these web nodes.
fn origin(keys: &str, workers: usize, web: Vec<Upstream>) -> Rig {
    let config = format!("[origin]\nlisten = [\"127.0.0.1:0\"]\n{keys}\n[runtime]\nworkers = {workers}\n");
    Rig::start(&config, Vec::new(), web)
}

/// A client that has asked for this path.
fn asks(rig: &Rig, path: &str) -> Connection {
    let mut client = rig.origin();
    client.send(get_request(path)).unwrap();
    client
}

#[test]
fn a_node_never_has_more_than_its_limit_of_all_workers_and_versions() {
    const EACH: usize = 8;
    let held = Held::default();
    let more = "[runtime]\nworkers = 3\n";
    let secure = Secure::start("max_requests_per_node = 3", more, vec![held.node()]);
    let rig = &secure.rig;
    let mut plain: Vec<Connection> = (0..EACH).map(|_| rig.edge()).collect();
    plain.iter_mut().enumerate().for_each(|(n, client)| client.send(get_request(&format!("/plain/{n}"))).unwrap());
    // Streams of a connection are requests as any other.
    let http2 = [Http2::open(secure.address()), Http2::open(secure.address())];
    let streams: Vec<_> =
        (0..EACH).map(|n| http2[n % 2].ask(request("GET", &format!("/h2/{n}")).body(()).unwrap(), true)).collect();
    wait_in_line(rig, "varnish", 2 * EACH - 3);
    held.waits_for(3);
    let node = rig.clearcoat.node("varnish-1");
    assert_eq!(
        (&node["state"], &node["gets_traffic"], &node["max_requests"]),
        (&"at-limit".into(), &true.into(), &3.into())
    );
    assert_eq!(node["health"], "up", "its checks have no limit");
    assert_eq!(rig.counter("clearcoat_node_at_limit{node=\"varnish-1\",role=\"varnish\"}"), 1.0);
    let queues = &rig.clearcoat.fleet()["queues"];
    assert_eq!(queues[0], serde_json::json!({"listener": "edge", "waiting": 2 * EACH - 3, "max_queue": 1024}));
    rig.clearcoat.log().waits_for("every node that may serve is at its limit of requests: others wait");
    held.let_all_go();
    for (n, client) in plain.iter_mut().enumerate() {
        assert_eq!(client.answer(false).unwrap().text(), format!("/plain/{n}"));
    }
    for (n, stream) in streams.into_iter().enumerate() {
        assert_eq!(stream.answer().unwrap().text(), format!("/h2/{n}"));
    }
    rig.becomes_idle();
    assert_eq!(held.0.lock().unwrap().most, 3);
    assert_eq!(waiting(rig, "varnish"), 0.0);
    let waits = rig.counter("clearcoat_queue_duration_seconds_count{role=\"varnish\"}");
    assert!(waits >= (2 * EACH - 3) as f64, "{waits} waits");
    assert_eq!(rig.counter("clearcoat_node_at_limit{node=\"varnish-1\",role=\"varnish\"}"), 0.0);
    assert_eq!(rig.clearcoat.node("varnish-1")["state"], "serving");
}

#[test]
fn who_waits_is_served_in_the_order_of_coming_whichever_worker_he_is_at() {
    const COUNT: usize = 12;
    let held = Held::default();
    let rig = origin("max_requests_per_node = 1\nqueue_timeout = \"300s\"", 3, vec![held.node()]);
    let mut clients = vec![asks(&rig, "/0")];
    held.waits_for(1);
    for number in 1..COUNT {
        clients.push(asks(&rig, &format!("/{number}")));
        wait_in_line(&rig, "web", number);
    }
    for (number, client) in clients.iter_mut().enumerate() {
        held.waits_for(number + 1);
        held.let_one_go();
        assert_eq!(client.answer(false).unwrap().text(), format!("/{number}"));
    }
    let expected: Vec<String> = (0..COUNT).map(|number| format!("/{number}")).collect();
    assert_eq!(held.came(), expected);
    assert_eq!(held.0.lock().unwrap().most, 1);
}

#[test]
fn a_full_node_is_passed_by_for_one_with_room_and_either_takes_who_waits() {
    let held = [Held::default(), Held::default()];
    let rig = origin("max_requests_per_node = 1", 2, held.iter().map(Held::node).collect());
    let mut clients = vec![asks(&rig, "/0"), asks(&rig, "/1")];
    held.iter().for_each(|held| held.waits_for(1));
    clients.push(asks(&rig, "/2"));
    wait_in_line(&rig, "web", 1);
    // Whichever is free first: here the one that the last request would not have been sent to by its number.
    held[1].let_one_go();
    held[1].waits_for(2);
    assert_eq!(held[0].came().len(), 1);
    held.iter().for_each(Held::let_all_go);
    let answers: BTreeSet<String> =
        clients.iter_mut().map(|client| client.answer(false).unwrap().text().to_owned()).collect();
    assert_eq!(answers.len(), 3);
}

#[test]
fn who_has_waited_for_too_long_is_told_when_to_come_again() {
    let held = Held::default();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("access.log");
    let log = format!("[log]\nlevel = \"debug\"\nformat = \"json\"\naccess = \"json\"\naccess_file = {file:?}\n");
    let keys = format!("max_requests_per_node = 1\nqueue_timeout = \"1500ms\"\n{log}");
    let rig = origin(&keys, 2, vec![held.node()]);
    let mut first = asks(&rig, "/first");
    held.waits_for(1);
    let began = Instant::now();
    let mut late = asks(&rig, "/late");
    let answer = late.answer(false).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(1500), "{:?}", began.elapsed());
    assert_eq!(
        (answer.status, answer.header("Retry-After"), answer.text()),
        (503, Some("2"), "all servers are busy\n")
    );
    eventually("it is counted", || (failures(&rig, "origin", "queue_timeout") == 1.0).then_some(()));
    assert_eq!(waiting(&rig, "web"), 0.0);
    let line = eventually("the access log has it", || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.lines().find(|line| line.contains("\"/late\"")).map(|line| serde_json::from_str::<Value>(line).unwrap())
    });
    assert_eq!(
        (&line["termination"], &line["reason"], &line["status"]),
        (&"sQ".into(), &"queue_timeout".into(), &503.into())
    );
    assert!(line["queue_ms"].as_f64().unwrap() >= 1500.0 && line["node"].is_null() && line["tries"] == 0, "{line}");
    rig.clearcoat.log().waits_for("others wait, or are answered 503");
    let problems = rig.clearcoat.fleet()["problems"].to_string();
    assert!(problems.contains("ClearcoatOverload"), "{problems}");
    // The one that has the place has lost nothing, and neither has who comes when it is free again.
    held.let_all_go();
    assert_eq!(first.answer(false).unwrap().text(), "/first");
    assert_eq!(asks(&rig, "/next").answer(false).unwrap().text(), "/next");
    assert_eq!(held.came(), ["/first", "/next"]);
}

#[test]
fn what_the_queue_has_no_room_for_is_refused_at_once_and_0_is_no_room() {
    let held = Held::default();
    let rig = origin("max_requests_per_node = 1\nmax_queue = 2\nqueue_timeout = \"300s\"", 2, vec![held.node()]);
    let mut clients = vec![asks(&rig, "/0")];
    held.waits_for(1);
    for number in 1..=2 {
        clients.push(asks(&rig, &format!("/{number}")));
        wait_in_line(&rig, "web", number);
    }
    for _ in 0..5 {
        let answer = get(rig.clearcoat.origin, "/too-many").unwrap();
        assert_eq!((answer.status, answer.header("Retry-After")), (503, Some("300")), "{answer:?}");
    }
    eventually("they are counted", || (failures(&rig, "origin", "queue_full") == 5.0).then_some(()));
    held.let_all_go();
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.answer(false).unwrap().text(), format!("/{number}"));
    }
    assert_eq!(held.came(), ["/0", "/1", "/2"]);

    let held = Held::default();
    let rig = origin("max_requests_per_node = 1\nmax_queue = 0", 2, vec![held.node()]);
    let _first = asks(&rig, "/0");
    held.waits_for(1);
    assert_eq!(get(rig.clearcoat.origin, "/1").unwrap().status, 503);
    held.let_all_go();
}

/// What a client does that has asked, and waits.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    Closes,
    Resets,
    /// It has sent a second request behind the first, which hides its end.
    ClosesBehindAnother,
    ClosesTls,
    CancelsStream,
}

#[test]
fn a_client_that_leaves_while_it_waits_frees_its_place_in_the_queue() {
    let held = Held::default();
    let more = "[runtime]\nworkers = 2\n";
    let secure = Secure::start("max_requests_per_node = 1\nqueue_timeout = \"300s\"", more, vec![held.node()]);
    let rig = &secure.rig;
    let ask = |path: &str| {
        let mut client = rig.edge();
        client.send(get_request(path)).unwrap();
        client
    };
    let mut first = ask("/first");
    held.waits_for(1);
    let ways = [Leaves::Closes, Leaves::Resets, Leaves::ClosesBehindAnother, Leaves::ClosesTls, Leaves::CancelsStream];
    for (number, way) in ways.into_iter().enumerate() {
        match way {
            Leaves::Closes | Leaves::Resets | Leaves::ClosesBehindAnother => {
                let mut client = ask("/gone");
                if matches!(way, Leaves::ClosesBehindAnother) {
                    client.send(get_request("/gone-too")).unwrap();
                }
                wait_in_line(rig, "varnish", 1);
                if matches!(way, Leaves::Resets) {
                    socket2::SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
                } else {
                    client.stream.shutdown(Shutdown::Write).unwrap();
                }
                drop(client);
            }
            Leaves::ClosesTls => {
                let mut session = secure.session();
                session.send(get_request("/gone")).unwrap();
                wait_in_line(rig, "varnish", 1);
                session.tls.conn.send_close_notify();
                session.tls.conn.write_tls(&mut session.tls.sock).unwrap();
            }
            Leaves::CancelsStream => {
                let client = Http2::open(secure.address());
                let mut stream = client.ask(request("GET", "/gone").body(()).unwrap(), true);
                wait_in_line(rig, "varnish", 1);
                stream.reset(Reason::CANCEL);
                wait_in_line(rig, "varnish", 0);
            }
        }
        eventually(&format!("{way:?}: its place is free"), || (waiting(rig, "varnish") == 0.0).then_some(()));
        let gone = (number + 1) as f64;
        eventually(&format!("{way:?} is counted"), || (failures(rig, "edge", "client_gone") >= gone).then_some(()));
    }
    let mut last = ask("/last");
    wait_in_line(rig, "varnish", 1);
    held.let_all_go();
    assert_eq!(first.answer(false).unwrap().text(), "/first");
    assert_eq!(last.answer(false).unwrap().text(), "/last");
    assert_eq!(held.came(), ["/first", "/last"], "nothing is rendered for who has gone");
}

#[test]
fn a_reload_that_raises_the_limit_or_takes_it_away_serves_who_waits() {
    const COUNT: usize = 8;
    let held = Held::default();
    let rig = origin("max_requests_per_node = 1\nqueue_timeout = \"300s\"", 2, vec![held.node()]);
    let mut clients: Vec<Connection> = (0..COUNT).map(|number| asks(&rig, &format!("/{number}"))).collect();
    wait_in_line(&rig, "web", COUNT - 1);
    reloaded(&rig, |config| set(config, "origin", "max_requests_per_node", 4));
    held.waits_for(4);
    wait_in_line(&rig, "web", COUNT - 4);
    // One that is lowered cuts nobody, and lets nobody in.
    reloaded(&rig, |config| set(config, "origin", "max_requests_per_node", 2));
    (0..2).for_each(|_| held.let_one_go());
    eventually("two have ended", || (rig.inflight() == 2.0).then_some(()));
    assert_eq!(waiting(&rig, "web"), (COUNT - 4) as f64);
    held.let_one_go();
    held.waits_for(5);
    assert_eq!(held.0.lock().unwrap().most, 4);
    reloaded(&rig, |config| set(config, "origin", "max_requests_per_node", 0));
    held.waits_for(COUNT);
    wait_in_line(&rig, "web", 0);
    held.let_all_go();
    let answers: BTreeSet<String> =
        clients.iter_mut().map(|client| client.answer(false).unwrap().text().to_owned()).collect();
    assert_eq!(answers.len(), COUNT);
}

#[test]
fn a_node_that_joins_takes_who_waits() {
    let (held, other) = (Held::default(), Held::default());
    let rig = origin("max_requests_per_node = 1\nqueue_timeout = \"300s\"", 2, vec![held.node()]);
    let mut clients = [asks(&rig, "/0"), asks(&rig, "/1")];
    wait_in_line(&rig, "web", 1);
    let joins = other.node();
    reloaded(&rig, |config| {
        let node = format!("role = \"web\"\nid = \"web-2\"\naddress = \"{}\"", joins.address).parse::<toml::Table>();
        let nodes = config.get_mut("node").and_then(toml::Value::as_array_mut).expect("nodes");
        nodes.push(node.expect("TOML").into());
    });
    // Once it has passed its checks.
    other.waits_for(1);
    wait_in_line(&rig, "web", 0);
    [&held, &other].iter().for_each(|held| held.let_all_go());
    clients.iter_mut().for_each(|client| assert_eq!(client.answer(false).unwrap().status, 200));
}

#[test]
fn a_tunnel_has_its_place_for_as_long_as_it_lasts() {
    let node = Upstream::start(|call| {
        if call.path() == "/tunnel" {
            let switch = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
            if call.send(switch).is_ok() {
                call.rest();
            }
            return Then::Close;
        }
        let path = call.path().to_owned();
        call.answer(&path)
    });
    let rig = origin("max_requests_per_node = 1\nqueue_timeout = \"300s\"", 2, vec![node]);
    let mut tunnel = rig.origin();
    tunnel.send("GET /tunnel HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n").unwrap();
    assert_eq!(tunnel.head().unwrap().status, 101);
    let mut waits = asks(&rig, "/page");
    wait_in_line(&rig, "web", 1);
    tunnel.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(waits.answer(false).unwrap().text(), "/page");
    assert_eq!(tunnel.rest(), (Vec::new(), Ending::Clean));
}

#[test]
fn with_no_cache_at_all_readers_wait_for_web_nodes_at_their_limit() {
    let held = Held::default();
    let config = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\nbypass_max_requests_per_node = 1\nqueue_timeout = \"300s\"\n\
                  [runtime]\nworkers = 2\n";
    let rig = Rig::start(config, Vec::new(), vec![held.node()]);
    let ask = |mut client: Connection, path: &str| {
        client.send(get_request(path)).unwrap();
        client
    };
    // One of the edge waits for a place that Varnish has, and one of Varnish has no limit.
    let mut of_varnish = [ask(rig.origin(), "/fetch/1"), ask(rig.origin(), "/fetch/2")];
    held.waits_for(2);
    let mut reader = ask(rig.edge(), "/read");
    wait_in_line(&rig, "varnish", 1);
    held.let_one_go();
    eventually("one has ended", || (rig.inflight() == 1.0).then_some(()));
    assert_eq!(waiting(&rig, "varnish"), 1.0);
    held.let_one_go();
    held.waits_for(3);
    held.let_all_go();
    of_varnish.iter_mut().for_each(|client| assert_eq!(client.answer(false).unwrap().status, 200));
    assert_eq!(reader.answer(false).unwrap().text(), "/read");
}

#[test]
fn a_request_at_a_node_that_goes_down_waits_there_and_for_a_full_one() {
    let [hangs, full] = [Held::default(), Held::default()];
    let rig = origin("max_requests_per_node = 1\nqueue_timeout = \"1s\"", 2, vec![hangs.node(), full.node()]);
    let mut clients = [asks(&rig, "/0"), asks(&rig, "/1")];
    [&hangs, &full].iter().for_each(|held| held.waits_for(1));
    rig.web[0].set_checks(Checks::Hang);
    eventually("it is down", || (rig.clearcoat.node("web-1")["health"] == "down").then_some(()));
    // It has no limit of time there, as its own node may answer yet.
    wait_in_line(&rig, "web", 1);
    let began = Instant::now();
    eventually("longer than queue_timeout has passed", || {
        (began.elapsed() > Duration::from_millis(1500)).then_some(())
    });
    assert_eq!(waiting(&rig, "web"), 1.0);
    full.let_one_go();
    full.waits_for(2);
    full.let_all_go();
    for client in &mut clients {
        assert_eq!(client.answer(false).unwrap().status, 200);
    }
    assert_eq!(rig.retries("web", "node_down"), 1.0);
    hangs.let_all_go();
    rig.becomes_idle();
}

#[test]
fn a_request_that_one_node_refused_waits_for_another_that_is_full() {
    let held = Held::default();
    let checks = "[health.web]\ninterval = \"60s\"\nfall = 1000\neject_after = 0";
    let keys = format!("max_requests_per_node = 1\nqueue_timeout = \"300s\"\n{checks}");
    let mut rig = origin(&keys, 2, vec![Upstream::echo(), held.node()]);
    drop(rig.web.remove(0));
    // Sooner or later one is sent to the node that is gone, and must wait for the other one.
    let mut clients = vec![asks(&rig, "/0"), asks(&rig, "/1")];
    held.waits_for(1);
    wait_in_line(&rig, "web", 1);
    assert!(rig.counter("clearcoat_upstream_connect_errors_total{node=\"web-1\",role=\"web\"}") >= 1.0);
    held.let_all_go();
    for client in &mut clients {
        assert_eq!(client.answer(false).unwrap().status, 200);
    }
    // Nothing of them was sent to the first node, so the budget has nothing to say.
    assert_eq!(rig.counter("clearcoat_retries_refused_total{reason=\"connect\",role=\"web\"}"), 0.0);
}
