//! One node: its identity, what the registry says about it, and its live counters.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{LifeSigns, PurgeHeaders};

/// What a node does in the fleet.
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
/// place in the hash all follow the id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeId(Arc<str>);

/// What tells a node from every other: ids are unique within a role.
pub type NodeKey = (Role, NodeId);

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
}

/// How a Varnish is told to drop pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PurgeDialect {
    /// `PURGE /` with `X-Magento-Tags-Pattern`, as Magento's own VCL understands it: the pattern goes into a ban, so any
    /// regular expression will do, and the cheapest one is sent.
    #[default]
    Magento,
    /// The same with the pattern as Magento itself writes it, for a VCL that takes the tags out of it.
    MagentoPlain,
    /// `PURGE /` with `xkey-purge` or `xkey-softpurge`, for a VCL that drops pages by vmod_xkey.
    Xkey,
}

impl fmt::Display for PurgeDialect {
    /// As the configuration has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PurgeDialect::Magento => "magento",
            PurgeDialect::MagentoPlain => "magento-plain",
            PurgeDialect::Xkey => "xkey",
        })
    }
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
    /// Nothing yet.
    #[default]
    Untried,
    /// The page was gone.
    Passed,
    /// It could not be seen.
    Inconclusive,
    /// The page stayed, in whatever form it was purged by its tags: a VCL that purges by URL alone, perhaps.
    WithoutTags,
    /// The page stayed, and would not have with another `delivery`.
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

/// Whether connections to a node start with a PROXY header (haproxy.org, doc/proxy-protocol.txt, section 2.2), so that
/// `client.ip` in its VCL is the client.
///
/// The listener of the Varnish must expect the header on every connection (`varnishd -a :6081,PROXY`): it drops a
/// connection that does not begin with one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SendProxy {
    /// They start with HTTP.
    #[default]
    Off,
    /// They start with a header of version 2.
    V2,
}

/// The longest header value that a Varnish is sent unless it says otherwise, in bytes. Varnish takes header lines of
/// 8 KiB by default (`http_req_hdr_len`); Magento itself stops at 7,680 for the same reason.
pub const DEFAULT_HEADER_LIMIT: usize = 7_680;

/// Whether these epochs name two lives of a cache. Where one of them is not known, it counts as the same.
pub fn is_another_life(before: Option<&str>, now: Option<&str>) -> bool {
    before.zip(now).is_some_and(|(before, now)| before != now)
}

/// What the registry says about one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Who says so.
    pub source: NodeSource,
    /// What it does.
    pub role: Role,
    /// Its stable name, unique within its role.
    pub id: NodeId,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its share of the traffic next to its peers. 0 means drain: no new traffic, purges all the same.
    pub weight: u32,
    /// How it is told to drop pages (Varnish only).
    pub delivery: PurgeDialect,
    /// The longest value of one request header that it takes, in bytes (Varnish only).
    pub header_limit: usize,
    /// Whether connections to it start with a PROXY header (Varnish only).
    pub send_proxy: SendProxy,
    /// Names the life of its cache (Varnish only): another epoch is another cache, and an empty one. `None` where nobody
    /// says: then it counts as the cache that was there before.
    pub epoch: Option<Arc<str>>,
    /// Where it stands, for people.
    pub zone: Option<Arc<str>>,
    /// What else there is to say of it, for people and their tools.
    pub labels: BTreeMap<String, String>,
    /// What purges and health checks to it carry (Varnish only). Secrets: written nowhere.
    #[serde(skip)]
    pub headers: PurgeHeaders,
}

impl NodeSpec {
    /// A node of which no more is known than this: everything else has its default.
    pub fn new(role: Role, id: NodeId, address: SocketAddr) -> Self {
        NodeSpec {
            source: NodeSource::default(),
            role,
            id,
            address,
            weight: 1,
            delivery: PurgeDialect::default(),
            header_limit: DEFAULT_HEADER_LIMIT,
            send_proxy: SendProxy::default(),
            epoch: None,
            zone: None,
            labels: BTreeMap::new(),
            headers: PurgeHeaders::default(),
        }
    }

    /// Whether what connects to the node by this spec may go on by the other one.
    pub fn is_reached_as(&self, other: &NodeSpec) -> bool {
        let reached = |spec: &NodeSpec| (spec.address, spec.delivery, spec.header_limit, spec.send_proxy);
        let another_life = is_another_life(self.epoch.as_deref(), other.epoch.as_deref());
        reached(self) == reached(other) && self.headers == other.headers && !another_life
    }
}

