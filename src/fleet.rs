//! What a fleet is: nodes, their health, and one immutable snapshot of all of them.
//!
//! Three kinds of facts about a node live apart on purpose, because they change at different speeds and are written
//! by different hands:
//!
//! - [`NodeSpec`]: what the registry says (address, weight). Changes rarely, written by the registry.
//! - [`Health`] and membership: what the [`Snapshot`] holds. Written by one task, the fleet keeper, which publishes
//!   a whole new snapshot for every change, so that a request never sees half of one.
//! - [`Live`]: counters that change with every request and every purge. Atomics behind an `Arc` that outlives the
//!   snapshots and is carried over by the node's identity, so that a weight change forgets nothing.
//!
//! The fence is none of these: it is derived. A Varnish is *current* when its cursor has reached the last position
//! that was answered to anybody ([`Fence`]), so there is no flag that could be set too late or cleared too early.

mod event;
mod fence;
mod headers;
mod health;
mod life_signs;
mod lost_nodes;
mod node;
mod snapshot;

pub use event::{CheckResult, Event, Verdict};
pub use fence::Fence;
pub use headers::{FieldValue, PurgeHeaders};
pub use health::{Health, HealthState, Thresholds};
pub use life_signs::{LANDING, LifeSigns};
pub use lost_nodes::{GATHER, LossDecision, LostNodes, WINDOW};
pub use node::{
    DEFAULT_HEADER_LIMIT, InvalidNodeId, Live, Node, NodeId, NodeKey, NodeSource, NodeSpec, PurgeDialect, Role,
    SendProxy, ServingState, TrialState, WHOLE_SHARE, is_another_life,
};
pub use snapshot::{Member, Pool, Snapshot};
