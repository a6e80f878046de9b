//! Which purges a node may refuse though it obeys others, which of them a flush does not cover, and who sent them.
//!
//! A ban of everything drops what has tags or a pool. A purge that was handed on as it came (`PURGE <url>`) may be of a page
//! that has neither, and a node that missed it is not made current by a flush. So the positions of such purges are kept: all
//! that can still be replayed, and of the rest the newest, since one is enough to be in doubt. A pool leaves no doubt, and
//! is kept only as long as it can be replayed.
//!
//! Whether a refusal is the sender's to hear is decided together with the answer, under one lock: a node that refuses before
//! it makes it a 400, and one that refuses a purge that was answered as done owes more than to pass it over ([`Owed`]).

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
#[derive(Clone, Debug)]
struct Request {
    fingerprint: u64,
    /// A flush may leave what it is about.
    is_handed_on: bool,
    /// Who sent it to this clearcoat.
    sender: Option<IpAddr>,
    answer: Answer,
    /// Who refused it before it was answered, as long as nobody here knows how it was.
    refused_by: Vec<NodeId>,
}

/// What the sender of a purge was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Nobody here knows: another replica accepted it, or the process before this one.
    Unknown,
    /// Nothing yet.
    Due,
    /// That it is done.
    Done,
    /// That nodes do not take it.
    Refused,
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

impl Request {
    fn owed(&self, is_fenced: bool) -> Owed {
        match self.answer {
            Answer::Done if self.is_handed_on => Owed::FlushOfAll,
            Answer::Done => Owed::Flush,
            Answer::Unknown if is_fenced => Owed::Flush,
            Answer::Unknown | Answer::Due | Answer::Refused => Owed::Nothing,
        }
    }

    /// Whether a node that missed it may hold what a flush leaves.
    fn leaves_doubt(&self) -> bool {
        self.is_handed_on && self.answer != Answer::Refused
    }
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

    /// One more; with a `sender`, whose answer is due. Of those that can no longer be replayed (up to `floor`) only the newest
    /// that leaves doubt stays, and those whose answer decides whether they do.
    pub(super) fn note(&mut self, position: Position, what: &Refusable, sender: Option<IpAddr>, floor: Position) {
        let Refusable { fingerprint, is_handed_on } = *what;
        let answer = if sender.is_some() { Answer::Due } else { Answer::Unknown };
        self.noted.insert(position, Request { fingerprint, is_handed_on, sender, answer, refused_by: vec![] });
        // As many as retired since the last time, and a few.
        let retired = self.noted.range(..=floor).filter(|(_, request)| request.answer != Answer::Due);
        let newest = retired.clone().rev().find(|(_, request)| request.leaves_doubt()).map(|(position, _)| *position);
        let gone: Vec<Position> = retired.map(|(position, _)| *position).filter(|it| Some(*it) != newest).collect();
        gone.iter().for_each(|position| _ = self.noted.remove(position));
    }

    /// A purge that comes after this position is waited for.
    pub(super) fn expect(&mut self, after: Position) {
        *self.expected.entry(after).or_default() += 1;
    }

