//! The HTTP/1.1 data path: the real program between raw clients and fake nodes that do what a test says.

mod bodies;
mod drain;
mod failures;
mod heads;
mod http2;
mod leaving;
mod mixture;
mod reuse;
mod rig;
mod strict;
mod tls;
mod waiting;
