//! Whether a node gets traffic, why not, and what to do: in words, and in one place for the status page and `clearcoat
//! status`.
//!
//! What to do follows from the role of the node and the kind of what is wrong ([`FaultKind`]), never from words.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use crate::fleet::{Ejection, FaultKind, Health, NodeFault, Role};

/// What a node is to the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Standing {
    /// It gets its share.
    Serving,
    /// It has as many requests as it may, and gets the next one when one of them ends.
    AtLimit,
    /// It gets a growing part of its share.
    Starting,
    /// Its check fails, or it is ejected, and it is used all the same: too few others are left.
    UsedThoughDown,
    /// Nobody has checked it yet.
    Unchecked,
    /// Its check fails.
    Down,
    /// Its check passes, and it failed the requests of clients.
    Ejected,
    /// A Varnish that lacks a purge that was answered.
    Behind,
    /// A Varnish that was seen to keep a purged page.
    Untrusted,
    /// An operator has drained it, or its weight is 0.
    Drained,
    /// Its name has no address.
    Unresolved,
}

/// What decides.
#[derive(Clone, Copy, Debug)]
pub(super) struct TrafficFacts<'f> {
    pub(super) role: Role,
    pub(super) address: SocketAddr,
    /// By its source and by operators.
    pub(super) weight: u32,
    /// When an operator drained it, in milliseconds since 1970.
    pub(super) drained_at_ms: Option<u64>,
    pub(super) usable: bool,
    pub(super) health: Health,
    /// Why its health check fails; `None` if it does not.
    pub(super) fault: Option<&'f NodeFault>,
    /// Its ejection, if it failed requests, and how much of that is left.
    pub(super) ejection: Option<(&'f Ejection, Duration)>,
    /// Percent of its full share.
    pub(super) share: u32,
    /// The limit of requests that it has reached.
    pub(super) reached: Option<u32>,
    /// Only of a Varnish.
    pub(super) cache: Option<CacheFacts<'f>>,
}

/// What decides of a Varnish alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheFacts<'f> {
    /// It has every purge that it must have.
    pub(super) admitted: bool,
    /// Its trial keeps it out, with this finding.
    pub(super) trial_fenced: bool,
    pub(super) trial_finding: &'f str,
    /// The purges that it lacks, and the age of the oldest, if that is known.
    pub(super) lag: usize,
    pub(super) lag_age: Option<Duration>,
    /// Why its last batch failed, or does not count yet.
    pub(super) fault: Option<&'f NodeFault>,
}

/// The verdict on a node, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct TrafficVerdict {
    pub(super) state: Standing,
    pub(super) gets_traffic: bool,
    /// The kind of what keeps it out, if it is a fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) fault: Option<FaultKind>,
    /// Empty of a node that serves.
    pub(super) why: String,
    /// What to do; empty if there is nothing.
    pub(super) advice: String,
}

