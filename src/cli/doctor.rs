//! `clearcoat doctor`: what is wrong with this fleet, and what to do about it.
//!
//! It looks where an operator would: at the configuration, at this machine, at what a running clearcoat says, and at each
//! node, as clearcoat does and from where it does. What clearcoat finds by itself while it runs (a node that is down, a
//! trial that fails) is told in its words; the rest are things that go wrong later, under load: a limit of varnishd that is
//! smaller than what is sent to it.
//!
//! Every node is asked at once, and nobody is waited for longer than a few seconds: a node that hangs is a finding. Nothing
//! is changed, and nothing is dropped ([`node`] has why).

mod finding;
mod here;
mod managed;
mod node;
mod parameters;
mod running;

use std::collections::BTreeSet;
use std::io::{IsTerminal as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{anyhow, bail};

use super::http::Endpoint;
use super::{ConfigFile, block_on, node_id};
use crate::config::{Config, RegistryKind, StaticNode};
use crate::fleet::{NodeId, NodeKey};
use finding::{DoctorReport, Finding};
use node::{NodeResult, NodeTarget};
use running::RunningClearcoat;

/// Look for what is wrong with the fleet: configuration, nodes, VCL, varnishd's parameters; each finding with what to do
#[derive(Debug, clap::Args)]
#[command(after_help = "The exit status is 1 if there is an error; with --strict also if there is a warning.\n\n\
    Examples:\n  clearcoat doctor --config /etc/clearcoat/clearcoat.toml\n  clearcoat doctor --node varnish-2 --json")]
pub(super) struct Doctor {
    #[command(flatten)]
    file: ConfigFile,
    /// Look at this node alone
    #[arg(long, value_name = "ID", value_parser = node_id)]
    node: Option<NodeId>,
    /// The admin listener of a running clearcoat [default: the first of admin.listen]
    #[arg(long, value_name = "URL", env = "CLEARCOAT_ADMIN")]
    admin: Option<Endpoint>,
    /// Fail with warnings as well
    #[arg(long)]
    strict: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let source = self.file.source();
        let config = source.load().map_err(|errors| anyhow!("{errors}\nclearcoat check tells more"))?;
        let mut findings =
            if self.node.is_some() { Vec::new() } else { here::examine(&config, source.remarks(&config)) };
        let mut nodes = 0;
        block_on(async {
            nodes = self.examine(Arc::new(config), &mut findings).await?;
            Ok(())
        })?;
        let report = DoctorReport::new(nodes, findings);
        let mut out = std::io::stdout();
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        } else {
            let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            out.write_all(report.text(colour).as_bytes())?;
        }
        Ok(if report.is_well(self.strict) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Looks at the running clearcoat and at every node. Returns the number of nodes.
    async fn examine(&self, config: Arc<Config>, findings: &mut Vec<Finding>) -> anyhow::Result<usize> {
        let admin = self.admin.clone().or_else(|| admin_of(&config));
        let running = match &admin {
            Some(admin) => RunningClearcoat::ask(admin).await,
            None => Err(anyhow!("admin.listen has no port that is known before the start: name it with --admin")),
        };
        let running = match running {
            Ok(running) => Some(running),
            Err(error) => {
                findings.push(not_running(&error, &config));
                None
            }
        };
        let targets = targets(&config, running.as_ref());
        let targets: Vec<NodeTarget> =
            targets.into_iter().filter(|target| self.node.as_ref().is_none_or(|id| target.id == *id)).collect();
        match &self.node {
            Some(id) if targets.is_empty() => bail!("there is no node {id}"),
            Some(_) => {}
            None => findings.extend(running.iter().flat_map(RunningClearcoat::findings)),
        }
        let count = targets.len();
        let looked = targets.into_iter().map(|target| {
            let config = Arc::clone(&config);
            let of = (target.role, target.id.clone());
            (of, tokio::spawn(async move { target.examine(&config).await }))
        });
        // All of them are started before the first is waited for.
        let looked: Vec<_> = looked.collect();
        let mut unmanaged = Vec::new();
        for ((role, id), task) in looked {
            let NodeResult { is_unmanaged, findings: found, .. } = task.await?;
            let is_ill = found.iter().any(Finding::is_error);
            findings.extend(found);
            unmanaged.extend(is_unmanaged.then(|| id.to_string()));
            let known = running.iter().flat_map(|running| running.nodes().iter().map(move |node| (running, node)));
            for (running, node) in known.filter(|(_, node)| (node.role, &node.id) == (role, &id)) {
                findings.extend(running.findings_of(node, is_ill));
            }
        }
        findings.extend(not_managed(&unmanaged));
        Ok(count)
    }
}

/// Every node: those of the configuration, and those that a running clearcoat knows beside them.
fn targets(config: &Config, running: Option<&RunningClearcoat>) -> Vec<NodeTarget> {
    let configured: BTreeSet<NodeKey> = config.nodes.iter().map(|node| (node.role, node.id.clone())).collect();
    let registered = running.iter().flat_map(|running| running.nodes());
    let registered = registered.filter(|node| !configured.contains(&(node.role, node.id.clone())));
    let registered = registered.filter_map(|node| Some(NodeTarget::registered(node.spec(config)?)));
    let in_use = |wanted: &StaticNode| {
        let mut nodes = running.iter().flat_map(|running| running.nodes());
        nodes.find(|node| (node.role, &node.id) == (wanted.role, &wanted.id))?.address()
    };
    config.nodes.iter().map(|node| NodeTarget::configured(node, in_use(node), config)).chain(registered).collect()
}

/// Where the clearcoat of this configuration shows its state. `None` if its port is chosen at the start.
fn admin_of(config: &Config) -> Option<Endpoint> {
    let listen = config.admin.listen.first().filter(|address| address.port() != 0)?;
    let ip = match listen.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, listen.port())).parse().ok()
}

fn not_running(error: &anyhow::Error, config: &Config) -> Finding {
    let why = match config.registry.kind {
        RegistryKind::Static => "Trials, seals, and what clearcoat itself complains of were not looked at.",
        _ => "The nodes of the registry, trials, seals, and what clearcoat itself complains of were not looked at.",
    };
    let what = format!("no running clearcoat was asked: {error:#}");
    Finding::info("clearcoat-not-asked", what).why(why).change("start it, or name its admin listener with --admin")
}

fn not_managed(ids: &[String]) -> Option<Finding> {
    let what = format!("the management port of these is not configured: {}", ids.join(", "));
    let finding = Finding::info("management-not-configured", what)
        .why("Parameters of varnishd, bans, panics, backends and the name of the VCL were not looked at.")
        .change(
            "start varnishd with -T ADDRESS:6082 -S FILE, and set management_port = 6082 and management_secret_file in \
             [health.varnish], or management and management_secret_file in a [[node]] (docs/doctor.md)",
        );
    (!ids.is_empty()).then_some(finding)
}
