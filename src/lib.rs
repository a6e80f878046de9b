//! clearcoat (stub while the house is being built)
pub mod balance;
pub mod fleet;
pub mod http1;
pub mod proxy;
pub mod purge;
pub mod shutdown;
pub mod telemetry;
pub mod upstream;
