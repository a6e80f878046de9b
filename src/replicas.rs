//! Several clearcoats before one fleet.
//!
//! Each replica is complete: it follows the shared journal or has its own, delivers to every Varnish itself, and trusts only
//! acknowledgements that it has received itself. Only the promise is shared: after a purge is answered, no reader behind
//! *any* replica sees the old page. So the replica that accepts a purge sends it to the others directly, and its answer
//! waits for them as it waits for a Varnish. Another replica confirms a purge once it is durable there, its guard knows it
//! and its fence has risen to it, so that it, too, avoids nodes that do not apply purges.
//!
//! **Like a delivery.** The progress of another replica is a position, and one task for each brings it from there to the
//! head ([`peer`]). A replica that lets a purge time out is *late*, and later purges are answered without it until it has
//! confirmed everything. Missing confirmations are counted (`clearcoat_replica_unconfirmed_total`).
//!
//! **Confirmations are compared** ([`agreement`]). If one replica has not reached a node, the node may get an old page
//! through that replica's origin after the bans of the others. So the others deliver the purge once more, and the answer
//! names the replica and the node. If such a page is still in flight, they wait for its arrival ([`under_way`]).
//!
//! **A node may refuse a purge at one replica only.** The accepting replica learns this with the confirmation and answers
//! 400; the other replicas learn the answer with its next message. If no answer is reported, the purge counts as done
//! ([`crate::delivery`]).
//!
//! **Seals.** Each replica numbers purges in its own journal and judges answers by that. So a seal has a stamp for each
//! replica, from what they say of themselves in their messages; and tags of blocks are known to all before the block passes
//! ([`names`]).
//!
//! **What operators say of nodes** is in etcd where there is one; otherwise replicas tell each other (`peer/overrides.rs`).
//!
//! **Finding replicas.** With etcd, each replica has a key with a lease, `replicas/<id>` ([`registered`]). A replica whose
//! key is gone still receives purges as long as it answers: it may have lost only etcd, and still serve readers. Without
//! etcd, the configuration lists the addresses ([`neighbours`]). Two replicas with one name are an error that both report
//! ([`twin`]).
//!
//! **Purges are not forwarded.** Each replica must reach every other one: if A reaches B, B reaches C, and A does not reach
//! C, the answers of A name C, and A sends to C as soon as it can. Forwarding would not help, because the answer must wait
//! for C itself, and it would add loops that nobody sees.

mod agreement;
mod call;
mod known_replicas;
mod marks;
mod message;
mod names;
mod neighbours;
mod peer;
mod purges_elsewhere;
mod reception;
mod record;
mod registered;
mod telling;
mod twin;
mod under_way;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::awaited::Progress;
use crate::config::{JournalKind, PeerAddress, Token};
use crate::delivery::Deliveries;
use crate::etcd::{RegistrationStatus, SharedEtcd};
use crate::fleet::NodeId;
use crate::journal::{Position, Shared};
use crate::registry::overrides::OverrideStore;
use crate::telemetry::Metrics;
use crate::telemetry::traces::Tracer;
use marks::Marks;
use message::WITHOUT_BLOCKS;
use names::SharedBlocks;
use neighbours::Neighbours;
use peer::Peer;
use twin::Twins;

pub use agreement::PeerAnswers;
pub use message::{Confirmation, Introduction, Message, PeerPosition, PurgeTrace, RedeliveryRequest, RefusedPurge};
pub use names::GivenNames;
pub use purges_elsewhere::{ReplicaReport, SilentReplica};
pub use reception::Received;
pub use record::{Record, own_address, own_id};

/// The path for messages between replicas, on the purge listener.
pub const PATH: &str = "/.clearcoat/replica";

/// The path of the purged names that a replica knows, there too.
pub const NAMES: &str = "/.clearcoat/names";

/// The path of the purges that were sent to a replica, there too.
pub const PURGES: &str = "/.clearcoat/purges";

/// The status for a message to an earlier process at this address (RFC 9110 section 15.5.20).
pub const MISDIRECTED: u16 = 421;

/// The maximum delay of the shutdown until the others know of it.
const ANNOUNCE: Duration = Duration::from_secs(1);

/// The maximum number of known replicas for an introduction to be accepted. A fleet has two or three.
const MOST: usize = 32;

/// The prefix of the names of purges that replace what a replica has missed.
const GAP: &str = "gap-";

