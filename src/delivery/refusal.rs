//! Targets that a node may refuse although it accepts others: a request that is forwarded as it came, or a pool, which not
//! every VCL knows.
//!
//! Such a target can be long, so it is compared by its fingerprint. All other targets become bans of our own form, which a
//! node must accept.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::Arc;

use crate::fleet::NodeId;
use crate::journal::Position;
use crate::purge::{Ban, Purge, Target};

/// The part of a purge that a node may refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusable {
    pub(super) fingerprint: u64,
    pub(super) is_handed_on: bool,
}

impl Refusable {
    /// The refusable part of this purge, if it has one. A request names one at most.
    pub fn of(purge: &Purge) -> Option<Self> {
        purge.targets.iter().find_map(|target| {
            let is_handed_on = matches!(target, Target::Forward(_));
            fingerprint(target).map(|fingerprint| Refusable { fingerprint, is_handed_on })
        })
    }
}

/// Nodes that refuse a purge although they accept others, with their reasons.
pub type Refusals = Vec<(NodeId, Arc<str>)>;

/// A refused target by its fingerprint, in purges after `after`, up to `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) fingerprint: u64,
    pub(super) after: Position,
    pub(super) last: Position,
}

impl Refused {
    /// Whether this covers a target of the purge at this position.
    pub(super) fn includes(&self, fingerprint: u64, position: Position) -> bool {
        self.fingerprint == fingerprint && self.after < position && position <= self.last
    }
}

/// What a node must carry out before a purge that it refuses may be passed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owed {
    /// Nothing: the sender is told of the refusal.
    #[default]
    Nothing,
    /// A ban of everything. Enough for a purge that may have been refused to its sender.
    Flush,
    /// A ban of everything that is confirmed to drop pages without tags, too.
    FlushOfAll,
}

/// The fingerprint of a target that a node may refuse; `None` for one that it must accept.
pub(super) fn fingerprint(target: &Target) -> Option<u64> {
    match target {
        Target::Forward(forward) => Some(hash(forward)),
        Target::Pool(pattern) => Some(hash(pattern.as_str())),
        Target::All | Target::Everything | Target::Tags(_) | Target::Pattern(_) => None,
    }
}

/// The same for a request to a node.
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
