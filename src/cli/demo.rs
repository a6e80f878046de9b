//! `clearcoat demo`: a whole fleet on this machine, ready to look at.
//!
//! Two small web nodes with a few product pages, three real varnishd with our VCL, and clearcoat in front, exactly as
//! `clearcoat serve` runs it. Everything lives in one temporary folder and ends with the process.

mod shop;
mod varnishd;

use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::serve::{ServeSignals, control_runtime};
use crate::app::{Addresses, App};
use crate::config::{Config, StaticNode};
use crate::fleet::{NodeId, PurgeDialect, Role, SecretHeaders, SendProxy};
use crate::http_server;
use crate::inherited::InheritedSockets;
use crate::shutdown::{self, Shutdown, Stage};
use crate::telemetry::log;
use crate::varnish::vcl;
use shop::{Shop, WebNode};
use varnishd::Varnishd;

const WEB_NODES: usize = 2;
const VARNISH_NODES: usize = 3;

/// The most connections to a web node of the demo at once.
const MAX_CONNECTIONS: usize = 2048;

/// The largest request that a web node of the demo takes, in bytes.
const MAX_REQUEST: usize = 64 * 1024;

/// A whole fleet on this machine (real varnishd), Ctrl-C to end.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  clearcoat demo\n\nNeeds varnishd (Debian: apt-get install varnish).")]
pub(super) struct Demo {
    /// Say what every part does.
    #[arg(long)]
    verbose: bool,
}

impl Demo {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let level = if self.verbose { LevelFilter::INFO } else { LevelFilter::WARN };
        log::start(&Targets::new().with_target("clearcoat", level), false);
        control_runtime()?.block_on(run())
    }
}

async fn run() -> anyhow::Result<()> {
    let mut signals = ServeSignals::new()?;
    let folder = tempfile::Builder::new().prefix("clearcoat-demo-").tempdir().context("a temporary folder")?;
    let (web_handle, web_shutdown) = shutdown::channel();
    let mut web_servers = JoinSet::new();

    let mut config = demo_config(folder.path());
    config.nodes = start_web_nodes(&mut web_servers, &web_shutdown).await?;
    // The VCL names the origin listener, and clearcoat's configuration names the Varnish nodes: so the port of the
    // origin is chosen first.
    let origin = free_port(8081)?;
    config.origin.listen = vec![origin];
    let varnish = tokio::select! {
        varnish = start_varnish(folder.path(), origin) => varnish?,
        signal = signals.ended(no_reload, || {}) => anyhow::bail!("ended by {signal} before the fleet was up"),
    };
    config
        .nodes
        .extend(varnish.iter().enumerate().map(|(index, varnish)| node(Role::Varnish, index, varnish.address())));

    let app = App::start(&config, InheritedSockets::default()).await?;
    app.opened().await;
    let program = std::env::args().next().unwrap_or_else(|| "clearcoat".into());
    println!("{}", what_to_try(app.addresses(), &program, varnish.last().and_then(Varnishd::group)));

    signals.ended(no_reload, || {}).await;
    println!("\nending the fleet …");
    let next_signal = async || {
        signals.ended(no_reload, || {}).await;
    };
    app.stop(next_signal).await;
    for varnish in varnish {
        varnish.stop().await;
    }
    web_handle.advance(Stage::Stopping);
    while web_servers.join_next().await.is_some() {}
    folder.close().context("removing the temporary folder")
}

/// SIGHUP is logged and otherwise ignored, because the demo has no configuration file to reload.
fn no_reload() {
    tracing::warn!("SIGHUP: the demo has no configuration to reload");
}

/// The defaults, on loopback, with a journal of its own and checks quick enough to watch.
fn demo_config(folder: &Path) -> Config {
    let mut config = Config::default();
    // If the usual port is taken, any other will do.
    let listen = |port| vec![free_port(port).unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))];
    config.edge.listen = listen(8080);
    config.purge.listen = listen(6081);
    config.admin.listen = listen(9180);
    config.journal.path = folder.join("journal");
    config.health.web.interval = Duration::from_secs(2);
    config
}

