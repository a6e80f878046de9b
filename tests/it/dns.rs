//! Nodes from DNS: a real name server, and nodes that follow its records.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clearcoat::fleet::PurgeDialect;
use clearcoat::varnish::vcl;

use crate::support::client::{get, purge, tag};
use crate::support::dnsmasq::{Dnsmasq, Service};
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::varnish::Varnish;
use crate::support::web::{Shop, Web};
use crate::support::{eventually, own_loopback};

/// The port of all nodes with their own addresses.
const PORT: u16 = 10_080;

const NAME: &str = "web.shop.test";

/// A clearcoat that resolves [`NAME`] for web nodes and the services of Varnish with this server, beside these numbers
/// of static nodes.
fn fleet(server: SocketAddr, varnish: usize, web: usize) -> Fleet {
    let config = format!(
        "[registry]\nkind = \"dns\"\n
        [registry.dns]\nweb = [\"{NAME}:{PORT}\"]\nvarnish = [\"_varnish._tcp.shop.test\"]\nservers = [\"{server}\"]\n
        [health.web]\ninterval = \"200ms\"\ntimeout = \"200ms\"\n
        [health.varnish]\ninterval = \"200ms\"\ntimeout = \"200ms\"\n"
    );
    // Lives as long as the test.
    let fleet = Fleet::launch(&Plan { varnish, web, config: config.leak(), ..Plan::default() });
    fleet.clearcoat.opened();
    fleet
}

fn web(shop: &Arc<Shop>) -> (Ipv4Addr, Web) {
    let ip = own_loopback();
    (ip, Web::start_at(SocketAddr::from((ip, PORT)), shop))
}

fn ids(fleet: &Fleet) -> Vec<String> {
    fleet.clearcoat.nodes().iter().map(|node| node["id"].as_str().expect("a name").to_owned()).collect()
}

fn id(ip: Ipv4Addr) -> String {
    format!("{ip}:{PORT}")
}

/// Waits until a node has this health; `gone`: until it has left the fleet.
fn becomes(fleet: &Fleet, id: &str, health: &str) {
    eventually(&format!("{id} is {health}"), || {
        let node = fleet.clearcoat.nodes().into_iter().find(|node| node["id"] == id);
        (node.map_or("gone".into(), |node| node["health"].clone()) == health).then_some(())
    });
}

/// Waits until there were this many more good answers.
fn goes_on(reader: &Reader) {
    let before = reader.reads();
    eventually("reading goes on", || (reader.reads() > before + 20).then_some(()));
}

#[test]
fn nodes_come_and_go_by_the_addresses_of_a_name_beside_static_ones() {
    let folder = tempfile::tempdir().expect("a folder");
    let shop = Arc::new(Shop::default());
    let ((first, first_web), (second, _second_web)) = (web(&shop), web(&shop));
    let server = Dnsmasq::start(folder.path(), &[(first, NAME)]);
    let fleet = fleet(server.address, 1, 1);
    // Nodes known at the start are in the fleet before the edge opens.
    assert_eq!(ids(&fleet), ["varnish-1", &id(first), "web-1"]);
    fleet.clearcoat.ready();
    let reader = Reader::start(fleet.clearcoat.edge, 30, Outage::None);

    server.set(&[(first, NAME), (second, NAME)]);
    becomes(&fleet, &id(second), "up");
    let series = format!("clearcoat_origin_requests_total{{code_class=\"2xx\",node=\"{}\"}}", id(second));
    eventually("it gets requests", || {
        _ = get(fleet.clearcoat.origin, "/p/1").expect("the origin answers");
        (fleet.clearcoat.metric(&series) > 0.0).then_some(())
    });

    // A node that is dead, and whose record is gone as well.
    drop(first_web);
    becomes(&fleet, &id(first), "down");
    server.set(&[(second, NAME)]);
    becomes(&fleet, &id(first), "gone");
    assert_eq!(ids(&fleet), ["varnish-1", &id(second), "web-1"]);
    goes_on(&reader);
    reader.stop();
    // No node joined twice, whatever the order of the records in each answer.
    for id in [id(second), "web-1".to_owned(), "varnish-1".to_owned()] {
        assert_eq!(
            fleet.clearcoat.log().count(&format!("\"node joined\",\"role\":\"{}\",\"node\":\"{id}\"", role(&id))),
            1
        );
    }
}

fn role(id: &str) -> &'static str {
    if id.starts_with("varnish") { "varnish" } else { "web" }
}

fn service(target: &'static str, varnish: &Varnish, weight: u16) -> Service {
    Service { name: "_varnish._tcp.shop.test", target, port: varnish.address.port(), priority: 1, weight }
}

