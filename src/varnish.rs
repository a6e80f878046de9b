//! How one Varnish is told to drop pages, and what of the fleet it has to know.
//!
//! [`http`] has the `PURGE` requests that Magento's own VCL understands, [`vcl`] the VCL itself, and [`management`] the port
//! at which a running varnishd takes another one and says how it is, in texts that [`cli_text`] reads. [`fleet_vcl`] is the VCL for the
//! fleet of a moment, of ours or of a shop's own ([`own_template`]), for the addresses that [`origin_names`] looks up.

pub mod cli_text;
pub mod fleet_vcl;
pub mod http;
pub mod management;
pub mod origin_names;
pub mod own_template;
pub mod vcl;
