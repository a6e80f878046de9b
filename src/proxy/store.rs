//! What a cache behind a listener may store.
//!
//! Every page passes the origin on its way into a cache, so the guard ([`crate::purge::Guard`]) is asked here: a page
//! that was rendered before a purge must not be stored after it.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use crate::http1::{Method, RequestHead, ResponseHead};
use crate::mutants::Mutant;
use crate::purge::{Guard, Page, Passage, SocketPair};
use crate::seal::{Asked, MAX_STAMPS, Name, Position, PurgedNames, STAMP_LEN, Stamp, write_seal};
use crate::telemetry::Metrics;

/// Makes it durable that no seal shows these tags. Resolves with whether it is.
pub type NoteTags = Arc<dyn Fn(Vec<Name>) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;

/// The most bytes of a seal: with its name it stays below the default of Varnish's `http_resp_hdr_len`, 8 KiB.
const MAX_SEAL: usize = 8_128;

/// The bytes of an answer's head that every Varnish takes: the default of its `http_resp_size`, 32 KiB, without what is added
/// on the way. A longer head comes through one with a higher limit.
const USUAL_HEAD: usize = 32 * 1024 - 512;

/// Whether a seal of as many stamps and names fits into an answer whose head has `head_len` bytes, where that fits without
/// it.
fn fits(head_len: usize, stamps: usize, names: usize) -> bool {
    let seal = 64 + stamps * STAMP_LEN + names * Name::LEN;
    seal <= MAX_SEAL && (head_len > USUAL_HEAD || head_len + seal <= USUAL_HEAD)
}

/// Decides about each answer to a cache.
#[derive(Clone)]
pub struct StorePolicy {
    guard: Option<Arc<Guard>>,
    /// What seals are made by, and who notes tags that no seal shows.
    sealing: Option<(Arc<PurgedNames>, NoteTags)>,
    metrics: Arc<Metrics>,
}

/// What is known before a request goes to a node: the answer cannot be older than that.
#[derive(Clone, Debug, Default)]
pub(super) struct RenderMark {
    /// The guard's sequence number; 0 without a guard.
    guard: u64,
    /// The head of the journal; 0 if answers are not sealed.
    position: Position,
    /// What the journals of other replicas had reached, if there are any.
    heard: Option<Arc<Vec<Stamp>>>,
}

impl RenderMark {
    /// The stamps of an answer: ours, those of the other replicas, and that of the reader who asked. All purges that they
    /// cover were made before the page was requested.
    fn stamps(&self, purged: &PurgedNames, asked: Option<Stamp>) -> impl Iterator<Item = Stamp> {
        let own = purged.lineage().stamp(self.position);
        let heard = self.heard.as_deref().map(Vec::as_slice).unwrap_or_default();
        let others = heard.iter().map(move |heard| match asked.filter(|asked| asked.journal == heard.journal) {
            // Its process asked a moment ago, so it is the present one.
            Some(asked) if asked.run != heard.run || asked.position > heard.position => asked,
            _ => *heard,
        });
        let is_new =
            |asked: &Stamp| asked.journal != own.journal && heard.iter().all(|heard| heard.journal != asked.journal);
        let asked = asked.filter(is_new);
        std::iter::once(own).chain(asked).chain(others).take(MAX_STAMPS)
    }

    /// How many stamps there are at most.
    fn max_stamps(&self) -> usize {
        (2 + self.heard.as_ref().map_or(0, |heard| heard.len())).min(MAX_STAMPS)
    }
}

impl StorePolicy {
    /// A policy with this guard, that seals answers by what was `purged`. Without a guard (`origin.guard = false`) it only
    /// refuses pages that purges cannot find.
    pub fn new(
        guard: Option<Arc<Guard>>,
        sealing: Option<(Arc<PurgedNames>, NoteTags)>,
        metrics: Arc<Metrics>,
    ) -> Self {
        StorePolicy { guard, sealing, metrics }
    }

