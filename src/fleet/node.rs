//! One node: its identity, its registry data, and its live counters.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{
    FailureStreak, LifeSigns, NodeOverride, PeakLatency, ReturnsSeals, SealStanding, SendProxy, VarnishSettings,
};

/// The function of a node in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A web server that renders pages.
    Web,
    /// A Varnish cache.
    Varnish,
}

impl Role {
    /// The name in configuration, metrics and the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Web => "web",
            Role::Varnish => "varnish",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The stable name of a node. Identity never depends on the address or the weight: the cursor, the health and the
/// position in the hash all follow the id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId(Arc<str>);

/// What tells a node from every other: ids are unique within a role.
pub type NodeKey = (Role, NodeId);

/// Why a text names no node.
#[derive(Debug, thiserror::Error)]
pub enum InvalidNodeKey {
    /// It does not begin with a role.
    #[error("wanted web/<id> or varnish/<id>")]
    Role,
    /// What follows is no id.
    #[error(transparent)]
    Id(#[from] InvalidNodeId),
}

/// The node that is named as `<role>/<id>`, as keys in etcd and paths of the admin API do.
///
/// # Errors
/// [`InvalidNodeKey`].
pub fn node_key(text: &str) -> Result<NodeKey, InvalidNodeKey> {
    let (role, id) = text.split_once('/').ok_or(InvalidNodeKey::Role)?;
    let role = [Role::Web, Role::Varnish].into_iter().find(|known| known.as_str() == role);
    Ok((role.ok_or(InvalidNodeKey::Role)?, NodeId::try_from(id)?))
}

/// Why a node id was refused.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a node id: 1 to 128 characters of A-Z a-z 0-9 . _ : - are allowed")]
pub struct InvalidNodeId(String);

impl NodeId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for NodeId {
    type Error = InvalidNodeId;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        if id.is_empty() || id.len() > 128 || !id.bytes().all(allowed) {
            return Err(InvalidNodeId(id));
        }
        Ok(NodeId(id.into()))
    }
}

impl TryFrom<&str> for NodeId {
    type Error = InvalidNodeId;

    fn try_from(id: &str) -> Result<Self, Self::Error> {
        NodeId::try_from(id.to_owned())
    }
}

impl From<NodeId> for String {
    fn from(id: NodeId) -> String {
        id.0.as_ref().to_owned()
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who knows of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeSource {
    /// The configuration file. What it says of a node counts before what anybody else says of one with the same name.
    #[default]
    Static,
    /// etcd.
    Etcd,
    /// DNS.
    Dns,
    /// Kubernetes.
    Kubernetes,
}

/// Whether a node that registers itself wants traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServingState {
    /// It serves.
    #[default]
    Up,
    /// It is about to go: no new traffic, but purges all the same.
    Drain,
}

/// What was seen of a Varnish when a page of our own was purged there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum TrialState {
    /// No result yet.
    #[default]
    Untried,
    /// The page was dropped.
    Passed,
    /// The result could not be observed.
    Inconclusive,
    /// The page stayed in every form of purge by tag: perhaps the VCL purges by URL alone.
    WithoutTags,
    /// The page stayed, but another `delivery` would drop it.
    Failed,
}

impl TrialState {
    const ALL: [TrialState; 5] = [
        TrialState::Untried,
        TrialState::Passed,
        TrialState::Inconclusive,
        TrialState::WithoutTags,
        TrialState::Failed,
    ];
}

/// What the registry says about one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Who says so.
    pub source: NodeSource,
    /// Its stable name, unique within its role.
    pub id: NodeId,
    /// Its address.
    pub address: SocketAddr,
    /// Its registered share of the traffic relative to its peers. 0 means drain: no new traffic, but purges.
    pub weight: u32,
    /// Where it stands.
    pub zone: Option<Arc<str>>,
    /// Further data for people and their tools.
    pub labels: BTreeMap<String, String>,
    /// What is said of a Varnish. `None` makes it a web node: there is no other mark of the role.
    pub varnish: Option<VarnishSettings>,
}

