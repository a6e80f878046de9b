//! Where nodes come from: a stream of [`crate::fleet::Event`]s.
//!
//! One module per source: [`fixed`], the nodes of the configuration file, [`etcd`], where nodes register themselves,
//! [`dns`], the records of names, and [`kubernetes`], the pods of services. [`overrides`] is what operators say of nodes from any of them.

pub mod dns;
pub mod etcd;
pub mod fixed;
pub mod kubernetes;
mod last_fleet;
pub mod overrides;
mod resolve;
mod source_status;

use std::sync::Arc;
use std::time::Duration;

use crate::etcd::follow::WatchStatus;
use crate::fleet::NodeSource;
pub use source_status::SourceStatus;

/// The status of a registry other than the configuration, for the status page and metrics.
#[derive(Clone, Debug)]
pub enum RegistryStatus {
    /// Nodes are in etcd.
    Etcd(Arc<WatchStatus>),
    /// Nodes are records of names.
    Dns(Arc<SourceStatus>),
    /// Nodes are pods.
    Kubernetes(Arc<SourceStatus>),
}

impl RegistryStatus {
    /// The source of its nodes.
    pub fn source(&self) -> NodeSource {
        match self {
            RegistryStatus::Etcd(_) => NodeSource::Etcd,
            RegistryStatus::Dns(_) => NodeSource::Dns,
            RegistryStatus::Kubernetes(_) => NodeSource::Kubernetes,
        }
    }

    /// Whether changes are being received.
    pub fn is_connected(&self) -> bool {
        match self {
            RegistryStatus::Etcd(status) => status.is_connected(),
            RegistryStatus::Dns(status) | RegistryStatus::Kubernetes(status) => status.is_connected(),
        }
    }

    /// The revision of etcd up to which every change is known.
    pub fn revision(&self) -> Option<i64> {
        match self {
            RegistryStatus::Etcd(status) => Some(status.revision()),
            RegistryStatus::Dns(_) | RegistryStatus::Kubernetes(_) => None,
        }
    }

    /// How long ago it last answered.
    pub fn silence(&self) -> Duration {
        match self {
            RegistryStatus::Etcd(status) => status.silence(),
            RegistryStatus::Dns(status) | RegistryStatus::Kubernetes(status) => status.silence(),
        }
    }

    /// Why changes are not being received, if they are not.
    pub fn problem(&self) -> Option<Arc<str>> {
        match self {
            RegistryStatus::Etcd(status) => status.problem(),
            RegistryStatus::Dns(status) | RegistryStatus::Kubernetes(status) => status.problem(),
        }
    }
}
