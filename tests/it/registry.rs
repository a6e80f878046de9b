//! Nodes that register in a real etcd: what of them is in the fleet, whatever happens to etcd.

mod faults;
mod leaving;
mod many;
mod records;
mod rig;
