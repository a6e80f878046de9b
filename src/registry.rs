//! Where nodes come from: a stream of [`crate::fleet::Event`]s.
//!
//! A module a source: [`fixed`], the nodes of the configuration file, and [`dns`], the records of names.

pub mod dns;
pub mod fixed;
mod resolve;
