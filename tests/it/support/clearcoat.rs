//! The real program as a child process.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};

use socket2::Socket;

use super::client::get;
use super::clock::put_ahead;
use super::varnish::signal;
use super::{eventually, hold};

/// A running clearcoat, killed when this value is dropped.
pub struct Clearcoat {
    pub edge: SocketAddr,
    /// The TLS addresses of the edge, in the order of the configuration.
    pub edge_tls: Vec<SocketAddr>,
    pub origin: SocketAddr,
    pub purge: SocketAddr,
    pub admin: SocketAddr,
    child: Child,
    config: PathBuf,
    log: Log,
    /// The offset of its wall clock.
    ahead: Option<&'static str>,
    /// Its ports, reserved while it is down.
    held: Vec<Socket>,
}

/// Its log so far, one JSON object per line.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    /// Collects a pipe's output, until its process ends.
    pub fn follow(pipe: impl Read + Send + 'static) -> Self {
        let log = Log::default();
        let lines = BufReader::new(pipe).lines();
        let writer = log.clone();
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| writer.0.lock().unwrap().push(line)));
        log
    }

    /// The number of lines with this text.
    pub fn count(&self, text: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    }

    /// Whether there is a line with this text.
    pub fn has(&self, text: &str) -> bool {
        self.0.lock().unwrap().iter().any(|line| line.contains(text))
    }

    /// Waits for a line with this text. A metric may change before its line has come through the pipe, so waiting for
    /// the metric is not enough.
    pub fn waits_for(&self, text: &str) {
        eventually(&format!("the log says {text}"), || self.has(text).then_some(()));
    }

    /// The same for several lines.
    pub fn waits_for_count(&self, text: &str, count: usize) {
        eventually(&format!("the log says {count} times {text}"), || (self.count(text) >= count).then_some(()));
        assert_eq!(self.count(text), count, "{text}");
    }

    /// The complete log so far.
    pub fn text(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }

    /// The addresses of each listener, in the order in which they were opened.
    fn listening(&self) -> HashMap<String, Vec<SocketAddr>> {
        let lines = self.0.lock().unwrap();
        let values = lines.iter().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let listening = values.filter(|value| value["message"] == "listening");
        let address = |value: &serde_json::Value| value["address"].as_str().and_then(|address| address.parse().ok());
        let mut addresses = HashMap::<String, Vec<SocketAddr>>::new();
        for (listener, address) in
            listening.filter_map(|value| Some((value["listener"].as_str()?.to_owned(), address(&value)?)))
        {
            addresses.entry(listener).or_default().push(address);
        }
        addresses
    }
}

impl Clearcoat {
    /// Runs `clearcoat serve` with this configuration, in this folder. The edge may not be open yet. Its log is JSON,
    /// and more verbose than usual unless the configuration sets a level.
    pub fn start(folder: &Path, config: &str) -> Self {
        Self::start_by(program(), None, folder, config)
    }

    /// The same with a soft and a hard limit of open files.
    pub fn start_with_files((soft, hard): (u64, u64), folder: &Path, config: &str) -> Self {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={soft}:{hard}")).arg(env!("CARGO_BIN_EXE_clearcoat")).stdin(Stdio::null());
        Self::start_by(command, None, folder, config)
    }

    /// The same by a command that ends as `clearcoat`, whose arguments are added to it.
    pub fn start_with(command: Command, folder: &Path, config: &str) -> Self {
        Self::start_by(command, None, folder, config)
    }

    /// The same with a wall clock that is ahead by this much.
    pub fn start_ahead(ahead: Option<&'static str>, folder: &Path, config: &str) -> Self {
        Self::start_by(program(), ahead, folder, config)
    }

    fn start_by(command: Command, ahead: Option<&'static str>, folder: &Path, config: &str) -> Self {
        let file = folder.join("clearcoat.toml");
        let log = if config.contains("[log]") { "" } else { "\n[log]\nlevel = \"debug\"\nformat = \"json\"\n" };
        std::fs::write(&file, format!("{config}{log}")).expect("a file");
        let (child, log) = spawn(command, &file, ahead);
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut this = Clearcoat {
            edge: nowhere,
            edge_tls: vec![],
            origin: nowhere,
            purge: nowhere,
            admin: nowhere,
            child,
            config: file,
            log,
            ahead,
            held: vec![],
        };
        this.find_addresses();
        this
    }

    fn find_addresses(&mut self) {
        let listeners = ["edge", "origin", "purge", "admin"];
        [self.edge, self.origin, self.purge, self.admin] = eventually("clearcoat listens", || {
            let ended = self.child.try_wait().expect("our child");
            assert!(ended.is_none(), "clearcoat ended at once: {}", self.log.text());
            let first = listeners.map(|listener| self.listening(listener).first().copied());
            first.iter().all(Option::is_some).then(|| first.map(Option::unwrap))
        });
        // The admin listener is bound last, so all others are logged by now.
        self.edge_tls = self.listening("edge.tls");
    }

    /// The addresses of a listener, by its name in the log: `edge.tls` is for TLS.
    pub fn listening(&self, listener: &str) -> Vec<SocketAddr> {
        self.log.listening().remove(listener).unwrap_or_default()
    }

