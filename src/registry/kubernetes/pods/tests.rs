use serde_json::json;

use super::*;

/// A slice with these endpoints, as the API server writes it.
fn slice(name: &str, family: &str, endpoints: &[serde_json::Value]) -> EndpointSlice {
    let slice = json!({
        "metadata": { "name": name, "resourceVersion": "1" },
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{ "name": "http", "port": 6081, "protocol": "TCP" }],
    });
    serde_json::from_value(slice).unwrap()
}

/// `ready`, `serving`, `terminating`.
type Conditions = [bool; 3];

const READY: Conditions = [true, true, false];
const UNREADY: Conditions = [false, false, false];
const ENDING: Conditions = [false, true, true];
const ENDED: Conditions = [false, false, true];

fn pod(name: &str, address: &str, [ready, serving, terminating]: Conditions) -> serde_json::Value {
    json!({
        "addresses": [address],
        "conditions": { "ready": ready, "serving": serving, "terminating": terminating },
        "nodeName": "machine-1",
        "zone": "a",
        "targetRef": { "kind": "Pod", "name": name, "namespace": "shop", "uid": format!("uid-of-{name}") },
    })
}

/// One service, and what is told of it.
struct Rig {
    service: ServicePods,
    fleet: PodFleet,
}

impl Rig {
    fn new(role: Role) -> Self {
        let service = ServicePods::new(role, ServicePort::Only, true);
        Rig { service, fleet: PodFleet::default() }
    }

    /// Takes one slice with these pods instead of the one before, and returns what is told.
    fn put(&mut self, pods: &[(&str, &str, Conditions)]) -> Vec<String> {
        let pods = pods.iter().map(|(name, address, conditions)| pod(name, address, *conditions)).collect::<Vec<_>>();
        self.service.put(slice("s", "IPv4", &pods));
        self.told()
    }

    fn told(&mut self) -> Vec<String> {
        assert_eq!(self.service.settle(), BTreeSet::new());
        words(self.fleet.replace([("shop/service", &self.service)].into_iter()))
    }
}

fn words(events: Vec<Event>) -> Vec<String> {
    let word = |event| match event {
        Event::Joined(spec) => format!("{} {} {}", spec.id, spec.address, spec.weight),
        Event::Left(NodeSource::Kubernetes, _, id) => format!("{id} left"),
        Event::Vanished(NodeSource::Kubernetes, _, id) => format!("{id} vanished"),
        other => panic!("{other:?}"),
    };
    events.into_iter().map(word).collect()
}

#[test]
fn a_pod_is_a_node_with_its_name_its_zone_and_its_machine() {
    let mut rig = Rig::new(Role::Varnish);
    assert_eq!(rig.put(&[("varnish-0", "10.0.0.1", READY)]), ["varnish-0 10.0.0.1:6081 1"]);
    let spec = &rig.service.pods().next().unwrap().spec;
    assert_eq!((spec.role(), spec.source, spec.zone.as_deref()), (Role::Varnish, NodeSource::Kubernetes, Some("a")));
    assert_eq!(
        (spec.epoch().map(|epoch| &**epoch), spec.labels["node"].as_str()),
        (Some("uid-of-varnish-0"), "machine-1")
    );
    // A cache that may be on a volume has no epoch.
    rig.service.with_epoch = false;
    rig.service.settle();
    assert_eq!(rig.service.pods().next().unwrap().spec.epoch(), None);
}

#[test]
fn who_is_not_ready_or_ends_gets_no_traffic_and_stays_a_node() {
    let mut rig = Rig::new(Role::Varnish);
    rig.put(&[("a", "10.0.0.1", READY), ("b", "10.0.0.2", READY)]);
    assert_eq!(rig.put(&[("a", "10.0.0.1", UNREADY), ("b", "10.0.0.2", READY)]), ["a 10.0.0.1:6081 0"]);
    assert_eq!(rig.put(&[("a", "10.0.0.1", ENDING), ("b", "10.0.0.2", READY)]), Vec::<String>::new());
    assert_eq!(rig.put(&[("a", "10.0.0.1", ENDED), ("b", "10.0.0.2", READY)]), Vec::<String>::new());
    assert_eq!(rig.put(&[("b", "10.0.0.2", READY)]), ["a left"]);
    // With publishNotReadyAddresses `ready` stays true to the end.
    assert_eq!(
        rig.put(&[("b", "10.0.0.2", [true, true, true]), ("c", "10.0.0.3", READY)]),
        ["b 10.0.0.2:6081 0", "c 10.0.0.3:6081 1"]
    );
}

