//! Nodes from Kubernetes: a fake API server, real nodes, and clearcoat between them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clearcoat::fleet::PurgeDialect;
use clearcoat::varnish::vcl;

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{get, purge, tag};
use crate::support::fake_kubernetes::{FakeApiServer, FakePod, Gone, slice};
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::tls::Issued;
use crate::support::varnish::Varnish;
use crate::support::web::{Shop, Web};
use crate::support::{eventually, own_loopback};

/// The port of all web pods.
const PORT: u16 = 10_080;

/// Checks that find out soon.
const CHECKS: &str = "[health.web]\ninterval = \"200ms\"\ntimeout = \"200ms\"\n\
                      [health.varnish]\ninterval = \"200ms\"\ntimeout = \"200ms\"\n";

/// Both services.
const SERVICES: &str = "web = [\"web:http\"]\nvarnish = [\"varnish\"]\n";

/// A clearcoat that follows these services of the server, beside these numbers of nodes of the configuration.
fn launch(server: &FakeApiServer, services: &str, varnish: usize, web: usize) -> Fleet {
    // Lives as long as the test.
    let config = format!("{}{CHECKS}", server.config(services)).leak();
    Fleet::launch(&Plan { varnish, web, config, ..Plan::default() })
}

fn web_pod(name: &str, shop: &Arc<Shop>) -> (FakePod, Web) {
    let ip: Ipv4Addr = own_loopback();
    (FakePod::ready(name, &ip), Web::start_at(SocketAddr::from((ip, PORT)), shop))
}

/// Writes a slice with these pods, which all listen on [`PORT`].
fn put(server: &FakeApiServer, service: &str, name: &str, pods: &[&FakePod]) {
    let pods: Vec<FakePod> = pods.iter().copied().cloned().collect();
    server.put(slice(service, name, PORT, &pods));
}

fn ids(clearcoat: &Clearcoat) -> Vec<String> {
    clearcoat.nodes().iter().map(|node| node["id"].as_str().expect("a name").to_owned()).collect()
}

/// What a clearcoat shows of a node; `gone` of one that it does not have.
fn shown(clearcoat: &Clearcoat, id: &str, key: &str) -> serde_json::Value {
    let node = clearcoat.nodes().into_iter().find(|node| node["id"] == id);
    node.map_or("gone".into(), |node| node[key].clone())
}

/// Waits until a clearcoat shows this of a node.
fn becomes(clearcoat: &Clearcoat, id: &str, key: &str, value: impl Into<serde_json::Value>) {
    let value = value.into();
    eventually(&format!("{key} of {id} is {value}"), || (shown(clearcoat, id, key) == value).then_some(()));
}

/// Waits until a clearcoat says that it does, or does not, hear of changes.
fn is_connected(clearcoat: &Clearcoat, connected: bool) {
    eventually("the registry is connected, or not", || {
        (clearcoat.fleet()["registry"]["connected"] == connected).then_some(())
    });
}

fn problem(clearcoat: &Clearcoat) -> String {
    clearcoat.fleet()["registry"]["problem"].as_str().expect("a text").to_owned()
}

/// Waits until there were this many more good answers.
fn goes_on(reader: &Reader) {
    let before = reader.reads();
    eventually("reading goes on", || (reader.reads() > before + 20).then_some(()));
}

/// A varnishd that fetches through this clearcoat.
fn varnish(folder: &Path, id: &str, clearcoat: &Clearcoat) -> Varnish {
    varnish_of(folder, id, &[clearcoat.origin.into()])
}

/// The same through any of several.
fn varnish_of(folder: &Path, id: &str, origins: &[vcl::OriginAddress]) -> Varnish {
    let allow = ["127.0.0.0/8".parse().expect("a network")];
    let text = vcl::render(vcl::VarnishVersion::Seven, PurgeDialect::Magento, origins, &allow).expect("a VCL");
    let file = folder.join(format!("{id}.vcl"));
    std::fs::write(&file, text).expect("a file");
    Varnish::spawn(folder, id, &file)
}

