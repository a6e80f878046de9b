//! The gate: what the edge refuses, or sends elsewhere, before a node is chosen for it.
//!
//! These are the rules that only the edge can keep, because only it knows who the client is and how it came: a network that is
//! blocked, a host that is not ours, a request by plain HTTP, maintenance. What a page is and what becomes of it is the work of
//! the VCL.
//!
//! # One decision
//!
//! All of them are one pure function of the head, of [who sent it and how](Arrival), and of the time ([`Gate::refusal`]): the
//! same for HTTP/1.1, a kept connection, pipelined requests and a stream of HTTP/2. It is asked after a method that purges was
//! refused, and before anything else is done for the request; so a request that is refused costs no node anything, and its
//! body is not read. The order within is part of the contract, `docs/edge-rules.md` has it:
//!
//! 1. A blocked network learns nothing else.
//! 2. A host that is not ours gets no redirect: it would name that host.
//! 3. By plain HTTP there is only the redirect.
//! 4. Maintenance.
//! 5. The rates come last: what is refused for another reason uses up nothing. The client's is asked before that of the whole,
//!    so that one client alone does not use that up.
//!
//! Without any rule there is no gate, and a request pays for one look at a `None`.

mod arrival;
mod hosts;
mod https;
mod networks;
mod rates;

use std::sync::Arc;
use std::time::Duration;

use crate::config;
use crate::http1::RequestHead;

pub(super) use arrival::{Arrival, ClientScheme, SendingPeer};
use hosts::HostList;
use https::HttpsRules;
use networks::NetworkSet;
use rates::Rate;
pub use rates::RateBuckets;
use rates::RateChange;

/// The rules of the edge.
#[derive(Debug)]
pub struct Gate {
    blocked: NetworkSet,
    /// `None`: any host.
    hosts: Option<HostList>,
    https: HttpsRules,
    maintenance: Option<Maintenance>,
    rates: Option<RateRules>,
}

/// How many requests there may be.
#[derive(Debug)]
struct RateRules {
    client: Option<Rate>,
    total: Option<Rate>,
    exempt: NetworkSet,
    buckets: Arc<RateBuckets>,
}

/// Nobody is served, but for these.
#[derive(Debug)]
struct Maintenance {
    allow: NetworkSet,
    /// In seconds.
    retry_after: u32,
}

/// Why the gate does not let a request through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum GateRefusal {
    /// Its client is in a blocked network.
    #[error("the network of the client is blocked (edge.blocked)")]
    Blocked,
    /// It asks for a host that is not ours.
    #[error("the host is none of edge.hosts")]
    UnknownHost,
    /// It came by plain HTTP, and is sent to https.
    #[error("it came by plain HTTP (edge.https.redirect)")]
    PlainHttp,
    /// The shop is closed.
    #[error("maintenance (edge.maintenance)")]
    Maintenance {
        /// When to come again, in seconds.
        retry_after: u32,
    },
    /// Its client has made too many requests.
    #[error("the client has made too many requests (edge.rate_limit.client_rate)")]
    ClientRate {
        /// When there may be another one, in seconds.
        retry_after: u32,
    },
    /// All clients together have made too many requests.
    #[error("all clients have made too many requests (edge.rate_limit.total_rate)")]
    TotalRate {
        /// When there may be another one, in seconds.
        retry_after: u32,
    },
}

impl Gate {
    /// The rules of this configuration; `None` if there are none.
    pub fn of(edge: &config::Edge, buckets: &Arc<RateBuckets>) -> Option<Self> {
        let maintenance = edge.maintenance.on.then(|| Maintenance {
            allow: NetworkSet::new(&edge.maintenance.allow),
            retry_after: whole_seconds(edge.maintenance.retry_after),
        });
        let gate = Gate {
            blocked: NetworkSet::new(&edge.blocked),
            hosts: (!edge.hosts.is_empty()).then(|| HostList::new(&edge.hosts)),
            https: HttpsRules::of(&edge.https),
            maintenance,
            rates: RateRules::of(&edge.rate_limit, buckets),
        };
        let has_rules = !gate.blocked.is_empty()
            || gate.hosts.is_some()
            || gate.https.has_any()
            || gate.maintenance.is_some()
            || gate.rates.is_some();
        has_rules.then_some(gate)
    }