#[test]
fn where_nobody_is_ready_a_web_pod_serves_to_its_end_a_varnish_not() {
    let weights = |role, pods: &[(&str, &str, Conditions)]| {
        let mut rig = Rig::new(role);
        rig.put(pods);
        rig.service.pods().map(|pod| pod.spec.weight).collect::<Vec<_>>()
    };
    let pods = [("a", "10.0.0.1", ENDING), ("b", "10.0.0.2", UNREADY), ("c", "10.0.0.3", ENDED)];
    assert_eq!(weights(Role::Web, &pods), [1, 0, 0]);
    assert_eq!(weights(Role::Varnish, &pods), [0, 1, 0]);
    // What says the same of all tells nobody from another.
    assert_eq!(weights(Role::Web, &[("a", "10.0.0.1", UNREADY), ("b", "10.0.0.2", UNREADY)]), [1, 1]);
    assert_eq!(weights(Role::Varnish, &[("a", "10.0.0.1", ENDED)]), [0]);
}

#[test]
fn readiness_that_most_web_pods_lose_is_not_believed() {
    let weights = |rig: &Rig| rig.service.pods().map(|pod| pod.spec.weight).collect::<Vec<_>>();
    let (mut web, mut varnish) = (Rig::new(Role::Web), Rig::new(Role::Varnish));
    let pods = |ready: usize| {
        let names = [("a", "10.0.0.1"), ("b", "10.0.0.2"), ("c", "10.0.0.3"), ("d", "10.0.0.4")];
        let state = move |index| if index < ready { READY } else { UNREADY };
        names.into_iter().enumerate().map(|(index, (name, address))| (name, address, state(index))).collect::<Vec<_>>()
    };
    // Three of them have never been ready: they are new.
    web.put(&pods(1));
    assert_eq!(weights(&web), [1, 0, 0, 0]);
    for rig in [&mut web, &mut varnish] {
        rig.put(&pods(4));
    }
    for (ready, expected) in [(3, [1, 1, 1, 0]), (2, [1, 1, 0, 0]), (1, [1, 1, 1, 1]), (0, [1, 1, 1, 1])] {
        web.put(&pods(ready));
        assert_eq!(weights(&web), expected);
    }
    varnish.put(&pods(1));
    assert_eq!(weights(&varnish), [1, 0, 0, 0]);
    // Another pod of the same name is a new one.
    web.service.delete("s");
    web.service.settle();
    web.put(&pods(1));
    assert_eq!(weights(&web), [1, 0, 0, 0]);
}

#[test]
fn a_web_pod_that_served_to_its_end_is_drained_before_it_leaves() {
    let mut rig = Rig::new(Role::Web);
    rig.put(&[("a", "10.0.0.1", READY)]);
    assert_eq!(rig.put(&[("a", "10.0.0.1", ENDING)]), Vec::<String>::new());
    assert_eq!(rig.put(&[]), ["a 10.0.0.1:6081 0", "a left"]);
}

#[test]
fn who_is_gone_without_having_ended_has_vanished() {
    let mut rig = Rig::new(Role::Web);
    rig.put(&[("a", "10.0.0.1", READY), ("b", "10.0.0.2", READY)]);
    assert_eq!(rig.put(&[("b", "10.0.0.2", READY)]), ["a vanished"]);
    assert_eq!(rig.put(&[("a", "10.0.0.1", READY), ("b", "10.0.0.2", READY)]), ["a 10.0.0.1:6081 1"]);
    // The slice itself.
    rig.service.delete("s");
    assert_eq!(rig.told(), ["a vanished", "b vanished"]);
    assert_eq!(rig.put(&[("b", "10.0.0.2", READY)]), ["b 10.0.0.2:6081 1"]);
}

