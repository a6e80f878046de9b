//! Which purges a node may refuse though it obeys others, which of them a flush does not cover, and who sent them.
//!
//! A ban of everything drops what has tags or a pool. A purge that was handed on as it came (`PURGE <url>`) may be of a page
//! that has neither, and a node that missed it is not made current by a flush. So the positions of such purges are kept: all
//! that can still be replayed, and of the rest the newest, since one is enough to be in doubt. A pool leaves no doubt, and
//! is kept only as long as it can be replayed.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::fingerprint;
use super::walk::Refused;
use crate::fleet::NodeId;
use crate::journal::{Entry, Position};
use crate::purge::{Purge, Target};

/// What of a purge a node may refuse for itself: a request that is handed on, or a pool (not every VCL knows them).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusable {
    pub(super) fingerprint: u64,
    is_handed_on: bool,
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

/// Purges that were handed on, or name a pool.
#[derive(Debug, Default)]
pub(super) struct Requests {
    noted: BTreeMap<Position, Request>,
    /// After which positions the purges are that are waited for, and how many after each.
    expected: BTreeMap<Position, usize>,
    /// What nodes do not take, and why, as long as a purge is waited for that it may concern.
    refusals: Vec<(NodeId, Refused, Arc<str>)>,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
struct Request {
    fingerprint: u64,
    /// A flush may leave what it is about.
    is_handed_on: bool,
    /// Who sent it to this clearcoat.
    sender: Option<IpAddr>,
}

impl Requests {
    /// Takes note of those among these.
    pub(super) fn note_all(&mut self, entries: &[Arc<Entry>], floor: Position) {
        for entry in entries {
            if let Some(refusable) = Refusable::of(&entry.purge)
                && !self.noted.contains_key(&entry.position)
            {
                self.note(entry.position, &refusable, None, floor);
            }
        }
    }

    /// One more. Of those that can no longer be replayed (up to `floor`) only the newest that a flush may leave stays.
    pub(super) fn note(&mut self, position: Position, what: &Refusable, sender: Option<IpAddr>, floor: Position) {
        let Refusable { fingerprint, is_handed_on } = *what;
        self.noted.insert(position, Request { fingerprint, is_handed_on, sender });
        // As many as retired since the last time, and one.
        let retired = self.noted.range(..=floor);
        let newest = retired.clone().rev().find(|(_, request)| request.is_handed_on).map(|(position, _)| *position);
        let gone: Vec<Position> = retired.map(|(position, _)| *position).filter(|it| Some(*it) != newest).collect();
        gone.iter().for_each(|position| _ = self.noted.remove(position));
    }

    /// A purge that comes after this position is waited for.
    pub(super) fn expect(&mut self, after: Position) {
        *self.expected.entry(after).or_default() += 1;
    }

    /// It is not any more.
    pub(super) fn expect_no_more(&mut self, after: Position) {
        if let Some(count) = self.expected.get_mut(&after) {
            *count -= 1;
            if *count == 0 {
                self.expected.remove(&after);
            }
        }
        match self.expected() {
            None => self.refusals.clear(),
            Some(expected) => self.refusals.retain(|(_, refused, _)| refused.last > expected),
        }
    }

    /// No purge is waited for that is not after this position.
    pub(super) fn expected(&self) -> Option<Position> {
        self.expected.keys().next().copied()
    }

    /// A node does not take these.
    pub(super) fn refused(&mut self, node: &NodeId, refused: Refused, reason: &Arc<str>) {
        if self.expected().is_some_and(|expected| refused.last > expected) {
            self.refusals.push((node.clone(), refused, Arc::clone(reason)));
        }
    }

    /// The purge at this position is about to be answered: which nodes do not take it, and why. If there are any, nobody is
    /// told that it was carried out, and it leaves no doubt.
    pub(super) fn answer(&mut self, position: Position, what: &Refusable) -> Vec<(NodeId, Arc<str>)> {
        let mut refused: BTreeMap<&NodeId, &Arc<str>> = BTreeMap::new();
        for (node, _, reason) in self.refusals.iter().filter(|(_, refused, _)| refused.is(what.fingerprint, position)) {
            refused.entry(node).or_insert(reason);
        }
        if !refused.is_empty() {
            self.noted.remove(&position);
        }
        refused.into_iter().map(|(node, reason)| (node.clone(), Arc::clone(reason))).collect()
    }

    /// Whether one lies after the first position, up to the second.
    pub(super) fn lie_in(&self, (after, last): (Position, Position)) -> bool {
        after < last && self.noted.range(after + 1..=last).any(|(_, request)| request.is_handed_on)
    }

    /// The newest of those with this fingerprint: where it is, and who sent it.
    pub(super) fn newest(&self, fingerprint: u64) -> Option<(Position, Option<IpAddr>)> {
        let mut newest_first = self.noted.iter().rev();
        newest_first
            .find(|(_, request)| request.fingerprint == fingerprint)
            .map(|(position, request)| (*position, request.sender))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed_on(fingerprint: u64) -> Refusable {
        Refusable { fingerprint, is_handed_on: true }
    }

    fn pool(fingerprint: u64) -> Refusable {
        Refusable { fingerprint, is_handed_on: false }
    }

    #[test]
    fn of_what_cannot_be_replayed_the_newest_is_enough_to_be_in_doubt() {
        let mut requests = Requests::default();
        for position in 1..=1_000 {
            requests.note(position, &handed_on(position), None, position - 1);
        }
        assert_eq!(requests.noted.len(), 2);
        assert!(requests.lie_in((900, 999)) && requests.lie_in((999, 1_000)));
        assert!(!requests.lie_in((1_000, 2_000)) && !requests.lie_in((0, 998)) && !requests.lie_in((999, 999)));
    }

    #[test]
    fn a_pool_that_cannot_be_replayed_takes_no_url_out_of_memory() {
        let mut requests = Requests::default();
        requests.note(10, &handed_on(1), None, 0);
        requests.note(20, &pool(2), None, 20);
        assert!(requests.lie_in((5, 20)));
        assert_eq!(requests.noted.len(), 1);
    }

    #[test]
    fn what_nobody_carried_out_leaves_no_doubt() {
        let mut requests = Requests::default();
        requests.expect(6);
        requests.note(7, &handed_on(1), None, 0);
        let (node, refused) = (NodeId::try_from("v").unwrap(), Refused { fingerprint: 1, after: 6, last: 7 });
        requests.refused(&node, refused, &"405".into());
        assert_eq!(requests.answer(7, &handed_on(1)).len(), 1);
        requests.expect_no_more(6);
        assert!(requests.refusals.is_empty() && requests.expected.is_empty());
        requests.note(8, &pool(2), None, 0);
        assert!(!requests.lie_in((0, 10)));
    }
}
