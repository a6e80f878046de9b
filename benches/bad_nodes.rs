//! Web nodes that misbehave, beside HAProxy in one run: of five, one answers ten times slower than the others, one fails three of
//! ten requests at once, and one is killed and comes back. All of them pass their health checks while they listen. What do
//! shoppers see, and how many requests do the bad nodes get?
//!
//! Requests begin at a fixed rate, whatever the proxy does, each on a new connection, and their time counts from when they were
//! due. The nodes are FAKES, as no real one is slow to the millisecond.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use it::support::clearcoat::Clearcoat;
use it::support::client::{exchange, get};
use it::support::{eventually, hold};

/// Requests in a second, and the clients that send them in turn.
const RATE: u32 = 400;
const CLIENTS: u32 = 64;
/// A round: the third part of it is without the node that is killed.
const ROUND: Duration = Duration::from_secs(15);
const ROUNDS: usize = 3;
const RENDERED_IN: Duration = Duration::from_millis(5);

/// What is wrong with a node.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    TenTimesSlower,
    FailsThreeOfTen,
    IsKilled,
}

const FAULTS: [Fault; 5] = [Fault::None, Fault::None, Fault::TenTimesSlower, Fault::FailsThreeOfTen, Fault::IsKilled];

/// A FAKE web node.
struct WebNode {
    address: SocketAddr,
    fault: Fault,
    requests: AtomicU64,
    is_down: AtomicBool,
    connections: Mutex<Vec<TcpStream>>,
}

impl WebNode {
    fn start(fault: Fault) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let node = Arc::new(WebNode {
            address: listener.local_addr().expect("an address"),
            fault,
            requests: AtomicU64::new(0),
            is_down: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let accepting = Arc::clone(&node);
        // Ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let node = Arc::clone(&accepting);
                std::thread::spawn(move || node.serve(stream));
            }
        });
        node
    }

    /// The requests of one connection. A node that is down resets each.
    fn serve(&self, stream: TcpStream) -> Option<()> {
        if self.is_down.load(SeqCst) {
            return reset(&stream);
        }
        stream.set_nodelay(true).ok()?;
        let handle = stream.try_clone().ok()?;
        self.connections.lock().expect("no panic").push(handle);
        let (mut reader, mut writer) = (BufReader::new(stream.try_clone().ok()?), stream);
        loop {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                (reader.read_line(&mut head).ok()? > 0).then_some(())?;
            }
            let status = if head.contains("/health_check.php") {
                "200 OK"
            } else {
                let number = self.requests.fetch_add(1, SeqCst);
                match self.fault {
                    Fault::FailsThreeOfTen if number % 10 < 3 => "503 Service Unavailable",
                    Fault::TenTimesSlower => self.render(10),
                    _ => self.render(1),
                }
            };
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 4\r\nCache-Control: no-store\r\n\r\npage");
            writer.write_all(answer.as_bytes()).ok()?;
        }
    }

    fn render(&self, times: u32) -> &'static str {
        std::thread::sleep(RENDERED_IN * times);
        "200 OK"
    }

    /// Resets its connections, and each new one, until it is back.
    fn set_down(&self, is_down: bool) {
        self.is_down.store(is_down, SeqCst);
        if is_down {
            self.connections.lock().expect("no panic").drain(..).for_each(|stream| _ = reset(&stream));
        }
    }
}

fn reset(stream: &TcpStream) -> Option<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_linger(Some(Duration::ZERO)).ok()?;
    stream.shutdown(Shutdown::Both).ok()
}

/// A proxy in front of nodes of its own.
struct Contender {
    name: &'static str,
    nodes: Vec<Arc<WebNode>>,
    address: SocketAddr,
    /// Ends it.
    _proxy: Proxy,
    rounds: Vec<Round>,
}

enum Proxy {
    Clearcoat { _running: Box<Clearcoat>, _folder: tempfile::TempDir },
    Haproxy { running: Child, _folder: tempfile::TempDir },
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Proxy::Haproxy { running: child, .. } = self {
            // An error means that it has ended.
            _ = child.kill();
            _ = child.wait();
        }
    }
}

/// What clients saw in a round, and the requests of each node.
#[derive(Debug)]
struct Round {
    times: Vec<Duration>,
    errors: u64,
    without_answer: u64,
    requests: Vec<u64>,
}

impl Contender {
    fn clearcoat(name: &'static str, policy: &str) -> Self {
        let nodes: Vec<_> = FAULTS.map(WebNode::start).into();
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = format!(
            "[edge]\nlisten = [\"127.0.0.1:0\"]\n[purge]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = [\"127.0.0.1:0\"]\n\
             [origin]\nlisten = [\"127.0.0.1:0\"]\npolicy = \"{policy}\"\n[health.web]\ninterval = \"1s\"\ntimeout = \"1s\"\n\
             [journal]\nkind = \"memory\"\n[log]\nlevel = \"info\"\nformat = \"json\"\n"
        );
        for (number, node) in nodes.iter().enumerate() {
            config +=
                &format!("[[node]]\nrole = \"web\"\nid = \"web-{}\"\naddress = \"{}\"\n", number + 1, node.address);
        }
        let running = Clearcoat::start(folder.path(), &config);
        eventually("the nodes are up", || running.nodes().iter().all(|node| node["health"] == "up").then_some(()));
        let address = running.origin;
        let proxy = Proxy::Clearcoat { _running: Box::new(running), _folder: folder };
        Contender { name, nodes, address, _proxy: proxy, rounds: Vec::new() }
    }

