//! `[limits]`: what one stranger may take.
//!
//! Each limit bounds something that a client, or a page that went wrong, could otherwise grow for ever: a buffer, a
//! list, a share of the open files; waits are bounded by `[timeouts]`. They hold for the edge and for the origin
//! listener, because an answer passes both, and a request that one lets through would only fail at the other. What
//! tells one client from another holds for the edge alone: the clients of the origin are the Varnish nodes, who are
//! few, are trusted, and are as slow as the clients they wait for.

use std::num::{NonZeroU64, NonZeroUsize};

use serde::{Deserialize, Serialize};

use super::optional::zero_is_none;
use crate::http1::HeadLimits;

/// `[limits]`: edge and origin, unless a key says otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The most that a request's head may have, in bytes; beyond it the answer is 431 (RFC 6585 section 5).
    /// 1024 to 1048576, default 32768: what Varnish takes (its parameter `http_req_size`).
    pub max_head: usize,
    /// The most that the head of a node's answer may have, in bytes; beyond it the client gets 502. 1024 to 1048576,
    /// default 131072: Magento lists the tags of a page in its head. It should be above what a Varnish takes of a web node
    /// (its parameter `http_resp_size`), and what its VCL adds comes on top; docs/vcl.md recommends 96 KiB for that one.
    pub max_answer_head: usize,
    /// The most header fields that one head may have, of a request or of an answer. 16 to 256, default 100.
    pub max_fields: usize,
    /// The most that a request's body may have, in bytes; beyond it the answer is 413. 0 (the default) is no limit:
    /// how large an upload may be is the shop's own decision.
    #[serde(with = "zero_is_none")]
    pub max_body: Option<NonZeroU64>,
    /// Edge only. How many bytes a second a client must send or take of a body, over each 20 s in which it was waited
    /// for; 0 is no such limit. Default 500, as Apache's mod_reqtimeout has it.
    #[serde(with = "zero_is_none")]
    pub min_body_rate: Option<NonZeroU64>,
    /// Edge only. Client connections of the whole process; 0 (the default) is as many as the limit of open files
    /// leaves room for, which is also the most that a number gets.
    #[serde(with = "zero_is_none")]
    pub max_connections: Option<NonZeroUsize>,
    /// Edge only. Client connections from one address; 0 (the default) is no limit. Addresses in
    /// `edge.trusted_proxies` are exempt, since many clients come through them; if such a proxy sends a PROXY
    /// header, the address in it counts.
    #[serde(with = "zero_is_none")]
    pub max_connections_per_address: Option<NonZeroUsize>,
}

impl Limits {
    /// `max_body` as a number to compare with, in bytes.
    pub fn longest_body(&self) -> u64 {
        self.max_body.map_or(u64::MAX, NonZeroU64::get)
    }

    /// What the head of a request may have.
    pub fn of_requests(&self) -> HeadLimits {
        HeadLimits { bytes: self.max_head, fields: self.max_fields }
    }

    /// What the head of an answer may have.
    pub fn of_answers(&self) -> HeadLimits {
        HeadLimits { bytes: self.max_answer_head, fields: self.max_fields }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_head: 32 << 10,
            max_answer_head: 128 << 10,
            max_fields: 100,
            max_body: None,
            min_body_rate: NonZeroU64::new(500),
            max_connections: None,
            max_connections_per_address: None,
        }
    }
}
