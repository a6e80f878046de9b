//! Nodes that register themselves in etcd, each under a key of its own.
//!
//! [`crate::etcd::follow`] delivers the list and the changes, the [`roster`] interprets them, and this task passes the
//! result to the fleet. It waits only for its inputs, so that no name server, no disk and no query to etcd ever delays
//! a change:
//!
//! ```text
//! follow ── list, changes ──> roster ──┬── registered ──> names (if it has one) ──> Joined
//!                                      └── gone ──> at once, or when etcd has said why (lease) ──> Left, Vanished
//! ```
//!
//! **The fleet outlives etcd.** The last known nodes stay while etcd is unreachable, however long. A process that
//! starts meanwhile uses the last fleet on disk ([`snapshot`]); if there is none, it waits for etcd.
//!
//! A key is the name of a node, so a name that is registered again with another address is the same node elsewhere.

mod lease;
mod names;
mod record;
mod roster;
mod snapshot;
mod start;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use self::lease::Manner;
use self::names::{FoundAddresses, NameLookups};
use self::roster::{Departure, Registered, Roster, RosterChange};
use self::snapshot::{SavedFleet, SavedNode};
use self::start::StartPhase;
use crate::etcd::follow::{self, Listing, Resync, Update, WatchStatus};
use crate::etcd::{LeaseId, SharedEtcd};
use crate::fleet::{Event, NodeSource, NodeSpec, node_key};
use crate::registry::last_fleet::LastFleetStore;
use crate::registry::resolve::system;
use crate::telemetry::Metrics;

/// The prefix of the keys of nodes, below the prefix of the fleet. It ends in `/`, so that it does not match keys that
/// merely begin with the word.
const NODES: &str = "nodes/";

/// The disk is written to at most this often.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// The number of departures that may wait for an answer. Further ones count as expired leases.
const MAX_QUESTIONS: usize = 16_384;

/// What the registry needs.
pub struct EtcdRegistrySettings {
    /// Where the nodes register.
    pub etcd: SharedEtcd,
    /// Its status.
    pub status: Arc<WatchStatus>,
    /// The file of the last fleet, for a start without etcd; `None` for no file.
    pub snapshot: Option<PathBuf>,
    /// The metrics of the registry.
    pub metrics: Arc<Metrics>,
    /// The receiver of the events.
    pub events: mpsc::Sender<Event>,
    /// Changes when a node cannot be reached: names are looked up again soon.
    pub doubted: watch::Receiver<()>,
}

/// The receiver of the events is gone.
struct NobodyListens;

struct EtcdRegistry {
    metrics: Arc<Metrics>,
    events: mpsc::Sender<Event>,
    roster: Roster,
    /// The announced nodes, by their keys.
    announced: BTreeMap<String, Announced>,
    names: NameLookups,
    /// The departures with a pending query to etcd: a node that registers again before the answer has not left.
    departing: HashMap<String, u64>,
    questions: mpsc::Sender<(u64, Departure)>,
    next_question: u64,
    start: StartPhase,
    disk: LastFleetStore<SavedFleet>,
    /// Whether anything has changed since the disk was written.
    changed: bool,
    cluster: u64,
    revision: i64,
}

struct Announced {
    /// The address as it is registered.
    address: String,
    spec: NodeSpec,
}

/// Announces the nodes in etcd until the receiver of the events is gone.
pub async fn run(settings: EtcdRegistrySettings) {
    let EtcdRegistrySettings { etcd, status, snapshot, metrics, events, doubted } = settings;
    let (updates_sender, mut updates) = mpsc::channel(16);
    let (questions, questions_receiver) = mpsc::channel(MAX_QUESTIONS);
    let (answers_sender, mut answers) = mpsc::channel(64);
    // Dropped at the end of this function, which aborts the tasks.
    let mut helpers = JoinSet::new();
    helpers.spawn(lease::ask(Arc::clone(&etcd), questions_receiver, answers_sender));
    let prefix = etcd.key(NODES);
    helpers.spawn(follow::follow(etcd, prefix, status, updates_sender));
    if snapshot.is_none() {
        tracing::warn!("a journal in memory has no place on disk: a start without etcd will have no nodes");
    }
    let mut registry = EtcdRegistry {
        metrics,
        events,
        roster: Roster::default(),
        announced: BTreeMap::new(),
        names: NameLookups::new(system(), doubted),
        departing: HashMap::new(),
        questions,
        next_question: 0,
        start: StartPhase::new(),
        disk: LastFleetStore::new(snapshot),
        changed: false,
        cluster: 0,
        revision: 0,
    };
    let NobodyListens = registry.work(&mut updates, &mut answers).await;
}

impl EtcdRegistry {
    async fn work(
        &mut self,
        updates: &mut mpsc::Receiver<Update>,
        answers: &mut mpsc::Receiver<(u64, Departure, Manner)>,
    ) -> NobodyListens {
        let mut ticks = tokio::time::interval(WRITE_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let told = tokio::select! {
                update = updates.recv() => match update {
                    Some(update) => self.take(update).await,
                    None => Err(NobodyListens),
                },
                found = self.names.found() => self.found(found).await,
                Some((number, departure, manner)) = answers.recv() => self.answered(number, departure, manner).await,
                () = self.start.due() => self.start_is_due().await,
                written = self.disk.written() => {
                    self.changed = self.changed || !written;
                    Ok(())
                }
                _ = ticks.tick(), if self.changed => {
                    self.changed = !self.disk.write(self.saved());
                    Ok(())
                }
                () = self.events.closed() => Err(NobodyListens),
            };
            if let Err(nobody) = told {
                return nobody;
            }
        }
    }

