//! Several clearcoats before one fleet.
//!
//! Each is whole: it follows the shared journal or has one of its own, tells every Varnish itself, and trusts only what it
//! has seen acknowledged itself. What is left to do together is the promise: after a purge is answered, no reader behind
//! *any* of them sees the old page. So who accepts a purge tells the others directly, and its answer waits for them as it
//! waits for a Varnish: another replica confirms when the purge is durable there, its guard knows it and its own fence has
//! risen to it, so that a node that does not take purges is avoided there, too.
//!
//! **The same shape as a delivery.** What another one was told of is a position, and one task each brings it from there
//! to the head ([`peer`]); whoever lets a purge wait in vain is *late*, and the next ones are answered without it, until
//! it has confirmed everything. That it has not confirmed is counted (`clearcoat_replica_unconfirmed_total`).
//!
//! **What they say is compared** ([`agreement`]). A node that one of them has not reached may get an old page through that
//! one's origin after the others' bans; so the others tell it once more, and the answer says who has not reached which node.
//! If such a page is still under way, they wait until it has landed ([`under_way`]).
//!
//! **A node may refuse a purge at one of them only.** Whoever accepted the purge hears of it with the confirmation, and answers
//! 400; the others hear of that with its next message. How a purge was answered that nobody says, they take for done
//! ([`crate::delivery`]).
//!
//! **Who is there.** With etcd, `replicas/<id>`, a key with a lease for each ([`registered`]); who was there and is not
//! registered any more is told as long as it answers, for it may only have lost etcd, and serves readers. Without etcd, the
//! addresses of the configuration ([`neighbours`]). Two of one name are an error that both of them say ([`twin`]).
//!
//! **Nobody tells on what it was told.** Each must reach each other one: where A reaches B, B reaches C and A does not
//! reach C, A's answers name C, and A tells it as soon as it can. Telling on would need no less, as the answer must wait
//! for C itself; and a circle that nobody can see would be there to be broken.

mod agreement;
mod call;
mod known_replicas;
mod marks;
mod message;
mod neighbours;
mod peer;
mod reception;
mod record;
mod registered;
mod twin;
mod under_way;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

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
use crate::telemetry::Metrics;
use marks::Marks;
use message::FORMAT;
use neighbours::Neighbours;
use peer::Peer;
use twin::Twins;

pub use agreement::PeerAnswers;
pub use message::{Confirmation, Introduction, Message, PeerPosition, RedeliveryRequest, RefusedPurge};
pub use reception::Received;
pub use record::{Record, own_address, own_id};

/// Where one replica tells another one of purges, on its purge listener.
pub const PATH: &str = "/.clearcoat/replica";

/// The status for a message that means another process than this (RFC 9110 section 15.5.20).
pub const MISDIRECTED: u16 = 421;

/// How long the end waits until the others know that we are gone.
const ANNOUNCE: Duration = Duration::from_secs(1);

/// So many others may be known when one introduces itself. A fleet has two or three.
const MOST: usize = 32;

/// What the names of purges begin with that stand for what a replica has missed.
const GAP: &str = "gap-";

/// What a replica works with.
pub struct ReplicaContext {
    /// Where the others are found.
    pub found_by: FoundBy,
    /// The journal that all share, or whose purges they tell each other; `None` where neither is so.
    pub journal: Option<Arc<dyn Shared>>,
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
    /// The file for what has to be known at the next start: who the others were, or how far they are. `None` where
    /// nothing has.
    pub memory: Option<PathBuf>,
}

/// Where the other replicas are found.
pub enum FoundBy {
    /// By their keys.
    Etcd(SharedEtcd),
    /// At these addresses.
    Addresses(Vec<PeerAddress>),
}