/// The slice with one Varnish pod.
fn put_varnish(server: &FakeApiServer, pod: &FakePod, varnish: &Varnish) {
    server.put(slice("varnish", &pod.name, varnish.address.port(), std::slice::from_ref(pod)));
}

fn varnish_pod(name: &str, uid: &str) -> FakePod {
    FakePod { uid: uid.to_owned(), ..FakePod::ready(name, &Ipv4Addr::LOCALHOST) }
}

#[test]
fn pods_come_and_go_by_the_slices_of_their_service() {
    let server = FakeApiServer::start();
    let shop = Arc::new(Shop::default());
    let ((a, _of_a), (b, of_b), (c, _of_c)) =
        (web_pod("web-a", &shop), web_pod("web-b", &shop), web_pod("web-c", &shop));
    put(&server, "web", "web-1", &[&a]);
    // The same pod by its other family, and a slice of somebody else.
    put(&server, "web", "web-six", &[&FakePod { address: "2001:db8::1".to_owned(), ..a.clone() }]);
    put(&server, "other", "other-1", &[&c]);
    let fleet = launch(&server, "web = [\"web:http\"]\n", 1, 0);
    let clearcoat = &fleet.clearcoat;
    clearcoat.ready();
    assert_eq!(ids(clearcoat), ["varnish-1", "web-a"]);
    let node = clearcoat.node("web-a");
    assert_eq!(
        (&node["source"], &node["zone"], &node["labels"]["node"]),
        (&"kubernetes".into(), &"zone-a".into(), &"machine-1".into())
    );
    let reader = Reader::start(clearcoat.edge, 30, Outage::None);

    // In both slices while it moves from one to the other.
    put(&server, "web", "web-2", &[&a, &b]);
    becomes(clearcoat, "web-b", "health", "up");
    server.delete("web-1");
    server.delete("web-six");
    put(&server, "web", "web-2", &[&a, &b.unready()]);
    becomes(clearcoat, "web-b", "weight", 0);
    put(&server, "web", "web-2", &[&a, &b]);
    becomes(clearcoat, "web-b", "weight", 1);

    // It ends: first no new traffic, then it is gone, however well it is.
    put(&server, "web", "web-2", &[&a, &b.terminating()]);
    becomes(clearcoat, "web-b", "weight", 0);
    goes_on(&reader);
    put(&server, "web", "web-2", &[&a]);
    becomes(clearcoat, "web-b", "health", "gone");
    drop(of_b);
    goes_on(&reader);
    reader.stop();
    let joined = |id: &str| clearcoat.log().count(&format!("\"node joined\",\"role\":\"web\",\"node\":\"{id}\""));
    assert_eq!((joined("web-a"), joined("web-b"), joined("web-c")), (1, 1, 0));
    assert!(!clearcoat.log().has("at once: they are kept"));
}