/// The dependencies of a replica.
pub struct ReplicaContext {
    /// How the other replicas are found.
    pub found_by: FoundBy,
    /// The journal that the replicas share, or whose purges they exchange; `None` for a single replica.
    pub journal: Option<Arc<dyn Shared>>,
    /// The deliveries to the Varnish nodes.
    pub deliveries: Arc<Deliveries>,
    /// What operators say of nodes, if replicas tell each other: there is no etcd, and operators may order anything.
    pub overrides: Option<Arc<OverrideStore>>,
    /// The maximum time that a purge waits.
    pub ack_timeout: Duration,
    /// The largest request that the others accept; all replicas have one configuration.
    pub max_request: usize,
    /// The token that the others require; all replicas have one configuration, and a reload may change it.
    pub token: ArcSwapOption<Token>,
    /// Makes spans of purges that others tell of, if there are traces.
    pub tracer: Option<Arc<Tracer>>,
    /// Counts confirmations.
    pub metrics: Arc<Metrics>,
    /// The file with data for the next start: the other replicas, or their progress. `None` if there is no such data.
    pub memory: Option<PathBuf>,
}

/// How the other replicas are found.
pub enum FoundBy {
    /// By their keys in etcd.
    Etcd(SharedEtcd),
    /// At these addresses.
    Addresses(Vec<PeerAddress>),
}

/// Whether any cache asks for our pages.
type FoundByCaches = dyn Fn() -> bool + Send + Sync;

/// This replica, and its knowledge of the others.
pub struct Replicas {
    context: ReplicaContext,
    id: NodeId,
    own: Record,
    started: Instant,
    /// Whether caches find us; `None` if our origin is not open, or we are about to end.
    serves: Mutex<Option<Box<FoundByCaches>>>,
    /// It was seen once who is there: before, a purge that is accepted may be told to nobody.
    has_met: AtomicBool,
    /// This process has created our journal.
    fresh: bool,
    peers: Mutex<BTreeMap<NodeId, Arc<Peer>>>,
    neighbours: Neighbours,
    marks: Mutex<Marks>,
    twins: Twins,
    /// Notified when a peer has confirmed something, came or went.
    progress: Progress,
    /// Notified when a replica has come or gone, to end pauses between attempts.
    ring: watch::Sender<()>,
    /// Our record in etcd; `None` deletes the key.
    record: watch::Sender<Option<Vec<u8>>>,
    standing: watch::Receiver<RegistrationStatus>,
    /// Replicas that have introduced themselves and are unknown.
    strangers: mpsc::Sender<(NodeId, Record)>,
    /// Whether all replicas know the tags of the same blocks.
    blocks: SharedBlocks,
}

/// A replica in the admin API.
#[derive(Debug, Serialize)]
pub struct View {
    /// Its name.
    pub id: NodeId,
    /// The address of its purge listener.
    pub address: String,
    /// The kind of its journal.
    pub journal: String,
    /// It is this replica.
    #[serde(rename = "self", skip_serializing_if = "std::ops::Not::not")]
    pub is_self: bool,
    /// It has confirmed every purge that it was sent.
    pub confirmed: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Arc<str>>,
}

impl Replicas {
    /// Creates this replica, and starts tasks in `tasks` that announce it and find the others.
    pub fn start(context: ReplicaContext, id: NodeId, mut own: Record, tasks: &mut JoinSet<()>) -> Arc<Self> {
        let journal = context.journal.as_deref();
        let head = journal.map_or(0, |journal| journal.head());
        let is_anew = journal.is_some_and(|own| own.anew().is_some());
        let fresh = is_anew || journal.is_none_or(|own| !own.has_history());
        let by_address = matches!(context.found_by, FoundBy::Addresses(_));
        let marks = Marks::open(context.memory.clone().filter(|_| by_address), head, is_anew);
        let blocks = SharedBlocks::default();
        if by_address {
            own.journal_id = Some(marks.journal().to_owned());
            blocks.known_before.lock().clone_from(marks.known());
        }
        let (record, recorded) = watch::channel(Some(own.encode()));
        let (standing_sender, standing) = watch::channel(RegistrationStatus::default());
        let (strangers, introduced) = mpsc::channel(16);
        let this = Arc::new(Replicas {
            context,
            id,
            own,
            started: Instant::now(),
            serves: Mutex::default(),
            // By address, who was not met is known as that, and named in the answer.
            has_met: AtomicBool::new(by_address),
            fresh,
            peers: Mutex::default(),
            neighbours: Neighbours::default(),
            marks: Mutex::new(marks),
            twins: Twins::default(),
            progress: Progress::default(),
            ring: watch::channel(()).0,
            record,
            standing,
            strangers,
            blocks,
        });
        match &this.context.found_by {
            FoundBy::Etcd(etcd) => {
                registered::start(&this, etcd, recorded, standing_sender, introduced, tasks);
            }
            FoundBy::Addresses(addresses) => neighbours::start(&this, addresses.clone(), introduced, tasks),
        }
        tasks.spawn(twin::watch(Arc::clone(&this)));
        tasks.spawn(Arc::clone(&this).keep_names_reviewed());
        this.count();
        this
    }

