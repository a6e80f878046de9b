//! Nodes from Kubernetes: the pods of configured services, as the EndpointSlices of each service have them.
//!
//! ```text
//! one task a service: LIST, then WATCH from there ── slices ──> pods (pure) ──> Joined, Left, Vanished
//! ```
//!
//! # What is a node
//!
//! Every pod in a slice is one, ready or not: a Varnish that is not ready gets purges, and traffic when it is. Its id is the
//! name of the pod, so a pod of a StatefulSet that comes back with another address is the node that it was. [`pods`] says
//! what several slices, two address families, and the conditions of an endpoint come to.
//!
//! # What is believed
//!
//! A pod that **terminates** gets no new traffic at once, and purges as long as it is in a slice: Kubernetes takes it out when
//! its last container has ended, so whoever still reads from it reads what was purged there. When it is gone it has *left*.
//! A pod that disappears without having terminated has *vanished*: a selector was changed, a service deleted, or we missed
//! how it went. The fleet keeper then looks for itself, and believes no mass loss ([`crate::fleet::LostNodes`]). If its
//! address is another node's by now, it has left: addresses of pods are given out again.
//!
//! **The fleet outlives the API server.** While it is away the last known nodes stay, however long. A process that starts
//! meanwhile takes the last fleet on disk ([`last_fleet`](super::last_fleet)).
//!
//! # Why not the `kube` crate
//!
//! What is wanted of it is two GET requests: a list, and the lines of a watch. For these it brings 52 crates that are not here
//! yet (with `k8s-openapi`; a YAML parser, a parser generator with a language for JSON paths, a time library, `tower-http`),
//! 114 s of compiling on one core where the whole of clearcoat takes 390. Its watcher lists, resumes and backs off as
//! [`follow`] does, but keeps its resource versions to itself and takes a watch that hangs for alive for five minutes. What
//! is written here instead is the types of one resource ([`mod@slice`]) and the loop; TLS and HTTP are those of
//! [`crate::http_client`]. In the tests a server answers with the types of `k8s-openapi`, which are generated from
//! Kubernetes' own.

mod access;
mod api;
mod follow;
mod pods;
mod saved;
mod slice;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::{Kubernetes, ServiceRef};
use crate::fleet::{Event, NodeSource, Role};
use crate::registry::last_fleet::LastFleetStore;
use crate::registry::source_status::SourceStatus;
use crate::telemetry::{Metrics, Resync, causes};

pub use access::{AccessError, ApiAccess};
use follow::{ReceiverGone, ServiceFollower, ServiceNews, ServiceReport};
use pods::{PodFleet, ServicePods};
use saved::{SavedPods, SavedService};

/// How long the first list of a service is waited for before the last fleet on disk is taken.
const PATIENCE: Duration = Duration::from_secs(3);

/// The disk is written to at most this often.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// What the registry needs.
pub struct KubernetesRegistrySettings {
    /// The services.
    pub kubernetes: Kubernetes,
    /// The API server.
    pub access: ApiAccess,
    /// Its status.
    pub status: Arc<SourceStatus>,
    /// The file of the last fleet, for a start without the API server; `None` for no file.
    pub last_fleet: Option<PathBuf>,
    /// The metrics of the registry.
    pub metrics: Arc<Metrics>,
    /// The receiver of the events.
    pub events: mpsc::Sender<Event>,
}