#[test]
fn a_varnish_that_ends_is_purged_while_it_is_listed_and_gets_no_readers() {
    let server = FakeApiServer::start();
    let fleet = launch(&server, "varnish = [\"varnish\"]\ncache_ends_with_pod = true\n", 0, 1);
    let (clearcoat, folder) = (&fleet.clearcoat, fleet.folder.path());
    let mut nodes = ["varnish-0", "varnish-1"].map(|id| varnish(folder, id, clearcoat));
    nodes.iter_mut().for_each(Varnish::ready);
    let [first, second] = &nodes;
    let pods = ["varnish-0", "varnish-1"].map(|id| varnish_pod(id, "uid-1"));
    put_varnish(&server, &pods[0], first);
    put_varnish(&server, &pods[1], second);
    clearcoat.opened();
    becomes(clearcoat, "varnish-0", "health", "up");
    becomes(clearcoat, "varnish-1", "health", "up");
    clearcoat.current();
    assert_eq!(clearcoat.node("varnish-0")["epoch"], "uid-1");

    put_varnish(&server, &pods[0].terminating(), first);
    becomes(clearcoat, "varnish-0", "weight", 0);
    // Whoever still reads from it reads what was purged there.
    first.get("/p/1");
    assert_eq!(first.get("/p/1").cache(), "HIT");
    let answer = purge(clearcoat.purge, &tag("cat_p_1")).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    eventually("the page is gone from the Varnish that ends", || (first.get("/p/1").cache() == "MISS").then_some(()));
    let answered =
        |id: &str| clearcoat.metric(&format!("clearcoat_edge_requests_total{{code_class=\"2xx\",node=\"{id}\"}}"));
    let before = answered("varnish-0");
    for page in 0..20 {
        assert_eq!(get(clearcoat.edge, &format!("/p/{page}")).expect("an answer").status, 200);
    }
    assert_eq!(answered("varnish-0"), before, "no reader was sent there");

    // It comes back under its name, as another pod with an empty cache.
    server.delete("varnish-0");
    becomes(clearcoat, "varnish-0", "health", "gone");
    nodes[0].kill();
    nodes[0].restart();
    let again = varnish_pod("varnish-0", "uid-2");
    put_varnish(&server, &again, &nodes[0]);
    becomes(clearcoat, "varnish-0", "health", "up");
    becomes(clearcoat, "varnish-0", "epoch", "uid-2");
    clearcoat.current();
}

#[test]
fn a_watch_that_is_cut_or_over_goes_on_where_it_was() {
    let server = FakeApiServer::start();
    let shop = Arc::new(Shop::default());
    let ((a, _of_a), (b, _of_b), (c, _of_c)) =
        (web_pod("web-a", &shop), web_pod("web-b", &shop), web_pod("web-c", &shop));
    put(&server, "web", "web-1", &[&a]);
    let fleet = launch(&server, "web = [\"web\"]\n", 1, 0);
    let clearcoat = &fleet.clearcoat;
    clearcoat.ready();
    let watches = || server.count("watch", "web");
    let before = watches();
    server.bookmark();
    let seen = server.version();
    server.cut();
    eventually("it watches again", || (watches() > before).then_some(()));
    let last = server.requests().pop().expect("a request");
    assert_eq!((last.verb, last.from), ("watch", Some(seen)), "from the bookmark on");
    // What has happened while nobody watched.
    server.refuse("watch", 500);
    eventually("it says why", || problem(clearcoat).starts_with("shop/web: 500").then_some(()));
    put(&server, "web", "web-1", &[&a, &b]);
    server.accept();
    becomes(clearcoat, "web-b", "health", "up");
    is_connected(clearcoat, true);

    // An API server that ends watches early, as one does that is about to end.
    let before = watches();
    server.end_watches_after(Duration::from_millis(1200));
    server.cut();
    eventually("it watches again and again", || (watches() > before + 3).then_some(()));
    put(&server, "web", "web-1", &[&a, &b, &c]);
    becomes(clearcoat, "web-c", "health", "up");
    assert_eq!(server.count("list", "web"), 1, "the only list was that of the start");
}

#[test]
fn watches_that_end_as_soon_as_they_begin_are_asked_for_with_pauses() {
    let server = FakeApiServer::start();
    server.end_watches_after(Duration::ZERO);
    let fleet = launch(&server, "web = [\"web\"]\n", 1, 1);
    eventually("it says so", || problem(&fleet.clearcoat).contains("ended as soon as it began").then_some(()));
    // Without pauses there would be thousands.
    eventually("some time passes", || (server.count("watch", "web") >= 4).then_some(()));
    let (began, watches) = (std::time::Instant::now(), server.count("watch", "web"));
    eventually("a second passes", || (began.elapsed() > Duration::from_secs(1)).then_some(()));
    assert!(server.count("watch", "web") - watches <= 20);
    assert_eq!(server.count("list", "web"), 1);
}