    /// Returns when the others know of this replica and it has received what it missed, so that it misses no later purge.
    /// Unreachable replicas are waited for briefly.
    pub async fn announced(&self) {
        match self.context.found_by {
            FoundBy::Etcd(_) => self.registered().await,
            FoundBy::Addresses(_) => self.caught_up().await,
        }
        self.names_fetched().await;
    }

    /// Returns when it was seen once who is there, at most after this time. A purge is to be accepted after that: a replica that is met
    /// later counts as one that has read the shared journal until then.
    pub async fn until_met(&self, patience: Duration) {
        let has_met = || self.has_met.load(Ordering::SeqCst);
        if !has_met() {
            // If etcd does not answer, nobody can tell.
            _ = tokio::time::timeout(patience, self.progress.until(has_met)).await;
        }
    }

    /// Messages to the others carry this token from now on.
    pub fn set_token(&self, token: Option<Token>) {
        self.context.token.store(token.map(Arc::new));
    }

    /// Says to the others from now on, when they ask, that caches can do without them: our origin is open and stays so, and
    /// `is_found` by caches. One that no cache knows of replaces nobody.
    pub fn begin_serving(&self, is_found: impl Fn() -> bool + Send + Sync + 'static) {
        *self.serves.lock() = Some(Box::new(is_found));
    }

    /// Says so no more.
    pub fn end_serving(&self) {
        *self.serves.lock() = None;
    }

    fn serves(&self) -> bool {
        self.serves.lock().as_ref().is_some_and(|is_found| is_found())
    }

    /// Whether caches ask another replica as well that is not about to end: asks all of them. Who does not answer soon counts as none.
    pub async fn another_stays(self: &Arc<Self>) -> bool {
        let mut asked = JoinSet::new();
        for peer in self.sharing() {
            let this = Arc::clone(self);
            asked.spawn(
                async move { peer.greet(&this).await.is_ok_and(|said| said.from.is_some_and(|from| from.serves)) },
            );
        }
        let any = async {
            while let Some(serves) = asked.join_next().await {
                if serves.is_ok_and(|serves| serves) {
                    return true;
                }
            }
            false
        };
        tokio::time::timeout(ANNOUNCE, any).await.unwrap_or(false)
    }

    /// Announces the shutdown, so that purges no longer wait for this replica.
    pub async fn withdraw(self: &Arc<Self>) {
        self.record.send_replace(None);
        let mut standing = self.standing.clone();
        let peers: Vec<Arc<Peer>> = self.peers.lock().values().cloned().collect();
        let mut goodbyes = JoinSet::new();
        for peer in peers {
            let this = Arc::clone(self);
            // A replica that cannot be reached will notice by itself.
            goodbyes.spawn(async move { peer.send_farewell(&this).await.is_ok() });
        }
        // If etcd is away, the lease expires.
        let said = async { tokio::join!(standing.wait_for(|standing| !standing.registered), goodbyes.join_all()) };
        _ = tokio::time::timeout(ANNOUNCE, said).await;
    }

    /// The number of purges that are not in etcd yet, if the journal is there.
    pub fn spooled(&self) -> Option<usize> {
        self.context.journal.as_ref().and_then(|journal| journal.spooled())
    }

    /// Why this replica receives no purges from others: another one has its name.
    pub fn superseded(&self) -> Option<String> {
        self.twins.current().filter(|twin| !twin.ours).map(|twin| self.same_name(&twin.address))
    }

    /// All known replicas, this one first.
    pub fn view(&self) -> Vec<View> {
        let twin = self.twins.current();
        let problem = match twin {
            Some(twin) => Some(self.same_name(&twin.address).into()),
            None => self.standing.borrow().problem.as_deref().map(Arc::from),
        };
        let own = View {
            id: self.id.clone(),
            address: self.own.address.clone(),
            journal: self.own.journal.clone(),
            is_self: true,
            confirmed: true,
            problem,
        };
        let peers: Vec<Arc<Peer>> = self.peers.lock().values().cloned().collect();
        let others = peers.iter().map(|peer| View {
            id: peer.id.clone(),
            address: peer.record.address.clone(),
            journal: peer.record.journal.clone(),
            is_self: false,
            confirmed: self.shares_with(peer) && !peer.is_late(),
            problem: if self.shares_with(peer) { self.problem_of(peer) } else { Some(NOT_SHARED.into()) },
        });
        let unmet = self.neighbours.view(|id| self.peers.lock().contains_key(id));
        std::iter::once(own).chain(others).chain(unmet).collect()
    }

