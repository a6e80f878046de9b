//! Requests in flight on a node that goes down, leaves or moves: each lives as long as its connection, and is executed
//! once.

use std::net::SocketAddr;

use crate::data_path::rig::{Rig, get_request};
use crate::data_path::tls::Secure;
use crate::support::client::{Connection, Ending, get};
use crate::support::eventually;
use crate::support::http2::{Http2, request};
use crate::support::upstream::{Checks, Gate, Then, Upstream};

/// Health that changes quickly, and counts even if half of the nodes are down.
const CHECKS: &str = "[health.web]\ninterval = \"300ms\"\ntimeout = \"300ms\"\nrise = 1\nfall = 2\npanic_threshold = 0\n\
    [health.varnish]\ntrial = false\ninterval = \"300ms\"\ntimeout = \"300ms\"\nrise = 1\nfall = 2\n";

const UNSAFE: [&str; 5] = ["POST", "PUT", "DELETE", "PATCH", "brew"];

/// A node that answers paths beginning with `/slow` only when the gate is open; each answer is its name.
fn slow(name: &'static str, gate: &Gate) -> Upstream {
    let gate = gate.clone();
    Upstream::start(move |call| {
        if call.body().is_err() || (call.path().starts_with("/slow") && !call.wait(&gate)) {
            return Then::Close;
        }
        call.answer(name)
    })
}

fn has_health(rig: &Rig, id: &str, health: &str) {
    eventually("its health is as it should be", || (rig.clearcoat.node(id)["health"] == health).then_some(()));
}

/// Sends all requests to the first of two nodes while `then` runs.
fn with_all_at_the_first(rig: &Rig, role: &str, then: impl FnOnce()) {
    let nodes = if role == "web" { &rig.web } else { &rig.varnish };
    nodes[1].set_checks(Checks::Fail);
    has_health(rig, &format!("{role}-2"), "down");
    then();
    nodes[1].set_checks(Checks::Pass);
    has_health(rig, &format!("{role}-2"), "up");
}

fn send(listener: SocketAddr, method: &str, path: &str) -> Connection {
    let mut client = Connection::open(listener).expect("a connection");
    client.send(format!("{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{{}}")).expect("sent");
    client
}

fn arrivals(node: &Upstream, path: &str) -> usize {
    node.calls().iter().filter(|call| call.head.contains(&format!(" {path} "))).count()
}

#[test]
fn a_down_node_keeps_unsafe_requests_and_only_safe_ones_move() {
    for role in ["web", "varnish"] {
        let gate = Gate::default();
        let nodes = vec![slow("first", &gate), slow("second", &Gate::opened())];
        let (varnish, web) = if role == "web" { (Vec::new(), nodes) } else { (nodes, Vec::new()) };
        let rig = Rig::start(CHECKS, varnish, web);
        let (listener, nodes) = match role {
            "web" => (rig.clearcoat.origin, &rig.web),
            _ => (rig.clearcoat.edge, &rig.varnish),
        };
        let (mut unsafe_ones, mut safe_ones, mut half) = (Vec::new(), Vec::new(), None);
        with_all_at_the_first(&rig, role, || {
            unsafe_ones = UNSAFE.map(|method| send(listener, method, &format!("/slow/{method}"))).into();
            safe_ones = ["GET", "HEAD", "OPTIONS"]
                .map(|method| {
                    let mut client = Connection::open(listener).unwrap();
                    client.send(format!("{method} /slow/{method} HTTP/1.1\r\nHost: a\r\n\r\n")).unwrap();
                    (method, client)
                })
                .into();
            // A request with part of its body sent.
            let mut client = Connection::open(listener).unwrap();
            client.send("PUT /slow/half HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n{\"").unwrap();
            half = Some(client);
            eventually("the first node has all of them", || (nodes[0].calls().len() == UNSAFE.len() + 4).then_some(()));
        });
        nodes[0].set_checks(Checks::Fail);
        for (method, mut client) in safe_ones {
            let answer = client.answer(method == "HEAD").unwrap_or_else(|error| panic!("{role} {method}: {error}"));
            assert_eq!(answer.status, 200, "{role} {method}");
            assert_eq!(
                [0, 1].map(|node| arrivals(&nodes[node], &format!("/slow/{method}"))),
                [1, 1],
                "{role} {method}"
            );
        }
        assert_eq!(rig.retries(role, "node_down"), 3.0, "{role}");
        assert_eq!(rig.clearcoat.node(&format!("{role}-1"))["health"], "down", "{role}");

        // The sweep that moved the others has also seen these: they wait, and are answered by their original node.
        let mut half = half.expect("it was sent");
        half.send("}}").unwrap();
        gate.open();
        for (method, client) in UNSAFE.iter().zip(&mut unsafe_ones) {
            let answer = client.answer(false).unwrap_or_else(|error| panic!("{role} {method}: {error}"));
            assert_eq!((answer.status, answer.text()), (200, "first"), "{role} {method}: {answer:?}");
            assert_eq!(
                [0, 1].map(|node| arrivals(&nodes[node], &format!("/slow/{method}"))),
                [1, 0],
                "{role} {method} was carried out more than once"
            );
        }
        assert_eq!(half.answer(false).unwrap().text(), "first", "{role}");
        assert_eq!(rig.retries(role, "node_down"), 3.0, "{role}");
        rig.becomes_idle();
    }
}