#[test]
fn an_address_that_another_pod_has_by_now_is_nobody_elses() {
    let mut rig = Rig::new(Role::Web);
    rig.put(&[("a", "10.0.0.1", READY), ("b", "10.0.0.2", READY)]);
    // Vanished first, and given out again later.
    assert_eq!(rig.put(&[("b", "10.0.0.2", READY)]), ["a vanished"]);
    assert_eq!(rig.put(&[("b", "10.0.0.2", READY), ("c", "10.0.0.1", READY)]), ["c 10.0.0.1:6081 1", "a left"]);
    // At the same time.
    assert_eq!(
        rig.put(&[("b", "10.0.0.2", READY), ("d", "10.0.0.1", READY)]),
        ["d 10.0.0.1:6081 1", "c 10.0.0.1:6081 0", "c left"]
    );
    // And while the one that ends is still listed (kubernetes/kubernetes#135266), whatever their names.
    for (ending, new) in [("d", "e"), ("e", "a")] {
        let told = rig.put(&[("b", "10.0.0.2", READY), (ending, "10.0.0.1", ENDING), (new, "10.0.0.1", READY)]);
        assert_eq!(
            told,
            [format!("{new} 10.0.0.1:6081 1"), format!("{ending} 10.0.0.1:6081 0"), format!("{ending} left")]
        );
    }
}

#[test]
fn a_pod_of_two_families_is_one_node_and_keeps_the_address_in_use() {
    let mut rig = Rig::new(Role::Web);
    let six = |conditions| slice("six", "IPv6", &[pod("a", "2001:db8::1", conditions)]);
    let four = |conditions| slice("four", "IPv4", &[pod("a", "10.0.0.1", conditions)]);
    rig.service.list(vec![six(READY), four(READY)]);
    assert_eq!(rig.told(), ["a 10.0.0.1:6081 1"]);
    rig.service.list(vec![six(READY)]);
    assert_eq!(rig.told(), ["a [2001:db8::1]:6081 1"]);
    // The one in use is as good as the other.
    rig.service.put(four(READY));
    assert_eq!(rig.told(), Vec::<String>::new());
    // Slices are written one after the other.
    rig.service.put(four(ENDING));
    assert_eq!(rig.told(), Vec::<String>::new(), "it serves on: nobody else is there");
    rig.service.put(slice("more", "IPv4", &[pod("b", "10.0.0.2", READY)]));
    assert_eq!(rig.told(), ["a [2001:db8::1]:6081 0", "b 10.0.0.2:6081 1"]);
    rig.service.delete("four");
    rig.service.put(six(ENDING));
    assert_eq!(rig.told(), Vec::<String>::new());
    rig.service.delete("six");
    assert_eq!(rig.told(), ["a left"]);
}

#[test]
fn a_pod_that_moves_from_one_slice_to_another_never_goes() {
    let mut rig = Rig::new(Role::Web);
    let with = |name: &str, pods: &[&str]| {
        let pods = pods.iter().enumerate().map(|(number, name)| pod(name, &format!("10.0.0.{number}"), READY));
        slice(name, "IPv4", &pods.collect::<Vec<_>>())
    };
    rig.service.list(vec![with("one", &["a", "b"]), with("two", &[])]);
    assert_eq!(rig.told().len(), 2);
    rig.service.put(with("two", &["a", "b"]));
    assert_eq!(rig.told(), Vec::<String>::new());
    rig.service.delete("one");
    assert_eq!(rig.told(), Vec::<String>::new());
}

#[test]
fn a_pod_that_comes_back_under_its_name_is_the_node_with_another_cache() {
    let mut rig = Rig::new(Role::Varnish);
    let again = |uid: &str, address: &str, conditions| {
        let mut pod = pod("varnish-0", address, conditions);
        pod["targetRef"]["uid"] = uid.into();
        pod
    };
    rig.service.put(slice("s", "IPv4", &[again("one", "10.0.0.1", READY)]));
    rig.told();
    // The one of before is still in an older slice.
    rig.service.put(slice("s", "IPv4", &[again("one", "10.0.0.1", ENDED)]));
    assert_eq!(rig.told(), ["varnish-0 10.0.0.1:6081 0"]);
    rig.service.put(slice("t", "IPv4", &[again("two", "10.0.0.2", READY)]));
    assert_eq!(rig.told(), ["varnish-0 10.0.0.2:6081 1"]);
    let spec = &rig.service.pods().next().unwrap().spec;
    assert_eq!(spec.epoch().map(|epoch| &**epoch), Some("two"));
    // At the address of before, as with the network of its machine: the epoch tells them apart.
    rig.service.list(vec![slice("s", "IPv4", &[again("three", "10.0.0.2", READY)])]);
    assert_eq!(rig.told(), ["varnish-0 10.0.0.2:6081 1"]);
}

