//! How many instructions a request costs in user space, counted by callgrind.
//!
//! Times on a shared machine vary between runs by more than most changes make; instruction counts do not. Three figures
//! are kept in `instructions.txt`:
//!
//! - **pure**: reading and rewriting of the heads of one exchange, without a socket;
//! - **worker**: everything that the worker thread of a running clearcoat does for one request on a kept connection,
//!   one at a time, without the kernel;
//! - **logged**: the same with an access log (`log.access = "json"`).
//!
//! Each is the difference between two runs, one twice as long, so that start and end do not count. `make instructions`
//! compares with the file and fails if a figure has grown by more than [`TOLERANCE`]; `make instructions UPDATE=1`
//! writes the new ones. Without an argument (`cargo bench`) nothing is measured: a count takes a minute, needs
//! valgrind, and says nothing about time.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}
#[path = "http1/messages.rs"]
mod messages;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clearcoat::http1::{
    Forwarding, HeadLimits, HeadScan, Method, RequestHead, ResponseHead, Version, write_request, write_response,
};
use it::support::client::{Connection, get};
use it::support::eventually;
use it::support::upstream::{Then, Upstream};
use it::support::varnish::signal;

/// The figures, and their tolerated growth in percent. The worker's includes the runtime's timers and the process's
/// hash seeds.
const TOLERANCE: [(&str, u64); 3] = [("pure", 3), ("worker", 5), ("logged", 5)];

/// Exchanges in the shorter run of each.
const PURE_RUN: usize = 5_000;
const WORKER_RUN: usize = 2_000;

/// The body of the answer, in bytes.
const BODY: usize = 1024;

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => println!("instructions: not counted here, see `make instructions`"),
        ["check"] => {
            // First, so that a file that lacks a figure is found before minutes are spent.
            let kept = Kept::read()?;
            return compare(&measure()?, &kept);
        }
        ["update"] => Kept { tools: tools()?, figures: measure()? }.write()?,
        ["pure", exchanges] => pure(exchanges.parse()?),
        other => bail!("unknown arguments {other:?}: check or update"),
    }
    Ok(ExitCode::SUCCESS)
}

type Figures = BTreeMap<String, u64>;

fn measure() -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let (short, long) = (count_pure(folder.path(), PURE_RUN)?, count_pure(folder.path(), 2 * PURE_RUN)?);
    ensure!(long > short, "{long} instructions for twice as much as {short}");
    let pure = (long - short) / PURE_RUN as u64;
    let worker = count_worker(folder.path(), "")?;
    let log = format!("access = \"json\"\naccess_file = {:?}\n", folder.path().join("access.log"));
    let logged = count_worker(folder.path(), &log)?;
    Ok(Figures::from([("pure".into(), pure), ("worker".into(), worker), ("logged".into(), logged)]))
}

/// Prints the figures beside the kept ones. Fails if one has grown too much.
fn compare(now: &Figures, kept: &Kept) -> Result<ExitCode> {
    let tools = tools()?;
    if tools != kept.tools {
        println!("kept figures are of {}, this is {tools}", kept.tools);
    }
    let mut grown = false;
    println!("{:<10}{:>10}{:>10}{:>10}{:>10}", "", "kept", "now", "change", "allowed");
    for (name, percent) in TOLERANCE {
        let (before, now) = (kept.figures[name], now[name]);
        let change = (now as f64 / before as f64 - 1.0) * 100.0;
        println!("{name:<10}{before:>10}{now:>10}{change:>+9.1}%{percent:>9}%");
        grown |= now * 100 > before * (100 + percent);
    }
    if grown {
        println!("A request costs more than it did. If it is worth it: make instructions UPDATE=1");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// The contents of `instructions.txt`.
struct Kept {
    /// The versions of compiler and valgrind, which the figures depend on.
    tools: String,
    figures: Figures,
}

impl Kept {
    fn path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt")
    }

    fn read() -> Result<Kept> {
        let path = Kept::path();
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut kept = Kept { tools: String::new(), figures: Figures::new() };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match line.split_once(' ') {
                Some(("tools", tools)) => kept.tools = tools.to_owned(),
                Some((name, figure)) => {
                    let figure = figure.parse().with_context(|| format!("{}: {line}", path.display()))?;
                    kept.figures.insert(name.to_owned(), figure);
                }
                None => bail!("{}: not `name figure`: {line:?}", path.display()),
            }
        }
        for (name, _) in TOLERANCE {
            let is_kept = kept.figures.contains_key(name);
            ensure!(is_kept, "{} has no {name}: make instructions UPDATE=1 writes all", path.display());
        }
        Ok(kept)
    }

    fn write(&self) -> Result<()> {
        let mut text =
            "# User instructions per exchange (benches/instructions.rs). To renew: make instructions UPDATE=1\n"
                .to_owned();
        text.push_str(&format!("tools {}\n", self.tools));
        for (name, figure) in &self.figures {
            text.push_str(&format!("{name} {figure}\n"));
        }
        std::fs::write(Kept::path(), &text)?;
        print!("{text}");
        Ok(())
    }
}

