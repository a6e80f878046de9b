//! The agent beside its node, against a real etcd.

mod access;
mod ending;
mod fleet;
mod keeping;
mod life;
mod origins;
mod registering;
