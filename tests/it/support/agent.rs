//! The agent as a child process, and its node.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use super::clearcoat::Log;
use super::etcd::Etcd;
use super::eventually;
use super::varnish::signal;

/// A process that registers a node, killed when this value is dropped: a `clearcoat agent`, or an example that does
/// without.
pub struct Agent {
    child: Child,
    log: Log,
}

impl Agent {
    /// Runs the agent with these arguments. Its log is JSON.
    pub fn start<S: AsRef<str>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clearcoat"));
        command.args(["agent", "--log-format", "json"]);
        command.args(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        Agent::spawn(command)
    }

    /// Runs another command instead.
    pub fn spawn(mut command: Command) -> Self {
        // The output of its leftover processes is not waited for.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a command that exists");
        let log = Log::follow(child.stderr.take().expect("a pipe"));
        Agent { child, log }
    }

    pub fn log(&self) -> &Log {
        &self.log
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, such as `-TERM`.
    pub fn signal(&self, name: &str) {
        signal(name, &[self.child.id()]);
    }

    /// kill -9, without its children.
    pub fn kill(&mut self) {
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_none()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the agent ends", || self.child.try_wait().expect("our child"))
    }

    /// Waits for its end, and returns its exit status.
    pub fn status(&mut self) -> i32 {
        self.wait().code().expect("an exit status")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.runs() {
            // Its children have their own process groups.
            let groups: Vec<String> = children(self.child.id()).iter().map(|pid| format!("-{pid}")).collect();
            self.kill();
            for group in groups {
                // It may have ended by itself.
                _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
            }
        }
        if std::thread::panicking() {
            eprintln!("log of the agent:\n{}", self.log.text());
        }
    }
}

/// The children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().map(|pid| pid.parse().expect("a pid")).collect()
}

/// A server that answers every request with one status, until this value is dropped.
pub struct Node {
    pub address: SocketAddr,
    status: Arc<AtomicU16>,
    _runtime: Runtime,
}

impl Node {
    pub fn start(status: u16) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let status = Arc::new(AtomicU16::new(status));
        let answers = Arc::clone(&status);
        runtime.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let answers = Arc::clone(&answers);
                tokio::spawn(async move {
                    // A client that only connects sends no request.
                    if stream.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {
                        let status = answers.load(Ordering::SeqCst);
                        let answer = format!("HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                        _ = stream.write_all(answer.as_bytes()).await;
                    }
                });
            }
        });
        Node { address, status, _runtime: runtime }
    }

    /// Sets the status.
    pub fn answer(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Its page, for `--check`.
    pub fn page(&self) -> String {
        format!("http://{}/health", self.address)
    }

    /// An agent's arguments for this node, with short intervals and a short lease.
    pub fn arguments(&self, role: &str, id: &str, etcd: &[String]) -> Vec<String> {
        let mut arguments = arguments(role, id, etcd);
        arguments.extend(["--address".to_owned(), self.address.to_string()]);
        arguments
    }
}

/// The same without the address.
pub fn arguments(role: &str, id: &str, etcd: &[String]) -> Vec<String> {
    let mut arguments = vec!["--role", role, "--id", id, "--ttl", "2s", "--drain", "0s"];
    arguments.extend(["--check-interval", "200ms", "--check-timeout", "200ms"]);
    for endpoint in etcd {
        arguments.extend(["--etcd", endpoint]);
    }
    arguments.into_iter().map(str::to_owned).collect()
}

/// The node records in etcd under this prefix.
pub struct Record {
    pub value: serde_json::Value,
    pub lease: i64,
    pub created: i64,
}

/// The record of a node, given as `web/web-1`, if there is one.
pub fn record(etcd: &Etcd, node: &str) -> Option<Record> {
    let entry = etcd.entry(&format!("/clearcoat/v1/nodes/{node}"))?;
    let value = serde_json::from_slice(entry.value()).expect("JSON");
    Some(Record { value, lease: entry.lease(), created: entry.create_revision() })
}

/// Waits until the record of a node satisfies `wanted`.
pub fn recorded(etcd: &Etcd, node: &str, what: &str, wanted: impl Fn(&Record) -> bool) -> Record {
    eventually(&format!("{node} {what}"), || record(etcd, node).filter(&wanted))
}

/// Waits until a node is in this state.
pub fn is(etcd: &Etcd, node: &str, state: &str) -> Record {
    recorded(etcd, node, &format!("is {state}"), |record| record.value["state"] == state)
}

/// Waits until a node is not registered any more.
pub fn is_gone(etcd: &Etcd, node: &str) {
    eventually(&format!("{node} is gone"), || record(etcd, node).is_none().then_some(()));
}

/// A shell script as the agent's command.
pub fn script(folder: &Path, text: &str) -> Vec<String> {
    let file = folder.join("node.sh");
    std::fs::write(&file, text).expect("a file in our folder");
    vec!["--".to_owned(), "sh".to_owned(), file.to_str().expect("a path").to_owned()]
}