/// The other inputs of the figures beside the code.
fn tools() -> Result<String> {
    let version = |program: &str| -> Result<String> {
        let output = Command::new(program).arg("--version").output();
        let output = output.with_context(|| format!("{program} is not installed"))?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    Ok(format!("{}, {}, {}", version("rustc")?, version("valgrind")?, std::env::consts::ARCH))
}

/// The work of the pure figure: what a worker does with the heads of an exchange, in reused buffers.
fn pure(exchanges: usize) {
    const LIMITS: HeadLimits = HeadLimits { bytes: 64 * 1024, fields: 100 };
    let (request, answer) = (messages::request(), messages::answer_head(BODY));
    let (mut request_head, mut answer_head) = (RequestHead::default(), ResponseHead::default());
    let (mut to_node, mut to_client) = (Vec::new(), Vec::new());
    let forwarding = Forwarding {
        peer: "192.0.2.7",
        proto: "http",
        trusted: false,
        node: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 80),
        received: Version::Http11,
        offload_header: None,
        asked: b"",
        request_id: b"",
        traceparent: b"",
    };
    for _ in 0..exchanges {
        let (request, answer) = (black_box(request.as_slice()), black_box(answer.as_slice()));
        let read = request_head.read(request, &mut HeadScan::default(), LIMITS);
        black_box(read.expect("a head without fault").expect("a whole head"));
        to_node.clear();
        write_request(&mut to_node, &request_head, forwarding);
        let read = answer_head.read(answer, Method::Get, &mut HeadScan::default(), LIMITS);
        black_box(read.expect("a head without fault").expect("a whole head"));
        to_client.clear();
        black_box(write_response(&mut to_client, &answer_head, Version::Http11, true));
        black_box((&to_node, &to_client));
    }
}

/// Runs this program under callgrind with [`pure`] alone.
fn count_pure(folder: &Path, exchanges: usize) -> Result<u64> {
    let out = folder.join(format!("pure-{exchanges}"));
    let mut child = callgrind(&out).arg(std::env::current_exe()?).args(["pure", &exchanges.to_string()]).spawn()?;
    ensure!(child.wait()?.success(), "the counted program failed: {}", log_of(&out));
    total(&out)
}

/// The instructions of the worker for one exchange, with more keys of `[log]`. It is the thread that does more in the longer run:
/// what others do at the start may be more than its requests, but is the same in both.
fn count_worker(folder: &Path, log: &str) -> Result<u64> {
    let (short, long) = (count_threads(folder, WORKER_RUN, log)?, count_threads(folder, 2 * WORKER_RUN, log)?);
    let mut grown: Vec<u64> = long.iter().zip(&short).map(|(long, short)| long.saturating_sub(*short)).collect();
    grown.sort_unstable();
    match grown.as_slice() {
        [.., second, most] if *most > 10 * second => Ok(most / WORKER_RUN as u64),
        _ => bail!("no thread alone carries out requests: {short:?}, then {long:?}"),
    }
}