#[test]
fn what_the_api_server_has_forgotten_costs_one_list_at_once() {
    let server = FakeApiServer::start();
    let shop = Arc::new(Shop::default());
    let (a, _of_a) = web_pod("web-a", &shop);
    put(&server, "web", "web-1", &[&a]);
    let fleet = launch(&server, "web = [\"web\"]\n", 1, 0);
    let clearcoat = &fleet.clearcoat;
    clearcoat.ready();
    let mut pods = vec![a];
    let mut nodes = Vec::new();
    for (lists, gone) in [(2, Gone::Event), (3, Gone::Status)] {
        let (pod, node) = web_pod(&format!("web-{lists}"), &shop);
        nodes.push(node);
        server.refuse("watch", 503);
        server.put(slice("web", "web-1", PORT, &pods));
        server.compact(gone);
        pods.push(pod.clone());
        server.put(slice("web", "web-1", PORT, &pods));
        server.accept();
        becomes(clearcoat, &pod.name, "health", "up");
        is_connected(clearcoat, true);
        assert_eq!(server.count("list", "web"), lists, "{gone:?}");
        let resyncs = clearcoat.metric("clearcoat_registry_resyncs_total{reason=\"compacted\"}");
        assert_eq!(resyncs, (lists - 1) as f64);
    }
}

#[test]
fn a_watch_that_hangs_is_found_and_replaced() {
    let server = FakeApiServer::start();
    let shop = Arc::new(Shop::default());
    let ((a, _of_a), (b, _of_b)) = (web_pod("web-a", &shop), web_pod("web-b", &shop));
    put(&server, "web", "web-1", &[&a]);
    let fleet = launch(&server, "web = [\"web\"]\n", 1, 0);
    let clearcoat = &fleet.clearcoat;
    clearcoat.ready();
    // Behind a balancer the connection to us stays open for ever.
    server.hang();
    put(&server, "web", "web-1", &[&a, &b]);
    let problem = || problem(clearcoat).contains("the connection hangs").then_some(());
    crate::support::eventually_within(Duration::from_secs(120), "it finds out", problem);
    server.unhang();
    let joined = || (shown(clearcoat, "web-b", "health") == "up").then_some(());
    crate::support::eventually_within(Duration::from_secs(120), "the pod joins", joined);
    assert_eq!(server.count("list", "web"), 1);
}

#[test]
fn who_is_not_let_in_says_what_is_missing_and_is_let_in_later() {
    let folder = tempfile::tempdir().expect("a folder");
    let issued = Issued::for_names(&["127.0.0.1"]);
    let files = issued.write(folder.path(), "api");
    let server = FakeApiServer::start_tls(&issued);
    let shop = Arc::new(Shop::default());
    let ((a, _of_a), (b, _of_b)) = (web_pod("web-a", &shop), web_pod("web-b", &shop));
    put(&server, "web", "web-1", &[&a]);
    server.want_token("first");
    let token = folder.path().join("token");
    std::fs::write(&token, "wrong\n").expect("a file");
    let keys = format!("web = [\"web\"]\ntoken_file = {token:?}\nca = {:?}\n", files.cert);
    let fleet = launch(&server, &keys, 1, 1);
    let clearcoat = &fleet.clearcoat;
    let says = |text: &str| eventually(&format!("it says {text}"), || problem(clearcoat).contains(text).then_some(()));
    says("401: the API server does not accept the token in ");
    says(&token.display().to_string());
    // Nodes of the registry were never seen: the edge does not open for a half of the fleet.
    assert_eq!(get(clearcoat.admin, "/readyz").expect("an answer").status, 503);

    server.refuse("list", 403);
    std::fs::write(&token, "first").expect("a file");
    says(
        "403: the service account may not list endpointslices in namespace shop: it needs a Role there, with list and watch",
    );
    says(
        "(it says: endpointslices.discovery.k8s.io is forbidden: User \\\"system:serviceaccount:shop:clearcoat\\\""
            .replace('\\', "")
            .as_str(),
    );
    server.refuse("watch", 403);
    says("403: the service account may not watch endpointslices");
    becomes(clearcoat, "web-a", "health", "up");
    // Without watches pods are seen with each list.
    put(&server, "web", "web-1", &[&a, &b]);
    becomes(clearcoat, "web-b", "health", "up");
    server.accept();
    is_connected(clearcoat, true);

    // kubelet writes another token long before this one expires.
    std::fs::write(&token, "second").expect("a file");
    server.want_token("second");
    let before = server.count("watch", "web");
    server.cut();
    eventually("it watches again", || (server.count("watch", "web") > before).then_some(()));
    is_connected(clearcoat, true);
    assert!(!clearcoat.log().text().contains("Bearer") && !clearcoat.log().text().contains("second"));
}

