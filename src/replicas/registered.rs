//! The replicas in etcd, each with a key and a lease.
//!
//! A missing key does not mean that a replica is gone ([`super::peer`]): one that loses only etcd still serves readers. So
//! it is sent purges as long as it answers, and an unregistered replica may introduce itself.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::known_replicas::{KnownReplicas, SavedReplicas};
use super::peer::{self, Peer, Start};
use super::{MOST, NOT_SHARED, Record, Replicas};
use crate::config::is_host_port;
use crate::etcd::follow::{KeyChange, KeyEntry, Update, WatchStatus, follow};
use crate::etcd::{Registration, RegistrationStatus, SharedEtcd};
use crate::fleet::NodeId;

/// The prefix of the keys.
const REPLICAS: &str = "replicas/";

/// How long etcd keeps the key of a replica that is gone.
const TTL: Duration = Duration::from_secs(10);

/// The maximum delay of the start for the registration.
const ANNOUNCE: Duration = Duration::from_secs(1);

/// The time from the registration until the others have seen it, a round trip at most.
const SEEN: Duration = Duration::from_millis(200);

/// How long the others are looked for in etcd before purges are accepted without having seen them there: as long as etcd may be
/// away at a start, while those of before are told.
const UNLISTED: Duration = Duration::from_secs(1);

/// The interval of saving who is there.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// The tasks of each peer, aborted with this value.
type Tasks = BTreeMap<NodeId, JoinSet<()>>;

