//! One etcd process.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use super::super::eventually;
use super::super::varnish::signal;
use super::certificates::Certificates;

const CLIENT_PORT: u16 = 23_790;
const PEER_PORT: u16 = 23_890;

/// The ports of the members of a cluster on its address.
pub fn ports(members: usize) -> Vec<u16> {
    (0..members as u16).flat_map(|number| [CLIENT_PORT + number, PEER_PORT + number]).collect()
}

/// A member of a cluster, whether or not its process runs.
pub struct Member {
    pub name: String,
    pub client_url: String,
    pub peer_url: String,
    /// Its data folder.
    pub data: PathBuf,
    log: PathBuf,
    process: Mutex<Process>,
}

enum Process {
    Down,
    Runs(Child),
    Hangs(Child),
}

/// What a member has to know of its cluster to start.
pub struct Cluster {
    /// The value of `--initial-cluster`.
    pub members: String,
    /// The value of `--initial-cluster-token`. The ids of the cluster and its members come from it and their addresses.
    pub token: String,
    pub certificates: Option<Certificates>,
    /// The storage limit of a member in bytes, if not the default.
    pub quota: Option<u64>,
}

impl Member {
    /// The member with this number and its files below `folder`. It is not running yet.
    pub fn new(number: usize, ip: Ipv4Addr, scheme: &str, folder: &Path) -> Self {
        let name = format!("etcd-{}", number + 1);
        let number = number as u16;
        Member {
            client_url: format!("{scheme}://{ip}:{}", CLIENT_PORT + number),
            peer_url: format!("http://{ip}:{}", PEER_PORT + number),
            data: folder.join(&name),
            log: folder.join(format!("{name}.log")),
            name,
            process: Mutex::new(Process::Down),
        }
    }

    /// Starts its process. It may not serve yet.
    pub fn start(&mut self, cluster: &Cluster) {
        assert!(matches!(self.take(), Process::Down), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(&self.log).expect("a file in our folder");
        let mut command = Command::new("etcd");
        // etcd reads options from variables too, and the user who runs the tests may have some for another etcd.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.args(["--name", &self.name]).arg("--data-dir").arg(&self.data);
        command.args(["--listen-peer-urls", &self.peer_url, "--initial-advertise-peer-urls", &self.peer_url]);
        command.args(["--listen-client-urls", &self.client_url, "--advertise-client-urls", &self.client_url]);
        command.args(["--initial-cluster", &cluster.members, "--initial-cluster-token", &cluster.token]);
        // A tenth of etcd's defaults for a network; this one has no latency.
        command.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
        // The default of ten minutes is too long for a test.
        command.args(["--experimental-watch-progress-notify-interval", "200ms"]);
        // The cheapest password hash there is.
        command.args(["--bcrypt-cost", "4"]);
        command.args(["--logger", "zap", "--log-outputs", "stderr"]);
        if let Some(quota) = cluster.quota {
            command.args(["--quota-backend-bytes", &quota.to_string()]);
        }
        if let Some(certificates) = &cluster.certificates {
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(&certificates.ca);
            command.arg("--cert-file").arg(&certificates.server.cert).arg("--key-file").arg(&certificates.server.key);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("etcd is installed (make test installs it)");
        *self.process() = Process::Runs(child);
    }

    /// Whether it runs and is not stopped. A process that has ended by itself is a failure.
    pub fn runs(&self) -> bool {
        let mut process = self.process.lock().unwrap();
        let Process::Runs(child) = &mut *process else { return false };
        let ended = child.try_wait().expect("our child");
        assert!(ended.is_none(), "{} ended by itself: {ended:?}\n{}", self.name, self.log());
        true
    }

    /// kill -9. Unwritten data is lost.
    pub fn kill(&mut self) {
        if let Process::Runs(mut child) | Process::Hangs(mut child) = self.take() {
            child.kill().expect("our child");
            child.wait().expect("our child");
        }
    }

    /// Stops its process, whose connections stay open and silent.
    pub fn hang(&mut self) {
        let Process::Runs(child) = self.take() else {
            panic!("{} does not run", self.name);
        };
        let pid = child.id();
        *self.process() = Process::Hangs(child);
        signal("-STOP", &[pid]);
        eventually("a member of etcd is stopped", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("our child");
            // The state is the field after the name, which is in parentheses.
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T')).then_some(())
        });
    }

    pub fn resume(&mut self) {
        let Process::Hangs(child) = self.take() else {
            panic!("{} does not hang", self.name);
        };
        let pid = child.id();
        *self.process() = Process::Runs(child);
        signal("-CONT", &[pid]);
    }

    fn process(&mut self) -> &mut Process {
        self.process.get_mut().unwrap()
    }

    /// Takes its process, which the caller ends or puts back.
    fn take(&mut self) -> Process {
        std::mem::replace(self.process(), Process::Down)
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("log of {}:\n{}", self.name, lines[lines.len().saturating_sub(40)..].join("\n"))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let process = self.process.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Process::Runs(child) | Process::Hangs(child) = process {
            // It may have ended already; then there is nothing to kill.
            _ = child.kill();
            _ = child.wait();
        }
    }
}