impl TrafficFacts<'_> {
    pub(super) fn verdict(&self) -> TrafficVerdict {
        let state = self.standing();
        let gets_traffic = match state {
            Standing::Serving | Standing::AtLimit | Standing::Starting | Standing::UsedThoughDown => true,
            Standing::Unchecked => self.usable,
            Standing::Down
            | Standing::Ejected
            | Standing::Behind
            | Standing::Untrusted
            | Standing::Drained
            | Standing::Unresolved => false,
        };
        let fault = self.kind(state);
        TrafficVerdict { state, gets_traffic, fault, why: self.why(state), advice: self.advice(state, fault) }
    }

    /// In the order in which traffic is refused.
    fn standing(&self) -> Standing {
        match (self.health, self.cache) {
            _ if self.weight == 0 || self.drained_at_ms.is_some() => Standing::Drained,
            (Health::Down, _) if !self.usable => Standing::Down,
            (Health::Unknown, _) if !self.usable => Standing::Unchecked,
            (Health::Up, _) if !self.usable => Standing::Ejected,
            (_, Some(cache)) if cache.trial_fenced => Standing::Untrusted,
            (_, Some(cache)) if !cache.admitted => Standing::Behind,
            (Health::Down, _) => Standing::UsedThoughDown,
            (Health::Unknown, _) => Standing::Unchecked,
            (Health::Up, _) if self.ejection.is_some() => Standing::UsedThoughDown,
            (Health::Up, _) if self.reached.is_some() => Standing::AtLimit,
            (Health::Up, _) if self.share < 100 => Standing::Starting,
            (Health::Up, _) => Standing::Serving,
        }
    }

    /// The kind of the fault that makes it what it is to the traffic.
    fn kind(&self, state: Standing) -> Option<FaultKind> {
        let fault = match state {
            Standing::Down | Standing::UsedThoughDown | Standing::Ejected => {
                self.fault.or(self.ejection.map(|(ejection, _)| &ejection.fault))
            }
            Standing::Behind => self.cache.and_then(|cache| cache.fault),
            Standing::Serving
            | Standing::AtLimit
            | Standing::Starting
            | Standing::Unchecked
            | Standing::Untrusted
            | Standing::Drained
            | Standing::Unresolved => None,
        };
        fault.map(|fault| fault.kind)
    }

    fn why(&self, state: Standing) -> String {
        let reason = self.fault.map_or("its health check fails", |fault| &fault.text);
        match state {
            Standing::Serving | Standing::Unresolved => String::new(),
            Standing::AtLimit => {
                let listener = if self.role == Role::Varnish { "edge" } else { "origin" };
                let most = self.reached.unwrap_or_default();
                format!("at its limit of {most} requests ({listener}.max_requests_per_node)")
            }
            Standing::Starting => format!("slow start: {} % of its share", self.share),
            Standing::UsedThoughDown => match self.ejection.filter(|_| self.health == Health::Up) {
                Some(ejection) => format!("{}; used all the same, as too few others are well", ejected(ejection)),
                None => format!("{reason}; used all the same, as too few web nodes are up"),
            },
            Standing::Ejected => self.ejection.map(ejected).unwrap_or_default(),
            Standing::Unchecked => "not checked yet".to_owned(),
            Standing::Down => match self.cache.filter(|cache| cache.lag > 0) {
                Some(cache) => format!("{reason}; {}", CacheFacts { fault: None, ..cache }.behind()),
                None => reason.to_owned(),
            },
            Standing::Behind => self.cache.map(|cache| cache.behind()).unwrap_or_default(),
            Standing::Untrusted => self.cache.map(|cache| cache.trial_finding.to_owned()).unwrap_or_default(),
            Standing::Drained => match self.drained_at_ms {
                Some(at_ms) => drained_since(at_ms),
                None => "drained: its weight is 0".to_owned(),
            },
        }
    }

    fn advice(&self, state: Standing, fault: Option<FaultKind>) -> String {
        let text = match state {
            Standing::Serving | Standing::Starting | Standing::Unresolved => "",
            Standing::AtLimit => {
                "It does all it may. If requests wait for long, find what makes it slow, or add nodes (docs/overload.md)."
            }
            Standing::UsedThoughDown if self.health == Health::Up => return self.advice(Standing::Ejected, fault),
            Standing::UsedThoughDown => {
                "Most web nodes fail their check at once: look at what the check needs (database, Redis, search) before \
                 you look at a single node."
            }
            Standing::Unchecked => "Wait for its first health checks.",
            Standing::Ejected => {
                "It comes back by itself, and is ejected for longer if it still fails. Its health check does not see what clients see: \
                 look at its error log, and let health.web.path ask for what fails."
            }
            Standing::Down | Standing::Behind => match fault {
                Some(kind) => return advice_for(self.role, kind, self.address),
                None if state == Standing::Down => "Ask the node itself for what its health check asks for.",
                None => "It is being brought up to date, and serves when it has every purge.",
            },
            Standing::Untrusted => "Change what the finding names (docs/vcl.md, Trial); it is tried again by itself.",
            Standing::Drained if self.drained_at_ms.is_some() => {
                "Resume it when it may serve again: here, or with clearcoat node resume. It gets every purge meanwhile."
            }
            Standing::Drained => "Give it a weight above 0 when it may serve again. It gets every purge meanwhile.",
        };
        text.to_owned()
    }
}

