//! The integration tests: one binary (linked once instead of twelve times), against the real program, real varnishd and
//! real sockets.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed, which is what it is for")]
#![allow(unreachable_pub, reason = "`support` is written like a library, for the modules beside it")]

mod admin;
mod agent;
mod attribution;
mod consistency;
mod data_path;
mod dns;
mod doctor;
mod drain;
mod etcd_faults;
mod etcd_harness;
mod examples;
mod exercise;
mod failover;
mod fan_out;
mod fault_kinds;
mod forms;
mod guard;
mod inherited;
mod journal;
mod kubernetes;
mod kubernetes_manifests;
mod logging;
#[cfg(feature = "mutants")]
mod mutants;
mod odd_purges;
mod openapi;
mod other_vcls;
mod overload;
mod patterns;
mod peers;
mod prometheus;
mod purging;
mod quick_start;
mod refusals;
mod refused_urls;
mod registry;
mod reload;
mod replay;
mod replicas;
mod replicas_agree;
mod rolling_restart;
mod seal;
mod seal_attacks;
mod seal_ceases;
mod seal_of_several;
mod second_start;
mod slow_start;
mod status_page;
mod storm;
mod supervision;
mod support;
mod through_another;
mod traces;
mod under_way;
mod vcl_push;
