//! The cost of a proxy according to the kernel.
//!
//! CPU time comes from `schedstat`, in nanoseconds, because `/proc/PID/stat` counts in ticks of 10 ms; only the split
//! into user and system comes from there. It is the time that threads ran, so a busy neighbour hardly affects it. A
//! proxy is its process and all descendants: nginx has its workers there.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};

/// The resources used by a proxy and the machine so far.
#[derive(Debug)]
pub(crate) struct Reading {
    at: Instant,
    /// Time that the proxy's threads ran, in nanoseconds.
    run: u64,
    /// Time that they were ready but waited for their core, in nanoseconds.
    waited: u64,
    /// The run time in ticks, in user mode and in the kernel.
    user: u64,
    system: u64,
    cores: Vec<CoreTicks>,
}

/// A core's counters so far, in ticks.
#[derive(Clone, Copy, Debug)]
struct CoreTicks {
    busy: u64,
    all: u64,
}

/// The resources used between two readings.
#[derive(Debug)]
pub(crate) struct Used {
    pub(crate) seconds: f64,
    /// CPU time of the proxy in seconds.
    pub(crate) cpu: f64,
    /// Time that its threads waited for their core, in seconds.
    pub(crate) waited: f64,
    /// The share of its CPU time that was spent outside the kernel, 0 to 1.
    pub(crate) user_share: f64,
    /// The utilisation of each core, by all processes, 0 to 1.
    pub(crate) cores: Vec<f64>,
}

impl Reading {
    /// Reads the counters of a proxy, if there is one, and of the machine.
    ///
    /// # Errors
    /// If the proxy has ended.
    pub(crate) fn take(proxy: Option<u32>) -> anyhow::Result<Self> {
        let mut reading = Reading { at: Instant::now(), run: 0, waited: 0, user: 0, system: 0, cores: cores()? };
        let processes = proxy.map_or(Ok(Vec::new()), with_descendants)?;
        for pid in processes {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                let text = fs::read_to_string(task?.path().join("schedstat"))?;
                let mut fields = text.split_whitespace();
                reading.run += number(fields.next())?;
                reading.waited += number(fields.next())?;
            }
            let (user, system) = user_and_system(pid)?;
            reading.user += user;
            reading.system += system;
        }
        Ok(reading)
    }

    /// The resources used since an earlier reading of the same proxy.
    pub(crate) fn since(&self, earlier: &Reading) -> Used {
        let (user, system) = (self.user - earlier.user, self.system - earlier.system);
        let busy = |(now, then): (&CoreTicks, &CoreTicks)| {
            (now.busy - then.busy) as f64 / now.all.saturating_sub(then.all).max(1) as f64
        };
        Used {
            seconds: (self.at - earlier.at).as_secs_f64(),
            cpu: (self.run - earlier.run) as f64 / 1e9,
            waited: (self.waited - earlier.waited) as f64 / 1e9,
            user_share: user as f64 / (user + system).max(1) as f64,
            cores: self.cores.iter().zip(&earlier.cores).map(busy).collect(),
        }
    }
}

/// Memory of a proxy in KiB: its private memory, and its share of shared memory.
///
/// # Errors
/// If the proxy has ended.
pub(crate) fn memory(proxy: u32) -> anyhow::Result<u64> {
    let mut all = 0;
    for pid in with_descendants(proxy)? {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss in smaps_rollup")?;
        all += number(line.split_whitespace().next())?;
    }
    Ok(all)
}

/// A process and all its descendants.
///
/// # Errors
/// If it has ended.
pub(crate) fn with_descendants(pid: u32) -> anyhow::Result<Vec<u32>> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(pid) = all.get(next) {
        for task in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
            let children = fs::read_to_string(task?.path().join("children"))?;
            for child in children.split_whitespace() {
                all.push(child.parse()?);
            }
        }
        next += 1;
    }
    Ok(all)
}

/// proc(5): the fields after the program's name, which may contain anything but ends with the last parenthesis.
fn user_and_system(pid: u32) -> anyhow::Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, behind_name) = text.rsplit_once(')').context("no name in /proc/PID/stat")?;
    let mut fields = behind_name.split_whitespace().skip(11);
    Ok((number(fields.next())?, number(fields.next())?))
}

fn cores() -> anyhow::Result<Vec<CoreTicks>> {
    let text = fs::read_to_string(Path::new("/proc/stat"))?;
    let is_core =
        |line: &&str| line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let cores = text.lines().filter(is_core).map(core).collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(!cores.is_empty(), "no core in /proc/stat");
    Ok(cores)
}

/// proc(5): user nice system idle iowait irq softirq steal; later fields are already included in user.
fn core(line: &str) -> anyhow::Result<CoreTicks> {
    let ticks = line.split_whitespace().skip(1).take(8).map(|field| number(Some(field)));
    let ticks = ticks.collect::<anyhow::Result<Vec<u64>>>()?;
    let all = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    Ok(CoreTicks { busy: all - idle, all })
}

fn number(field: Option<&str>) -> anyhow::Result<u64> {
    field.context("a field is missing")?.trim().parse().context("not a number")
}
