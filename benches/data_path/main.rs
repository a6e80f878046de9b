//! Compares the cost of a request on the data path with HAProxy and nginx, in one run.
//!
//! The comparison is of the proxy's CPU time per request. Requests per second would also depend on the load generator
//! and on other processes; CPU time is nearly independent of them. Absolute times do not carry over to another machine,
//! ratios do: so everything is measured in one place and in alternating rounds.
//!
//! How to read and run it: `docs/benchmarks.md`. The tour: [`namespace`] isolates the run, [`scenarios`] defines the
//! measurements, [`peers`] starts the proxies in front of [`origin`], [`rounds`] applies [`load`] to each in turn while
//! [`measure`] reads the counters, [`report`] writes the results.

mod calls;
mod certificate;
mod load;
mod measure;
mod messages;
mod namespace;
mod origin;
mod peers;
mod report;
mod rounds;
mod scenarios;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::Parser;

use calls::CallCounter;
use certificate::Certificate;
use namespace::Place;
use peers::{Kind, Peer};
use report::{Machine, Report};
use rounds::Effort;
use scenarios::{Scenario, Subject};

/// The time of a round beside its measured seconds: warm-up, and the bench's own overhead.
const ROUND_OVERHEAD: f64 = 1.5;
/// The time of a scenario beside its rounds, in seconds: its peers start and stop, and their calls are counted.
const SCENARIO_OVERHEAD: f64 = 25.0;
/// Descriptors that are neither a connection of the idle scenario nor its other end.
const SPARE_DESCRIPTORS: u64 = 1_000;

/// The data path against HAProxy and nginx.
#[derive(Debug, Parser)]
#[command(name = "data_path")]
struct Args {
    /// A few short rounds of each plain HTTP/1.1 scenario
    #[arg(long)]
    quick: bool,
    /// Only this scenario; may be given again
    #[arg(long, value_name = "NAME")]
    scenario: Vec<String>,
    /// How often each peer takes its turn [default: 5; quick: 2]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// The measured part of a turn [default: 3; quick: 1]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Only these peers
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    peers: Vec<String>,
    /// Another build of clearcoat as a further peer; may be given again
    #[arg(long, value_name = "[NAME=]BINARY")]
    clearcoat: Vec<String>,
    /// Cargo passes this to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the bench. Returns whether every scenario succeeded.
fn run(args: &Args) -> anyhow::Result<bool> {
    let (effort, scenarios, peers) = (args.effort()?, args.scenarios()?, args.peers()?);
    let cores = namespace::cores()?;
    if let Place::Outside(status) = namespace::enter(limit(effort, &scenarios, &peers))? {
        return Ok(status.success());
    }
    if let Err(error) = namespace::raise_priority() {
        eprintln!("at everybody's priority ({error}): whatever else runs on this machine disturbs the figures");
    }
    let counts_calls = match CallCounter::try_out() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("system calls are not counted: {error:#}");
            false
        }
    };
    let descriptors = namespace::raise_descriptor_limit()?;
    let folder = tempfile::tempdir()?;
    let certificate = Certificate::create(folder.path())?;
    let mut report = Report::new(Machine::describe(&peers, cores)?, effort, &peers);
    for mut scenario in scenarios {
        if scenario.subject == Subject::IdleMemory {
            fit(&mut scenario, descriptors);
        }
        eprintln!("{}: {}", scenario.name, scenario.says);
        let result = rounds::run(&scenario, &peers, effort, counts_calls, &certificate);
        if let Err(error) = &result {
            eprintln!("{}: {error:#}", scenario.name);
        }
        report.add(&scenario, result);
    }
    println!("{}", report.markdown()?);
    let file = report.write_json(&PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench"))?;
    println!("every round: {}", file.display());
    let failures: Vec<String> = report.failures().collect();
    for failure in &failures {
        println!("FAILED {failure}");
    }
    Ok(failures.is_empty())
}

/// The time limit of the complete run.
fn limit(effort: Effort, scenarios: &[Scenario], peers: &[Peer]) -> Duration {
    let of_scenario = |scenario: &Scenario| {
        let layouts = match scenario.subject {
            Subject::Workers => 2,
            Subject::FleetSize => 4,
            Subject::Cpu | Subject::CpuOfLargeBodies | Subject::IdleMemory => 1,
        };
        let contenders = layouts * peers.iter().filter(|peer| scenario.admits(&peer.name)).count();
        SCENARIO_OVERHEAD + (contenders * effort.rounds) as f64 * (effort.seconds + ROUND_OVERHEAD)
    };
    Duration::from_secs_f64(scenarios.iter().map(of_scenario).sum())
}

/// Limits a scenario's connections to the descriptors: a proxy needs two for each, one on each side.
fn fit(scenario: &mut Scenario, descriptors: u64) {
    let most = usize::try_from(descriptors.saturating_sub(SPARE_DESCRIPTORS) / 2).unwrap_or(usize::MAX);
    if most < scenario.connections {
        eprintln!(
            "{}: {most} connections instead of {}: the limit is {descriptors} open files",
            scenario.name, scenario.connections
        );
        scenario.connections = most;
        scenario.says = "connections after one request each, as many as open files are allowed";
    }
}

impl Args {
    fn effort(&self) -> anyhow::Result<Effort> {
        let (rounds, seconds) = if self.quick { (2, 1.0) } else { (5, 3.0) };
        let effort = Effort { rounds: self.rounds.unwrap_or(rounds), seconds: self.seconds.unwrap_or(seconds) };
        ensure!(effort.rounds > 0 && effort.rounds <= 100, "--rounds must be 1 to 100");
        ensure!((0.1..=60.0).contains(&effort.seconds), "--seconds must be 0.1 to 60");
        Ok(effort)
    }

    fn scenarios(&self) -> anyhow::Result<Vec<Scenario>> {
        let wanted = |scenario: &&Scenario| match self.scenario.as_slice() {
            [] => !self.quick || scenario.is_quick(),
            names => names.iter().any(|name| name == scenario.name),
        };
        for name in &self.scenario {
            if scenarios::ALL.iter().all(|scenario| scenario.name != name) {
                bail!("no scenario {name}; there are: {}", scenarios::ALL.map(|scenario| scenario.name).join(", "));
            }
        }
        Ok(scenarios::ALL.iter().filter(wanted).copied().collect())
    }

    fn peers(&self) -> anyhow::Result<Vec<Peer>> {
        let all = Peer::all();
        if let Some(name) = self.peers.iter().find(|name| all.iter().all(|peer| peer.name != **name)) {
            bail!("no peer {name}; there are: {}", all.map(|peer| peer.name).join(", "));
        }
        let mut peers = all.to_vec();
        peers.retain(|peer| self.peers.is_empty() || self.peers.contains(&peer.name));
        for build in &self.clearcoat {
            let (name, binary) = build.split_once('=').unwrap_or((build, build));
            ensure!(peers.iter().all(|peer| peer.name != name), "two peers are called {name}");
            let binary = std::path::absolute(binary)?;
            ensure!(binary.is_file(), "{} is no file", binary.display());
            peers.push(Peer { name: name.to_owned(), kind: Kind::Clearcoat(binary) });
        }
        Ok(peers)
    }
}
