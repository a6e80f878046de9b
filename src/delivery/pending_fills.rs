//! The pages that are on their way to a node while it is told to drop them.
//!
//! A ban finds what is stored, and a page that is still in a socket, or lost on the wire and sent again, is stored after it.
//! The guard knows which answers are under way ([`Guard::under_way`](crate::purge::Guard::under_way)). Purges that concern
//! one of them are told once more when it has arrived and Varnish has had [`FILL_LATENCY`] to make an object of it. How long the
//! way takes is nobody's guess: it ends when the last byte is acknowledged, or the connection is closed.

use std::mem::discriminant;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fleet::{FILL_LATENCY, Snapshot};
use crate::journal::{Entry, Journal, Missed, Position};
use crate::purge::{Guard, Purge, Target};

/// How often the guard is asked whether a page has arrived.
pub(super) const POLL: Duration = Duration::from_millis(10);

/// Purges that are looked at one by one; more of them concern any page with tags, or with what else they ask for.
const MAX_PURGES: usize = 1_000;

/// When a page that does not arrive is worth a word.
const LONG: Duration = Duration::from_secs(2);

/// The purges of a range that concern pages which may be under way.
#[derive(Debug)]
pub(super) struct PendingFills {
    waiting: Vec<Arc<Entry>>,
    began: Instant,
    /// When a page that they concern last passed, or arrived, as it was known when it was not under way any more.
    pub(super) passed: Option<Instant>,
    /// Something was under way when it was last looked at.
    waited: bool,
}

impl PendingFills {
    /// What follows `after` up to `last`.
    pub(super) fn new(journal: &dyn Journal, after: Position, last: Position, now: Instant) -> Self {
        let missed = match journal.since(after) {
            Missed::Entries(mut entries) => {
                entries.truncate(entries.partition_point(|entry| entry.position <= last));
                Some(entries)
            }
            Missed::Truncated => None,
        };
        let waiting = match missed {
            Some(entries) if entries.len() <= MAX_PURGES => entries,
            missed => {
                let purge = missed.map_or(Purge { targets: vec![Target::All], soft: false }, |missed| union(&missed));
                vec![Arc::new(Entry { position: last, at_ms: 0, purge, origin: None })]
            }
        };
        PendingFills { waiting, began: now, passed: None, waited: false }
    }

    /// Looks at what is still under way to the node at this address. Returns when to come again, if not yet all that there
    /// was has landed.
    pub(super) fn look(&mut self, guard: &Guard, node: IpAddr, fleet: &Snapshot, now: Instant) -> Option<Instant> {
        if !self.have_arrived(guard, Some(node), fleet, now) {
            return Some(now + POLL);
        }
        // It has arrived since.
        std::mem::take(&mut self.waited).then_some(now + FILL_LATENCY)
    }

    /// Whether nothing is under way any more that was when this began; to `None`: whomever it is for.
    pub(super) fn have_arrived(&mut self, guard: &Guard, node: Option<IpAddr>, fleet: &Snapshot, now: Instant) -> bool {
        // A Varnish may fetch from another address than the one on which it listens, even from that of another one on the
        // same machine: until it was seen to fetch from its own, any page may be for it.
        let own = node.map(|node| node.to_canonical()).filter(|own| guard.has_fetched(*own));
        let is_of_another = |address: IpAddr| {
            own.is_some_and(|own| address != own)
                && fleet.varnish.members().iter().any(|other| other.node.spec.address.ip() == address)
        };
        let may_be_meant = |address: IpAddr| !is_of_another(address.to_canonical());
        // What passed after it was first looked at knew of all these purges: pages that come all the time are no reason to wait.
        self.waiting.retain(|entry| {
            let under_way = guard.under_way(&entry.purge, (self.began, now), may_be_meant);
            if !under_way {
                self.passed = self.passed.max(guard.last_passed(&entry.purge));
            }
            under_way
        });
        self.waited |= !self.waiting.is_empty();
        self.waiting.is_empty()
    }

    /// Whether it takes longer than a page should.
    pub(super) fn lasts_long(&self, now: Instant) -> bool {
        self.waited && now.saturating_duration_since(self.began) > LONG
    }
}

/// A purge that concerns all pages that these do, and more: one target for each kind of page.
fn union(entries: &[Arc<Entry>]) -> Purge {
    let mut targets: Vec<Target> = Vec::new();
    for target in entries.iter().flat_map(|entry| &entry.purge.targets) {
        let wider = match target {
            Target::Tags(_) | Target::Pattern(_) | Target::Everything => Target::Everything,
            // Which pool it is, nobody asks of a page that is under way.
            Target::Pool(_) => target.clone(),
            Target::Forward(_) | Target::All => Target::All,
        };
        if !targets.iter().any(|known| discriminant(known) == discriminant(&wider)) {
            targets.push(wider);
        }
    }
    Purge { targets, soft: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::Pattern;

    #[test]
    fn what_stands_for_many_purges_waits_for_no_other_kind_of_page() {
        let union_of = |targets: &[Target]| {
            let purge = |target: &Target| Purge { targets: vec![target.clone()], soft: false };
            let entry = |target| Arc::new(Entry { position: 1, at_ms: 0, purge: purge(target), origin: None });
            union(&targets.iter().map(entry).collect::<Vec<_>>()).targets
        };
        let (tags, pool) = (Target::Tags(["a"].into_iter().collect()), Target::Pool(Pattern::new("shop").unwrap()));
        assert_eq!(union_of(&[tags.clone(), Target::Everything, tags.clone()]), [Target::Everything]);
        assert_eq!(union_of(&[tags, pool.clone(), pool.clone()]), [Target::Everything, pool]);
        assert_eq!(union_of(&[Target::All]), [Target::All]);
    }
}