    /// Why this request is not let through; `None` if it is.
    ///
    /// `now` counts from the start of the process.
    pub(super) fn refusal(&self, head: &RequestHead, from: &Arrival, now: Duration) -> Option<GateRefusal> {
        if from.client.is_some_and(|client| self.blocked.contains(client)) {
            return Some(GateRefusal::Blocked);
        }
        if self.hosts.as_ref().is_some_and(|hosts| !head.host().is_some_and(|host| hosts.has(host))) {
            return Some(GateRefusal::UnknownHost);
        }
        let is_challenge = https::is_acme_challenge(head.path());
        if self.https.redirects && from.scheme == ClientScheme::Http && !is_challenge && https::has_place(head) {
            return Some(GateRefusal::PlainHttp);
        }
        let closed = self.maintenance.as_ref().filter(|maintenance| !maintenance.allow.contains(from.address()));
        if let Some(&Maintenance { retry_after, .. }) = closed.filter(|_| !is_challenge) {
            return Some(GateRefusal::Maintenance { retry_after });
        }
        self.rates.as_ref()?.refusal(from, now)
    }

    /// Does a little of the housekeeping of the rates. Call it some times a second.
    pub(super) fn tidy(&self, now: Duration) {
        if let Some(rates) = &self.rates {
            rates.buckets.tidy(now);
        }
    }

    /// Where a request that was refused with [`GateRefusal::PlainHttp`] is sent: the value of `Location`.
    pub(super) fn https_location(&self, head: &RequestHead) -> Vec<u8> {
        self.https.location(head)
    }

    /// The value of `Strict-Transport-Security` for answers to whoever came by TLS; empty for none.
    pub(super) fn strict_transport(&self) -> &str {
        &self.https.strict_transport
    }
}

impl RateBuckets {
    /// Has what was used up under the limits of before count under those of now. `now` counts from the start of the process.
    pub fn adopt(&self, before: &config::EdgeRateLimit, after: &config::EdgeRateLimit, now: Duration) {
        let client = |limit: &config::EdgeRateLimit| Rate::new(limit.client_rate, limit.client_burst);
        let total = |limit: &config::EdgeRateLimit| Rate::new(limit.total_rate, limit.total_burst);
        let of_client = RateChange { before: client(before), after: client(after) };
        let of_all = RateChange { before: total(before), after: total(after) };
        self.convert((of_client, of_all), now);
    }
}

impl RateRules {
    fn of(limit: &config::EdgeRateLimit, buckets: &Arc<RateBuckets>) -> Option<Self> {
        let client = Rate::new(limit.client_rate, limit.client_burst);
        let total = Rate::new(limit.total_rate, limit.total_burst);
        let rules = RateRules { client, total, exempt: NetworkSet::new(&limit.exempt), buckets: Arc::clone(buckets) };
        (client.is_some() || total.is_some()).then_some(rules)
    }

    /// Takes a token of each bucket. A trusted proxy that speaks for itself has none: if its check were refused while the shop is
    /// overrun, it would take this clearcoat out, and then the next one.
    fn refusal(&self, from: &Arrival, now: Duration) -> Option<GateRefusal> {
        let client = from.client.filter(|client| !self.exempt.contains(*client))?;
        if let Some(rate) = self.client
            && let Err(wait) = self.buckets.take_of_client(client, rate, now)
        {
            return Some(GateRefusal::ClientRate { retry_after: whole_seconds(wait) });
        }
        if let Some(rate) = self.total
            && let Err(wait) = self.buckets.take_of_all(rate, now)
        {
            if let Some(rate) = self.client {
                self.buckets.give_back(client, rate, now);
            }
            return Some(GateRefusal::TotalRate { retry_after: whole_seconds(wait) });
        }
        None
    }
}

