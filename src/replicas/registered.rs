//! The replicas that etcd knows: a key with a lease for each.
//!
//! A key that is gone is no replica that is gone ([`super::peer`]): whoever loses etcd alone still serves readers. So it is
//! told as long as it answers, and one that nobody has registered may introduce itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::known_replicas::KnownReplicas;
use super::peer::{self, Peer, Start};
use super::{MOST, NOT_SHARED, Record, Replicas};
use crate::config::is_host_port;
use crate::etcd::follow::{KeyChange, KeyEntry, Update, WatchStatus, follow};
use crate::etcd::{Registration, RegistrationStatus, SharedEtcd};
use crate::fleet::NodeId;

/// The keys of the replicas.
const REPLICAS: &str = "replicas/";

/// How long etcd keeps the key of a replica that is gone.
const TTL: Duration = Duration::from_secs(10);

/// How long the start waits until the others can know of us.
const ANNOUNCE: Duration = Duration::from_secs(1);

/// From when our key is there until the others have seen it, which they do within a round trip.
const SEEN: Duration = Duration::from_millis(200);

/// A task for each peer. Ends with this.
type Tasks = BTreeMap<NodeId, JoinSet<()>>;

/// Starts to announce this replica and to look for others, in tasks of this set.
pub(super) fn start(
    replicas: &Arc<Replicas>,
    etcd: &SharedEtcd,
    recorded: watch::Receiver<Option<Vec<u8>>>,
    standing: watch::Sender<RegistrationStatus>,
    introduced: mpsc::Receiver<(NodeId, Record)>,
    tasks: &mut JoinSet<()>,
) {
    let key = etcd.key(&format!("{REPLICAS}{}", replicas.id));
    let farewell = Record { leaving: true, ..replicas.own.clone() }.encode();
    let registration = Registration::new(Arc::clone(etcd), key, TTL).with_farewell(farewell);
    tasks.spawn(registration.run(recorded, standing));
    let (updates_sender, updates) = mpsc::channel(16);
    tasks.spawn(follow(Arc::clone(etcd), etcd.key(REPLICAS), WatchStatus::new("replicas"), updates_sender));
    tasks.spawn(Arc::clone(replicas).meet(updates, introduced));
}

impl Replicas {
    /// Returns when our key is there and was seen. Where etcd cannot say so, those who knew us before have had the time to
    /// find out that we are there again, and to tell what we missed.
    pub(super) async fn registered(&self) {
        let mut standing = self.standing.clone();
        let announced = standing.wait_for(|standing| standing.registered);
        let rest = match tokio::time::timeout(ANNOUNCE, announced).await {
            Ok(_) => SEEN,
            Err(_) => peer::BACKOFF.max,
        };
        tokio::time::sleep(rest).await;
    }

    /// Takes note of who comes and goes.
    async fn meet(
        self: Arc<Self>,
        mut updates: mpsc::Receiver<Update>,
        mut strangers: mpsc::Receiver<(NodeId, Record)>,
    ) {
        // Ends with this task, and so does every peer's.
        let mut tasks = Tasks::new();
        let mut memory = KnownReplicas::open(self.context.memory.clone()).await;
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
                    if !listed.contains(&self.id.as_str()) {
                        self.twins.set_key(None);
                    }
                    listing.items.iter().for_each(|item| self.greet(item, &mut tasks));
                }
                Update::Changed(changes) => changes.iter().for_each(|change| match change {
                    KeyChange::Put(item) => self.greet(item, &mut tasks),
                    KeyChange::Deleted { key, .. } if key == self.id.as_str() => self.twins.set_key(None),
                    KeyChange::Deleted { key, .. } => {
                        if let Ok(id) = NodeId::try_from(key.as_str()) {
                            self.miss(&id, &mut tasks);
                        }
                    }
                }),
            }
            self.progress.notify();
            let records = self.peers().iter().map(|(id, peer)| (id.clone(), peer.record.clone())).collect();
            memory.keep(records).await;
        }
    }

    /// Somebody who may purge says that it is a replica, and etcd does not know it: it is cut off from there, or we are.
    fn be_introduced(self: &Arc<Self>, id: NodeId, record: Record, tasks: &mut Tasks) {
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

    fn greet(self: &Arc<Self>, item: &KeyEntry, tasks: &mut Tasks) {
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
    fn take_in(self: &Arc<Self>, id: NodeId, record: Record, listed: bool, tasks: &mut Tasks) {
        if id == self.id {
            if listed {
                self.twins.set_key(Some((record.boot == self.own.boot, record)));
            }
            return;
        }
        if let Some(peer) = self.peers().get(&id).filter(|peer| peer.record == record) {
            return peer.set_listed(listed);
        }
        self.part(&id, tasks);
        if record.leaving {
            return;
        }
        tracing::info!(replica = %id, address = record.address, journal = record.journal, "another replica is there");
        // It has read the journal up to there.
        let told = self.context.journal.as_ref().and_then(|journal| journal.in_common_up_to());
        let peer = Arc::new(Peer::new(id.clone(), record, Start::After(told.unwrap_or(0)), listed));
        self.peers().insert(id.clone(), Arc::clone(&peer));
        if self.shares_with(&peer) {
            let this = Arc::clone(self);
            tasks.entry(id).or_default().spawn(async move {
                // It says itself why it has ended.
                _ = peer::run(this, peer).await;
            });
        } else {
            tracing::warn!(replica = %id, "{NOT_SHARED}");
            tasks.entry(id).or_default();
        }
        self.count();
    }

    /// Its key is not there any more. Who has a journal in common with us is told until it is known to have ended.
    fn miss(&self, id: &NodeId, tasks: &mut Tasks) {
        let peer = self.peers().get(id).cloned();
        match peer.filter(|peer| self.shares_with(peer)) {
            Some(peer) => peer.set_listed(false),
            None => self.part(id, tasks),
        }
    }

    fn part(&self, id: &NodeId, tasks: &mut Tasks) {
        tasks.remove(id);
        let gone = self.peers().remove(id);
        if let Some(peer) = gone {
            tracing::info!(replica = %id, "a replica is gone");
            peer.mark_gone();
            self.count();
        }
    }
}
