//! The command line: one file for each command.
//!
//! Clap checks every argument before a command starts, including those that need a parser (a tag that is not literal, a
//! URL of the wrong kind). So wrong usage always exits with 2, and a failed command with 1. The agent checks
//! combinations of its flags itself, and exits with the status of the command that it ran.

mod agent;
mod check;
mod completions;
mod demo;
mod doctor;
mod http;
mod man;
mod node;
mod purge;
mod serve;
mod status;
mod vcl;

use std::future::Future;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::fleet::NodeId;

/// A proxy in front of a Varnish fleet: balances its traffic and fans out every Magento purge.
#[derive(Debug, Parser)]
#[command(name = "clearcoat", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    Serve(serve::Serve),
    Demo(demo::Demo),
    Check(check::CheckCommand),
    Doctor(Box<doctor::Doctor>),
    Agent(Box<agent::Agent>),
    Purge(Box<purge::PurgeCommand>),
    Status(status::Status),
    Node(node::NodeCommand),
    Vcl(vcl::Vcl),
    Completions(completions::Completions),
    Man(man::ManPages),
    /// What `serve` starts for itself, to write the journal's files.
    #[command(name = crate::journal::FILES_COMMAND, hide = true, after_help = "Example:\n  none: clearcoat serve runs it")]
    JournalFiles,
}

/// Where the configuration is.
#[derive(Debug, clap::Args)]
struct ConfigFile {
    /// The configuration file [default: $CLEARCOAT_CONFIG, or clearcoat.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigFile {
    fn source(&self) -> crate::config::ConfigSource {
        // Lossy, so that a variable of ours that is not UTF-8 is refused by name, and any other is ignored.
        let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        let env = std::env::vars_os().map(|(name, value)| (text(name), text(value)));
        crate::config::ConfigSource::new(self.config.clone(), env)
    }
}

impl Cli {
    /// Runs the command to its end, and returns the exit status.
    ///
    /// # Errors
    /// If the command fails, in words for the terminal; the exit status is 1.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            CliCommand::Serve(serve) => serve.run()?,
            CliCommand::Demo(demo) => demo.run()?,
            CliCommand::Check(check) => check.run()?,
            CliCommand::Doctor(doctor) => return doctor.run(),
            CliCommand::Agent(agent) => return agent.run(),
            CliCommand::Purge(purge) => block_on(purge.run())?,
            CliCommand::Status(status) => block_on(status.run())?,
            CliCommand::Node(node) => block_on(node.run())?,
            CliCommand::Vcl(vcl) => vcl.run()?,
            CliCommand::Completions(completions) => completions.run()?,
            CliCommand::Man(man) => man.run()?,
            CliCommand::JournalFiles => crate::journal::serve_files()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs a command that talks to a running clearcoat. One thread is plenty.
fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(command);
    // Dropping the runtime would wait for a DNS lookup or a file that is under way.
    runtime.shutdown_background();
    result
}

/// A node id as an argument.
fn node_id(text: &str) -> Result<NodeId, String> {
    NodeId::try_from(text).map_err(|error| error.to_string())
}

/// Replaces the control characters in text from elsewhere, so that it cannot steer the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn exit_code(arguments: &str) -> i32 {
        match Cli::try_parse_from(arguments.split(' ')) {
            Ok(_) => 0,
            Err(error) => error.exit_code(),
        }
    }

    #[test]
    fn the_definition_is_sound_and_every_command_shows_an_example() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands() {
            let example = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(example.contains("clearcoat "), "{}", command.get_name());
        }
    }

    #[test]
    fn what_makes_sense_is_accepted() {
        for good in [
            "clearcoat check --config clearcoat.toml",
            "clearcoat purge --tag cat_p_1 --tag cat_p_2 --soft",
            "clearcoat purge --pattern cat_p_[0-9]+ --endpoint http://[::1]:6081",
            "clearcoat purge --pool ^web",
            "clearcoat purge --url https://shop.example/page?a=b --json",
            "clearcoat purge --all",
            "clearcoat agent --role varnish --port 6081 --interface eth1 -- varnishd -F",
            "clearcoat doctor --config clearcoat.toml --node varnish-1 --strict --json",
            "clearcoat status --watch",
            "clearcoat status --purges --watch",
            "clearcoat status --admin http://clearcoat:9180/ --json",
            "clearcoat node drain varnish-2 --token-file /etc/clearcoat/admin-token --force",
            "clearcoat node resume 10.0.1.5:6081 --role varnish --token-file t --admin http://clearcoat:9180",
            "clearcoat node weight web-1 5 --token-file t",
            "clearcoat node weight web-1 registered --token-file t",
            "clearcoat completions bash",
            "clearcoat man /usr/local/share/man",
            "clearcoat --version",
            "clearcoat purge --help",
        ] {
            assert_eq!(exit_code(good), 0, "{good}");
        }
    }

    #[test]
    fn wrong_usage_exits_with_2() {
        for bad in [
            "clearcoat",
            "clearcoat sevre",
            "clearcoat check --confg x",
            "clearcoat purge",
            "clearcoat purge --soft",
            "clearcoat purge --all --tag cat_p_1",
            "clearcoat purge --tag cat_p_1 --pattern x",
            "clearcoat purge --tag cat_p_.*",
            "clearcoat purge --tag cat_p_1,cat_p_2",
            "clearcoat purge --tag cat_p_1(,|$))|((^|,)cat_p_2",
            "clearcoat purge --tag=",
            "clearcoat purge --pattern=",
            "clearcoat purge --url /page",
            "clearcoat purge --url ftp://shop.example/",
            "clearcoat purge --all --endpoint https://clearcoat:6081",
            "clearcoat purge --all --endpoint clearcoat:6081",
            "clearcoat purge --all --endpoint http://user@clearcoat:6081",
            "clearcoat purge --all --endpoint http://clearcoat:6081/api",
            "clearcoat status --watch --json",
            "clearcoat doctor --node a/b",
            "clearcoat node",
            "clearcoat node drain --token-file t",
            "clearcoat node drain a/b --token-file t",
            "clearcoat node resume a --force --token-file t",
            "clearcoat node weight a --token-file t",
            "clearcoat node weight a 0 --token-file t",
            "clearcoat completions",
            "clearcoat completions ksh",
            "clearcoat man",
            "clearcoat agent --role web",
            "clearcoat agent --port 80",
        ] {
            assert_eq!(exit_code(bad), 2, "{bad}");
        }
    }

    #[test]
    fn a_refusal_says_what_to_write_instead() {
        for (arguments, hint) in [
            ("clearcoat purge --tag cat_p_.*", "use --pattern"),
            ("clearcoat purge --tag a,b", "repeat --tag"),
            ("clearcoat purge --all --endpoint https://a:6081", "https is not supported"),
        ] {
            let error = Cli::try_parse_from(arguments.split(' ')).unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
    }

    #[test]
    fn text_from_elsewhere_cannot_steer_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a [2Jb c");
    }
}
