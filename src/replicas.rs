//! Several clearcoats before one fleet.
//!
//! Each is whole: it follows the shared journal, tells every Varnish itself, and trusts only what it has seen
//! acknowledged itself. What is left to do together is the promise: after a purge is answered, no reader behind *any* of
//! them sees the old page. So who accepts a purge tells the others directly, and its answer waits for them as it waits
//! for a Varnish: another replica confirms when its guard knows the purge and its own fence has risen to it, so that a
//! node that does not take purges is avoided there, too.
//!
//! **The same shape as a delivery.** What another one was told of is a position, and one task each brings it from there
//! to the head ([`peer`]); whoever lets a purge wait in vain is *late*, and the next ones are answered without it, until
//! it has confirmed everything. A replica that nobody can reach learns of purges by the journal all the same; that it
//! has not confirmed is counted (`clearcoat_replica_unconfirmed_total`).
//!
//! **Who is there** is known by `replicas/<id>`, a key with a lease for each; who was there and is not registered any more
//! is told as long as it answers, for it may only have lost etcd, and serves readers ([`peer`]). The key also says what
//! journal its replica has: where they are not one, nobody can promise anything for the others, and that is said aloud.

mod memory;
mod peer;
mod record;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::config::{JournalKind, Token, is_host_port};
use crate::delivery::{Acknowledged, Deliveries};
use crate::etcd::follow::{Change, Item, Link, Update, follow};
use crate::etcd::{Registration, SharedEtcd, Standing};
use crate::fleet::NodeId;
use crate::journal::{Etcd as SharedJournal, Position, Told, WriteError};
use crate::telemetry::Metrics;
use memory::Memory;
use peer::Peer;

pub use record::{Record, own_address, own_id};

/// Where one replica tells another one of purges, on its purge listener.
pub const PATH: &str = "/.clearcoat/replica";

/// The keys of the replicas.
const REPLICAS: &str = "replicas/";

/// How long etcd keeps the key of a replica that is gone.
const TTL: Duration = Duration::from_secs(10);

/// How long the start waits until the others can know of us, and the end until they know that we are gone.
const ANNOUNCE: Duration = Duration::from_secs(1);

/// From when our key is there until the others have seen it, which they do within a round trip.
const SEEN: Duration = Duration::from_millis(200);

/// So many others may be known when one introduces itself. A fleet has two or three.
const MOST: usize = 32;

/// What a replica works with.
pub struct Context {
    /// Where the others are found.
    pub etcd: SharedEtcd,
    /// The journal that all share, where this is so.
    pub journal: Option<Arc<SharedJournal>>,
    /// Who acknowledges.
    pub deliveries: Arc<Deliveries>,
    /// How long a purge waits.
    pub ack_timeout: Duration,
    /// The largest request that the others take, as they have one configuration.
    pub max_request: usize,
    /// What the others want to see, as they have one configuration.
    pub token: Option<Token>,
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
    /// Where the others are written down, for a start without etcd. `None` where they need not be told of anything.
    pub memory: Option<PathBuf>,
}

/// This replica, and what it knows of the others.
pub struct Replicas {
    context: Context,
    id: NodeId,
    own: Record,
    peers: Mutex<BTreeMap<NodeId, Arc<Peer>>>,
    /// Rings when a peer has confirmed something, came or went.
    progress: watch::Sender<()>,
    /// `None` takes our key away.
    record: watch::Sender<Option<Vec<u8>>>,
    standing: watch::Receiver<Standing>,
    /// Who has told of itself, and is not known by etcd.
    strangers: mpsc::Sender<(NodeId, Record)>,
}

/// What is told to another replica: all purges since the last time.
#[derive(Debug, Serialize, Deserialize)]
pub struct Message {
    /// Who tells.
    pub from: NodeId,
    /// What it says of itself, for one that etcd does not name.
    #[serde(default)]
    pub record: Option<Record>,
    /// How long the answer may take, in milliseconds.
    pub wait_ms: u64,
    /// The purges.
    pub purges: Vec<Told>,
}

