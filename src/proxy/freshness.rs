//! The edge's look at what a cache answers: is it older than a purge?
//!
//! The fence keeps readers from a cache that missed a purge. What it cannot see is a page that a cache stored after its
//! ban, or kept in spite of it. So each answer to GET and HEAD that has a seal is judged by it ([`crate::seal`]), before a
//! byte of it goes to the client. One that is stale is thrown away; what follows stands in [`super::second_look`].
//!
//! An answer without a seal passes: it is from before answers were sealed, of a VCL that drops the field, or Varnish's own.
//! Those keep the promise as far as the fence does, and are counted.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use crate::fleet::NodeId;
use crate::http1::{Method, RequestHead, ResponseHead};
use crate::seal::{Judgement, Position, PurgedNames, Seal, StalePage, write_asked};
use crate::telemetry::{Metrics, NodeMetrics, SealVerdict};

/// Has a cache told once more of what was purged of this page. Resolves when it has acknowledged that, with `true`, or when
/// that takes too long.
pub type Refresh = Arc<dyn Fn(&NodeId, StalePage) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// Judges answers by their seals.
#[derive(Clone)]
pub struct Freshness {
    purged: Arc<PurgedNames>,
    refresh: Refresh,
    metrics: Arc<Metrics>,
}

impl Freshness {
    /// Judges by what was purged, and has caches told by `refresh`.
    pub fn new(purged: Arc<PurgedNames>, refresh: Refresh, metrics: Arc<Metrics>) -> Self {
        Freshness { purged, refresh, metrics }
    }

    /// What a reader remembers who arrives now.
    pub(super) fn known(&self) -> Position {
        self.purged.head()
    }

    /// Appends what a cache passes on to the origin about the reader of a page: this request's name and what he remembers.
    pub(super) fn write_asked(&self, out: &mut Vec<u8>, id: u64, known: Position, request: &RequestHead) {
        write_asked(out, self.purged.lineage().journal(), known, id, request.target());
    }

    /// The page, if this answer of a cache is stale for a reader who remembers `known`. Counts what it finds.
    pub(super) fn find_stale(
        &self,
        request: &RequestHead,
        answer: &ResponseHead,
        known: Position,
        node: &NodeMetrics,
    ) -> Option<Box<StalePage>> {
        if !matches!(request.method, Method::Get | Method::Head) {
            return None;
        }
        let checks = &self.metrics.seal.checks;
        let Some(seal) = answer.seal().and_then(Seal::parse) else {
            checks.count(SealVerdict::Unsealed);
            node.varnish.iter().for_each(|varnish| varnish.unsealed.inc());
            return None;
        };
        let Judgement::Stale(because) = self.purged.judge(&seal, request.target(), known) else {
            checks.count(SealVerdict::Fresh);
            return None;
        };
        checks.count(SealVerdict::Stale);
        node.varnish.iter().for_each(|varnish| varnish.stale_caught.inc());
        Some(Box::new(StalePage::new(&seal, because, request.path())))
    }

    /// Has the cache told once more, and waits for that. Says whether it has acknowledged it.
    pub(super) async fn refresh(&self, node: &NodeId, page: StalePage) -> bool {
        (self.refresh)(node, page).await
    }
}

impl fmt::Debug for Freshness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Freshness").field("purged", &self.purged).finish_non_exhaustive()
    }
}