/// What to do about a node whose check, or whose purges, fail so.
pub fn advice_for(role: Role, kind: FaultKind, address: SocketAddr) -> String {
    match role {
        Role::Varnish => advice_for_varnish(kind, address),
        Role::Web => advice_for_web(kind, address),
    }
}

/// What to do about a Varnish whose check, or whose purges, fail so.
fn advice_for_varnish(kind: FaultKind, address: SocketAddr) -> String {
    let todo = match kind {
        FaultKind::NotListening => format!("Nothing listens at {address}: start varnishd."),
        FaultKind::Unreachable => no_way_to(address),
        FaultKind::Silent => format!(
            "varnishd at {address} hangs, or its machine does: look at both, and restart varnishd if it does not come back."
        ),
        FaultKind::SilentToPurges => format!(
            "varnishd at {address} runs, and leaves purges alone unanswered: look at what its VCL does with PURGE (it must \
             answer by itself, and ask no backend), and at how long its list of bans is (varnishadm ban.list)."
        ),
        FaultKind::Disconnects => format!(
            "What listens at {address} closes the connection: it must be varnishd's port for HTTP, and send_proxy must be \
             what that port expects. If it is, see why its process ends (varnishadm panic.show)."
        ),
        FaultKind::Refuses => "It refuses purges: its VCL or its acl purge must be changed (docs/vcl.md).".to_owned(),
        FaultKind::Fails => {
            "It takes purges and fails at them: varnishlog -q 'ReqMethod eq PURGE' on its machine shows \
                             where (an error in its VCL, or too little workspace)."
                .to_owned()
        }
        FaultKind::Malformed => format!(
            "What answers at {address} is no Varnish: compare the address with the port on which varnishd takes HTTP."
        ),
        FaultKind::FlushesInPart => "Change its VCL as that says; it is told again by itself.".to_owned(),
        FaultKind::KeepsPages => {
            "Its VCL says that pages are dropped which it keeps: compare how it purges with docs/vcl.md.".to_owned()
        }
        FaultKind::OwesFlush => {
            return "Its VCL, or the configuration, has switched off seals, or no trial can tell (docs/seal.md): it is flushed, and \
                    serves then. If that was no intention, compare its VCL with docs/vcl.md."
                .to_owned();
        }
        FaultKind::PageUnderWay => {
            return "A page that was purged is still on its way to it. It serves when that has arrived.".to_owned();
        }
        FaultKind::OurShortage | FaultKind::OurSettings => ours(kind),
    };
    format!("{todo} It gets what it missed before it serves.")
}

/// What to do about a web node whose check fails so.
fn advice_for_web(kind: FaultKind, address: SocketAddr) -> String {
    match kind {
        FaultKind::NotListening => format!("Nothing listens at {address}: start its web server."),
        FaultKind::Unreachable => no_way_to(address),
        FaultKind::Silent => {
            format!("The web server at {address} hangs or is overloaded: look at its load and its PHP workers.")
        }
        FaultKind::Disconnects => format!(
            "The web server at {address} closes the connection without an answer: it must take HTTP without TLS there; if \
             it does, see its error log."
        ),
        FaultKind::Refuses => {
            "It answers, but not as health.web.expect wants: compare health.web.path, health.web.host, \
                               health.web.expect and health.web.expect_body with what it serves."
                .to_owned()
        }
        FaultKind::Malformed => {
            format!(
                "What answers at {address} does not speak HTTP/1.1: compare the address with that of its web server."
            )
        }
        // A web node is sent no purges.
        FaultKind::Fails
        | FaultKind::SilentToPurges
        | FaultKind::FlushesInPart
        | FaultKind::KeepsPages
        | FaultKind::OwesFlush
        | FaultKind::PageUnderWay => {
            "Ask the node itself for that path: what the check needs (database, Redis, search) fails there.".to_owned()
        }
        FaultKind::OurShortage | FaultKind::OurSettings => ours(kind),
    }
}

