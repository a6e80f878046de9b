//! The manifests of `deploy/kubernetes`, without a cluster: that Kubernetes' own types read all of each, that everything which
//! one names is there, and that times and listeners fit. What only an API server knows (defaults, admission) is not seen here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

use clearcoat::config::{Config, ConfigSource, ServicePort};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Container, Namespace, PodSpec, PodTemplateSpec, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::support::clearcoat::run;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The documents of a file.
fn documents(name: &str) -> Vec<Value> {
    let text = read(name);
    let texts = text.split("\n---\n");
    texts.map(|text| serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{name}: {error}"))).collect()
}

fn kustomization() -> Value {
    documents("kustomization.yaml").remove(0)
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// What a file says and the type that was made of it does not: a name that is misspelt, or at the wrong place.
fn lost(said: &Value, understood: &Value, path: &str, found: &mut Vec<String>) {
    match (said, understood) {
        (Value::Object(said), Value::Object(understood)) => {
            for (key, value) in said {
                match understood.get(key) {
                    Some(other) => lost(value, other, &format!("{path}.{key}"), found),
                    None => found.push(format!("{path}.{key}")),
                }
            }
        }
        (Value::Array(said), Value::Array(understood)) if said.len() == understood.len() => {
            let pairs = said.iter().zip(understood).enumerate();
            pairs.for_each(|(index, (said, understood))| lost(said, understood, &format!("{path}[{index}]"), found));
        }
        (said, understood) if said != understood => found.push(format!("{path}: {said} became {understood}")),
        _ => {}
    }
}

fn typed<T: DeserializeOwned + Serialize>(document: &Value, name: &str) -> T {
    let kind = &document["kind"];
    let object: T = serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{name}, {kind}: {error}"));
    let mut found = Vec::new();
    lost(document, &serde_json::to_value(&object).expect("JSON"), "", &mut found);
    assert!(found.is_empty(), "{name}, {kind}: Kubernetes knows no {found:?}");
    object
}

/// Everything that `kubectl apply -k` makes, before kustomize has changed it.
#[derive(Default)]
struct Manifests {
    deployments: BTreeMap<String, Deployment>,
    stateful_sets: BTreeMap<String, StatefulSet>,
    services: BTreeMap<String, Service>,
    budgets: BTreeMap<String, PodDisruptionBudget>,
    policies: BTreeMap<String, NetworkPolicy>,
    accounts: BTreeMap<String, ServiceAccount>,
    roles: BTreeMap<String, Role>,
    bindings: BTreeMap<String, RoleBinding>,
    namespaces: BTreeMap<String, Namespace>,
}

/// Pods, by what makes them.
struct Pods<'m> {
    name: &'m str,
    template: &'m PodTemplateSpec,
    /// Names of volumes that each pod has of its own.
    claims: Vec<&'m str>,
}

impl Pods<'_> {
    fn spec(&self) -> &PodSpec {
        self.template.spec.as_ref().expect("a pod")
    }

    fn container(&self) -> &Container {
        let [container] = self.spec().containers.as_slice() else { panic!("{}: one container", self.name) };
        container
    }

    fn labels(&self) -> &BTreeMap<String, String> {
        self.template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref()).expect("labels")
    }

    /// The number of a port of the container, by its name or number.
    fn port(&self, port: &IntOrString) -> Option<i32> {
        let ports = self.container().ports.iter().flatten();
        let is_it = |named: &&k8s_openapi::api::core::v1::ContainerPort| match port {
            IntOrString::Int(number) => named.container_port == *number,
            IntOrString::String(name) => named.name.as_ref() == Some(name),
        };
        ports.into_iter().find(is_it).map(|port| port.container_port)
    }

    fn variable(&self, name: &str) -> &str {
        let mut variables = self.container().env.iter().flatten();
        let found = variables.find(|variable| variable.name == name).and_then(|variable| variable.value.as_deref());
        found.unwrap_or_else(|| panic!("{}: no {name}", self.name))
    }

    fn grace(&self) -> Duration {
        let seconds = self.spec().termination_grace_period_seconds.expect("a time");
        Duration::from_secs(seconds.try_into().expect("a time"))
    }
}

impl Manifests {
    fn read() -> Self {
        let mut this = Manifests::default();
        for name in texts(&kustomization()["resources"]) {
            for document in documents(name) {
                this.take(name, &document);
            }
        }
        this
    }

