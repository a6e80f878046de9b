//! `clearcoat check`: what would `serve` do with this configuration?
//!
//! It ends with a verdict in one line, last, where one looks first.

use std::io::Write;

use anyhow::anyhow;

use super::ConfigFile;
use crate::config::{Config, RegistryKind};
use crate::fleet::Role;

/// Validate the configuration: every error with its file, line and column, then a verdict
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  clearcoat check --config /etc/clearcoat/clearcoat.toml && systemctl reload clearcoat\n  \
                  clearcoat check --show"
)]
pub(super) struct CheckCommand {
    #[command(flatten)]
    file: ConfigFile,
    /// Print the effective configuration, with every default and variable; secrets stay hidden
    #[arg(long)]
    show: bool,
}

impl CheckCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let source = self.file.source();
        let name =
            source.file().map_or_else(|| "the default configuration".to_owned(), |file| file.display().to_string());
        let config = source.load().map_err(|errors| {
            let count = errors.iter().count();
            let errors_are = if count == 1 { "1 error".to_owned() } else { format!("{count} errors") };
            anyhow!("{errors}\n{name} is not valid: {errors_are}")
        })?;
        // A certificate that cannot be used is as wrong as a key that cannot be read.
        crate::app::listeners::load_certificates(&config.edge)
            .map_err(|error| anyhow!("{name}: {error:#}\n{name} is not valid: 1 error"))?;
        let mut out = std::io::stdout();
        if self.show {
            out.write_all(config.to_toml()?.as_bytes())?;
        }
        for remark in source.remarks(&config) {
            eprintln!("warning: {remark}");
        }
        // With --show the output is TOML.
        let comment = if self.show { "# " } else { "" };
        writeln!(out, "{comment}{name} is valid: {}", nodes_of(&config))?;
        Ok(())
    }
}

/// How many nodes there are, and where more come from.
fn nodes_of(config: &Config) -> String {
    let count = |role| config.nodes.iter().filter(|node| node.role == role).count();
    let (varnish, web) = (count(Role::Varnish), count(Role::Web));
    let web = if web == 1 { "1 web node".to_owned() } else { format!("{web} web nodes") };
    let more = match config.registry.kind {
        RegistryKind::Static => "",
        RegistryKind::Etcd => ", and those in etcd",
        RegistryKind::Dns => ", and those of DNS",
        RegistryKind::Kubernetes => ", and those of Kubernetes",
    };
    format!("{varnish} Varnish, {web}{more}")
}
