//! The value of one key: the record of one node.
//!
//! A bare `HOST:PORT` is enough, so that a shell script can register a node; more facts
//! go into a JSON object. Its writer may be newer or older than we are, so an unknown field is not an error. An unknown
//! value of a known field is one: the part that we cannot read may be the part that matters.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::NodeFacts;
use crate::fleet::{
    DEFAULT_HEADER_LIMIT, NodeId, NodeSource, NodeSpec, PurgeDialect, Role, SecretHeaders, SendProxy, ServingState,
    VarnishSettings,
};

/// The longest value in bytes: a record is some hundred bytes, and every replica keeps it.
const LONGEST: usize = 64 * 1024;

/// The known fields. Some are listed only so that they are not reported as typing mistakes: an agent writes `boot` and
/// `started` for itself, and `admin` names Varnish's management port.
const KNOWN: [&str; 12] = [
    "address",
    "weight",
    "zone",
    "state",
    "epoch",
    "labels",
    "delivery",
    "header_limit",
    "send_proxy",
    "admin",
    "boot",
    "started",
];

/// The record that a node has registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeRecord {
    /// `HOST:PORT`, the host an address or a name.
    pub(super) address: String,
    pub(super) weight: u32,
    /// It has announced that it is about to leave.
    pub(super) drain: bool,
    pub(super) delivery: PurgeDialect,
    pub(super) header_limit: usize,
    pub(super) send_proxy: SendProxy,
    pub(super) epoch: Option<Arc<str>>,
    pub(super) zone: Option<Arc<str>>,
    pub(super) labels: BTreeMap<String, String>,
}

/// A record, and the names of its unknown fields.
pub(super) type ParsedRecord = (NodeRecord, Vec<String>);

/// The record on the wire.
#[derive(Deserialize)]
struct Written {
    address: String,
    #[serde(default = "one")]
    weight: u32,
    zone: Option<Arc<str>>,
    #[serde(default)]
    state: ServingState,
    epoch: Option<Arc<str>>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    delivery: Option<PurgeDialect>,
    header_limit: Option<usize>,
    #[serde(default)]
    send_proxy: SendProxy,
}

fn one() -> u32 {
    1
}

impl NodeRecord {
    /// Parses the value of a key. The text of an error says what is wrong, and what is allowed.
    pub(super) fn parse(role: Role, value: &[u8]) -> Result<ParsedRecord, String> {
        if value.len() > LONGEST {
            return Err(format!("{} bytes are too long for a record, {LONGEST} are the most", value.len()));
        }
        let text = std::str::from_utf8(value).map_err(|_| "not UTF-8".to_owned())?.trim_ascii();
        let (written, unknown) =
            if text.starts_with('{') { parse_object(text)? } else { (Written::bare(text), Vec::new()) };
        Ok((written.check(role, text)?, unknown))
    }

    /// The node, once its address is known.
    pub(super) fn spec(&self, role: Role, id: NodeId, address: SocketAddr) -> NodeSpec {
        // Cache settings in the record of a web node are ignored: it has no cache.
        let settings = || VarnishSettings {
            delivery: self.delivery,
            header_limit: self.header_limit,
            send_proxy: self.send_proxy,
            epoch: self.epoch.clone(),
            // The keeper uses those of the configuration; `fleet/headers.rs` explains why records have none.
            headers: SecretHeaders::default(),
        };
        NodeSpec {
            source: NodeSource::Etcd,
            id,
            address,
            weight: if self.drain { 0 } else { self.weight },
            zone: self.zone.clone(),
            labels: self.labels.clone(),
            varnish: (role == Role::Varnish).then(settings),
        }
    }
}

impl Written {
    fn bare(address: &str) -> Self {
        Written {
            address: address.to_owned(),
            weight: 1,
            zone: None,
            state: ServingState::Up,
            epoch: None,
            labels: BTreeMap::new(),
            delivery: None,
            header_limit: None,
            send_proxy: SendProxy::Off,
        }
    }

    fn check(self, role: Role, text: &str) -> Result<NodeRecord, String> {
        let facts = NodeFacts {
            role,
            address: &self.address,
            weight: self.weight,
            has_delivery: self.delivery.is_some(),
            header_limit: self.header_limit,
            send_proxy: self.send_proxy,
        };
        let faults = facts.faults();
        if !text.starts_with('{') && !faults.is_empty() {
            return Err(format!("{}: neither HOST:PORT such as 192.0.2.5:80 nor a JSON object", shown(text)));
        }
        if let Some((name, reason)) = faults.first() {
            return Err(format!("{name}: {reason}"));
        }
        Ok(NodeRecord {
            address: self.address,
            weight: self.weight,
            drain: self.state == ServingState::Drain,
            delivery: self.delivery.unwrap_or_default(),
            header_limit: self.header_limit.unwrap_or(DEFAULT_HEADER_LIMIT),
            send_proxy: self.send_proxy,
            epoch: self.epoch.filter(|epoch| !epoch.is_empty()),
            zone: self.zone.filter(|zone| !zone.is_empty()),
            labels: self.labels,
        })
    }
}

fn parse_object(text: &str) -> Result<(Written, Vec<String>), String> {
    let object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let unknown = object.keys().filter(|name| !KNOWN.contains(&name.as_str())).cloned().collect();
    let written = serde_path_to_error::deserialize(serde_json::Value::Object(object)).map_err(|error| {
        let path = error.path().to_string();
        // If a field is missing, the path is the object itself, and the message names the field.
        if path == "." { error.inner().to_string() } else { format!("{path}: {}", error.inner()) }
    })?;
    Ok((written, unknown))
}

