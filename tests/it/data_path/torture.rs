//! The torture test: random valid exchanges, cut into random pieces, delayed, aborted, and every byte compared.
//!
//! # The exchanges
//!
//! A conversation is one client and a few requests with their answers ([`message`]), generated from the seed of the run
//! and the conversation's number ([`generate`]). Client and node are raw sockets of this test; both know the whole
//! plan, and each compares the bytes that it receives with those that the other has sent, while they arrive, with a
//! strict parser of its own ([`parse`]). Both write in random pieces, pause sometimes, and read at any speed
//! ([`pace`]). Bodies are patterns specific to one exchange and direction, so that a byte of another is detected
//! anywhere.
//!
//! # Faults, and where they happen
//!
//! The nodes behind the edge keep every promise, so nothing may fail there unless the client itself leaves. The nodes
//! behind the origin listener abort in mid-head and mid-body, reset, and close connections that they announced to keep.
//! Then the client must see a cut, or a 502 if no answer had begun, or the complete answer of a retry if that was
//! allowed; never something incomplete that looks complete. [`expect`] has the table. A ledger of all exchanges
//! ([`ledger`]) shows in the end that none was lost, that none reached a node more often than allowed, and that none
//! looked complete there though its client left in the middle.
//!
//! In the end nothing may be left: no request in flight by the gauges, no additional socket.
//!
//! # What it does not cover
//!
//! Invalid messages: `strict` shows that they are refused. Trailers and upgrades. Nodes that are slow to accept, or
//! down: see `failures`.
//!
//! `CLEARCOAT_SEED` repeats all choices (not the timing, which depends on the machine), `CLEARCOAT_TORTURE_EXCHANGES`
//! sets the number of exchanges, and `CLEARCOAT_TORTURE_ONLY` repeats a single conversation many times.

mod client;
mod expect;
mod generate;
mod leaks;
mod ledger;
mod message;
mod node;
mod pace;
mod parse;

use std::cell::Cell;
use std::fmt::Write as _;
use std::io::Write as _;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::task::{JoinSet, LocalSet, spawn_blocking};

use crate::support::PATIENCE;
use crate::support::clearcoat::Clearcoat;
use client::Listeners;
use ledger::{Run, Violation};

const EXCHANGES: u64 = 10_000;

/// Concurrent conversations.
const CLIENTS: usize = 128;

/// How often a single conversation is repeated, because much depends on timing.
const REPETITIONS: u32 = 200;

/// Nodes of each role.
const NODES: usize = 2;

/// Tolerant health checks: nodes that share a thread with a hundred clients must not be marked down.
const CONFIG: &str = r#"
edge.listen = ["127.0.0.1:0"]
origin.listen = ["127.0.0.1:0"]
purge.listen = ["127.0.0.1:0"]
admin.listen = ["127.0.0.1:0"]
runtime.workers = 2
health.web = { interval = "10s", timeout = "10s", rise = 1, fall = 5 }
health.varnish = { trial = false, interval = "10s", timeout = "10s", rise = 1, fall = 5 }
"#;

/// The events that a long run must include to prove anything.
const KINDS: [&str; 9] = [
    "whole",
    "cut",
    "502",
    "left",
    "tried again",
    "answered early",
    "interim answers",
    "closed unannounced",
    "broken off by a node",
];

#[test]
fn every_byte_of_every_exchange_arrives_whatever_is_cut_delayed_or_left() {
    let seed = setting("CLEARCOAT_SEED").unwrap_or_else(|| fastrand::u64(..100_000_000));
    say(&format!("CLEARCOAT_SEED={seed}"));
    let load = match setting("CLEARCOAT_TORTURE_ONLY") {
        Some(number) => Load::Only(number),
        None => Load::Exchanges(setting("CLEARCOAT_TORTURE_EXCHANGES").unwrap_or(EXCHANGES)),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, torture(seed, load));
}

/// The same seed must give the same conversations, so that a run can be repeated.
#[test]
fn a_conversation_is_made_of_its_seed_and_its_number() {
    let bytes = |seed, number| {
        let conversation = generate::conversation(seed, number);
        let heads = conversation.exchanges.iter().map(|exchange| (&exchange.request, &exchange.answer));
        heads.map(|(request, answer)| [&request.head, &answer.head, &answer.body.wire].map(Vec::clone)).collect()
    };
    let first: Vec<[Vec<u8>; 3]> = bytes(1, 7);
    assert!(first == bytes(1, 7));
    assert!(first != bytes(1, 8) && first != bytes(2, 7));
}

fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

/// Bypasses the test harness's capture: the seed of a long run should be visible at once.
fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").expect("standard error");
}

/// The amount of work.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// At least this many exchanges.
    Exchanges(u64),
    /// One conversation, repeatedly.
    Only(u32),
}

async fn torture(seed: u64, load: Load) {
    let run = Rc::new(Run::new(seed));
    let mut nodes = JoinSet::new();
    let mut config = CONFIG.to_owned();
    for number in 1..=NODES {
        for role in ["web", "varnish"] {
            let listener = node::listen(number == NODES).expect("a free port");
            let address = listener.local_addr().expect("an address");
            let keys = format!("role = \"{role}\"\nid = \"{role}-{number}\"\naddress = \"{address}\"");
            write!(config, "\n[[node]]\n{keys}\n").expect("memory");
            nodes.spawn_local(node::serve(Rc::clone(&run), listener));
        }
    }
    let violation = tokio::select! {
        ended = scenario(&run, config, load) => ended.err(),
        violation = nodes.join_next() => Some(violation.expect("there are nodes").expect("a node does not panic")),
    };
    if let Some(violation) = violation {
        panic!("{}", run.report(&violation));
    }
}

/// Everything that happens while the nodes run.
async fn scenario(run: &Rc<Run>, config: String, load: Load) -> Result<(), Violation> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_owned();
    // A journal in memory would purge the nodes at start, which they do not expect.
    let journal = path.join("journal");
    let config = format!("journal = {{ path = {journal:?}, first_start = \"trust\" }}\n{config}");
    // On another thread, because this one serves the nodes meanwhile.
    let started = spawn_blocking(move || {
        let clearcoat = Clearcoat::start(&path, &config);
        clearcoat.ready();
        let sockets = leaks::sockets(clearcoat.pid());
        (clearcoat, sockets)
    });
    let (clearcoat, sockets) = started.await.expect("clearcoat starts");
    let listeners = Listeners { edge: clearcoat.edge, origin: clearcoat.origin };
    let began = Instant::now();
    let exchanges = match load {
        Load::Exchanges(exchanges) => hold(run, listeners, exchanges).await?,
        Load::Only(number) => {
            for _ in 0..REPETITIONS {
                run.begin_round();
                client::converse(run, number, listeners).await?;
            }
            u64::from(REPETITIONS) * run.conversation(number).exchanges.len() as u64
        }
    };
    let took = began.elapsed();
    let checked = spawn_blocking(move || {
        leaks::nothing_is_left(&clearcoat, NODES, &sockets);
        assert!(!clearcoat.log().has("panicked"), "a task of clearcoat panicked");
        clearcoat
    });
    let clearcoat = checked.await.expect("nothing is left");
    // clearcoat has closed all of its connections by now; the nodes may not have noticed yet.
    at_rest(run).await;
    run.balance()?;
    say(&format!("torture: seed {}, {exchanges} exchanges in {took:.1?}: {}", run.seed, run.summary()));
    if let Load::Exchanges(EXCHANGES..) = load {
        for kind in KINDS {
            assert!(run.counted(kind) > 0, "nothing was \"{kind}\": this run proves little");
        }
    }
    drop(clearcoat);
    Ok(())
}

/// Runs conversations, many concurrently, up to this number of exchanges. Returns the actual number.
async fn hold(run: &Rc<Run>, listeners: Listeners, exchanges: u64) -> Result<u64, Violation> {
    run.begin_round();
    let (next, begun) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (run, next, begun) = (Rc::clone(run), Rc::clone(&next), Rc::clone(&begun));
        clients.spawn_local(async move {
            while begun.get() < exchanges {
                let number = next.replace(next.get() + 1);
                begun.set(begun.get() + run.conversation(number).exchanges.len() as u64);
                client::converse(&run, number, listeners).await?;
            }
            Ok(())
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.expect("a client does not panic")?;
    }
    Ok(begun.get())
}

/// Waits until the nodes have seen the end of every connection.
async fn at_rest(run: &Run) {
    let began = Instant::now();
    while run.node_connections.get() > 0 {
        assert!(began.elapsed() < PATIENCE, "{} connections to nodes do not end", run.node_connections.get());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
