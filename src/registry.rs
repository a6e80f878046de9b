//! Where nodes come from: a stream of [`crate::fleet::Event`]s.
//!
//! A module a source: [`fixed`], the nodes of the configuration file, and [`etcd`], where nodes register themselves.

pub mod etcd;
pub mod fixed;
mod resolve;
