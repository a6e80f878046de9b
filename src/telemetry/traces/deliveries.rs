//! Which purge a delivery was for.
//!
//! A delivery brings a node from one position of the journal to another, for all purges between them; a purge knows its
//! position. Neither waits for the other: a delivery may be over before its purge has been told its position, or come
//! hours later. So both are kept for a while, and whoever comes second makes the span.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::SystemTime;

use super::{FinishedSpan, OpenSpan, SpanKind, push};
use crate::fleet::NodeId;

/// A delivery to a node, of a part of the journal.
#[derive(Clone, Debug)]
pub struct DeliveryNote {
    /// The positions that it was for.
    pub positions: RangeInclusive<u64>,
    /// To whom.
    pub node: NodeId,
    /// Why: `new`, or a repetition.
    pub kind: &'static str,
    /// The bans that the node took.
    pub bans: u64,
    /// Why it failed; `None` if it did not.
    pub error: Option<&'static str>,
    /// When it began.
    pub began: SystemTime,
    /// When it ended.
    pub ended: SystemTime,
}

#[derive(Debug, Default)]
pub(super) struct DeliveryBook {
    purges: VecDeque<(u64, OpenSpan)>,
    deliveries: VecDeque<DeliveryNote>,
}

impl DeliveryBook {
    pub(super) fn note_purge(&mut self, position: u64, span: OpenSpan) -> Vec<FinishedSpan> {
        push(&mut self.purges, (position, span));
        let of_it = self.deliveries.iter().filter(|delivery| delivery.positions.contains(&position));
        of_it.map(|delivery| delivery.span_within(&span)).collect()
    }

    pub(super) fn note_delivery(&mut self, delivery: DeliveryNote) -> Vec<FinishedSpan> {
        let its = self.purges.iter().filter(|(position, _)| delivery.positions.contains(position));
        let spans = its.map(|(_, purge)| delivery.span_within(purge)).collect();
        push(&mut self.deliveries, delivery);
        spans
    }
}

impl DeliveryNote {
    fn span_within(&self, purge: &OpenSpan) -> FinishedSpan {
        let mut attributes = vec![
            ("clearcoat.node", self.node.to_string().into()),
            ("clearcoat.delivery.kind", self.kind.into()),
            ("clearcoat.delivery.bans", self.bans.into()),
            ("clearcoat.delivery.ok", self.error.is_none().into()),
        ];
        attributes.extend(self.error.map(|error| ("error.type", error.into())));
        FinishedSpan {
            ids: purge.child(),
            name: "delivery",
            kind: SpanKind::Client,
            began: self.began,
            ended: self.ended,
            is_error: self.error.is_some(),
            attributes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::traces::{NEWEST, TraceContext};

    fn purge(span_id: u64) -> OpenSpan {
        OpenSpan { context: TraceContext { trace_id: 1, span_id, is_sampled: true }, parent: None }
    }

    fn delivery(positions: RangeInclusive<u64>) -> DeliveryNote {
        let (began, ended) = (SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH);
        let node = NodeId::try_from("varnish-1").unwrap();
        DeliveryNote { positions, node, kind: "new", bans: 1, error: None, began, ended }
    }

    fn parents(spans: &[FinishedSpan]) -> Vec<u64> {
        spans.iter().map(|span| span.ids.parent.unwrap()).collect()
    }

    #[test]
    fn a_delivery_is_a_part_of_each_of_its_purges_whoever_is_noted_first() {
        let mut book = DeliveryBook::default();
        for position in [4, 5, 7] {
            assert!(book.note_purge(position, purge(position)).is_empty());
        }
        assert_eq!(parents(&book.note_delivery(delivery(5..=7))), [5, 7]);
        assert_eq!(parents(&book.note_purge(6, purge(6))), [6]);
        assert!(book.note_purge(8, purge(8)).is_empty());
    }

    #[test]
    fn only_the_newest_are_remembered() {
        let mut book = DeliveryBook::default();
        (1..=NEWEST as u64 + 10).for_each(|position| drop(book.note_purge(position, purge(position))));
        assert_eq!(book.note_delivery(delivery(1..=10)).len(), 0);
        assert_eq!(book.note_delivery(delivery(1..=u64::MAX)).len(), NEWEST);
    }
}
