//! The single writer of the fleet: events in, snapshot out.
//!
//! Registry and checkers only send; readers only load. So there is no lock, no lost update, and no moment at which
//! membership and health disagree. Whoever needs to act on a node (its checker, its delivery) is started here when
//! the node joins and stopped when it leaves.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::config::HealthChecks;
use crate::delivery::Deliveries;
use crate::fleet::{
    Event, Health, HealthState, Live, Member, Node, NodeId, NodeSpec, Pool, Role, Snapshot, Source, Thresholds, Verdict,
};
use crate::probe::Probe;
use crate::slow_start::SlowStart;
use crate::telemetry::Metrics;

/// Owns the fleet.
pub struct FleetKeeper {
    fleet: Arc<ArcSwap<Snapshot>>,
    nodes: BTreeMap<(Role, NodeId), Kept>,
    checks: HealthChecks,
    deliveries: Arc<Deliveries>,
    slow_start: Arc<SlowStart>,
    metrics: Arc<Metrics>,
    events: mpsc::Sender<Event>,
    probes: JoinSet<()>,
    next_key: u64,
    /// The sources that have not told yet of all that they know.
    unlisted: BTreeSet<Source>,
    listed: watch::Sender<bool>,
    /// All that there was at the start is known and has been checked once. Before that all nodes are new together, and
    /// none has a reason to start more slowly than another.
    settled: bool,
}

/// What the keeper knows of one node.
struct Kept {
    node: Arc<Node>,
    health: HealthState,
    reason: Arc<str>,
    probe: Probe,
    probe_task: AbortHandle,
}

impl FleetKeeper {
    /// A keeper that publishes to `fleet`. `listed` turns true when each of the sources has told of all it knew at the
    /// start.
    pub fn new(
        fleet: Arc<ArcSwap<Snapshot>>,
        checks: HealthChecks,
        deliveries: Arc<Deliveries>,
        slow_start: Arc<SlowStart>,
        metrics: Arc<Metrics>,
        events: mpsc::Sender<Event>,
        sources: impl IntoIterator<Item = Source>,
        listed: watch::Sender<bool>,
    ) -> Self {
        FleetKeeper {
            fleet,
            nodes: BTreeMap::new(),
            checks,
            deliveries,
            slow_start,
            metrics,
            events,
            probes: JoinSet::new(),
            next_key: 0,
            unlisted: sources.into_iter().collect(),
            listed,
            settled: false,
        }
    }

