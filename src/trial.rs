//! The trial: a test whether a Varnish really carries out purges.
//!
//! A VCL that parses Magento's pattern answers `200 Purged` to a pattern that it cannot parse, and keeps the page. Its
//! answers do not show that, and a shopper would notice first. So a Varnish that has come up is asked for a page of our
//! own, which the origin listener answers itself; twice, to see that it is cached; then the page is purged, in the
//! node's `delivery` form and compiled like real purges; then it is requested once more. The same page again is proof:
//! this node does not carry out such purges, and must not serve.
//!
//! Any other outcome (the VCL passes the page, answers the path itself, fetches from elsewhere) proves nothing and
//! excludes no node; nor does it readmit a node that is proven bad: only another proof or another cache does. Because
//! clients choose the hosts that trials use, each trial also uses a configured one. A verdict needs an answer after an
//! acknowledgement, several times over: vmod_xkey serves a page a moment before it can be purged, and a VCL with soft
//! purges serves the old page once more.
//!
//! If another `delivery` would work, the node is out and the log says what to set. If none would, its VCL may be for a
//! shop that purges by URL alone, which needs no purges by tag: it is out from the first purge of tags on.

mod node;
mod page;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::awaited::Progress;
use crate::fleet::{Live, Node, NodeId, ReturnsSeals, SealsShown, TrialState, VarnishSettings};
use crate::purge::Guard;
use crate::telemetry::Metrics;

use page::TrialPage;
pub use page::is_ours;

/// The host of a trial if none is configured.
const DEFAULT_HOST: &str = "clearcoat";

/// The longest client-sent host that a trial uses, in bytes: a DNS name and a port.
const LONGEST_HOST: usize = 260;

/// The trials of all nodes, and their pages, answered by the origin.
pub struct Trials {
    /// Says whether any purge was by tags.
    guard: Arc<Guard>,
    metrics: Arc<Metrics>,
    /// The host to use until a client has come.
    default_host: Mutex<Arc<str>>,
    /// A client's host at the edge, and whether another one is wanted.
    host: Mutex<Option<Arc<str>>>,
    wants_host: AtomicBool,
    running: Mutex<BTreeMap<NodeId, Running>>,
    /// Notified after each trial.
    progress: Progress,
    on_unsealed: OnceLock<OnUnsealed>,
}

/// Is called with a node whose cache may have something without a seal.
type OnUnsealed = Box<dyn Fn(&NodeId, UnsealedCache) + Send + Sync>;

/// What is to be done with a cache that may have something without a seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnsealedCache {
    /// The node does not return seals, and would store more of that.
    Distrust,
    /// The node has just begun to return seals: once emptied, its cache has nothing without one.
    Empty,
    /// The node is seen to return seals: whoever waits for that goes on.
    Believe,
    /// Trials in a row said nothing of seals: what it may have without one, nobody can tell.
    GiveUp,
}

/// The host of a trial request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// A client's, if one has come.
    Client,
    /// The configured one.
    Configured,
}

/// The task that tries one node repeatedly.
struct Running {
    task: JoinHandle<()>,
    wake: Arc<Notify>,
    /// Notified when the node's answers leave in doubt whether it returns seals.
    question: Arc<Notify>,
    node: Arc<Node>,
    /// The finding in words; empty if all is well.
    finding: Arc<str>,
}

impl Trials {
    /// No trial yet. `host` is what pages are asked for with until a client has come to the edge.
    pub fn new(host: Option<&str>, guard: Arc<Guard>, metrics: Arc<Metrics>) -> Self {
        Trials {
            guard,
            metrics,
            default_host: Mutex::new(host.unwrap_or(DEFAULT_HOST).into()),
            host: Mutex::default(),
            wants_host: AtomicBool::new(true),
            running: Mutex::default(),
            progress: Progress::default(),
            on_unsealed: OnceLock::new(),
        }
    }

    /// Tries this node from now on, whenever [`Trials::wake`] says so, and now and then.
    pub fn start(self: &Arc<Self>, node: &Arc<Node>, settings: &VarnishSettings) {
        let (wake, question) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let calls = node::TrialCalls { wake: Arc::clone(&wake), question: Arc::clone(&question) };
        let task = tokio::spawn(node::run(Arc::clone(self), Arc::clone(node), settings.clone(), calls));
        let running = Running { task, wake, question, node: Arc::clone(node), finding: "".into() };
        if let Some(before) = self.running().insert(node.id().clone(), running) {
            before.task.abort();
        }
    }