#[test]
fn what_was_restored_is_compared_with_the_first_list() {
    let mut before = Rig::new(Role::Web);
    before.put(&[("a", "10.0.0.1", READY), ("b", "10.0.0.2", ENDING), ("c", "10.0.0.3", READY)]);
    let mut rig = Rig::new(Role::Web);
    rig.service.restore(before.service.pods().cloned().collect());
    let told = words(rig.fleet.replace([("shop/service", &rig.service)].into_iter()));
    assert_eq!(told, ["a 10.0.0.1:6081 1", "b 10.0.0.2:6081 0", "c 10.0.0.3:6081 1"]);
    assert_eq!(rig.put(&[("c", "10.0.0.3", READY)]), ["a vanished", "b left"]);
}

#[test]
fn what_is_no_node_takes_no_other_with_it_and_says_what_is_wrong() {
    let rejected = |slice: serde_json::Value, port: ServicePort| {
        let mut service = ServicePods::new(Role::Web, port, false);
        service.put(serde_json::from_value(slice).unwrap());
        let rejected = service.settle().into_iter().collect::<Vec<_>>().join("; ");
        (service.pods().count(), rejected)
    };
    let with = |family: &str, endpoints: serde_json::Value, ports: serde_json::Value| json!({ "metadata": { "name": "s" }, "addressType": family, "endpoints": endpoints, "ports": ports });
    let good = || pod("a", "10.0.0.1", READY);
    let http = || json!([{ "name": "http", "port": 8080, "protocol": "TCP" }]);
    let two = || json!([{ "name": "http", "port": 8080 }, { "name": "admin", "port": 9000 }]);
    let named = |name: &str| ServicePort::Named(name.to_owned());
    for (slice, port, count, expected) in [
        (with("IPv4", json!([good()]), http()), ServicePort::Only, 1, ""),
        (with("IPv4", json!([good()]), http()), named("http"), 1, ""),
        (with("IPv4", json!([good()]), http()), ServicePort::Number(8080), 1, ""),
        (with("IPv4", json!([good()]), json!(null)), ServicePort::Number(8080), 1, ""),
        (with("IPv4", json!([good()]), two()), named("admin"), 1, ""),
        (
            with("IPv4", json!([good()]), two()),
            ServicePort::Only,
            0,
            "its TCP ports are http 8080, admin 9000: name one",
        ),
        (with("IPv4", json!([good()]), http()), named("https"), 0, "it has no TCP port named https, only http 8080"),
        (
            with("IPv4", json!([good()]), http()),
            ServicePort::Number(80),
            0,
            "no TCP port 80, only http 8080: a number is",
        ),
        (with("IPv4", json!([good()]), json!(null)), ServicePort::Only, 0, "its TCP ports are none"),
        (with("IPv4", json!([good()]), json!([{ "port": 53, "protocol": "UDP" }])), ServicePort::Only, 0, "are none"),
        (with("FQDN", json!([pod("a", "a.example", READY)]), http()), ServicePort::Only, 0, "FQDN"),
        (
            with("IPv4", json!([good(), pod("b", "b.example", READY)]), http()),
            ServicePort::Only,
            1,
            "`b.example` is no IP",
        ),
        (with("IPv4", json!([good(), { "addresses": null }]), http()), ServicePort::Only, 1, "without an address"),
        (
            with("IPv4", json!([good(), pod(&"x".repeat(200), "10.0.0.2", READY)]), http()),
            ServicePort::Only,
            1,
            "is not a node id",
        ),
        // A service without pods has a slice without ports.
        (with("IPv4", json!(null), json!(null)), named("http"), 0, ""),
    ] {
        let (found, reason) = rejected(slice.clone(), port);
        assert_eq!(found, count, "{slice}");
        assert!(if expected.is_empty() { reason.is_empty() } else { reason.contains(expected) }, "{slice}: {reason}");
    }
}

