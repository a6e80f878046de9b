//! Arguments, run, exit status: 0 done, 1 failed, 2 wrong usage; the agent's is that of its command.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match clearcoat::cli::Cli::parse().run() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
