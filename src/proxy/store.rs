//! What a cache behind a listener may store.
//!
//! Every page passes the origin on its way into a cache, so the guard ([`crate::purge::Guard`]) is asked here: a page
//! that was rendered before a purge must not be stored after it.

use std::sync::Arc;
use std::time::Instant;

use crate::http1::{Method, RequestHead, ResponseHead};
use crate::purge::{Guard, Page, Passage, SocketPair};
use crate::telemetry::Metrics;

/// Decides about each answer to a cache.
#[derive(Clone, Debug)]
pub struct StorePolicy {
    guard: Option<Arc<Guard>>,
    metrics: Arc<Metrics>,
}

impl StorePolicy {
    /// A policy with this guard. Without one (`origin.guard = false`) it only refuses pages that purges cannot find.
    pub fn new(guard: Option<Arc<Guard>>, metrics: Arc<Metrics>) -> Self {
        StorePolicy { guard, metrics }
    }

    /// The guard's sequence number, to be taken before a request goes to a node; 0 without a guard.
    pub(super) fn mark(&self) -> u64 {
        self.guard.as_ref().map_or(0, |guard| guard.now())
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

    /// Prepares an answer's head for a cache: its tags in one line, and `no-store` if it [may not](Self::may_be_stored)
    /// be stored.
    pub(super) fn prepare(
        &self,
        mark: u64,
        passage: Option<&Passage>,
        request: &RequestHead,
        answer: &mut ResponseHead,
    ) {
        answer.join_tags();
        if !self.may_be_stored(mark, passage, request, answer) {
            answer.forbid_storing();
        }
    }

    /// Whether a cache may store an answer. Call it just before the head is written to `passage`; `mark` is from
    /// [`StorePolicy::mark`]. Varnish stores answers to GET; HEAD gets the same fields.
    fn may_be_stored(
        &self,
        mark: u64,
        passage: Option<&Passage>,
        request: &RequestHead,
        answer: &ResponseHead,
    ) -> bool {
        // A purge would not find all of them.
        if answer.has_scattered_tags() {
            return false;
        }
        let Some(guard) = self.guard.as_ref().filter(|_| matches!(request.method, Method::Get | Method::Head)) else {
            return true;
        };
        let page = Page { status: answer.status, target: request.target(), fields: answer.kept_fields() };
        let may_be_stored = match passage {
            Some(passage) => passage.may_be_stored(mark, &page, Instant::now()),
            None => guard.may_be_stored(mark, &page, Instant::now()),
        };
        if !may_be_stored {
            self.metrics.guard.marked.inc();
        }
        may_be_stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::{Purge, Target};

    const PAGE: &[u8] = b"HTTP/1.1 200 OK\r\nX-Magento-Tags: cat_p_1\r\nContent-Length: 0\r\n\r\n";

    fn policy(guard: bool) -> StorePolicy {
        let guard = guard.then(|| Arc::new(Guard::new(Instant::now())));
        StorePolicy::new(guard, Arc::new(Metrics::new().unwrap()))
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
        policy.may_be_stored(mark, None, &request, &answer)
    }

    #[test]
    fn what_could_be_stored_is_held_against_the_guard_and_counted() {
        let policy = policy(true);
        assert!(!admits(&policy, "GET") && !admits(&policy, "HEAD"));
        assert!(admits(&policy, "POST"));
        assert_eq!(policy.metrics.guard.marked.get(), 2);
    }

    #[test]
    fn without_a_guard_everything_passes() {
        let policy = policy(false);
        assert!(admits(&policy, "GET"));
        assert_eq!(policy.metrics.guard.marked.get(), 0);
    }
}