    async fn take(&mut self, update: Update) -> Result<(), NobodyListens> {
        self.changed = true;
        match update {
            Update::Listed(Listing { cluster, revision, items, cause }) => {
                self.metrics.registry.resynced(cause);
                match cause {
                    // Follows every lost connection, and mostly changes nothing.
                    Resync::Reconnected => tracing::debug!(revision, keys = items.len(), "the nodes were listed again"),
                    _ => tracing::info!(
                        cause = cause.as_str(),
                        revision,
                        keys = items.len(),
                        "the nodes in etcd were listed"
                    ),
                }
                (self.cluster, self.revision) = (cluster, revision);
                for step in self.roster.list(items, revision) {
                    self.follow(step).await?;
                }
                self.start.listed();
                self.finish_start().await
            }
            Update::Changed(changes) => {
                for change in changes {
                    self.revision = self.revision.max(change.revision());
                    if let Some(step) = self.roster.apply(&change) {
                        self.follow(step).await?;
                    }
                }
                Ok(())
            }
        }
    }

    async fn follow(&mut self, step: RosterChange) -> Result<(), NobodyListens> {
        match step {
            RosterChange::Registered(node) => self.register(node).await,
            RosterChange::Gone(departure) => self.depart(departure).await,
            RosterChange::Rejected(key, reason) => {
                self.metrics.registry.rejected.inc();
                tracing::warn!(key, reason, "this key in etcd means nothing: what was known of it stays");
                Ok(())
            }
        }
    }

    async fn register(&mut self, node: Registered) -> Result<(), NobodyListens> {
        let Registered { key, role, id, record, unknown } = node;
        if !unknown.is_empty() {
            let unknown = unknown.join(", ");
            tracing::warn!(key, unknown, "fields of this record are not known here and count for nothing");
        }
        self.departing.remove(&key);
        if let Ok(address) = record.address.parse() {
            self.names.forget(&key);
            return self.announce(key, record.address.clone(), record.spec(role, id, address)).await;
        }
        // A container that returns under its name may have another address.
        self.names.want(&key, &record.address);
        match self.announced.get(&key) {
            Some(known) if known.address == record.address => {
                let spec = record.spec(role, id, known.spec.address);
                self.announce(key, record.address, spec).await
            }
            // Until the name resolves, the node keeps its previous address, if it had one.
            _ => Ok(()),
        }
    }

    async fn found(&mut self, found: FoundAddresses) -> Result<(), NobodyListens> {
        let FoundAddresses { key, name, addresses } = found;
        let before = self.announced.get(&key).filter(|known| known.address == name).map(|known| known.spec.address);
        let stays = before.filter(|before| addresses.contains(before));
        let address = stays.or_else(|| addresses.first().copied());
        let record = self.roster.record(&key).filter(|record| record.address == name);
        if let (Some(address), Some(record), Ok((role, id))) = (address, record, node_key(&key)) {
            if let Some(before) = before.filter(|before| *before != address) {
                tracing::info!(%role, node = %id, name, %before, %address, "node has another address");
            }
            let spec = record.spec(role, id, address);
            self.announce(key, name, spec).await?;
        }
        self.finish_start().await
    }

    async fn announce(&mut self, key: String, address: String, spec: NodeSpec) -> Result<(), NobodyListens> {
        let before = self.announced.insert(key, Announced { address, spec: spec.clone() });
        if before.is_some_and(|before| before.spec == spec) {
            return Ok(());
        }
        self.changed = true;
        self.tell(Event::Joined(spec)).await
    }

    async fn depart(&mut self, departure: Departure) -> Result<(), NobodyListens> {
        self.names.forget(&departure.key);
        if self.announced.remove(&departure.key).is_none() {
            return Ok(());
        }
        if departure.drained || departure.lease.is_none() {
            return self.gone(departure, Manner::Deleted).await;
        }
        self.next_question += 1;
        let (number, key) = (self.next_question, departure.key.clone());
        match self.questions.try_send((number, departure)) {
            Ok(()) => {
                self.departing.insert(key, number);
                Ok(())
            }
            Err(
                mpsc::error::TrySendError::Full((_, departure)) | mpsc::error::TrySendError::Closed((_, departure)),
            ) => self.gone(departure, Manner::Expired).await,
        }
    }

    async fn answered(&mut self, number: u64, departure: Departure, manner: Manner) -> Result<(), NobodyListens> {
        if self.departing.get(&departure.key) != Some(&number) {
            return Ok(());
        }
        self.departing.remove(&departure.key);
        self.gone(departure, manner).await
    }

    async fn gone(&mut self, departure: Departure, manner: Manner) -> Result<(), NobodyListens> {
        let Departure { key, role, id, .. } = departure;
        tracing::debug!(key, ?manner, "a node is not registered any more");
        self.tell(match manner {
            Manner::Deleted => Event::Left(NodeSource::Etcd, role, id),
            Manner::Expired => Event::Vanished(NodeSource::Etcd, role, id),
        })
        .await
    }

    async fn tell(&self, event: Event) -> Result<(), NobodyListens> {
        self.events.send(event).await.map_err(|_| NobodyListens)
    }

    fn saved(&self) -> SavedFleet {
        let nodes = self.roster.nodes().filter_map(|(key, lease, record)| {
            let spec = self.announced.get(key)?.spec.clone();
            Some(SavedNode { key: key.to_owned(), lease: lease.map_or(0, LeaseId::get), record: record.clone(), spec })
        });
        SavedFleet::new(self.cluster, self.revision, nodes.collect())
    }
}
