//! From slices to nodes. Pure.
//!
//! **A pod is one node**, however often it is named: while the control plane moves an endpoint from one slice to another it is
//! in both, and a service with two address families has a slice of each. A pod terminates if any slice says so, as it never
//! goes back; it is ready if any says so, as the other one may be older. Of its addresses the one in use is kept while it is
//! listed; otherwise IPv4 comes first, as with DNS.
//!
//! **An address is one pod.** It may be given out again while the slice still has the pod that had it before
//! (kubernetes/kubernetes#135266). Then the pod that does not terminate counts, and the other one has left.
//!
//! **Who gets traffic** is who is ready and does not terminate. `terminating` is looked at as well as `ready`, which is always
//! true with `publishNotReadyAddresses`. Where nobody is:
//!
//! - A web pod that terminates, and serves, goes on (traefik/traefik#12417): kube-proxy does the same, and the choice is
//!   between that and refusing readers. A Varnish does not: its readers are served by the web nodes, and none is cut off when
//!   it ends.
//! - Otherwise what the readiness probe says tells nobody from another, and clearcoat's own checks decide among all that do
//!   not terminate.
//!
//! **Readiness is a check like ours**, and fails as ours does: at every web pod when their database hiccups, at one after the
//! other. The last ready one would get what all others had, and fail by that. So if fewer than half of the web pods that have
//! been ready are, it is not believed, and clearcoat's checks decide among them; those know the same rule (`health.web.panic_threshold`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::slice::{EndpointPort, EndpointSlice, SliceEndpoint};
use crate::config::ServicePort;
use crate::fleet::{Event, NodeId, NodeKey, NodeSource, NodeSpec, Role};

/// The number of vanished pods that are remembered, to see whether their addresses belong to others.
const MAX_VANISHED: usize = 1024;

/// The label of a node with the machine that its pod is on.
const MACHINE: &str = "node";

/// One pod of a service, as a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) spec: NodeSpec,
    /// It was told to end.
    pub(super) terminating: bool,
}

/// The pods of one service.
#[derive(Debug)]
pub(super) struct ServicePods {
    role: Role,
    port: ServicePort,
    /// Whether another pod of the same name has another cache.
    with_epoch: bool,
    slices: BTreeMap<String, EndpointSlice>,
    pods: BTreeMap<NodeId, Pod>,
    /// Those of the pods that were ready once, by name and uid.
    ready_once: BTreeSet<(NodeId, String)>,
}

/// One pod in one slice, or in several.
#[derive(Debug, Default)]
struct SeenPod<'s> {
    addresses: BTreeSet<(bool, SocketAddr)>,
    ready: bool,
    serving: bool,
    terminating: bool,
    was_ready: bool,
    zone: Option<&'s str>,
    machine: Option<&'s str>,
}

impl ServicePods {
    /// A service of which nothing is known.
    pub(super) fn new(role: Role, port: ServicePort, with_epoch: bool) -> Self {
        ServicePods {
            role,
            port,
            with_epoch,
            slices: BTreeMap::new(),
            pods: BTreeMap::new(),
            ready_once: BTreeSet::new(),
        }
    }

    /// What its pods do.
    pub(super) fn role(&self) -> Role {
        self.role
    }

    /// Whether it has no pods.
    pub(super) fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// Its pods, in the order of their names.
    pub(super) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// Replaces all slices.
    pub(super) fn list(&mut self, slices: Vec<EndpointSlice>) {
        self.slices = slices.into_iter().map(|slice| (slice.metadata.name.clone(), slice)).collect();
    }

    /// Adds or replaces a slice.
    pub(super) fn put(&mut self, slice: EndpointSlice) {
        self.slices.insert(slice.metadata.name.clone(), slice);
    }

    /// Removes a slice.
    pub(super) fn delete(&mut self, name: &str) {
        self.slices.remove(name);
    }