    /// To be taken before a request goes to a node.
    pub(super) fn mark(&self) -> RenderMark {
        let guard = self.guard.as_ref().map_or(0, |guard| guard.now());
        let Some((purged, _)) = &self.sealing else { return RenderMark { guard, ..RenderMark::default() } };
        RenderMark { guard, position: purged.head(), heard: purged.heard() }
    }

    /// The tags of an answer that no seal shows, and that are not known as such yet. They are those of a block of a page, which
    /// a cache fills in (asked for on behalf of another path, or where Magento has its blocks), and those of an answer that is
    /// not sealed.
    pub(super) fn tags_to_note(&self, mark: &RenderMark, request: &RequestHead, answer: &ResponseHead) -> Vec<Name> {
        let Some((purged, _)) = &self.sealing else { return Vec::new() };
        let page = Page { status: answer.status, target: request.target(), fields: answer.kept_fields() };
        let is_block = || {
            let asked = request.asked().and_then(Asked::parse);
            asked.is_some_and(|asked| asked.path != request.path()) || is_block_path(request.path())
        };
        // What answers another method is not stored (`may_be_stored`).
        let is_seen =
            !is_read(request) || fits(answer.head_len(), mark.max_stamps(), page.tags().count()) && !is_block();
        if is_seen {
            return Vec::new();
        }
        purged.unsealable().missing(page.tags().map(Name::of_tag))
    }

    /// Notes tags that no seal shows. Returns whether what has them may be stored.
    pub(super) async fn note_tags(&self, names: Vec<Name>) -> bool {
        match &self.sealing {
            Some((_, note)) => note(names).await,
            None => true,
        }
    }

    /// Registers a cache's connection. Its [`Passage`] is to be asked for each answer that is written to the
    /// connection.
    pub(super) fn connected(&self, ends: SocketPair) -> Option<Passage> {
        self.guard.as_ref().map(|guard| guard.connected(ends))
    }

    /// Whether an answer to a request with this method is held until it is complete: a page that can be purged by its
    /// tags, because the guard must check it at its end.
    pub(super) fn holds(&self, method: Method, answer: &ResponseHead) -> bool {
        let is_tags = |(name, _): (&[u8], &[u8])| name.eq_ignore_ascii_case(b"x-magento-tags");
        self.guard.is_some() && method == Method::Get && answer.status == 200 && answer.kept_fields().any(is_tags)
    }

    /// Prepares an answer's head for a cache: its tags in one line, `no-store` if it [may not](Self::may_be_stored) be
    /// stored, and the seal of the answer with this `id`.
    pub(super) fn prepare(
        &self,
        mark: &RenderMark,
        id: u64,
        passage: Option<&Passage>,
        request: &RequestHead,
        answer: &mut ResponseHead,
    ) {
        answer.join_tags();
        if !self.may_be_stored(mark, passage, request, answer) {
            answer.forbid_storing();
        }
        if let Some((purged, _)) = &self.sealing
            && is_read(request)
        {
            let late = Mutant::LateSeal.lives().then(|| RenderMark { position: purged.head(), ..mark.clone() });
            let mark = late.as_ref().unwrap_or(mark);
            answer.seal_with(|answer, out| seal(out, purged, mark, id, request, answer));
        }
    }

    /// Whether a cache may store an answer. Call it just before the head is written to `passage`; `mark` is from
    /// [`StorePolicy::mark`]. Varnish stores answers to GET; HEAD gets the same fields.
    fn may_be_stored(
        &self,
        mark: &RenderMark,
        passage: Option<&Passage>,
        request: &RequestHead,
        answer: &ResponseHead,
    ) -> bool {
        // A purge would not find all of them.
        if answer.has_scattered_tags() {
            return false;
        }
        let page = Page { status: answer.status, target: request.target(), fields: answer.kept_fields() };
        if !is_read(request) {
            // A VCL may store what a POST was answered. Its age is in no seal, so purges of its tags would have to wait for every
            // cache, and anybody could have that for all tags of the shop by a POST to each page.
            return self.sealing.is_none() || page.tags().next().is_none();
        }
        let Some(guard) = &self.guard else { return true };
        let may_be_stored = match passage {
            Some(passage) => passage.may_be_stored(mark.guard, &page, Instant::now()),
            None => guard.may_be_stored(mark.guard, &page, Instant::now()),
        };
        if !may_be_stored {
            self.metrics.guard.marked.inc();
        }
        may_be_stored
    }
}

