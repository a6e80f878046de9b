//! Traces: who asked whom, and how long it took, as spans of [W3C Trace Context](https://www.w3.org/TR/trace-context/).
//!
//! **A span is made when what it is about has ended**, of what is noted on the way anyway (as the access log does), with the
//! times and ids that it had: nothing is opened, entered or locked on the request path. While it is under way, a request only
//! has its ids, since the node is told them in `traceparent`.
//!
//! **No worker ever waits for a collector.** Spans go into a bounded queue; one thread takes them out ([`crate::otlp`]). If
//! the collector hangs, the queue fills up, and further spans are dropped and counted: a trace is worth less than the
//! traffic that it describes.
//!
//! **No stranger decides what is exported.** The ids of a valid `traceparent` are taken from anybody: they only name things.
//! Its *sampled* flag is an order to store something, so it is followed if a trusted proxy has set it. For everybody else
//! `traces.sample` decides, by chance and not by the trace's id: a stranger chooses his ids.

mod context;
mod deliveries;
mod span;
mod told;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;
use prometheus::IntCounter;
use tokio::sync::{mpsc, watch};

pub use context::TraceContext;
pub use deliveries::DeliveryNote;
pub use span::{Attribute, FinishedSpan, SpanKind, purge_attributes};
pub use told::{ToldNote, TracedPurge};

use deliveries::DeliveryBook;
use told::{AcceptedBook, ToldBook};

/// The most requests whose spans wait for the exporter. Each is two or three spans of less than 2 KiB: some 20 MiB.
const QUEUE: usize = 4096;

/// The purges, the deliveries and the tellings that are remembered: the newest. What comes later than so many has no span.
const NEWEST: usize = 256;

fn push<T>(newest: &mut VecDeque<T>, item: T) {
    if newest.len() == NEWEST {
        newest.pop_front();
    }
    newest.push_back(item);
}

/// The ids of a span that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenSpan {
    /// What those who are asked on its behalf are told.
    pub context: TraceContext,
    /// The span that it is a part of.
    pub parent: Option<u64>,
}

impl OpenSpan {
    /// The first span of a trace.
    fn root(is_sampled: bool) -> Self {
        let trace_id = u128::from(fastrand::u64(1..)) << 64 | u128::from(fastrand::u64(..));
        OpenSpan { context: TraceContext { trace_id, span_id: fastrand::u64(1..), is_sampled }, parent: None }
    }

    /// A span within this one.
    pub fn child(&self) -> Self {
        Self::within(self.context)
    }

    fn within(parent: TraceContext) -> Self {
        let context = TraceContext { span_id: fastrand::u64(1..), ..parent };
        OpenSpan { context, parent: Some(parent.span_id) }
    }
}

/// Begins spans and hands them over, for everybody in the process.
#[derive(Debug)]
pub struct Tracer {
    sample: f64,
    queue: mpsc::Sender<Vec<FinishedSpan>>,
    dropped: IntCounter,
    deliveries: Mutex<DeliveryBook>,
    accepted: Mutex<AcceptedBook>,
    /// The serial of the next purge that is accepted with a trace.
    next_accepted: watch::Sender<u64>,
    told: Mutex<ToldBook>,
}

impl Tracer {
    /// A tracer, and what it hands over. `sample`: the share of requests that are exported where nobody who is trusted has
    /// decided, 0 to 1. `dropped` counts spans that were lost.
    pub fn new(sample: f64, dropped: IntCounter) -> (Arc<Self>, mpsc::Receiver<Vec<FinishedSpan>>) {
        let (queue, spans) = mpsc::channel(QUEUE);
        let tracer = Tracer {
            sample,
            queue,
            dropped,
            deliveries: Mutex::default(),
            accepted: Mutex::default(),
            next_accepted: watch::Sender::new(0),
            told: Mutex::default(),
        };
        (Arc::new(tracer), spans)
    }

    /// Begins the span of a request. `incoming`: what its sender said; `is_trusted`: whether that decides what is exported.
    pub fn begin(&self, incoming: Option<TraceContext>, is_trusted: bool) -> OpenSpan {
        let draw = || fastrand::f64() < self.sample;
        match incoming {
            Some(context) if is_trusted => OpenSpan::within(context),
            Some(context) => OpenSpan::within(TraceContext { is_sampled: draw(), ..context }),
            None => OpenSpan::root(draw()),
        }
    }

