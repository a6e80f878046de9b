//! The scenarios: each is a load, with the quantity to measure.

use crate::load::{Pace, Reuse};
use crate::messages::{Exchange, LARGE, MEDIUM, POST, RICH, SMALL};

/// A load under which peers are compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// Its description in the report.
    pub(crate) says: &'static str,
    pub(crate) exchange: Exchange,
    pub(crate) connections: usize,
    pub(crate) pace: Pace,
    pub(crate) reuse: Reuse,
    pub(crate) transport: Transport,
    pub(crate) subject: Subject,
}

/// The client's protocol. Towards the origin it is always plain HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Plain,
    Tls,
    /// Over TLS, with this many streams per connection.
    Http2 {
        streams: usize,
    },
}

/// The measured quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// CPU time per request.
    Cpu,
    /// The same, with a second configuration of HAProxy.
    CpuOfLargeBodies,
    /// Memory per idle connection.
    IdleMemory,
    /// The gain of a second worker on a second core.
    Workers,
    /// CPU time per request before fleets of several sizes.
    FleetSize,
}

const PLAIN: Scenario = Scenario {
    name: "rich",
    says: "12 request fields, 15 answer fields, 1 KiB",
    exchange: RICH,
    connections: 64,
    pace: Pace::Closed,
    reuse: Reuse::KeepAlive,
    transport: Transport::Plain,
    subject: Subject::Cpu,
};

/// All scenarios, in the order of the report.
pub(crate) const ALL: [Scenario; 16] = [
    PLAIN,
    Scenario { name: "1k", says: "few fields, 1 KiB", exchange: SMALL, ..PLAIN },
    Scenario { name: "16k", says: "few fields, 16 KiB", exchange: MEDIUM, ..PLAIN },
    Scenario {
        name: "1m",
        says: "few fields, 1 MiB, 16 connections",
        exchange: LARGE,
        connections: 16,
        subject: Subject::CpuOfLargeBodies,
        ..PLAIN
    },
    Scenario { name: "512", says: "rich, 512 connections", connections: 512, ..PLAIN },
    Scenario { name: "post", says: "1 KiB up, 1 KiB down", exchange: POST, ..PLAIN },
    Scenario { name: "close", says: "1 KiB, a connection per request", exchange: SMALL, reuse: Reuse::Close, ..PLAIN },
    Scenario { name: "open-10k", says: "rich, 10,000 requests/s", pace: Pace::Open(10_000), ..PLAIN },
    Scenario { name: "open-20k", says: "rich, 20,000 requests/s", pace: Pace::Open(20_000), ..PLAIN },
    Scenario {
        name: "idle",
        says: "9,000 connections after one request each",
        connections: 9_000,
        subject: Subject::IdleMemory,
        ..PLAIN
    },
    Scenario {
        name: "workers",
        says: "rich, proxy, load and origin on the same one or two cores",
        connections: 128,
        subject: Subject::Workers,
        ..PLAIN
    },
    Scenario {
        name: "fleet",
        says: "rich, before 2 to 1,000 Varnish nodes, each checked every second",
        subject: Subject::FleetSize,
        ..PLAIN
    },
    Scenario { name: "tls", says: "rich over TLS 1.3", transport: Transport::Tls, ..PLAIN },
    Scenario {
        name: "tls-handshake",
        says: "1 KiB, a full TLS 1.3 handshake per request",
        exchange: SMALL,
        reuse: Reuse::Close,
        transport: Transport::Tls,
        ..PLAIN
    },
    Scenario {
        name: "tls-resume",
        says: "1 KiB, a resumed TLS 1.3 session per request",
        exchange: SMALL,
        reuse: Reuse::Resume,
        transport: Transport::Tls,
        ..PLAIN
    },
    Scenario {
        name: "h2",
        says: "rich over HTTP/2 and TLS 1.3, 8 connections of 8 streams",
        connections: 8,
        transport: Transport::Http2 { streams: 8 },
        ..PLAIN
    },
];

impl Scenario {
    /// Whether it is a short one that shows the cost of HTTP/1.1 itself.
    pub(crate) fn is_quick(&self) -> bool {
        self.transport == Transport::Plain && matches!(self.subject, Subject::Cpu | Subject::CpuOfLargeBodies)
    }

    /// The peer that the others are compared with.
    pub(crate) fn baseline(&self) -> &'static str {
        if self.subject == Subject::CpuOfLargeBodies { "haproxy-splice" } else { "haproxy" }
    }

    /// Whether a peer takes part.
    pub(crate) fn admits(&self, peer: &str) -> bool {
        match (peer, self.subject) {
            ("haproxy-splice", subject) => subject == Subject::CpuOfLargeBodies,
            // nginx's workers are processes, not threads of one proxy; the comparison is with HAProxy.
            ("nginx", subject) => subject != Subject::Workers,
            _ => true,
        }
    }
}
