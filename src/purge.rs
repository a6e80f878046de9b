//! Turns requests into purges, and purges into bans.
//!
//! A request comes from Magento, curl or a deploy script. It is parsed completely **before** it is accepted, because
//! Magento ignores the answer and Varnish's stock VCL answers `200 Purged` to a pattern that it cannot compile: a purge
//! that no Varnish would carry out must be refused here, the only place that can still report it.
//!
//! All purges pending for one Varnish are compiled together: tag sets are united, equal patterns merged, and a flush
//! absorbs what it covers. The result is written in the form that this Varnish understands, as few and as cheap bans as
//! possible. Bans commute and are idempotent, so their order does not matter.

mod batch;
mod forward;
mod guard;
pub(crate) mod index;
mod parse;
mod pattern;
mod rules;
mod tags;
mod trie;

use serde::{Deserialize, Serialize};

pub use batch::{Ban, CompiledBans, compile};
pub use forward::BadForward;
pub use guard::{Guard, Page, Passage, SentBytes, SocketPair, Wire};
pub use parse::{ParsedPurge, Refusal, parse};
pub use pattern::{BadPattern, Pattern};
pub use rules::{PurgeRules, RequestLimits, may_purge};
pub use tags::TagSet;
pub(crate) use tags::{is_literal_tag, to_magento};

/// One accepted invalidation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purge {
    /// The targets. One request of Magento can name several (tags and a pool).
    pub targets: Vec<Target>,
    /// Keep the pages as stale copies for grace if the node supports it (`X-Magento-Purge-Soft: 1`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub soft: bool,
}

/// One target of a purge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Every page, with or without tags: `X-Clearcoat-Flush: all`.
    All,
    /// Every page with tags: Magento's flush, the pattern `.*`.
    Everything,
    /// Every page with one of these tags.
    Tags(TagSet),
    /// Every page whose tag header matches, for a pattern that is not a list of tags.
    Pattern(Pattern),
    /// Every page whose `X-Pool` header matches.
    Pool(Pattern),
    /// A request that is forwarded unchanged to every Varnish: `PURGE <url>`, `BAN` with custom headers.
    Forward(Forward),
}

/// A purge request that is repeated to every Varnish unchanged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Hash)]
#[serde(try_from = "forward::Unchecked")]
pub struct Forward {
    /// `PURGE`, `BAN`, or another that [`may_purge`].
    pub method: String,
    /// The request target, in origin form.
    pub target: String,
    /// The end-to-end headers, with `host` as the sender wrote it; without it if the sender wrote none (HTTP/1.0).
    /// Credentials are never included.
    pub headers: Vec<(String, String)>,
}

impl Purge {
    /// The replacement for a purge that is unreadable, too large or lost: dropping too much is slow, too little is
    /// wrong.
    pub fn everything() -> Self {
        Purge { targets: vec![Target::Everything], soft: false }
    }

    /// Whether it is of a page that a flush may leave: a request that is handed on as it came.
    pub fn is_handed_on(&self) -> bool {
        self.targets.iter().any(|target| matches!(target, Target::Forward(_)))
    }

    /// All that [`Purge::kind`] may say.
    pub const KINDS: [&str; 6] = ["all", "everything", "tags", "pattern", "pool", "url"];

    /// The kind, for metrics and logs: the name of its first target.
    pub fn kind(&self) -> &'static str {
        match self.targets.first() {
            Some(Target::All) => "all",
            Some(Target::Everything) => "everything",
            Some(Target::Tags(_)) => "tags",
            Some(Target::Pattern(_)) => "pattern",
            Some(Target::Pool(_)) => "pool",
            Some(Target::Forward(_)) | None => "url",
        }
    }
}

/// The path of a `PURGE` without headers that tests whether a Varnish would obey a purge. Not `/`, because our own VCL
/// says more there, and because with a VCL that purges by URL this path drops no real page.
pub const PROBE_PATH: &str = "/.clearcoat/probe";

/// Whether a Varnish that answers [`PROBE_PATH`] with this status would obey a purge. Magento's VCL answers 400 to an
/// address that may purge (the request names no target) and 405 to any other; a VCL that purges by URL answers 200, or
/// 404 if it had no such page.
pub fn would_obey(status: u16) -> bool {
    matches!(status, 200 | 400 | 404 | 410)
}

/// Advice to the operator about a Varnish that refuses purges with this status.
pub fn what_to_change(status: u16) -> &'static str {
    match status {
        405 | 403 => "(its purge ACL refuses clearcoat: add clearcoat's address to `acl purge` in its VCL)",
        400 => {
            "(its VCL does not accept the purge: it must ban by X-Magento-Tags-Pattern and X-Pool, as Magento's does; \
             with delivery xkey it must purge by xkey-purge too)"
        }
        200..=299 => {
            "(its VCL does not say how many pages it dropped by xkey-purge: give the node that of `clearcoat vcl \
             --delivery xkey`, or delivery magento)"
        }
        _ => "(its VCL does not handle PURGE)",
    }
}
