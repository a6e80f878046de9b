//! Purges that a node may refuse: their senders, and the answers that these were given.
//!
//! **Answers are true.** If a node refuses a purge before it is answered, the answer is 400, and the purge is passed over.
//! If it was already answered as done, a node that refuses it owes more ([`Owed`]). Both are decided here, under one lock.
//!
//! **A purge is answered as done only if a node has accepted it.** While all nodes hang, it is unknown whether any VCL
//! accepts such a request. A promise would take the whole fleet out of service if none does, because only a confirmed flush
//! makes up for it, and few VCLs can confirm one. So the sender is told that no node has accepted the purge yet, and nothing
//! is promised ([`PurgeVerdict::Untaken`]). Nodes that accept it later carry it out all the same.
//!
//! **The accepting replica answers.** A refusal at another replica is returned with the confirmation
//! ([`Requests::confirm`]), and leads to a 400 there. A confirmation without a refusal is final: if a node refuses the purge
//! here afterwards, its sender may have been told that it is done. A confirmation with a refusal leaves the purge open until
//! the accepting replica reports its answer. If no answer is reported within the timeout of a purge, it counts as done.
//!
//! **In doubt, a purge was answered as done.** This holds for purges of an earlier process that are not marked as refused
//! ([`Journal::refuse`](crate::journal::Journal::refuse)), and for purges that are no longer known here. A refused purge
//! leaves no doubt, whichever nodes were in the fleet.
//!
//! A ban of everything drops pages with tags or a pool. A forwarded request (`PURGE <url>`) may concern a page with neither,
//! and a node that missed it is not made current by a flush.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::refusal::{Owed, Refusable, Refusals, Refused};
use crate::fleet::NodeId;
use crate::journal::{Entry, Position};

/// The purges that a node may refuse: forwarded requests and pools.
#[derive(Debug, Default)]
pub(super) struct Requests {
    noted: BTreeMap<Position, RefusablePurge>,
    /// The journal was searched for such purges up to this position.
    looked_up_to: Position,
    /// The positions of purges in [`AnswerState::Open`].
    open: BTreeSet<Position>,
    /// The heads after which purges are awaited, with the number of purges for each.
    expected: BTreeMap<Position, usize>,
    /// The refused purges, numbered in the order in which they became known.
    refused: BTreeMap<u64, Position>,
    refusals: u64,
}

/// A purge that a node may refuse.
#[derive(Clone, Debug)]
struct RefusablePurge {
    what: Refusable,
    /// The sender, if this process accepted it.
    sender: Option<IpAddr>,
    answer: AnswerState,
    /// The nodes that refused it before its answer.
    refused_by: Refusals,
}

/// The answer to the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnswerState {
    /// Another replica accepted the purge, and will report its answer.
    Open,
    /// Another replica accepted the purge, and its version never reports answers.
    Unknown,
    /// The purge was accepted here and is not answered yet. If a node refuses it before, the answer is a refusal.
    Due,
    /// It was, or may have been, answered as done.
    Done,
    /// It was refused: nodes refuse it, or none had accepted it in time.
    Refused,
}

/// The answer that a purge must get.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PurgeVerdict {
    Done,
    /// These nodes refuse it.
    Refused(Refusals),
    /// No node has accepted or refused it in time.
    Untaken,
}

/// The consequences of a refusal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Consequence {
    pub(super) owed: Owed,
    /// A purge is refused to its sender from now on, so other replicas must be notified.
    pub(super) is_news: bool,
    /// Purges of older replicas that every node refused before they counted as done.
    pub(super) taken_by_nobody: Vec<Position>,
}

impl RefusablePurge {
    fn new(what: Refusable, answer: AnswerState) -> Self {
        RefusablePurge { what, sender: None, answer, refused_by: Vec::new() }
    }

    /// The debt of a node that refuses this purge after it was answered as done.
    fn promised(&self) -> Owed {
        if self.what.is_handed_on { Owed::FlushOfAll } else { Owed::Flush }
    }

    fn owed(&self, is_fenced: bool) -> Owed {
        match self.answer {
            AnswerState::Done => self.promised(),
            AnswerState::Unknown if is_fenced => Owed::Flush,
            AnswerState::Unknown | AnswerState::Open | AnswerState::Due | AnswerState::Refused => Owed::Nothing,
        }
    }

