//! Two clearcoats with their fleet, journal and each other in an etcd of three members. The faults are in etcd, or the
//! link to it. Purges go through both all the time, with readers behind both.
//!
//! `CLEARCOAT_OUTAGE_SECONDS` makes every outage longer.

mod history;
mod limits;
mod members;
mod rig;
mod ways;
