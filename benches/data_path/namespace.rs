//! The place where everything runs: a network and a process namespace of the bench's own.
//!
//! The network has only a loopback, so that no firewall rule, no traffic shaping and no other traffic of the machine is
//! measured, and every port is free. Its congestion control is `reno`: BBR paces large bodies over a loopback, which
//! measures the pacing. In the process namespace the bench is the first process; whatever way it ends, the kernel kills
//! every other process in there with it, also what a killed proxy would have left behind.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::signal::unix::{SignalKind, signal};

/// Set for the process that runs inside.
const INSIDE: &str = "CLEARCOAT_BENCH_INSIDE";

/// Descriptors that the idle scenario wants: its connections have both their ends in this namespace.
const DESCRIPTORS: u64 = 65_536;

/// As nice(1) counts; 0 is everybody's, and less is more.
const PRIORITY: i32 = -10;

/// Goes on inside: outside, this process is replaced by one that does. Ends with `limit` at the latest.
///
/// # Errors
/// Where this user may not make namespaces, or the network cannot be set up.
pub(crate) fn enter(limit: Duration) -> anyhow::Result<()> {
    if std::env::var_os(INSIDE).is_none() {
        return Err(replace_this_process()?.into());
    }
    end_on_signals_and_after(limit)?;
    run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    for (setting, value) in [("tcp_congestion_control", "reno"), ("ip_local_port_range", "10000 65000")] {
        std::fs::write(format!("/proc/sys/net/ipv4/{setting}"), value).with_context(|| format!("setting {setting}"))?;
    }
    Ok(())
}

/// Returns only what kept it from being replaced.
fn replace_this_process() -> anyhow::Result<io::Error> {
    let mut unshare = vec!["--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
    if !rustix::process::geteuid().is_root() {
        unshare.push("--map-root-user");
    }
    run(Command::new("unshare").args(&unshare).arg("true"))
        .context("the bench needs a network namespace of its own: run it as root, or with sudo")?;
    let this = std::env::current_exe().context("finding this program")?;
    let mut inside = Command::new("unshare");
    inside.args(&unshare).arg("--").arg(this).args(std::env::args_os().skip(1)).env(INSIDE, "1");
    Ok(inside.exec())
}

/// Runs a command to its end; what it said is in the error.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {program}"))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// The first process of a namespace ignores every signal that it does not handle, so Ctrl-C needs this. And a bench
/// that hangs must not hang for ever.
fn end_on_signals_and_after(limit: Duration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _in_runtime = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::Builder::new().name("watchdog".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => eprintln!("interrupted"),
                _ = terminate.recv() => eprintln!("terminated"),
                () = tokio::time::sleep(limit) => eprintln!("not done within {limit:?}"),
            }
        });
        std::process::exit(1);
    })?;
    Ok(())
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

/// Puts this process and its children before what else the machine does, so that it disturbs them less. Returns whether
/// this user may.
pub(crate) fn raise_priority() -> bool {
    rustix::process::setpriority_process(None, PRIORITY).is_ok()
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
