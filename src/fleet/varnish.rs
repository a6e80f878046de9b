//! What is said of a Varnish and of no web node.

use std::fmt;
use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::SecretHeaders;

/// How a Varnish is told to drop pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PurgeDialect {
    /// `PURGE /` with `X-Magento-Tags-Pattern`, as Magento's own VCL understands it: the pattern goes into a ban, so any
    /// regular expression will do, and the cheapest one is sent.
    #[default]
    Magento,
    /// The same with the pattern as Magento itself writes it, for a VCL that takes the tags out of it.
    MagentoPlain,
    /// `PURGE /` with `xkey-purge` or `xkey-softpurge`, for a VCL that drops pages by vmod_xkey.
    Xkey,
}

impl fmt::Display for PurgeDialect {
    /// As the configuration has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PurgeDialect::Magento => "magento",
            PurgeDialect::MagentoPlain => "magento-plain",
            PurgeDialect::Xkey => "xkey",
        })
    }
}

/// Whether connections to a node start with a PROXY header (haproxy.org, doc/proxy-protocol.txt, section 2.2), so that
/// `client.ip` in its VCL is the client.
///
/// The listener of the Varnish must expect the header on every connection (`varnishd -a :6081,PROXY`): it drops a
/// connection that does not begin with one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SendProxy {
    /// They start with HTTP.
    #[default]
    Off,
    /// They start with a header of version 2.
    V2,
}

/// The longest header value that a Varnish is sent unless it says otherwise, in bytes. Varnish takes header lines of
/// 8 KiB by default (`http_req_hdr_len`); Magento itself stops at 7,680 for the same reason.
pub const DEFAULT_HEADER_LIMIT: usize = 7_680;

/// Whether these epochs name two lives of a cache. Where one of them is not known, it counts as the same.
pub fn is_another_life(before: Option<&str>, now: Option<&str>) -> bool {
    before.zip(now).is_some_and(|(before, now)| before != now)
}

/// How a Varnish is reached and purged, as the registry says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VarnishSettings {
    /// How it is told to drop pages.
    pub delivery: PurgeDialect,
    /// The longest value of one request header that it takes, in bytes.
    pub header_limit: usize,
    /// Whether connections to it start with a PROXY header.
    pub send_proxy: SendProxy,
    /// Names the life of its cache: another epoch is another cache, and an empty one. `None` if nobody says: then it counts
    /// as the cache that was there before.
    pub epoch: Option<Arc<str>>,
    /// What purges and health checks to it carry. Secrets: written nowhere.
    pub headers: SecretHeaders,
}

impl Default for VarnishSettings {
    fn default() -> Self {
        VarnishSettings {
            delivery: PurgeDialect::default(),
            header_limit: DEFAULT_HEADER_LIMIT,
            send_proxy: SendProxy::default(),
            epoch: None,
            headers: SecretHeaders::default(),
        }
    }
}

impl VarnishSettings {
    /// Whether existing connections and cursors stay valid when the settings change to `others`.
    pub(super) fn is_reached_as(&self, others: &VarnishSettings) -> bool {
        // All but the epoch must be equal: an epoch that was not known before is no other life.
        let with_others_epoch = VarnishSettings { epoch: others.epoch.clone(), ..self.clone() };
        with_others_epoch == *others && !is_another_life(self.epoch.as_deref(), others.epoch.as_deref())
    }
}