    /// Stops trying this node.
    pub fn stop(&self, id: &NodeId) {
        if let Some(running) = self.running().remove(id) {
            running.task.abort();
        }
    }

    /// Notes that a node has come up: it may have another VCL now.
    pub fn wake(&self, id: &NodeId) {
        if let Some(running) = self.running().get(id) {
            running.wake.notify_one();
        }
    }

    /// Has a node tried soon that returns seals, as far as is known, and has answered a page without one: its VCL may have ceased
    /// to. It may also have written that page itself, so the more often it is found to return them, the later it is tried.
    pub fn question(&self, id: &NodeId) {
        if let Some(running) = self.running().get(id) {
            running.question.notify_one();
        }
    }

    /// Whether the trial's result allows a node to serve clients.
    pub fn admits(&self, node: &Live) -> bool {
        match node.trial() {
            TrialState::Untried | TrialState::Passed | TrialState::Inconclusive => true,
            TrialState::WithoutTags => !self.guard.has_tags(),
            TrialState::Failed => false,
        }
    }

    /// The finding about a node in words; empty if all is well, or unknown.
    pub fn finding(&self, id: &NodeId) -> Arc<str> {
        self.running().get(id).map_or_else(|| "".into(), |running| Arc::clone(&running.finding))
    }

    /// Waits until every node in `among` has been tried once.
    pub async fn all_tried(&self, among: impl Fn() -> Vec<Arc<Node>>) {
        self.progress.until(|| among().iter().all(|node| node.live.trial() != TrialState::Untried)).await;
    }

    /// The host to use from now on until a client has come, as configured.
    pub fn set_default_host(&self, host: Option<&str>) {
        *self.default_host.lock() = host.unwrap_or(DEFAULT_HOST).into();
    }

    /// Notes the host of a client at the edge for the next trial. One is taken after each trial, so that other requests
    /// only check a flag. An attacker gains nothing by the choice: with a host unknown to the VCL an attempt proves
    /// nothing, and the next one uses the configured host.
    pub fn saw_host(&self, host: Option<&[u8]>) {
        if !self.wants_host.load(Ordering::Relaxed) {
            return;
        }
        let host = host.and_then(|host| std::str::from_utf8(host).ok()).filter(|host| host.len() <= LONGEST_HOST);
        if let Some(host) = host {
            self.wants_host.store(false, Ordering::Relaxed);
            *self.host.lock() = Some(host.into());
        }
    }

    /// The origin listener's answer to a path below `/.clearcoat`: the trial page with this path, whoever tries a node by it.
    /// `asked`: the request's `X-Clearcoat-Asked`.
    pub fn answer(&self, path: &[u8], asked: Option<&[u8]>) -> Option<Vec<u8>> {
        let path = std::str::from_utf8(path).ok()?;
        TrialPage::at(path).map(|page| page.answer(asked))
    }

    /// Has `treat` called with a node whose cache may have something without a seal, each time that a trial shows that, and
    /// after that was recorded of the node.
    pub fn on_unsealed(&self, treat: impl Fn(&NodeId, UnsealedCache) + Send + Sync + 'static) {
        _ = self.on_unsealed.set(Box::new(treat));
    }

    /// Records what a trial showed of a node's seals.
    fn record_seals(&self, node: &Node, shown: SealsShown) {
        let before = node.live.seals.record_trial(shown);
        let id = node.id();
        let unsealed = match (before, shown) {
            (ReturnsSeals::Yes, SealsShown::Returned) => return,
            (ReturnsSeals::Unknown, SealsShown::Returned) => {
                tracing::info!(node = %id, "this Varnish keeps the seals of pages");
                UnsealedCache::Believe
            }
            (ReturnsSeals::No, SealsShown::Returned) => {
                tracing::info!(
                    node = %id,
                    "this Varnish keeps the seals of pages now: its cache is dropped, as what it stored before may have none"
                );
                UnsealedCache::Empty
            }
            (ReturnsSeals::Yes, SealsShown::NotReturned) => {
                tracing::warn!(
                    node = %id,
                    "this Varnish does not keep the seals of pages any more: purges wait for it"
                );
                UnsealedCache::Distrust
            }
            // Its finding is logged.
            (_, SealsShown::NotPurged | SealsShown::NotReturned) => UnsealedCache::Distrust,
        };
        self.treat(id, unsealed);
    }