/// Seconds as `Retry-After` has them: whole ones, rounded up.
fn whole_seconds(time: Duration) -> u32 {
    u32::try_from(time.as_nanos().div_ceil(1_000_000_000)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn gate(edge: &config::Edge) -> Option<Gate> {
        Gate::of(edge, &Arc::default())
    }

    fn head(bytes: &str) -> RequestHead {
        let mut head = RequestHead::default();
        head.parse(bytes.as_bytes(), 100).unwrap();
        head
    }

    fn get(host: &str, path: &str) -> RequestHead {
        head(&format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"))
    }

    fn from(address: &str, scheme: ClientScheme) -> Arrival {
        let address: IpAddr = address.parse().unwrap();
        Arrival { client: Some(address), peer: address, scheme }
    }

    #[test]
    fn without_rules_there_is_no_gate() {
        assert!(gate(&config::Edge::default()).is_none());
    }

    #[test]
    fn the_rules_hold_in_their_order() {
        let mut edge = config::Edge {
            blocked: vec!["192.0.2.0/24".parse().unwrap()],
            hosts: vec!["shop.example".to_owned()],
            ..config::Edge::default()
        };
        edge.https.redirect = true;
        edge.maintenance.on = true;
        edge.maintenance.retry_after = Duration::from_millis(1500);
        edge.maintenance.allow = vec!["198.51.100.7/32".parse().unwrap()];
        let gate = gate(&edge).unwrap();
        let closed = Some(GateRefusal::Maintenance { retry_after: 2 });
        let challenge = "/.well-known/acme-challenge/a_b-C";
        for (address, scheme, host, path, expected) in [
            ("192.0.2.9", ClientScheme::Http, "other.example", "/", Some(GateRefusal::Blocked)),
            ("198.51.100.7", ClientScheme::Http, "other.example", "/", Some(GateRefusal::UnknownHost)),
            ("198.51.100.7", ClientScheme::Http, "shop.example", "/", Some(GateRefusal::PlainHttp)),
            ("198.51.100.7", ClientScheme::Http, "shop.example", challenge, None),
            ("198.51.100.7", ClientScheme::Https, "shop.example", "/", None),
            ("198.51.100.7", ClientScheme::Unknown, "shop.example", "/", None),
            ("198.51.100.8", ClientScheme::Https, "shop.example", "/", closed),
            ("198.51.100.8", ClientScheme::Http, "shop.example", challenge, None),
        ] {
            let refusal = gate.refusal(&get(host, path), &from(address, scheme), Duration::ZERO);
            assert_eq!(refusal, expected, "{address} {scheme:?} {host}{path}");
        }
    }

    #[test]
    fn a_request_without_a_host_is_for_no_host_and_has_nowhere_to_go() {
        let old = head("GET / HTTP/1.0\r\n\r\n");
        let mut edge = config::Edge::default();
        edge.https.redirect = true;
        let from = from("192.0.2.1", ClientScheme::Http);
        assert_eq!(gate(&edge).unwrap().refusal(&old, &from, Duration::ZERO), None);
        edge.hosts = vec!["a".to_owned()];
        assert_eq!(gate(&edge).unwrap().refusal(&old, &from, Duration::ZERO), Some(GateRefusal::UnknownHost));
    }

    #[test]
    fn one_client_uses_up_its_own_rate_and_not_that_of_all() {
        let rate_limit = config::EdgeRateLimit {
            client_rate: 1,
            client_burst: 2,
            total_rate: 1,
            total_burst: 4,
            exempt: vec!["203.0.113.0/24".parse().unwrap()],
        };
        let edge = config::Edge { rate_limit, ..config::Edge::default() };
        let gate = gate(&edge).unwrap();
        let refusal = |from: &Arrival| gate.refusal(&get("a", "/"), from, Duration::from_secs(1));
        let from = |address| from(address, ClientScheme::Https);
        let first = [1, 2, 3, 4, 5].map(|_| refusal(&from("192.0.2.1")));
        let too_many = Some(GateRefusal::ClientRate { retry_after: 1 });
        assert_eq!(first, [None, None, too_many, too_many, too_many]);
        assert_eq!([1, 2].map(|_| refusal(&from("192.0.2.2"))), [None, None]);
        assert_eq!(refusal(&from("192.0.2.3")), Some(GateRefusal::TotalRate { retry_after: 1 }));
        assert_eq!([1, 2, 3].map(|_| refusal(&from("203.0.113.1"))), [None; 3]);
        // What was refused for all the others has cost him nothing of his own.
        let later = |from: &Arrival| gate.refusal(&get("a", "/"), from, Duration::from_secs(3));
        assert_eq!([1, 2].map(|_| later(&from("192.0.2.3"))), [None, None]);
        // A proxy that speaks for itself has no rate.
        let proxy = Arrival { client: None, ..from("10.0.0.1") };
        assert_eq!([1, 2, 3].map(|_| refusal(&proxy)), [None; 3]);
    }
}
