//! The origin: Varnish comes in, web nodes answer. Varnish has this listener as its only backend, and so needs to know
//! no web node.
//!
//! Every page passes here on its way into a cache, so this is where the guard ([`crate::purge::Guard`]) stands: what was
//! rendered before a purge must not be stored after it.

mod wire;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::balance::{self, Draw, Policy};
use crate::config;
use crate::fleet::{Member, Node, Role, Snapshot};
use crate::http1::{Method, RequestHead, ResponseHead};
use crate::proxy::{IgnoredParameters, NoNode, OwnAnswer, Route, request_key};
use crate::purge::{Ends, Guard, Page, Passage};
use crate::shutdown::Stage;
use crate::telemetry::Metrics;
use crate::trial::{self, Trials};

pub use wire::SocketDiagnosis;

/// The origin's decisions.
#[derive(Clone)]
pub struct Origin {
    policy: Policy,
    nothing_ignored: IgnoredParameters,
    marks: bool,
    /// The methods that purge here.
    purging: Arc<[String]>,
    guard: Arc<Guard>,
    trials: Arc<Trials>,
    metrics: Arc<Metrics>,
}

impl Origin {
    /// An origin that chooses as configured, and asks this guard. `purging` are the methods that purge, of which none
    /// passes.
    pub fn new(
        config: &config::Origin,
        purging: &[String],
        guard: Arc<Guard>,
        trials: Arc<Trials>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (nothing_ignored, purging) = (IgnoredParameters::default(), purging.into());
        Origin { policy: config.policy, nothing_ignored, marks: config.guard, purging, guard, trials, metrics }
    }
}

impl Route for Origin {
    const ROLE: Role = Role::Web;
    const DRAINS_AT: Stage = Stage::Emptying;

    /// Its clients are Varnish nodes: few, ours, and as slow as the clients that they wait for.
    const PUBLIC: bool = false;

    const JOINS_TAGS: bool = true;

    fn expects_proxy_header(&self, _peer: IpAddr) -> bool {
        false
    }

    /// The edge wrote it, where one is wanted, and Varnish passes it on.
    fn offload_header(&self) -> &str {
        ""
    }

    /// The edge already wrote who the client is, and Varnish passed it on: registered Varnish nodes are believed.
    fn trusts(&self, peer: IpAddr, fleet: &Snapshot) -> bool {
        fleet.varnish.members().iter().any(|member| member.node.spec.address.ip().to_canonical() == peer)
    }

    /// A purge method here comes from a Varnish whose VCL pipes what it does not know; no web server wants it.
    fn admits(&self, head: &RequestHead) -> bool {
        !matches!(head.method, Method::Purging | Method::Unsupported) && !head.is_one_of(&self.purging)
    }

    /// A page under trial is ours to answer; no web node is asked for any path below it.
    fn own_answer(&self, head: &RequestHead) -> Option<OwnAnswer> {
        let path = head.path();
        if !trial::is_ours(path) {
            return None;
        }
        let page = self.trials.answer(path).filter(|_| head.method == Method::Get);
        Some(page.map_or(OwnAnswer::NotFound, OwnAnswer::Page))
    }

    fn key(&self, head: &RequestHead) -> u64 {
        if self.policy == Policy::Rendezvous { request_key(head, &self.nothing_ignored) } else { 0 }
    }

    fn pick(&self, fleet: &Snapshot, draw: Draw, tried: Option<u64>) -> Result<Arc<Node>, NoNode> {
        let may_serve = |member: &Member| member.usable && Some(member.node.key) != tried;
        balance::pick(self.policy, fleet.web.members(), draw, 0.0, may_serve)
            .map(|member| Arc::clone(&member.node))
            .ok_or(NoNode::NoneUp)
    }

    fn purges(&self) -> u64 {
        self.guard.now()
    }

    /// A page that can be purged by its tags, because the guard is to see it at its end.
    fn holds(&self, method: Method, answer: &ResponseHead) -> bool {
        let is_tags = |(name, _): (&[u8], &[u8])| name.eq_ignore_ascii_case(b"x-magento-tags");
        self.marks && method == Method::Get && answer.status == 200 && answer.kept_fields().any(is_tags)
    }

    fn connected(&self, ends: Ends) -> Option<Passage> {
        self.marks.then(|| self.guard.connected(ends))
    }

    /// Varnish stores what it asked for by GET; a HEAD is answered with the same fields.
    fn may_be_stored(
        &self,
        began: u64,
        passage: Option<&Passage>,
        request: &RequestHead,
        answer: &ResponseHead,
    ) -> bool {
        // No purge would find them all.
        if answer.has_scattered_tags() {
            return false;
        }
        if !self.marks || !matches!(request.method, Method::Get | Method::Head) {
            return true;
        }
        let target = request.target();
        let page = Page { status: answer.status, target, fields: answer.kept_fields() };
        let may_be_stored = match passage {
            Some(passage) => passage.may_be_stored(began, &page, Instant::now()),
            None => self.guard.may_be_stored(began, &page, Instant::now()),
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

    fn origin(guard: bool) -> Origin {
        let config = config::Origin { guard, ..config::Origin::default() };
        let (guard, metrics) = (Arc::new(Guard::new(Instant::now())), Arc::new(Metrics::new().unwrap()));
        let trials = Arc::new(Trials::new("", Arc::clone(&guard), Arc::clone(&metrics)));
        Origin::new(&config, &[], guard, trials, metrics)
    }

    /// Whether the page may be stored that was asked for with this method before its tag was purged.
    fn admits(origin: &Origin, method: &str) -> bool {
        let (began, asked) = (origin.purges(), format!("{method} /p/1 HTTP/1.1\r\nHost: a\r\n\r\n"));
        origin.guard.note(&Purge { targets: vec![Target::Tags(["cat_p_1"].into_iter().collect())], soft: false });
        let (mut request, mut answer) = (RequestHead::default(), ResponseHead::default());
        request.parse(asked.as_bytes(), 100).unwrap();
        answer.parse(PAGE, request.method, 100).unwrap();
        origin.may_be_stored(began, None, &request, &answer)
    }

    #[test]
    fn what_could_be_stored_is_held_against_the_guard_and_counted() {
        let origin = origin(true);
        assert!(!admits(&origin, "GET") && !admits(&origin, "HEAD"));
        assert!(admits(&origin, "POST"));
        assert_eq!(origin.metrics.guard.marked.get(), 2);
    }

    #[test]
    fn a_guard_that_is_off_lets_everything_pass() {
        let origin = origin(false);
        assert!(admits(&origin, "GET"));
        assert_eq!(origin.metrics.guard.marked.get(), 0);
    }
}
