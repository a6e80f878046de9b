//! clearcoat (stub while the house is being built)
pub mod balance;
pub mod cli;
pub mod config;
pub mod edge;
pub mod fleet;
pub mod http1;
pub mod journal;
pub mod origin;
pub mod proxy;
pub mod purge;
pub mod shutdown;
pub mod telemetry;
pub mod upstream;
pub mod varnish;
