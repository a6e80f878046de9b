//! The place where everything runs: a network and a process namespace of the bench's own.
//!
//! The network has only a loopback, so that no firewall rule, no traffic shaping and no other traffic of the machine is
//! measured, and every port is free. Its congestion control is `reno`: BBR paces large bodies over a loopback, which
//! measures the pacing. In the process namespace the bench is the first process; whatever way it ends, the kernel kills
//! every other process in there with it, also what a killed proxy would have left behind.
//!
//! Outside, the same program only waits: for the end of the one inside, for a signal, or until its time is over.

use std::io;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setpriority_process, setrlimit, setsid};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::signal::unix::{SignalKind, signal};

/// Set for the process that runs inside.
const INSIDE: &str = "CLEARCOAT_BENCH_INSIDE";

/// Descriptors that the idle scenario wants: its connections have both their ends in this namespace.
const DESCRIPTORS: u64 = 65_536;

/// As nice(1) counts; 0 is everybody's, and less is more.
const PRIORITY: i32 = -20;

/// Where this process is.
pub(crate) enum Place {
    /// It goes on.
    Inside,
    /// The one inside has ended.
    Outside(ExitStatus),
}

/// Runs this program inside, for `limit` at most, and tells both of them where they are.
///
/// # Errors
/// Where this user may not make namespaces, or the network cannot be set up. Outside also a signal, and the limit.
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

/// From `setpriv` and `unshare` on, each process is killed when the one above it ends, however it ends.
async fn run_inside(limit: Duration) -> anyhow::Result<ExitStatus> {
    let mut unshare = vec!["--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
    if !rustix::process::geteuid().is_root() {
        unshare.push("--map-root-user");
    }
    run(Command::new("unshare").args(&unshare).arg("true"))
        .context("the bench needs a network namespace of its own: run it as root, or with sudo")?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // What is still in there when the one inside is killed goes with this one.
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

/// Runs a command to its end; what it said is in the error.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {program}"))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Puts this process and its children before what else the machine does, so that it disturbs them less. Only root may.
///
/// # Errors
/// Where this user may not, or the system says no.
pub(crate) fn raise_priority() -> io::Result<()> {
    // sched(7): with autogrouping, nice values count within a session only, and a session has one of its own.
    setsid()?;
    setpriority_process(None, PRIORITY)?;
    match std::fs::write("/proc/self/autogroup", PRIORITY.to_string()) {
        // This kernel has no autogrouping.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

/// Raises the limit of open files for this process and its children, as far as this user may. Returns what it is now.
///
/// # Errors
/// What the system says.
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

/// Keeps the calling thread on one core.
///
/// # Errors
/// Where there is no such core.
pub(crate) fn pin(core: usize) -> anyhow::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).with_context(|| format!("core {core}"))
}

/// How many cores there are.
///
/// # Errors
/// With fewer than two: the proxy and the load need one each.
pub(crate) fn cores() -> anyhow::Result<usize> {
    match std::thread::available_parallelism()?.get() {
        1 => bail!("two cores are needed: one for the proxy, one for the load"),
        cores => Ok(cores),
    }
}
