//! The part of the Kubernetes API that is read: EndpointSlices (`discovery.k8s.io/v1`), the list of them, the events of a
//! watch, and what the API server says when it refuses.
//!
//! A field that is not there and one that is `null` are the same: Go writes an empty list as `null`.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The pods of a service, or some of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointSlice {
    pub(super) metadata: ObjectMetadata,
    /// `IPv4`, `IPv6` or `FQDN`: what all addresses in it are.
    pub(super) address_type: String,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) endpoints: Vec<SliceEndpoint>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) ports: Vec<EndpointPort>,
}

/// What every object has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ObjectMetadata {
    #[serde(deserialize_with = "null_is_default")]
    pub(super) name: String,
    /// Opaque: it is only ever sent back.
    #[serde(deserialize_with = "null_is_default")]
    pub(super) resource_version: String,
}

/// One pod, with its addresses of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SliceEndpoint {
    /// Any of them will do.
    #[serde(deserialize_with = "null_is_default")]
    pub(super) addresses: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub(super) conditions: EndpointConditions,
    pub(super) hostname: Option<String>,
    pub(super) node_name: Option<String>,
    pub(super) zone: Option<String>,
    pub(super) target_ref: Option<TargetRef>,
}

/// How the pod is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct EndpointConditions {
    /// It wants traffic. With `publishNotReadyAddresses` this is always true.
    pub(super) ready: Option<bool>,
    /// Its readiness probe passes, whether it terminates or not.
    pub(super) serving: Option<bool>,
    /// It was told to end.
    pub(super) terminating: Option<bool>,
}

impl EndpointConditions {
    /// Unknown means ready, says the API.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.unwrap_or(true)
    }

    /// Unknown means as `ready`, says the API.
    pub(super) fn is_serving(&self) -> bool {
        self.serving.unwrap_or_else(|| self.is_ready())
    }

    /// Unknown means no, says the API.
    pub(super) fn is_terminating(&self) -> bool {
        self.terminating.unwrap_or(false)
    }
}

/// The object behind an endpoint: a pod, mostly.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct TargetRef {
    #[serde(deserialize_with = "null_is_default")]
    pub(super) name: String,
    #[serde(deserialize_with = "null_is_default")]
    pub(super) uid: String,
}

/// A port of all endpoints of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct EndpointPort {
    /// Its name in the service; empty where the service has only one.
    #[serde(deserialize_with = "null_is_default")]
    pub(super) name: String,
    pub(super) port: Option<u16>,
    /// TCP if there is none.
    pub(super) protocol: Option<String>,
}

/// The answer to a list.
#[derive(Debug, Deserialize)]
pub(super) struct SliceList {
    pub(super) metadata: ObjectMetadata,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(super) items: Vec<EndpointSlice>,
}

/// What the API server says when it refuses (`meta/v1.Status`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct ApiStatus {
    pub(super) code: u16,
    #[serde(deserialize_with = "null_is_default")]
    pub(super) message: String,
}

/// One line of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WatchEvent {
    /// The slice is new, or another.
    Put(EndpointSlice),
    /// The slice is gone.
    Deleted(ObjectMetadata),
    /// Nothing has changed up to this resource version.
    Bookmark(String),
    /// The watch cannot go on.
    Refused(ApiStatus),
}

impl WatchEvent {
    /// Reads a line.
    pub(super) fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        struct Written {
            #[serde(rename = "type")]
            kind: String,
            object: Value,
        }
        let Written { kind, object } = serde_json::from_slice(line)?;
        let metadata = |object: Value| -> Result<ObjectMetadata, serde_json::Error> {
            #[derive(Deserialize)]
            struct Any {
                metadata: ObjectMetadata,
            }
            serde_json::from_value::<Any>(object).map(|any| any.metadata)
        };
        match kind.as_str() {
            "ADDED" | "MODIFIED" => serde_json::from_value(object).map(WatchEvent::Put),
            "DELETED" => metadata(object).map(WatchEvent::Deleted),
            "BOOKMARK" => metadata(object).map(|metadata| WatchEvent::Bookmark(metadata.resource_version)),
            "ERROR" => serde_json::from_value(object).map(WatchEvent::Refused),
            other => Err(serde::de::Error::custom(format!("a watch event of type `{}`", other.escape_debug()))),
        }
    }
}

fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_leaves_out_and_what_it_writes_as_null_is_the_same() {
        for text in [
            r#"{"metadata":{"name":"a","resourceVersion":"7"},"addressType":"IPv4","endpoints":null,"ports":null}"#,
            r#"{"metadata":{"name":"a","resourceVersion":"7"},"addressType":"IPv4"}"#,
        ] {
            let slice: EndpointSlice = serde_json::from_str(text).unwrap();
            assert!(slice.endpoints.is_empty() && slice.ports.is_empty());
        }
        let text = r#"{"addresses":["10.0.0.1"],"conditions":{},"targetRef":null,"zone":null}"#;
        let endpoint: SliceEndpoint = serde_json::from_str(text).unwrap();
        let conditions = &endpoint.conditions;
        assert_eq!((conditions.is_ready(), conditions.is_serving(), conditions.is_terminating()), (true, true, false));
    }

    #[test]
    fn the_lines_of_a_watch_are_told_apart() {
        let parse = |text: &str| WatchEvent::parse(text.as_bytes());
        let object = r#"{"metadata":{"name":"a","resourceVersion":"8"},"addressType":"IPv4","endpoints":null}"#;
        assert!(matches!(parse(&format!(r#"{{"type":"ADDED","object":{object}}}"#)), Ok(WatchEvent::Put(_))));
        let gone = parse(&format!(r#"{{"type":"DELETED","object":{object}}}"#)).unwrap();
        assert!(matches!(gone, WatchEvent::Deleted(metadata) if metadata.name == "a"));
        let bookmark = r#"{"type":"BOOKMARK","object":{"kind":"EndpointSlice","metadata":{"resourceVersion":"9","creationTimestamp":null},"endpoints":null}}"#;
        assert_eq!(parse(bookmark).unwrap(), WatchEvent::Bookmark("9".to_owned()));
        let error = r#"{"type":"ERROR","object":{"kind":"Status","metadata":{},"status":"Failure","message":"too old","reason":"Expired","code":410}}"#;
        assert!(matches!(parse(error).unwrap(), WatchEvent::Refused(status) if status.code == 410));
        for bad in ["", "{}", r#"{"type":"ADDED","object":{}}"#, r#"{"type":"RENAMED","object":{}}"#] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_line_makes_it_panic(line: Vec<u8>, json in "\\{\"type\":\"(ADDED|ERROR|BOOKMARK)\",\"object\":[\"0-9a-z:{},-]{0,20}\\}") {
            _ = WatchEvent::parse(&line);
            _ = WatchEvent::parse(json.as_bytes());
        }
    }
}
