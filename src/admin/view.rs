//! The fleet as it is shown: `/api/v1/fleet`, and the event of the same name.

use std::collections::{BTreeMap, HashMap};
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde::{Serialize, Serializer};

use super::AdminContext;
use super::last_minute::{LastMinute, NodeMemories};
use super::problems::Problem;
use super::standing::{CacheFacts, TrafficFacts, TrafficVerdict, unresolved};
use crate::clock;
use crate::fleet::{
    Health, Member, NodeId, NodeKey, NodeSource, PurgeDialect, Role, SendProxy, TrialState, WHOLE_SHARE,
};
use crate::journal::{Cursor, Lag, Position};
use crate::registry::RegistryStatus;
use crate::registry::fixed::UnresolvedName;
use crate::replicas;
use crate::vcl_push::NodeVcl;

/// The whole fleet.
#[derive(Serialize)]
pub(super) struct FleetView<'a> {
    version: u64,
    head: Position,
    fence: Position,
    journal: &'static str,
    /// What is wrong beside single nodes.
    problems: Vec<Problem>,
    /// Purges that are not in etcd yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    spooled: Option<usize>,
    /// The clearcoats before this fleet, this one first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replicas: Vec<replicas::View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registry: Option<RegistryView>,
    nodes: Vec<NodeView<'a>>,
    /// Requests that wait for a node with room.
    queues: [QueueView; 2],
    /// What operators say of nodes that are not here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    absent: Vec<AbsentView>,
}

/// The queue of a listener.
#[derive(Serialize)]
struct QueueView {
    listener: &'static str,
    /// Requests that wait, and how many may.
    waiting: i64,
    max_queue: usize,
}

/// What operators say of a node that has left, or has not come back yet.
#[derive(Serialize)]
struct AbsentView {
    role: Role,
    id: NodeId,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339")]
    drained_since: Option<u64>,
    /// Its weight in place of the registered one.
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<NonZeroU16>,
}

/// Where nodes come from, beside the configuration file.
#[derive(Serialize)]
pub(super) struct RegistryView {
    kind: NodeSource,
    pub(super) connected: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) revision: Option<i64>,
    pub(super) last_contact_seconds: f64,
    problem: Arc<str>,
}

#[derive(Serialize)]
struct NodeView<'a> {
    role: Role,
    id: &'a str,
    /// Of a name that does not resolve: the name.
    address: String,
    /// By its source and by operators. Of one that an operator has drained: what it has when it is resumed.
    weight: u32,
    /// What its source says, if an operator says something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    registered_weight: Option<u32>,
    /// Since when it is drained by an operator (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339")]
    drained_since: Option<u64>,
    /// Its share of the traffic in percent: below 100 in its slow start.
    share: u32,
    health: Health,
    /// Why its health check fails; empty if it does not.
    reason: &'a str,
    #[serde(flatten)]
    verdict: TrafficVerdict,
    /// Since when it gets traffic, or none (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339")]
    since: Option<u64>,
    inflight: u32,
    /// How many it may have at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_requests: Option<NonZeroU32>,
    /// The last minute.
    recent: LastMinute,
    source: NodeSource,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<&'a BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<&'a str>,
    /// It is absent from its source.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    retained: bool,
    #[serde(flatten)]
    varnish: Option<VarnishView>,
}

/// A saved cursor.
#[derive(Serialize)]
struct SavedView {
    cursor: Position,
    /// All that its cache has was stored since answers are sealed.
    seals: bool,
}

