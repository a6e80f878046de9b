//! Counts the system calls of a proxy, in a separate pass: counting costs time, which would be measured as well.
//!
//! `perf stat` counts in the kernel, which slows a call down by a fraction of what `strace` would; under strace a proxy
//! behaves differently, because everything that arrives meanwhile is handled in one batch.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

/// A count in progress.
pub(crate) struct CallCounter {
    perf: Child,
    /// perf-stat(1), `--control`: it reads commands here, and acknowledges them.
    control: ChildStdin,
    acknowledged: BufReader<ChildStdout>,
}

impl CallCounter {
    /// Checks whether calls can be counted here.
    ///
    /// # Errors
    /// The reason if not: perf is missing, or this user lacks the permission.
    pub(crate) fn try_out() -> anyhow::Result<()> {
        Self::start(&[std::process::id()])?.finish().map(drop)
    }

    /// Starts to count the calls of all threads of these processes.
    ///
    /// # Errors
    /// perf's error.
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

    /// The number of calls since the start.
    ///
    /// # Errors
    /// perf's error.
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
        // If perf has ended, its output says why.
        if self.control.write_all(command.as_bytes()).is_ok() {
            let mut line = Vec::new();
            if self.acknowledged.read_until(b'\n', &mut line)? > 0 {
                return Ok(());
            }
        }
        let said = self.said()?;
        // The rest of the output is general advice.
        let first: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
        bail!("perf: {}", first.join(" "))
    }

    /// The rest of perf's output.
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
        // Both fail if perf has ended.
        _ = self.perf.kill();
        _ = self.perf.wait();
    }
}
