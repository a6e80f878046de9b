//! What is noted of a request while it is under way, for its spans ([`super::spans`]).

use std::sync::Arc;
use std::time::Instant;

use super::failure::Failure;
use crate::fleet::Node;
use crate::telemetry::FailureReason;
use crate::telemetry::traces::OpenSpan;

/// The most tries that have spans. A request has two, rarely more.
const MAX_TRIES: usize = 16;

/// What is noted of a request for its spans.
#[derive(Debug)]
pub(super) struct RequestSpans {
    pub(super) own: OpenSpan,
    pub(super) tries: Vec<TrySpan>,
    /// What the node of the current try is told.
    traceparent: String,
}

/// What is noted of a try.
#[derive(Debug)]
pub(super) struct TrySpan {
    pub(super) ids: OpenSpan,
    pub(super) node: Arc<Node>,
    pub(super) began: Instant,
    /// When it failed, and why.
    pub(super) failed: Option<(Instant, FailureReason)>,
}

impl RequestSpans {
    /// Of a request whose span this is.
    pub(super) fn new(own: OpenSpan) -> Self {
        RequestSpans { own, tries: Vec::new(), traceparent: String::new() }
    }

    /// An attempt at this node begins.
    pub(super) fn begin_try(&mut self, node: &Arc<Node>) {
        let ids = self.own.child();
        self.traceparent = ids.context.to_header();
        if ids.context.is_sampled && self.tries.len() < MAX_TRIES {
            self.tries.push(TrySpan { ids, node: Arc::clone(node), began: Instant::now(), failed: None });
        }
    }

    /// The last attempt failed.
    pub(super) fn fail_try(&mut self, failure: &Failure) {
        if let Some(last) = self.tries.last_mut() {
            last.failed.get_or_insert((Instant::now(), failure.reason()));
        }
    }

    /// What the node is told.
    pub(super) fn traceparent(&self) -> &[u8] {
        self.traceparent.as_bytes()
    }
}
