//! Runs a scenario: its peers take turns, round by round, so that disturbances of the machine affect them all.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;

use crate::calls::CallCounter;
use crate::certificate::Certificate;
use crate::load::{self, Http1, Http2, Load, Plan, Sample};
use crate::measure::{self, Reading, Used};
use crate::origin::Origin;
use crate::peers::{Peer, Refused, Running, Setup};
use crate::scenarios::{Scenario, Subject, Transport};

const PROXY_CORE: usize = 0;
const LOAD_CORE: usize = 1;

/// Opens the connections and lets pools and buffers grow to their final size.
const WARM_UP: Duration = Duration::from_millis(500);
/// How long system calls are counted.
const COUNTED: Duration = Duration::from_secs(1);
/// Connections of the idle scenario that are being opened at the same time.
const OPENED_AT_ONCE: usize = 64;
/// How long a proxy may take to release unused resources.
const SETTLE: Duration = Duration::from_secs(2);

/// The number and length of rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    /// The measured part of each round, in seconds.
    pub(crate) seconds: f64,
}

/// The result of a scenario.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Outcome {
    pub(crate) scenario: &'static str,
    /// The load without a proxy, if the scenario allows it.
    pub(crate) direct: Option<Round>,
    pub(crate) rounds: Vec<Round>,
    /// System calls per request, if they can be counted.
    pub(crate) calls: Vec<(String, f64)>,
    pub(crate) memory: Vec<Memory>,
    /// Peers that did not start, and their output.
    pub(crate) refused: Vec<(String, String)>,
}

/// One peer in one round.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    pub(crate) peer: String,
    pub(crate) requests: usize,
    pub(crate) seconds: f64,
    pub(crate) requests_per_second: f64,
    /// CPU time of the proxy per request, in microseconds.
    pub(crate) cpu: f64,
    /// The share of it outside the kernel, 0 to 1.
    pub(crate) user_share: f64,
    /// How long the proxy's threads waited for their core, as a share of the round: the effect of other processes.
    pub(crate) waited: f64,
    /// Latency in microseconds, from the scheduled start of a request.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    /// The utilisation of each core, 0 to 1.
    pub(crate) cores: Vec<f64>,
}

/// Memory of a peer with idle connections.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) peer: String,
    pub(crate) connections: usize,
    /// KiB before the first connection, and with all of them.
    pub(crate) before: u64,
    pub(crate) after: u64,
}

/// The cores of the proxy, the load and the origin.
struct Layout {
    /// Appended to the name of a peer with this layout.
    suffix: &'static str,
    /// The number of Varnish nodes.
    nodes: u16,
    proxy: &'static [usize],
    load: &'static [usize],
}

impl Layout {
    const APART: Layout = Layout { suffix: "", nodes: 1, proxy: &[PROXY_CORE], load: &[LOAD_CORE] };
    /// To measure the gain of a second core: everything on one, everything on two.
    const SHARED: [Layout; 2] = [
        Layout { suffix: " x1", load: &[PROXY_CORE], ..Layout::APART },
        Layout { suffix: " x2", proxy: &[PROXY_CORE, LOAD_CORE], load: &[PROXY_CORE, LOAD_CORE], ..Layout::APART },
    ];
    /// To measure what a choice among more nodes costs.
    const FLEETS: [Layout; 4] = [
        Layout { suffix: " of 2", nodes: 2, ..Layout::APART },
        Layout { suffix: " of 30", nodes: 30, ..Layout::APART },
        Layout { suffix: " of 300", nodes: 300, ..Layout::APART },
        Layout { suffix: " of 1000", nodes: 1000, ..Layout::APART },
    ];

    fn of(subject: Subject) -> &'static [Layout] {
        match subject {
            Subject::Workers => &Layout::SHARED,
            Subject::FleetSize => &Layout::FLEETS,
            Subject::Cpu | Subject::CpuOfLargeBodies | Subject::IdleMemory => &[Layout::APART],
        }
    }
}

/// A running peer, and its load.
struct Contender {
    name: String,
    running: Running,
    load_cores: &'static [usize],
}

