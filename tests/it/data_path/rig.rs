//! A clearcoat between a test's clients and its fake nodes.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{Connection, get};
use crate::support::upstream::{Call, Then, Upstream};
use crate::support::{PATIENCE, eventually};

/// A running clearcoat and the fakes behind it. Fields are dropped in this order.
pub struct Rig {
    pub clearcoat: Clearcoat,
    pub varnish: Vec<Upstream>,
    pub web: Vec<Upstream>,
    _folder: tempfile::TempDir,
}

impl Rig {
    /// Starts one worker, so that connections share all of its state. `config` holds TOML sections that replace the
    /// defaults here.
    pub fn start(config: &str, varnish: Vec<Upstream>, web: Vec<Upstream>) -> Self {
        Self::start_by(Clearcoat::start, config, varnish, web)
    }

    /// The same with a soft and a hard limit of open files.
    pub fn with_files(files: (u64, u64), config: &str, varnish: Vec<Upstream>, web: Vec<Upstream>) -> Self {
        Self::start_by(|folder, text| Clearcoat::start_with_files(files, folder, text), config, varnish, web)
    }

    fn start_by(
        start: impl FnOnce(&Path, &str) -> Clearcoat,
        config: &str,
        varnish: Vec<Upstream>,
        web: Vec<Upstream>,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut text = config.to_owned();
        let anywhere = "listen = [\"127.0.0.1:0\"]";
        // A fake keeps no seals, and many tests count bytes: a seal has random ones.
        let unsealed = format!("{anywhere}\nseal = false");
        // A journal in memory would purge the fakes at start, which tests do not expect.
        let journal = format!("path = {:?}\nfirst_start = \"trust\"", folder.path().join("journal"));
        for (section, keys) in [
            ("runtime", "workers = 1"),
            ("edge", &*unsealed),
            ("origin", anywhere),
            ("purge", anywhere),
            ("admin", anywhere),
            ("journal", &*journal),
            ("health.web", "interval = \"500ms\"\ntimeout = \"500ms\""),
            // A fake caches nothing, so a trial is pointless, and its requests would be counted.
            ("health.varnish", "trial = false"),
        ] {
            if !config.contains(&format!("[{section}]")) {
                write!(text, "\n[{section}]\n{keys}\n").expect("memory");
            }
        }
        for (role, nodes) in [("varnish", &varnish), ("web", &web)] {
            for (index, node) in nodes.iter().enumerate() {
                let (number, address) = (index + 1, node.address);
                let node = format!("role = \"{role}\"\nid = \"{role}-{number}\"\naddress = \"{address}\"");
                write!(text, "\n[[node]]\n{node}\n").expect("memory");
            }
        }
        let clearcoat = start(folder.path(), &text);
        clearcoat.ready();
        Rig { clearcoat, varnish, web, _folder: folder }
    }

    /// An origin listener in front of these web nodes.
    pub fn web(nodes: impl IntoIterator<Item = Upstream>) -> Self {
        Rig::start("", Vec::new(), nodes.into_iter().collect())
    }

    pub fn origin(&self) -> Connection {
        Connection::open(self.clearcoat.origin).expect("the origin listener accepts")
    }

    pub fn edge(&self) -> Connection {
        Connection::open(self.clearcoat.edge).expect("the edge accepts")
    }

    /// The value of a counter; a series that does not exist yet is 0.
    pub fn counter(&self, series: &str) -> f64 {
        let metrics = get(self.clearcoat.admin, "/metrics").expect("the admin listener answers");
        let value = metrics.text().lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')).unwrap_or("0");
        value.parse().expect("a number")
    }

    /// How often a request to a node of this role was retried for this reason.
    pub fn retries(&self, role: &str, reason: &str) -> f64 {
        self.counter(&format!("clearcoat_retries_total{{reason=\"{reason}\",role=\"{role}\"}}"))
    }

    /// The number of requests in flight on the nodes, by their gauges.
    pub fn inflight(&self) -> f64 {
        let gauge = |role, id| self.counter(&format!("clearcoat_upstream_inflight{{node=\"{id}\",role=\"{role}\"}}"));
        let of_role = |role, count| (1..=count).map(|number| gauge(role, format!("{role}-{number}"))).sum::<f64>();
        of_role("web", self.web.len()) + of_role("varnish", self.varnish.len())
    }

    /// Waits until no request is in flight: the gauge falls slightly after the last byte of an answer.
    pub fn becomes_idle(&self) {
        eventually("no request is at a node any more", || (self.inflight() == 0.0).then_some(()));
    }

    /// The resident memory of clearcoat, in bytes.
    pub fn memory(&self) -> usize {
        let status = format!("/proc/{}/status", self.clearcoat.pid());
        let status = std::fs::read_to_string(status).expect("a running process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
    }
}

/// The shortest GET.
pub fn get_request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\n\r\n")
}

/// A fake web node with the same script for every request.
pub fn always(answer: &'static str, then: Then) -> Upstream {
    Upstream::start(move |call: &mut Call<'_>| call.send_then(answer, then))
}

/// Waits until a value has not changed for a while, and returns it.
pub fn at_rest(what: &str, value: impl Fn() -> u64) -> u64 {
    const WHILE: Duration = Duration::from_millis(500);
    let began = Instant::now();
    let (mut last, mut since) = (value(), Instant::now());
    loop {
        std::thread::sleep(Duration::from_millis(10));
        let now = value();
        if now != last {
            (last, since) = (now, Instant::now());
        } else if now > 0 && since.elapsed() > WHILE {
            return now;
        }
        assert!(began.elapsed() < PATIENCE, "{what} never comes to rest, {last} now");
    }
}