#[test]
fn a_request_no_other_node_can_take_waits_and_moves_once_one_can() {
    let gate = Gate::default();
    let rig = Rig::start(CHECKS, Vec::new(), vec![slow("first", &gate), slow("second", &Gate::opened())]);
    let mut waits = rig.origin();
    with_all_at_the_first(&rig, "web", || {
        waits.send(get_request("/slow/moves")).unwrap();
        eventually("it is at the first node", || (arrivals(&rig.web[0], "/slow/moves") == 1).then_some(()));
        rig.web[0].set_checks(Checks::Fail);
        has_health(&rig, "web-1", "down");
        // No node is up: new requests are refused, existing ones stay.
        eventually("new requests are refused", || {
            (get(rig.clearcoat.origin, "/new").unwrap().status == 503).then_some(())
        });
    });
    assert_eq!(waits.answer(false).unwrap().text(), "second");

    // With a single node, that node's answer is awaited.
    let rig = Rig::start(CHECKS, Vec::new(), vec![slow("only", &gate)]);
    let mut waits = rig.origin();
    waits.send(get_request("/slow/stays")).unwrap();
    eventually("it is at the node", || (arrivals(&rig.web[0], "/slow/stays") == 1).then_some(()));
    rig.web[0].set_checks(Checks::Hang);
    has_health(&rig, "web-1", "down");
    eventually("new requests are refused", || (get(rig.clearcoat.origin, "/new").unwrap().status == 503).then_some(()));
    gate.open();
    let answer = waits.answer(false).unwrap();
    assert_eq!((answer.status, answer.text(), arrivals(&rig.web[0], "/slow/stays")), (200, "only", 1));
}

/// Edits the configuration as a tree, and reloads it.
fn reconfigure(rig: &Rig, change: impl FnOnce(&mut Vec<toml::Value>)) {
    let mut config: toml::Table = rig.clearcoat.config().parse().expect("TOML");
    change(config["node"].as_array_mut().expect("nodes"));
    rig.clearcoat.configure(&config.to_string());
    rig.clearcoat.reload();
}

#[test]
fn requests_complete_on_a_node_that_leaves_moves_or_is_drained() {
    for change in ["leaves", "moves", "is drained"] {
        let gate = Gate::default();
        let rig = Rig::start(CHECKS, Vec::new(), vec![slow("before", &gate)]);
        let after = slow("after", &Gate::opened());
        let methods = ["GET", "POST", "PUT", "DELETE"];
        let mut under_way = methods.map(|method| send(rig.clearcoat.origin, method, &format!("/slow/{method}")));
        eventually("the node has all of them", || (rig.web[0].calls().len() == methods.len()).then_some(()));
        assert_eq!(get(rig.clearcoat.origin, "/at-rest").unwrap().text(), "before");
        reconfigure(&rig, |nodes| {
            let mut new = nodes[0].clone();
            let node = nodes[0].as_table_mut().expect("a table");
            match change {
                "leaves" => node["id"] = "web-9".into(),
                "is drained" => _ = node.insert("weight".into(), 0.into()),
                _ => {}
            }
            if change == "is drained" {
                new["id"] = "web-9".into();
                new["address"] = after.address.to_string().into();
                nodes.push(new);
            } else {
                nodes[0]["address"] = after.address.to_string().into();
            }
        });
        eventually("new requests go to the other node", || {
            let answer = get(rig.clearcoat.origin, "/new").unwrap();
            (answer.status == 200 && answer.text() == "after").then_some(())
        });
        if change != "is drained" {
            // The sweep that does this has notified the requests in flight that their node is gone.
            eventually("the connection at rest is closed", || {
                (rig.web[0].established() == methods.len()).then_some(())
            });
        }
        gate.open();
        for (method, client) in methods.iter().zip(&mut under_way) {
            let answer = client.answer(false).unwrap_or_else(|error| panic!("{change}, {method}: {error}"));
            assert_eq!((answer.status, answer.text()), (200, "before"), "{change}, {method}: {answer:?}");
            assert_eq!(arrivals(&rig.web[0], &format!("/slow/{method}")), 1, "{change}, {method}");
            assert_eq!(arrivals(&after, &format!("/slow/{method}")), 0, "{change}, {method}");
        }
        if change == "leaves" {
            // Answers after the node has left do not recreate its series.
            eventually("its series are gone", || {
                let metrics = get(rig.clearcoat.admin, "/metrics").unwrap();
                (!metrics.text().contains("web-1")).then_some(())
            });
        }
    }
}

