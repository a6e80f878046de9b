//! Isolation of a run: its own network and process namespace.
//!
//! The network has only a loopback, so that no firewall rule, traffic shaping or other traffic of the machine is
//! measured, and every port is free. Its congestion control is `reno`: BBR paces large bodies over a loopback, so the
//! pacing would be measured. In the process namespace the bench is the first process; however it ends, the kernel kills
//! all other processes in there with it, including children of a killed proxy.
//!
//! Outside, the same program only waits: for the end of the inner process, for a signal, or for the time limit.

use std::io;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit, setsid};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::signal::unix::{SignalKind, signal};

/// Set for the inner process.
const INSIDE: &str = "CLEARCOAT_BENCH_INSIDE";

/// Descriptors of the idle scenario: both ends of its connections are in this namespace.
const DESCRIPTORS: u64 = 65_536;

/// As in nice(1); 0 is the default, and lower values have a higher priority.
const PRIORITY: i32 = -20;

/// Whether this process is inside.
pub(crate) enum Place {
    /// It continues.
    Inside,
    /// The inner process has ended.
    Outside(ExitStatus),
}

/// Runs this program inside, for `limit` at most, and returns in both processes.
///
/// # Errors
/// If this user may not create namespaces, or the network cannot be set up. Outside also a signal, and the time limit.
pub(crate) fn enter(limit: Duration) -> anyhow::Result<Place> {
    if std::env::var_os(INSIDE).is_none() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        return Ok(Place::Outside(runtime.block_on(run_inside(limit))?));
    }
    run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    for (setting, value) in [("tcp_congestion_control", "reno"), ("ip_local_port_range", "10000 65000")] {
        std::fs::write(format!("/proc/sys/net/ipv4/{setting}"), value).with_context(|| format!("setting {setting}"))?;
    }
    Ok(Place::Inside)
}

/// From `setpriv` and `unshare` on, each process is killed when its parent ends, however it ends.
async fn run_inside(limit: Duration) -> anyhow::Result<ExitStatus> {
    let mut unshare = vec!["--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
    if !rustix::process::geteuid().is_root() {
        unshare.push("--map-root-user");
    }
    run(Command::new("unshare").args(&unshare).arg("true"))
        .context("the bench needs a network namespace of its own: run it as root, or with sudo")?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Removed with this process, even if files of a killed inner process remain.
    let folder = tempfile::tempdir()?;
    let mut inside = tokio::process::Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare"])
        .args(&unshare)
        .arg(std::env::current_exe().context("finding this program")?)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .env("TMPDIR", folder.path())
        .kill_on_drop(true)
        .spawn()
        .context("running setpriv")?;
    tokio::select! {
        status = inside.wait() => Ok(status?),
        _ = interrupt.recv() => bail!("interrupted"),
        _ = terminate.recv() => bail!("terminated"),
        () = tokio::time::sleep(limit) => bail!("not done within {limit:?}"),
    }
}

/// Runs a command to its end; an error includes its output.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {program}"))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Raises the priority of this process and its children, so that other processes disturb them less. Only root may.
///
/// # Errors
/// If this user may not, or the system refuses.
pub(crate) fn raise_priority() -> io::Result<()> {
    // sched(7): with autogrouping, nice values apply only within a session, so this process needs its own.
    setsid()?;
    setpriority_process(None, PRIORITY)?;
    match std::fs::write("/proc/self/autogroup", PRIORITY.to_string()) {
        // This kernel has no autogrouping.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

/// Raises the limit of open files for this process and its children, as far as permitted. Returns the new limit.
///
/// # Errors
/// The system's error.
pub(crate) fn raise_descriptor_limit() -> io::Result<u64> {
    let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(DESCRIPTORS);
    // Only root may go above its hard limit.
    for limit in [DESCRIPTORS.max(allowed), allowed] {
        if setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) }).is_ok() {
            return Ok(limit);
        }
    }
    Err(io::Error::last_os_error())
}

/// Pins the calling thread to one core.
///
/// # Errors
/// If there is no such core.
pub(crate) fn pin(core: usize) -> anyhow::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).with_context(|| format!("core {core}"))
}

/// The number of cores.
///
/// # Errors
/// With fewer than two: the proxy and the load need one each.
pub(crate) fn cores() -> anyhow::Result<usize> {
    match std::thread::available_parallelism()?.get() {
        1 => bail!("two cores are needed: one for the proxy, one for the load"),
        cores => Ok(cores),
    }
}
