//! clearcoat (stub while the house is being built)
pub mod balance;
pub mod fleet;
pub mod http1;
pub mod purge;