#[test]
fn a_start_without_the_api_server_begins_with_the_last_fleet() {
    let mut server = FakeApiServer::start();
    let shop = Arc::new(Shop::default());
    let ((a, _of_a), (b, _of_b), (c, _of_c)) =
        (web_pod("web-a", &shop), web_pod("web-b", &shop), web_pod("web-c", &shop));
    put(&server, "web", "web-1", &[&a, &b.terminating()]);
    let mut fleet = launch(&server, "web = [\"web\"]\n", 1, 0);
    fleet.clearcoat.ready();
    let file = fleet.journal_of(0).join("fleet.json");
    eventually("the fleet is on disk", || std::fs::read_to_string(&file).ok()?.contains("web-b").then_some(()));
    let reader = Reader::start(fleet.clearcoat.edge, 30, Outage::None);
    server.kill();
    eventually("it does not hear", || problem(&fleet.clearcoat).contains("no connection").then_some(()));
    goes_on(&reader);
    reader.stop();

    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    becomes(&fleet.clearcoat, "web-a", "health", "up");
    assert_eq!(shown(&fleet.clearcoat, "web-b", "weight"), 0, "it was told to end");
    assert_eq!(fleet.get("/p/1").status, 200);
    assert!(fleet.clearcoat.log().has("those on disk are taken"));

    // What has changed meanwhile: one has ended, one has come.
    put(&server, "web", "web-1", &[&a, &c]);
    server.resume();
    becomes(&fleet.clearcoat, "web-c", "health", "up");
    becomes(&fleet.clearcoat, "web-b", "health", "gone");
    is_connected(&fleet.clearcoat, true);
}

#[test]
fn a_first_start_waits_for_the_api_server() {
    let mut server = FakeApiServer::prepare();
    let shop = Arc::new(Shop::default());
    let (a, _of_a) = web_pod("web-a", &shop);
    let fleet = launch(&server, "web = [\"web\"]\n", 1, 1);
    let clearcoat = &fleet.clearcoat;
    clearcoat.log().waits_for("there are none on disk: waiting for it");
    assert_eq!(get(clearcoat.admin, "/readyz").expect("an answer").status, 503);
    put(&server, "web", "web-1", &[&a]);
    server.resume();
    clearcoat.ready();
    assert_eq!(ids(clearcoat), ["varnish-1", "web-1", "web-a"]);
}