/// One node of one snapshot: what the registry says, and the counters that outlive it.
#[derive(Debug)]
pub struct Node {
    /// What the registry says.
    pub spec: NodeSpec,
    /// The counters that stay when the spec changes.
    pub live: Arc<Live>,
    /// Names this pair of identity and address within the process: connections are pooled under it, so that none
    /// to an old address is used after a change.
    pub endpoint_id: u64,
    /// The place of this node in the rendezvous hash; from the id alone.
    pub seed: u64,
}

impl Node {
    /// A node as the keeper makes it. `endpoint_id` is unique in the process.
    pub fn new(spec: NodeSpec, live: Arc<Live>, endpoint_id: u64) -> Self {
        let seed = xxhash_rust::xxh3::xxh3_64(spec.id.as_str().as_bytes());
        Node { spec, live, endpoint_id, seed }
    }

    /// The stable name.
    pub fn id(&self) -> &NodeId {
        &self.spec.id
    }
}

/// The share of a node that gets all it should: shares are counted in parts of this.
pub const WHOLE_SHARE: u32 = 256;

/// Counters of a node that change with every request and purge.
#[derive(Debug, Default)]
pub struct Live {
    inflight: AtomicU32,
    cursor: AtomicU64,
    /// Its health checks said so when they last changed their verdict.
    down: AtomicBool,
    /// How much of it counts: one more than the position; 0 is all.
    recalled: AtomicU64,
    /// When it was seen to run.
    pub life_signs: LifeSigns,
    /// What is missing to [`WHOLE_SHARE`].
    withheld: AtomicU32,
    /// A [`TrialState`].
    trial: AtomicU8,
}

impl Live {
    /// What came of the last trial.
    pub fn trial(&self) -> TrialState {
        let state = self.trial.load(Ordering::SeqCst);
        TrialState::ALL.into_iter().find(|known| *known as u8 == state).unwrap_or_default()
    }

    /// A trial has come to its end.
    pub fn set_trial(&self, state: TrialState) {
        self.trial.store(state as u8, Ordering::SeqCst);
    }

    /// How much of what it should get the node gets now: 1 to [`WHOLE_SHARE`].
    pub fn share(&self) -> u32 {
        WHOLE_SHARE - self.withheld.load(Ordering::Relaxed)
    }

    /// Gives the node this share; one that is out of bounds becomes the nearest that is not.
    pub fn set_share(&self, share: u32) {
        self.withheld.store(WHOLE_SHARE - share.clamp(1, WHOLE_SHARE), Ordering::Relaxed);
    }

    /// Requests that are at this node now.
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// One more request goes to the node. Pair with [`Live::request_ended`].
    pub fn request_began(&self) {
        self.inflight.fetch_add(1, Ordering::Relaxed);
    }

    /// A request at the node came to its end, whatever the end.
    pub fn request_ended(&self) {
        self.inflight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether its health checks found it down. Stays as it was when the node leaves the fleet.
    pub fn is_down(&self) -> bool {
        self.down.load(Ordering::Relaxed)
    }

    /// Takes what its health checks found. Only the fleet keeper calls this.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Relaxed);
    }

    /// The position up to which this Varnish has acknowledged every purge, as far as that counts.
    pub fn cursor(&self) -> u64 {
        let cursor = self.acknowledged();
        match self.recalled.load(Ordering::SeqCst) {
            0 => cursor,
            recalled => cursor.min(recalled - 1),
        }
    }

    /// The same, whether or not all of it counts at present.
    pub fn acknowledged(&self) -> u64 {
        self.cursor.load(Ordering::SeqCst)
    }

    /// Of what the Varnish has acknowledged only that counts which is not after this position; `None`: all of it.
    pub fn recall(&self, position: Option<u64>) {
        self.recalled.store(position.map_or(0, |position| position + 1), Ordering::SeqCst);
    }

    /// The Varnish has acknowledged every purge up to `position`. Only its delivery task calls this.
    pub fn set_cursor(&self, position: u64) {
        self.cursor.store(position, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_id_takes_names_and_addresses_but_no_path_and_no_blank() {
        for good in ["varnish-1", "10.0.1.5:6081", "a", "Web_2.eu"] {
            assert!(NodeId::try_from(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a/b", "ü", &"x".repeat(129)] {
            assert!(NodeId::try_from(bad).is_err(), "{bad}");
        }
    }
}
