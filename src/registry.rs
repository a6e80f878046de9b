//! Where nodes come from: a stream of [`crate::fleet::Event`]s.
//!
//! A module a source: [`fixed`], the nodes of the configuration file, [`etcd`], where nodes register themselves, and
//! [`dns`], the records of names.

pub mod dns;
pub mod etcd;
pub mod fixed;
mod resolve;

use std::sync::Arc;
use std::time::Duration;

use crate::etcd::follow::Link;
use crate::fleet::NodeSource;

/// How a registry beside the configuration is followed, for those who look at it.
#[derive(Clone, Debug)]
pub enum Following {
    /// Nodes are in etcd.
    Etcd(Arc<Link>),
    /// Nodes are records of names.
    Dns(Arc<dns::Standing>),
}

impl Following {
    /// Whose word its nodes are.
    pub fn source(&self) -> NodeSource {
        match self {
            Following::Etcd(_) => NodeSource::Etcd,
            Following::Dns(_) => NodeSource::Dns,
        }
    }

    /// Whether changes come in.
    pub fn is_connected(&self) -> bool {
        match self {
            Following::Etcd(link) => link.is_connected(),
            Following::Dns(standing) => standing.is_connected(),
        }
    }

    /// The revision of etcd up to which every change is known.
    pub fn revision(&self) -> Option<i64> {
        match self {
            Following::Etcd(link) => Some(link.revision()),
            Following::Dns(_) => None,
        }
    }

    /// How long ago it last answered.
    pub fn silence(&self) -> Duration {
        match self {
            Following::Etcd(link) => link.silence(),
            Following::Dns(standing) => standing.silence(),
        }
    }

    /// Why changes do not come in; empty where they do.
    pub fn problem(&self) -> Arc<str> {
        match self {
            Following::Etcd(link) => link.problem(),
            Following::Dns(standing) => standing.problem(),
        }
    }
}
