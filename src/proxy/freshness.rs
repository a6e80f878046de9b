//! The edge's freshness check: is the answer of a cache older than a purge of it?
//!
//! The fence keeps readers from a cache that missed a purge. It cannot detect a page that a cache stored after the ban,
//! or kept in spite of it. So each answer to GET and HEAD is judged by its seal ([`crate::seal`]) before a byte of it
//! is sent to the client. A stale answer is discarded; [`super::second_look`] decides what happens next.
//!
//! An answer without a seal was stored before answers were sealed, comes from a VCL that drops the field, or is
//! Varnish's own. It passes if its cache, when it was asked, had acknowledged every purge that the reader remembers, and
//! does not [hide seals](crate::fleet::Live::may_hide_seals): the fence has then kept the promise. So does an error (5xx,
//! 405), which is not a page. From a cache that lacks such a purge, it counts as stale. A page without a seal of a cache
//! that relies on them has its node tried: its VCL may have begun to drop them.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use crate::fleet::{AskedCache, Node, NodeId};
use crate::http1::{Method, RequestHead, ResponseHead};
use crate::mutants::Mutant;
use crate::seal::{Judgement, Position, PurgedNames, StalePage, asked_prefix, write_asked};
use crate::telemetry::{Metrics, NodeMetrics, SealVerdict};

/// Repeats purges to caches that return stale pages.
pub trait Refresh: Send + Sync {
    /// Sends a cache the purges of this page again. Resolves with `true` once the cache has acknowledged them, and with
    /// `false` if that takes too long or cannot succeed.
    fn refresh(&self, node: &NodeId, page: StalePage) -> Pin<Box<dyn Future<Output = bool> + Send>>;

    /// Records that the cache still returns this page after acknowledging its ban.
    fn record_kept(&self, node: &NodeId, page: &StalePage);

    /// Has a cache tried soon: it returns seals, as far as is known, and has answered a page without one.
    fn try_seals(&self, node: &NodeId);
}

/// Judges answers by their seals.
#[derive(Clone)]
pub struct Freshness {
    purged: Arc<PurgedNames>,
    /// The common prefix of all `X-Clearcoat-Asked` values.
    asked_prefix: Arc<[u8]>,
    refresh: Arc<dyn Refresh>,
    metrics: Arc<Metrics>,
}

impl Freshness {
    /// Judges answers by `purged`; `refresh` repeats purges to caches.
    pub fn new(purged: Arc<PurgedNames>, refresh: Arc<dyn Refresh>, metrics: Arc<Metrics>) -> Self {
        let asked_prefix = asked_prefix(purged.lineage().journal(), purged.lineage().run()).into();
        Freshness { purged, asked_prefix, refresh, metrics }
    }

    /// The position that a reader who arrives now remembers: that of the last recorded purge.
    pub(super) fn known(&self) -> Position {
        self.purged.head()
    }

    /// Appends the `X-Clearcoat-Asked` value, which a cache forwards to the origin: the position that the reader of the
    /// page remembers, and the id of the request.
    pub(super) fn write_asked(&self, out: &mut Vec<u8>, id: u64, known: Position, request: &RequestHead) {
        write_asked(out, &self.asked_prefix, known, id, request.target());
    }

    /// The page, if this answer of a cache is stale for a reader who remembers `known`, or may be; `asked` is what was known of
    /// the cache when it was asked. Counts the verdict.
    pub(super) fn find_stale(
        &self,
        request: &RequestHead,
        answer: &ResponseHead,
        (known, asked): (Position, AskedCache),
        node: &Node,
        metrics: impl FnOnce() -> Arc<NodeMetrics>,
    ) -> Option<Box<StalePage>> {
        if !matches!(request.method, Method::Get | Method::Head) || Mutant::BlindEdge.lives() {
            return None;
        }
        let checks = &self.metrics.seal.checks;
        let page = (request.host().unwrap_or_default(), request.target());
        let Some(seal) = answer.seal().and_then(|seal| self.purged.read(seal)) else {
            checks.count(SealVerdict::Unsealed);
            metrics().varnish.iter().for_each(|varnish| varnish.unsealed.inc());
            let is_doubted = is_kept_by_caches(answer.status) && asked.may_hide_seals(&node.live);
            if (answer.status == 200 || is_doubted) && node.live.relies_on_seals() && node.live.question() {
                self.refresh.try_seals(node.id());
            }
            let has_all = asked.position >= known || !asked.is_sealing;
            let passes = has_all && !is_doubted || answer.status == 405 || answer.status >= 500;
            return (!passes).then(|| Box::new(StalePage::unsealed(known, page, asked.position)));
        };
        let Judgement::Stale(because) = self.purged.judge(&seal, request.target(), known) else {
            checks.count(SealVerdict::Fresh);
            return None;
        };
        checks.count(SealVerdict::Stale);
        metrics().varnish.iter().for_each(|varnish| varnish.stale_caught.inc());
        Some(Box::new(StalePage::new(&seal, because, page, asked.position)))
    }

    /// Sends the cache the purges of this page again, and waits. Returns whether the cache has acknowledged them.
    pub(super) async fn refresh(&self, node: &NodeId, page: StalePage) -> bool {
        self.refresh.refresh(node, page).await
    }

    /// Records that the cache still returns this page after acknowledging its ban.
    pub(super) fn record_kept(&self, node: &NodeId, page: &StalePage) {
        self.refresh.record_kept(node, page);
    }
}

/// Whether Varnish keeps an answer with this status unless its VCL says otherwise (`RFC2616_Ttl`; RFC 9110 section 15.1). What else
/// comes without a seal is an answer of the VCL itself, such as that of one that asks for a password.
fn is_kept_by_caches(status: u16) -> bool {
    matches!(status, 200 | 203 | 204 | 206 | 300 | 301 | 302 | 303 | 304 | 307 | 308 | 404 | 410 | 414)
}

impl fmt::Debug for Freshness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Freshness").field("purged", &self.purged).finish_non_exhaustive()
    }
}