/// A replica as others see it.
#[derive(Debug, Serialize)]
pub struct View {
    /// Its name.
    pub id: NodeId,
    /// Where its purge listener is.
    pub address: String,
    /// What journal it has.
    pub journal: String,
    /// It is this one.
    #[serde(rename = "self", skip_serializing_if = "std::ops::Not::not")]
    pub is_self: bool,
    /// It has confirmed everything that it was told.
    pub confirmed: bool,
    /// Why not; empty where it has.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub problem: String,
}

impl Replicas {
    /// This replica under this name. Starts to announce it and to look for others, in tasks of this set.
    pub fn start(context: Context, id: NodeId, own: Record, tasks: &mut JoinSet<()>) -> Arc<Self> {
        let (record, recorded) = watch::channel(Some(own.encode()));
        let (standing_sender, standing) = watch::channel(Standing::default());
        let key = context.etcd.key(&format!("{REPLICAS}{id}"));
        let farewell = Record { leaving: true, ..own.clone() }.encode();
        let registration = Registration::new(Arc::clone(&context.etcd), key, TTL).with_farewell(farewell);
        tasks.spawn(registration.run(recorded, standing_sender));
        let (updates_sender, updates) = mpsc::channel(16);
        tasks.spawn(follow(
            Arc::clone(&context.etcd),
            context.etcd.key(REPLICAS),
            Link::new("replicas"),
            updates_sender,
        ));
        let (peers, progress) = (Mutex::default(), watch::channel(()).0);
        let (strangers, introduced) = mpsc::channel(16);
        let this = Arc::new(Replicas { context, id, own, peers, progress, record, standing, strangers });
        tasks.spawn(Arc::clone(&this).meet(updates, introduced));
        this
    }

    /// Returns when the others know of this one: whatever is accepted from then on, it is told of. Where etcd cannot say
    /// so, those who knew us before have had the time to find out that we are there again, and to tell what we missed.
    pub async fn announced(&self) {
        let mut standing = self.standing.clone();
        let announced = standing.wait_for(|standing| standing.registered);
        let rest = match tokio::time::timeout(ANNOUNCE, announced).await {
            Ok(_) => SEEN,
            Err(_) => peer::LONGEST_PAUSE,
        };
        tokio::time::sleep(rest).await;
    }

    /// Takes our key away, so that nobody waits for us any more.
    pub async fn withdraw(&self) {
        self.record.send_replace(None);
        let mut standing = self.standing.clone();
        // Where etcd is away, the lease does it.
        _ = tokio::time::timeout(ANNOUNCE, standing.wait_for(|standing| !standing.registered)).await;
    }