#[test]
fn services_are_nodes_with_the_port_and_the_weight_of_their_record() {
    let folder = tempfile::tempdir().expect("a folder");
    let here = Ipv4Addr::LOCALHOST;
    let mut server = Dnsmasq::start(folder.path(), &[(here, "a.shop.test"), (here, "b.shop.test")]);
    let fleet = fleet(server.address, 0, 1);
    let origin = fleet.clearcoat.origin;
    let allow = ["127.0.0.0/8".parse().expect("a network")];
    let text = vcl::render(vcl::VarnishVersion::Seven, PurgeDialect::Magento, &[origin.into()], &allow).expect("a VCL");
    let file = folder.path().join("all.vcl");
    std::fs::write(&file, text).expect("a file");
    let mut varnish = ["a", "b"].map(|id| Varnish::spawn(folder.path(), id, &file));
    varnish.iter_mut().for_each(Varnish::ready);
    let [first, second] = &varnish;
    let ids_of = |varnish: &[(&str, &Varnish)]| -> Vec<String> {
        varnish.iter().map(|(target, varnish)| format!("{target}:{}", varnish.address.port())).collect()
    };
    let both = ids_of(&[("a.shop.test", first), ("b.shop.test", second)]);

    // A service of lower priority, meant for failover, is not used.
    let spare = Service { priority: 2, port: 9, ..service("b.shop.test", second, 1) };
    server.set_services(&[service("a.shop.test", first, 0), spare]);
    becomes(&fleet, &both[0], "up");
    assert_eq!(ids(&fleet), [both[0].as_str(), "web-1"]);
    assert_eq!(fleet.clearcoat.node(&both[0])["weight"], 1);

    server.set_services(&[service("a.shop.test", first, 10), service("b.shop.test", second, 30)]);
    becomes(&fleet, &both[1], "up");
    fleet.clearcoat.ready();
    fleet.clearcoat.current();
    eventually("the weights are those of the records", || {
        let weights = [0, 1].map(|index| fleet.clearcoat.node(&both[index])["weight"].clone());
        (weights == [10, 30]).then_some(())
    });
    let answer = purge(fleet.clearcoat.purge, &tag("cat_p_1")).expect("an answer").json();
    assert_eq!(answer["applied"], serde_json::json!(both), "{answer}");

    let [mut first, second] = varnish;
    first.kill();
    becomes(&fleet, &both[0], "down");
    server.set_services(&[service("b.shop.test", &second, 30)]);
    becomes(&fleet, &both[0], "gone");
    assert_eq!(ids(&fleet), [both[1].as_str(), "web-1"]);
    assert_eq!(fleet.get("/p/1").status, 200);
}

#[test]
fn an_unreachable_name_server_changes_nothing_until_it_is_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let shop = Arc::new(Shop::default());
    let ((first, _first_web), (second, _second_web)) = (web(&shop), web(&shop));
    let mut server = Dnsmasq::start(folder.path(), &[(first, NAME)]);
    let fleet = fleet(server.address, 1, 0);
    fleet.clearcoat.ready();
    let reader = Reader::start(fleet.clearcoat.edge, 30, Outage::None);
    let before = ids(&fleet);

    server.kill();
    let not_answered = || fleet.clearcoat.log().count("DNS name is not answered");
    eventually("both names fail", || (not_answered() >= 2).then_some(()));
    goes_on(&reader);
    assert_eq!(ids(&fleet), before);

    // The next failed lookup is at most four seconds after the first one, and is not logged again.
    server.resume();
    server.set(&[(first, NAME), (second, NAME)]);
    eventually("both names are answered", || {
        (fleet.clearcoat.log().count("DNS name is answered again") == 2).then_some(())
    });
    becomes(&fleet, &id(second), "up");
    reader.stop();
    assert!(!fleet.clearcoat.log().has("node left"));
}

#[test]
fn a_name_that_is_denied_takes_nobody_who_is_well() {
    let folder = tempfile::tempdir().expect("a folder");
    let shop = Arc::new(Shop::default());
    let ((first, _first_web), (second, _second_web)) = (web(&shop), web(&shop));
    let server = Dnsmasq::start(folder.path(), &[(first, NAME)]);
    let fleet = fleet(server.address, 1, 0);
    fleet.clearcoat.ready();
    let reader = Reader::start(fleet.clearcoat.edge, 30, Outage::None);

    server.set(&[]);
    let denied = format!("\"message\":\"DNS name has no addresses\",\"name\":\"{NAME}");
    eventually("the name is denied", || fleet.clearcoat.log().has(&denied).then_some(()));
    // The next answer is logged after that.
    server.set(&[(second, NAME)]);
    becomes(&fleet, &id(second), "up");
    assert_eq!(fleet.clearcoat.node(&id(first))["health"], "up");
    goes_on(&reader);
    reader.stop();
}

/// A server that receives queries and never answers.
fn silent() -> UdpSocket {
    UdpSocket::bind((own_loopback(), 10_053)).expect("a free port")
}

#[test]
fn without_a_name_server_static_nodes_serve_and_others_join_once_it_is_up() {
    let folder = tempfile::tempdir().expect("a folder");
    let shop = Arc::new(Shop::default());
    let (ip, _web) = web(&shop);
    // One port without a listener, and one silent server.
    let mut server = Dnsmasq::prepare(folder.path());
    let silent = silent();
    for address in [server.address, silent.local_addr().expect("an address")] {
        let began = Instant::now();
        let fleet = fleet(address, 1, 1);
        let took = began.elapsed();
        assert!(took < Duration::from_secs(12), "it took {took:?}");
        assert_eq!(fleet.get("/p/1").status, 200);
        assert_eq!(ids(&fleet), ["varnish-1", "web-1"]);
        if address == server.address {
            server.resume();
            server.set(&[(ip, NAME)]);
            becomes(&fleet, &id(ip), "up");
        }
    }
}
