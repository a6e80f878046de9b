//! A request becomes a purge; purges become bans.
//!
//! What arrives is what Magento (or curl, or a deploy script) wrote. It is understood **before** it is accepted,
//! because Magento never looks at the answer and Varnish's stock VCL answers `200 Purged` to a pattern it cannot
//! compile: a purge that no Varnish would carry out must be refused here, at the only place that can still say so.
//!
//! What leaves is compiled from everything that gathered for one Varnish: tag sets are united, equal patterns fold,
//! a flush absorbs what it covers. It is written in the form that this Varnish understands, as few and as cheap bans as
//! there can be. Bans commute and are idempotent, so nothing depends on their order.

mod batch;
mod forward;
mod guard;
mod method;
mod parse;
mod pattern;
mod tags;
mod trie;

use serde::{Deserialize, Serialize};

pub use batch::{Ban, Batch, compile};
pub use forward::{BadForward, RequestLimits};
pub use guard::{Ends, Guard, Page, Passage, Sent, Wire};
pub use method::{Rules, may_purge};
pub use parse::{Parsed, Refusal, parse};
pub use pattern::{BadPattern, Pattern};
pub use tags::TagSet;
pub(crate) use tags::to_magento;

/// One accepted invalidation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purge {
    /// What is to go. One request of Magento can name several things (tags and a pool).
    pub targets: Vec<Target>,
    /// Keep the pages as stale copies for grace where the node can do that (`X-Magento-Purge-Soft: 1`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub soft: bool,
}

/// One thing that a purge names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// Every page, whatever it carries: `X-Clearcoat-Flush: all`.
    All,
    /// Every page that carries tags: Magento's flush, the pattern `.*`.
    Everything,
    /// Every page that carries one of these tags.
    Tags(TagSet),
    /// Every page whose tag header matches, for a pattern that is not a list of tags.
    Pattern(Pattern),
    /// Every page whose `X-Pool` header matches.
    Pool(Pattern),
    /// A request that is handed to every Varnish as it came: `PURGE <url>`, `BAN` with headers of its own.
    Forward(Forward),
}

/// A purge request that is repeated to every Varnish as it came.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Hash)]
#[serde(try_from = "forward::Unchecked")]
pub struct Forward {
    /// `PURGE`, `BAN`, or another that [`may_purge`].
    pub method: String,
    /// The request target, in origin form.
    pub target: String,
    /// The end-to-end headers, with `host` as the sender wrote it; none if it wrote none (HTTP/1.0). Credentials never
    /// get here.
    pub headers: Vec<(String, String)>,
}

impl Purge {
    /// What stands for one that nobody can read, that does not fit, or that was not kept: too much dropped is slow, too
    /// little is wrong.
    pub fn everything() -> Self {
        Purge { targets: vec![Target::Everything], soft: false }
    }

    /// Whether it is of a page that a flush may leave: a request that is handed on as it came.
    pub fn is_handed_on(&self) -> bool {
        self.targets.iter().any(|target| matches!(target, Target::Forward(_)))
    }

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

/// What a Varnish is asked with `PURGE` and no header to learn whether it would obey a purge. Not `/`, because our own VCL
/// answers more there, and because a VCL that purges by URL then drops a page that nobody has.
pub const PROBE_PATH: &str = "/.clearcoat/probe";

/// Whether a Varnish that answers [`PROBE_PATH`] with this status would obey a purge. Magento's VCL answers 400 to an
/// address that it obeys (there is nothing to purge) and 405 to any other; a VCL that purges by URL answers 200, or 404
/// for a page that was not there.
pub fn would_obey(status: u16) -> bool {
    matches!(status, 200 | 400 | 404 | 410)
}

/// What an operator should change about a Varnish that refuses purges with this status.
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
