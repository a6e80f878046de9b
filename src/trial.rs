//! The trial: whether a Varnish carries out purges is not believed but tried.
//!
//! A VCL that takes Magento's pattern apart answers `200 Purged` to a pattern that it cannot take apart, and keeps the
//! page. Nothing in its answers shows that, and the first to notice would be a shopper. So a Varnish that has come up is
//! asked for a page of our own, which the origin listener answers itself; twice, to see that it keeps it; then the page
//! is purged, in the words of the node's `delivery` and compiled as real purges are; then it is asked for once more. A
//! page that is still the same one is proof: this node does not carry out such purges, and must not serve.
//!
//! Whatever else comes of it (the VCL passes the page, answers the path itself, fetches from elsewhere) proves nothing
//! and keeps nobody out; nor does it let one in again that is proven bad: only a proof takes a proof back, or another
//! cache in its place. Because clients choose the hosts that are asked with, each trial asks with one of the
//! configuration, too. A verdict needs an answer after an acknowledgement, several times over: vmod_xkey serves a page
//! a moment before it can be purged, and a VCL that purges softly serves the old page once more.
//!
//! If another `delivery` would do, the node is out and the log says what to set. If none would, its VCL may be one of a
//! shop that purges by URL alone, to which nothing is owed about tags: it is out from the first purge of tags on.

mod node;
mod page;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::fleet::{Live, Node, NodeId, TrialState};
use crate::purge::Guard;
use crate::telemetry::Metrics;

use page::TrialPage;
pub use page::is_ours;

/// The longest host of real traffic that a trial is asked with, in bytes: that of a DNS name and a port.
const LONGEST_HOST: usize = 260;

/// The trials of all nodes, and the pages that the origin answers for them.
pub struct Trials {
    /// Who knows whether anything was purged by tags.
    guard: Arc<Guard>,
    metrics: Arc<Metrics>,
    /// The host to ask with while no client has come.
    default_host: String,
    /// That of a client at the edge, and whether another one is wanted.
    host: Mutex<Option<Arc<str>>>,
    wants_host: AtomicBool,
    /// The pages under trial: as many as there are nodes, at most.
    pages: Mutex<HashMap<String, TrialPage>>,
    running: Mutex<BTreeMap<NodeId, Running>>,
    /// Grows whenever a node has been tried.
    progress: watch::Sender<u64>,
}

/// Whose host a page is asked for with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// That of a client, if one has come.
    Client,
    /// Ours.
    Configured,
}

/// The task that tries one node, again and again.
struct Running {
    task: JoinHandle<()>,
    wake: Arc<Notify>,
    node: Arc<Node>,
    /// What came of it, in words; empty if all is well.
    finding: Arc<str>,
}

impl Trials {
    /// No trial yet. `host` is what pages are asked for with until a client has come to the edge.
    pub fn new(host: Option<&str>, guard: Arc<Guard>, metrics: Arc<Metrics>) -> Self {
        Trials {
            guard,
            metrics,
            default_host: host.unwrap_or("clearcoat").to_owned(),
            host: Mutex::default(),
            wants_host: AtomicBool::new(true),
            pages: Mutex::default(),
            running: Mutex::default(),
            progress: watch::Sender::new(0),
        }
    }

    /// Tries this node from now on, whenever [`Trials::is_up`] says so, and now and then.
    pub fn start(self: &Arc<Self>, node: &Arc<Node>) {
        let wake = Arc::new(Notify::new());
        let task = tokio::spawn(node::run(Arc::clone(self), Arc::clone(node), Arc::clone(&wake)));
        let running = Running { task, wake, node: Arc::clone(node), finding: "".into() };
        if let Some(before) = self.running().insert(node.id().clone(), running) {
            before.task.abort();
        }
    }

    /// Tries this node no more.
    pub fn stop(&self, id: &NodeId) {
        if let Some(running) = self.running().remove(id) {
            running.task.abort();
        }
    }