    /// Hands over the spans of a request, or drops and counts them if there is no room. Never waits.
    pub fn hand_over(&self, spans: Vec<FinishedSpan>) {
        if let Err(refused) = self.queue.try_send(spans) {
            self.dropped.inc_by(refused.into_inner().len() as u64);
        }
    }

    /// Records which span the purge at this position of the journal has, that was accepted here: its deliveries are within it,
    /// and what other replicas do with it.
    pub fn note_purge(&self, position: u64, span: OpenSpan) {
        if span.context.is_sampled {
            let made = self.deliveries.lock().note_purge(position, span);
            self.hand_over_some(made);
            let next = self.accepted.lock().note(position, span.context);
            self.next_accepted.send_replace(next);
        }
    }

    /// At most `most` of the purges that were accepted here with a trace, from the one with this serial on.
    pub fn accepted_from(&self, serial: u64, most: usize) -> Vec<TracedPurge> {
        self.accepted.lock().list_from(serial, most)
    }

    /// The serial of the next of them, to wait for its moves.
    pub fn watch_accepted(&self) -> watch::Receiver<u64> {
        self.next_accepted.subscribe()
    }

    /// Records a purge that another replica told us of. It gets a span once its trace is known.
    pub fn note_told(&self, told: ToldNote) {
        let made = self.told.lock().note_told(told);
        self.finish_told(made);
    }

    /// Records the trace of a purge that another replica tells us of by this name.
    pub fn note_told_context(&self, id: &str, context: TraceContext) {
        if context.is_sampled {
            let made = self.told.lock().note_context(id, context);
            self.finish_told(made);
        }
    }

    fn finish_told(&self, made: Option<(u64, FinishedSpan)>) {
        let Some((position, span)) = made else { return };
        let mut made = self.deliveries.lock().note_purge(position, span.ids);
        made.push(span);
        self.hand_over(made);
    }

    /// Records a delivery: each purge that it was for gets a span of it.
    pub fn note_delivery(&self, delivery: DeliveryNote) {
        let made = self.deliveries.lock().note_delivery(delivery);
        self.hand_over_some(made);
    }

    fn hand_over_some(&self, spans: Vec<FinishedSpan>) {
        if !spans.is_empty() {
            self.hand_over(spans);
        }
    }
}

/// Turns times that were measured into times of day.
#[derive(Clone, Copy, Debug)]
pub struct DayTime {
    instant: Instant,
    at: SystemTime,
}

impl DayTime {
    /// By the wall clock as it is now.
    pub fn now() -> Self {
        DayTime { instant: Instant::now(), at: SystemTime::now() }
    }

    /// When this was.
    pub fn of(&self, instant: Instant) -> SystemTime {
        match self.instant.checked_duration_since(instant) {
            Some(ago) => self.at - ago,
            None => self.at + (instant - self.instant),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter() -> IntCounter {
        IntCounter::new("dropped", "of a test").unwrap()
    }

    const SAMPLED: TraceContext = TraceContext { trace_id: 7, span_id: 9, is_sampled: true };

    #[test]
    fn the_ids_are_anybodys_and_who_is_trusted_decides_what_is_exported() {
        let (never, _spans) = Tracer::new(0.0, counter());
        let (always, _spans) = Tracer::new(1.0, counter());
        let unsampled = TraceContext { is_sampled: false, ..SAMPLED };
        for (tracer, incoming, is_trusted, expected) in [
            (&never, SAMPLED, true, true),
            (&never, SAMPLED, false, false),
            (&always, unsampled, true, false),
            (&always, unsampled, false, true),
        ] {
            let span = tracer.begin(Some(incoming), is_trusted);
            assert_eq!((span.context.trace_id, span.parent), (7, Some(9)));
            assert_ne!(span.context.span_id, 9);
            assert_eq!(span.context.is_sampled, expected, "{incoming:?}, trusted: {is_trusted}");
        }
        let root = always.begin(None, false);
        assert!(root.context.is_sampled && root.parent.is_none() && !never.begin(None, true).context.is_sampled);
    }

    #[test]
    fn what_finds_no_room_is_dropped_and_counted() {
        let dropped = counter();
        let (tracer, spans) = Tracer::new(1.0, dropped.clone());
        let span = || FinishedSpan::test(tracer.begin(None, true));
        (0..QUEUE).for_each(|_| tracer.hand_over(vec![span()]));
        assert_eq!(dropped.get(), 0);
        tracer.hand_over(vec![span(), span()]);
        assert_eq!(dropped.get(), 2);
        drop(spans);
        tracer.hand_over(vec![span()]);
        assert_eq!(dropped.get(), 3);
    }
}
