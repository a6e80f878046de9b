//! The results: tables for the README, and every round as JSON.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::peers::{Kind, Peer};
use crate::rounds::{Effort, Outcome, Round};
use crate::scenarios::{Scenario, Subject, Transport};

/// The machine and software of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    /// Load average over a minute when the bench began.
    load_at_start: String,
    versions: Vec<(String, String)>,
}

impl Machine {
    /// This machine, and the peers' versions.
    ///
    /// # Errors
    /// If the system does not say.
    pub(crate) fn describe(peers: &[Peer], cores: usize) -> anyhow::Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| path.to_owned());
        let cpuinfo = read("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let version = |peer: &Peer| {
            let version = peer.version().unwrap_or_else(|error| format!("{error:#}"));
            (peer.name.clone(), version)
        };
        Ok(Machine {
            cpu: model.map_or("unknown", |(_, model)| model.trim()).to_owned(),
            cores,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load_at_start: read("/proc/loadavg")?.split(' ').next().unwrap_or_default().to_owned(),
            versions: peers.iter().filter(|peer| peer.kind != Kind::Haproxy { splice: true }).map(version).collect(),
        })
    }
}

/// All results of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    effort: Effort,
    outcomes: Vec<Outcome>,
    #[serde(skip)]
    scenarios: Vec<Scenario>,
    #[serde(skip)]
    peers: Vec<Peer>,
    /// Failed scenarios, with the reason.
    failures: Vec<(&'static str, String)>,
}

/// Median and extremes.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of<'r>(rounds: impl Iterator<Item = &'r Round>, value: impl Fn(&Round) -> f64) -> Option<Self> {
        let mut values: Vec<f64> = rounds.map(value).collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Spread { median: f64::midpoint(low, high), least, most })
    }
}

impl Report {
    /// An empty report for these peers.
    pub(crate) fn new(machine: Machine, effort: Effort, peers: &[Peer]) -> Self {
        let peers = peers.to_vec();
        Report { machine, effort, outcomes: Vec::new(), scenarios: Vec::new(), peers, failures: Vec::new() }
    }

    /// Records the result of a scenario.
    pub(crate) fn add(&mut self, scenario: &Scenario, result: anyhow::Result<Outcome>) {
        match result {
            Ok(outcome) => {
                // Every peer supports HTTP/1.1; TLS and HTTP/2 are not in every build.
                if scenario.transport == Transport::Plain {
                    let refused = outcome.refused.iter();
                    let failures = refused.map(|(peer, said)| (scenario.name, format!("{peer} did not start: {said}")));
                    self.failures.extend(failures);
                }
                self.scenarios.push(*scenario);
                self.outcomes.push(outcome);
            }
            Err(error) => self.failures.push((scenario.name, format!("{error:#}"))),
        }
    }

    /// The failures, one line each.
    pub(crate) fn failures(&self) -> impl Iterator<Item = String> {
        self.failures.iter().map(|(scenario, error)| format!("{scenario}: {error}"))
    }

    /// Writes every round into this folder.
    ///
    /// # Errors
    /// If they cannot be written.
    pub(crate) fn write_json(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        std::fs::create_dir_all(folder)?;
        let file = folder.join("data_path.json");
        std::fs::write(&file, serde_json::to_vec_pretty(self)?).with_context(|| file.display().to_string())?;
        Ok(file)
    }

    /// The tables.
    ///
    /// # Errors
    /// Never: writing to a text cannot fail.
    pub(crate) fn markdown(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        let results = || self.scenarios.iter().zip(&self.outcomes);
        let of = |wanted: fn(Subject) -> bool| results().filter(move |(scenario, _)| wanted(scenario.subject));
        let is_cpu = |subject| matches!(subject, Subject::Cpu | Subject::CpuOfLargeBodies);
        if of(is_cpu).next().is_some() {
            self.cpu_table(&mut out, of(is_cpu))?;
            details(&mut out, of(is_cpu))?;
        }
        for (scenario, outcome) in of(|subject| subject == Subject::IdleMemory) {
            memory_table(&mut out, scenario, outcome)?;
        }
        for (scenario, outcome) in of(|subject| subject == Subject::Workers) {
            workers_table(&mut out, scenario, outcome)?;
        }
        for (scenario, outcome) in of(|subject| subject == Subject::FleetSize) {
            self.fleet_table(&mut out, scenario, outcome)?;
        }
        for (name, outcome) in results().map(|(scenario, outcome)| (scenario.name, outcome)) {
            for (peer, said) in &outcome.refused {
                writeln!(out, "`{name}` of {peer}: not available: {}\n", said.replace('\n', " / "))?;
            }
        }
        self.machine_facts(&mut out)?;
        Ok(out)
    }

