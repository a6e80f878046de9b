//! Which purges a node may refuse though it obeys others, who sent them, and what their senders were told.
//!
//! **Who is told, is told the truth.** A node that refuses a purge before it is answered makes the answer a 400, and the purge
//! is passed over. Once it was answered as done, a node that refuses it is owed more ([`Owed`]). Both are decided here, under
//! one lock.
//!
//! **As done is answered what a node has taken.** While all nodes hang, nobody knows whether any of their VCLs takes such a
//! request. To promise it would take the whole fleet out of service if none does: a flush that makes up for it has to be
//! shown, and few VCLs can. So its sender is told that no node has taken it yet, and nothing is promised
//! ([`PurgeVerdict::Untaken`]). Who takes it later carries it out all the same.
//!
//! **Whoever accepted it answers.** What a node refuses at another replica goes back to that one with the confirmation
//! ([`Requests::confirm`]), and makes a 400 there. A confirmation without a refusal is final: whatever node refuses the purge
//! here afterwards, its sender may have been told that it is done. One with a refusal leaves the purge open until the other
//! one says how it was answered. What nobody says in the time that a purge has counts as done.
//!
//! **In doubt a purge was answered as done.** So it is for what came before this process and was not marked as refused
//! ([`Journal::refuse`](crate::journal::Journal::refuse)), and for what is not known here any more. A purge that was refused
//! leaves no doubt, whichever nodes were there then.
//!
//! A ban of everything drops what has tags or a pool. A request that is handed on as it came (`PURGE <url>`) may be of a page
//! that has neither, and a node that missed it is not made current by a flush.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::refusal::{Owed, Refusable, Refusals, Refused};
use crate::fleet::NodeId;
use crate::journal::{Entry, Position};

/// Purges that were handed on, or name a pool.
#[derive(Debug, Default)]
pub(super) struct Requests {
    noted: BTreeMap<Position, RefusablePurge>,
    /// What is in the journal up to here was looked at.
    looked_up_to: Position,
    /// Those that are open.
    open: BTreeSet<Position>,
    /// After which positions the purges are that are waited for, and how many after each.
    expected: BTreeMap<Position, usize>,
    /// Those that were refused, in the order in which that was known.
    refused: BTreeMap<u64, Position>,
    refusals: u64,
}

/// One of them.
#[derive(Clone, Debug)]
struct RefusablePurge {
    what: Refusable,
    /// Who sent it to this process.
    sender: Option<IpAddr>,
    answer: AnswerState,
    /// Who refused it before it was answered.
    refused_by: Refusals,
}

/// What the sender of a purge was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnswerState {
    /// Another replica accepted it, and says how it was answered.
    Open,
    /// Another replica accepted it, of a version that never says.
    Unknown,
    /// Nothing yet, and it was accepted here. What a node has refused by then is refused to the sender.
    Due,
    /// That it is done, or maybe so.
    Done,
    /// That nodes do not take it, or that none has taken it yet.
    Refused,
}

/// How a purge is to be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PurgeVerdict {
    /// As done.
    Done,
    /// These nodes do not take it.
    Refused(Refusals),
    /// No node has taken or refused it in time.
    Untaken,
}

/// What follows from a refusal.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Consequence {
    pub(super) owed: Owed,
    /// Purges that are refused to their senders from now on, and other replicas are to hear of it.
    pub(super) is_news: bool,
    /// Purges of older replicas that no node took before they counted.
    pub(super) taken_by_nobody: Vec<Position>,
}

impl RefusablePurge {
    fn new(what: Refusable, answer: AnswerState) -> Self {
        RefusablePurge { what, sender: None, answer, refused_by: Vec::new() }
    }

    /// What a node owes that does not take it once it was answered as done.
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

    /// Whether a node that missed it may hold what a flush leaves.
    fn leaves_doubt(&self) -> bool {
        self.what.is_handed_on && !self.is_refused()
    }

    /// Whether each of these nodes has refused it before it counted as answered: then nobody was told that it is done, and it
    /// is refused from now on.
    fn refuse_if_by_all(&mut self, fleet: &[&NodeId]) -> bool {
        let has_refused = |node: &&NodeId| self.refused_by.iter().any(|(id, _)| id == *node);
        let by_all = !fleet.is_empty() && fleet.iter().all(has_refused);
        if by_all {
            self.answer = AnswerState::Refused;
        }
        by_all
    }

    /// A node has refused it. Kept in order of the nodes: an answer names the first, whichever node was quickest.
    fn refuse(&mut self, node: &NodeId, reason: &Arc<str>) {
        if let Err(place) = self.refused_by.binary_search_by(|(id, _)| id.cmp(node)) {
            self.refused_by.insert(place, (node.clone(), Arc::clone(reason)));
        }
    }
}

impl Requests {
    /// Takes note of those among these that the process before this one knew, and of which of them were `refused`.
    pub(super) fn note_past(&mut self, entries: &[Arc<Entry>], refused: impl Fn(Position) -> bool) {
        for entry in entries {
            self.looked_up_to = entry.position;
            let Some(what) = Refusable::of(&entry.purge) else { continue };
            let answer = if refused(entry.position) { AnswerState::Refused } else { AnswerState::Done };
            self.noted.insert(entry.position, RefusablePurge::new(what, answer));
            if answer == AnswerState::Refused {
                // Whom that one told is not known.
                self.push_refused(entry.position);
            }
        }
    }