/// Runs a scenario with these peers.
///
/// # Errors
/// If an answer is wrong, a peer ends, or the system refuses something.
pub(crate) fn run(
    scenario: &Scenario,
    peers: &[Peer],
    effort: Effort,
    counts_calls: bool,
    certificate: &Certificate,
) -> anyhow::Result<Outcome> {
    let mut outcome = Outcome { scenario: scenario.name, ..Outcome::default() };
    let layouts = Layout::of(scenario.subject);
    let origins = layouts.iter().map(|layout| Origin::start(layout.load)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut contenders = Vec::new();
    for peer in peers.iter().filter(|peer| scenario.admits(&peer.name)) {
        for (layout, origin) in layouts.iter().zip(&origins) {
            let setup = Setup {
                origin: origin.address,
                nodes: layout.nodes,
                cores: layout.proxy,
                connections: scenario.connections,
                tls: (scenario.transport != Transport::Plain).then_some(certificate),
            };
            let name = format!("{}{}", peer.name, layout.suffix);
            match start(peer, u16::try_from(contenders.len())?, &setup)? {
                Ok(running) => contenders.push(Contender { name, running, load_cores: layout.load }),
                Err(Refused(said)) => outcome.refused.push((name, said)),
            }
        }
    }
    match scenario.subject {
        Subject::IdleMemory => {
            for contender in &contenders {
                outcome.memory.push(idle_memory(scenario, contender).with_context(|| contender.name.clone())?);
            }
        }
        Subject::Workers | Subject::FleetSize => {
            outcome.rounds = take_turns(scenario, &contenders, effort, certificate)?;
        }
        Subject::Cpu | Subject::CpuOfLargeBodies => {
            if scenario.transport == Transport::Plain {
                let mut loads = loads(scenario, origins[0].address, &[LOAD_CORE], certificate)?;
                outcome.direct = Some(round("direct", None, &mut loads, effort).context("a direct connection")?);
            }
            outcome.rounds = take_turns(scenario, &contenders, effort, certificate)?;
            for contender in contenders.iter().filter(|_| counts_calls) {
                let calls = calls(scenario, contender, certificate).with_context(|| contender.name.clone())?;
                outcome.calls.push((contender.name.clone(), calls));
            }
        }
    }
    contenders.into_iter().try_for_each(|contender| contender.running.stop())?;
    origins.into_iter().try_for_each(Origin::stop)?;
    Ok(outcome)
}

/// Starts a peer, or returns its output if it refuses.
fn start(peer: &Peer, index: u16, setup: &Setup<'_>) -> anyhow::Result<Result<Running, Refused>> {
    match peer.start(index, setup) {
        Ok(running) => Ok(Ok(running)),
        Err(error) => Ok(Err(error.downcast::<Refused>()?)),
    }
}

/// The loads of a scenario on one address: its connections, spread over these cores.
fn loads(
    scenario: &Scenario,
    address: SocketAddr,
    cores: &[usize],
    certificate: &Certificate,
) -> anyhow::Result<Vec<(usize, Box<dyn Load>)>> {
    let connections = scenario.connections / cores.len();
    let load = |core: &usize| -> anyhow::Result<(usize, Box<dyn Load>)> {
        let load: Box<dyn Load> = match scenario.transport {
            Transport::Http2 { streams } => {
                Box::new(Http2::new(address, scenario.exchange, (connections, streams), &certificate.client)?)
            }
            Transport::Plain => Box::new(Http1::new(address, &plan(scenario, connections, None))?),
            Transport::Tls => Box::new(Http1::new(address, &plan(scenario, connections, Some(certificate)))?),
        };
        Ok((*core, load))
    };
    cores.iter().map(load).collect()
}

fn plan(scenario: &Scenario, connections: usize, tls: Option<&Certificate>) -> Plan {
    Plan {
        exchange: scenario.exchange,
        connections,
        pace: scenario.pace,
        reuse: scenario.reuse,
        tls: tls.map(|certificate| Arc::clone(&certificate.client)),
    }
}

fn take_turns(
    scenario: &Scenario,
    contenders: &[Contender],
    effort: Effort,
    certificate: &Certificate,
) -> anyhow::Result<Vec<Round>> {
    let mut rounds = Vec::new();
    for _ in 0..effort.rounds {
        for Contender { name, running, load_cores } in contenders {
            let mut loads = loads(scenario, running.address, load_cores, certificate)?;
            rounds.push(round(name, Some(running.pid()), &mut loads, effort).with_context(|| name.clone())?);
        }
    }
    Ok(rounds)
}

/// System calls of a contender per request.
fn calls(scenario: &Scenario, contender: &Contender, certificate: &Certificate) -> anyhow::Result<f64> {
    let mut loads = loads(scenario, contender.running.address, contender.load_cores, certificate)?;
    load::run(&mut loads, WARM_UP)?;
    let counter = CallCounter::start(&measure::with_descendants(contender.running.pid())?)?;
    let requests = load::run(&mut loads, COUNTED)?.latencies.len();
    let calls = counter.finish()?;
    ensure!(requests > 0, "no request was answered");
    Ok(calls as f64 / requests as f64)
}

/// One round with one peer, or without any.
fn round(
    name: &str,
    proxy: Option<u32>,
    loads: &mut [(usize, Box<dyn Load>)],
    effort: Effort,
) -> anyhow::Result<Round> {
    load::run(loads, WARM_UP)?;
    let before = Reading::take(proxy)?;
    let sample = load::run(loads, Duration::from_secs_f64(effort.seconds))?;
    let used = Reading::take(proxy)?.since(&before);
    summarize(name, sample, used)
}

fn summarize(name: &str, sample: Sample, used: Used) -> anyhow::Result<Round> {
    let mut latencies = sample.latencies;
    ensure!(!latencies.is_empty(), "no request was answered");
    latencies.sort_unstable();
    // The nearest rank: that many of a thousand are not slower.
    let percentile = |of_1000: usize| {
        let rank = (latencies.len() * of_1000).div_ceil(1000).max(1);
        f64::from(latencies[rank - 1]) / 1e3
    };
    let requests = latencies.len();
    Ok(Round {
        peer: name.to_owned(),
        requests,
        seconds: used.seconds,
        requests_per_second: requests as f64 / used.seconds,
        cpu: used.cpu * 1e6 / requests as f64,
        user_share: used.user_share,
        waited: used.waited / used.seconds,
        p50: percentile(500),
        p99: percentile(990),
        p999: percentile(999),
        cores: used.cores,
    })
}

/// Opens the connections of the scenario with a request on each, and measures the memory while they are idle. A second
/// request on each shows that they were kept.
fn idle_memory(scenario: &Scenario, contender: &Contender) -> anyhow::Result<Memory> {
    let (address, proxy) = (contender.running.address, contender.running.pid());
    Http1::new(address, &plan(scenario, OPENED_AT_ONCE, None))?.once_each(OPENED_AT_ONCE)?;
    let before = measure::memory(proxy)?;
    let mut load = Http1::new(address, &plan(scenario, scenario.connections, None))?;
    load.once_each(OPENED_AT_ONCE)?;
    std::thread::sleep(SETTLE);
    let after = measure::memory(proxy)?;
    load.once_each(OPENED_AT_ONCE).context("connections that had rested")?;
    Ok(Memory { peer: contender.name.clone(), connections: scenario.connections, before, after })
}