fn no_way_to(address: SocketAddr) -> String {
    format!(
        "There is no way from here to {address}: see whether its machine runs, and the routes and firewalls between."
    )
}

/// What to do about a fault of clearcoat.
fn ours(kind: FaultKind) -> String {
    match kind {
        FaultKind::OurSettings => "Nothing is wrong with the node: put right the setting of clearcoat that is named.",
        _ => {
            "Nothing is wrong with the node: clearcoat lacks what is named; raise its limit (LimitNOFILE, ulimit -n), or \
             find who takes so much."
        }
    }
    .to_owned()
}

impl CacheFacts<'_> {
    fn behind(&self) -> String {
        let purges = if self.lag == 1 { "purge" } else { "purges" };
        let mut text = format!("{} {purges} behind", self.lag);
        if let Some(age) = self.lag_age {
            _ = write!(text, ", the oldest for {}", humantime::format_duration(Duration::from_secs(age.as_secs())));
        }
        if let Some(fault) = self.fault {
            _ = write!(text, ": {fault}");
        }
        text
    }
}

/// The words for a node that failed the requests of clients.
fn ejected((ejection, left): (&Ejection, Duration)) -> String {
    let whole = |time: Duration| humantime::format_duration(Duration::from_secs(time.as_secs()));
    format!("{}; ejected for {}, {} of it left", ejection.fault, whole(ejection.lasts), whole(left))
}

/// The words for a node that an operator drained at this time, in milliseconds since 1970.
pub(super) fn drained_since(at_ms: u64) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(at_ms);
    format!("drained by an operator since {}", humantime::format_rfc3339_seconds(at))
}

