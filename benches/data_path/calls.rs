//! How many system calls a proxy makes, in a pass of its own: counting them costs time, which would be measured as well.
//!
//! `perf stat` counts in the kernel, which slows a call down by a fraction of what `strace` would; a proxy under strace
//! is another proxy, because everything that arrives meanwhile is handled at once.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

/// A count under way.
pub(crate) struct CallCounter {
    perf: Child,
    /// perf-stat(1), `--control`: it takes commands here, and says when it has obeyed.
    control: ChildStdin,
    acknowledged: BufReader<ChildStdout>,
}

impl CallCounter {
    /// Whether calls can be counted here.
    ///
    /// # Errors
    /// Why not: perf is missing, or this user may not.
    pub(crate) fn try_out() -> anyhow::Result<()> {
        Self::start(&[std::process::id()])?.finish().map(drop)
    }

    /// Counts the calls of all threads of these processes from now on.
    ///
    /// # Errors
    /// What perf says.
    pub(crate) fn start(processes: &[u32]) -> anyhow::Result<Self> {
        let processes: Vec<String> = processes.iter().map(ToString::to_string).collect();
        let mut perf = Command::new("perf")
            .args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "--delay", "-1", "--control", "fd:0,1"])
            .args(["-p", &processes.join(",")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("running perf")?;
        let (control, acknowledged) = (perf.stdin.take(), perf.stdout.take());
        let (control, acknowledged) = control.zip(acknowledged).context("perf has no pipes")?;
        let mut counter = CallCounter { perf, control, acknowledged: BufReader::new(acknowledged) };
        counter.command("enable\n")?;
        Ok(counter)
    }

    /// The calls since the start.
    ///
    /// # Errors
    /// What perf says.
    pub(crate) fn finish(mut self) -> anyhow::Result<u64> {
        self.command("disable\n")?;
        let pid = Pid::from_raw(self.perf.id().cast_signed()).context("no process")?;
        kill_process(pid, Signal::INT)?;
        let said = self.said()?;
        let line = said.lines().find(|line| line.contains("sys_enter"));
        let count = line.and_then(|line| line.split(',').next()?.parse().ok());
        count.with_context(|| format!("no count from perf: {said}"))
    }

    fn command(&mut self, command: &str) -> anyhow::Result<()> {
        // Where perf has ended, it has said why.
        if self.control.write_all(command.as_bytes()).is_ok() {
            let mut line = Vec::new();
            if self.acknowledged.read_until(b'\n', &mut line)? > 0 {
                return Ok(());
            }
        }
        let said = self.said()?;
        // It goes on with pages of advice.
        let first: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
        bail!("perf: {}", first.join(" "))
    }

    /// All that it says until its end.
    fn said(&mut self) -> std::io::Result<String> {
        let mut said = String::new();
        if let Some(mut stderr) = self.perf.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        self.perf.wait()?;
        Ok(said)
    }
}

impl Drop for CallCounter {
    fn drop(&mut self) {
        // Both fail where it has ended.
        _ = self.perf.kill();
        _ = self.perf.wait();
    }
}
