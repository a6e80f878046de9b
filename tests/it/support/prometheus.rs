//! A real Prometheus.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::clearcoat::Log;
use super::client::get;
use super::eventually;

/// A Prometheus, killed when this value is dropped.
pub struct Prometheus {
    pub address: SocketAddr,
    child: Child,
}

impl Prometheus {
    /// Starts one with this configuration and its data in `folder`.
    pub fn start(folder: &Path, config: &str) -> Self {
        let file = folder.join("prometheus.yml");
        std::fs::write(&file, config).expect("a file");
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", folder.join("prometheus").display()));
        command.args(["--web.listen-address=127.0.0.1:0", "--log.format=json"]);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.expect("Debian's package prometheus");
        let log = Log::follow(child.stderr.take().expect("a pipe"));
        let address = eventually("Prometheus listens", || {
            let text = log.text();
            let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut listening = lines.filter(|line| line["msg"] == "Listening on");
            listening.find_map(|line| line["address"].as_str()?.parse().ok())
        });
        let this = Prometheus { address, child };
        eventually("Prometheus is ready", || get(address, "/-/ready").ok().filter(|answer| answer.status == 200));
        this
    }

    /// The result of a query; empty without data.
    pub fn query(&self, expression: &str) -> Vec<Value> {
        let answer = get(self.address, &format!("/api/v1/query?query={}", escaped(expression))).expect("an answer");
        assert_eq!(answer.status, 200, "{expression}: {answer:?}");
        answer.json()["data"]["result"].as_array().expect("a vector").clone()
    }

    /// The labels of what it found to ask.
    pub fn targets(&self) -> Vec<Value> {
        let answer = get(self.address, "/api/v1/targets?state=active").expect("an answer").json();
        answer["data"]["activeTargets"].as_array().expect("targets").iter().map(|it| it["labels"].clone()).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// A text as a part of a query.
fn escaped(text: &str) -> String {
    let byte = |byte: u8| {
        if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") }
    };
    text.bytes().map(byte).collect()
}