/// The verdict on a node of the configuration whose name has no address.
pub(super) fn unresolved(reason: &str) -> TrafficVerdict {
    TrafficVerdict {
        state: Standing::Unresolved,
        gets_traffic: false,
        fault: None,
        why: format!("its name does not resolve: {reason}"),
        advice: "Check the name in its [[node]] table, and this machine's resolver. It is looked up every 2 s."
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CACHE: CacheFacts =
        CacheFacts { admitted: true, trial_fenced: false, trial_finding: "", lag: 0, lag_age: None, fault: None };

    fn fault(kind: FaultKind, text: &str) -> &'static NodeFault {
        Box::leak(Box::new(NodeFault::new(kind, text)))
    }

    fn ejection() -> Ejection {
        let fault = crate::fleet::RequestFault::Status(503).of_streak(5);
        Ejection { until: std::time::Instant::now(), lasts: Duration::from_secs(60), fault }
    }

    fn facts(health: Health, cache: CacheFacts<'static>) -> TrafficFacts<'static> {
        let address = SocketAddr::from(([10, 0, 1, 11], 6081));
        let usable = health == Health::Up;
        let silent = fault(FaultKind::Silent, "no answer within 500ms");
        TrafficFacts {
            role: Role::Varnish,
            address,
            weight: 1,
            drained_at_ms: None,
            usable,
            health,
            fault: Some(silent).filter(|_| health == Health::Down),
            ejection: None,
            share: 100,
            reached: None,
            cache: Some(cache),
        }
    }

    #[test]
    fn a_node_at_its_limit_says_which_and_gets_traffic_all_the_same() {
        let full = TrafficFacts { reached: Some(8), share: 50, ..facts(Health::Up, CACHE) };
        let verdict = full.verdict();
        assert_eq!((verdict.state, verdict.gets_traffic, verdict.fault), (Standing::AtLimit, true, None));
        assert_eq!(verdict.why, "at its limit of 8 requests (edge.max_requests_per_node)");
        let web = TrafficFacts { role: Role::Web, cache: None, reached: Some(8), ..facts(Health::Up, CACHE) };
        assert!(web.verdict().why.ends_with("(origin.max_requests_per_node)"));
        // What keeps it out of traffic is said before.
        let behind = CacheFacts { admitted: false, lag: 1, ..CACHE };
        assert_eq!(TrafficFacts { reached: Some(8), ..facts(Health::Up, behind) }.verdict().state, Standing::Behind);
    }

    #[test]
    fn a_node_that_serves_needs_no_words() {
        let verdict = facts(Health::Up, CACHE).verdict();
        assert_eq!((verdict.state, verdict.gets_traffic), (Standing::Serving, true));
        assert_eq!((verdict.why.as_str(), verdict.advice.as_str()), ("", ""));
    }

    #[test]
    fn who_was_drained_by_an_operator_says_since_when() {
        let drained = TrafficFacts { weight: 0, drained_at_ms: Some(1_764_276_810_000), ..facts(Health::Down, CACHE) };
        let verdict = drained.verdict();
        assert_eq!((verdict.state, verdict.gets_traffic), (Standing::Drained, false));
        assert_eq!(verdict.why, "drained by an operator since 2025-11-27T20:53:30Z");
        assert!(verdict.advice.starts_with("Resume it"), "{}", verdict.advice);
    }

    #[test]
    fn a_node_that_is_behind_says_by_how_much_since_when_and_why() {
        let refuses = fault(FaultKind::Refuses, "the node answered 405 (is clearcoat's address in its acl purge?)");
        let (lag_age, fault) = (Some(Duration::from_secs(72)), Some(refuses));
        let cache = CacheFacts { admitted: false, lag: 3, lag_age, fault, ..CACHE };
        let verdict = facts(Health::Up, cache).verdict();
        assert_eq!((verdict.state, verdict.gets_traffic), (Standing::Behind, false));
        let expected =
            "3 purges behind, the oldest for 1m 12s: the node answered 405 (is clearcoat's address in its acl purge?)";
        assert_eq!(verdict.why, expected);
        assert!(verdict.advice.contains("acl purge"), "{}", verdict.advice);
    }

    /// What is to be done follows from the kind, whatever the words: those of every fault here are of another kind.
    #[test]
    fn each_kind_of_fault_of_a_varnish_has_its_own_advice() {
        let advice = |kind| {
            let misleading = fault(kind, "connection refused, no answer, in flight, 405");
            let behind = CacheFacts { admitted: false, lag: 1, fault: Some(misleading), ..CACHE };
            let verdict = facts(Health::Up, behind).verdict();
            assert_eq!((verdict.state, verdict.fault), (Standing::Behind, Some(kind)));
            let down = TrafficFacts { fault: Some(misleading), ..facts(Health::Down, CACHE) }.verdict();
            assert_eq!((down.state, &down.advice), (Standing::Down, &verdict.advice));
            verdict.advice
        };
        for (kind, expected) in [
            (FaultKind::NotListening, "start varnishd"),
            (FaultKind::Unreachable, "routes and firewalls"),
            (FaultKind::Silent, "hangs"),
            (FaultKind::SilentToPurges, "leaves purges alone unanswered"),
            (FaultKind::Disconnects, "send_proxy"),
            (FaultKind::Refuses, "acl purge"),
            (FaultKind::Fails, "varnishlog"),
            (FaultKind::Malformed, "is no Varnish"),
            (FaultKind::FlushesInPart, "Change its VCL"),
            (FaultKind::KeepsPages, "which it keeps"),
            (FaultKind::OwesFlush, "switched off seals"),
            (FaultKind::PageUnderWay, "on its way"),
            (FaultKind::OurShortage, "LimitNOFILE"),
            (FaultKind::OurSettings, "setting of clearcoat"),
        ] {
            assert!(advice(kind).contains(expected), "{kind}: {}", advice(kind));
        }
        let all: std::collections::BTreeSet<String> = FaultKind::ALL.into_iter().map(advice).collect();
        assert_eq!(all.len(), FaultKind::ALL.len(), "{all:?}");
    }

    #[test]
    fn each_kind_of_fault_of_a_web_node_has_its_advice() {
        for (kind, expected) in [
            (FaultKind::NotListening, "start its web server"),
            (FaultKind::Unreachable, "routes and firewalls"),
            (FaultKind::Silent, "PHP workers"),
            (FaultKind::Disconnects, "without TLS"),
            (FaultKind::Refuses, "health.web.expect"),
            (FaultKind::Fails, "database"),
            (FaultKind::Malformed, "does not speak HTTP/1.1"),
            (FaultKind::OurShortage, "LimitNOFILE"),
        ] {
            let down = TrafficFacts { role: Role::Web, cache: None, ..facts(Health::Down, CACHE) };
            let verdict = TrafficFacts { fault: Some(fault(kind, "it fails")), ..down }.verdict();
            assert!(verdict.advice.contains(expected), "{kind}: {}", verdict.advice);
        }
    }

    #[test]
    fn a_hung_varnish_is_to_be_looked_at_and_what_it_lacks_is_said() {
        let verdict = facts(Health::Down, CacheFacts { admitted: false, lag: 1, ..CACHE }).verdict();
        assert_eq!(verdict.state, Standing::Down);
        assert_eq!(verdict.why, "no answer within 500ms; 1 purge behind");
        assert!(verdict.advice.starts_with("varnishd at 10.0.1.11:6081 hangs"), "{}", verdict.advice);
    }

    #[test]
    fn whoever_gets_nothing_says_why() {
        let up = || facts(Health::Up, CACHE);
        let behind = CacheFacts { admitted: false, lag: 1, ..CACHE };
        let untrusted = CacheFacts { trial_fenced: true, trial_finding: "keeps pages", ..CACHE };
        let out = [
            TrafficFacts { weight: 0, ..up() },
            TrafficFacts { weight: 0, drained_at_ms: Some(1), ..up() },
            TrafficFacts { fault: None, ..facts(Health::Down, CACHE) },
            facts(Health::Unknown, CACHE),
            facts(Health::Up, behind),
            facts(Health::Up, untrusted),
            TrafficFacts { role: Role::Web, cache: None, ..facts(Health::Down, CACHE) },
        ];
        for facts in out {
            let verdict = facts.verdict();
            assert!(!verdict.gets_traffic && !verdict.why.is_empty() && !verdict.advice.is_empty(), "{verdict:?}");
        }
        let ejection = ejection();
        let ejected = Some((&ejection, Duration::from_secs(12)));
        let out = TrafficFacts { ejection: ejected, usable: false, ..up() }.verdict();
        assert_eq!((out.state, out.gets_traffic, out.fault), (Standing::Ejected, false, Some(FaultKind::Fails)));
        assert_eq!(out.why, "5 requests in a row failed, the last one: answered 503; ejected for 1m, 12s of it left");
        assert!(out.advice.contains("health check does not see"), "{}", out.advice);
        let used = TrafficFacts { ejection: ejected, ..up() }.verdict();
        assert_eq!((used.state, used.gets_traffic, &used.advice), (Standing::UsedThoughDown, true, &out.advice));
        assert!(used.why.ends_with("used all the same, as too few others are well"), "{}", used.why);
        let panic = TrafficFacts { usable: true, role: Role::Web, cache: None, ..facts(Health::Down, CACHE) };
        assert_eq!((panic.verdict().state, panic.verdict().gets_traffic), (Standing::UsedThoughDown, true));
        assert_eq!(TrafficFacts { share: 25, ..up() }.verdict().why, "slow start: 25 % of its share");
    }
}