    fn cpu_table<'r>(
        &self,
        out: &mut String,
        results: impl Iterator<Item = (&'r Scenario, &'r Outcome)>,
    ) -> std::fmt::Result {
        writeln!(
            out,
            "CPU time of the proxy per request in µs (and as a ratio to HAProxy; for `1m`, to HAProxy with splice)\n"
        )?;
        let has_figures =
            |peer: &&Peer| self.outcomes.iter().any(|outcome| outcome.peers().contains(&peer.name.as_str()));
        let names = || self.peers.iter().filter(has_figures).map(|peer| peer.name.as_str());
        writeln!(out, "| scenario | {} |", names().collect::<Vec<_>>().join(" | "))?;
        writeln!(out, "| --- |{}", " ---: |".repeat(names().count()))?;
        for (scenario, outcome) in results {
            write!(out, "| `{}`: {} |", scenario.name, scenario.says)?;
            let cpu = |peer| Spread::of(outcome.rounds_of(peer), |round| round.cpu).map(|spread| spread.median);
            let baseline = cpu(scenario.baseline());
            for name in names() {
                match (cpu(name), baseline) {
                    (Some(cpu), Some(baseline)) => write!(out, " {cpu:.1} ({:.2}) |", cpu / baseline)?,
                    (Some(cpu), None) => write!(out, " {cpu:.1} |")?,
                    (None, _) => write!(out, " - |")?,
                }
            }
            out.push('\n');
        }
        out.push('\n');
        Ok(())
    }

    fn fleet_table(&self, out: &mut String, scenario: &Scenario, outcome: &Outcome) -> std::fmt::Result {
        writeln!(out, "CPU time per request in µs, `{}`: {}\n", scenario.name, scenario.says)?;
        writeln!(out, "| peer | CPU µs (least to most) | to that of its smallest fleet | p99 µs |")?;
        writeln!(out, "| --- |{}", " ---: |".repeat(3))?;
        for peer in &self.peers {
            let sizes = outcome.peers().into_iter().filter(|name| name.starts_with(&format!("{} of ", peer.name)));
            let mut smallest = None;
            for name in sizes {
                let spread = |value: fn(&Round) -> f64| Spread::of(outcome.rounds_of(name), value);
                let (Some(cpu), Some(p99)) = (spread(|round| round.cpu), spread(|round| round.p99)) else { continue };
                let ratio = cpu.median / *smallest.get_or_insert(cpu.median);
                let Spread { median, least, most } = cpu;
                writeln!(out, "| {name} | {median:.1} ({least:.1} to {most:.1}) | {ratio:.2} | {:.0} |", p99.median)?;
            }
        }
        out.push('\n');
        Ok(())
    }

    fn machine_facts(&self, out: &mut String) -> std::fmt::Result {
        let Machine { cpu, cores, kernel, load_at_start, versions } = &self.machine;
        let Effort { rounds, seconds } = self.effort;
        writeln!(
            out,
            "{rounds} rounds of {seconds} s, medians. {cpu}, {cores} cores, Linux {kernel}, load {load_at_start} before."
        )?;
        for (name, version) in versions {
            writeln!(out, "{name}: {version}")?;
        }
        Ok(())
    }
}

impl Outcome {
    fn rounds_of(&self, peer: &str) -> impl Iterator<Item = &Round> {
        self.rounds.iter().filter(move |round| round.peer == peer)
    }

    /// The measured peers, in the order of their turns.
    fn peers(&self) -> Vec<&str> {
        let mut peers = Vec::new();
        for round in &self.rounds {
            if !peers.contains(&round.peer.as_str()) {
                peers.push(round.peer.as_str());
            }
        }
        peers
    }
}