    fn is_refused(&self) -> bool {
        self.answer == AnswerState::Refused || (self.answer == AnswerState::Due && !self.refused_by.is_empty())
    }

    /// Whether a node that missed it may still have pages that a flush leaves.
    fn leaves_doubt(&self) -> bool {
        self.what.is_handed_on && !self.is_refused()
    }

    /// Marks the purge as refused if each of these nodes refused it before it counted as done, because then no sender was
    /// told that it is done. Returns whether that is so.
    fn refuse_if_by_all(&mut self, fleet: &[&NodeId]) -> bool {
        let has_refused = |node: &&NodeId| self.refused_by.iter().any(|(id, _)| id == *node);
        let by_all = !fleet.is_empty() && fleet.iter().all(has_refused);
        if by_all {
            self.answer = AnswerState::Refused;
        }
        by_all
    }

    /// Records that a node refuses it. Sorted by node, because the answer names the first one, whichever node was quickest.
    fn refuse(&mut self, node: &NodeId, reason: &Arc<str>) {
        if let Err(place) = self.refused_by.binary_search_by(|(id, _)| id.cmp(node)) {
            self.refused_by.insert(place, (node.clone(), Arc::clone(reason)));
        }
    }
}

impl Requests {
    /// Notes the purges of an earlier process, with those that it marked as `refused`.
    pub(super) fn note_past(&mut self, entries: &[Arc<Entry>], refused: impl Fn(Position) -> bool) {
        for entry in entries {
            self.looked_up_to = entry.position;
            let Some(what) = Refusable::of(&entry.purge) else { continue };
            let answer = if refused(entry.position) { AnswerState::Refused } else { AnswerState::Done };
            self.noted.insert(entry.position, RefusablePurge::new(what, answer));
            if answer == AnswerState::Refused {
                // It is unknown which replicas the earlier process has notified.
                self.push_refused(entry.position);
            }
        }
    }

    /// The position up to which the journal was searched.
    pub(super) fn looked_up_to(&self) -> Position {
        self.looked_up_to
    }

    /// Notes the refusable ones among these entries, as awaiting their answer here or from the replica that accepted them.
    pub(super) fn note_all(&mut self, entries: &[Arc<Entry>], floor: Position) {
        for entry in entries {
            self.looked_up_to = self.looked_up_to.max(entry.position);
            if !self.noted.contains_key(&entry.position)
                && let Some(what) = Refusable::of(&entry.purge)
            {
                let answer = match &entry.origin {
                    Some(origin) if !origin.ours => AnswerState::Open,
                    _ => AnswerState::Due,
                };
                self.noted.insert(entry.position, RefusablePurge::new(what, answer));
                if answer == AnswerState::Open {
                    self.open.insert(entry.position);
                }
            }
        }
        self.retire(floor);
    }

    /// Records that a purge was accepted here, so its answer is due.
    pub(super) fn record_accepted(&mut self, position: Position, what: Refusable, sender: IpAddr, floor: Position) {
        self.open.remove(&position);
        let request = self.noted.entry(position).or_insert_with(|| RefusablePurge::new(what, AnswerState::Due));
        (request.answer, request.sender) = (AnswerState::Due, Some(sender));
        self.retire(floor);
    }

    /// Removes purges that can no longer be replayed (up to `floor`), unless their answer is undecided.
    fn retire(&mut self, floor: Position) {
        let expected = self.expected();
        let is_decided = |(position, request): &(&Position, &RefusablePurge)| match request.answer {
            // Those that were not durable in time are never answered.
            AnswerState::Due => request.sender.is_none() && expected.is_none_or(|expected| **position <= expected),
            AnswerState::Open => request.refused_by.is_empty(),
            AnswerState::Unknown | AnswerState::Done | AnswerState::Refused => true,
        };
        let retired = self.noted.range(..=floor).filter(is_decided);
        for position in retired.map(|(position, _)| *position).collect::<Vec<_>>() {
            self.noted.remove(&position);
            self.open.remove(&position);
        }
        while let Some(first) = self.refused.first_entry().filter(|first| *first.get() <= floor) {
            first.remove();
        }
    }

    fn push_refused(&mut self, position: Position) {
        self.refused.insert(self.refusals, position);
        self.refusals += 1;
    }

    /// A purge after this position is awaited.
    pub(super) fn expect(&mut self, after: Position) {
        *self.expected.entry(after).or_default() += 1;
    }