#[test]
fn a_put_over_http_2_is_carried_out_once_by_the_node_that_has_it() {
    let gate = Gate::default();
    let nodes = vec![slow("first", &gate), slow("second", &Gate::opened())];
    let secure = Secure::start("", CHECKS, nodes);
    let (rig, client) = (&secure.rig, Http2::open(secure.address()));
    let mut streams = Vec::new();
    with_all_at_the_first(rig, "varnish", || {
        streams = ["PUT", "GET"]
            .map(|method| client.ask(request(method, &format!("/slow/{method}")).body(()).unwrap(), true))
            .into();
        eventually("the first node has both", || (rig.varnish[0].calls().len() == 2).then_some(()));
    });
    rig.varnish[0].set_checks(Checks::Hang);
    assert_eq!(streams.pop().expect("the GET").answer().unwrap().text(), "second");
    gate.open();
    assert_eq!(streams.pop().expect("the PUT").answer().unwrap().text(), "first");
    assert_eq!([0, 1].map(|node| arrivals(&rig.varnish[node], "/slow/PUT")), [1, 0]);
}

#[test]
fn an_upload_that_waits_for_100_and_an_upgrade_are_not_sent_twice() {
    let gate = Gate::default();
    let rig = Rig::start(CHECKS, Vec::new(), vec![slow("first", &gate), slow("second", &Gate::opened())]);
    let (mut expects, mut tunnel) = (rig.origin(), rig.origin());
    let switched = Upstream::start(|call| {
        let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        if call.send(head).is_err() {
            return Then::Close;
        }
        let mut echoed = Vec::new();
        if call.exactly(4, |piece| echoed.extend_from_slice(piece)).is_err() {
            return Then::Close;
        }
        call.send_then(echoed, Then::Linger)
    });
    with_all_at_the_first(&rig, "web", || {
        let head = "PUT /slow/expects HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
        expects.send(head).unwrap();
        eventually("the first node has the head", || (arrivals(&rig.web[0], "/slow/expects") == 1).then_some(()));
    });
    rig.web[0].set_checks(Checks::Fail);
    has_health(&rig, "web-1", "down");
    let mut witness = rig.origin();
    witness.send(get_request("/new")).unwrap();
    assert_eq!(witness.answer(false).unwrap().text(), "second");
    expects.send("{}").unwrap();
    gate.open();
    assert_eq!(expects.answer(false).unwrap().text(), "first");
    assert_eq!(arrivals(&rig.web[1], "/slow/expects"), 0);

    // A tunnel outlives its node's health and its membership in the fleet.
    reconfigure(&rig, |nodes| {
        nodes.truncate(1);
        nodes[0]["id"] = "tunnel".into();
        nodes[0]["address"] = switched.address.to_string().into();
    });
    eventually("it is the only one", || {
        let nodes = rig.clearcoat.nodes();
        (nodes.len() == 1 && nodes[0]["id"] == "tunnel" && nodes[0]["health"] == "up").then_some(())
    });
    tunnel.send("GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").unwrap();
    assert_eq!(tunnel.answer(false).unwrap().status, 101);
    switched.set_checks(Checks::Fail);
    has_health(&rig, "tunnel", "down");
    reconfigure(&rig, |nodes| nodes[0]["id"] = "another".into());
    eventually("the node has left", || {
        let nodes = rig.clearcoat.nodes();
        (nodes.len() == 1 && nodes[0]["id"] == "another").then_some(())
    });
    tunnel.send("ping").unwrap();
    assert_eq!(tunnel.rest(), (b"ping".to_vec(), Ending::Clean));
}

#[test]
fn a_reset_by_a_down_node_ends_the_wait_of_requests_that_cannot_repeat() {
    let gate = Gate::default();
    let dies = {
        let gate = gate.clone();
        Upstream::start(move |call| {
            call.wait(&gate);
            Then::Reset
        })
    };
    let rig = Rig::start(CHECKS, Vec::new(), vec![dies, slow("second", &Gate::opened())]);
    let mut client = None;
    with_all_at_the_first(&rig, "web", || {
        client = Some(send(rig.clearcoat.origin, "PUT", "/slow/order"));
        eventually("it is at the node", || (arrivals(&rig.web[0], "/slow/order") == 1).then_some(()));
    });
    rig.web[0].set_checks(Checks::Fail);
    has_health(&rig, "web-1", "down");
    gate.open();
    let answer = client.expect("it was sent").answer(false).unwrap();
    assert_eq!((answer.status, arrivals(&rig.web[1], "/slow/order")), (502, 0), "{answer:?}");
}
