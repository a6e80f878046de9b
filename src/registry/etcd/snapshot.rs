//! The last fleet received from etcd, on disk, for a start without etcd.
//!
//! It contains the nodes with their resolved addresses, so that a start needs no DNS either, and their leases, so that
//! the first list of etcd, whenever it arrives, is compared with it as if the process had never stopped. An unreadable
//! file does not prevent the start: it is renamed for later inspection, and the process waits for etcd.
//!
//! Only changed nodes cause a write: the revision also grows with every purge that replicas share.

use serde::{Deserialize, Serialize};

use super::record::NodeRecord;
use crate::fleet::NodeSpec;
use crate::registry::last_fleet::{LastFleet, OF_ETCD, spec};

/// The fleet at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedFleet {
    format: u32,
    /// The id of the etcd cluster.
    pub(super) cluster: u64,
    /// Its revision.
    pub(super) revision: i64,
    pub(super) nodes: Vec<SavedNode>,
}

/// One node of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedNode {
    pub(super) key: String,
    /// 0 if it had none.
    pub(super) lease: i64,
    pub(super) record: NodeRecord,
    #[serde(with = "spec")]
    pub(super) spec: NodeSpec,
}

impl SavedFleet {
    pub(super) fn new(cluster: u64, revision: i64, nodes: Vec<SavedNode>) -> Self {
        SavedFleet { format: OF_ETCD, cluster, revision, nodes }
    }
}

impl LastFleet for SavedFleet {
    const FORMAT: u32 = OF_ETCD;

    fn has_same_nodes(&self, other: &Self) -> bool {
        self.nodes == other.nodes
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::atomic_file;
    use crate::fleet::{NodeId, Role};
    use crate::registry::last_fleet::{read, write};

    fn saved() -> SavedFleet {
        let (record, _) =
            NodeRecord::parse(Role::Varnish, br#"{"address":"varnish-1:6081","epoch":"e","zone":"a"}"#).unwrap();
        let spec = record.spec(Role::Varnish, NodeId::try_from("varnish-1").unwrap(), ([10, 0, 1, 5], 6081).into());
        SavedFleet::new(7, 42, vec![SavedNode { key: "varnish/varnish-1".to_owned(), lease: i64::MAX, record, spec }])
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/fleet.json");
        assert_eq!(read::<SavedFleet>(&path).unwrap(), None);
        write(&saved(), &path).unwrap();
        write(&saved(), &path).unwrap();
        assert_eq!(read(&path).unwrap(), Some(saved()));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    /// Another release has written it, or will read it.
    #[test]
    fn a_file_of_format_1_is_read_and_written_as_it_always_was() {
        let text = concat!(
            r#"{"format":1,"cluster":7,"revision":42,"nodes":["#,
            r#"{"key":"varnish/v","lease":5,"record":{"address":"v:6081","weight":1,"drain":false,"delivery":"xkey","#,
            r#""header_limit":512,"send_proxy":"v2","epoch":"e","zone":"a","labels":{}},"#,
            r#""spec":{"source":"etcd","role":"varnish","id":"v","address":"10.0.1.5:6081","weight":1,"delivery":"xkey","#,
            r#""header_limit":512,"send_proxy":"v2","epoch":"e","zone":"a","labels":{}}},"#,
            r#"{"key":"web/w","lease":0,"record":{"address":"w:80","weight":2,"drain":true,"delivery":"magento","#,
            r#""header_limit":7680,"send_proxy":"off","epoch":null,"zone":null,"labels":{"rack":"7"}},"#,
            r#""spec":{"source":"etcd","role":"web","id":"w","address":"10.0.1.6:80","weight":0,"delivery":"magento","#,
            r#""header_limit":7680,"send_proxy":"off","epoch":null,"zone":null,"labels":{"rack":"7"}}}]}"#
        );
        let saved: SavedFleet = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&saved).unwrap(), text);
        let (varnish, web) = (&saved.nodes[0].spec, &saved.nodes[1].spec);
        let settings = varnish.varnish.as_ref().unwrap();
        assert_eq!((settings.header_limit, settings.epoch.as_deref()), (512, Some("e")));
        assert_eq!((web.role(), web.weight), (Role::Web, 0));
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_can_be_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fleet.json");
        for text in ["", "{\"format\":1}", "{\"format\":3,\"nodes\":[]}", "\0\0\0"] {
            fs::write(&path, text).unwrap();
            assert!(read::<SavedFleet>(&path).is_err(), "{text}");
        }
        let aside = atomic_file::set_aside(&path).unwrap();
        assert!(aside.exists() && !path.exists());
    }

    #[test]
    fn the_file_of_another_registry_is_not_used_and_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fleet.json");
        fs::write(&path, "{\"format\":2,\"services\":[]}").unwrap();
        assert_eq!(read::<SavedFleet>(&path).unwrap(), None);
        assert!(path.exists());
    }
}
