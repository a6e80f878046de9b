//! The integration tests: one binary (linking once costs less than twelve times), against the real program, real
//! varnishd and real sockets.

#![allow(unreachable_pub, reason = "`support` is written like a library, for the modules beside it")]

mod purging;
mod support;