/// Runs a clearcoat under callgrind for this many requests. Gives the instructions of each thread, in the order of their start.
fn count_threads(folder: &Path, exchanges: usize, log: &str) -> Result<Vec<u64>> {
    let answer = [messages::answer_head(BODY), vec![b'x'; BODY]].concat();
    let node = Upstream::start(move |call| call.send_then(&answer, Then::KeepAlive));
    let out = folder.join(format!("worker-{exchanges}"));
    let mut clearcoat = Clearcoat::start(folder, &out, node.address, log)?;
    let mut client = Connection::open(clearcoat.edge)?;
    for _ in 0..exchanges {
        client.send(messages::request())?;
        let answer = client.answer(false)?;
        ensure!(answer.status == 200 && answer.body.len() == BODY, "another answer: {answer:?}");
    }
    drop(client);
    clearcoat.end()?;
    let mut threads = Vec::new();
    for thread in 1.. {
        let file = PathBuf::from(format!("{}-{thread:02}", out.display()));
        if !file.exists() {
            break;
        }
        threads.push(total(&file)?);
    }
    Ok(threads)
}

/// A clearcoat with one worker under callgrind, with its addresses. Killed when dropped.
struct Clearcoat {
    child: Child,
    out: PathBuf,
    edge: SocketAddr,
}

impl Clearcoat {
    fn start(folder: &Path, out: &Path, node: SocketAddr, log: &str) -> Result<Self> {
        let file = folder.join("clearcoat.toml");
        let anywhere = "listen = [\"127.0.0.1:0\"]";
        // A journal in memory: that on disk is written by its own process, run from `/proc/self/exe`, which is valgrind
        // itself here.
        let config = format!(
            "[runtime]\nworkers = 1\n[edge]\n{anywhere}\n[origin]\n{anywhere}\n[purge]\n{anywhere}\n[admin]\n{anywhere}\n\
             [journal]\nkind = \"memory\"\n[health.varnish]\ntrial = false\n[log]\nformat = \"json\"\n{log}\
             [[node]]\nrole = \"varnish\"\nid = \"varnish-1\"\naddress = \"{node}\"\n"
        );
        std::fs::write(&file, config)?;
        let mut command = callgrind(out);
        command.arg("--separate-threads=yes").arg(env!("CARGO_BIN_EXE_clearcoat"));
        command.args(["serve", "--config"]).arg(&file).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let log = child.stderr.take().context("a pipe")?;
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut this = Clearcoat { child, out: out.to_owned(), edge: nowhere };
        let admin = this.find_listeners(log)?;
        eventually("clearcoat is ready", || {
            get(admin, "/readyz").is_ok_and(|answer| answer.status == 200).then_some(())
        });
        Ok(this)
    }

    /// Reads the addresses from the log, and leaves the rest of it to a thread. Returns the admin listener's.
    fn find_listeners(&mut self, log: impl std::io::Read + Send + 'static) -> Result<SocketAddr> {
        let mut lines = BufReader::new(log).lines();
        let mut found = BTreeMap::new();
        while found.len() < 4 {
            let line = lines.next().with_context(|| format!("clearcoat ended: {}", log_of(&self.out)))??;
            let line: serde_json::Value = serde_json::from_str(&line).with_context(|| line.clone())?;
            if line["message"] == "listening" {
                let (name, address) = (line["listener"].as_str(), line["address"].as_str());
                found.insert(name.context("a name")?.to_owned(), address.context("an address")?.parse()?);
            }
        }
        // A full pipe would block it.
        std::thread::spawn(move || lines.for_each(drop));
        self.edge = found["edge"];
        Ok(found["admin"])
    }

    /// Stops it cleanly, so that callgrind writes its counts.
    fn end(&mut self) -> Result<()> {
        signal("-TERM", &[self.child.id()]);
        ensure!(self.child.wait()?.success(), "clearcoat failed: {}", log_of(&self.out));
        Ok(())
    }
}

impl Drop for Clearcoat {
    fn drop(&mut self) {
        // An error means that it has ended already, which is the normal case.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// Callgrind, which writes its counts to `out` and its messages beside it.
fn callgrind(out: &Path) -> Command {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", &format!("--callgrind-out-file={}", out.display())]);
    command.arg(format!("--log-file={}.log", out.display())).stdin(Stdio::null());
    command
}

fn log_of(out: &Path) -> String {
    let path = format!("{}.log", out.display());
    std::fs::read_to_string(&path).unwrap_or_else(|error| format!("{path}: {error}"))
}

/// The instruction total of a callgrind file.
fn total(file: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
    Ok(total.with_context(|| format!("{} has no total", file.display()))?.trim().parse()?)
}