/// This replica, and what it knows of the others.
pub struct Replicas {
    context: ReplicaContext,
    id: NodeId,
    own: Record,
    /// Our journal was begun by this process.
    fresh: bool,
    peers: Mutex<BTreeMap<NodeId, Arc<Peer>>>,
    neighbours: Neighbours,
    marks: Mutex<Marks>,
    twins: Twins,
    /// Notified when a peer has confirmed something, came or went.
    progress: Progress,
    /// Rings when somebody has come or gone, so that whoever waits to try again need not.
    ring: watch::Sender<()>,
    /// `None` takes our key away.
    record: watch::Sender<Option<Vec<u8>>>,
    standing: watch::Receiver<RegistrationStatus>,
    /// Who has told of itself, and is not known.
    strangers: mpsc::Sender<(NodeId, Record)>,
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
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Arc<str>>,
}

impl Replicas {
    /// This replica under this name. Starts to announce it and to look for others, in tasks of this set.
    pub fn start(context: ReplicaContext, id: NodeId, mut own: Record, tasks: &mut JoinSet<()>) -> Arc<Self> {
        let journal = context.journal.as_deref();
        let head = journal.map_or(0, |journal| journal.head());
        let is_anew = journal.is_some_and(|own| own.anew().is_some());
        let fresh = is_anew || journal.is_none_or(|own| !own.has_history());
        let by_address = matches!(context.found_by, FoundBy::Addresses(_));
        let marks = Marks::open(context.memory.clone().filter(|_| by_address), head, is_anew);
        if by_address {
            own.journal_id = Some(marks.journal().to_owned());
        }
        let (record, recorded) = watch::channel(Some(own.encode()));
        let (standing_sender, standing) = watch::channel(RegistrationStatus::default());
        let (strangers, introduced) = mpsc::channel(16);
        let this = Arc::new(Replicas {
            context,
            id,
            own,
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
        });
        match &this.context.found_by {
            FoundBy::Etcd(etcd) => {
                registered::start(&this, etcd, recorded, standing_sender, introduced, tasks);
            }
            FoundBy::Addresses(addresses) => neighbours::start(&this, addresses.clone(), introduced, tasks),
        }
        tasks.spawn(twin::watch(Arc::clone(&this)));
        this.count();
        this
    }

    /// Returns when the others know of this one, and it knows what it missed: whatever is accepted from then on, it is
    /// told of. Who cannot be reached is waited for a moment.
    pub async fn announced(&self) {
        match self.context.found_by {
            FoundBy::Etcd(_) => self.registered().await,
            FoundBy::Addresses(_) => self.caught_up().await,
        }
    }

    /// Says that this one is about to end, so that nobody waits for it any more.
    pub async fn withdraw(self: &Arc<Self>) {
        self.record.send_replace(None);
        let mut standing = self.standing.clone();
        let peers: Vec<Arc<Peer>> = self.peers().values().cloned().collect();
        let mut goodbyes = JoinSet::new();
        for peer in peers {
            let this = Arc::clone(self);
            // Whoever does not hear it finds out.
            goodbyes.spawn(async move { peer.say_goodbye(&this).await.is_ok() });
        }
        // Where etcd is away, the lease does it.
        let said = async { tokio::join!(standing.wait_for(|standing| !standing.registered), goodbyes.join_all()) };
        _ = tokio::time::timeout(ANNOUNCE, said).await;
    }

    /// How many purges are not in etcd yet, where the journal is there.
    pub fn spooled(&self) -> Option<usize> {
        self.context.journal.as_ref().and_then(|journal| journal.spooled())
    }

    /// Why nobody tells this one of purges, if that is so: another one has its name.
    pub fn superseded(&self) -> Option<String> {
        self.twins.current().filter(|twin| !twin.ours).map(|twin| self.same_name(&twin.address))
    }