    /// The purge is no longer awaited. If it was accepted but not answered, no sender was told that it is done.
    pub(super) fn expect_no_more(&mut self, after: Position, accepted: Option<Position>) {
        if let Some(request) = accepted.and_then(|position| self.noted.get_mut(&position))
            && request.answer == AnswerState::Due
        {
            request.answer = AnswerState::Refused;
        }
        if let Some(count) = self.expected.get_mut(&after) {
            *count -= 1;
            if *count == 0 {
                self.expected.remove(&after);
            }
        }
    }

    /// A position before every awaited purge. `None` if no purge is awaited.
    pub(super) fn expected(&self) -> Option<Position> {
        self.expected.keys().next().copied()
    }

    /// The number of awaited purges.
    pub(super) fn awaited(&self) -> usize {
        self.expected.values().sum()
    }

    /// Records that a node refuses purges. Forgotten purges count as answered as done. So do purges of an older replica up
    /// to the `fence`, unless the whole `fleet` refused them before.
    pub(super) fn record_refusal(
        &mut self,
        node: &NodeId,
        refused: Refused,
        reason: &Arc<str>,
        fence: Position,
        fleet: &[&NodeId],
    ) -> Consequence {
        let Refused { fingerprint, after, last } = refused;
        let concerned = self.noted.range(after + 1..=last).filter(|(_, it)| it.what.fingerprint == fingerprint);
        let owed = concerned.clone().map(|(position, it)| it.owed(*position <= fence)).max();
        let owed = owed.unwrap_or(Owed::FlushOfAll);
        if owed > Owed::Nothing {
            // The flush replaces all of them, so the other ones are not refused.
            let also = concerned
                .filter(|(_, it)| matches!(it.answer, AnswerState::Open | AnswerState::Due) && !it.is_refused());
            let owed = also.map(|(_, it)| it.promised()).max().unwrap_or_default().max(owed);
            return Consequence { owed, ..Consequence::default() };
        }
        let positions: Vec<Position> = concerned.map(|(position, _)| *position).collect();
        let mut consequence = Consequence::default();
        for position in positions {
            let Some(request) = self.noted.get_mut(&position) else { continue };
            match request.answer {
                AnswerState::Open => request.refuse(node, reason),
                AnswerState::Due => {
                    let is_news = !request.is_refused();
                    request.refuse(node, reason);
                    consequence.is_news |= is_news;
                    if is_news {
                        self.push_refused(position);
                    }
                }
                AnswerState::Unknown => {
                    request.refuse(node, reason);
                    consequence.taken_by_nobody.extend(request.refuse_if_by_all(fleet).then_some(position));
                }
                AnswerState::Done | AnswerState::Refused => {}
            }
        }
        consequence
    }

    /// Decides the answer to the purge at this position, just before it is given. `is_taken`: a node has accepted it, or the
    /// fleet is empty. Only [`PurgeVerdict::Done`] is a promise.
    pub(super) fn answer(&mut self, position: Position, is_taken: bool) -> PurgeVerdict {
        let Some(request) = self.noted.get_mut(&position) else { return PurgeVerdict::Done };
        let refusals = std::mem::take(&mut request.refused_by);
        let verdict = match refusals {
            refusals if !refusals.is_empty() => PurgeVerdict::Refused(refusals),
            _ if is_taken => PurgeVerdict::Done,
            _ => PurgeVerdict::Untaken,
        };
        request.answer = if verdict == PurgeVerdict::Done { AnswerState::Done } else { AnswerState::Refused };
        if verdict == PurgeVerdict::Untaken {
            self.push_refused(position);
        }
        verdict
    }

    /// The nodes that refuse the purge at this position, for the confirmation to the replica that accepted it. If there are
    /// none, the purge counts as done from now on.
    pub(super) fn confirm(&mut self, position: Position) -> Refusals {
        let Some(request) = self.noted.get_mut(&position).filter(|it| it.answer == AnswerState::Open) else {
            return Vec::new();
        };
        if request.refused_by.is_empty() {
            request.answer = AnswerState::Done;
            self.open.remove(&position);
        }
        request.refused_by.clone()
    }