    /// How many of the replicas that share our purges and confirm them come before this one, by their names.
    pub fn rank(&self) -> u32 {
        let before = self.sharing().into_iter().filter(|peer| !peer.is_late() && peer.id < self.id).count();
        u32::try_from(before).unwrap_or(u32::MAX)
    }

    fn problem_of(&self, peer: &Peer) -> Option<Arc<str>> {
        peer.problem().or_else(|| self.does_not_seal(peer).then(|| NO_SEALS.into()))
    }

    /// The addresses of replicas that may exist and cannot be reached.
    fn unmet(&self) -> Vec<NodeId> {
        self.neighbours.unmet(|id| self.peers.lock().contains_key(id))
    }

    /// A message without content.
    fn hello(&self, patience: Duration) -> Message {
        Message {
            format: WITHOUT_BLOCKS,
            from: self.id.clone(),
            record: Some(self.own.clone()),
            fresh: self.fresh,
            to: None,
            wait_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
            purges: Vec::new(),
            again: Vec::new(),
            asks_about: Vec::new(),
            reached: self.reached(),
            unsealable: Vec::new(),
            unsealed: Vec::new(),
            done: Vec::new(),
            refused: Some(Vec::new()),
            overrides: None,
            seen_caches: None,
            traces: Vec::new(),
        }
    }

    /// The replicas that receive our purges and confirm them.
    fn sharing(&self) -> Vec<Arc<Peer>> {
        let peers = self.peers.lock();
        peers.values().filter(|peer| self.shares_with(peer)).cloned().collect()
    }

    fn shares_with(&self, peer: &Peer) -> bool {
        self.context.journal.is_some() && self.goes_with(&peer.record)
    }

    /// Whether purges can be exchanged with this replica: all share one journal, or each has its own.
    fn goes_with(&self, record: &Record) -> bool {
        (record.journal == JournalKind::Etcd.as_str()) == self.has_journal_in_common()
    }

    /// Whether the others receive our purges through the journal.
    fn has_journal_in_common(&self) -> bool {
        matches!(self.context.found_by, FoundBy::Etcd(_))
    }

    /// Whether the others send purges to us rather than to this other process with our name. With etcd, the key decides.
    /// Otherwise all that see both must decide alike.
    fn holds_name_against(&self, other: &Record) -> bool {
        self.has_journal_in_common() || self.own.boot > other.boot
    }

    /// The problem of another process with our name.
    fn same_name(&self, address: &str) -> String {
        format!(
            "replica.id \"{}\" is also used by {address}, and this is {}: give each replica its own; until then others \
             tell only one of them of purges",
            self.id, self.own.address
        )
    }

    /// Removes a peer that has ended. Its task returns after this.
    fn remove_peer(&self, peer: &Arc<Peer>) {
        self.keep_mark(peer);
        let mut peers = self.peers.lock();
        if peers.get(&peer.id).is_some_and(|known| Arc::ptr_eq(known, peer)) {
            peers.remove(&peer.id);
        }
        drop(peers);
        tracing::info!(replica = %peer.id, "a replica is gone");
        peer.mark_gone();
        self.review_names();
        self.count();
        self.progress.notify();
    }

    fn woken(&self) -> watch::Receiver<()> {
        self.ring.subscribe()
    }

    fn count(&self) {
        let others = i64::try_from(self.peers.lock().len()).unwrap_or(i64::MAX);
        self.context.metrics.journal.replicas.set(others + 1);
    }
}

/// The name of the purge of everything that replaces what one replica has missed of another.
fn gap_name(sender: &str, receiver: &str, head: Position) -> String {
    format!("{GAP}{sender}-{receiver}-{head:x}")
}

/// The problem of a replica beside which no purge is sealed.
const NO_SEALS: &str =
    "it does not seal answers (an older version, edge.seal or purge.wait_for): purges wait for every Varnish";

/// The problem of replicas that do not share a journal.
const NOT_SHARED: &str = "replicas of one fleet have no journal in common: a purge that one of them takes is not known to \
                          the other, which may serve the old page; give all of them journal.kind = \"etcd\", or name them \
                          to each other (replica.peers)";
