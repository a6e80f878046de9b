//! The PROXY header to a real varnishd whose listener expects it: its `client.ip` is the client, its health checks and
//! purges work, and a Varnish beside it without that setting gets none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;

use crate::data_path::rig::get_request;
use crate::support::client::Connection;
use crate::support::fleet::{Fleet, Plan};

/// How many of the three Varnish nodes expect a header: the first two.
const SEND_PROXY: usize = 2;

/// Answers `/whoami` with the client, whether it is in an ACL, the number of the session and the name of the node.
fn telling(vcl: &str, id: &str, _folder: &Path) -> String {
    let own = format!(
        "acl ipv4_loopback {{
    \"127.0.0.0\"/8;
}}

sub vcl_recv {{
    if (req.url ~ \"^/whoami\") {{
        set req.http.X-Listed = \"unlisted\";
        if (client.ip ~ ipv4_loopback) {{
            set req.http.X-Listed = \"listed\";
        }}
        return (synth(700, client.ip + \" \" + req.http.X-Listed + \" \" + sess.xid + \" {id}\"));
    }}
}}

sub vcl_synth {{
    if (resp.status == 700) {{
        synthetic(resp.reason);
        set resp.status = 200;
        return (deliver);
    }}
}}

sub vcl_recv {{\n"
    );
    assert!(vcl.contains("sub vcl_recv {\n"), "the VCL has another form");
    vcl.replacen("sub vcl_recv {\n", &own, 1)
}

/// A fleet with this many workers, and a fixed node for each URL.
fn fleet(workers: usize) -> Fleet {
    let listen = "[\"127.0.0.1:0\", \"[::1]:0\", \"[::]:0\"]";
    let config = format!("[runtime]\nworkers = {workers}\n[edge]\nlisten = {listen}\nbounded_load = 0");
    Fleet::start(&Plan { web: 1, send_proxy: SEND_PROXY, config: config.leak(), vcl: telling, ..Plan::default() })
}

/// A node's report about one request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Told {
    client: String,
    listed: String,
    session: String,
    node: String,
}

fn ask(client: &mut Connection, path: &str) -> Told {
    client.send(get_request(path)).expect("the edge reads");
    let answer = client.answer(false).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    let words: Vec<_> = answer.text().split(' ').map(str::to_owned).collect();
    let [client, listed, session, node] = words.try_into().expect("four words");
    Told { client, listed, session, node }
}

fn wants_header(node: &str) -> bool {
    (1..=SEND_PROXY).any(|number| node == format!("varnish-{number}"))
}

#[test]
fn each_request_has_its_clients_ip_and_clients_share_no_connection() {
    const CLIENTS: u8 = 8;
    const CONNECTIONS: usize = 3;
    const REQUESTS: usize = 30;
    let fleet = fleet(2);
    let edge = fleet.clearcoat.edge;
    let run = |number: u8| {
        let source = [127, 0, 0, 10 + number];
        let mut told: Vec<(SocketAddr, Told)> = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut client = Connection::open_from(source, edge).expect("the edge accepts");
            let address = client.stream.local_addr().expect("an address");
            for request in 0..REQUESTS {
                told.push((address, ask(&mut client, &format!("/whoami/{}", request % 10))));
            }
        }
        told
    };
    let told: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || run(number))).collect();
        clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    });

    let mut clients_of: BTreeMap<(&str, &str), BTreeSet<SocketAddr>> = BTreeMap::new();
    let mut asked: BTreeMap<&str, usize> = BTreeMap::new();
    for (address, told) in &told {
        *asked.entry(&told.node).or_default() += 1;
        if wants_header(&told.node) {
            assert_eq!(told.client, address.ip().to_string(), "{told:?}");
            clients_of.entry((&told.node, &told.session)).or_default().insert(*address);
        } else {
            assert_eq!(told.client, "127.0.0.1", "{told:?}");
        }
    }
    assert_eq!(asked.len(), 3, "a node was never asked: {asked:?}");
    let shared: Vec<_> = clients_of.iter().filter(|(_, clients)| clients.len() > 1).collect();
    assert!(shared.is_empty(), "clients share a connection: {shared:?}");
}