/// The beginning of a value, for the log.
fn shown(text: &str) -> String {
    let mut beginning: String = text.chars().take(60).collect();
    if beginning.len() < text.len() {
        beginning.push('…');
    }
    format!("`{}`", beginning.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(role: Role, value: &str) -> Result<ParsedRecord, String> {
        NodeRecord::parse(role, value.as_bytes())
    }

    fn refused(role: Role, value: &str) -> String {
        parse(role, value).expect_err(value)
    }

    #[test]
    fn an_address_is_enough() {
        for value in ["10.0.0.5:80", " 10.0.0.5:80\n", r#"{"address":"10.0.0.5:80"}"#] {
            let (record, unknown) = parse(Role::Web, value).unwrap();
            assert_eq!((record.address.as_str(), record.weight, record.drain), ("10.0.0.5:80", 1, false), "{value}");
            assert!(unknown.is_empty());
        }
    }

    #[test]
    fn an_object_says_more() {
        let value = r#"{"address":"varnish-1.shop:6081","weight":3,"zone":"a","state":"drain","epoch":"e1",
            "labels":{"rack":"7"},"delivery":"xkey","header_limit":1024,"send_proxy":"v2","admin":"10.0.1.5:6082",
            "boot":"b","started":"2026-01-01"}"#;
        let (record, unknown) = parse(Role::Varnish, value).unwrap();
        assert_eq!(unknown, Vec::<String>::new());
        let id = NodeId::try_from("varnish-1").unwrap();
        let spec = record.spec(Role::Varnish, id, ([10, 0, 1, 5], 6081).into());
        assert_eq!((spec.weight, record.weight, record.drain), (0, 3, true));
        let epoch = Some("e1".into());
        let (delivery, header_limit, send_proxy) = (PurgeDialect::Xkey, 1024, SendProxy::V2);
        let headers = SecretHeaders::default();
        assert_eq!(spec.varnish, Some(VarnishSettings { delivery, header_limit, send_proxy, epoch, headers }));
        assert_eq!(spec.zone.as_deref(), Some("a"));
        assert_eq!((spec.labels["rack"].as_str(), spec.source), ("7", NodeSource::Etcd));
    }

    #[test]
    fn a_field_that_nobody_knows_is_named_and_no_fault() {
        let (record, unknown) = parse(Role::Web, r#"{"address":"10.0.0.5:80","wieght":0,"x":{}}"#).unwrap();
        assert_eq!((record.weight, unknown), (1, vec!["wieght".to_owned(), "x".to_owned()]));
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_what_is_allowed() {
        for (role, value, expected) in [
            (Role::Web, "", "``: neither HOST:PORT such as 192.0.2.5:80 nor a JSON object"),
            (Role::Web, "\"10.0.0.5:80\"", "`\\\"10.0.0.5:80\\\"`: neither HOST:PORT"),
            (Role::Web, "10.0.0.5", "neither HOST:PORT"),
            (Role::Web, "{\"address\":", "not JSON: EOF while parsing"),
            (Role::Web, "{}", "missing field `address`"),
            (Role::Web, r#"{"address":"10.0.0.5"}"#, "address: wanted HOST:PORT such as 192.0.2.11:6081"),
            (Role::Web, r#"{"address":"a:80","weight":65536}"#, "weight: must be 0 to 65535"),
            (Role::Web, r#"{"address":"a:80","weight":-1}"#, "weight: invalid value: integer `-1`, expected u32"),
            (
                Role::Web,
                r#"{"address":"a:80","state":"down"}"#,
                "state: unknown variant `down`, expected `up` or `drain`",
            ),
            (Role::Web, r#"{"address":"a:80","delivery":"xkey"}"#, "delivery: only for nodes of role varnish"),
            (Role::Web, r#"{"address":"a:80","send_proxy":"v2"}"#, "send_proxy: only for nodes of role varnish"),
            (Role::Varnish, r#"{"address":"a:80","header_limit":1}"#, "header_limit: must be 512 to 65536 bytes"),
            (
                Role::Varnish,
                r#"{"address":"a:80","delivery":"cli"}"#,
                "delivery: unknown variant `cli`, expected one of",
            ),
            (Role::Varnish, r#"{"address":"a:80","labels":{"a":1}}"#, "labels.a: invalid type: integer `1`"),
        ] {
            let reason = refused(role, value);
            assert!(reason.contains(expected), "{value}: {reason}");
        }
        assert_eq!(NodeRecord::parse(Role::Web, b"\xff:80").unwrap_err(), "not UTF-8");
        assert!(NodeRecord::parse(Role::Web, &[b'a'; LONGEST + 1]).unwrap_err().contains("too long"));
    }

    proptest::proptest! {
        #[test]
        fn nothing_that_is_written_there_makes_it_panic(value: Vec<u8>, json in "\\{(\"(address|weight|state|labels)\":[\"0-9a-z:{},-]{0,12},?){0,4}\\}") {
            for role in [Role::Web, Role::Varnish] {
                _ = NodeRecord::parse(role, &value);
                _ = NodeRecord::parse(role, json.as_bytes());
            }
        }
    }
}