    fn take(&mut self, file: &str, document: &Value) {
        fn put<T: DeserializeOwned + Serialize>(all: &mut BTreeMap<String, T>, document: &Value, file: &str) {
            let name = document["metadata"]["name"].as_str().expect("a name").to_owned();
            assert!(all.insert(name.clone(), typed(document, file)).is_none(), "{file}: a second {name}");
        }
        let text = |key: &str| document[key].as_str().unwrap_or_default();
        match (text("apiVersion"), text("kind")) {
            ("apps/v1", "Deployment") => put(&mut self.deployments, document, file),
            ("apps/v1", "StatefulSet") => put(&mut self.stateful_sets, document, file),
            ("v1", "Service") => put(&mut self.services, document, file),
            ("v1", "ServiceAccount") => put(&mut self.accounts, document, file),
            ("v1", "Namespace") => put(&mut self.namespaces, document, file),
            ("policy/v1", "PodDisruptionBudget") => put(&mut self.budgets, document, file),
            ("networking.k8s.io/v1", "NetworkPolicy") => put(&mut self.policies, document, file),
            ("rbac.authorization.k8s.io/v1", "Role") => put(&mut self.roles, document, file),
            ("rbac.authorization.k8s.io/v1", "RoleBinding") => put(&mut self.bindings, document, file),
            other => panic!("{file}: {other:?} is not known here"),
        }
    }

    fn pods(&self) -> Vec<Pods<'_>> {
        let deployments = self.deployments.iter().map(|(name, deployment)| {
            let spec = deployment.spec.as_ref().expect("a spec");
            Pods { name, template: &spec.template, claims: Vec::new() }
        });
        let stateful_sets = self.stateful_sets.iter().map(|(name, set)| {
            let spec = set.spec.as_ref().expect("a spec");
            let claims = spec.volume_claim_templates.iter().flatten();
            let claims = claims.filter_map(|claim| claim.metadata.name.as_deref()).collect();
            Pods { name, template: &spec.template, claims }
        });
        deployments.chain(stateful_sets).collect()
    }

    fn pods_of(&self, name: &str) -> Pods<'_> {
        self.pods().into_iter().find(|pods| pods.name == name).unwrap_or_else(|| panic!("no pods of {name}"))
    }

    /// The pods with these labels: those of one thing.
    fn selected(&self, labels: Option<&BTreeMap<String, String>>, who: impl Debug) -> Pods<'_> {
        let labels = labels.filter(|labels| !labels.is_empty()).unwrap_or_else(|| panic!("{who:?} selects everything"));
        let has_them = |pods: &Pods<'_>| labels.iter().all(|label| pods.labels().get(label.0) == Some(label.1));
        let mut found: Vec<_> = self.pods().into_iter().filter(has_them).collect();
        assert_eq!(found.len(), 1, "{who:?} selects pods of one thing");
        found.remove(0)
    }

    /// The number behind `SERVICE:PORT`, or of a pod of a StatefulSet, `POD.SERVICE:PORT`.
    fn resolves(&self, address: &str) -> i32 {
        let (host, port) = address.rsplit_once(':').unwrap_or_else(|| panic!("{address} has no port"));
        let (pod, service) = host.rsplit_once('.').map_or((None, host), |(pod, service)| (Some(pod), service));
        let spec = self.services.get(service).and_then(|service| service.spec.as_ref());
        let spec = spec.unwrap_or_else(|| panic!("{address}: no service {service}"));
        if let Some(pod) = pod {
            let (set, number) = pod.rsplit_once('-').expect("the name of a pod");
            let set = self.stateful_sets[set].spec.as_ref().expect("a spec");
            assert_eq!(set.service_name.as_deref(), Some(service), "{address}");
            assert!(number.parse::<i32>().expect("a number") < set.replicas.expect("a number"), "{address}");
        }
        let number: i32 = port.parse().expect("a port");
        let port = spec.ports.iter().flatten().find(|port| port.port == number);
        let port = port.unwrap_or_else(|| panic!("{address}: the service has no such port"));
        let target = port.target_port.as_ref().expect("a targetPort");
        let pods = self.selected(spec.selector.as_ref(), address);
        pods.port(target).unwrap_or_else(|| panic!("{address}: its pods have no port {target:?}"))
    }
}

fn config() -> Config {
    let source = ConfigSource::new(Some(folder().join("clearcoat.toml")), std::iter::empty());
    source.load().unwrap_or_else(|errors| panic!("{errors}"))
}

/// A selector that knows labels alone.
fn labels(selector: Option<&LabelSelector>) -> Option<&BTreeMap<String, String>> {
    selector.filter(|selector| selector.match_expressions.is_none()).and_then(|selector| selector.match_labels.as_ref())
}