/// Starts tasks in `tasks` that announce this replica and look for others.
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
    /// Returns when our key is registered and was seen. Without etcd, returns after a time in which the replicas that know
    /// us notice that we are back and send what we missed.
    pub(super) async fn registered(&self) {
        let mut standing = self.standing.clone();
        let announced = standing.wait_for(|standing| standing.registered);
        let rest = match tokio::time::timeout(ANNOUNCE, announced).await {
            Ok(_) => SEEN,
            Err(_) => peer::BACKOFF.max,
        };
        tokio::time::sleep(rest).await;
    }

    /// Follows the replicas that come and go.
    async fn meet(
        self: Arc<Self>,
        mut updates: mpsc::Receiver<Update>,
        mut strangers: mpsc::Receiver<(NodeId, Record)>,
    ) {
        // Aborted with this task.
        let mut tasks = Tasks::new();
        let mut memory = KnownReplicas::open(self.context.memory.clone()).await;
        self.blocks.known_before.lock().extend(memory.saved().known());
        for (id, record) in memory.saved().replicas.clone() {
            self.add_or_update(id, record, false, &mut tasks);
        }
        let mut saves = tokio::time::interval(SAVE_EVERY);
        let mut unlisted = pin!(tokio::time::sleep(UNLISTED));
        loop {
            tokio::select! {
                // Then those of before have to do.
                () = &mut unlisted, if !self.has_met.load(Ordering::SeqCst) => self.met(),
                update = updates.recv() => match update {
                    Some(update) => self.take_update(update, &mut tasks),
                    None => return,
                },
                Some((id, record)) = strangers.recv() => {
                    self.add_introduced(&id, record, &mut tasks);
                    self.record_looked_at(&id);
                }
                // Whose journal it is becomes known later.
                _ = saves.tick() => {}
            }
            // At once after news: a process that is killed, and begins again without etcd, has to find the others.
            let records = self.peers.lock().iter().map(|(id, peer)| (id.clone(), peer.record.clone())).collect();
            memory.keep(SavedReplicas::new(records, self.known_now())).await;
        }
    }

    fn met(&self) {
        self.has_met.store(true, Ordering::SeqCst);
        self.progress.notify();
    }

    fn take_update(self: &Arc<Self>, update: Update, tasks: &mut Tasks) {
        match update {
            Update::Listed(listing) => {
                let listed: Vec<&str> = listing.items.iter().map(|item| item.key.as_str()).collect();
                let gone: Vec<NodeId> = tasks.keys().filter(|id| !listed.contains(&id.as_str())).cloned().collect();
                gone.iter().for_each(|id| self.miss(id, tasks));
                if !listed.contains(&self.id.as_str()) {
                    self.twins.set_key(None);
                }
                listing.items.iter().for_each(|item| self.greet(item, tasks));
                self.met();
            }
            Update::Changed(changes) => changes.iter().for_each(|change| match change {
                KeyChange::Put(item) => self.greet(item, tasks),
                KeyChange::Deleted { key, .. } if key == self.id.as_str() => self.twins.set_key(None),
                KeyChange::Deleted { key, .. } => {
                    if let Ok(id) = NodeId::try_from(key.as_str()) {
                        self.miss(&id, tasks);
                    }
                }
            }),
        }
        self.blocks.are_registered.store(self.blocks.saw_own_key.load(Ordering::SeqCst), Ordering::SeqCst);
        self.progress.notify();
    }

    /// A sender with permission to purge says that it is a replica, or that it knows one, and etcd does not list that: either it
    /// or this process is cut off from etcd.
    fn add_introduced(self: &Arc<Self>, id: &NodeId, record: Record, tasks: &mut Tasks) {
        let (known, others) = {
            let peers = self.peers.lock();
            (peers.get(id).cloned(), peers.len())
        };
        let is_possible = match known {
            Some(known) if !takes_its_place(&record, &known) => return,
            Some(_) => true,
            None => others < MOST,
        };
        if !is_possible || !is_host_port(&record.address) {
            tracing::warn!(replica = %id, address = record.address, "this is no replica that can receive purges");
            return;
        }
        self.add_or_update(id.clone(), record, false, tasks);
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
        self.add_or_update(id, record, true, tasks);
    }

    /// Adds or updates a replica, whether etcd lists it or not.
    fn add_or_update(self: &Arc<Self>, id: NodeId, record: Record, listed: bool, tasks: &mut Tasks) {
        if id == self.id {
            if listed {
                self.blocks.saw_own_key.fetch_or(record.boot == self.own.boot, Ordering::SeqCst);
                self.twins.set_key(Some((record.boot == self.own.boot, record)));
            }
            return;
        }
        if let Some(peer) = self.peers.lock().get(&id).filter(|peer| peer.record == record) {
            return peer.set_listed(listed);
        }
        self.part(&id, tasks);
        if record.leaving {
            return;
        }
        tracing::info!(replica = %id, address = record.address, journal = record.journal, "replica found");
        // It has read the shared journal up to there.
        let in_common = self.context.journal.as_ref().and_then(|journal| journal.in_common_up_to());
        let peer = Arc::new(Peer::new(id.clone(), record, Start::After(in_common.unwrap_or(0)), listed));
        self.peers.lock().insert(id.clone(), Arc::clone(&peer));
        self.review_names();
        if self.shares_with(&peer) {
            let this = Arc::clone(self);
            tasks.entry(id).or_default().spawn(async move {
                // It logs its end itself.
                _ = peer::run(this, peer).await;
            });
        } else {
            tracing::warn!(replica = %id, "{NOT_SHARED}");
            tasks.entry(id).or_default();
        }
        self.count();
    }

    /// Handles a missing key. A replica that shares our journal is sent purges until it is known to have ended.
    fn miss(&self, id: &NodeId, tasks: &mut Tasks) {
        let peer = self.peers.lock().get(id).cloned();
        match peer.filter(|peer| self.shares_with(peer)) {
            Some(peer) => peer.set_listed(false),
            None => self.part(id, tasks),
        }
    }

    fn part(&self, id: &NodeId, tasks: &mut Tasks) {
        tasks.remove(id);
        let gone = self.peers.lock().remove(id);
        if let Some(peer) = gone {
            tracing::info!(replica = %id, "a replica is gone");
            peer.mark_gone();
            self.review_names();
            self.count();
        }
    }
}

/// Whether a process that introduces itself has replaced the known one of its name: it is where that was, and only one can be
/// there. Elsewhere it may be a twin, of which etcd chooses one; if etcd lists neither, the one that answers is there, or the later
/// one.
fn takes_its_place(record: &Record, known: &Peer) -> bool {
    let is_later = || known.is_unlisted() && (known.is_late() || record.started > known.record.started);
    record.boot != known.record.boot && (record.address == known.record.address || is_later())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::JournalKind;

    #[test]
    fn a_process_replaces_the_one_at_its_address_and_no_twin_in_etcd() {
        let record = |address: &str, started| Record { started, ..Record::new(address.to_owned(), JournalKind::Etcd) };
        let id = NodeId::try_from("b").unwrap();
        let known = |listed| Peer::new(id.clone(), record("192.0.2.2:6081", 5), Start::After(0), listed);
        for listed in [true, false] {
            let known = known(listed);
            assert!(!takes_its_place(&known.record.clone(), &known), "it is the same");
            assert!(takes_its_place(&record("192.0.2.2:6081", 4), &known), "its clock was set back");
            assert!(!takes_its_place(&record("192.0.2.3:6081", 4), &known));
            assert_eq!(takes_its_place(&record("192.0.2.3:6081", 6), &known), !listed);
            known.mark_late("it is silent");
            assert_eq!(takes_its_place(&record("192.0.2.3:6081", 4), &known), !listed);
        }
    }
}