/// Whether an answer to this request is one of those that a cache usually stores.
fn is_read(request: &RequestHead) -> bool {
    matches!(request.method, Method::Get | Method::Head)
}

/// Appends the seal of an answer that is not older than `mark`.
///
/// A `304` is merged into an object that the cache has: if it does not say what its tags are, a seal would vouch for a body
/// that nobody here has seen. An answer whose seal would not fit into a line that every Varnish takes gets none.
fn seal(
    out: &mut Vec<u8>,
    purged: &PurgedNames,
    mark: &RenderMark,
    id: u64,
    request: &RequestHead,
    answer: &ResponseHead,
) {
    let page = Page { status: answer.status, target: request.target(), fields: answer.kept_fields() };
    let mut names: Vec<Name> = page.tags().map(Name::of_tag).collect();
    if fits(answer.head_len(), mark.max_stamps(), names.len()) && (answer.status != 304 || !names.is_empty()) {
        let asked = request.asked().and_then(Asked::parse).map(|asked| asked.stamp);
        write_seal(out, mark.stamps(purged, asked), id, &mut names);
    }
}

/// Whether Magento renders the blocks of pages under this path (`PageCache/Controller/Block/Esi.php`). A block may be fetched
/// first for a client that asks for this path itself.
fn is_block_path(path: &[u8]) -> bool {
    memchr::memmem::find(path, b"/page_cache/block/esi/").is_some()
}

impl fmt::Debug for StorePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StorePolicy").field("guard", &self.guard).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::{Purge, Target};

    const PAGE: &[u8] = b"HTTP/1.1 200 OK\r\nX-Magento-Tags: cat_p_1\r\nContent-Length: 0\r\n\r\n";

    fn policy(guard: bool) -> StorePolicy {
        let guard = guard.then(|| Arc::new(Guard::new(Instant::now())));
        StorePolicy::new(guard, None, Arc::new(Metrics::new().unwrap()))
    }

    /// Whether a page may be stored that was requested with this method before its tag was purged.
    fn admits(policy: &StorePolicy, method: &str) -> bool {
        let (mark, asked) = (policy.mark(), format!("{method} /p/1 HTTP/1.1\r\nHost: a\r\n\r\n"));
        if let Some(guard) = &policy.guard {
            guard.note(&Purge { targets: vec![Target::Tags(["cat_p_1"].into_iter().collect())], soft: false });
        }
        let (mut request, mut answer) = (RequestHead::default(), ResponseHead::default());
        request.parse(asked.as_bytes(), 100).unwrap();
        answer.parse(PAGE, request.method, 100).unwrap();
        policy.may_be_stored(&mark, None, &request, &answer)
    }

    #[test]
    fn what_could_be_stored_is_held_against_the_guard_and_counted() {
        let policy = policy(true);
        assert!(!admits(&policy, "GET") && !admits(&policy, "HEAD"));
        assert!(admits(&policy, "POST"));
        assert_eq!(policy.metrics.guard.marked.get(), 2);
    }

    #[test]
    fn a_seal_is_left_off_where_an_answer_fits_only_without_it() {
        for (head_len, stamps, names, is_sealed) in [
            (1_000, 1, 1_000, true),
            (1_000, 1, 1_003, false),
            (1_000, 4, 1_000, false),
            (1_000, MAX_STAMPS, 790, true),
            (USUAL_HEAD - 1_000, 1, 100, true),
            (USUAL_HEAD - 1_000, 1, 200, false),
            (USUAL_HEAD, 1, 0, false),
            (USUAL_HEAD + 1, 1, 1_000, true),
        ] {
            assert_eq!(fits(head_len, stamps, names), is_sealed, "{names} of {stamps} in {head_len}");
        }
    }

    #[test]
    fn without_a_guard_everything_passes() {
        let policy = policy(false);
        assert!(admits(&policy, "GET"));
        assert_eq!(policy.metrics.guard.marked.get(), 0);
    }
}
