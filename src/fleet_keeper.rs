//! The single writer of the fleet: events in, snapshot out.
//!
//! Registry and checkers only send; readers only load. So there is no lock, no lost update, and no moment at which
//! membership and health disagree. Whoever needs to act on a node (its checker, its delivery) is started here when
//! the node joins and stopped when it leaves.
//!
//! A snapshot costs as much as there are nodes, and events come in bursts: all that wait are taken together, and become
//! one snapshot.
//!
//! What operators say of nodes ([`crate::registry::overrides`]) is laid over what their sources say, here and in no other
//! place: the keeper follows that table as it follows events.
//!
//! Who is in the fleet is not only what the sources say ([`membership`]): the configuration file counts before them, and
//! what they lose without a word, or too much at once, is kept ([`crate::fleet::LostNodes`]).

mod ejecting;
mod membership;
mod node_state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use self::ejecting::AllEjections;
use self::node_state::NodeState;
use crate::config::HealthChecks;
use crate::delivery::Deliveries;
use crate::fleet::{
    CheckResult, Event, Health, Live, LostNodes, Node, NodeKey, NodeSource, NodeSpec, Pool, Role, SecretHeaders,
    Snapshot, Suspicion, Verdict,
};
use crate::probe::Probe;
use crate::registry::overrides::KnownOverrides;
use crate::service_manager::Heartbeat;
use crate::slow_start::SlowStart;
use crate::telemetry::{Metrics, causes};
use crate::trial::Trials;

/// How many events become one snapshot at most.
const TOGETHER: usize = 1024;

/// The longest time between two turns, so that a keeper with nothing to do is seen to go on.
const BEAT_EVERY: Duration = Duration::from_millis(100);

/// Owns the fleet.
pub struct FleetKeeper {
    context: KeeperContext,
    nodes: BTreeMap<NodeKey, NodeState>,
    /// The specs from other sources of nodes whose own source takes precedence.
    shadowed: BTreeMap<NodeKey, NodeSpec>,
    lost_nodes: LostNodes,
    ejections: AllEjections,
    /// What operators say of nodes, in the fleet or not.
    overrides: Arc<KnownOverrides>,
    probes: JoinSet<()>,
    next_key: u64,
    /// The sources that have not announced all their nodes yet.
    unlisted: BTreeSet<NodeSource>,
    listed: watch::Sender<bool>,
    /// All that there was at the start is known and has been checked once. Before that all nodes are new together, and
    /// none has a reason to start more slowly than another.
    settled: bool,
    /// Something has changed that the snapshot does not show yet.
    changed: bool,
    /// Nodes whose metrics are to go once no snapshot has them.
    left: Vec<NodeKey>,
}

/// The dependencies of a keeper.
pub struct KeeperContext {
    /// Where the snapshots go.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// How nodes are checked.
    pub checks: HealthChecks,
    /// What purges and health checks to every Varnish carry.
    pub headers: SecretHeaders,
    /// The zone of this clearcoat, if it is known.
    pub zone: Option<Arc<str>>,
    /// How long a node is kept that its source does not name any more.
    pub retain: Duration,
    /// Delivers purges to the Varnish nodes.
    pub deliveries: Arc<Deliveries>,
    /// Tries whether Varnish nodes carry purges out; `None` if that is off.
    pub trials: Option<Arc<Trials>>,
    /// Ramps up the traffic of new nodes.
    pub slow_start: Arc<SlowStart>,
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
    /// Where checkers send their results.
    pub events: mpsc::Sender<Event>,
    /// Counts its turns.
    pub heartbeat: Arc<Heartbeat>,
    /// Changes when a node cannot be reached: its name may have another address by now.
    pub doubted: watch::Sender<()>,
}

impl KeeperContext {
    /// Whether this Varnish may serve, if it is up.
    fn admits(&self, live: &Live) -> bool {
        self.deliveries.admits(live) && self.trials.as_ref().is_none_or(|trials| trials.admits(live))
    }
}

