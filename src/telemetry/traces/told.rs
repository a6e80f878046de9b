//! Purges that one replica tells another: which trace they belong to.
//!
//! The one that accepts a purge learns its position a moment after the journal has it, when it may have been told already. So
//! its trace follows on its own, in the next message to that replica, and the receiver keeps what comes first, the telling or
//! the trace, until the other one is there. No telling waits for a trace.

use std::collections::VecDeque;
use std::time::SystemTime;

use super::{Attribute, FinishedSpan, OpenSpan, SpanKind, TraceContext, push};

/// A purge that another replica told us of, from its message until it was confirmed.
#[derive(Clone, Debug)]
pub struct ToldNote {
    /// Its name, the same at all replicas.
    pub id: String,
    /// Its position in our journal.
    pub position: u64,
    /// When the message came.
    pub began: SystemTime,
    /// When it was confirmed.
    pub ended: SystemTime,
    /// What else there is to say.
    pub attributes: Vec<(&'static str, Attribute)>,
}

/// A purge that was accepted here and has a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracedPurge {
    /// Grows by one from each to the next.
    pub serial: u64,
    /// Its position in our journal.
    pub position: u64,
    /// Its span.
    pub context: TraceContext,
}

/// The newest purges that were accepted here.
#[derive(Debug, Default)]
pub(super) struct AcceptedBook {
    next: u64,
    newest: VecDeque<TracedPurge>,
}

impl AcceptedBook {
    /// Notes one. Returns the serial of the next.
    pub(super) fn note(&mut self, position: u64, context: TraceContext) -> u64 {
        push(&mut self.newest, TracedPurge { serial: self.next, position, context });
        self.next += 1;
        self.next
    }

    /// At most `most`, from the one with this serial on.
    pub(super) fn list_from(&self, serial: u64, most: usize) -> Vec<TracedPurge> {
        self.newest.iter().filter(|traced| traced.serial >= serial).take(most).copied().collect()
    }
}

/// What other replicas have told lately, and of which trace it is. After a broken connection both are told once more, and
/// that changes nothing.
#[derive(Debug, Default)]
pub(super) struct ToldBook {
    newest: VecDeque<ToldPurge>,
}

/// What is known of one purge, by its name.
#[derive(Debug)]
enum ToldPurge {
    /// Its trace.
    Traced(String, TraceContext),
    /// That it was told.
    Told(ToldNote),
    /// Both: it has its span.
    Done(String),
}

impl ToldPurge {
    fn id(&self) -> &str {
        match self {
            ToldPurge::Traced(id, _) | ToldPurge::Done(id) => id,
            ToldPurge::Told(told) => &told.id,
        }
    }
}

impl ToldBook {
    /// Returns the span, with the position of its purge, if this was the second half.
    pub(super) fn note_told(&mut self, told: ToldNote) -> Option<(u64, FinishedSpan)> {
        let Some(known) = self.find(&told.id) else {
            push(&mut self.newest, ToldPurge::Told(told));
            return None;
        };
        let ToldPurge::Traced(_, context) = *known else { return None };
        *known = ToldPurge::Done(told.id.clone());
        Some(told.span_within(context))
    }

    /// The same for its trace.
    pub(super) fn note_context(&mut self, id: &str, context: TraceContext) -> Option<(u64, FinishedSpan)> {
        let Some(known) = self.find(id) else {
            push(&mut self.newest, ToldPurge::Traced(id.to_owned(), context));
            return None;
        };
        match std::mem::replace(known, ToldPurge::Done(id.to_owned())) {
            ToldPurge::Told(told) => Some(told.span_within(context)),
            before => {
                *known = before;
                None
            }
        }
    }

    fn find(&mut self, id: &str) -> Option<&mut ToldPurge> {
        self.newest.iter_mut().find(|purge| purge.id() == id)
    }
}

impl ToldNote {
    /// Its span, with its position.
    fn span_within(self, context: TraceContext) -> (u64, FinishedSpan) {
        let span = FinishedSpan {
            ids: OpenSpan::within(context),
            name: "told",
            kind: SpanKind::Server,
            began: self.began,
            ended: self.ended,
            is_error: false,
            attributes: self.attributes,
        };
        (self.position, span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::traces::NEWEST;

    const CONTEXT: TraceContext = TraceContext { trace_id: 7, span_id: 9, is_sampled: true };

    fn told(id: &str) -> ToldNote {
        let (began, ended) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        ToldNote { id: id.to_owned(), position: 4, began, ended, attributes: Vec::new() }
    }

    #[test]
    fn a_telling_has_one_span_whether_it_or_its_trace_comes_first() {
        let mut book = ToldBook::default();
        assert!(book.note_told(told("a")).is_none());
        let (position, span) = book.note_context("a", CONTEXT).unwrap();
        assert_eq!((position, span.ids.context.trace_id, span.ids.parent), (4, 7, Some(9)));
        // Sent again after a broken connection.
        assert!(book.note_context("a", CONTEXT).is_none());
        assert!(book.note_context("b", CONTEXT).is_none());
        assert!(book.note_told(told("b")).is_some() && book.note_told(told("b")).is_none());
    }

    #[test]
    fn what_was_accepted_is_listed_from_where_one_was_and_only_the_newest() {
        let mut book = AcceptedBook::default();
        (0..NEWEST as u64 + 10).for_each(|position| _ = book.note(position + 100, CONTEXT));
        let positions =
            |serial, most| -> Vec<u64> { book.list_from(serial, most).iter().map(|traced| traced.position).collect() };
        assert_eq!(positions(0, 2), [110, 111]);
        assert_eq!(positions(NEWEST as u64 + 8, 16), [100 + NEWEST as u64 + 8, 100 + NEWEST as u64 + 9]);
        assert!(positions(NEWEST as u64 + 10, 16).is_empty());
    }
}
