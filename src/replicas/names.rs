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

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::message::Message;
use super::peer::{self, Fetched, Peer};
use super::{FoundBy, Replicas};
use crate::delivery::KnownCaches;
use crate::fleet::NodeId;
use crate::seal::{Name, PurgedNames, Stamp};
use crate::telemetry::causes;

/// The pause before a replica that has not met us yet is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(25);

/// How often it is asked so soon, in all.
const AT_ONCE: u32 = 20;

/// What is known of the blocks that passed the replicas.
#[derive(Debug, Default)]
pub(super) struct SharedBlocks {
    /// Our key was seen in etcd.
    pub(super) saw_own_key: AtomicBool,
    /// And so were those of all that came before. Of two that come at once, the later one has found the other's.
    pub(super) are_registered: AtomicBool,
    /// Taken while it is decided whether purges can be sealed.
    reviewing: Mutex<()>,
    /// The replicas that the last process knew, of which this one does not know yet what they passed meanwhile.
    pub(super) known_before: Mutex<BTreeSet<NodeId>>,
}

/// The answer to a replica that asks for the purged names.
pub enum GivenNames {
    /// These.
    Names(Vec<u8>),
    /// It is not told of everything yet.
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

    /// Gives another replica all that is known here, if it is told of everything from now on.
    pub async fn give_names(&self, message: &Message) -> GivenNames {
        let (Some(purged), Some(record)) = (self.purged(), &message.record) else { return GivenNames::Never };
        let peer = self.peers.lock().get(&message.from).cloned();
        let Some(peer) = peer.filter(|peer| peer.record.boot == record.boot && self.shares_with(peer)) else {
            self.note(&message.from, record);
            return GivenNames::NotYet;
        };
        // Before what is known is read: from now on it is told of each block.
        peer.names.set_given();
        let heard = purged.heard().map_or_else(Vec::new, |heard| heard.to_vec());
        let caches = GivenCaches { caches: self.context.deliveries.known_caches(), heard };
        let purged = Arc::clone(purged);
        // A table for a million names has 64 MiB, and probes run on this thread.
        let encoded = tokio::task::spawn_blocking(move || {
            let mut bytes = serde_json::to_vec(&caches)?;
            bytes.push(b'\n');
            bytes.extend(purged.encode()?);
            Ok(bytes)
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
                Ok(bytes) => match self.take_names(peer, bytes).await {
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

    async fn take_names(&self, peer: &Peer, bytes: Bytes) -> Result<(), String> {
        let Some(purged) = self.purged() else { return Ok(()) };
        let read = tokio::task::spawn_blocking(move || {
            let end = memchr::memchr(b'\n', &bytes)?;
            let given: GivenCaches = serde_json::from_slice(&bytes[..end]).ok()?;
            Some((given, PurgedNames::decode(&bytes[end + 1..])?))
        });
        let read = read.await.ok().flatten().ok_or("its purged names cannot be read")?;
        let (GivenCaches { caches, heard }, table) = read;
        let blocks = table.unsealable().all();
        if !blocks.is_empty() && !self.context.deliveries.note_unsealable(blocks).await {
            return Err("the tags of its blocks could not be made durable".to_owned());
        }
        peer.names.set_journal(table.lineage().journal());
        let known = purged.heard();
        let is_known =
            |stamp: &Stamp| known.iter().flat_map(|known| known.iter()).any(|known| known.journal == stamp.journal);
        heard.into_iter().filter(|stamp| !is_known(stamp)).for_each(|stamp| purged.hear(stamp));
        purged.hear(table.stamp());
        purged.inherit(peer.id.as_str().into(), table);
        self.context.deliveries.adopt_known_caches(caches);
        self.blocks.known_before.lock().remove(&peer.id);
        peer.names.set_fetched(Fetched::Yes);
        tracing::debug!(replica = %peer.id, "the purged names of a replica are known");
        Ok(())
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
        let are_alone = || self.are_all_found() && self.unmet().is_empty() && self.twins.current().is_none();
        let knows_blocks = are_known && are_alone();
        self.context.deliveries.set_knows_blocks(knows_blocks);
        if knows_blocks && self.blocks.known_before.lock().is_empty() {
            self.context.deliveries.trust_saved_caches();
        }
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