impl FleetKeeper {
    /// A keeper without nodes. `listed` turns true when each of the sources has announced its nodes of the start, and it is
    /// known what operators say of them.
    pub fn new(
        context: KeeperContext,
        sources: impl IntoIterator<Item = NodeSource>,
        listed: watch::Sender<bool>,
    ) -> Self {
        FleetKeeper {
            lost_nodes: LostNodes::new(context.retain),
            context,
            nodes: BTreeMap::new(),
            ejections: AllEjections::default(),
            shadowed: BTreeMap::new(),
            overrides: Arc::default(),
            probes: JoinSet::new(),
            next_key: 0,
            unlisted: sources.into_iter().collect(),
            listed,
            settled: false,
            changed: false,
            left: Vec::new(),
        }
    }

    /// Works until the process ends. `suspects` are nodes that failed a request; `checks` is how nodes are checked from now on.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut suspects: mpsc::Receiver<Suspicion>,
        mut overrides: watch::Receiver<Arc<KnownOverrides>>,
        mut checks: watch::Receiver<HealthChecks>,
    ) {
        // Before the first event, so that no drained node joins as one that serves.
        self.follow_operators(Arc::clone(&overrides.borrow_and_update()));
        let mut together = Vec::with_capacity(TOGETHER);
        let mut beats = tokio::time::interval(BEAT_EVERY);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.context.heartbeat.beat();
            tokio::select! {
                // A verdict that is there decides before a suspicion asks for another check.
                biased;
                taken = events.recv_many(&mut together, TOGETHER) => {
                    if taken == 0 {
                        return;
                    }
                    self.take(together.drain(..));
                }
                changed = overrides.changed() => match changed {
                    Ok(()) => self.follow_operators(Arc::clone(&overrides.borrow_and_update())),
                    // The store is gone, and the process is ending.
                    Err(_) => return,
                },
                Ok(()) = checks.changed() => {
                    let checks = checks.borrow_and_update().clone();
                    self.check_by(checks);
                }
                () = until(self.due()) => self.take([]),
                _ = beats.tick() => {}
                Some(suspicion) = suspects.recv() => self.suspect(suspicion, now()),
                // A checker that was stopped with its node, or that panicked: the set only has to be emptied.
                Some(ended) = self.probes.join_next() => if let Err(error) = ended && error.is_panic() {
                    tracing::error!(error = %causes(&error), "a health checker panicked");
                },
            }
        }
    }

    /// Applies events and due decisions, and publishes the result.
    fn take(&mut self, events: impl IntoIterator<Item = Event>) {
        let now = now();
        events.into_iter().for_each(|event| self.apply(event, now));
        self.decide(now);
        self.settle_ejections(now);
        if std::mem::take(&mut self.changed) {
            self.publish();
            // Not before: whoever has the old snapshot would bind their series anew.
            let left = std::mem::take(&mut self.left).into_iter().filter(|identity| !self.nodes.contains_key(identity));
            left.for_each(|(role, id)| self.context.metrics.forget(role, &id));
        }
        // Its waiters read the fleet next.
        if self.unlisted.is_empty() && self.overrides.is_complete {
            self.listed.send_if_modified(|listed| !std::mem::replace(listed, true));
        }
        self.settle();
    }

    /// Takes what operators say now.
    fn follow_operators(&mut self, overrides: Arc<KnownOverrides>) {
        self.overrides = overrides;
        for (identity, state) in &mut self.nodes {
            let says = self.overrides.overrides.of(identity);
            if state.node.operator != says {
                state.revise(state.node.spec.clone(), says);
                self.changed = true;
            }
        }
        self.take([]);
    }

    /// Checks nodes in another way from now on. What is known of their health stays.
    fn check_by(&mut self, checks: HealthChecks) {
        self.context.checks = checks;
        for state in self.nodes.values_mut() {
            let probe = Probe::new(&state.node.spec, &self.context.checks);
            if !probe.is_as(&state.probe) {
                state.probe_task.abort();
                state.probe = probe;
                let checks =
                    state.probe.clone().run(state.node.endpoint_id, state.health.clone(), self.context.events.clone());
                state.probe_task = self.probes.spawn(checks);
            }
        }
        // The panic threshold may be another.
        self.changed = true;
        self.take([]);
    }

    fn apply(&mut self, event: Event, now: Instant) {
        match event {
            Event::Joined(spec) => self.join(spec),
            Event::Left(source, role, id) => self.lose(source, (role, id), true, now),
            Event::Vanished(source, role, id) => self.lose(source, (role, id), false, now),
            Event::Listed(source) => _ = self.unlisted.remove(&source),
            Event::Checked(check) => self.checked(check, now),
        }
    }

    fn checked(&mut self, check: CheckResult, now: Instant) {
        let identity = (check.role, check.id);
        let endpoint_id = check.endpoint_id;
        let Some(state) = self.nodes.get_mut(&identity).filter(|state| state.node.endpoint_id == endpoint_id) else {
            return;
        };
        state.was_checked = true;
        if let Verdict::NotAsked(reason) = &check.verdict {
            return self.context.metrics.files.probe.note(reason);
        }
        if check.verdict != Verdict::Passed {
            self.context.doubted.send_replace(());
        }
        if check.role == Role::Varnish && check.verdict == Verdict::Passed {
            self.context.deliveries.record_health_check(&state.node, check.began, check.took);
        }
        if !state.judge(check.verdict, &self.context.checks) {
            return;
        }
        self.changed = true;
        if check.role == Role::Varnish {
            self.context.deliveries.health_changed(state.node.id());
            if let Some(trials) = self.context.trials.as_ref().filter(|_| state.health.health() == Health::Up) {
                trials.wake(state.node.id());
            }
        }
        let health = state.health.health();
        self.health_changed(&identity, health, now);
        if health == Health::Down && self.lost_nodes.leaves_when_down(&identity) {
            self.leave(&identity);
        }
    }

    fn settle(&mut self) {
        let all_checked = || self.nodes.values().all(|state| state.was_checked);
        self.settled = self.settled || (*self.listed.borrow() && all_checked());
    }

    fn publish(&self) {
        let KeeperContext { fleet, checks, deliveries, zone, .. } = &self.context;
        let members = |role| {
            let of_role = self.nodes.iter().filter(move |((of, _), _)| *of == role);
            of_role
                .map(|(identity, state)| {
                    state.member(self.lost_nodes.is_absent(identity), self.ejections.of(role).of(&identity.1).cloned())
                })
                .collect()
        };
        let before = fleet.load();
        let version = before.version + 1;
        let zone = zone.as_deref();
        let web = Pool::new(members(Role::Web), checks.web.panic_threshold, zone).remembering(&before.web);
        if web.panics() && !before.web.panics() {
            tracing::warn!("too few web nodes are up: their health is ignored until more are");
        }
        // Caches are never used against their health: a sick one can be skipped, the web nodes cannot.
        let varnish = Pool::new(members(Role::Varnish), 0.0, zone).remembering(&before.varnish);
        if self.settled {
            self.start_slowly(&web, &before.web);
            self.start_slowly(&varnish, &before.varnish);
        }
        fleet.store(Arc::new(Snapshot { version, web, varnish }));
        deliveries.notify_progress();
    }

    /// Those that are up and come into traffic start slowly. A node that had traffic before (a web node that was
    /// used in spite of its health, say) keeps its share.
    fn start_slowly(&self, now: &Pool, before: &Pool) {
        let had_traffic = |node: &Node| {
            before.get(node.id()).is_some_and(|was| was.usable && was.node.endpoint_id == node.endpoint_id)
        };
        let up = now.members().iter().filter(|member| member.usable && member.health == Health::Up);
        up.filter(|member| !had_traffic(&member.node)).for_each(|member| self.context.slow_start.begin(&member.node));
    }
}

/// The time by the runtime's clock, which tests stop.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
