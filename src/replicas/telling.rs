//! The spans of purges that another replica tells us of: from its message until it is confirmed here.

use std::time::Instant;

use super::message::Message;
use crate::journal::Shared;
use crate::telemetry::traces::{DayTime, ToldNote, TraceContext, Tracer, purge_attributes};

/// A message under way here.
pub(super) struct Telling<'t> {
    tracer: &'t Tracer,
    began: Instant,
}

impl<'t> Telling<'t> {
    /// A message that has just come. `None` if there are no traces.
    pub(super) fn begin(tracer: Option<&'t Tracer>, message: &Message) -> Option<Self> {
        let tracer = tracer?;
        for told in &message.traces {
            if let Some(context) = TraceContext::parse(told.traceparent.as_bytes()) {
                tracer.note_told_context(&told.id, context);
            }
        }
        Some(Telling { tracer, began: Instant::now() })
    }

    /// Its purges are confirmed.
    pub(super) fn end(self, journal: &dyn Shared, message: &Message) {
        let time = DayTime::now();
        let (began, ended) = (time.of(self.began), time.of(Instant::now()));
        for purge in &message.purges {
            let Some(position) = journal.place_of(&purge.id) else { continue };
            let mut attributes = vec![
                ("clearcoat.purge.position", position.into()),
                ("clearcoat.replica", message.from.to_string().into()),
            ];
            attributes.extend(purge_attributes(&purge.purge));
            self.tracer.note_told(ToldNote { id: purge.id.clone(), position, began, ended, attributes });
        }
    }
}