#[test]
fn an_endpoint_without_an_object_has_the_name_of_its_host_or_its_address() {
    let mut service = ServicePods::new(Role::Varnish, ServicePort::Only, true);
    let by_hand = [json!({ "addresses": ["10.0.0.1"], "hostname": "cache-1" }), json!({ "addresses": ["10.0.0.2"] })];
    service.put(slice("by-hand", "IPv4", &by_hand));
    service.put(slice("six", "IPv6", &[json!({ "addresses": ["2001:db8::2"] })]));
    assert_eq!(service.settle(), BTreeSet::new());
    let ids: Vec<&str> = service.pods().map(|pod| pod.spec.id.as_str()).collect();
    assert_eq!(ids, ["10.0.0.2:6081", "2001:db8::2:6081", "cache-1"]);
    // Conditions that nobody has written mean that it serves.
    assert!(service.pods().all(|pod| pod.spec.weight == 1 && pod.spec.epoch().is_none()));
}

#[test]
fn two_services_with_a_pod_of_one_name_are_told_once() {
    let mut fleet = PodFleet::default();
    let service = |address| {
        let mut service = ServicePods::new(Role::Web, ServicePort::Only, false);
        service.put(slice("s", "IPv4", &[pod("web-0", address, READY)]));
        service.settle();
        service
    };
    let (one, same, other) = (service("10.0.0.1"), service("10.0.0.1"), service("10.0.0.9"));
    let mut tell = |services: &[(&'static str, &ServicePods)]| {
        let told = words(fleet.replace(services.iter().copied()));
        (told, fleet.new_collisions().into_iter().map(|collision| collision.service).collect::<Vec<_>>())
    };
    assert_eq!(tell(&[("a/web", &one), ("a/all", &same)]), (vec!["web-0 10.0.0.1:6081 1".to_owned()], vec![]));
    assert_eq!(tell(&[("a/web", &one), ("b/web", &other)]), (vec![], vec!["b/web".to_owned()]));
    assert_eq!(tell(&[("a/web", &one), ("b/web", &other)]), (vec![], vec![]));
    assert_eq!(tell(&[("b/web", &other)]), (vec!["web-0 10.0.0.9:6081 1".to_owned()], vec![]));
}

proptest::proptest! {
    /// What is announced does not depend on the way to it: changes one by one, in any slices, or one list.
    #[test]
    fn a_list_and_the_changes_say_the_same(steps in proptest::collection::vec((0_usize..3, 0_u8..4, 0_usize..4), 0..40)) {
        let conditions = [READY, UNREADY, ENDING, ENDED];
        let mut model: BTreeMap<(usize, u8), Conditions> = BTreeMap::new();
        let mut told = ServicePods::new(Role::Web, ServicePort::Only, false);
        let mut fleet = PodFleet::default();
        let mut shown: BTreeMap<String, u32> = BTreeMap::new();
        for (in_slice, number, condition) in steps {
            if model.remove(&(in_slice, number)).is_none() {
                model.insert((in_slice, number), conditions[condition]);
            }
            let slice_of = |wanted: usize| {
                let pods = model.iter().filter(|((of, _), _)| *of == wanted);
                let pods = pods.map(|((_, number), conditions)| pod(&format!("p{number}"), &format!("10.0.0.{number}"), *conditions));
                slice(&format!("s{wanted}"), "IPv4", &pods.collect::<Vec<_>>())
            };
            told.put(slice_of(in_slice));
            let mut listed = ServicePods::new(Role::Web, ServicePort::Only, false);
            listed.list((0..3).map(slice_of).collect());
            // Who was ready before, only the way to it tells.
            listed.ready_once.clone_from(&told.ready_once);
            told.settle();
            listed.settle();
            proptest::prop_assert_eq!(told.pods().collect::<Vec<_>>(), listed.pods().collect::<Vec<_>>());
            for event in fleet.replace([("s", &told)].into_iter()) {
                match event {
                    Event::Joined(spec) => _ = shown.insert(spec.id.to_string(), spec.weight),
                    Event::Left(_, _, id) | Event::Vanished(_, _, id) => _ = shown.remove(id.as_str()),
                    other => panic!("{other:?}"),
                }
            }
            let wanted: BTreeMap<String, u32> = told.pods().map(|pod| (pod.spec.id.to_string(), pod.spec.weight)).collect();
            proptest::prop_assert_eq!(&shown, &wanted);
        }
    }
}