#[test]
fn a_client_that_keeps_its_connection_keeps_the_one_behind_it() {
    let fleet = fleet(1);
    let (mut client, mut other) = [(); 2].map(|()| Connection::open(fleet.clearcoat.edge).unwrap()).into();
    let mut sessions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for request in 0..60 {
        let path = format!("/whoami/{}", request % 10);
        for client in [&mut client, &mut other] {
            let told = ask(client, &path);
            sessions.entry(told.node).or_default().insert(told.session);
        }
    }
    for (node, sessions) in sessions {
        // One for each client; without a header, a shared one.
        assert_eq!(sessions.len(), if wants_header(&node) { 2 } else { 1 }, "{node}: {sessions:?}");
    }
}

/// A worker keeps 256 idle connections to a node. Those of departed clients must not displace others.
#[test]
fn a_crowd_that_came_and_went_costs_nobody_else_his_connection() {
    let fleet = fleet(1);
    let open = || Connection::open(fleet.clearcoat.edge).unwrap();
    let mut paths = (0..100).map(|number| format!("/whoami/{number}"));
    let path = paths.find(|path| wants_header(&ask(&mut open(), path).node)).expect("a page of such a node");
    for _ in 0..300 {
        ask(&mut open(), &path);
    }
    let mut client = open();
    let sessions: BTreeSet<_> = (0..5).map(|_| ask(&mut client, &path).session).collect();
    assert_eq!(sessions.len(), 1, "{sessions:?}");
}

#[test]
fn a_client_has_its_own_address_whatever_the_families_of_the_sockets() {
    let fleet = fleet(1);
    let [ipv4, ipv6, both] = fleet.clearcoat.listening("edge").try_into().expect("three addresses");
    let through = |ip: [u16; 8]| SocketAddr::from((ip, both.port()));
    let mapped = SocketAddr::from(([127, 0, 0, 1], both.port()));
    for (edge, client) in
        [(ipv4, "127.0.0.1"), (ipv6, "::1"), (through([0, 0, 0, 0, 0, 0, 0, 1]), "::1"), (mapped, "127.0.0.1")]
    {
        let mut connection = Connection::open(edge).unwrap();
        let told: Vec<_> = (0..10).map(|number| ask(&mut connection, &format!("/whoami/{number}"))).collect();
        assert!(told.iter().any(|told| wants_header(&told.node)), "{told:?}");
        for told in told.iter().filter(|told| wants_header(&told.node)) {
            let listed = if client == "::1" { "unlisted" } else { "listed" };
            assert_eq!((told.client.as_str(), told.listed.as_str()), (client, listed), "through {edge}: {told:?}");
        }
    }
}

#[test]
fn purges_and_caching_work_whether_or_not_a_node_wants_a_header() {
    const PAGES: u64 = 12;
    let fleet = fleet(1);
    let page = |number: u64| fleet.get(&format!("/p/{number}"));
    for number in 0..PAGES {
        fleet.shop.set(number, 1);
        assert_eq!(page(number).text(), "1");
        assert_eq!(page(number).cache(), "HIT", "page {number}");
    }
    for number in 0..PAGES {
        fleet.shop.set(number, 2);
        let answer = fleet.purge_tag(&format!("cat_p_{number}"));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(page(number).text(), "2", "page {number}");
    }
    let answer = fleet.purge_tag("cat_p").json();
    assert_eq!(answer["applied"].as_array().map(Vec::len), Some(3), "{answer}");
    for id in ["varnish-1", "varnish-2", "varnish-3"] {
        let node = fleet.clearcoat.node(id);
        assert_eq!((&node["health"], &node["current"]), (&"up".into(), &true.into()), "{node}");
    }
}