#[test]
fn every_file_is_a_part_and_kubernetes_knows_every_field() {
    let kustomization = kustomization();
    let generators = kustomization["configMapGenerator"].as_array().expect("a list");
    let generated = generators.iter().flat_map(|generator| texts(&generator["files"]));
    let named: BTreeSet<&str> = texts(&kustomization["resources"]).into_iter().chain(generated).collect();
    let files = std::fs::read_dir(folder()).expect("the folder");
    let files: Vec<String> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    let there: BTreeSet<&str> = files.iter().map(String::as_str).filter(|file| *file != "kustomization.yaml").collect();
    assert_eq!(named, there);
    // Reads all of them.
    let manifests = Manifests::read();
    let namespace = kustomization["namespace"].as_str().expect("a namespace");
    assert!(manifests.namespaces.contains_key(namespace));
    // A field at the wrong place would be seen.
    let mut document = documents("web.yaml").remove(0);
    document["spec"]["terminationGracePeriodSeconds"] = 1.into();
    let mut found = Vec::new();
    let understood: Deployment = serde_json::from_value(document.clone()).unwrap();
    lost(&document, &serde_json::to_value(understood).unwrap(), "", &mut found);
    assert_eq!(found, [".spec.terminationGracePeriodSeconds"]);
}

#[test]
fn everything_that_a_manifest_names_is_there() {
    let manifests = Manifests::read();
    for (name, set) in &manifests.stateful_sets {
        let spec = set.spec.as_ref().unwrap();
        assert_eq!(manifests.selected(labels(Some(&spec.selector)), name).name, name);
        let service = &manifests.services[spec.service_name.as_ref().unwrap()].spec.as_ref().unwrap();
        assert_eq!(service.cluster_ip.as_deref(), Some("None"), "{name}: its pods have names in a headless service");
        assert_eq!(manifests.selected(service.selector.as_ref(), name).name, name);
    }
    for (name, deployment) in &manifests.deployments {
        assert_eq!(manifests.selected(labels(Some(&deployment.spec.as_ref().unwrap().selector)), name).name, name);
    }
    for (name, service) in &manifests.services {
        let spec = service.spec.as_ref().unwrap();
        let ports = spec.ports.as_ref().unwrap();
        for port in ports {
            manifests.resolves(&format!("{name}:{}", port.port));
        }
    }
    for pods in manifests.pods() {
        let budget = manifests.budgets[pods.name].spec.as_ref().unwrap();
        assert_eq!(manifests.selected(labels(budget.selector.as_ref()), pods.name).name, pods.name);
        let policy = manifests.policies[pods.name].spec.as_ref().unwrap();
        assert_eq!(manifests.selected(labels(policy.pod_selector.as_ref()), pods.name).name, pods.name);
        for rule in policy.ingress.iter().flatten() {
            for port in rule.ports.iter().flatten() {
                assert!(pods.port(port.port.as_ref().unwrap()).is_some(), "{}: {port:?}", pods.name);
            }
            for peer in rule.from.iter().flatten().filter(|peer| peer.namespace_selector.is_none()) {
                manifests.selected(labels(peer.pod_selector.as_ref()), pods.name);
            }
        }
        for spread in pods.spec().topology_spread_constraints.iter().flatten() {
            assert_eq!(manifests.selected(labels(spread.label_selector.as_ref()), pods.name).name, pods.name);
        }
        check_volumes(&pods);
        if let Some(account) = &pods.spec().service_account_name {
            assert!(manifests.accounts.contains_key(account), "{account}");
        }
    }
    assert_eq!(manifests.pods().len(), 4);
}

fn check_volumes(pods: &Pods<'_>) {
    let volumes = pods.spec().volumes.iter().flatten();
    let names: BTreeSet<&str> = volumes.clone().map(|volume| volume.name.as_str()).chain(pods.claims.clone()).collect();
    let mounted = pods.container().volume_mounts.iter().flatten().map(|mount| mount.name.as_str());
    assert_eq!(names, mounted.collect(), "{}: volumes, and what is mounted", pods.name);
    let kustomization = kustomization();
    let generated = kustomization["configMapGenerator"].as_array().unwrap().iter();
    let generated: Vec<&str> = generated.map(|map| map["name"].as_str().unwrap()).collect();
    for map in volumes.filter_map(|volume| volume.config_map.as_ref()) {
        assert!(generated.contains(&map.name.as_str()), "{}: no ConfigMap {}", pods.name, map.name);
    }
}