#[derive(Serialize)]
struct VarnishView {
    delivery: PurgeDialect,
    header_limit: usize,
    send_proxy: SendProxy,
    cursor: Position,
    /// What a start finds of it in the journal, once another purge is on disk; `null` if nothing.
    saved: Option<SavedView>,
    /// Purges that it has not acknowledged.
    lag: usize,
    /// The age of the oldest of them, if it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_seconds: Option<f64>,
    current: bool,
    /// It may serve: it has every purge that it must have for that.
    admitted: bool,
    /// Purges that a seal shows do not wait for it.
    seals: bool,
    /// Why they do, if they need not.
    #[serde(skip_serializing_if = "Option::is_none")]
    seals_not: Option<&'static str>,
    delivery_error: Arc<str>,
    /// What came of the last trial, and the finding in words if something is wrong.
    trial: TrialState,
    trial_finding: Arc<str>,
    /// Whether that keeps it out of traffic.
    trial_fenced: bool,
    /// How it stands with the VCL that is pushed to it; nothing while none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    vcl: Option<NodeVcl>,
}

/// A time in milliseconds since 1970, as text.
pub(super) fn rfc3339<S: Serializer>(at_ms: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    let at = UNIX_EPOCH + Duration::from_millis(at_ms.unwrap_or(0));
    serializer.collect_str(&humantime::format_rfc3339_millis(at))
}

/// How long ago the oldest purge was accepted that a node misses; `None` if that is not known.
pub(super) fn lag_age(lag: Lag) -> Option<Duration> {
    match lag {
        Lag { entries: 0, .. } => Some(Duration::ZERO),
        Lag { oldest_ms, .. } => oldest_ms.map(|at_ms| Duration::from_millis(clock::now_ms().saturating_sub(at_ms))),
    }
}

impl RegistryView {
    pub(super) fn of(registry: &RegistryStatus) -> Self {
        RegistryView {
            kind: registry.source(),
            connected: registry.is_connected(),
            revision: registry.revision(),
            last_contact_seconds: registry.silence().as_secs_f64(),
            problem: registry.problem().unwrap_or_default(),
        }
    }
}

impl AdminContext {
    /// Has `show` write the fleet as it is now.
    pub(super) fn with_fleet<T>(&self, memories: &NodeMemories, show: impl FnOnce(&FleetView) -> T) -> T {
        let fleet = self.fleet.load();
        let recent = [Role::Varnish, Role::Web].map(|role| memories.recent(role));
        let known = |identity: &NodeKey| recent.iter().find_map(|of_role| of_role.get(identity)).copied();
        let unresolved = self.unresolved.list();
        let overrides = self.overrides.known();
        let is_here = |identity: &NodeKey| {
            fleet.pool(identity.0).get(&identity.1).is_some() || unresolved.iter().any(|(known, _)| known == identity)
        };
        let absent = overrides.overrides.in_effect().filter(|(node, _)| !is_here(node)).map(|((role, id), says)| {
            AbsentView { role: *role, id: id.clone(), drained_since: says.drained_at_ms, weight: says.weight }
        });
        let members = fleet.varnish.members().iter().chain(fleet.web.members());
        let saved = self.journal.cursors();
        let nodes = members.map(|member| {
            let identity = (member.node.spec.role(), member.node.id().clone());
            let mut view = self.node(member, &saved);
            view.since = memories.since_ms(&identity, view.verdict.gets_traffic);
            view.recent = known(&identity).unwrap_or_default();
            view
        });
        let without_address =
            unresolved.iter().map(|((role, id), name)| NodeView::without_address(*role, id.as_str(), name));
        let replicas = self.replicas.as_ref().map_or_else(Vec::new, |replicas| replicas.view());
        let registry = self.registry.as_ref().map(RegistryView::of);
        show(&FleetView {
            version: fleet.version,
            head: self.journal.head(),
            fence: self.fence.position(),
            journal: self.journal_kind,
            problems: self.problems(&replicas),
            spooled: self.spooled(),
            replicas,
            registry,
            nodes: nodes.chain(without_address).collect(),
            queues: [("edge", Role::Varnish), ("origin", Role::Web)].map(|(listener, role)| QueueView {
                listener,
                waiting: self.metrics.queue.length(role).get(),
                max_queue: self.settings.load().terms(role).max_queue,
            }),
            absent: absent.collect(),
        })
    }

    /// Purges that are not in etcd yet.
    pub(super) fn spooled(&self) -> Option<usize> {
        self.replicas.as_ref().and_then(|replicas| replicas.spooled())
    }

