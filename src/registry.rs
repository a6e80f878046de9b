//! Where nodes come from: a stream of [`crate::fleet::Event`]s.
//!
//! A module a source. There is one so far: [`fixed`], the nodes of the configuration file.

pub mod fixed;
mod resolve;