    /// Takes the pods of the last run. The first list replaces them.
    pub(super) fn restore(&mut self, pods: Vec<Pod>) {
        self.pods = pods.into_iter().map(|pod| (pod.spec.id.clone(), pod)).collect();
    }

    /// Makes nodes of the slices. Returns why some of what is in them means none.
    pub(super) fn settle(&mut self) -> BTreeSet<String> {
        let mut rejected = BTreeSet::new();
        let seen = self.seen(&mut rejected);
        let mut lives: BTreeMap<NodeId, (&str, SeenPod<'_>)> = BTreeMap::new();
        for ((id, uid), pod) in seen {
            let is_better = lives.get(&id).is_none_or(|(_, known)| pod.rank() > known.rank());
            if is_better {
                lives.insert(id, (uid, pod));
            }
        }
        let mut ready_once = BTreeSet::new();
        for (id, (uid, pod)) in &mut lives {
            let name = (id.clone(), (*uid).to_owned());
            pod.was_ready = pod.ready || self.ready_once.contains(&name);
            if pod.was_ready {
                ready_once.insert(name);
            }
        }
        let weights = weights(self.role, lives.values().map(|(_, pod)| pod));
        let pods = lives.into_iter().zip(weights).map(|((id, (uid, pod)), weight)| {
            let pod = self.pod(&id, uid, &pod, weight);
            (id, pod)
        });
        self.pods = pods.collect();
        self.ready_once = ready_once;
        rejected
    }

    /// Every pod in the slices, by its id and its uid.
    fn seen(&self, rejected: &mut BTreeSet<String>) -> BTreeMap<(NodeId, &str), SeenPod<'_>> {
        let mut seen: BTreeMap<(NodeId, &str), SeenPod<'_>> = BTreeMap::new();
        for slice in self.slices.values().filter(|slice| !slice.endpoints.is_empty()) {
            if slice.address_type == "FQDN" {
                rejected.insert("addresses of type FQDN are not used".to_owned());
                continue;
            }
            let port = match port_of(&slice.ports, &self.port) {
                Ok(port) => port,
                Err(reason) => {
                    rejected.insert(reason);
                    continue;
                }
            };
            for endpoint in &slice.endpoints {
                let (id, address) = match identify(endpoint, port) {
                    Ok(identity) => identity,
                    Err(reason) => {
                        rejected.insert(reason);
                        continue;
                    }
                };
                let uid = endpoint.target_ref.as_ref().map_or("", |target| target.uid.as_str());
                seen.entry((id, uid)).or_default().add(endpoint, address);
            }
        }
        seen
    }

    fn pod(&self, id: &NodeId, uid: &str, seen: &SeenPod<'_>, weight: u32) -> Pod {
        let in_use = self.pods.get(id).map(|pod| pod.spec.address);
        let kept = in_use.filter(|address| seen.addresses.iter().any(|(_, listed)| listed == address));
        // A pod that was seen has an address.
        let address = kept.or_else(|| seen.addresses.first().map(|(_, address)| *address));
        let mut spec = NodeSpec::new(self.role, id.clone(), address.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))));
        spec.source = NodeSource::Kubernetes;
        spec.weight = weight;
        spec.zone = seen.zone.map(Arc::from);
        spec.labels = seen.machine.map(|machine| (MACHINE.to_owned(), machine.to_owned())).into_iter().collect();
        if let Some(varnish) = spec.varnish.as_mut().filter(|_| self.with_epoch && !uid.is_empty()) {
            varnish.epoch = Some(Arc::from(uid));
        }
        Pod { spec, terminating: seen.terminating }
    }
}

impl<'s> SeenPod<'s> {
    fn add(&mut self, endpoint: &'s SliceEndpoint, address: SocketAddr) {
        let conditions = &endpoint.conditions;
        // IPv4 comes first.
        self.addresses.insert((address.is_ipv6(), address));
        self.ready |= conditions.is_ready();
        self.serving |= conditions.is_serving();
        self.terminating |= conditions.is_terminating();
        self.zone = self.zone.or(endpoint.zone.as_deref());
        self.machine = self.machine.or(endpoint.node_name.as_deref());
    }

