//! `clearcoat completions`: what a shell needs to complete commands, options and their words.
//!
//! Made from the definition of the command line, so it cannot be of another version than the program. The Debian package
//! has them installed already (`deploy/build-deb.sh`).

use std::io::Write as _;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Cli;

/// Print the completions for a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  clearcoat completions bash > /etc/bash_completion.d/clearcoat\n  \
                        source <(clearcoat completions bash)")]
pub(super) struct Completions {
    /// Which shell they are for
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        // By way of memory, because the generator takes a writer that fails for a mistake of its caller.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "clearcoat", &mut script);
        std::io::stdout().write_all(&script)?;
        Ok(())
    }
}