impl NodeSpec {
    /// A node with defaults for everything else.
    pub fn new(role: Role, id: NodeId, address: SocketAddr) -> Self {
        NodeSpec {
            source: NodeSource::default(),
            id,
            address,
            weight: 1,
            zone: None,
            labels: BTreeMap::new(),
            varnish: (role == Role::Varnish).then(VarnishSettings::default),
        }
    }

    /// What it does.
    pub fn role(&self) -> Role {
        match self.varnish {
            Some(_) => Role::Varnish,
            None => Role::Web,
        }
    }

    /// The life of its cache, if it has one and that is named.
    pub fn epoch(&self) -> Option<&Arc<str>> {
        self.varnish.as_ref().and_then(|varnish| varnish.epoch.as_ref())
    }

    /// Whether connections to it start with a PROXY header.
    pub fn send_proxy(&self) -> SendProxy {
        self.varnish.as_ref().map_or(SendProxy::Off, |varnish| varnish.send_proxy)
    }

    /// Whether existing connections and cursors stay valid when the spec changes to `other`.
    pub fn is_reached_as(&self, other: &NodeSpec) -> bool {
        let is_same_varnish = match (&self.varnish, &other.varnish) {
            (Some(mine), Some(others)) => mine.is_reached_as(others),
            (None, None) => true,
            _ => false,
        };
        self.address == other.address && is_same_varnish
    }
}

/// One node of one snapshot: its registry data, and the counters that outlive it.
#[derive(Debug)]
pub struct Node {
    /// The registry's data.
    pub spec: NodeSpec,
    /// What an operator says of it.
    pub operator: NodeOverride,
    /// Its share of the traffic relative to its peers, by the registry and the operator. 0: no new traffic, but purges.
    pub weight: u32,
    /// The counters, which survive changes of the spec.
    pub live: Arc<Live>,
    /// Identifies this pair of id and address within the process: connections are pooled under it, so that none to an
    /// old address is used after a change.
    pub endpoint_id: u64,
    /// The node's seed in the rendezvous hash, derived from the id alone: a hash of it, [spread](spread_bits).
    pub seed: u64,
}

impl Node {
    /// A node of the fleet keeper. `endpoint_id` is unique in the process.
    pub fn new(spec: NodeSpec, live: Arc<Live>, endpoint_id: u64) -> Self {
        let seed = spread_bits(xxhash_rust::xxh3::xxh3_64(spec.id.as_str().as_bytes()));
        let (operator, weight) = (NodeOverride::default(), spec.weight);
        Node { spec, operator, weight, live, endpoint_id, seed }
    }

    /// The node as an operator wants it.
    pub fn overridden(mut self, operator: NodeOverride) -> Self {
        let is_drained = operator.drained_at_ms.is_some();
        self.weight = if is_drained { 0 } else { operator.weight_over(self.spec.weight) };
        self.operator = operator;
        self
    }

    /// The stable name.
    pub fn id(&self) -> &NodeId {
        &self.spec.id
    }
}

/// Spreads the bits of a word, so that it can be mixed with another one by an exclusive or. Done once for a seed, and not
/// for each request.
pub fn spread_bits(word: u64) -> u64 {
    word.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The share of a node with its full traffic, and the unit of shares.
pub const WHOLE_SHARE: u32 = 256;

/// Whether only seals keep something in a cache from readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Reliance {
    /// No: every purge was told to it in a way that finds every page.
    #[default]
    No,
    /// Yes, and its answers are judged by them.
    OnSeals,
    /// Yes, and they were seen not to show what it has, or nobody judges them: it must be flushed, whatever is seen later.
    OwesFlush,
}

/// What was known of a cache when it was asked, for its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AskedCache {
    /// The position that it had acknowledged.
    pub position: u64,
    /// Purges that a seal shows did not wait for it.
    pub is_sealing: bool,
    /// It relied on seals ([`Live::relies_on_seals`]).
    pub relied: bool,
    /// It was not known to return them, though it relied on them ([`Live::may_hide_seals`]).
    pub hid_seals: bool,
}

impl AskedCache {
    /// Whether what it answers without a seal may be a page that only its seal kept from readers. Also if it has been flushed
    /// since, as the answer may have left before that.
    pub fn may_hide_seals(&self, now: &Live) -> bool {
        self.hid_seals || now.may_hide_seals() || self.relied && now.seals.returned() != ReturnsSeals::Yes
    }
}

