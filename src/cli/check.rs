//! `clearcoat check`: what would `serve` do with this configuration?

use std::io::Write;

use super::ConfigFile;

/// Validate the configuration and print the effective one, with every default and variable
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  clearcoat check --config /etc/clearcoat/clearcoat.toml && systemctl reload clearcoat"
)]
pub(super) struct Check {
    #[command(flatten)]
    file: ConfigFile,
}

impl Check {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let effective = self.file.load()?.to_toml()?;
        std::io::stdout().write_all(effective.as_bytes())?;
        Ok(())
    }
}
