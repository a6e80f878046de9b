//! The HTTP/1.1 data path: the real program between raw clients and scripted fake nodes.

mod access_log;
mod bodies;
mod bypass;
mod choice;
mod corpus;
mod drain;
mod edge_rules;
mod ejection;
mod failures;
mod files;
mod heads;
mod http2;
mod ipv6;
mod leaving;
mod limits;
mod mixture;
mod proxy_protocol;
mod reload;
mod reuse;
pub mod rig;
mod strict;
mod timeouts;
mod tls;
mod torture;
mod under_way;
mod upgrade;
mod waiting;
