//! clearcoat (stub while the house is being built)
pub mod balance;
pub mod cli;
pub mod config;
pub mod fleet;
pub mod purge;