#[test]
fn a_service_that_loses_all_of_its_pods_at_once_keeps_them() {
    let server = FakeApiServer::start();
    let shop = Arc::new(Shop::default());
    let pods: Vec<_> = ["web-a", "web-b", "web-c"].iter().map(|name| web_pod(name, &shop)).collect();
    let (pods, nodes): (Vec<_>, Vec<_>) = pods.into_iter().unzip();
    server.put(slice("web", "web-1", PORT, &pods));
    let fleet = launch(&server, "web = [\"web\"]\n", 1, 0);
    let clearcoat = &fleet.clearcoat;
    clearcoat.ready();
    let reader = Reader::start(clearcoat.edge, 30, Outage::None);
    // A selector that was changed by mistake.
    put(&server, "web", "web-1", &[]);
    clearcoat.log().waits_for("the registry has lost most nodes of a role at once");
    clearcoat.log().waits_for("the service has no pods: does it exist, and does its selector fit?");
    assert_eq!(clearcoat.metric("clearcoat_registry_held{role=\"web\"}"), 3.0);
    goes_on(&reader);
    server.put(slice("web", "web-1", PORT, &pods));
    eventually("nobody is held any more", || {
        (clearcoat.metric("clearcoat_registry_held{role=\"web\"}") == 0.0).then_some(())
    });
    // All of them ending is no loss: that is what a restart of a whole Deployment is.
    let (next, of_next) = web_pod("web-d", &shop);
    let ending: Vec<_> = pods.iter().map(|pod| pod.terminating()).chain([next.clone()]).collect();
    server.put(slice("web", "web-1", PORT, &ending));
    becomes(clearcoat, "web-d", "health", "up");
    becomes(clearcoat, "web-a", "weight", 0);
    goes_on(&reader);
    put(&server, "web", "web-1", &[&next]);
    becomes(clearcoat, "web-c", "health", "gone");
    assert_eq!(ids(clearcoat), ["varnish-1", "web-d"]);
    reader.stop();
    assert_eq!(clearcoat.log().count("the registry has lost most nodes of a role at once"), 1);
    drop((nodes, of_next));
}

/// As `deploy/kubernetes` has it.
#[test]
fn two_clearcoats_with_a_journal_in_etcd_follow_the_same_pods() {
    let server = FakeApiServer::start();
    let config = format!("{}{CHECKS}", server.config(SERVICES)).leak();
    let plan = Plan { varnish: 0, web: 0, replicas: 2, etcd: 1, journal: "etcd", config, ..Plan::default() };
    let fleet = Fleet::launch(&plan);
    let (folder, shop) = (fleet.folder.path(), &fleet.shop);
    let (web, _node) = web_pod("web-a", shop);
    put(&server, "web", "web-1", &[&web]);
    let mut nodes = ["varnish-0", "varnish-1"].map(|id| {
        let origins: Vec<_> = fleet.clearcoats().map(|clearcoat| clearcoat.origin.into()).collect();
        varnish_of(folder, id, &origins)
    });
    nodes.iter_mut().for_each(Varnish::ready);
    nodes.iter().for_each(|node| put_varnish(&server, &varnish_pod(&node.id, "uid"), node));
    for clearcoat in fleet.clearcoats() {
        becomes(clearcoat, "varnish-1", "health", "up");
        clearcoat.ready();
        clearcoat.current();
    }
    fleet.know_each_other();
    let readers: Vec<_> = fleet.clearcoats().map(|clearcoat| Reader::start(clearcoat.edge, 10, Outage::None)).collect();
    let clearcoats: Vec<_> = fleet.clearcoats().collect();
    for (version, clearcoat) in (1..=6).zip(clearcoats.iter().cycle()) {
        if version == 4 {
            put_varnish(&server, &varnish_pod("varnish-0", "uid").terminating(), &nodes[0]);
            fleet.clearcoats().for_each(|clearcoat| becomes(clearcoat, "varnish-0", "weight", 0));
        }
        (1..=10).for_each(|page| shop.set(page, version));
        let answer = purge(clearcoat.purge, &tag("cat_p")).expect("an answer");
        assert_eq!(answer.status, 200, "{answer:?}");
        readers.iter().for_each(|reader| reader.promise(version));
        readers.iter().for_each(goes_on);
    }
    readers.into_iter().for_each(Reader::stop);
}

