//! clearcoat: one container in front of a Varnish fleet that balances its traffic, and the one purge endpoint that a
//! Magento 2 shop needs. After a purge is answered, no reader behind clearcoat sees the old page.
//!
//! # The tour
//!
//! A client's GET arrives at [`edge`], which picks a Varnish that is up and *current*; the Varnish fetches what it
//! does not have from [`origin`], which picks a web node. Both share one data path, [`proxy`], over the HTTP/1.1 of
//! [`http1`] and the connections of [`upstream`].
//!
//! Magento's PURGE arrives at [`purge_api`], is parsed by [`purge`], made durable by [`journal`], and sent to every
//! Varnish by its task in [`delivery`], in the protocol of [`varnish`]. When all nodes have it, or `ack_timeout` is
//! over, [`fleet::Fence`] rises and the answer is sent: a node behind the fence gets no traffic until it has caught up.
//!
//! [`vcl_push`] gives each Varnish its VCL, if it is told to.
//!
//! [`registry`] and [`probe`] report the state of the fleet as events; [`fleet_keeper`] alone turns them into the
//! snapshot that all others read. [`agent`] runs beside a node, on its own machine, and registers it.
//!
//! # Layers
//!
//! Imports go downwards only; `tests/layers.rs` enforces it.
//!
//! | layer | modules | may use |
//! | --- | --- | --- |
//! | commands | [`cli`] | everything below |
//! | wiring | [`app`] | everything below |
//! | services | [`edge`] [`origin`] [`proxy`] [`purge_api`] [`admin`] [`delivery`] [`replicas`] [`fleet_keeper`] [`slow_start`] [`trial`] [`http_server`] [`agent`] [`vcl_push`] | everything below, and few named neighbours |
//! | edges to the world | [`registry`] [`journal`] [`etcd`] [`varnish`] [`upstream`] [`probe`] [`http_client`] [`otlp`] [`tls`] | below; of each other only [`etcd`] and [`http_client`] |
//! | base | [`atomic_file`] [`awaited`] [`config`] [`telemetry`] [`shutdown`] [`service_manager`] [`inherited`] [`files`] [`clock`] | pure; of each other only [`telemetry`] |
//! | pure | [`fleet`] [`balance`] [`purge`] [`seal`] [`attribution`] [`http1`] [`esi`] [`proxy_protocol`] [`backoff`] [`mutants`] | no runtime, no socket, no clock, no global randomness |
//!
//! # What is public
//!
//! This is a program, not a library: `main.rs` needs [`cli`] alone, and nothing here is a stable interface. Modules are
//! public all the same: `cargo doc` then shows the whole tour, and the integration tests and the benchmarks are
//! separate crates. Those use [`balance`], [`fleet`], [`http1`], [`http_server`], [`purge`], [`purge_api`], [`shutdown`],
//! [`telemetry`] and [`varnish`]; in the other modules `pub` is for this crate alone.

pub mod admin;
pub mod agent;
pub mod app;
pub mod atomic_file;
pub mod attribution;
pub mod awaited;
pub mod backoff;
pub mod balance;
pub mod cli;
pub mod clock;
pub mod config;
pub mod delivery;
pub mod edge;
pub mod esi;
pub mod etcd;
pub mod files;
pub mod fleet;
pub mod fleet_keeper;
pub mod http1;
pub mod http_client;
pub mod http_server;
pub mod inherited;
pub mod journal;
pub mod mutants;
pub mod origin;
pub mod otlp;
pub mod probe;
pub mod proxy;
pub mod proxy_protocol;
pub mod purge;
pub mod purge_api;
pub mod registry;
pub mod replicas;
pub mod seal;
pub mod service_manager;
pub mod shutdown;
pub mod slow_start;
pub mod telemetry;
pub mod tls;
pub mod trial;
pub mod upstream;
pub mod varnish;
pub mod vcl_push;