    /// Waits until the edge accepts traffic and every node is up.
    pub fn ready(&self) {
        eventually("clearcoat is ready", || {
            let ready = get(self.admin, "/readyz").is_ok_and(|answer| answer.status == 200);
            (ready && self.nodes().iter().all(|node| node["health"] == "up")).then_some(())
        });
    }

    /// Waits until the edge accepts traffic, whatever the state of the nodes.
    pub fn opened(&self) {
        eventually("the edge is open", || {
            get(self.admin, "/readyz").is_ok_and(|answer| answer.status == 200).then_some(())
        });
    }

    /// Waits until every Varnish has every answered purge.
    pub fn current(&self) {
        eventually("every Varnish is current", || {
            let mut varnish = self.nodes().into_iter().filter(|node| node["role"] == "varnish");
            varnish.all(|node| node["current"] == true).then_some(())
        });
    }

    /// `/api/v1/fleet`.
    pub fn fleet(&self) -> serde_json::Value {
        get(self.admin, "/api/v1/fleet").expect("the admin listener answers").json()
    }

    pub fn nodes(&self) -> Vec<serde_json::Value> {
        self.fleet()["nodes"].as_array().expect("nodes").clone()
    }

    /// The entry of one node in the fleet's status.
    pub fn node(&self, id: &str) -> serde_json::Value {
        self.nodes().into_iter().find(|node| node["id"] == id).unwrap_or_else(|| panic!("no node {id}"))
    }

    /// The value of one series of `/metrics`, given in its text form.
    pub fn metric(&self, series: &str) -> f64 {
        let metrics = get(self.admin, "/metrics").expect("the admin listener answers");
        let line =
            metrics.text().lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')).map(str::to_owned);
        line.unwrap_or_else(|| panic!("no series {series}")).parse().expect("a number")
    }

    /// The sum of all series of a metric, whatever their labels.
    pub fn sum(&self, metric: &str) -> f64 {
        let metrics = get(self.admin, "/metrics").expect("the admin listener answers");
        let lines = metrics.text().lines().filter_map(|line| line.strip_prefix(metric)?.strip_prefix('{'));
        lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a number")).sum()
    }

    pub fn log(&self) -> &Log {
        &self.log
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// kill -9. Its ports stay reserved.
    pub fn kill(&mut self) {
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
        self.hold_ports();
    }

    /// SIGTERM, and waits for its end, which is an orderly one. Its ports stay reserved.
    pub fn end(&mut self) {
        self.terminate();
        assert!(self.wait().success(), "{}", self.log.text());
        self.hold_ports();
    }

    fn hold_ports(&mut self) {
        self.held = [self.edge, self.origin, self.purge, self.admin].map(hold).into();
    }

    /// Starts it again on the same ports.
    pub fn restart(&mut self) {
        let text = std::fs::read_to_string(&self.config).expect("our file");
        let mut config: toml::Table = text.parse().expect("our file");
        for (section, addresses) in [
            ("edge", vec![self.edge]),
            ("origin", self.listening("origin")),
            ("purge", vec![self.purge]),
            ("admin", vec![self.admin]),
        ] {
            let section = config.entry(section).or_insert_with(|| toml::Table::new().into());
            let listen = toml::Value::Array(addresses.iter().map(|address| address.to_string().into()).collect());
            section.as_table_mut().expect("a table").insert("listen".into(), listen);
        }
        std::fs::write(&self.config, config.to_string()).expect("a file");
        (self.child, self.log) = spawn(program(), &self.config, self.ahead);
        self.find_addresses();
        self.held.clear();
    }

    /// Its configuration file.
    pub fn config(&self) -> String {
        std::fs::read_to_string(&self.config).expect("our file")
    }

    /// Replaces its configuration file.
    pub fn configure(&self, text: &str) {
        let new = self.config.with_extension("new");
        std::fs::write(&new, text).expect("a file");
        std::fs::rename(&new, &self.config).expect("our file");
    }

    /// SIGHUP.
    pub fn reload(&self) {
        signal("-HUP", &[self.child.id()]);
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        signal("-TERM", &[self.child.id()]);
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("clearcoat ends", || self.child.try_wait().expect("our child"))
    }
}

impl Drop for Clearcoat {
    fn drop(&mut self) {
        // An error means that it has already ended.
        _ = self.child.kill();
        _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of clearcoat:\n{}", self.log.text());
        }
    }
}

/// Runs another command of the program to its end.
pub fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_clearcoat")).args(arguments).stdin(Stdio::null()).output().expect("clearcoat")
}

fn program() -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_clearcoat"));
    program.stdin(Stdio::null());
    program
}

fn spawn(mut command: Command, config: &Path, ahead: Option<&str>) -> (Child, Log) {
    if let Some(by) = ahead {
        put_ahead(&mut command, by);
    }
    command.arg("serve").arg("--config").arg(config).stderr(Stdio::piped());
    let mut child = command.spawn().expect("clearcoat");
    let log = Log::follow(child.stderr.take().expect("a pipe"));
    (child, log)
}
