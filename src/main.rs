//! Arguments, run, exit status: 0 done, 1 failed, 2 wrong usage (clap's own).

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match clearcoat::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
