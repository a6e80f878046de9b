//! clearcoat (stub while the house is being built)
pub mod fleet;
pub mod journal;
pub mod purge;
