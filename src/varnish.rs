//! How one Varnish is told to drop pages.
//!
//! A module a way of telling. There is one so far: [`http`], the `PURGE` requests that Magento's own VCL understands.

pub mod http;
pub mod vcl;
