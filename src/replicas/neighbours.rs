//! The replicas at the configured addresses, without etcd.
//!
//! An address does not identify a replica: it may be our own (all replicas can have the same list, and a name can cover
//! all), a replica that is known by another address, or a process that has replaced another one. So each address is first
//! asked for its name, its process and its journal. Each message names the process that it is for, so that no confirmation
//! is credited to another one.
//!
//! **The backlog of a neighbour** follows from its [mark](super::marks): all our purges after that. A replica that lost its
//! journal, or of which too little is known, gets a purge of everything. A new replica with a new journal can only have
//! missed purges that some Varnish has missed, too: it starts at the lowest cursor of a Varnish that the journal still
//! holds. So an additional clearcoat empties no cache.
//!
//! **A replica that was never met cannot confirm a purge**: the answer names its address.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::call::{PeerClient, PeerError};
use super::marks::Mark;
use super::message::{Introduction, Message};
use super::peer::{self, Peer, Start};
use super::{MOST, Record, Replicas, View};
use crate::atomic_file;
use crate::backoff::Backoff;
use crate::config::{PeerAddress, is_host_port};
use crate::fleet::NodeId;
use crate::journal::{Missed, Shared};
use crate::telemetry::causes;

/// The bounds of the pauses between attempts to meet; each pause is at least half of its bound.
const BACKOFF: Backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_secs(2) };

/// The minimum time between two attempts, also after news of a replica.
const LEAST_PAUSE: Duration = Duration::from_millis(200);

/// The interval of resolving a name.
const LOOK_UP_EVERY: Duration = Duration::from_secs(5);

/// The timeout of resolving a name.
const LOOK_UP: Duration = Duration::from_secs(2);

const SAVE_EVERY: Duration = Duration::from_secs(1);

/// The replicas at the addresses.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    rows: Mutex<BTreeMap<String, Row>>,
    /// The purges that they had for us at the start have arrived.
    caught_up: AtomicBool,
}

/// The replica at one address, or behind a name.
#[derive(Clone, Debug)]
struct Row {
    who: Who,
    /// At least one attempt was made.
    tried: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Who {
    /// No replica that can be reached, and why.
    Unmet(Arc<str>),
    Met(NodeId),
    /// No replica that needs our purges: this one, one that is known by another address, or one that has announced its
    /// shutdown.
    Nobody,
}

impl Who {
    fn problem(&self) -> Option<Arc<str>> {
        if let Who::Unmet(problem) = self { Some(Arc::clone(problem)) } else { None }
    }
}

impl Row {
    fn is_unmet(&self, is_peer: impl Fn(&NodeId) -> bool) -> bool {
        match &self.who {
            Who::Unmet(_) => true,
            Who::Met(id) => !is_peer(id),
            Who::Nobody => false,
        }
    }
}

impl Neighbours {
    /// The addresses of replicas that may exist and cannot be reached: all but the peers.
    pub(super) fn unmet(&self, is_peer: impl Fn(&NodeId) -> bool) -> Vec<NodeId> {
        let rows = self.rows.lock();
        let unmet = rows.iter().filter(|(_, row)| row.is_unmet(&is_peer)).map(|(address, _)| address);
        unmet.filter_map(|address| name_of(address)).collect()
    }

    /// The same for the admin API.
    pub(super) fn view(&self, is_peer: impl Fn(&NodeId) -> bool) -> Vec<View> {
        let rows = self.rows.lock();
        let unmet = rows.iter().filter(|(_, row)| row.is_unmet(&is_peer));
        let view = unmet.filter_map(|(address, row)| {
            let (id, journal, problem) = (name_of(address)?, String::new(), row.who.problem());
            Some(View { id, address: address.clone(), journal, is_self: false, confirmed: false, problem })
        });
        view.collect()
    }

    /// Whether the purges that they had for us at the start have arrived.
    pub(super) fn are_caught_up(&self) -> bool {
        self.caught_up.load(Ordering::SeqCst)
    }

    /// Records the state of an address, and logs a new problem.
    fn set(&self, address: &str, who: Who) {
        let problem = who.problem();
        let before = self.rows.lock().insert(address.to_owned(), Row { who, tried: true });
        if let Some(problem) = &problem
            && before.is_none_or(|before| before.who.problem().as_ref() != Some(problem))
        {
            tracing::warn!(
                address,
                problem = &**problem,
                "no replica that can receive purges is at this address (replica.peers)"
            );
        }
    }

    /// Records that an attempt failed. A replica that has announced its shutdown is not missed.
    fn record_failure(&self, address: &str, error: &PeerError) {
        let has_left = self.rows.lock().get(address).is_some_and(|row| row.tried && row.who == Who::Nobody);
        if !(has_left && error.is_refused_connection()) {
            self.set(address, Who::Unmet(causes(error).to_string().into()));
        }
    }

