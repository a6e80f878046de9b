//! The span of a purge. Spans of its deliveries are made where they happen ([`Tracer::note_delivery`]).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use http::HeaderMap;

use crate::journal::Position;
use crate::purge::Purge;
use crate::telemetry::PurgeResult;
use crate::telemetry::traces::{
    Attribute, DayTime, FinishedSpan, OpenSpan, SpanKind, TraceContext, Tracer, purge_attributes,
};

/// A purge under way.
pub(super) struct PurgeSpan {
    tracer: Arc<Tracer>,
    ids: OpenSpan,
    began: Instant,
    attributes: Vec<(&'static str, Attribute)>,
}

impl PurgeSpan {
    /// Begins the span of a purge, if it is exported: within that of its sender, or a new one. Whoever may purge is trusted.
    pub(super) fn begin(tracer: Option<&Arc<Tracer>>, headers: &HeaderMap, source: IpAddr) -> Option<Self> {
        let tracer = Arc::clone(tracer?);
        let mut named = headers.get_all("traceparent").iter();
        let incoming = named.next().filter(|_| named.next().is_none());
        let ids = tracer.begin(incoming.and_then(|value| TraceContext::parse(value.as_bytes())), true);
        let attributes = vec![("network.peer.address", source.to_string().into())];
        ids.context.is_sampled.then(|| PurgeSpan { tracer, ids, began: Instant::now(), attributes })
    }

    /// It is this purge.
    pub(super) fn is_of(&mut self, purge: &Purge) {
        self.attributes.extend(purge_attributes(purge));
    }

    /// It was accepted, at this position of the journal.
    pub(super) fn is_at(&mut self, position: Position) {
        self.attributes.push(("clearcoat.purge.position", position.into()));
        self.tracer.note_purge(position, self.ids);
    }

    /// It was answered.
    pub(super) fn end(mut self, result: PurgeResult) {
        self.attributes.push(("clearcoat.purge.result", result.as_str().into()));
        let is_error = !matches!(result, PurgeResult::Applied | PurgeResult::Pending | PurgeResult::Fenced);
        if is_error {
            self.attributes.push(("error.type", result.as_str().into()));
        }
        let time = DayTime::now();
        self.tracer.hand_over(vec![FinishedSpan {
            ids: self.ids,
            name: "purge",
            kind: SpanKind::Server,
            began: time.of(self.began),
            ended: time.of(Instant::now()),
            is_error,
            attributes: self.attributes,
        }]);
    }
}