#[test]
fn clearcoat_may_list_and_watch_slices_here_and_nothing_else() {
    let manifests = Manifests::read();
    let (role, binding) = (&manifests.roles["clearcoat"], &manifests.bindings["clearcoat"]);
    let [rule] = role.rules.as_deref().unwrap() else { panic!("one rule") };
    let only = |texts: &Option<Vec<String>>, wanted: &[&str]| assert_eq!(texts.as_deref().unwrap(), wanted);
    only(&rule.api_groups, &["discovery.k8s.io"]);
    only(&rule.resources, &["endpointslices"]);
    only(&Some(rule.verbs.clone()), &["list", "watch"]);
    assert_eq!((binding.role_ref.kind.as_str(), binding.role_ref.name.as_str()), ("Role", "clearcoat"));
    let [subject] = binding.subjects.as_deref().unwrap() else { panic!("one subject") };
    assert_eq!(
        (subject.kind.as_str(), subject.namespace.as_deref()),
        ("ServiceAccount", kustomization()["namespace"].as_str())
    );
    assert!(manifests.accounts.contains_key(&subject.name));
    // Whoever needs no token has none.
    for pods in manifests.pods() {
        let spec = pods.spec();
        let is_clearcoat = pods.name == "clearcoat";
        assert_eq!(spec.service_account_name.is_some(), is_clearcoat, "{}", pods.name);
        assert_eq!(spec.automount_service_account_token, Some(is_clearcoat), "{}", pods.name);
    }
}

#[test]
fn pods_have_no_more_rights_than_they_need_and_are_looked_after() {
    let manifests = Manifests::read();
    for pods in manifests.pods() {
        let (name, container) = (pods.name, pods.container());
        let pod = pods.spec().security_context.as_ref().unwrap();
        assert_eq!((pod.run_as_non_root, pod.run_as_user), (Some(true), Some(10001)), "{name}");
        assert_eq!(pod.seccomp_profile.as_ref().unwrap().type_, "RuntimeDefault", "{name}");
        let own = container.security_context.as_ref().unwrap();
        assert_eq!(
            (own.allow_privilege_escalation, own.read_only_root_filesystem),
            (Some(false), Some(true)),
            "{name}"
        );
        assert_eq!(own.capabilities.as_ref().unwrap().drop.as_deref().unwrap(), ["ALL"], "{name}");
        let resources = container.resources.as_ref().unwrap();
        assert!(resources.requests.as_ref().unwrap().contains_key("cpu"), "{name}");
        assert!(resources.limits.as_ref().unwrap().contains_key("memory"), "{name}");
        for probe in [&container.startup_probe, &container.liveness_probe, &container.readiness_probe] {
            let probe = probe.as_ref().unwrap_or_else(|| panic!("{name} has three probes"));
            let by_http = probe.http_get.as_ref().map(|get| &get.port);
            let port = by_http.or(probe.tcp_socket.as_ref().map(|socket| &socket.port));
            assert!(port.is_none_or(|port| pods.port(port).is_some()), "{name}: {port:?}");
            assert!(port.is_some() || probe.exec.is_some(), "{name}");
        }
        // Otherwise the name of a service becomes a variable of a program that knows another meaning for it.
        assert_eq!(pods.spec().enable_service_links, Some(false), "{name}");
        assert!(pods.spec().topology_spread_constraints.is_some(), "{name}");
    }
}

#[test]
fn a_pod_has_the_time_to_end_in_order() {
    let manifests = Manifests::read();
    let times = config().shutdown;
    let needed = times.leave + times.drain + Duration::from_secs(5);
    assert!(manifests.pods_of("clearcoat").grace() >= needed, "{needed:?}");
    assert!(times.leave >= Duration::from_secs(5), "a moment after the SIGTERM a pod still gets connections");
    let varnish = manifests.pods_of("varnish");
    let time = |name| humantime::parse_duration(varnish.variable(name)).unwrap();
    let needed = time("CLEARCOAT_AGENT_DRAIN") + time("CLEARCOAT_AGENT_KILL_AFTER");
    assert!(varnish.grace() > needed, "{needed:?}");
    let web = manifests.pods_of("web");
    let hook = web.container().lifecycle.as_ref().unwrap().pre_stop.as_ref().unwrap();
    let [command, seconds] = hook.exec.as_ref().unwrap().command.as_deref().unwrap() else { panic!("sleep N") };
    assert_eq!(command, "sleep");
    assert!(web.grace() > Duration::from_secs(seconds.parse::<u64>().unwrap()) * 2);
    // Readiness is lost within that time, or is said at once; who is not ready for that long is told nothing new.
    for name in ["clearcoat", "web"] {
        let update = manifests.deployments[name].spec.as_ref().unwrap().strategy.as_ref().unwrap();
        let rolling = update.rolling_update.as_ref().unwrap();
        assert_eq!(rolling.max_unavailable, Some(IntOrString::Int(0)), "{name}: a new one first");
    }
}

