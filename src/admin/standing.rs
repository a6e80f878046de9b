//! Whether a node gets traffic, why not, and what to do: in words, and in one place for the status page and `clearcoat
//! status`.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use crate::fleet::{Health, Role};

/// What a node is to the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Standing {
    /// It gets its share.
    Serving,
    /// It gets a growing part of its share.
    Starting,
    /// Its check fails, and it is used all the same: too few web nodes are up.
    UsedThoughDown,
    /// Nobody has checked it yet.
    Unchecked,
    /// Its check fails.
    Down,
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
    /// The words of its health check.
    pub(super) reason: &'f str,
    /// Percent of its full share.
    pub(super) share: u32,
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
    /// Why its last batch failed; empty if it did not.
    pub(super) delivery_error: &'f str,
}

/// The verdict on a node, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct TrafficVerdict {
    pub(super) state: Standing,
    pub(super) gets_traffic: bool,
    /// Empty of a node that serves.
    pub(super) why: String,
    /// What to do; empty if there is nothing.
    pub(super) advice: String,
}

impl TrafficFacts<'_> {
    pub(super) fn verdict(&self) -> TrafficVerdict {
        let state = self.standing();
        let gets_traffic = match state {
            Standing::Serving | Standing::Starting | Standing::UsedThoughDown => true,
            Standing::Unchecked => self.usable,
            Standing::Down | Standing::Behind | Standing::Untrusted | Standing::Drained | Standing::Unresolved => false,
        };
        TrafficVerdict { state, gets_traffic, why: self.why(state), advice: self.advice(state) }
    }

    /// In the order in which traffic is refused.
    fn standing(&self) -> Standing {
        match (self.health, self.cache) {
            _ if self.weight == 0 || self.drained_at_ms.is_some() => Standing::Drained,
            (Health::Down, _) if !self.usable => Standing::Down,
            (Health::Unknown, _) if !self.usable => Standing::Unchecked,
            (_, Some(cache)) if cache.trial_fenced => Standing::Untrusted,
            (_, Some(cache)) if !cache.admitted => Standing::Behind,
            (Health::Down, _) => Standing::UsedThoughDown,
            (Health::Unknown, _) => Standing::Unchecked,
            (Health::Up, _) if self.share < 100 => Standing::Starting,
            (Health::Up, _) => Standing::Serving,
        }
    }

    fn why(&self, state: Standing) -> String {
        let reason = if self.reason.is_empty() { "its health check fails" } else { self.reason };
        match state {
            Standing::Serving | Standing::Unresolved => String::new(),
            Standing::Starting => format!("slow start: {} % of its share", self.share),
            Standing::UsedThoughDown => format!("{reason}; used all the same, as too few web nodes are up"),
            Standing::Unchecked => "not checked yet".to_owned(),
            Standing::Down => match self.cache.filter(|cache| cache.lag > 0) {
                Some(cache) => format!("{reason}; {}", CacheFacts { delivery_error: "", ..cache }.behind()),
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

    fn advice(&self, state: Standing) -> String {
        let address = self.address;
        let text = match state {
            Standing::Serving | Standing::Starting => "",
            Standing::UsedThoughDown => {
                "Most web nodes fail their check at once: look at what the check needs (database, Redis, search) before \
                 you look at a single node."
            }
            Standing::Unchecked => "Wait for its first health checks.",
            Standing::Down => return self.advice_down(self.reason),
            Standing::Behind => match self.cache.map_or("", |cache| cache.delivery_error) {
                "" => "It is being brought up to date, and serves when it has every purge.",
                error if error.contains("in flight") => {
                    "A page that was purged is still on its way to it. It serves when that has arrived."
                }
                error if is_silence(error) => return self.advice_down(error),
                _ => {
                    "It refuses purges: its VCL or its acl purge must be changed (docs/vcl.md). It gets what it missed."
                }
            },
            Standing::Untrusted => "Change what the finding names (docs/vcl.md, Trial); it is tried again by itself.",
            Standing::Drained if self.drained_at_ms.is_some() => {
                "Resume it when it may serve again: here, or with clearcoat node resume. It gets every purge meanwhile."
            }
            Standing::Drained => "Give it a weight above 0 when it may serve again. It gets every purge meanwhile.",
            Standing::Unresolved => "",
        };
        text.replace("ADDRESS", &address.to_string())
    }

    /// What to do with a node whose check, or whose purges, failed so.
    fn advice_down(&self, reason: &str) -> String {
        let address = self.address;
        match self.role {
            Role::Varnish if reason.contains("refused") => {
                format!("Nothing listens at {address}: start varnishd. It gets what it missed before it serves.")
            }
            Role::Varnish if is_silence(reason) => format!(
                "varnishd at {address} hangs, or its machine does: look at both, and restart varnishd if it does not come \
                 back. It gets what it missed before it serves."
            ),
            Role::Varnish => "It refuses purges: its VCL or its acl purge must be changed (docs/vcl.md).".to_owned(),
            Role::Web if reason.contains("refused") => format!("Nothing listens at {address}: start its web server."),
            Role::Web if is_silence(reason) => {
                format!("The web server at {address} hangs or is overloaded: look at its load and its PHP workers.")
            }
            Role::Web => {
                "Ask the node itself for that path: what the check needs (database, Redis, search) fails there."
                    .to_owned()
            }
        }
    }
}

impl CacheFacts<'_> {
    fn behind(&self) -> String {
        let purges = if self.lag == 1 { "purge" } else { "purges" };
        let mut text = format!("{} {purges} behind", self.lag);
        if let Some(age) = self.lag_age {
            _ = write!(text, ", the oldest for {}", humantime::format_duration(Duration::from_secs(age.as_secs())));
        }
        if !self.delivery_error.is_empty() {
            _ = write!(text, ": {}", self.delivery_error);
        }
        text
    }
}

/// The words for a node that an operator drained at this time, in milliseconds since 1970.
pub(super) fn drained_since(at_ms: u64) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(at_ms);
    format!("drained by an operator since {}", humantime::format_rfc3339_seconds(at))
}