    /// Whether a node gets traffic.
    pub(super) fn serves(&self, member: &Member) -> bool {
        self.node(member, &HashMap::new()).verdict.gets_traffic
    }

    fn node<'m>(&self, member: &'m Member, saved: &HashMap<NodeId, Cursor>) -> NodeView<'m> {
        let spec = &member.node.spec;
        let live = &member.node.live;
        let operator = &member.node.operator;
        let weight = operator.weight_over(spec.weight);
        let lag = self.journal.lag(live.cursor());
        let undelivered = spec.varnish.as_ref().and_then(|_| self.deliveries.fault(&spec.id));
        let varnish = spec.varnish.as_ref().map(|settings| VarnishView {
            delivery: settings.delivery,
            header_limit: settings.header_limit,
            send_proxy: settings.send_proxy,
            cursor: live.cursor(),
            saved: saved.get(&spec.id).map(|saved| SavedView { cursor: saved.position, seals: saved.is_sealed }),
            lag: lag.entries,
            lag_seconds: lag_age(lag).map(|age| age.as_secs_f64()),
            current: self.fence.is_current(live),
            admitted: self.fence.admits(live),
            seals: live.seals.is_sealing(),
            seals_not: self.deliveries.why_not_sealing(live),
            delivery_error: undelivered.as_ref().map_or_else(|| "".into(), |fault| Arc::clone(&fault.text)),
            trial: live.trial(),
            trial_finding: self.trials.finding(&spec.id),
            trial_fenced: !self.trials.admits(live),
            vcl: self.vcl_push.of(&spec.id),
        });
        let share = live.share() * 100 / WHOLE_SHARE;
        let max_requests = self.settings.load().terms(spec.role()).max_per_node;
        let facts = TrafficFacts {
            role: spec.role(),
            address: spec.address,
            weight: member.node.weight,
            drained_at_ms: operator.drained_at_ms,
            usable: member.usable,
            health: member.health,
            fault: member.fault.as_ref(),
            ejection: member.ejection.as_ref().map(|out| (out, out.until.saturating_duration_since(Instant::now()))),
            share,
            reached: max_requests.filter(|_| !live.has_room(max_requests)).map(NonZeroU32::get),
            cache: varnish.as_ref().map(|varnish| CacheFacts {
                admitted: varnish.admitted,
                trial_fenced: varnish.trial_fenced,
                trial_finding: &varnish.trial_finding,
                lag: varnish.lag,
                lag_age: varnish.lag_seconds.map(Duration::from_secs_f64),
                fault: undelivered.as_ref(),
            }),
        };
        NodeView {
            role: spec.role(),
            id: spec.id.as_str(),
            address: spec.address.to_string(),
            weight,
            registered_weight: (weight != spec.weight).then_some(spec.weight),
            drained_since: operator.drained_at_ms,
            share,
            health: member.health,
            reason: member.fault.as_ref().map_or("", |fault| &fault.text),
            verdict: facts.verdict(),
            since: None,
            inflight: live.inflight(),
            max_requests,
            recent: LastMinute::default(),
            source: spec.source,
            zone: spec.zone.as_deref(),
            labels: Some(&spec.labels).filter(|labels| !labels.is_empty()),
            epoch: spec.epoch().map(|epoch| &**epoch),
            retained: member.retained,
            varnish,
        }
    }
}

impl<'a> NodeView<'a> {
    /// A node of the configuration that is not in the fleet.
    fn without_address(role: Role, id: &'a str, name: &UnresolvedName) -> Self {
        NodeView {
            role,
            id,
            address: name.name.clone(),
            weight: 0,
            registered_weight: None,
            drained_since: None,
            share: 0,
            health: Health::Unknown,
            reason: "",
            verdict: unresolved(&name.reason),
            since: None,
            inflight: 0,
            max_requests: None,
            recent: LastMinute::default(),
            source: NodeSource::Static,
            zone: None,
            labels: None,
            epoch: None,
            retained: false,
            varnish: None,
        }
    }
}