    /// All replicas that are known, this one first.
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
        let peers: Vec<Arc<Peer>> = self.peers().values().cloned().collect();
        let others = peers.iter().map(|peer| View {
            id: peer.id.clone(),
            address: peer.record.address.clone(),
            journal: peer.record.journal.clone(),
            is_self: false,
            confirmed: self.shares_with(peer) && !peer.is_late(),
            problem: if self.shares_with(peer) { peer.problem() } else { Some(NOT_SHARED.into()) },
        });
        std::iter::once(own).chain(others).chain(self.unmet_view()).collect()
    }

    fn unmet_view(&self) -> Vec<View> {
        self.neighbours.view(|id| self.peers().contains_key(id))
    }

    /// The addresses of those that may be there and cannot be told.
    fn unmet(&self) -> Vec<NodeId> {
        self.neighbours.unmet(|id| self.peers().contains_key(id))
    }

    /// What is said of this one wherever it speaks.
    fn hello(&self, patience: Duration) -> Message {
        Message {
            format: FORMAT,
            from: self.id.clone(),
            record: Some(self.own.clone()),
            fresh: self.fresh,
            to: None,
            wait_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
            purges: Vec::new(),
            again: Vec::new(),
            asks_about: Vec::new(),
            done: Vec::new(),
            refused: Some(Vec::new()),
        }
    }

    /// Those that are told of our purges, and confirm them.
    fn sharing(&self) -> Vec<Arc<Peer>> {
        let peers = self.peers();
        peers.values().filter(|peer| self.shares_with(peer)).cloned().collect()
    }

    fn shares_with(&self, peer: &Peer) -> bool {
        self.context.journal.is_some() && self.goes_with(&peer.record)
    }

    /// Whether the purges of this one are to be taken in here, and ours there: all have one journal, or each its own.
    fn goes_with(&self, record: &Record) -> bool {
        (record.journal == JournalKind::Etcd.as_str()) == self.has_journal_in_common()
    }

    /// Whether the others find our purges without us.
    fn has_journal_in_common(&self) -> bool {
        matches!(self.context.found_by, FoundBy::Etcd(_))
    }

    /// Of two processes with one name, which of them the others tell of purges; without etcd, whose key says so, it must
    /// be the same for all who see both.
    fn holds_name_against(&self, other: &Record) -> bool {
        self.has_journal_in_common() || self.own.boot > other.boot
    }

    /// What is wrong where another one has our name.
    fn same_name(&self, address: &str) -> String {
        format!(
            "replica.id \"{}\" is also used by {address}, and this is {}: give each replica its own; until then others \
             tell only one of them of purges",
            self.id, self.own.address
        )
    }

    /// A peer that has ended. Its task returns after this.
    fn let_go(&self, peer: &Arc<Peer>) {
        self.keep_mark(peer);
        let mut peers = self.peers();
        if peers.get(&peer.id).is_some_and(|known| Arc::ptr_eq(known, peer)) {
            peers.remove(&peer.id);
        }
        drop(peers);
        tracing::info!(replica = %peer.id, "a replica is gone");
        peer.mark_gone();
        self.count();
        self.progress.notify();
    }

    fn woken(&self) -> watch::Receiver<()> {
        self.ring.subscribe()
    }

    fn peers(&self) -> parking_lot::MutexGuard<'_, BTreeMap<NodeId, Arc<Peer>>> {
        self.peers.lock()
    }

    fn marks(&self) -> parking_lot::MutexGuard<'_, Marks> {
        // Whole after every statement, like the map.
        self.marks.lock()
    }

    fn count(&self) {
        let others = i64::try_from(self.peers().len()).unwrap_or(i64::MAX);
        self.context.metrics.journal.replicas.set(others + 1);
    }
}

/// The name of the purge of everything that stands for what a replica has missed of another one.
fn gap_name(teller: &str, told: &str, head: Position) -> String {
    format!("{GAP}{teller}-{told}-{head:x}")
}

/// What is wrong with replicas that have journals of their own.
const NOT_SHARED: &str = "replicas of one fleet have no journal in common: a purge that one of them takes is not known to \
                          the other, which may serve the old page; give all of them journal.kind = \"etcd\", or name them \
                          to each other (replica.peers)";