    /// Waits until every replica that could be waited for has confirmed this purge, at most for `timeout`. Gives those
    /// that have not.
    pub async fn confirmed(&self, position: Position, timeout: Duration) -> Vec<NodeId> {
        let awaited: Vec<Arc<Peer>> = self.sharing().into_iter().filter(|peer| !peer.is_late()).collect();
        let all_have_it = async {
            let mut progress = self.progress.subscribe();
            while awaited.iter().any(|peer| !peer.has(position) && !peer.is_late() && !peer.is_gone()) {
                if progress.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(timeout, all_have_it).await.is_err() {
            awaited
                .iter()
                .filter(|peer| !peer.has(position))
                .for_each(|peer| peer.is_late_now("it has not confirmed a purge in time"));
            // Those who wait for the same one need not.
            self.progress.send_replace(());
        }
        let unconfirmed: Vec<NodeId> =
            self.sharing().iter().filter(|peer| !peer.has(position)).map(|peer| peer.id.clone()).collect();
        self.context.metrics.journal.unconfirmed.inc_by(unconfirmed.len() as u64);
        unconfirmed
    }

    /// Takes in what another replica tells of, and waits until it holds here: every Varnish has it, or is avoided.
    ///
    /// # Errors
    /// [`WriteError`]: it could not be taken in, and nothing is confirmed. `None`: our journal is not the other one's.
    pub async fn receive(&self, message: Message) -> Option<Result<Acknowledged, WriteError>> {
        let journal = self.context.journal.as_ref()?;
        let patience = Duration::from_millis(message.wait_ms).min(self.context.ack_timeout);
        if let Some(record) = message.record.filter(|_| !self.peers().contains_key(&message.from)) {
            // Whoever finds no place is told of by etcd, or tells again.
            _ = self.strangers.try_send((message.from.clone(), record));
        }
        if message.purges.is_empty() {
            return Some(Ok(Acknowledged::default()));
        }
        let position = match journal.admit(message.purges).await {
            Ok(position) => position,
            Err(error) => return Some(Err(error)),
        };
        tracing::debug!(from = %message.from, position, "told of purges");
        Some(Ok(self.context.deliveries.acknowledge(position, None, patience).await))
    }

    /// How many purges are not in etcd yet, where the journal is there.
    pub fn spooled(&self) -> Option<usize> {
        self.context.journal.as_ref().map(|journal| journal.spooled())
    }

    /// All replicas that are known, this one first.
    pub fn view(&self) -> Vec<View> {
        let problem = self.standing.borrow().problem.clone();
        let own = View {
            id: self.id.clone(),
            address: self.own.address.clone(),
            journal: self.own.journal.clone(),
            is_self: true,
            confirmed: true,
            problem,
        };
        let peers = self.peers();
        let others = peers.values().map(|peer| View {
            id: peer.id.clone(),
            address: peer.record.address.clone(),
            journal: peer.record.journal.clone(),
            is_self: false,
            confirmed: self.shares_with(peer) && !peer.is_late(),
            problem: if self.shares_with(peer) { peer.problem().to_string() } else { NOT_SHARED.to_owned() },
        });
        std::iter::once(own).chain(others).collect()
    }

    /// Those with the same journal.
    fn sharing(&self) -> Vec<Arc<Peer>> {
        let peers = self.peers();
        peers.values().filter(|peer| self.shares_with(peer)).cloned().collect()
    }

    fn shares_with(&self, peer: &Peer) -> bool {
        self.context.journal.is_some() && peer.record.journal == JournalKind::Etcd.as_str()
    }

    /// Takes note of who comes and goes.
    async fn meet(
        self: Arc<Self>,
        mut updates: mpsc::Receiver<Update>,
        mut strangers: mpsc::Receiver<(NodeId, Record)>,
    ) {
        // Ends with this task, and so does every peer's.
        let mut tasks: BTreeMap<NodeId, JoinSet<()>> = BTreeMap::new();
        let mut memory = Memory::open(self.context.memory.clone()).await;
        for (id, record) in memory.known().clone() {
            self.take_in(id, record, false, &mut tasks);
        }
        loop {
            let update = tokio::select! {
                update = updates.recv() => match update {
                    Some(update) => update,
                    None => return,
                },
                Some((id, record)) = strangers.recv() => {
                    self.be_introduced(id, record, &mut tasks);
                    continue;
                }
            };
            match update {
                Update::Listed(listing) => {
                    let listed: Vec<&str> = listing.items.iter().map(|item| item.key.as_str()).collect();
                    let gone: Vec<NodeId> = tasks.keys().filter(|id| !listed.contains(&id.as_str())).cloned().collect();
                    gone.iter().for_each(|id| self.miss(id, &mut tasks));
                    listing.items.iter().for_each(|item| self.greet(item, &mut tasks));
                }
                Update::Changed(changes) => changes.iter().for_each(|change| match change {
                    Change::Put(item) => self.greet(item, &mut tasks),
                    Change::Deleted { key, .. } => {
                        if let Ok(id) = NodeId::try_from(key.as_str()) {
                            self.miss(&id, &mut tasks);
                        }
                    }
                }),
            }
            self.progress.send_replace(());
            let records = self.peers().iter().map(|(id, peer)| (id.clone(), peer.record.clone())).collect();
            memory.keep(records).await;
        }
    }

    /// Somebody who may purge says that it is a replica, and etcd does not know it: it is cut off from there, or we are.
    fn be_introduced(self: &Arc<Self>, id: NodeId, record: Record, tasks: &mut BTreeMap<NodeId, JoinSet<()>>) {
        let (is_known, others) = {
            let peers = self.peers();
            (peers.contains_key(&id), peers.len())
        };
        if is_known {
            return;
        }
        if others >= MOST || !is_host_port(&record.address) {
            tracing::warn!(replica = %id, address = record.address, "this is no replica that could be told of purges");
            return;
        }
        self.take_in(id, record, false, tasks);
    }

    fn greet(self: &Arc<Self>, item: &Item, tasks: &mut BTreeMap<NodeId, JoinSet<()>>) {
        let read = NodeId::try_from(item.key.as_str()).map_err(|error| error.to_string());
        let (id, record) = match read.and_then(|id| Ok((id, Record::decode(&item.value)?))) {
            Ok(read) => read,
            Err(error) => {
                tracing::warn!(key = item.key, error, "this is no replica");
                return;
            }
        };
        self.take_in(id, record, true, tasks);
    }

    /// A replica is there, by its key in etcd or by what else is known.
    fn take_in(self: &Arc<Self>, id: NodeId, record: Record, listed: bool, tasks: &mut BTreeMap<NodeId, JoinSet<()>>) {
        if id == self.id {
            return;
        }
        if let Some(peer) = self.peers().get(&id).filter(|peer| peer.record == record) {
            return peer.is_listed_now(listed);
        }
        self.part(&id, tasks);
        if record.leaving {
            return;
        }
        tracing::info!(replica = %id, address = record.address, journal = record.journal, "another replica is there");
        let told = self.context.journal.as_ref().map_or(0, |journal| journal.in_etcd_up_to());
        let peer = Arc::new(Peer::new(id.clone(), record, told, listed));
        self.peers().insert(id.clone(), Arc::clone(&peer));
        if self.shares_with(&peer) {
            tasks.entry(id).or_default().spawn(peer::run(Arc::clone(self), peer));
        } else {
            tracing::warn!(replica = %id, "{NOT_SHARED}");
            tasks.entry(id).or_default();
        }
        self.count();
    }

    /// Its key is not there any more. Who has a journal in common with us is told until it is known to have ended.
    fn miss(&self, id: &NodeId, tasks: &mut BTreeMap<NodeId, JoinSet<()>>) {
        let peer = self.peers().get(id).cloned();
        match peer.filter(|peer| self.shares_with(peer)) {
            Some(peer) => peer.is_listed_now(false),
            None => self.part(id, tasks),
        }
    }

    /// A peer that has ended. Its task returns after this.
    fn let_go(&self, peer: &Arc<Peer>) {
        let mut peers = self.peers();
        if peers.get(&peer.id).is_some_and(|known| Arc::ptr_eq(known, peer)) {
            peers.remove(&peer.id);
        }
        drop(peers);
        tracing::info!(replica = %peer.id, "a replica is gone");
        peer.is_gone_now();
        self.count();
        self.progress.send_replace(());
    }

    fn part(&self, id: &NodeId, tasks: &mut BTreeMap<NodeId, JoinSet<()>>) {
        tasks.remove(id);
        let gone = self.peers().remove(id);
        if let Some(peer) = gone {
            tracing::info!(replica = %id, "a replica is gone");
            peer.is_gone_now();
            self.count();
        }
    }

    fn peers(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Arc<Peer>>> {
        // The map is whole after every statement, so a panic elsewhere leaves nothing half done.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) {
        let others = i64::try_from(self.peers().len()).unwrap_or(i64::MAX);
        self.context.metrics.journal.replicas.set(others + 1);
    }
}

/// What is wrong with replicas that have journals of their own.
const NOT_SHARED: &str = "replicas of one fleet have no journal in common: a purge that one of them takes is not known to \
                          the other, which may serve the old page; give all of them journal.kind = \"etcd\"";
