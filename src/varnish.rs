//! How one Varnish is told to drop pages, and what of the fleet it has to know.
//!
//! [`http`] has the `PURGE` requests that Magento's own VCL understands, [`vcl`] the VCL itself, and [`management`] the port
//! at which a running varnishd takes another one and says how it is, in texts that [`cli_text`] reads.

pub mod cli_text;
pub mod http;
pub mod management;
pub mod vcl;
