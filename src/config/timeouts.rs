//! `[timeouts]`: how long the traffic waits, and for whom.
//!
//! The names are those of what is awaited, since HAProxy's (`timeout client`, `timeout server`) cover several waits that have to
//! differ here: an administrator's export begins after minutes, and a node that stops in the middle of one is hung. docs/timeouts.md
//! has HAProxy's name for each. They hold for both listeners and for HTTP/1.1 as for HTTP/2.
//!
//! All are checked ten times a second, so that no read or write needs a timer; a value below 100 ms ends a wait at the next look.
//! Whoever is awaited when a reload changes a limit has the whole new limit from then on: a reload cuts nobody.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::optional::zero_duration_is_none;
use super::text;

/// `[timeouts]`: edge and origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// How long a request's head may take from its first byte to its last; then the answer is 408. The same time is
    /// given to a TLS handshake and to a PROXY header. HAProxy's `timeout http-request`. Above 0s, at most 600s, default 10s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub client_header: Duration,
    /// Between two pieces of a body that a client sends or takes; then the answer is 408, or is cut if it has begun. HAProxy's
    /// `timeout client`. Above 0s, at most 24h, default 60s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub client_body: Duration,
    /// Between two pieces that a client still sends after its last answer, on a connection that is about to be closed. HAProxy's
    /// `timeout client-fin`. Above 0s, at most 30s (the most that all of it may take), default 2s, below nginx's 5 s
    /// (`lingering_timeout`).
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub client_fin: Duration,
    /// Opening a connection to a node, at each try; then another node is tried, or the answer is 502. Also the wait for a file
    /// for it, in a process that has too few; then it is 503. HAProxy's `timeout connect`. Above 0s, at most 600s, default 3s:
    /// one SYN may be lost (RFC 6298 section 2: it is sent again after 1 s).
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub connect: Duration,
    /// From a request that was sent to the first byte of its answer, at each try; then the answer is 504. Varnish's
    /// `first_byte_timeout`, a part of HAProxy's `timeout server`. Above 0s, at most 24h, default 600s: what Magento's VCL sets for
    /// an administrator's export.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub first_byte: Duration,
    /// Between two pieces that a node sends of an answer whose length it has announced, or takes of a request; then the answer is
    /// cut, or is 504 if none has begun. Varnish's `between_bytes_timeout`, a part of HAProxy's `timeout server`. Above 0s, at most
    /// 24h, default 60s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub between_bytes: Duration,
    /// From the request for a fragment of a page (ESI) that clearcoat fills in to the end of the fragment; then it is left out. Above
    /// 0s, at most 600s, default 30s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub fragment: Duration,
    /// How long a client's connection is kept without a request. HAProxy's `timeout http-keep-alive`. Above 0s, at most 24h, default
    /// 75s, as nginx has it.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub keep_alive: Duration,
    /// How long a connection to a node is kept without a request; it has to be less than the node keeps it, who may otherwise close
    /// it just as a request is sent. At most 1h, 0s keeps none; default 4s, below the 5 s of Varnish (`timeout_idle`) and Apache
    /// (`KeepAliveTimeout`).
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub node_keep_alive: Duration,
    /// How long nothing may move through a tunnel (WebSocket), nor through an answer of no announced length (an event stream), while
    /// both ends are there. HAProxy's `timeout tunnel`. 0s is no limit; default 1h, as its documentation has it.
    #[serde(with = "zero_duration_is_none")]
    pub tunnel: Option<Duration>,
    /// How long a request may take from the end of its head to the end of its answer, with all tries; then the answer is 504, or is
    /// cut if it has begun. An event stream is cut as well, a tunnel is not. At most 24h; 0s (the default) is no limit.
    #[serde(with = "zero_duration_is_none")]
    pub request: Option<Duration>,
    /// How long the system of a node that is down or gone may leave unanswered what is asked on a connection with a request; then
    /// the answer is 504, or is cut. HAProxy's `tcp-ut`. 5s to 600s, default 15s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub node_silence: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            client_header: Duration::from_secs(10),
            client_body: Duration::from_secs(60),
            client_fin: Duration::from_secs(2),
            connect: Duration::from_secs(3),
            first_byte: Duration::from_secs(600),
            between_bytes: Duration::from_secs(60),
            fragment: Duration::from_secs(30),
            keep_alive: Duration::from_secs(75),
            node_keep_alive: Duration::from_secs(4),
            tunnel: Some(Duration::from_secs(3600)),
            request: None,
            node_silence: Duration::from_secs(15),
        }
    }
}