/// Announces the pods of the services until the receiver of the events is gone.
pub async fn run(settings: KubernetesRegistrySettings) {
    let KubernetesRegistrySettings { kubernetes, access, status, last_fleet, metrics, events } = settings;
    let (sender, mut reports) = mpsc::channel(16);
    // Dropped at the end of this function, which aborts the tasks.
    let mut followers = JoinSet::new();
    let with_epoch = kubernetes.cache_ends_with_pod;
    let mut services = Vec::new();
    let named = |role, services: Vec<ServiceRef>| services.into_iter().map(move |service| (role, service));
    let configured = named(Role::Web, kubernetes.web).chain(named(Role::Varnish, kubernetes.varnish));
    for (index, (role, service)) in configured.enumerate() {
        let namespace = service.namespace.clone().unwrap_or_else(|| access.namespace().to_owned());
        let name = format!("{namespace}/{}", service.name);
        followers.spawn(ServiceFollower::new(index, access.server(), &namespace, &service.name).run(sender.clone()));
        services.push(FollowedService {
            pods: ServicePods::new(role, service.port, with_epoch),
            name,
            is_known: false,
            was_empty: false,
            failure: None,
            rejected: BTreeSet::new(),
        });
    }
    if last_fleet.is_none() {
        tracing::warn!("a journal in memory has no place on disk: a start without the API server will have no nodes");
    }
    let mut registry = KubernetesRegistry {
        services,
        fleet: PodFleet::default(),
        status,
        metrics,
        events,
        start: Some(Instant::now() + PATIENCE),
        disk: LastFleetStore::new(last_fleet),
        changed: false,
        is_listed: false,
    };
    registry.work(&mut reports, &mut followers).await;
}

/// One service.
struct FollowedService {
    /// `NAMESPACE/SERVICE`.
    name: String,
    pods: ServicePods,
    /// Its pods are known, by a list or from the disk.
    is_known: bool,
    was_empty: bool,
    /// Why it is not followed, as logged.
    failure: Option<String>,
    /// What means no node in it, which is logged already.
    rejected: BTreeSet<String>,
}

struct KubernetesRegistry {
    services: Vec<FollowedService>,
    fleet: PodFleet,
    status: Arc<SourceStatus>,
    metrics: Arc<Metrics>,
    events: mpsc::Sender<Event>,
    /// When the disk is read for the services that were not listed; `None`: it was, or need not be.
    start: Option<Instant>,
    disk: LastFleetStore<SavedPods>,
    /// Whether anything has changed since the disk was written.
    changed: bool,
    /// The pods of every service are announced.
    is_listed: bool,
}

impl KubernetesRegistry {
    async fn work(&mut self, reports: &mut mpsc::Receiver<ServiceReport>, followers: &mut JoinSet<()>) {
        let mut ticks = tokio::time::interval(WRITE_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let told = tokio::select! {
                Some(report) = reports.recv() => self.take(report).await,
                Some(Err(error)) = followers.join_next() => {
                    tracing::error!(error = %causes(&error), "who follows a service panicked; its nodes stay as they are");
                    Ok(())
                }
                () = until(self.start) => self.start_from_disk().await,
                written = self.disk.written() => {
                    self.changed = self.changed || !written;
                    Ok(())
                }
                _ = ticks.tick(), if self.changed => {
                    self.changed = !self.disk.write(self.saved());
                    Ok(())
                }
                () = self.events.closed() => Err(ReceiverGone),
            };
            if let Err(ReceiverGone) = told {
                return;
            }
        }
    }

    async fn take(&mut self, ServiceReport { service: index, news }: ServiceReport) -> Result<(), ReceiverGone> {
        let service = &mut self.services[index];
        match news {
            ServiceNews::Failed(reason) => service.failed(reason),
            ServiceNews::Alive => {
                self.status.record_contact();
                service.answered();
            }
            // What is not watched after its list is not followed.
            ServiceNews::Listed(slices, cause) => {
                self.status.record_contact();
                if let Some(cause) = cause {
                    self.metrics.registry.resynced(cause);
                    let (name, slices) = (service.name.as_str(), slices.len());
                    match cause {
                        Resync::Start => tracing::info!(service = name, slices, "the pods of a service were listed"),
                        _ => tracing::info!(
                            service = name,
                            slices,
                            cause = cause.as_str(),
                            "the pods of a service were listed again"
                        ),
                    }
                }
                service.pods.list(slices);
                service.is_known = true;
                self.settle(index).await?;
            }
            ServiceNews::Changed(slice) => {
                self.status.record_contact();
                service.pods.put(slice);
                self.settle(index).await?;
            }
            ServiceNews::Deleted(name) => {
                self.status.record_contact();
                service.pods.delete(&name);
                self.settle(index).await?;
            }
        }
        self.show();
        self.finish_start().await
    }

