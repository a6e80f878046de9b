//! The agent beside its node, against a real etcd.

mod access;
mod ending;
mod keeping;
mod life;
mod registering;