    /// A node has come up: it may have another VCL than before.
    pub fn is_up(&self, id: &NodeId) {
        if let Some(running) = self.running().get(id) {
            running.wake.notify_one();
        }
    }

    /// Whether a node may serve clients, as far as its trial says.
    pub fn admits(&self, node: &Live) -> bool {
        match node.trial() {
            TrialState::Untried | TrialState::Passed | TrialState::Inconclusive => true,
            TrialState::WithoutTags => !self.guard.has_tags(),
            TrialState::Failed => false,
        }
    }

    /// What came of the trial of a node, in words; empty if all is well, or nothing is known.
    pub fn finding(&self, id: &NodeId) -> Arc<str> {
        self.running().get(id).map_or_else(|| "".into(), |running| Arc::clone(&running.finding))
    }

    /// Returns when every node in `among` has been tried once.
    pub async fn all_tried(&self, among: impl Fn() -> Vec<Arc<Node>>) {
        let mut progress = self.progress.subscribe();
        while among().iter().any(|node| node.live.trial() == TrialState::Untried) {
            if progress.changed().await.is_err() {
                return;
            }
        }
    }

    /// A client has come to the edge with this host: the next trial asks with it. One is taken after each trial, so that
    /// requests cost a glance. A stranger's choice is of no use to him: a VCL that does not know the host makes an attempt
    /// prove nothing, and the next one asks with a host of ours.
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

    /// The answer of the origin listener to a path below `/.clearcoat`: the page, if it is under trial.
    pub fn answer(&self, path: &[u8]) -> Option<Vec<u8>> {
        let path = std::str::from_utf8(path).ok()?;
        self.pages().get(path).map(TrialPage::answer)
    }

    /// What to ask with.
    fn host(&self, whose: Whose) -> String {
        let seen = self.host.lock().clone().filter(|_| whose == Whose::Client);
        seen.map_or_else(|| self.default_host.clone(), |host| host.as_ref().to_owned())
    }

    /// What came of a trial: shown, counted, and logged if it is news. Gives what holds of the node now.
    fn publish(&self, node: &Node, state: TrialState, finding: &str) -> TrialState {
        self.wants_host.store(true, Ordering::Relaxed);
        let proven = node.live.trial();
        if state == TrialState::Inconclusive && matches!(proven, TrialState::Failed | TrialState::WithoutTags) {
            return proven;
        }
        let told = {
            let mut running = self.running();
            // Another task has this id by now, or none.
            let Some(mine) = running.get_mut(node.id()).filter(|running| running.node.endpoint_id == node.endpoint_id)
            else {
                return state;
            };
            std::mem::replace(&mut mine.finding, finding.into())
        };
        node.live.set_trial(state);
        if let Some(varnish) = &self.metrics.node(node.spec.role, node.id()).varnish {
            varnish.trial_failed.set(matches!(state, TrialState::Failed | TrialState::WithoutTags).into());
        }
        self.progress.send_modify(|tried| *tried += 1);
        let id = node.id();
        if *told == *finding {
            return state;
        }
        match state {
            TrialState::Failed | TrialState::WithoutTags => tracing::warn!(node = %id, "{finding}"),
            TrialState::Inconclusive => tracing::info!(node = %id, "{finding}"),
            TrialState::Passed | TrialState::Untried => {
                tracing::info!(node = %id, "purges take pages out of this Varnish");
            }
        }
        state
    }

    fn pages(&self) -> MutexGuard<'_, HashMap<String, TrialPage>> {
        self.pages.lock()
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

    #[tokio::test]
    async fn a_trial_that_proves_nothing_takes_no_proof_back() {
        let guard = Arc::new(Guard::new(Instant::now()));
        let trials = Arc::new(Trials::new(None, guard, Arc::new(Metrics::new().unwrap())));
        let id = NodeId::try_from("v").unwrap();
        let spec = NodeSpec::new(Role::Varnish, id.clone(), "192.0.2.1:80".parse().unwrap());
        let node = Arc::new(Node::new(spec, Arc::default(), 1));
        trials.start(&node);
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