/// This port on loopback if it is free, any free one otherwise.
fn free_port(wanted: u16) -> std::io::Result<SocketAddr> {
    let bind = |port| StdListener::bind((Ipv4Addr::LOCALHOST, port));
    bind(wanted).or_else(|_| bind(0))?.local_addr()
}

fn node(role: Role, index: usize, address: SocketAddr) -> StaticNode {
    let id = NodeId::try_from(format!("{role}-{}", index + 1)).expect("a role and a number are a node id");
    StaticNode {
        role,
        id,
        address: address.to_string(),
        weight: 1,
        zone: None,
        delivery: None,
        header_limit: None,
        send_proxy: SendProxy::Off,
        headers: SecretHeaders::default(),
        management: None,
        management_secret_file: None,
    }
}

async fn start_web_nodes(servers: &mut JoinSet<()>, shutdown: &Shutdown) -> anyhow::Result<Vec<StaticNode>> {
    let shop = Arc::new(Shop::default());
    let mut nodes = Vec::new();
    for index in 0..WEB_NODES {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let node = node(Role::Web, index, listener.local_addr()?);
        let handler = Arc::new(WebNode::new(node.id.as_str(), Arc::clone(&shop)));
        servers.spawn(http_server::serve(listener, handler, MAX_CONNECTIONS, MAX_REQUEST, shutdown.clone()));
        nodes.push(node);
    }
    Ok(nodes)
}

async fn start_varnish(folder: &Path, origin: SocketAddr) -> anyhow::Result<Vec<Varnishd>> {
    let allow = ["127.0.0.0/8".parse().context("the loopback network")?];
    let text = vcl::render(vcl::VarnishVersion::Seven, PurgeDialect::Magento, &[origin.into()], &allow)?;
    let file = folder.join("clearcoat.vcl");
    std::fs::write(&file, text).with_context(|| file.display().to_string())?;
    let mut started = Vec::new();
    for index in 0..VARNISH_NODES {
        started.push(Varnishd::start(&folder.join(format!("varnish-{}", index + 1)), &file)?);
    }
    for varnish in &mut started {
        varnish.ready().await?;
    }
    Ok(started)
}

/// `group`: the process group of the last Varnish.
fn what_to_try(addresses: &Addresses, program: &str, group: Option<u32>) -> String {
    let first = |addresses: &[SocketAddr]| addresses.first().map(ToString::to_string).unwrap_or_default();
    let (edge, purge, admin) = (first(&addresses.edge), first(&addresses.purge), first(&addresses.admin));
    let endpoint = if purge.ends_with(":6081") { String::new() } else { format!(" --endpoint http://{purge}") };
    let admin_option = if admin.ends_with(":9180") { String::new() } else { format!(" --admin http://{admin}") };
    let hang = group.map_or_else(String::new, |group| {
        format!(
            "\
Let a Varnish hang, purge, and let it go on: the purge does not wait for it, and no old page of it is seen.

  kill -s STOP -- -{group}
  {program} purge{endpoint} --tag cat_p_1
  kill -s CONT -- -{group}
"
        )
    });
    format!(
        "\
A shop with {WEB_NODES} web nodes and {VARNISH_NODES} Varnish, and clearcoat in front:

  status   http://{admin}/            (open this first; /metrics and /api/v1/fleet are there, too)
  shop     http://{edge}/
  purges   http://{purge}/            (what Magento has in http_cache_hosts)

Try, in another terminal:

  curl -si http://{edge}/product/1.html | grep -E 'Cache-Debug|Price|Rendered'   # MISS
  curl -si http://{edge}/product/1.html | grep -E 'Cache-Debug|Price|Rendered'   # HIT, the same page
  curl -s -X POST http://{edge}/product/1/price/19.90                            # the shop changes, the cache does not know
  {program} purge{endpoint} --tag cat_p_1
  curl -si http://{edge}/product/1.html | grep -E 'Cache-Debug|Price|Rendered'   # MISS, the new price
  {program} status{admin_option}

{hang}
Ctrl-C ends everything and leaves nothing behind."
    )
}
