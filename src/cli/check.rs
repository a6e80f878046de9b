//! `clearcoat check`: what would `serve` do with this configuration?

use std::io::Write;

use super::ConfigFile;

/// Validate the configuration and print the effective one, with every default and variable
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  clearcoat check --config /etc/clearcoat/clearcoat.toml && systemctl reload clearcoat"
)]
pub(super) struct CheckCommand {
    #[command(flatten)]
    file: ConfigFile,
}

impl CheckCommand {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = self.file.load()?;
        // A certificate that cannot be used is as wrong as a key that cannot be read.
        crate::app::listeners::load_certificates(&config.edge)?;
        let effective = config.to_toml()?;
        std::io::stdout().write_all(effective.as_bytes())?;
        Ok(())
    }
}
