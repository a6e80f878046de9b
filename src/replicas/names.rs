//! What replicas share so that seals hold for all of them.
//!
//! - **Stamps.** Each message says what the sender's journal has reached. A page that is requested after that is heard was
//!   rendered after all of these purges, so the seal may say so; and the sender finds its own journal in the seal.
//! - **Tags of blocks**, which no seal shows. Whoever sees a block tells all others of its tags, and lets the cache store it
//!   only when they have them. So whoever accepts a purge knows whether a cache may have a block with its tags.
//! - **All that each one knows**, once for each process that is met: the table of purged names, by which pages from before are
//!   judged; the tags of blocks; and the caches in which everything is sealed. It is given only to those that are told of
//!   everything later. Until it is known here, a purge is not sealed.
//!
//! A replica that does not seal (an older version, or `edge.seal = false`) may fill a cache with pages without a seal and
//! blocks that nobody was told of. With one of these no purge is sealed, and afterwards each cache must be flushed or restarted.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::task::JoinSet;

use super::message::Message;
use super::peer::{self, Fetched, Peer};
use super::{FoundBy, Record, Replicas};
use crate::delivery::KnownCaches;
use crate::fleet::NodeId;
use crate::seal::{Name, PurgedNames, Stamp};
use crate::telemetry::causes;

/// The pause before a replica that has not met us yet is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(25);

/// How often it is asked so soon, in all.
const AT_ONCE: u32 = 20;

/// The replicas that a process knew, each with the identity of its journal; `None` before that was known.
pub(super) type KnownJournals = BTreeMap<NodeId, Option<u64>>;

/// How many tables are sent or received at a time: each is once more in memory meanwhile. Two, so that one on a slow link does
/// not keep out the rest.
const TABLES_AT_ONCE: usize = 2;

/// What is known of the blocks that passed the replicas.
#[derive(Debug)]
pub(super) struct SharedBlocks {
    /// Our key was seen in etcd.
    pub(super) saw_own_key: AtomicBool,
    /// And so were those of all that came before. Of two that come at once, the later one has found the other's.
    pub(super) are_registered: AtomicBool,
    /// Taken while it is decided whether purges can be sealed.
    pub(super) reviewing: Mutex<()>,
    /// The replicas that the last process knew, of which this one does not know yet what they passed meanwhile.
    pub(super) known_before: Mutex<KnownJournals>,
    /// Replicas that others know, and that are still to be looked at.
    pub(super) told_of: Mutex<BTreeSet<NodeId>>,
    /// Room for tables that come.
    pub(super) receiving: Semaphore,
    /// Room for tables that go.
    sending: Arc<Semaphore>,
}

impl Default for SharedBlocks {
    fn default() -> Self {
        SharedBlocks {
            saw_own_key: AtomicBool::default(),
            are_registered: AtomicBool::default(),
            reviewing: Mutex::default(),
            known_before: Mutex::default(),
            told_of: Mutex::default(),
            receiving: Semaphore::new(TABLES_AT_ONCE),
            sending: Arc::new(Semaphore::new(TABLES_AT_ONCE)),
        }
    }
}

impl SharedBlocks {
    /// Records that this replica, whose journal is this one, gave its names. With another journal it has lost what it knew of the
    /// time before, and is still to be met.
    fn record_given(&self, id: &NodeId, journal: u64) {
        let mut known_before = self.known_before.lock();
        if known_before.get(id).is_some_and(|known| known.is_none_or(|known| known == journal)) {
            known_before.remove(id);
        }
    }
}

/// A table on its way out, with its room.
struct TableInRoom {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for TableInRoom {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The answer to a replica that asks for the purged names.
pub enum GivenNames {
    /// These.
    Names(Bytes),
    /// It has not been met yet, or there is no room for another table.
    NotYet,
    /// They could not be written down.
    Failed(serde_json::Error),
    /// Answers are not sealed here.
    Never,
}

/// The first line of that answer; a table of purged names follows.
#[derive(Serialize, Deserialize)]
struct GivenCaches {
    #[serde(flatten)]
    caches: KnownCaches,
    /// What the others have reached, as that replica heard: pages may have no other stamp of them.
    heard: Vec<Stamp>,
    /// The others: one may have lost etcd, and be in nobody else's list.
    #[serde(default)]
    peers: Vec<(NodeId, Record)>,
}

impl Replicas {
    /// What seals are judged by, if purges can be sealed here.
    fn purged(&self) -> Option<&Arc<PurgedNames>> {
        let journal = self.context.journal.as_ref().filter(|_| self.context.deliveries.has_sealed_purges());
        journal.and_then(|journal| journal.purged())
    }

    /// What our journal has reached.
    pub(super) fn reached(&self) -> Option<Stamp> {
        self.purged().map(|purged| purged.stamp())
    }

    /// Records what the journal of another replica has reached.
    pub(super) fn hear(&self, reached: Option<Stamp>) {
        if let (Some(purged), Some(reached)) = (self.purged(), reached) {
            purged.hear(reached);
        }
    }