    fn treat(&self, node: &NodeId, unsealed: UnsealedCache) {
        if let Some(treat) = self.on_unsealed.get() {
            treat(node, unsealed);
        }
    }

    /// The host to use.
    fn host(&self, whose: Whose) -> String {
        let seen = self.host.lock().clone().filter(|_| whose == Whose::Client);
        seen.unwrap_or_else(|| Arc::clone(&self.default_host.lock())).as_ref().to_owned()
    }

    /// Records the result of a trial: shown, counted, and logged if it is new. Returns the state that now applies to
    /// the node.
    fn publish(&self, node: &Node, state: TrialState, finding: &str) -> TrialState {
        self.wants_host.store(true, Ordering::Relaxed);
        let proven = node.live.trial();
        if state == TrialState::Inconclusive && matches!(proven, TrialState::Failed | TrialState::WithoutTags) {
            return proven;
        }
        let told = {
            let mut running = self.running();
            // The id may belong to another task by now, or to none.
            let Some(mine) = running.get_mut(node.id()).filter(|running| running.node.endpoint_id == node.endpoint_id)
            else {
                return state;
            };
            std::mem::replace(&mut mine.finding, finding.into())
        };
        node.live.set_trial(state);
        if let Some(varnish) = &self.metrics.node(node.spec.role(), node.id()).varnish {
            varnish.trial_failed.set(matches!(state, TrialState::Failed | TrialState::WithoutTags).into());
        }
        self.progress.notify();
        let id = node.id();
        if *told == *finding {
            return state;
        }
        match state {
            TrialState::Failed | TrialState::WithoutTags => tracing::warn!(node = %id, "{finding}"),
            TrialState::Inconclusive => tracing::info!(node = %id, "{finding}"),
            TrialState::Passed | TrialState::Untried => {
                tracing::info!(node = %id, "this Varnish carries out purges");
            }
        }
        state
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<NodeId, Running>> {
        self.running.lock()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::fleet::{NodeSpec, Role};

    fn trials() -> Arc<Trials> {
        let guard = Arc::new(Guard::new(Instant::now()));
        Arc::new(Trials::new(None, guard, Arc::new(Metrics::new().unwrap())))
    }

    fn varnish(id: &NodeId) -> Arc<Node> {
        let spec = NodeSpec::new(Role::Varnish, id.clone(), "192.0.2.1:80".parse().unwrap());
        Arc::new(Node::new(spec, Arc::default(), 1))
    }

    #[test]
    fn a_cache_is_emptied_when_its_node_begins_to_return_seals() {
        use SealsShown::{NotPurged, NotReturned, Returned};
        use UnsealedCache::{Believe, Distrust, Empty};
        for (shown, treated) in [
            (
                &[Returned, Returned, NotReturned, NotPurged, Returned, Returned][..],
                &[Believe, Distrust, Distrust, Empty][..],
            ),
            (&[NotReturned, NotReturned, Returned], &[Distrust, Distrust, Empty]),
            (&[Returned, NotPurged, Returned], &[Believe, Distrust, Empty]),
        ] {
            let (trials, node) = (trials(), varnish(&NodeId::try_from("v").unwrap()));
            let seen = Arc::<Mutex<Vec<UnsealedCache>>>::default();
            let noted = Arc::clone(&seen);
            trials.on_unsealed(move |_, unsealed| noted.lock().push(unsealed));
            shown.iter().for_each(|shown| trials.record_seals(&node, *shown));
            assert_eq!(*seen.lock(), treated, "{shown:?}");
        }
    }

    #[tokio::test]
    async fn a_trial_that_proves_nothing_takes_no_proof_back() {
        let (trials, id) = (trials(), NodeId::try_from("v").unwrap());
        let node = varnish(&id);
        trials.start(&node, &VarnishSettings::default());
        let after = |state, finding: &str| {
            trials.publish(&node, state, finding);
            (node.live.trial(), trials.finding(&id).to_string())
        };
        use TrialState::{Failed, Inconclusive, Passed, WithoutTags};
        for proven in [Failed, WithoutTags] {
            assert_eq!(after(Inconclusive, "unknown"), (Inconclusive, "unknown".into()));
            assert_eq!(after(proven, "bad"), (proven, "bad".into()));
            assert_eq!(after(Inconclusive, "unknown"), (proven, "bad".into()));
            assert_eq!(after(Passed, ""), (Passed, "".into()));
        }
    }
}