/// All details of each scenario, including those that show whether the figures can be trusted.
fn details<'r>(out: &mut String, results: impl Iterator<Item = (&'r Scenario, &'r Outcome)>) -> std::fmt::Result {
    writeln!(
        out,
        "| scenario | peer | CPU µs (least to most) | outside the kernel | calls | requests/s | p50 µs | p99 µs | p99.9 µs | core 0 busy | core 1 busy | waited for its core |"
    )?;
    writeln!(out, "| --- | --- |{}", " ---: |".repeat(10))?;
    for (scenario, outcome) in results {
        if let Some(direct) = &outcome.direct {
            row(out, scenario.name, "direct", &[direct], None)?;
        }
        for peer in outcome.peers() {
            let calls = outcome.calls.iter().find(|(name, _)| name == peer).map(|(_, calls)| *calls);
            row(out, scenario.name, peer, &outcome.rounds_of(peer).collect::<Vec<_>>(), calls)?;
        }
    }
    out.push('\n');
    Ok(())
}

fn row(out: &mut String, scenario: &str, peer: &str, rounds: &[&Round], calls: Option<f64>) -> std::fmt::Result {
    let median =
        |value: fn(&Round) -> f64| Spread::of(rounds.iter().copied(), value).map_or(f64::NAN, |spread| spread.median);
    let cpu = match Spread::of(rounds.iter().copied(), |round| round.cpu) {
        Some(cpu) if peer != "direct" => format!("{:.1} ({:.1} to {:.1})", cpu.median, cpu.least, cpu.most),
        _ => "-".to_owned(),
    };
    let of_proxy = |share: f64| if peer == "direct" { "-".to_owned() } else { percent(share) };
    let (user, waited) = (of_proxy(median(|round| round.user_share)), of_proxy(median(|round| round.waited)));
    let calls = calls.map_or_else(|| "-".to_owned(), |calls| format!("{calls:.1}"));
    let core = |index: usize| percent(median(if index == 0 { |round| round.cores[0] } else { |round| round.cores[1] }));
    writeln!(
        out,
        "| `{scenario}` | {peer} | {cpu} | {user} | {calls} | {:.0} | {:.0} | {:.0} | {:.0} | {} | {} | {waited} |",
        median(|round| round.requests_per_second),
        median(|round| round.p50),
        median(|round| round.p99),
        median(|round| round.p999),
        core(0),
        core(1),
    )
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn memory_table(out: &mut String, scenario: &Scenario, outcome: &Outcome) -> std::fmt::Result {
    writeln!(out, "Memory of the proxy, `{}`: {}\n", scenario.name, scenario.says)?;
    writeln!(out, "| peer | before KiB | with {} connections KiB | KiB per connection |", scenario.connections)?;
    writeln!(out, "| --- | ---: | ---: | ---: |")?;
    for memory in &outcome.memory {
        let grown = memory.after.saturating_sub(memory.before) as f64 / memory.connections as f64;
        writeln!(out, "| {} | {} | {} | {grown:.1} |", memory.peer, memory.before, memory.after)?;
    }
    out.push('\n');
    Ok(())
}

fn workers_table(out: &mut String, scenario: &Scenario, outcome: &Outcome) -> std::fmt::Result {
    writeln!(out, "One and two workers, `{}`: {}\n", scenario.name, scenario.says)?;
    writeln!(out, "| peer | CPU µs per request | requests per CPU second | requests/s | requests/s, two to one |")?;
    writeln!(out, "| --- |{}", " ---: |".repeat(4))?;
    let rate = |peer: &str| {
        let rate = Spread::of(outcome.rounds_of(peer), |round| round.requests_per_second);
        rate.map(|spread| spread.median)
    };
    for peer in outcome.peers() {
        let cpu = Spread::of(outcome.rounds_of(peer), |round| round.cpu).map_or(f64::NAN, |spread| spread.median);
        let (one, now) = (peer.strip_suffix(" x2").map(|name| rate(&format!("{name} x1"))), rate(peer));
        let ratio = match (one.flatten(), now) {
            (Some(one), Some(two)) => format!("{:.2}", two / one),
            _ => "-".to_owned(),
        };
        let now = now.unwrap_or(f64::NAN);
        writeln!(out, "| {peer} | {cpu:.1} | {:.0} | {now:.0} | {ratio} |", 1e6 / cpu)?;
    }
    out.push('\n');
    Ok(())
}
