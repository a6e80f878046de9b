//! The pages that are on their way to a node while it is told to drop them.
//!
//! A ban finds what is stored, and a page that is still in a socket, or lost on the wire and sent again, is stored after it.
//! The guard knows which answers are under way ([`Guard::under_way`](crate::purge::Guard::under_way)). Purges that concern
//! one of them are told once more when it has arrived and Varnish has had [`LANDING`] to make an object of it. How long the
//! way takes is nobody's guess: it ends when the last byte is acknowledged, or the connection is closed.
//!
//! Other replicas ask, too. They tell the same node by a way of their own, and their bans may be there before a page that
//! passes here. What they want to know is a position ([`Landed`]): up to there, no page that a purge concerns is under way
//! here any more. It only grows, whatever becomes of our own bans: a node that we cannot tell anything may have all its
//! pages.

use std::collections::BTreeMap;
use std::mem::discriminant;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Context, Deliveries};
use crate::fleet::{LANDING, NodeId, Snapshot};
use crate::journal::{Entry, Journal, Missed, Position};
use crate::purge::{Guard, Purge, Target};

/// How often the guard is asked whether a page has arrived.
const POLL: Duration = Duration::from_millis(10);

/// Purges that are looked at one by one; more of them concern any page with tags, or with what else they ask for.
const MAX_PURGES: usize = 1_000;

/// When a page that does not arrive is worth a word.
const LONG: Duration = Duration::from_secs(2);

/// The purges of a stretch that concern pages which may be under way.
#[derive(Debug)]
pub(super) struct Landing {
    waiting: Vec<Arc<Entry>>,
    began: Instant,
    /// When a page that they concern last passed, or arrived, as it was known when it was not under way any more.
    pub(super) passed: Option<Instant>,
    /// Something was under way when it was last looked at.
    waited: bool,
}

impl Landing {
    /// What follows `after` up to `last`.
    pub(super) fn new(journal: &dyn Journal, after: Position, last: Position, now: Instant) -> Self {
        let missed = match journal.since(after) {
            Missed::Entries(mut entries) => {
                entries.truncate(entries.partition_point(|entry| entry.position <= last));
                Some(entries)
            }
            Missed::Gap => None,
        };
        let waiting = match missed {
            Some(entries) if entries.len() <= MAX_PURGES => entries,
            missed => {
                let purge = missed.map_or(Purge { targets: vec![Target::All], soft: false }, |missed| union(&missed));
                vec![Arc::new(Entry { position: last, at_ms: 0, purge, origin: None })]
            }
        };
        Landing { waiting, began: now, passed: None, waited: false }
    }

    /// Looks at what is still under way to the node at this address. Returns when to come again, if not yet all that there
    /// was has landed.
    pub(super) fn look(&mut self, guard: &Guard, node: IpAddr, fleet: &Snapshot, now: Instant) -> Option<Instant> {
        if !self.have_arrived(guard, Some(node), fleet, now) {
            return Some(now + POLL);
        }
        // It has arrived since.
        std::mem::take(&mut self.waited).then_some(now + LANDING)
    }

    /// Whether nothing is under way any more that was when this began; to `None`: whomever it is for.
    fn have_arrived(&mut self, guard: &Guard, node: Option<IpAddr>, fleet: &Snapshot, now: Instant) -> bool {
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

/// Up to where the pages have landed that passed here: no page that a purge up to there concerns is under way. Looked after
/// only when somebody asks.
#[derive(Debug, Default)]
pub(super) struct Landed {
    up_to: Position,
    /// What follows, up to this position, and has not landed yet.
    next: Option<(Position, Landing)>,
    /// When that was last looked at.
    looked: Option<Instant>,
}

impl Landed {
    /// Nothing that a purge up to this position concerns is under way.
    pub(super) fn new(up_to: Position) -> Self {
        Landed { up_to, ..Landed::default() }
    }

    /// Looks, and gives the position. The node at this address has `acknowledged` every purge up to there; `None`: whomever
    /// pages are for.
    fn look(
        &mut self,
        context: &Context,
        (node, acknowledged): (Option<IpAddr>, Position),
        fleet: &Snapshot,
        now: Instant,
    ) -> Position {
        let Context { journal, guard, .. } = context;
        // That counts only when pages have landed.
        self.up_to = self.up_to.max(acknowledged);
        self.next.take_if(|(last, _)| *last <= acknowledged);
        let head = journal.head();
        while self.up_to < head {
            let up_to = self.up_to;
            let (last, landing) = self.next.get_or_insert_with(|| {
                self.looked = None;
                (head, Landing::new(&**journal, up_to, head, now))
            });
            // However many ask.
            if self.looked.is_some_and(|looked| now < looked + POLL) {
                break;
            }
            self.looked = Some(now);
            if !landing.have_arrived(guard, node, fleet, now) {
                break;
            }
            self.up_to = *last;
            self.next = None;
        }
        self.up_to
    }
}

impl Deliveries {
    /// Up to where pages have landed at each of these nodes, as far as they passed here: nothing that a purge up to that
    /// position concerns is under way there any more. Of a node that is not known here, any page counts.
    pub fn landed<'n>(&self, nodes: impl IntoIterator<Item = &'n NodeId>) -> BTreeMap<NodeId, Position> {
        let (fleet, now) = (self.context.fleet.load(), Instant::now());
        let of = |id: &NodeId| {
            let known = self.nodes.get(id).map(|delivery| (Arc::clone(&delivery.state), Arc::clone(&delivery.node)));
            let Some((state, node)) = known else {
                return self.landed.lock().look(&self.context, (None, 0), &fleet, now);
            };
            let asked = (Some(node.spec.address.ip()), node.live.acknowledged());
            state.landed.lock().look(&self.context, asked, &fleet, now)
        };
        nodes.into_iter().map(|id| (id.clone(), of(id))).collect()
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