    /// Gives another replica all that is known here, if it is known here, and so told of every block from now on.
    pub async fn give_names(&self, message: &Message) -> GivenNames {
        let (Some(purged), Some(record)) = (self.purged(), &message.record) else { return GivenNames::Never };
        let peer = self.peers.lock().get(&message.from).cloned();
        let Some(peer) = peer.filter(|peer| peer.record.boot == record.boot && self.shares_with(peer)) else {
            self.note(&message.from, record);
            return GivenNames::NotYet;
        };
        let Ok(room) = Arc::clone(&self.blocks.sending).try_acquire_owned() else { return GivenNames::NotYet };
        let others = self.sharing().into_iter().filter(|other| other.id != peer.id && !other.is_gone());
        let caches = GivenCaches {
            caches: self.context.deliveries.known_caches(),
            heard: purged.heard().map_or_else(Vec::new, |heard| heard.to_vec()),
            peers: others.map(|other| (other.id.clone(), other.record.clone())).collect(),
        };
        let purged = Arc::clone(purged);
        // A table for a million names has 64 MiB, and probes run on this thread.
        let encoded = tokio::task::spawn_blocking(move || {
            let mut bytes = serde_json::to_vec(&caches)?;
            bytes.push(b'\n');
            purged.encode(&mut bytes)?;
            Ok(Bytes::from_owner(TableInRoom { bytes, _room: room }))
        });
        match encoded.await {
            Ok(Ok(bytes)) => GivenNames::Names(bytes),
            Ok(Err(error)) => GivenNames::Failed(error),
            // It panicked, or the process ends.
            Err(_) => GivenNames::NotYet,
        }
    }

    /// Fetches what another replica knows, once, and never returns.
    pub(super) async fn fetch_names(self: &Arc<Self>, peer: &Peer) -> Infallible {
        let (mut refusals, mut failures) = (0, 0_u32);
        while self.purged().is_some() {
            let failed = match peer.ask_names(self).await {
                Ok(table) => match self.take_names(peer, table).await {
                    Ok(()) => break,
                    Err(problem) => problem,
                },
                Err(error) if error.is_not_now() && refusals < AT_ONCE => {
                    refusals += 1;
                    tokio::time::sleep(ASK_AGAIN).await;
                    continue;
                }
                Err(error) if error.is_never() => {
                    tracing::warn!(
                        replica = %peer.id, error = %causes(&error),
                        "a replica does not seal answers: purges wait for every Varnish"
                    );
                    peer.names.set_fetched(Fetched::Never);
                    break;
                }
                Err(error) => causes(&error).to_string(),
            };
            tracing::debug!(replica = %peer.id, failed, "the purged names of a replica cannot be fetched");
            failures = failures.saturating_add(1);
            tokio::time::sleep(peer::BACKOFF.pause(failures, 0.5 + 0.5 * fastrand::f64())).await;
        }
        self.review_names();
        self.progress.notify();
        std::future::pending().await
    }

