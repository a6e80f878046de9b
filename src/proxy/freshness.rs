//! The edge's look at what a cache answers: is it older than a purge?
//!
//! The fence keeps readers from a cache that missed a purge. What it cannot see is a page that a cache stored after its
//! ban, or kept in spite of it. So each answer to GET and HEAD that has a seal is judged by it ([`crate::seal`]), before a
//! byte of it goes to the client. One that is stale is thrown away; what follows stands in [`super::second_look`].
//!
//! An answer without a seal is from before answers were sealed, of a VCL that drops the field, or Varnish's own. It passes if
//! its cache had acknowledged everything that its reader remembers when it was asked: then the fence has kept the promise. So
//! does a refusal (5xx, 405), which is no page. From a cache that has yet to get purges it is as good as stale.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use crate::fleet::NodeId;
use crate::http1::{Method, RequestHead, ResponseHead};
use crate::seal::{Judgement, Position, PurgedNames, Seal, StalePage, asked_prefix, write_asked};
use crate::telemetry::{Metrics, NodeMetrics, SealVerdict};

/// Who tells caches of stale pages.
pub trait Refresh: Send + Sync {
    /// Has a cache get what was purged of this page. Resolves with `true` when it has acknowledged that, and with `false` if that
    /// takes too long, or is in vain.
    fn refresh(&self, node: &NodeId, page: StalePage) -> Pin<Box<dyn Future<Output = bool> + Send>>;

    /// The cache still has this page, which it has acknowledged to have dropped.
    fn record_kept(&self, node: &NodeId, page: &StalePage);
}

/// Judges answers by their seals.
#[derive(Clone)]
pub struct Freshness {
    purged: Arc<PurgedNames>,
    /// What begins each note about a reader.
    asked_prefix: Arc<[u8]>,
    refresh: Arc<dyn Refresh>,
    metrics: Arc<Metrics>,
}

impl Freshness {
    /// Judges by what was purged, and has caches told by `refresh`.
    pub fn new(purged: Arc<PurgedNames>, refresh: Arc<dyn Refresh>, metrics: Arc<Metrics>) -> Self {
        let asked_prefix = asked_prefix(purged.lineage().journal()).into();
        Freshness { purged, asked_prefix, refresh, metrics }
    }

    /// What a reader remembers who arrives now.
    pub(super) fn known(&self) -> Position {
        self.purged.head()
    }

    /// Appends what a cache passes on to the origin about the reader of a page: this request's name and what he remembers.
    pub(super) fn write_asked(&self, out: &mut Vec<u8>, id: u64, known: Position, request: &RequestHead) {
        write_asked(out, &self.asked_prefix, known, id, request.target());
    }

    /// The page, if this answer of a cache is stale for a reader who remembers `known`. `asked_at`: what the cache had
    /// acknowledged when it was asked; `is_sealing`: whether the fence admitted it then though it missed what a seal shows.
    /// Counts what it finds.
    pub(super) fn find_stale(
        &self,
        request: &RequestHead,
        answer: &ResponseHead,
        (known, asked_at, is_sealing): (Position, Position, bool),
        metrics: impl FnOnce() -> Arc<NodeMetrics>,
    ) -> Option<Box<StalePage>> {
        if !matches!(request.method, Method::Get | Method::Head) {
            return None;
        }
        let checks = &self.metrics.seal.checks;
        let page = (request.host().unwrap_or_default(), request.target());
        let Some(seal) = answer.seal().and_then(Seal::parse) else {
            checks.count(SealVerdict::Unsealed);
            metrics().varnish.iter().for_each(|varnish| varnish.unsealed.inc());
            let passes = asked_at >= known || !is_sealing || answer.status == 405 || answer.status >= 500;
            return (!passes).then(|| Box::new(StalePage::unsealed(known, page, asked_at)));
        };
        let Judgement::Stale(because) = self.purged.judge(&seal, request.target(), known) else {
            checks.count(SealVerdict::Fresh);
            return None;
        };
        checks.count(SealVerdict::Stale);
        metrics().varnish.iter().for_each(|varnish| varnish.stale_caught.inc());
        Some(Box::new(StalePage::new(&seal, because, page, asked_at)))
    }

    /// Has the cache told once more, and waits for that. Says whether it has acknowledged it.
    pub(super) async fn refresh(&self, node: &NodeId, page: StalePage) -> bool {
        self.refresh.refresh(node, page).await
    }

    /// The cache still has this page, which it has acknowledged to have dropped.
    pub(super) fn record_kept(&self, node: &NodeId, page: &StalePage) {
        self.refresh.record_kept(node, page);
    }
}

impl fmt::Debug for Freshness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Freshness").field("purged", &self.purged).finish_non_exhaustive()
    }
}