/// Whether these words are about a node that says nothing.
fn is_silence(reason: &str) -> bool {
    ["no answer", "connecting failed", "timed out", "connection broke"].iter().any(|words| reason.contains(words))
}

/// The verdict on a node of the configuration whose name has no address.
pub(super) fn unresolved(reason: &str) -> TrafficVerdict {
    TrafficVerdict {
        state: Standing::Unresolved,
        gets_traffic: false,
        why: format!("its name does not resolve: {reason}"),
        advice: "Check the name in its [[node]] table, and this machine's resolver. It is looked up every 2 s."
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CACHE: CacheFacts = CacheFacts {
        admitted: true,
        trial_fenced: false,
        trial_finding: "",
        lag: 0,
        lag_age: None,
        delivery_error: "",
    };

    fn facts(health: Health, cache: CacheFacts<'static>) -> TrafficFacts<'static> {
        let address = SocketAddr::from(([10, 0, 1, 11], 6081));
        let usable = health == Health::Up;
        let (reason, cache) = (if usable { "" } else { "no answer within 500ms" }, Some(cache));
        TrafficFacts {
            role: Role::Varnish,
            address,
            weight: 1,
            drained_at_ms: None,
            usable,
            health,
            reason,
            share: 100,
            cache,
        }
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
        let delivery_error = "the node answered 405 (is clearcoat's address in its acl purge?)";
        let cache =
            CacheFacts { admitted: false, lag: 3, lag_age: Some(Duration::from_secs(72)), delivery_error, ..CACHE };
        let verdict = facts(Health::Up, cache).verdict();
        assert_eq!((verdict.state, verdict.gets_traffic), (Standing::Behind, false));
        let expected =
            "3 purges behind, the oldest for 1m 12s: the node answered 405 (is clearcoat's address in its acl purge?)";
        assert_eq!(verdict.why, expected);
        assert!(verdict.advice.contains("acl purge"), "{}", verdict.advice);
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
            TrafficFacts { reason: "", ..facts(Health::Down, CACHE) },
            facts(Health::Unknown, CACHE),
            facts(Health::Up, behind),
            facts(Health::Up, untrusted),
            TrafficFacts { role: Role::Web, cache: None, ..facts(Health::Down, CACHE) },
        ];
        for facts in out {
            let verdict = facts.verdict();
            assert!(!verdict.gets_traffic && !verdict.why.is_empty() && !verdict.advice.is_empty(), "{verdict:?}");
        }
        let panic = TrafficFacts { usable: true, role: Role::Web, cache: None, ..facts(Health::Down, CACHE) };
        assert_eq!((panic.verdict().state, panic.verdict().gets_traffic), (Standing::UsedThoughDown, true));
        assert_eq!(TrafficFacts { share: 25, ..up() }.verdict().why, "slow start: 25 % of its share");
    }
}