    async fn take_names(&self, peer: &Peer, (bytes, room): (Bytes, SemaphorePermit<'_>)) -> Result<(), String> {
        let Some(purged) = self.purged() else { return Ok(()) };
        let read = tokio::task::spawn_blocking(move || {
            let end = memchr::memchr(b'\n', &bytes)?;
            let given: GivenCaches = serde_json::from_slice(&bytes[..end]).ok()?;
            Some((given, PurgedNames::decode(&bytes[end + 1..])?))
        });
        let read = read.await.ok().flatten().ok_or("its purged names cannot be read")?;
        drop(room);
        let (GivenCaches { caches, heard, peers }, table) = read;
        let blocks = table.unsealable().all();
        if !blocks.is_empty() && !self.context.deliveries.note_unsealable(&blocks).await {
            return Err("the tags of its blocks could not be made durable".to_owned());
        }
        peer.names.set_journal(table.lineage().journal());
        let known = purged.heard();
        let is_known =
            |stamp: &Stamp| known.iter().flat_map(|known| known.iter()).any(|known| known.journal == stamp.journal);
        heard.into_iter().filter(|stamp| !is_known(stamp)).for_each(|stamp| purged.hear(stamp));
        purged.hear(table.stamp());
        self.blocks.record_given(&peer.id, table.lineage().journal());
        purged.inherit(peer.id.as_str().into(), table);
        self.context.deliveries.adopt_known_caches(caches);
        // Before those that are known here may count as all.
        for (id, record) in peers {
            self.look_at(id, record).await;
        }
        peer.names.set_fetched(Fetched::Yes);
        tracing::debug!(replica = %peer.id, "the purged names of a replica are known");
        Ok(())
    }

    /// Has a replica looked at that another one knows, unless it is known here, or one that started later in its place.
    async fn look_at(&self, id: NodeId, record: Record) {
        let is_known = |known: &Arc<Peer>| known.record.boot == record.boot || known.record.started >= record.started;
        if id == self.id || self.peers.lock().get(&id).is_some_and(is_known) {
            return;
        }
        self.blocks.told_of.lock().insert(id.clone());
        // Fails at the end of the process.
        _ = self.strangers.send((id, record)).await;
    }

    /// Records that a replica was looked at which had introduced itself, or of which another one had told.
    pub(super) fn record_looked_at(&self, id: &NodeId) {
        if self.blocks.told_of.lock().remove(id) {
            self.progress.notify();
        }
    }

    /// The replicas for the next process, which has to meet them before it believes what is saved of caches: those that are
    /// here. Also those that the last process knew and this one has not met, as long as anything is saved that the last one has
    /// said; and for a while in any case, because what is saved of caches may reach the disk late.
    pub(super) fn known_now(&self) -> KnownJournals {
        let here = self.sharing().into_iter().map(|peer| (peer.id.clone(), peer.names.journal()));
        let mut known: KnownJournals = here.collect();
        if self.started.elapsed() < peer::KEPT || self.context.deliveries.relies_on_last_process() {
            known.extend(self.blocks.known_before.lock().clone());
        }
        known
    }

    /// Reviews, whenever anything changes, whether purges can be sealed.
    pub(super) async fn keep_names_reviewed(self: Arc<Self>) {
        let (mut changes, mut standing) = (self.progress.subscribe(), self.standing.clone());
        loop {
            self.review_names();
            tokio::select! {
                _ = changes.changed() => {}
                // The task that registers us ends with the process.
                Ok(()) = standing.changed() => {}
            }
        }
    }

    /// Decides anew whether purges can be sealed.
    pub(super) fn review_names(&self) {
        let Some(purged) = self.purged() else { return };
        let _reviewing = self.blocks.reviewing.lock();
        let peers = self.sharing();
        self.context.deliveries.set_do_all_seal(peers.iter().all(|peer| peer.names.fetched() != Fetched::Never));
        let are_known = peers.iter().all(|peer| peer.names.fetched() == Fetched::Yes);
        let are_alone = || {
            let are_looked_at = self.blocks.told_of.lock().is_empty();
            are_looked_at && self.are_all_found() && self.unmet().is_empty() && self.twins.current().is_none()
        };
        let knows_blocks = are_known && are_alone();
        self.context.deliveries.set_knows_blocks(knows_blocks);
        if knows_blocks && self.blocks.known_before.lock().is_empty() {
            self.context.deliveries.trust_saved_caches();
            if self.context.journal.as_ref().is_some_and(|journal| journal.has_caught_up()) {
                purged.set_caught_up();
            }
        }
        self.keep_seen_of(&peers);
        let journals: Vec<u64> = peers.iter().filter_map(|peer| peer.names.journal()).collect();
        purged.forget_journals_but(&journals);
    }

    /// Whether purges wait for Varnish because of this replica, although they need not here.
    pub(super) fn does_not_seal(&self, peer: &Peer) -> bool {
        self.purged().is_some() && peer.names.fetched() == Fetched::Never
    }

    /// Whether each replica that was here before us is known.
    fn are_all_found(&self) -> bool {
        match self.context.found_by {
            FoundBy::Addresses(_) => self.neighbours.are_caught_up(),
            FoundBy::Etcd(_) => self.blocks.are_registered.load(Ordering::SeqCst),
        }
    }

    /// Waits briefly until the names of all replicas that answer are known. Until then, pages from before we came count as
    /// stale.
    pub(super) async fn names_fetched(&self) {
        let are_fetched = || {
            let peers = self.sharing();
            peers.iter().all(|peer| peer.names.fetched() != Fetched::NotYet || peer.is_late() || peer.is_gone())
        };
        if self.purged().is_some() {
            _ = tokio::time::timeout(peer::BACKOFF.max, self.progress.until(are_fetched)).await;
            self.review_names();
        }
    }

    /// Tells all other replicas of tags that no seal shows. Returns whether each of those that rely on it has them.
    pub async fn share_unsealable(self: &Arc<Self>, names: &[Name]) -> bool {
        if self.purged().is_none() {
            return true;
        }
        if !self.are_all_found() {
            return false;
        }
        let mut told = JoinSet::new();
        for peer in self.sharing() {
            if peer.is_late() {
                if peer.names.may_rely_on_us() {
                    return false;
                }
                continue;
            }
            let (this, names) = (Arc::clone(self), names.to_vec());
            told.spawn(async move {
                let is_told = peer.tell_unsealable(&this, &names).await.is_ok();
                is_told || !peer.names.may_rely_on_us()
            });
        }
        while let Some(is_told) = told.join_next().await {
            if !is_told.unwrap_or(false) {
                tracing::debug!("a replica could not be told of the tags of a block: it is not stored");
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_was_known_is_met_when_its_names_come_from_its_journal() {
        let id = |id: &str| NodeId::try_from(id).unwrap();
        let blocks = SharedBlocks::default();
        *blocks.known_before.lock() =
            KnownJournals::from([(id("same"), Some(1)), (id("lost"), Some(2)), (id("unknown"), None)]);
        for (id_of, journal) in [("same", 1), ("lost", 9), ("unknown", 3), ("new", 4)] {
            blocks.record_given(&id(id_of), journal);
        }
        assert_eq!(*blocks.known_before.lock(), KnownJournals::from([(id("lost"), Some(2))]));
    }
}