/// Counters of a node that change with every request and purge.
#[derive(Debug, Default)]
pub struct Live {
    inflight: AtomicU32,
    cursor: AtomicU64,
    /// The last verdict of its health checks.
    down: AtomicBool,
    /// How much of it counts: one more than the position; 0 means all.
    recalled: AtomicU64,
    /// A [`Reliance`].
    reliance: AtomicU8,
    /// Its answers have raised a question that a trial answers.
    is_questioned: AtomicBool,
    /// When it was seen to run.
    pub life_signs: LifeSigns,
    /// How long its answers take to begin, if the listener's policy asks for that.
    pub latency: PeakLatency,
    /// The requests of clients that it failed in a row.
    pub failures: FailureStreak,
    /// The difference to [`WHOLE_SHARE`].
    withheld: AtomicU32,
    /// A [`TrialState`].
    trial: AtomicU8,
    /// Whether it returns seals, and has nothing without one.
    pub seals: SealStanding,
}

impl Live {
    /// The result of the last trial.
    pub fn trial(&self) -> TrialState {
        let state = self.trial.load(Ordering::SeqCst);
        TrialState::ALL.into_iter().find(|known| *known as u8 == state).unwrap_or_default()
    }

    /// Records the result of a trial.
    pub fn set_trial(&self, state: TrialState) {
        self.trial.store(state as u8, Ordering::SeqCst);
    }

    /// The node's current share: 1 to [`WHOLE_SHARE`].
    pub fn share(&self) -> u32 {
        WHOLE_SHARE - self.withheld.load(Ordering::Relaxed)
    }

    /// Sets the share, clamped to its bounds.
    pub fn set_share(&self, share: u32) {
        self.withheld.store(WHOLE_SHARE - share.clamp(1, WHOLE_SHARE), Ordering::Relaxed);
    }