#[test]
fn a_fleet_is_scaled_and_rolled_under_reads_and_purges() {
    let server = FakeApiServer::start();
    let fleet = launch(&server, &format!("{SERVICES}cache_ends_with_pod = true\n"), 0, 0);
    let (clearcoat, folder, shop) = (&fleet.clearcoat, fleet.folder.path(), &fleet.shop);
    let mut web: Vec<(FakePod, Web)> = (0..2).map(|number| web_pod(&format!("web-{number}"), shop)).collect();
    let mut caches: Vec<(FakePod, Varnish)> = Vec::new();
    let put_web = |pods: &[(FakePod, Web)], ending: &[FakePod]| {
        let pods: Vec<_> = pods.iter().map(|(pod, _)| pod).chain(ending).cloned().collect();
        server.put(slice("web", "web-1", PORT, &pods));
    };
    let begin = |name: &str, uid: &str| {
        let mut node = varnish(&folder.join(uid), name, clearcoat);
        node.ready();
        let pod = varnish_pod(name, uid);
        put_varnish(&server, &pod, &node);
        becomes(clearcoat, name, "health", "up");
        (pod, node)
    };
    let begin = |name: &str, uid: &str| {
        std::fs::create_dir_all(folder.join(uid)).expect("a folder");
        begin(name, uid)
    };
    put_web(&web, &[]);
    caches.extend([begin("varnish-0", "a"), begin("varnish-1", "b")]);
    clearcoat.ready();
    clearcoat.current();
    let readers: Vec<_> = (0..2).map(|_| Reader::start(clearcoat.edge, 30, Outage::None)).collect();
    let mut version = 0;
    let mut purge_all = || {
        version += 1;
        (1..=30).for_each(|page| shop.set(page, version));
        let answer = purge(clearcoat.purge, &tag("cat_p")).expect("an answer");
        assert_eq!(answer.status, 200, "{answer:?}");
        readers.iter().for_each(|reader| reader.promise(version));
        readers.iter().for_each(goes_on);
    };
    // As a Varnish ends: no new requests first, then its process, then its endpoint.
    let end = |(pod, mut node): (FakePod, Varnish), purge_all: &mut dyn FnMut()| {
        put_varnish(&server, &pod.terminating(), &node);
        becomes(clearcoat, &pod.name, "weight", 0);
        purge_all();
        eventually("its requests are over", || (shown(clearcoat, &pod.name, "inflight") == 0).then_some(()));
        node.kill();
        server.delete(&pod.name);
        becomes(clearcoat, &pod.name, "health", "gone");
        purge_all();
    };
    purge_all();
    // Up.
    caches.push(begin("varnish-2", "c"));
    purge_all();
    web.push(web_pod("web-2", shop));
    put_web(&web, &[]);
    becomes(clearcoat, "web-2", "health", "up");
    purge_all();
    // One after the other is replaced under its name, from the last on, as a StatefulSet does it.
    for (name, uid) in [("varnish-2", "d"), ("varnish-1", "e"), ("varnish-0", "f")] {
        end(caches.pop().expect("a cache"), &mut purge_all);
        let next = begin(name, uid);
        purge_all();
        caches.insert(0, next);
    }
    // A Deployment is rolled: new ones first.
    let old = std::mem::take(&mut web);
    web = (3..5).map(|number| web_pod(&format!("web-{number}"), shop)).collect();
    let ending: Vec<_> = old.iter().map(|(pod, _)| pod.terminating()).collect();
    put_web(&web, &old.iter().map(|(pod, _)| pod.clone()).collect::<Vec<_>>());
    becomes(clearcoat, "web-4", "health", "up");
    put_web(&web, &ending);
    becomes(clearcoat, "web-0", "weight", 0);
    purge_all();
    put_web(&web, &[]);
    becomes(clearcoat, "web-0", "health", "gone");
    drop(old);
    purge_all();
    // Down.
    end(caches.remove(2), &mut purge_all);
    readers.into_iter().for_each(Reader::stop);
    assert!(!clearcoat.log().has("at once: they are kept"), "an end in order is no loss");
}