    /// Records that nodes refuse one of our purges at another replica. `None` if it was already answered as done; otherwise
    /// whether that is news.
    pub(super) fn record_refusal_elsewhere(&mut self, position: Position, refusals: &Refusals) -> Option<bool> {
        let Some(request) = self.noted.get_mut(&position) else { return Some(false) };
        match request.answer {
            AnswerState::Done => return None,
            AnswerState::Unknown | AnswerState::Refused => return Some(false),
            AnswerState::Due | AnswerState::Open => {}
        }
        let was_refused = request.is_refused();
        refusals.iter().for_each(|(node, reason)| request.refuse(node, reason));
        let is_news = !was_refused && request.is_refused();
        if is_news {
            self.push_refused(position);
        }
        Some(is_news)
    }

    /// Records that another replica refused it to its sender. Returns whether that is news.
    pub(super) fn record_refused(&mut self, position: Position) -> bool {
        // For its own purges this process decides, even before their handler has recorded them.
        let is_news = |request: &&mut RefusablePurge| {
            request.sender.is_none() && !matches!(request.answer, AnswerState::Due | AnswerState::Refused)
        };
        let Some(request) = self.noted.get_mut(&position).filter(is_news) else { return false };
        request.answer = AnswerState::Refused;
        request.refused_by.clear();
        self.open.remove(&position);
        self.push_refused(position);
        true
    }

    /// Records that the accepting replica answered it as done. Returns the nodes that have refused it here.
    pub(super) fn record_done(&mut self, position: Position) -> Vec<NodeId> {
        self.open.remove(&position);
        match self.noted.get_mut(&position) {
            Some(request) if matches!(request.answer, AnswerState::Open | AnswerState::Unknown) => {
                request.answer = AnswerState::Done;
                std::mem::take(&mut request.refused_by).into_iter().map(|(node, _)| node).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Records that the accepting replica never reports its answer. Returns whether the whole `fleet` refuses it.
    pub(super) fn record_older_version(&mut self, position: Position, fleet: &[&NodeId]) -> bool {
        if !self.open.remove(&position) {
            return false;
        }
        self.noted.get_mut(&position).is_some_and(|request| {
            request.answer = AnswerState::Unknown;
            request.refuse_if_by_all(fleet)
        })
    }

    /// Treats open purges up to this position as done. Returns the nodes that have refused them here.
    pub(super) fn expire_open(&mut self, last: Position) -> Vec<(Position, NodeId)> {
        let over: Vec<Position> = self.open.range(..=last).copied().collect();
        let done = over.into_iter().map(|position| (position, self.record_done(position)));
        done.flat_map(|(position, nodes)| nodes.into_iter().map(move |node| (position, node))).collect()
    }

    /// Whether its sender was told, or may have been told, that it is done.
    pub(super) fn is_done(&self, position: Position) -> bool {
        self.noted.get(&position).is_some_and(|request| request.answer == AnswerState::Done)
    }

    /// At most `most` of the refused purges, from `number` on, with their numbers.
    pub(super) fn refused_from(&self, number: u64, most: usize) -> Vec<(u64, Position)> {
        self.refused.range(number..).take(most).map(|(number, position)| (*number, *position)).collect()
    }

    /// The newest refused purges, at most `most`.
    pub(super) fn newest_refused(&self, most: usize) -> Vec<Position> {
        self.refused.values().rev().take(most).copied().collect()
    }

    /// The first open purge that this node has passed over, and for which it may still owe a flush.
    pub(super) fn first_open(&self, node: &NodeId) -> Option<Position> {
        let refused_by = |position: &Position| self.noted.get(position).map(|request| &request.refused_by);
        let is_open = |position: &&Position| refused_by(position).is_some_and(|by| by.iter().any(|(id, _)| id == node));
        self.open.iter().find(is_open).copied()
    }

    /// Whether such a purge lies after the first position, up to the second.
    pub(super) fn lie_in(&self, (after, last): (Position, Position)) -> bool {
        after < last && self.noted.range(after + 1..=last).any(|(_, request)| request.leaves_doubt())
    }

    /// The position and the sender of the newest purge with this fingerprint.
    pub(super) fn newest(&self, fingerprint: u64) -> Option<(Position, Option<IpAddr>)> {
        let mut newest_first = self.noted.iter().rev();
        newest_first
            .find(|(_, request)| request.what.fingerprint == fingerprint)
            .map(|(position, request)| (*position, request.sender))
    }
}

#[cfg(test)]
mod tests;
