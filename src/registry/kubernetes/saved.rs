//! The last pods received from the API server, on disk, for a start without it.
//!
//! Each service has its own, so that one that is not configured any more brings no node back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::pods::{Pod, ServicePods};
use crate::fleet::NodeSpec;
use crate::registry::last_fleet::{LastFleet, OF_KUBERNETES, spec};

/// The pods at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedPods {
    format: u32,
    services: Vec<SavedService>,
}

/// Those of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedService {
    /// `ROLE NAMESPACE/SERVICE`.
    service: String,
    pods: Vec<SavedPod>,
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedPod {
    terminating: bool,
    #[serde(with = "spec")]
    spec: NodeSpec,
}

impl SavedService {
    pub(super) fn new(service: String, pods: &ServicePods) -> Self {
        let saved = |pod: &Pod| SavedPod { terminating: pod.terminating, spec: pod.spec.clone() };
        SavedService { service, pods: pods.pods().map(saved).collect() }
    }
}

impl SavedPods {
    pub(super) fn new(services: impl Iterator<Item = SavedService>) -> Self {
        SavedPods { format: OF_KUBERNETES, services: services.collect() }
    }

    /// The pods of each service.
    pub(super) fn into_services(self) -> BTreeMap<String, Vec<Pod>> {
        let pod = |SavedPod { terminating, spec }| Pod { spec, terminating };
        self.services.into_iter().map(|saved| (saved.service, saved.pods.into_iter().map(pod).collect())).collect()
    }
}

impl LastFleet for SavedPods {
    const FORMAT: u32 = OF_KUBERNETES;

    fn has_same_nodes(&self, other: &Self) -> bool {
        self == other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another release has written it, or will read it.
    #[test]
    fn a_file_of_format_2_is_read_and_written_as_it_always_was() {
        let text = concat!(
            r#"{"format":2,"services":[{"service":"varnish shop/varnish","pods":[{"terminating":false,"#,
            r#""spec":{"source":"kubernetes","role":"varnish","id":"varnish-0","address":"10.0.1.5:6081","weight":1,"#,
            r#""delivery":"magento","header_limit":7680,"send_proxy":"off","epoch":"uid","zone":"a","#,
            r#""labels":{"node":"n"}}}]}]}"#
        );
        let saved: SavedPods = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&saved).unwrap(), text);
        let services = saved.into_services();
        let pod = &services["varnish shop/varnish"][0];
        assert_eq!(
            (pod.terminating, pod.spec.id.as_str(), pod.spec.epoch().map(|epoch| &**epoch)),
            (false, "varnish-0", Some("uid"))
        );
    }
}