    /// Looks at the slices of this service, and tells what has changed with them.
    async fn settle(&mut self, index: usize) -> Result<(), ReceiverGone> {
        let service = &mut self.services[index];
        let rejected = service.pods.settle();
        service.looked_at(rejected, &self.metrics);
        self.announce().await
    }

    /// Tells what has changed with the pods.
    async fn announce(&mut self) -> Result<(), ReceiverGone> {
        let events = self.fleet.replace(self.services.iter().map(|service| (service.name.as_str(), &service.pods)));
        for collision in self.fleet.new_collisions() {
            self.metrics.registry.rejected.inc();
            tracing::warn!(
                role = %collision.role,
                node = %collision.id,
                service = collision.service,
                "a pod of another service has this name, and counts: this one gets neither traffic nor purges"
            );
        }
        self.changed = self.changed || !events.is_empty();
        for event in events {
            self.tell(event).await?;
        }
        Ok(())
    }

    /// Takes the last fleet for the services that were not listed in time.
    async fn start_from_disk(&mut self) -> Result<(), ReceiverGone> {
        self.start = None;
        if self.is_listed {
            return Ok(());
        }
        let mut saved = self.disk.read().await.map(SavedPods::into_services).unwrap_or_default();
        for index in 0..self.services.len() {
            let service = &mut self.services[index];
            if service.is_known {
                continue;
            }
            let Some(found) = saved.remove(&service.key()) else {
                tracing::warn!(
                    service = service.name,
                    "the API server has not given the pods of a service in time, and there are none on disk: waiting for it"
                );
                continue;
            };
            tracing::warn!(
                service = service.name,
                nodes = found.len(),
                "the API server has not given the pods of a service in time: those on disk are taken"
            );
            service.pods.restore(found);
            service.is_known = true;
            self.announce().await?;
        }
        self.finish_start().await
    }

    /// Reports that all pods are announced, once they are.
    async fn finish_start(&mut self) -> Result<(), ReceiverGone> {
        if self.is_listed || !self.services.iter().all(|service| service.is_known) {
            return Ok(());
        }
        self.is_listed = true;
        self.tell(Event::Listed(NodeSource::Kubernetes)).await
    }

    fn show(&self) {
        let failing = |(index, service): (usize, &FollowedService)| {
            service.failure.as_ref().map(|reason| (index, format!("{}: {reason}", service.name)))
        };
        let failing: BTreeMap<usize, String> = self.services.iter().enumerate().filter_map(failing).collect();
        self.status.set(self.services.iter().all(|service| service.is_known), &failing);
    }

    async fn tell(&self, event: Event) -> Result<(), ReceiverGone> {
        self.events.send(event).await.map_err(|_| ReceiverGone)
    }

    fn saved(&self) -> SavedPods {
        let known = self.services.iter().filter(|service| service.is_known);
        SavedPods::new(known.map(|service| SavedService::new(service.key(), &service.pods)))
    }
}

impl FollowedService {
    /// What identifies it on disk.
    fn key(&self) -> String {
        format!("{} {}", self.pods.role(), self.name)
    }

    fn failed(&mut self, reason: String) {
        if self.failure.as_ref() != Some(&reason) {
            tracing::warn!(service = self.name, reason, "a service cannot be followed; its nodes stay as they are");
        }
        self.failure = Some(reason);
    }

    fn answered(&mut self) {
        if self.failure.take().is_some() {
            tracing::info!(service = self.name, "the service is followed again");
        }
    }

    /// Says what is new about slices that mean no node, and about a service without any.
    fn looked_at(&mut self, rejected: BTreeSet<String>, metrics: &Metrics) {
        for reason in rejected.difference(&self.rejected) {
            metrics.registry.rejected.inc();
            tracing::warn!(service = self.name, reason, "this is no node");
        }
        self.rejected = rejected;
        let is_empty = self.pods.is_empty();
        if is_empty && !self.was_empty {
            tracing::warn!(service = self.name, "the service has no pods: does it exist, and does its selector fit?");
        }
        self.was_empty = is_empty;
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