    /// It is not any more; where it was accepted, at this position. Nobody knows what its sender was told if nothing was.
    pub(super) fn expect_no_more(&mut self, after: Position, accepted: Option<Position>) {
        if let Some(request) = accepted.and_then(|position| self.noted.get_mut(&position))
            && request.answer == Answer::Due
        {
            request.answer = Answer::Unknown;
        }
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

    /// A node does not take these. What lies up to the `fence` was answered by somebody. What none of the `fleet` takes, and
    /// was not answered before that was known, was nobody told to be done.
    pub(super) fn refused(
        &mut self,
        node: &NodeId,
        refused: Refused,
        reason: &Arc<str>,
        fence: Position,
        fleet: &[&NodeId],
    ) -> Owed {
        let Refused { fingerprint, after, last } = refused;
        let mut owed = Owed::Nothing;
        for (position, request) in self.noted.range_mut(after + 1..=last) {
            if request.fingerprint != fingerprint {
                continue;
            }
            owed = owed.max(request.owed(*position <= fence));
            if request.answer == Answer::Unknown && *position > fence {
                if !request.refused_by.contains(node) {
                    request.refused_by.push(node.clone());
                }
                if fleet.iter().all(|node| request.refused_by.contains(node)) {
                    request.answer = Answer::Refused;
                }
            }
        }
        if owed == Owed::Nothing && self.expected().is_some_and(|expected| refused.last > expected) {
            self.refusals.push((node.clone(), refused, Arc::clone(reason)));
        }
        owed
    }

    /// The purge at this position is about to be answered: which nodes do not take it, and why. If there are any, nobody is
    /// told that it was carried out, and it leaves no doubt.
    pub(super) fn answer(&mut self, position: Position, what: &Refusable) -> Vec<(NodeId, Arc<str>)> {
        let mut refused: BTreeMap<&NodeId, &Arc<str>> = BTreeMap::new();
        for (node, _, reason) in self.refusals.iter().filter(|(_, refused, _)| refused.is(what.fingerprint, position)) {
            refused.entry(node).or_insert(reason);
        }
        if let Some(request) = self.noted.get_mut(&position) {
            request.answer = if refused.is_empty() { Answer::Done } else { Answer::Refused };
        }
        refused.into_iter().map(|(node, reason)| (node.clone(), Arc::clone(reason))).collect()
    }

    /// Whether one lies after the first position, up to the second.
    pub(super) fn lie_in(&self, (after, last): (Position, Position)) -> bool {
        after < last && self.noted.range(after + 1..=last).any(|(_, request)| request.leaves_doubt())
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

    const SENDER: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));

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
        requests.note(7, &handed_on(1), SENDER, 0);
        let (node, refused) = (NodeId::try_from("v").unwrap(), Refused { fingerprint: 1, after: 6, last: 7 });
        assert_eq!(requests.refused(&node, refused, &"405".into(), 0, &[]), Owed::Nothing);
        assert_eq!(requests.answer(7, &handed_on(1)).len(), 1);
        requests.expect_no_more(6, Some(7));
        assert!(requests.refusals.is_empty() && requests.expected.is_empty());
        requests.note(8, &pool(2), None, 0);
        assert!(!requests.lie_in((0, 10)));
    }

    #[test]
    fn what_was_answered_as_done_is_not_passed_over_and_what_was_refused_is() {
        let (node, other) = (NodeId::try_from("v").unwrap(), NodeId::try_from("w").unwrap());
        let mut requests = Requests::default();
        requests.expect(0);
        requests.note(1, &handed_on(1), SENDER, 0);
        requests.note(2, &handed_on(2), SENDER, 0);
        requests.note(3, &pool(3), SENDER, 0);
        requests.note(4, &handed_on(4), None, 0);
        let refuse = |requests: &mut Requests, fingerprint, fence| {
            requests.refused(&node, Refused { fingerprint, after: 0, last: 4 }, &"405".into(), fence, &[&node, &other])
        };
        assert_eq!(refuse(&mut requests, 1, 9), Owed::Nothing);
        assert_eq!(requests.answer(1, &handed_on(1)).len(), 1);
        assert!(requests.answer(2, &handed_on(2)).is_empty() && requests.answer(3, &pool(3)).is_empty());
        // The answer stands, whoever refuses it then.
        assert_eq!([1, 2, 3].map(|it| refuse(&mut requests, it, 9)), [Owed::Nothing, Owed::FlushOfAll, Owed::Flush]);
        // Of another replica's the fence says whether it was answered, and nobody says how.
        assert_eq!([3, 4].map(|fence| refuse(&mut requests, 4, fence)), [Owed::Nothing, Owed::Flush]);
    }

    #[test]
    fn one_that_is_refused_when_it_has_retired_takes_no_other_one_with_it() {
        let mut requests = Requests::default();
        requests.expect(0);
        requests.note(10, &handed_on(1), None, 0);
        requests.note(15, &handed_on(2), SENDER, 0);
        requests.note(30, &pool(3), None, 20);
        requests.refused(
            &NodeId::try_from("v").unwrap(),
            Refused { fingerprint: 2, after: 14, last: 15 },
            &"405".into(),
            0,
            &[],
        );
        requests.answer(15, &handed_on(2));
        requests.note(31, &pool(3), None, 20);
        assert!(requests.lie_in((5, 20)) && !requests.lie_in((10, 20)));
    }

    #[test]
    fn what_another_replica_accepted_and_no_node_takes_leaves_no_doubt() {
        let nodes = ["v", "w"].map(|id| NodeId::try_from(id).unwrap());
        let mut requests = Requests::default();
        requests.note(7, &handed_on(1), None, 0);
        for (node, leaves_doubt) in nodes.iter().zip([true, false]) {
            let refused = Refused { fingerprint: 1, after: 6, last: 7 };
            requests.refused(node, refused, &"405".into(), 6, &[&nodes[0], &nodes[1]]);
            assert_eq!(requests.lie_in((0, 9)), leaves_doubt);
        }
        // Also when it is retired.
        requests.note(8, &pool(2), None, 8);
        assert!(requests.noted.is_empty());
    }
}