    /// Which of two pods of one name counts.
    fn rank(&self) -> (bool, bool, bool) {
        (!self.terminating, self.ready, self.serving)
    }
}

/// The shares of these pods of one service.
fn weights<'p>(role: Role, pods: impl Iterator<Item = &'p SeenPod<'p>> + Clone) -> Vec<u32> {
    let is_ready = |pod: &SeenPod<'_>| pod.ready && !pod.terminating;
    let serves_on = |pod: &SeenPod<'_>| role == Role::Web && pod.terminating && pod.serving;
    let stays = |pod: &SeenPod<'_>| !pod.terminating;
    let was_ready = |pod: &SeenPod<'_>| stays(pod) && pod.was_ready;
    let count = |choice: &dyn Fn(&SeenPod<'_>) -> bool| pods.clone().filter(|pod| choice(pod)).count();
    let ready = count(&is_ready);
    let too_few = role == Role::Web && 2 * ready < count(&was_ready);
    let disbelieved = |pod: &SeenPod<'_>| was_ready(pod) || ready == 0 && serves_on(pod);
    let choices: [&dyn Fn(&SeenPod<'_>) -> bool; 3] = [&is_ready, &serves_on, &stays];
    let by_condition = choices.into_iter().find(|choice| count(*choice) > 0).unwrap_or(&is_ready);
    let choice = if too_few { &disbelieved } else { by_condition };
    pods.map(|pod| u32::from(choice(pod))).collect()
}

/// The port of the pods of a slice, or why there is none.
fn port_of(ports: &[EndpointPort], wanted: &ServicePort) -> Result<u16, String> {
    let is_tcp = |port: &&EndpointPort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    let tcp: Vec<&EndpointPort> = ports.iter().filter(is_tcp).collect();
    let listed = || {
        let names: Vec<String> = tcp.iter().map(|port| format!("{} {}", port.name, port.port.unwrap_or(0))).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    match wanted {
        ServicePort::Only => match tcp.as_slice() {
            [EndpointPort { port: Some(port), .. }] => Ok(*port),
            _ => Err(format!("its TCP ports are {}: name one of them (SERVICE:PORT)", listed())),
        },
        ServicePort::Named(name) => {
            let found = tcp.iter().find(|port| port.name == *name).and_then(|port| port.port);
            found.ok_or_else(|| format!("it has no TCP port named {name}, only {}", listed()))
        }
        // A service without ports, and a port without a number, is for any.
        ServicePort::Number(number) => {
            let is_there = tcp.is_empty() || tcp.iter().any(|port| port.port.is_none_or(|port| port == *number));
            let reason =
                || format!("its pods have no TCP port {number}, only {}: a number is that of the pods", listed());
            is_there.then_some(*number).ok_or_else(reason)
        }
    }
}

/// The id and the address of an endpoint, or why it is no node.
fn identify(endpoint: &SliceEndpoint, port: u16) -> Result<(NodeId, SocketAddr), String> {
    let text = endpoint.addresses.first().ok_or("an endpoint without an address")?;
    let ip: IpAddr = text.parse().map_err(|_| format!("`{}` is no IP address", text.escape_debug()))?;
    let target = endpoint.target_ref.as_ref().map(|target| &target.name).filter(|name| !name.is_empty());
    // A slice that somebody wrote by hand need not name an object.
    let name = target.or(endpoint.hostname.as_ref()).cloned().unwrap_or_else(|| format!("{ip}:{port}"));
    let id = NodeId::try_from(name).map_err(|error| error.to_string())?;
    Ok((id, SocketAddr::new(ip, port)))
}

/// A pod whose name is taken by a pod of another service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NameCollision {
    pub(super) role: Role,
    pub(super) id: NodeId,
    pub(super) service: String,
}

/// The pods of all services, as they were announced.
#[derive(Debug, Default)]
pub(super) struct PodFleet {
    known: BTreeMap<NodeKey, Pod>,
    /// Those that have vanished, with their addresses, the oldest first.
    vanished: VecDeque<(NodeKey, SocketAddr)>,
    collisions: BTreeSet<NameCollision>,
    new_collisions: Vec<NameCollision>,
}

impl PodFleet {
    /// Takes the pods of all services. Returns the changes: joins come before departures, so that a fleet that moves is
    /// never empty in between.
    pub(super) fn replace<'s>(&mut self, services: impl Iterator<Item = (&'s str, &'s ServicePods)>) -> Vec<Event> {
        let now = self.merged(services);
        let joined = now.iter().filter(|(key, pod)| self.known.get(*key).is_none_or(|known| known.spec != pod.spec));
        let mut events: Vec<Event> = joined.map(|(_, pod)| Event::Joined(pod.spec.clone())).collect();
        let taken: BTreeSet<SocketAddr> = now.values().map(|pod| pod.spec.address).collect();
        self.vanished.retain(|(key, address)| {
            let is_taken = taken.contains(address) && !now.contains_key(key);
            if is_taken {
                events.push(Event::Left(NodeSource::Kubernetes, key.0, key.1.clone()));
            }
            !is_taken && !now.contains_key(key)
        });
        for ((role, id), pod) in &self.known {
            if now.contains_key(&(*role, id.clone())) {
                continue;
            }
            if pod.terminating || taken.contains(&pod.spec.address) {
                if pod.spec.weight > 0 {
                    // Who leaves without a share is let go at once, and counts for no mass loss.
                    events.push(Event::Joined(NodeSpec { weight: 0, ..pod.spec.clone() }));
                }
                events.push(Event::Left(NodeSource::Kubernetes, *role, id.clone()));
            } else {
                events.push(Event::Vanished(NodeSource::Kubernetes, *role, id.clone()));
                self.vanished.push_back(((*role, id.clone()), pod.spec.address));
            }
        }
        let too_many = self.vanished.len().saturating_sub(MAX_VANISHED);
        self.vanished.drain(..too_many);
        self.known = now;
        events
    }

    /// The collisions that were not there before the last change.
    pub(super) fn new_collisions(&mut self) -> Vec<NameCollision> {
        std::mem::take(&mut self.new_collisions)
    }

    /// The pods of all services: each name and each address once in its role.
    fn merged<'s>(&mut self, services: impl Iterator<Item = (&'s str, &'s ServicePods)>) -> BTreeMap<NodeKey, Pod> {
        let mut now: BTreeMap<NodeKey, Pod> = BTreeMap::new();
        let mut collisions = BTreeSet::new();
        for (service, pods) in services {
            for pod in pods.pods() {
                let key = (pods.role(), pod.spec.id.clone());
                match now.get(&key) {
                    None => _ = now.insert(key, pod.clone()),
                    // The same pod in two services.
                    Some(known) if known.spec.address.ip() == pod.spec.address.ip() => {}
                    Some(_) => {
                        let service = service.to_owned();
                        collisions.insert(NameCollision { role: key.0, id: key.1, service });
                    }
                }
            }
        }
        self.new_collisions.extend(collisions.difference(&self.collisions).cloned());
        self.collisions = collisions;
        let mut owners: BTreeMap<(Role, SocketAddr), (bool, NodeId)> = BTreeMap::new();
        for ((role, id), pod) in &now {
            let owner = (pod.terminating, id.clone());
            let known = owners.entry((*role, pod.spec.address)).or_insert_with(|| owner.clone());
            if owner < *known {
                *known = owner;
            }
        }
        now.retain(|(role, id), pod| owners.get(&(*role, pod.spec.address)).is_none_or(|(_, owner)| owner == id));
        now
    }
}

#[cfg(test)]
mod tests;