    fn haproxy(name: &'static str, observe: &str) -> Self {
        let nodes: Vec<_> = FAULTS.map(WebNode::start).into();
        let folder = tempfile::tempdir().expect("a folder");
        let held = hold(SocketAddr::from(([127, 0, 0, 1], 0)));
        let address = held.local_addr().expect("an address").as_socket().expect("an IP socket");
        let mut config = format!(
            "global\n    nbthread 2\ndefaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n    \
             option redispatch 1\n    retries 3\n    http-reuse always\nfrontend edge\n    bind {address}\n    default_backend web\n\
             backend web\n    balance leastconn\n    option httpchk GET /health_check.php\n"
        );
        for (number, node) in nodes.iter().enumerate() {
            config +=
                &format!("    server web-{} {} check inter 1s fall 3 rise 2{observe}\n", number + 1, node.address);
        }
        let file = folder.path().join("haproxy.cfg");
        std::fs::write(&file, config).expect("a file");
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-f").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("haproxy is installed (make bench installs it)");
        let proxy = Proxy::Haproxy { running: child, _folder: folder };
        eventually("haproxy serves", || get(address, "/").ok());
        Contender { name, nodes, address, _proxy: proxy, rounds: Vec::new() }
    }

    fn killed(&self) -> &WebNode {
        self.nodes.iter().find(|node| node.fault == Fault::IsKilled).expect("one is")
    }

    fn round(&mut self) {
        let before = self.requests();
        let (times, errors, without_answer) = (Mutex::new(Vec::new()), AtomicU64::new(0), AtomicU64::new(0));
        let (began, address) = (Instant::now(), self.address);
        let client = |number: u32| {
            for turn in (number..).step_by(CLIENTS as usize) {
                let due = Duration::from_secs(1) * turn / RATE;
                if due >= ROUND {
                    return;
                }
                std::thread::sleep(due.saturating_sub(began.elapsed()));
                let request = format!("GET /{turn} HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n");
                match exchange(address, request) {
                    Ok(answer) if answer.status == 200 => {}
                    Ok(_) => _ = errors.fetch_add(1, SeqCst),
                    Err(_) => _ = without_answer.fetch_add(1, SeqCst),
                }
                times.lock().expect("no panic").push(began.elapsed().saturating_sub(due));
            }
        };
        std::thread::scope(|scope| {
            for number in 0..CLIENTS {
                scope.spawn(move || client(number));
            }
            std::thread::sleep(ROUND / 3);
            self.killed().set_down(true);
            std::thread::sleep(ROUND / 3);
            self.killed().set_down(false);
        });
        let requests = self.requests().iter().zip(before).map(|(now, before)| now - before).collect();
        let (errors, without_answer) = (errors.into_inner(), without_answer.into_inner());
        let times = times.into_inner().expect("no panic");
        self.rounds.push(Round { times, errors, without_answer, requests });
    }

    fn requests(&self) -> Vec<u64> {
        self.nodes.iter().map(|node| node.requests.load(SeqCst)).collect()
    }

    fn print(&self) {
        let mut times: Vec<Duration> = self.rounds.iter().flat_map(|round| &round.times).copied().collect();
        times.sort();
        let ms = |of_1000: usize| times[(times.len() * of_1000).div_ceil(1000).max(1) - 1].as_secs_f64() * 1e3;
        let sum = |of: fn(&Round) -> u64| self.rounds.iter().map(of).sum::<u64>();
        let all = times.len() as f64;
        let share = |fault: Fault| {
            let place = FAULTS.iter().position(|known| *known == fault).expect("one has it");
            self.rounds.iter().map(|round| round.requests[place]).sum::<u64>() as f64 / all * 100.0
        };
        println!(
            "{:<40}{:>8}{:>8}{:>8}{:>9.1}{:>9.1}{:>9.1}{:>9.1} %{:>9.1} %{:>9.1} %",
            self.name,
            times.len(),
            sum(|round| round.errors),
            sum(|round| round.without_answer),
            ms(500),
            ms(990),
            ms(999),
            share(Fault::TenTimesSlower),
            share(Fault::FailsThreeOfTen),
            share(Fault::IsKilled),
        );
    }
}

fn main() {
    let mut contenders = [
        Contender::clearcoat("clearcoat, least_request (default)", "least_request"),
        Contender::clearcoat("clearcoat, peak_ewma", "peak_ewma"),
        Contender::haproxy("haproxy, leastconn", ""),
        Contender::haproxy("haproxy, leastconn, observe layer7", " observe layer7 error-limit 10 on-error mark-down"),
    ];
    for _ in 0..ROUNDS {
        contenders.iter_mut().for_each(Contender::round);
    }
    println!(
        "{RATE} requests/s to five web nodes ({} ms each), {ROUNDS} rounds of {ROUND:?}, in turns: one answers ten times slower, one",
        RENDERED_IN.as_millis()
    );
    println!("fails three of ten at once, one is away for a third of the time\n");
    println!(
        "{:<40}{:>8}{:>8}{:>8}{:>9}{:>9}{:>9}{:>11}{:>11}{:>11}",
        "", "requests", "errors", "cut", "p50 ms", "p99 ms", "p99.9 ms", "to slow", "to failing", "to killed"
    );
    contenders.iter().for_each(Contender::print);
}