    /// Up to here nothing has to be looked for any more.
    pub(super) fn looked_up_to(&self) -> Position {
        self.looked_up_to
    }

    /// Takes note of those among these, whose answer is due: here, where they were accepted here.
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

    /// One was accepted here, and its answer is due.
    pub(super) fn record_accepted(&mut self, position: Position, what: Refusable, sender: IpAddr, floor: Position) {
        self.open.remove(&position);
        let request = self.noted.entry(position).or_insert_with(|| RefusablePurge::new(what, AnswerState::Due));
        (request.answer, request.sender) = (AnswerState::Due, Some(sender));
        self.retire(floor);
    }

    /// What can no longer be replayed (up to `floor`) goes, but for what has yet to be decided.
    fn retire(&mut self, floor: Position) {
        let expected = self.expected();
        let is_decided = |(position, request): &(&Position, &RefusablePurge)| match request.answer {
            // One that could not be made durable in time is never answered.
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

    /// A purge that comes after this position is waited for.
    pub(super) fn expect(&mut self, after: Position) {
        *self.expected.entry(after).or_default() += 1;
    }

    /// It is not any more; if it was accepted, at this position. Nobody was told that it is done if it was not answered.
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

    /// No purge is waited for that is not after this position.
    pub(super) fn expected(&self) -> Option<Position> {
        self.expected.keys().next().copied()
    }

    /// A node does not take these. What nothing is known of any more was answered as done. Of an older replica's purges that
    /// is so for what lies up to the `fence`, unless none of the `fleet` took it before.
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
            // It stands for those as well that would be passed over, and so they are not refused.
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

    /// The purge at this position is about to be answered; `is_taken`: a node has taken it, or there is none. Only after
    /// [`PurgeVerdict::Done`] is anything promised.
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

    /// The purge at this position is about to be confirmed to the replica that accepted it: which nodes do not take it here.
    /// If there are none, none may refuse it any more.
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

    /// Nodes do not take a purge of ours at another replica. `None` if it was answered as done; else whether that is news.
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

    /// Another replica says that it was refused to its sender. Says whether that is news.
    pub(super) fn record_refused(&mut self, position: Position) -> bool {
        // Of what was sent to this process, this process knows better, also before its handler comes.
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

    /// Whoever accepted it says that it was answered as done. Gives the nodes that have refused it here.
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

    /// Whoever accepted it never says how it was answered. Says whether none of the `fleet` takes it.
    pub(super) fn record_older_version(&mut self, position: Position, fleet: &[&NodeId]) -> bool {
        if !self.open.remove(&position) {
            return false;
        }
        self.noted.get_mut(&position).is_some_and(|request| {
            request.answer = AnswerState::Unknown;
            request.refuse_if_by_all(fleet)
        })
    }

    /// What is open up to this position counts as done. Gives the nodes that have refused it here.
    pub(super) fn expire_open(&mut self, last: Position) -> Vec<(Position, NodeId)> {
        let over: Vec<Position> = self.open.range(..=last).copied().collect();
        let done = over.into_iter().map(|position| (position, self.record_done(position)));
        done.flat_map(|(position, nodes)| nodes.into_iter().map(move |node| (position, node))).collect()
    }

    /// Whether its sender was told that it is done, or may have been.
    pub(super) fn is_done(&self, position: Position) -> bool {
        self.noted.get(&position).is_some_and(|request| request.answer == AnswerState::Done)
    }

    /// At most `most` of those that were refused, from the one with this number on, each with its number.
    pub(super) fn refused_from(&self, number: u64, most: usize) -> Vec<(u64, Position)> {
        self.refused.range(number..).take(most).map(|(number, position)| (*number, *position)).collect()
    }

    /// The newest of those that were refused, at most so many.
    pub(super) fn newest_refused(&self, most: usize) -> Vec<Position> {
        self.refused.values().rev().take(most).copied().collect()
    }

    /// The first of those that a node has passed over and may owe yet.
    pub(super) fn first_open(&self, node: &NodeId) -> Option<Position> {
        let refused_by = |position: &Position| self.noted.get(position).map(|request| &request.refused_by);
        let is_open = |position: &&Position| refused_by(position).is_some_and(|by| by.iter().any(|(id, _)| id == node));
        self.open.iter().find(is_open).copied()
    }

    /// Whether one lies after the first position, up to the second.
    pub(super) fn lie_in(&self, (after, last): (Position, Position)) -> bool {
        after < last && self.noted.range(after + 1..=last).any(|(_, request)| request.leaves_doubt())
    }

    /// The newest of those with this fingerprint: where it is, and who sent it.
    pub(super) fn newest(&self, fingerprint: u64) -> Option<(Position, Option<IpAddr>)> {
        let mut newest_first = self.noted.iter().rev();
        newest_first
            .find(|(_, request)| request.what.fingerprint == fingerprint)
            .map(|(position, request)| (*position, request.sender))
    }
}

#[cfg(test)]
mod tests;
