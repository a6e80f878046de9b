//! The value of the key of a node.
//!
//! What is left out has its default, so that a key stays readable in a terminal. Two members are for us alone: `boot` is
//! different for each process, so that no two of them ever write the same value, and `started` shows people which is
//! newer.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::clock;
use crate::fleet::{PurgeDialect, SendProxy, ServingState};

/// The facts of a node that are configured and never change.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Facts {
    /// Its share of the traffic next to its peers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Where it stands, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// What else there is to say of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The dialect of its purges (Varnish only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delivery: Option<PurgeDialect>,
    /// The longest value of one request header that it takes, in bytes (Varnish only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header_limit: Option<usize>,
    /// Whether connections to it start with a PROXY header (Varnish only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_proxy: Option<SendProxy>,
}

/// The process that writes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct WriterMark {
    boot: String,
    started: u64,
}

impl WriterMark {
    /// This process, from now on.
    pub(super) fn new() -> Self {
        WriterMark { boot: format!("{:016x}", fastrand::u64(..)), started: clock::now_ms() }
    }
}

/// The value of a key.
#[derive(Debug, Serialize)]
pub(super) struct OwnRecord<'a> {
    pub(super) address: &'a str,
    pub(super) state: ServingState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) epoch: Option<&'a str>,
    #[serde(flatten)]
    pub(super) facts: &'a Facts,
    #[serde(flatten)]
    pub(super) writer: &'a WriterMark,
}

impl OwnRecord<'_> {
    /// As it is written.
    ///
    /// # Errors
    /// Nothing in a record can fail to be JSON; serde cannot know that.
    pub(super) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(facts: &Facts, epoch: Option<&str>) -> String {
        let writer = WriterMark { boot: "b".into(), started: 7 };
        let record = OwnRecord { address: "10.0.0.5:80", state: ServingState::Up, epoch, facts, writer: &writer };
        String::from_utf8(record.to_json().unwrap()).unwrap()
    }

    #[test]
    fn what_has_its_default_is_left_out() {
        let text = written(&Facts::default(), None);
        assert_eq!(text, r#"{"address":"10.0.0.5:80","state":"up","boot":"b","started":7}"#);
    }

    #[test]
    fn what_is_said_is_written_as_the_configuration_has_it() {
        let facts = Facts {
            weight: Some(0),
            zone: Some("a".into()),
            labels: BTreeMap::from([("rack".into(), "7".into())]),
            delivery: Some(PurgeDialect::MagentoPlain),
            header_limit: Some(4096),
            send_proxy: Some(SendProxy::V2),
        };
        let text = written(&facts, Some("e"));
        assert_eq!(
            text,
            r#"{"address":"10.0.0.5:80","state":"up","epoch":"e","weight":0,"zone":"a","labels":{"rack":"7"},"delivery":"magento-plain","header_limit":4096,"send_proxy":"v2","boot":"b","started":7}"#
        );
    }

    #[test]
    fn no_two_processes_write_the_same() {
        assert_ne!(WriterMark::new().boot, WriterMark::new().boot);
    }
}