#[test]
fn the_configuration_fits_the_services_and_the_containers() {
    let file = folder().join("clearcoat.toml");
    let output = run(&["check", "--config", file.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && output.stderr.is_empty(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("and those of Kubernetes"), "{said}");

    let (manifests, config) = (Manifests::read(), config());
    for (role, services) in [("web", &config.registry.kubernetes.web), ("varnish", &config.registry.kubernetes.varnish)]
    {
        let [service] = services.as_slice() else { panic!("one service of {role}") };
        let ServicePort::Named(port) = &service.port else { panic!("{service}: a port by name") };
        let spec = manifests.services[&service.name].spec.as_ref().unwrap();
        let port = spec.ports.iter().flatten().find(|known| known.name.as_ref() == Some(port)).unwrap();
        assert_eq!(manifests.selected(spec.selector.as_ref(), &service.name).name, role);
        assert!(manifests.pods_of(role).port(port.target_port.as_ref().unwrap()).is_some());
    }
    let clearcoat = manifests.pods_of("clearcoat");
    let listeners = [
        ("edge", &config.edge.listen),
        ("origin", &config.origin.listen),
        ("purge", &config.purge.listen),
        ("admin", &config.admin.listen),
    ];
    for (name, listen) in listeners {
        let port = clearcoat.port(&IntOrString::String(name.to_owned()));
        assert!(listen[0].ip().is_unspecified() && port == Some(listen[0].port().into()), "{name}: {listen:?}");
    }
    // The path of the journal, and of the configuration, are mounted.
    let mounts: Vec<&str> =
        clearcoat.container().volume_mounts.iter().flatten().map(|mount| mount.mount_path.as_str()).collect();
    assert_eq!(mounts, ["/etc/clearcoat", config.journal.path.to_str().unwrap()]);
    for endpoint in &config.registry.etcd.endpoints {
        assert_eq!(manifests.resolves(endpoint.strip_prefix("http://").unwrap()), 2379);
    }
}

#[test]
fn what_the_containers_are_told_leads_somewhere() {
    let manifests = Manifests::read();
    let varnish = manifests.pods_of("varnish");
    assert_eq!(manifests.resolves(varnish.variable("CLEARCOAT_AGENT_ORIGIN")), 8081);
    for endpoint in varnish.variable("CLEARCOAT_AGENT_ETCD").split(',') {
        assert_eq!(manifests.resolves(endpoint.strip_prefix("http://").unwrap()), 2379);
    }
    // The agent says itself which variables it knows.
    let help = run(&["agent", "--help"]);
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for variable in varnish.container().env.iter().flatten() {
        assert!(help.contains(&format!("[env: {}=", variable.name)), "{}", variable.name);
    }
    assert_eq!(manifests.resolves(manifests.pods_of("web").variable("SHOP_PURGE")), 6081);
    let etcd = manifests.pods_of("etcd");
    let members = etcd.variable("ETCD_INITIAL_CLUSTER").split(',').map(|member| member.split_once("=http://").unwrap());
    let members: Vec<&str> = members
        .map(|(name, address)| {
            assert_eq!(address.split('.').next(), Some(name));
            assert_eq!(manifests.resolves(address), 2380);
            name
        })
        .collect();
    assert_eq!(
        Some(members.len()),
        manifests.stateful_sets["etcd"].spec.as_ref().unwrap().replicas.map(|n| n as usize)
    );
    // Every image is built here, and its tag is set in one place.
    let script = std::fs::read_to_string(folder().join("../compose/build-images.sh")).unwrap();
    let kustomization = kustomization();
    let images: Vec<&str> =
        kustomization["images"].as_array().unwrap().iter().map(|image| image["name"].as_str().unwrap()).collect();
    for pods in manifests.pods() {
        let image = pods.container().image.as_deref().unwrap();
        assert!(images.contains(&image), "{image} has no tag");
        let part = image.strip_prefix("clearcoat-").unwrap_or(image);
        assert!(script.contains(part), "{image} is not built");
    }
}
