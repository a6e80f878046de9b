//! The HTTP/1.1 data path: the real program between raw clients and fake nodes that do what a test says.

mod bodies;
mod bypass;
mod corpus;
mod drain;
mod failures;
mod heads;
mod http2;
mod leaving;
mod limits;
mod mixture;
mod proxy_protocol;
mod reuse;
mod rig;
mod strict;
mod tls;
mod torture;
mod upgrade;
mod waiting;