    /// Works until the process ends. `suspects` are nodes that failed a request.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>, mut suspects: mpsc::Receiver<(Role, NodeId)>) {
        loop {
            tokio::select! {
                // A verdict that is there decides before a suspicion asks for another check.
                biased;
                event = events.recv() => match event {
                    Some(event) => {
                        self.apply(event);
                        self.settle();
                    }
                    None => return,
                },
                Some(suspect) = suspects.recv() => if let Some(kept) = self.nodes.get(&suspect) {
                    kept.probe.check_now();
                },
                // A checker that was stopped with its node, or that panicked: the set only has to be emptied.
                Some(ended) = self.probes.join_next() => if let Err(error) = ended && error.is_panic() {
                    tracing::error!(%error, "a health checker panicked");
                },
            }
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Joined(spec) => self.join(spec),
            Event::Left(_, role, id) | Event::Vanished(_, role, id) => self.leave(role, &id),
            Event::Listed(source) => {
                self.unlisted.remove(&source);
                if self.unlisted.is_empty() {
                    self.listed.send_replace(true);
                }
            }
            Event::Checked(check) => {
                let Some(kept) = self.nodes.get_mut(&(check.role, check.id)) else { return };
                if kept.node.spec.address != check.address {
                    return;
                }
                if check.role == Role::Varnish && check.verdict == Verdict::Passed {
                    self.deliveries.answered(&kept.node, check.began, check.took);
                }
                if !kept.judge(check.verdict, &self.checks) {
                    return;
                }
                if check.role == Role::Varnish {
                    self.deliveries.health_changed(kept.node.id());
                }
                self.publish();
            }
        }
    }

    fn settle(&mut self) {
        let all_checked = || self.nodes.values().all(|kept| kept.health.health() != Health::Unknown);
        self.settled = self.settled || (*self.listed.borrow() && all_checked());
    }

    fn join(&mut self, spec: NodeSpec) {
        let identity = (spec.role, spec.id.clone());
        match self.nodes.get_mut(&identity) {
            Some(kept) if kept.node.spec == spec => return,
            Some(kept) if kept.node.spec.is_reached_as(&spec) => {
                kept.node = Arc::new(Node::new(spec, Arc::clone(&kept.node.live), kept.node.key));
            }
            _ => {
                tracing::info!(role = %spec.role, node = %spec.id, address = %spec.address, "node joined");
                self.stop(&identity);
                self.next_key += 1;
                let node = Arc::new(Node::new(spec, Arc::new(Live::default()), self.next_key));
                let probe = Probe::new(&node.spec, &self.checks);
                let probe_task = self.probes.spawn(probe.clone().run(self.events.clone()));
                if node.spec.role == Role::Varnish {
                    self.deliveries.start(&node);
                }
                let kept = Kept { node, health: HealthState::default(), reason: "".into(), probe, probe_task };
                self.nodes.insert(identity, kept);
            }
        }
        self.publish();
    }

    fn leave(&mut self, role: Role, id: &NodeId) {
        if self.stop(&(role, id.clone())) {
            tracing::info!(%role, node = %id, "node left");
            self.metrics.forget(role, id);
            self.publish();
        }
    }

    /// Stops what works for a node; says whether there was one.
    fn stop(&mut self, identity: &(Role, NodeId)) -> bool {
        let Some(kept) = self.nodes.remove(identity) else { return false };
        kept.probe_task.abort();
        if identity.0 == Role::Varnish {
            self.deliveries.stop(&identity.1);
        }
        true
    }

    fn publish(&self) {
        let members = |role| {
            let of_role = self.nodes.values().filter(move |kept| kept.node.spec.role == role);
            of_role.map(Kept::member).collect()
        };
        let fleet = self.fleet.load();
        let version = fleet.version + 1;
        let web = Pool::new(members(Role::Web), self.checks.web.panic_threshold);
        if web.panics() && !fleet.web.panics() {
            tracing::warn!("too few web nodes are up: their health is ignored until more are");
        }
        // Caches are never used against their health: a sick one can be skipped, the web nodes cannot.
        let varnish = Pool::new(members(Role::Varnish), 0.0);
        if self.settled {
            self.start_slowly(&web, &fleet.web);
            self.start_slowly(&varnish, &fleet.varnish);
        }
        self.fleet.store(Arc::new(Snapshot { version, web, varnish }));
        self.deliveries.progressed();
    }

    /// Those that are up and come into traffic start slowly. Who had traffic before (a web node that was used in spite
    /// of its health, say) goes on with what it has.
    fn start_slowly(&self, now: &Pool, before: &Pool) {
        let had_traffic = |node: &Node| before.get(node.id()).is_some_and(|was| was.usable && was.node.key == node.key);
        let up = now.members().iter().filter(|member| member.usable && member.health == Health::Up);
        up.filter(|member| !had_traffic(&member.node)).for_each(|member| self.slow_start.begin(&member.node));
    }
}

impl Kept {
    /// Counts a check result; says whether anything to publish changed.
    fn judge(&mut self, verdict: Verdict, checks: &HealthChecks) -> bool {
        let spec = &self.node.spec;
        let (passed, reason) = match verdict {
            Verdict::Passed => (true, String::new()),
            Verdict::Failed(reason) => (false, reason),
        };
        let thresholds = match spec.role {
            Role::Web => Thresholds { rise: checks.web.rise, fall: checks.web.fall },
            Role::Varnish => Thresholds { rise: checks.varnish.rise, fall: checks.varnish.fall },
        };
        let transition = self.health.record(passed, thresholds);
        match transition {
            Some(Health::Down) => tracing::warn!(role = %spec.role, node = %spec.id, reason, "node is down"),
            Some(health) => tracing::info!(role = %spec.role, node = %spec.id, ?health, "node is up"),
            None => {}
        }
        let reason = if self.health.health() == Health::Down { reason.as_str() } else { "" };
        let still_down_for_another = !passed && *self.reason != *reason;
        if transition.is_some() || still_down_for_another {
            self.reason = reason.into();
            return true;
        }
        false
    }

    fn member(&self) -> Member {
        Member {
            node: Arc::clone(&self.node),
            health: self.health.health(),
            reason: Arc::clone(&self.reason),
            usable: false,
        }
    }
}