    /// Requests in flight on this node.
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// Counts a request to the node. Pair with [`Live::request_ended`].
    pub fn request_began(&self) {
        self.inflight.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request to the node, if it has fewer than `limit` in flight; all threads together never put more there. Returns
    /// whether it was counted.
    pub fn try_begin_request(&self, limit: NonZeroU32) -> bool {
        let one_more = |inflight: u32| (inflight < limit.get()).then(|| inflight + 1);
        self.inflight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok()
    }

    /// Whether it has fewer requests in flight than `limit`; `None` is no limit. Others may take what is left meanwhile.
    pub fn has_room(&self, limit: Option<NonZeroU32>) -> bool {
        limit.is_none_or(|limit| self.inflight.load(Ordering::SeqCst) < limit.get())
    }

    /// Counts the end of a request, whatever its outcome. Whoever looks afterwards whether somebody waits for room (also `SeqCst`)
    /// sees all who did not see this.
    pub fn request_ended(&self) {
        self.inflight.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether its health checks found it down. Kept when the node leaves the fleet.
    pub fn is_down(&self) -> bool {
        self.down.load(Ordering::Relaxed)
    }

    /// Records the health checks' verdict. Only the fleet keeper calls this.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    /// The position up to which this Varnish has acknowledged every purge, limited by [`Live::recall`].
    pub fn cursor(&self) -> u64 {
        let cursor = self.acknowledged();
        match self.recalled.load(Ordering::SeqCst) {
            0 => cursor,
            recalled => cursor.min(recalled - 1),
        }
    }

    /// The same without the limit.
    pub fn acknowledged(&self) -> u64 {
        self.cursor.load(Ordering::SeqCst)
    }

    /// Limits the cursor to this position, whatever was acknowledged; `None` removes the limit.
    pub fn recall(&self, position: Option<u64>) {
        self.recalled.store(position.map_or(0, |position| position + 1), Ordering::SeqCst);
    }

    /// Whether its cache relies on seals.
    pub fn relies_on_seals(&self) -> bool {
        self.reliance.load(Ordering::SeqCst) != Reliance::No as u8
    }

    /// Whether it must be flushed before it serves, whatever it has acknowledged: its cache relies on seals, and it returns none, or
    /// nobody judges them.
    pub fn must_be_flushed(&self) -> bool {
        let reliance = self.reliance.load(Ordering::SeqCst);
        reliance == Reliance::OwesFlush as u8
            || reliance == Reliance::OnSeals as u8 && self.seals.returned() == ReturnsSeals::No
    }

    /// What is known of its cache, for the answer to a question that is sent now. `before`: what was known when it was chosen.
    pub fn asked_cache(&self, before: AskedCache) -> AskedCache {
        AskedCache {
            position: self.cursor(),
            is_sealing: before.is_sealing || self.seals.is_sealing(),
            relied: before.relied || self.relies_on_seals(),
            hid_seals: before.hid_seals || self.may_hide_seals(),
        }
    }

    /// Whether an answer without a seal may come from a page that only its seal kept from readers: its cache relies on seals, and
    /// it is not known to return them, or was seen not to and is yet to be flushed.
    pub fn may_hide_seals(&self) -> bool {
        self.must_be_flushed() || self.relies_on_seals() && self.seals.returned() != ReturnsSeals::Yes
    }

    /// Records whether its cache relies on seals. Only its delivery calls this.
    pub fn set_reliance(&self, reliance: Reliance) {
        self.reliance.store(reliance as u8, Ordering::SeqCst);
    }

    /// Records that its answers leave in doubt whether it returns seals. Returns whether that is new since its last trial began.
    pub fn question(&self) -> bool {
        // Most often it is not.
        !self.is_questioned.load(Ordering::Relaxed) && !self.is_questioned.swap(true, Ordering::SeqCst)
    }

    /// Records that a trial begins, which answers what was in question.
    pub fn trial_begins(&self) {
        self.is_questioned.store(false, Ordering::SeqCst);
    }

    /// Records that the Varnish has acknowledged every purge up to `position`. Only its delivery task calls this.
    pub fn set_cursor(&self, position: u64) {
        self.cursor.store(position, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_named_by_its_role_and_its_id() {
        let (role, id) = node_key("varnish/10.0.1.5:6081").unwrap();
        assert_eq!((role, id.as_str()), (Role::Varnish, "10.0.1.5:6081"));
        for bad in ["", "web", "web/", "a", "varnishes/a", "WEB/a", "/web/a", "web/a/b", "web/a b"] {
            assert!(node_key(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_operator_counts_before_the_registry_unless_that_wants_nothing() {
        let spec = |weight| NodeSpec {
            weight,
            ..NodeSpec::new(Role::Web, NodeId::try_from("a").unwrap(), ([0; 4], 1).into())
        };
        let node = |weight, says| Node::new(spec(weight), Arc::default(), 1).overridden(says).weight;
        let drained = NodeOverride { drained_at_ms: Some(1), weight: std::num::NonZeroU16::new(5) };
        let weighted = NodeOverride { drained_at_ms: None, ..drained };
        assert_eq!([drained, weighted, NodeOverride::default()].map(|says| node(2, says)), [0, 5, 2]);
        assert_eq!([drained, weighted, NodeOverride::default()].map(|says| node(0, says)), [0, 0, 0]);
    }

    #[test]
    fn a_node_id_takes_names_and_addresses_but_no_path_and_no_blank() {
        for good in ["varnish-1", "10.0.1.5:6081", "a", "Web_2.eu"] {
            assert!(NodeId::try_from(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a/b", "ü", &"x".repeat(129)] {
            assert!(NodeId::try_from(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn all_threads_together_put_no_more_on_a_node_than_its_limit() {
        let (live, limit) = (Live::default(), NonZeroU32::new(3).unwrap());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        if live.try_begin_request(limit) {
                            assert!(live.inflight() <= 3);
                            live.request_ended();
                        }
                    }
                });
            }
        });
        assert_eq!((live.inflight(), live.has_room(Some(limit))), (0, true));
        (0..3).for_each(|_| assert!(live.try_begin_request(limit)));
        assert!(!live.try_begin_request(limit) && !live.has_room(Some(limit)) && live.has_room(None));
        live.request_began();
        assert!(!live.has_room(Some(limit)), "more than that by one without a limit");
    }
}
