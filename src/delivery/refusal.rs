//! What a node may refuse of a purge for itself: a request that is forwarded as it came, or a pool (not every VCL knows them).
//!
//! Such a target can be long, so it is compared by its fingerprint. All other targets are bans of our own form, which a node
//! must accept.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::Arc;

use crate::fleet::NodeId;
use crate::journal::Position;
use crate::purge::{Ban, Purge, Target};

/// What of a purge a node may refuse for itself: a request that is handed on, or a pool (not every VCL knows them).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusable {
    pub(super) fingerprint: u64,
    pub(super) is_handed_on: bool,
}

impl Refusable {
    /// That of this purge, if there is any. A request names one at most.
    pub fn of(purge: &Purge) -> Option<Self> {
        purge.targets.iter().find_map(|target| {
            let is_handed_on = matches!(target, Target::Forward(_));
            fingerprint(target).map(|fingerprint| Refusable { fingerprint, is_handed_on })
        })
    }
}

/// Nodes that do not take a purge though they take others, and why.
pub type Refusals = Vec<(NodeId, Arc<str>)>;

/// Targets with this fingerprint that a node does not take though it takes others: those of purges after the first position
/// up to the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) fingerprint: u64,
    pub(super) after: Position,
    pub(super) last: Position,
}

impl Refused {
    /// Whether such a target of the purge at this position is one of them.
    pub(super) fn includes(&self, fingerprint: u64, position: Position) -> bool {
        self.fingerprint == fingerprint && self.after < position && position <= self.last
    }
}

/// What is to be done for a purge that a node does not take, before it may be passed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owed {
    /// Nothing: whoever waits for it is told, or was.
    #[default]
    Nothing,
    /// A ban of everything. Of a purge that may have been refused to its sender no more is asked.
    Flush,
    /// One that is shown to drop what has no tags as well.
    FlushOfAll,
}

/// What stands for a target that a node may refuse for itself, and that can be long; `None` for one that it must take.
pub(super) fn fingerprint(target: &Target) -> Option<u64> {
    match target {
        Target::Forward(forward) => Some(hash(forward)),
        Target::Pool(pattern) => Some(hash(pattern.as_str())),
        Target::All | Target::Everything | Target::Tags(_) | Target::Pattern(_) => None,
    }
}

/// The same of what a node is sent.
pub(super) fn fingerprint_of_ban(ban: &Ban) -> Option<u64> {
    match ban {
        Ban::Forward(forward) => Some(hash(forward)),
        Ban::Pool { pattern, .. } => Some(hash(&**pattern)),
        Ban::Everything | Ban::Tags { .. } | Ban::Keys { .. } => None,
    }
}

fn hash<T: Hash + ?Sized>(what: &T) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(what)
}
