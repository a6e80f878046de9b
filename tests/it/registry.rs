//! Nodes registered in a real etcd: which are in the fleet, whatever happens to etcd.

mod faults;
mod leaving;
mod many;
mod records;
mod rig;
