//! Two clearcoats that have everything in an etcd of three members: their fleet, their journal, and each other. What
//! breaks is etcd, or the way to it. All the time there are purges through both and readers behind both.
//!
//! `CLEARCOAT_OUTAGE_SECONDS` makes every outage longer.

mod history;
mod limits;
mod members;
mod rig;
mod ways;