    fn expect(&self, address: &str) {
        let row = Row { who: Who::Unmet("not met yet".into()), tried: false };
        self.rows.lock().entry(address.to_owned()).or_insert(row);
    }

    fn forget(&self, address: &str) {
        self.rows.lock().remove(address);
    }
}

/// A name for a replica of which only the address is known: the address without the characters that no name has.
fn name_of(address: &str) -> Option<NodeId> {
    let allowed = |character: &char| character.is_ascii_alphanumeric() || "._:-".contains(*character);
    NodeId::try_from(address.chars().filter(allowed).take(128).collect::<String>()).ok()
}

/// Starts tasks in `tasks` that look for the other replicas.
pub(super) fn start(
    replicas: &Arc<Replicas>,
    addresses: Vec<PeerAddress>,
    introduced: mpsc::Receiver<(NodeId, Record)>,
    tasks: &mut JoinSet<()>,
) {
    for address in addresses {
        let this = Arc::clone(replicas);
        replicas.neighbours.expect(address.host_port());
        match address {
            PeerAddress::One(address) => _ = tasks.spawn(this.befriend(address, Arc::new(AtomicBool::new(true)))),
            PeerAddress::All(name) => _ = tasks.spawn(follow_name(this, name)),
        }
    }
    tasks.spawn(meet_strangers(Arc::clone(replicas), introduced));
    tasks.spawn(save_marks(Arc::clone(replicas)));
}

/// Resolves a name periodically, and looks for a replica at each address.
async fn follow_name(replicas: Arc<Replicas>, name: String) {
    let mut known: BTreeMap<String, Arc<AtomicBool>> = BTreeMap::new();
    // Aborted with this task.
    let mut tasks: JoinSet<()> = JoinSet::new();
    loop {
        let found = tokio::time::timeout(LOOK_UP, tokio::net::lookup_host(&name)).await;
        let found: Result<BTreeSet<String>, String> = match found {
            Ok(Ok(found)) => Ok(found.map(|address| address.to_string()).collect()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {LOOK_UP:?}")),
        };
        match found {
            Ok(found) if !found.is_empty() => {
                for address in &found {
                    let is_there = known.get(address).filter(|listed| Arc::strong_count(listed) > 1);
                    match is_there {
                        Some(listed) => listed.store(true, Ordering::SeqCst),
                        None => {
                            let listed = Arc::new(AtomicBool::new(true));
                            replicas.neighbours.expect(address);
                            tasks.spawn(Arc::clone(&replicas).befriend(address.clone(), Arc::clone(&listed)));
                            known.insert(address.clone(), listed);
                        }
                    }
                }
                known.retain(|address, listed| {
                    listed.store(found.contains(address), Ordering::SeqCst);
                    Arc::strong_count(listed) > 1
                });
                replicas.relist(&known);
                replicas.neighbours.forget(&name);
            }
            // Known addresses stay: a failing name server does not mean that a replica is gone.
            _ if !known.is_empty() => {}
            found => {
                let problem = found.err().unwrap_or_else(|| "the name has no address".to_owned());
                let problem = format!("looking up {name} failed: {problem}");
                replicas.neighbours.set(&name, Who::Unmet(problem.into()));
            }
        }
        while tasks.try_join_next().is_some() {}
        tokio::time::sleep(LOOK_UP_EVERY).await;
    }
}

/// Connects to replicas that introduced themselves and are in no list of ours.
async fn meet_strangers(replicas: Arc<Replicas>, mut introduced: mpsc::Receiver<(NodeId, Record)>) {
    let mut tasks: JoinSet<()> = JoinSet::new();
    while let Some((id, Record { address, boot, .. })) = introduced.recv().await {
        while tasks.try_join_next().is_some() {}
        let is_expected = replicas.neighbours.rows.lock().contains_key(&address);
        // Another process of a known name is met: which of them is there turns out when it answers.
        let is_known = replicas.peers.lock().get(&id).is_some_and(|peer| peer.record.boot == boot);
        if is_expected || is_known {
        } else if tasks.len() >= MOST || !is_host_port(&address) {
            tracing::warn!(replica = %id, address, "this is no replica that can receive purges");
        } else {
            replicas.neighbours.expect(&address);
            tasks.spawn(Arc::clone(&replicas).befriend(address, Arc::new(AtomicBool::new(false))));
        }
        replicas.record_looked_at(&id);
    }
}

/// Saves the progress of the others until the process ends.
async fn save_marks(replicas: Arc<Replicas>) {
    let mut logged = false;
    loop {
        let peers: Vec<Arc<Peer>> = replicas.peers.lock().values().cloned().collect();
        peers.iter().for_each(|peer| replicas.keep_mark(peer));
        let head = replicas.context.journal.as_ref().map_or(0, |journal| journal.head());
        let known = replicas.known_now();
        let unsaved = {
            let mut marks = replicas.marks.lock();
            marks.set_known(known);
            marks.unsaved(head)
        };
        if let Some((path, bytes)) = unsaved {
            let file = path.clone();
            let written = tokio::task::spawn_blocking(move || atomic_file::replace(&file, &bytes)).await;
            match written.unwrap_or_else(|panicked| Err(panicked.into())) {
                Ok(()) => logged = false,
                // Logged once for each series of failures.
                Err(error) if !std::mem::replace(&mut logged, true) => tracing::warn!(
                    ?path, %error, "the progress of the other replicas cannot be saved: after a restart they are sent more"
                ),
                Err(_) => {}
            }
        }
        tokio::time::sleep(SAVE_EVERY).await;
    }
}

impl Replicas {
    /// Returns when every replica at the addresses has sent what was missed here or could not be reached, or after a
    /// timeout.
    pub(super) async fn caught_up(&self) {
        let patience = self.context.ack_timeout.max(BACKOFF.max);
        let began = Instant::now();
        while !self.are_all_caught_up() && began.elapsed() < patience {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.neighbours.caught_up.store(true, Ordering::SeqCst);
    }

    fn are_all_caught_up(&self) -> bool {
        let rows: Vec<Row> = self.neighbours.rows.lock().values().cloned().collect();
        rows.iter().all(|row| match &row.who {
            Who::Met(id) => self.peers.lock().get(id).is_none_or(|peer| !peer.owes_us() || peer.is_late()),
            Who::Unmet(_) | Who::Nobody => row.tried,
        })
    }

    /// Records the progress of a peer, if the next start needs it.
    pub(super) fn keep_mark(&self, peer: &Peer) {
        if let (Some(position), Some(journal)) = (peer.confirmed_up_to(), &peer.record.journal_id) {
            self.marks.lock().note(&peer.id, Mark { journal: journal.clone(), position });
        }
    }

    /// Identifies the replica at this address and sends it purges, for as long as the address is `listed` or a replica
    /// answers.
    async fn befriend(self: Arc<Self>, address: String, listed: Arc<AtomicBool>) {
        let client = PeerClient::to(address.clone());
        let mut woken = self.woken();
        let mut failures = 1_u32;
        // Not listed, but it introduced itself or another one knows it: it is not gone because it does not answer at once.
        let (began, mut is_expected) = (Instant::now(), !listed.load(Ordering::SeqCst));
        loop {
            let asked = Instant::now();
            match self.ask_who(&client).await {
                Ok(met) => match self.meet_at(&address, (met, asked), listed.load(Ordering::SeqCst)) {
                    Some(peer) => {
                        self.neighbours.set(&address, Who::Met(peer.id.clone()));
                        self.progress.notify();
                        match peer::run(Arc::clone(&self), peer).await {
                            PeerError::Left => self.neighbours.set(&address, Who::Nobody),
                            error => self.neighbours.set(&address, Who::Unmet(causes(&error).to_string().into())),
                        }
                        (failures, is_expected) = (1, false);
                    }
                    // An address without a replica that needs purges will probably stay so.
                    None => (failures, is_expected) = (u32::MAX, false),
                },
                Err(error) => {
                    self.neighbours.record_failure(&address, &error);
                    is_expected &= !error.is_refused_connection() && began.elapsed() < peer::KEPT;
                    failures = failures.saturating_add(1);
                }
            }
            // Others may depend on whether there is a replica.
            self.progress.notify();
            if !listed.load(Ordering::SeqCst) && !is_expected {
                return self.neighbours.forget(&address);
            }
            tokio::select! {
                () = tokio::time::sleep(BACKOFF.pause(failures, 0.5 + 0.5 * fastrand::f64())) => {}
                _ = woken.changed() => tokio::time::sleep(LEAST_PAUSE.saturating_sub(asked.elapsed())).await,
            }
        }
    }

    async fn ask_who(&self, client: &PeerClient) -> Result<Introduction, PeerError> {
        let hello = Message { overrides: self.overrides_to_tell(), ..self.hello(Duration::ZERO) };
        let said = client.post(self, &hello).await?;
        self.hear_overrides(said.overrides);
        said.from.ok_or(PeerError::Nameless)
    }

    /// The replica at this address as a peer; `None` if it does not need our purges. It was asked at the time given.
    fn meet_at(&self, address: &str, (met, asked): (Introduction, Instant), listed: bool) -> Option<Arc<Peer>> {
        let Introduction { id, record, fresh, up_ms, .. } = met;
        if record.boot == self.own.boot {
            self.neighbours.set(address, Who::Nobody);
            return None;
        }
        let record = Record { address: address.to_owned(), ..record };
        if id == self.id {
            self.twins.record_contact(&record, self.holds_name_against(&record));
            self.neighbours.set(address, Who::Unmet(self.same_name(address).into()));
            return None;
        }
        if !self.goes_with(&record) || record.journal_id.is_none() {
            let problem = format!("its journal is in {}, and ours in {}", record.journal, self.own.journal);
            self.neighbours.set(address, Who::Unmet(problem.into()));
            return None;
        }
        let known = self.peers.lock().get(&id).cloned();
        if let Some(known) = known {
            if known.record.boot == record.boot {
                // Known by another address.
                self.neighbours.set(address, Who::Nobody);
                return None;
            }
            // Of two replicas with one name the one that answers wins. If both do, all that see both choose the same one.
            if !known.is_late() && known.record.boot > record.boot {
                let other = &known.record.address;
                let problem = format!("replica.id \"{id}\" is used by {other} and by {address}: give each its own");
                self.neighbours.set(address, Who::Unmet(problem.into()));
                return None;
            }
            known.mark_gone();
            self.peers.lock().remove(&id);
            self.ring.send_replace(());
        }
        // Its answer has been under way for a part of the time since it was asked.
        let up = up_ms.map(|up_ms| Duration::from_millis(up_ms) + asked.elapsed());
        let start = self.start_of(&id, &record, fresh.then_some(up))?;
        tracing::info!(replica = %id, address, journal = record.journal, ?start, "replica found");
        let peer = Arc::new(Peer::new(id.clone(), record, start, listed));
        peer.set_owes_us(!self.neighbours.are_caught_up());
        self.peers.lock().insert(id, Arc::clone(&peer));
        self.review_names();
        self.count();
        Some(peer)
    }

    /// The position from which a peer needs purges. `fresh`: its journal is new, and for how long it has been running.
    fn start_of(&self, id: &NodeId, record: &Record, fresh: Option<Option<Duration>>) -> Option<Start> {
        let journal = self.context.journal.as_ref()?;
        let marks = self.marks.lock();
        Some(match marks.get(id) {
            Some(mark) if record.journal_id.as_ref() == Some(&mark.journal) => {
                Start::After(mark.position.min(journal.head()))
            }
            // It lost its journal, and with it our purges and its own.
            Some(_) => Start::Gap,
            None if let Some(up) = fresh => self.start_of_fresh(&**journal, up),
            None if matches!(journal.since(0), Missed::Entries(_)) => Start::After(0),
            None => Start::Gap,
        })
    }

    /// The same for one whose journal is new. What passed it before we met may be stored in spite of any purge that was answered
    /// since it began, whatever each Varnish has acknowledged.
    fn start_of_fresh(&self, journal: &dyn Shared, up: Option<Duration>) -> Start {
        let least = self.context.deliveries.least_cursor();
        let Some(up) = up else { return Start::After(least) };
        if journal.may_have_dropped(up) { Start::Gap } else { Start::After(journal.older_than(up).min(least)) }
    }

    /// Updates whether a name still lists the peers behind it.
    fn relist(&self, known: &BTreeMap<String, Arc<AtomicBool>>) {
        let peers: Vec<Arc<Peer>> = self.peers.lock().values().cloned().collect();
        for peer in peers {
            if let Some(listed) = known.get(&peer.record.address) {
                peer.set_listed(listed.load(Ordering::SeqCst));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_met_and_who_has_gone_without_a_word_is_named_by_the_address() {
        let neighbours = Neighbours::default();
        let id = |id: &str| NodeId::try_from(id).unwrap();
        neighbours.expect("[2001:db8::1]:6081");
        neighbours.set("192.0.2.2:6081", Who::Met(id("b")));
        neighbours.set("192.0.2.3:6081", Who::Nobody);
        assert_eq!(neighbours.unmet(|_| true), [id("2001:db8::1:6081")]);
        assert_eq!(neighbours.unmet(|_| false), [id("192.0.2.2:6081"), id("2001:db8::1:6081")]);
        // After an announced shutdown a refused connection is expected; a timeout means that there is a replica.
        let refused = PeerError::Connect(std::io::ErrorKind::ConnectionRefused.into());
        neighbours.record_failure("192.0.2.3:6081", &refused);
        assert_eq!(neighbours.unmet(|_| true).len(), 1);
        neighbours.record_failure("192.0.2.3:6081", &PeerError::NoAnswer(Duration::from_secs(1)));
        assert_eq!(neighbours.unmet(|_| true).len(), 2);
    }
}
