//! What the check of seals costs a reader: CPU of clearcoat for a page of 30 names from a real Varnish, while 1,000 other
//! names a second are purged, with the edge that judges each page, and with one that does not (`edge.seal = false`). In
//! turns, in one run.
//!
//! Two figures are given for each: the CPU of the workers, which carry out the requests of readers, and that of the whole
//! process, which also takes in the purges.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use it::support::client::{Connection, exchange, tag};
use it::support::fleet::{Fleet, Plan};

const PAGES: u64 = 100;
const TAGS_OF_A_PAGE: u64 = 30;
const READERS: u64 = 16;
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(4);
/// The clients that purge, and the time between two purges of each: 1,000 a second in all.
const SENDERS: u64 = 50;
const PACE: Duration = Duration::from_millis(50);

/// A fleet, with what was measured of it.
struct Contender {
    name: &'static str,
    fleet: Fleet,
    rounds: Vec<Round>,
}

/// The figures of one round.
struct Round {
    requests: u64,
    purges: u64,
    workers: Duration,
    process: Duration,
}

impl Contender {
    fn start(name: &'static str, config: &'static str, seals: bool) -> Self {
        let plan = Plan { varnish: 1, web: 1, config, first_start: "flush", ..Plan::default() };
        let fleet = Fleet::start(&plan);
        if seals {
            fleet.seals();
        }
        for page in 1..=PAGES {
            let tags: Vec<String> =
                (0..TAGS_OF_A_PAGE).map(|tag| format!("cat_p_{}", 50_000 + page * 7 + tag)).collect();
            fleet.shop.set_tags(page, &tags.join(","));
            fleet.warm(&format!("/p/{page}"));
        }
        Contender { name, fleet, rounds: Vec::new() }
    }

    /// Readers and senders of purges at once.
    fn round(&mut self, next: &AtomicU64) {
        let (before, began) = (self.cpu(), Instant::now());
        let (fleet, until) = (&self.fleet, began + ROUND);
        let (requests, purges) = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS).map(|reader| scope.spawn(move || read(fleet, reader, until))).collect();
            let senders: Vec<_> = (0..SENDERS).map(|_| scope.spawn(move || purge(fleet, next, until))).collect();
            let sum = |threads: Vec<std::thread::ScopedJoinHandle<'_, u64>>| {
                threads.into_iter().map(|thread| thread.join().expect("a client")).sum::<u64>()
            };
            (sum(readers), sum(senders))
        });
        let [workers, process] = std::array::from_fn(|which| self.cpu()[which] - before[which]);
        self.rounds.push(Round { requests, purges, workers, process });
    }

    /// The CPU time of the workers and of the whole process so far.
    fn cpu(&self) -> [Duration; 2] {
        let tasks = format!("/proc/{}/task", self.fleet.clearcoat.pid());
        let mut times = [Duration::ZERO; 2];
        for task in std::fs::read_dir(tasks).expect("a process").flatten() {
            let read = |name: &str| std::fs::read_to_string(task.path().join(name));
            // A thread that has ended meanwhile has neither.
            let (Ok(name), Ok(schedstat)) = (read("comm"), read("schedstat")) else { continue };
            let time = schedstat.split_whitespace().next().and_then(|time| time.parse().ok()).expect("nanoseconds");
            times[1] += Duration::from_nanos(time);
            if name.starts_with("worker-") {
                times[0] += Duration::from_nanos(time);
            }
        }
        times
    }

    /// The medians of its rounds: microseconds of the workers and of the process per request, requests/s, purges/s.
    fn figures(&self) -> [f64; 4] {
        let median = |of: fn(&Round) -> f64| {
            let mut values: Vec<f64> = self.rounds.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        [
            median(|round| round.workers.as_secs_f64() * 1e6 / round.requests as f64),
            median(|round| round.process.as_secs_f64() * 1e6 / round.requests as f64),
            median(|round| round.requests as f64 / ROUND.as_secs_f64()),
            median(|round| round.purges as f64 / ROUND.as_secs_f64()),
        ]
    }
}

/// Reads one page after the other on one connection. Returns their number.
fn read(fleet: &Fleet, reader: u64, until: Instant) -> u64 {
    let mut connection = Connection::open(fleet.clearcoat.edge).expect("the edge accepts");
    let mut count = 0;
    while Instant::now() < until {
        let page = 1 + (reader * 31 + count * 7) % PAGES;
        connection.send(request(page)).expect("a request");
        let answer = connection.answer(false).expect("an answer");
        assert_eq!((answer.status, answer.cache()), (200, "HIT"), "{answer:?}");
        count += 1;
    }
    count
}

/// A GET with the fields of a browser.
fn request(page: u64) -> String {
    format!(
        "GET /p/{page} HTTP/1.1\r\nHost: shop.test\r\n\
         User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n\
         Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
         Accept-Language: de-DE,de;q=0.8,en-US;q=0.5,en;q=0.3\r\n\
         Referer: https://shop.example.com/women/tops-women.html\r\n\
         Upgrade-Insecure-Requests: 1\r\nSec-Fetch-Dest: document\r\nSec-Fetch-Mode: navigate\r\n\
         Sec-Fetch-Site: same-origin\r\nConnection: keep-alive\r\n\r\n"
    )
}

/// Purges tags of no page, each after a while. Returns their number.
fn purge(fleet: &Fleet, next: &AtomicU64, until: Instant) -> u64 {
    let mut count = 0;
    let mut due = Instant::now();
    while due < until {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let pattern = tag(&format!("cat_p_{}", 1_000_000 + next.fetch_add(1, Ordering::Relaxed) % 20_000));
        let request = format!("PURGE / HTTP/1.1\r\nX-Magento-Tags-Pattern: {pattern}\r\nHost: 127.0.0.1\r\n\r\n");
        assert_eq!(exchange(fleet.clearcoat.purge, request).expect("an answer").status, 200);
        count += 1;
        due = (due + PACE).max(Instant::now());
    }
    count
}

fn main() {
    const SEALS: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n[runtime]\nworkers = 1\n";
    const NO_SEALS: &str = "[log]\nlevel = \"info\"\nformat = \"json\"\n[runtime]\nworkers = 1\n\
                            [edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n";
    let mut contenders =
        [Contender::start("edge.seal = false", NO_SEALS, false), Contender::start("edge.seal = true", SEALS, true)];
    let next = AtomicU64::new(0);
    for _ in 0..ROUNDS {
        contenders.iter_mut().for_each(|contender| contender.round(&next));
    }
    println!("CPU of clearcoat for a page of {TAGS_OF_A_PAGE} names, {READERS} readers, {ROUNDS} rounds of {ROUND:?}");
    println!("{:<20}{:>12}{:>8}{:>12}{:>8}{:>12}{:>10}", "", "workers", "", "process", "", "requests/s", "purges/s");
    let [base_workers, base_process, ..] = contenders[0].figures();
    for contender in &contenders {
        let [workers, process, requests, purges] = contender.figures();
        let (to_workers, to_process) = (workers / base_workers, process / base_process);
        println!(
            "{:<20}{workers:>9.1} us{to_workers:>8.2}{process:>9.1} us{to_process:>8.2}{requests:>12.0}{purges:>10.0}",
            contender.name
        );
    }
}
