//! The compared proxies: started in front of the same origin, and checked that they do the same work.

mod config;
mod probe;

use std::fmt;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::certificate::Certificate;

/// The start-up timeout of a proxy.
const START: Duration = Duration::from_secs(15);

/// A proxy that can be started.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Peer {
    /// Its name in the report.
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// The kind of a proxy.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// HAProxy; `splice` tunes it for large bodies.
    Haproxy {
        splice: bool,
    },
    Nginx,
    /// A build of clearcoat.
    Clearcoat(PathBuf),
}

/// A scenario's requirements for every peer.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) origin: SocketAddr,
    /// The number of Varnish nodes, all of which are the origin: each at an address of its own.
    pub(crate) nodes: u16,
    /// The cores that the proxy may use; it has a worker thread (or process) on each.
    pub(crate) cores: &'a [usize],
    /// Concurrent client connections that it must accept.
    pub(crate) connections: usize,
    pub(crate) tls: Option<&'a Certificate>,
}

/// A running peer, stopped when this value is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) peer: Peer,
    /// The address for clients.
    pub(crate) address: SocketAddr,
    child: Child,
    log: PathBuf,
    folder: tempfile::TempDir,
}

/// It did not start: this is its output.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) String);

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl Peer {
    /// HAProxy, HAProxy with splice, nginx and this build, in the order of their turns.
    pub(crate) fn all() -> [Peer; 4] {
        let peer = |name: &str, kind| Peer { name: name.to_owned(), kind };
        [
            peer("haproxy", Kind::Haproxy { splice: false }),
            peer("haproxy-splice", Kind::Haproxy { splice: true }),
            peer("nginx", Kind::Nginx),
            peer("clearcoat", Kind::Clearcoat(env!("CARGO_BIN_EXE_clearcoat").into())),
        ]
    }

    /// The program, and its version option.
    fn program(&self) -> (&Path, &'static str) {
        match &self.kind {
            Kind::Haproxy { .. } => (Path::new("haproxy"), "-v"),
            Kind::Nginx => (Path::new("nginx"), "-v"),
            Kind::Clearcoat(binary) => (binary, "--version"),
        }
    }

    /// The first line of its version output.
    ///
    /// # Errors
    /// If it cannot be run.
    pub(crate) fn version(&self) -> anyhow::Result<String> {
        let (program, option) = self.program();
        let output = Command::new(program).arg(option).output().with_context(|| format!("running {}", self.name))?;
        let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        Ok(String::from_utf8_lossy(&said).lines().next().unwrap_or_default().trim().to_owned())
    }

    /// Starts it and waits until it serves. `index` separates peers that run concurrently.
    ///
    /// # Errors
    /// [`Refused`] if it ends instead of serving; any other error is a fault of the bench, or of the peer's answers.
    pub(crate) fn start(&self, index: u16, setup: &Setup<'_>) -> anyhow::Result<Running> {
        let folder = tempfile::tempdir()?;
        // All ports of the namespace are free.
        let port = 8000 + 10 * index;
        let arguments = config::write(self, folder.path(), port, setup)?;
        let log = folder.path().join("log");
        let output = File::create(&log)?;
        let cores: Vec<String> = setup.cores.iter().map(ToString::to_string).collect();
        let child = Command::new("taskset")
            .args(["-c", &cores.join(",")])
            .arg(self.program().0)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("running taskset")?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut running = Running { peer: self.clone(), address, child, log, folder };
        running.wait_until_it_serves(setup).with_context(|| format!("starting {}", self.name))?;
        Ok(running)
    }
}

impl Running {
    /// Its process id; it may have child processes.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_until_it_serves(&mut self, setup: &Setup<'_>) -> anyhow::Result<()> {
        let until = Instant::now() + START;
        loop {
            if self.child.try_wait()?.is_some() {
                return Err(Refused(self.said()).into());
            }
            match self.serves(setup) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= until => bail!("{error:#}\n{}", self.said()),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Whether it serves, and does the required work.
    fn serves(&self, setup: &Setup<'_>) -> anyhow::Result<()> {
        if let Kind::Clearcoat(_) = self.peer.kind {
            probe::fleet_is_well(config::admin(self.address), setup.nodes)?;
        }
        probe::does_the_work(self.address, setup.tls)
    }

    /// The end of its log.
    fn said(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_else(|error| error.to_string().into());
        // A report should not contain local paths.
        let log = String::from_utf8_lossy(&log).replace(&format!("{}/", self.folder.path().display()), "");
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Stops it.
    ///
    /// # Errors
    /// If it had ended before: the measurements are invalid then.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} has ended ({status}): {}", self.peer.name, self.said());
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // nginx ends its workers on SIGTERM; processes that do not end die with the namespace.
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Both fail if it has ended.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}
