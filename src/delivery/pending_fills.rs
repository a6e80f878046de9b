//! Pages that are in flight to a node while it is purged.
//!
//! A ban drops stored objects, but a page that is still in a socket, or is being retransmitted, is stored after it. The
//! guard knows which answers are in flight ([`Guard::under_way`](crate::purge::Guard::under_way)). Purges that concern one
//! of them are sent once more [`FILL_LATENCY`] after its arrival, when Varnish has made an object of it. The arrival is not
//! estimated: it is the acknowledgement of the last byte, or the end of the connection.

use std::mem::discriminant;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fleet::{FILL_LATENCY, Snapshot};
use crate::journal::{Entry, Journal, Missed, Position};
use crate::purge::{Guard, Purge, Target};

/// The interval of asking the guard whether a page has arrived.
pub(super) const POLL: Duration = Duration::from_millis(10);

/// The maximum number of purges to examine one by one. A longer range is replaced by one purge that covers all its targets.
const MAX_PURGES: usize = 1_000;

/// The time after which a page that does not arrive is logged.
const LONG: Duration = Duration::from_secs(2);

/// The purges of a range that may concern pages in flight.
#[derive(Debug)]
pub(super) struct PendingFills {
    waiting: Vec<Arc<Entry>>,
    began: Instant,
    /// The latest time at which a concerned page passed or arrived, once none is in flight.
    pub(super) passed: Option<Instant>,
    /// Whether a page was in flight at the last look.
    waited: bool,
}

impl PendingFills {
    /// The purges after `after`, up to `last`, without those that the answers of the node show by their seals.
    pub(super) fn new(
        journal: &dyn Journal,
        (after, last): (Position, Position),
        mut is_shown: impl FnMut(Position) -> bool,
        now: Instant,
    ) -> Self {
        let missed = match journal.since(after) {
            Missed::Entries(mut entries) => {
                entries.truncate(entries.partition_point(|entry| entry.position <= last));
                entries.retain(|entry| !is_shown(entry.position));
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

    /// Every page with tags.
    pub(super) fn of_pages_with_tags(now: Instant) -> Self {
        let purge = Purge { targets: vec![Target::Everything], soft: false };
        let waiting = vec![Arc::new(Entry { position: 0, at_ms: 0, purge, origin: None })];
        PendingFills { waiting, began: now, passed: None, waited: false }
    }

    /// A page was in flight before this value was created: if it has arrived by now, it has only just done so.
    pub(super) fn seen_before(self) -> Self {
        PendingFills { waited: true, ..self }
    }

    /// Examines the pages in flight to the node at this address. Returns when to look again, or `None` if all have become
    /// objects.
    pub(super) fn look(&mut self, guard: &Guard, node: IpAddr, fleet: &Snapshot, now: Instant) -> Option<Instant> {
        if !self.have_arrived(guard, Some(node), fleet, now) {
            return Some(now + POLL);
        }
        // The last one has arrived since the previous look.
        std::mem::take(&mut self.waited).then_some(now + FILL_LATENCY)
    }

    /// Whether all pages have arrived that were in flight when this value was created; with `node` `None`, pages to any
    /// address count.
    pub(super) fn have_arrived(&mut self, guard: &Guard, node: Option<IpAddr>, fleet: &Snapshot, now: Instant) -> bool {
        // A Varnish may fetch from another address than its own, even from that of another Varnish on the same machine.
        // Until it was seen to fetch from its own address, any page may be for it.
        let own = node.map(|node| node.to_canonical()).filter(|own| guard.has_fetched(*own));
        let is_of_another = |address: IpAddr| {
            own.is_some_and(|own| address != own)
                && fleet.varnish.members().iter().any(|other| other.node.spec.address.ip() == address)
        };
        let may_be_meant = |address: IpAddr| !is_of_another(address.to_canonical());
        // Pages that passed after the first look were checked against all these purges, so a steady stream of pages does not
        // prolong the wait.
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

    /// Whether a page was in flight at the last look.
    pub(super) fn are_under_way(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether a page takes unusually long.
    pub(super) fn lasts_long(&self, now: Instant) -> bool {
        self.waited && now.saturating_duration_since(self.began) > LONG
    }
}

/// A purge that concerns at least the pages of all these purges: one target for each kind.
fn union(entries: &[Arc<Entry>]) -> Purge {
    let mut targets: Vec<Target> = Vec::new();
    for target in entries.iter().flat_map(|entry| &entry.purge.targets) {
        let wider = match target {
            Target::Tags(_) | Target::Pattern(_) | Target::Everything => Target::Everything,
            // The guard does not distinguish pools of pages in flight.
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
