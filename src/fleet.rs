//! A fleet: nodes, their health, and one immutable snapshot of all of them.
//!
//! Four kinds of facts about a node are separate, because they change at different rates and have different writers:
//!
//! - [`NodeSpec`]: the registry's data (address, weight). Changes rarely, written by the registry.
//! - [`NodeOverride`]: what an operator says of it while clearcoat runs. Outlives the node's registration.
//! - [`Health`] and membership: in the [`Snapshot`]. Written by one task, the fleet keeper, which publishes a complete
//!   new snapshot for every change, so that a request never sees a partial one.
//! - [`Live`]: counters that change with every request and every purge. Atomics behind an `Arc` that outlives the
//!   snapshots and follows the node's identity, so that a weight change resets nothing.
//!
//! The fence is derived from these. A Varnish is *current* when its cursor has reached the last position that was
//! answered to a client ([`Fence`]), so there is no flag that could be set too late or cleared too early.

mod candidates;
mod ejection;
mod event;
mod failure_streak;
mod fault;
mod fence;
mod headers;
mod health;
mod life_signs;
mod lost_nodes;
mod member;
mod node;
mod node_override;
mod overrides;
mod peak_latency;
mod rank_memo;
mod seal_standing;
mod snapshot;
mod suspicion;
mod varnish;

pub use candidates::{Candidates, LoadEstimate, Tickets, WHOLE_TRAFFIC, WeightGroup};
pub use ejection::{Ejection, EjectionTerms, Ejections, LEAST_LASTING, ServingNode};
pub use event::{CheckResult, Event, Verdict};
pub use failure_streak::{FailureStreak, Streak};
pub use fault::{FaultKind, NodeFault};
pub use fence::Fence;
pub use headers::{FieldValue, SecretHeaders};
pub use health::{Health, HealthState, Thresholds};
pub use life_signs::{FILL_LATENCY, LifeSigns};
pub use lost_nodes::{GATHER, LossDecision, LostNodes, WINDOW};
pub use member::Member;
pub use node::{
    AskedCache, InvalidNodeId, InvalidNodeKey, Live, Node, NodeId, NodeKey, NodeSource, NodeSpec, Reliance, Role,
    ServingState, TrialState, WHOLE_SHARE, node_key, spread_bits,
};
pub use node_override::{NodeOverride, OverrideChange};
pub use overrides::{MAX_OVERRIDES, NamedOverride, Overrides, TooManyOverrides, VersionedOverride};
pub use peak_latency::{FAILURE_COST, PeakLatency};
pub use rank_memo::{REMEMBERED, RankMemo, Ranks};
pub use seal_standing::{CacheDoubts, ReturnsSeals, SealStanding, SealsShown};
pub use snapshot::{Pool, Snapshot};
pub use suspicion::{RequestFault, Suspicion};
pub use varnish::{DEFAULT_HEADER_LIMIT, PurgeDialect, SendProxy, VarnishSettings, is_another_life};
