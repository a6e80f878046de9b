//! The cost of 2,000 purged tags for a real Varnish: its CPU for the first hit of each of 200 unaffected pages, because
//! that hit has to test the page against every ban since the last one. Purged as Magento sends them to Varnish, and
//! through clearcoat. The ban lurker is delayed: it does the same tests, only later.
//!
//! Every variant starts its own Varnish. The second sweep finds the pages tested, and shows the basic cost of a hit.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use it::support::client::{Connection, exchange, tag};
use it::support::fleet::{Fleet, Plan};
use it::support::varnish::Varnish;

const PAGES: u64 = 200;
const TAGS: u64 = 2_000;

/// Tags of a category page: one for each product that a shop shows on it.
const TAGS_OF_A_PAGE: u64 = 30;

/// The default log level of tests would distort the measurement.
const QUIET: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n";

/// The size at which Magento splits its patterns, in bytes.
const CHUNK: usize = 7_680;

/// How the tags are purged.
#[derive(Clone, Copy)]
enum Sender {
    /// A request for each, one after the other.
    OneByOne,
    /// A request for each, from twenty clients.
    Parallel,
    /// Requests with as many tags as fit, one after the other.
    Chunks,
}

fn main() {
    println!(
        "CPU of Varnish per hit of {PAGES} pages with {TAGS_OF_A_PAGE} tags each, after {TAGS} other tags were purged"
    );
    println!("{:<50}{:>8}{:>12}{:>12}{:>12}", "", "bans", "purging", "first hit", "second hit");
    measure("nothing purged", None, false);
    measure("Magento: one tag a request", Some(Sender::OneByOne), false);
    measure("Magento: its own chunks", Some(Sender::Chunks), false);
    measure("clearcoat: one tag a request, 20 clients", Some(Sender::Parallel), true);
    measure("clearcoat: Magento's own chunks", Some(Sender::Chunks), true);
    // Each is answered before the next is sent.
    measure("clearcoat: one tag a request, one after the other", Some(Sender::OneByOne), true);
}

fn measure(name: &str, sender: Option<Sender>, through_clearcoat: bool) {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config: QUIET, first_start: "flush", ..Plan::default() });
    fleet.seals();
    let varnish = &fleet.varnish[0];
    varnish.adm(&["param.set", "ban_lurker_age", "86400"]);
    for page in 1..=PAGES {
        let tags: Vec<String> = (0..TAGS_OF_A_PAGE).map(|tag| format!("cat_p_{}", 50_000 + page * 7 + tag)).collect();
        fleet.shop.set_tags(page, &tags.join(","));
    }
    sweep(varnish);
    let began = Instant::now();
    if let Some(sender) = sender {
        purge(if through_clearcoat { fleet.clearcoat.purge } else { varnish.address }, sender);
    }
    let purging = began.elapsed();
    // Bans may gather after the answer.
    fleet.clearcoat.current();
    // One of them is Varnish's own, from its start.
    let bans = varnish.counter("MAIN.bans") - 1;
    let (first, second) = (sweep(varnish), sweep(varnish));
    println!("{name:<50}{bans:>8}{:>10.1} s{first:>9.0} us{second:>9.0} us", purging.as_secs_f64());
}

/// Reads every page once; returns the CPU time of Varnish per page, in microseconds.
fn sweep(varnish: &Varnish) -> f64 {
    let mut connection = Connection::open(varnish.address).expect("varnishd answers");
    let before = cpu(varnish);
    for page in 1..=PAGES {
        connection.send(format!("GET /p/{page} HTTP/1.1\r\nHost: shop.test\r\n\r\n")).expect("a request");
        assert_eq!(connection.answer(false).expect("an answer").status, 200);
    }
    (cpu(varnish) - before).as_secs_f64() * 1e6 / PAGES as f64
}

/// The CPU time of the worker process so far.
fn cpu(varnish: &Varnish) -> Duration {
    let of_thread = |thread: std::io::Result<std::fs::DirEntry>| {
        let schedstat = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        schedstat.split_whitespace().next()?.parse::<u64>().ok()
    };
    let of_process = |pid: u32| {
        std::fs::read_dir(format!("/proc/{pid}/task")).expect("a process").filter_map(of_thread).sum::<u64>()
    };
    Duration::from_nanos(varnish.worker().into_iter().map(of_process).sum())
}

fn purge(target: SocketAddr, sender: Sender) {
    let terms: Vec<String> = (0..TAGS).map(|number| tag(&format!("cat_p_{}", 10_000 + number * 13 % 20_000))).collect();
    let send = |pattern: &str| {
        let request = format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {pattern}\r\nHost: 127.0.0.1\r\n\r\n");
        assert_eq!(exchange(target, request).expect("an answer").status, 200);
    };
    match sender {
        Sender::OneByOne => terms.iter().for_each(|term| send(term)),
        Sender::Parallel => std::thread::scope(|scope| {
            for share in terms.chunks(terms.len().div_ceil(20)) {
                scope.spawn(|| share.iter().for_each(|term| send(term)));
            }
        }),
        Sender::Chunks => {
            let mut pattern = String::new();
            for term in &terms {
                if !pattern.is_empty() && pattern.len() + 1 + term.len() > CHUNK {
                    send(&std::mem::take(&mut pattern));
                }
                let joint = if pattern.is_empty() { "" } else { "|" };
                pattern += &format!("{joint}{term}");
            }
            send(&pattern);
        }
    }
}
