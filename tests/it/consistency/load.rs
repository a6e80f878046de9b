//! The writers and readers of a run.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use fastrand::Rng;

use super::history::{Moment, Read};
use super::run::{Run, Tally};
use crate::support::PATIENCE;
use crate::support::client::{Answer, Connection, exchange, purge, tag};
use crate::support::web::Shop;

/// The pauses of the clients, in ms at most: the load of a busy shop, not the most that two cores can handle.
const READER_RESTS: u64 = 5;
const WRITER_RESTS: u64 = 40;

/// Every other reader reloads a page that takes longer than this. So the readers that wait for a Varnish when it
/// resumes have not all been waiting since before the purges that it missed.
const RELOAD_AFTER: Duration = Duration::from_millis(400);

/// A pause after a failure, so that clients do not storm a restarting clearcoat.
const AFTER_FAILURE: Duration = Duration::from_millis(5);

/// How purges are sent to the Varnish nodes.
#[derive(Clone)]
pub enum Purging {
    /// Through the purge listener of a clearcoat, by its index.
    Clearcoat(usize, SocketAddr),
    /// As Magento does without clearcoat: node by node, the status ignored, failures forgotten. A hung node refuses
    /// connections. (Those accepted by its kernel while it is stopped would be read and obeyed after it resumes: that
    /// only shortens the time in which it serves the old page.)
    OneByOne(Vec<SocketAddr>),
}

/// Three of four reads and changes go to a sixth of the pages. These hot ones constantly collide with their purges, and
/// recover from any error with the next purge; the cold ones keep an old version for long if their purge was lost.
fn some_page(random: &mut Rng, pages: &[u64]) -> u64 {
    let some = if random.u8(..4) > 0 { &pages[..pages.len() / 6] } else { pages };
    *random.choice(some).expect("pages")
}

/// Changes pages and purges them until the run is over.
pub fn write(run: &Run, shop: &Shop, purging: &Purging, pages: &[u64], seed: u64) -> Tally {
    let mut random = Rng::with_seed(seed);
    let mut tally = Tally::default();
    while !run.is_over() {
        // Usually one product is saved; sometimes a few change together, in one purge.
        let together = if random.u8(..5) == 0 { 3 } else { 1 };
        let changed: BTreeSet<u64> = (0..together).map(|_| some_page(&mut random, pages)).collect();
        let versions: Vec<(u64, u64)> = changed
            .into_iter()
            .map(|page| {
                let (number, content) = run.page(page, |history| (history.change(), history.latest()));
                shop.set(page, content);
                (page, number)
            })
            .collect();
        let tags: Vec<String> = versions.iter().map(|(page, _)| tag(&format!("cat_p_{page}"))).collect();
        tally += purge_until_answered(run, purging, &versions, &tags.join("|"));
        std::thread::sleep(Duration::from_millis(random.u64(1..=WRITER_RESTS)));
    }
    tally
}

/// Repeats a purge until it is answered: one that was only appended to the journal when clearcoat was killed promises
/// nothing yet, and must do no harm either.
fn purge_until_answered(run: &Run, purging: &Purging, versions: &[(u64, u64)], pattern: &str) -> Tally {
    let mut tally = Tally::default();
    let first = run.now();
    // Counted once, however often the purge is repeated.
    let mut was_refused = false;
    loop {
        let sent = run.now();
        let (clearcoat, answer) = match purging {
            Purging::Clearcoat(number, address) => {
                (*number, purge(*address, pattern).map_err(|error| error.to_string()))
            }
            Purging::OneByOne(nodes) => (0, Ok(purge_one_by_one(run, nodes, pattern))),
        };
        let failure = match answer {
            Ok(answer) if answer.status == 200 => {
                run.promised(versions, sent, answer.text());
                tally.purges += 1;
                if run.was_alive_since(clearcoat, sent) {
                    tally.slowest_purge = run.now() - sent;
                }
                return tally;
            }
            Ok(answer) => format!("{} {}", answer.status, answer.text()),
            Err(error) => error,
        };
        if !was_refused {
            was_refused = !run.purge_failed(clearcoat, sent, || format!("purge of {versions:?}: {failure}"));
            tally.cut_off += usize::from(!was_refused);
        }
        assert!(run.now() - first < PATIENCE, "a purge was not answered for {PATIENCE:?}: {failure}");
        std::thread::sleep(AFTER_FAILURE);
    }
}

/// Sends abnormal purges every few seconds until the run is over: requests that a node pipes and closes on, fails,
/// answers and closes, or refuses to read. Their outcome is not judged here; that of all other purges is.
pub fn poison(run: &Run, purging: &[Purging], seed: u64) -> usize {
    let mut random = Rng::with_seed(seed);
    let mut sent = 0;
    while !run.is_over() {
        if let Purging::Clearcoat(_, address) = random.choice(purging).expect("somebody to send to") {
            let long = "x".repeat(random.usize(9_000..14_000));
            let request = random.choice([
                "BAN /poison/piped HTTP/1.1\r\nHost: shop.test\r\nX-Ban-Url: /p/1\r\n\r\n".to_owned(),
                "BAN /poison/503 HTTP/1.1\r\nHost: shop.test\r\nX-Ban-Url: /p/2\r\n\r\n".to_owned(),
                "PURGE /poison/503 HTTP/1.1\r\nHost: shop.test\r\n\r\n".to_owned(),
                "PURGE /poison/fail HTTP/1.1\r\nHost: shop.test\r\n\r\n".to_owned(),
                "PURGE /poison/closed HTTP/1.1\r\nHost: shop.test\r\n\r\n".to_owned(),
                format!("BAN /poison/long HTTP/1.1\r\nHost: shop.test\r\nX-Long: {long}\r\n\r\n"),
            ]);
            // Two at once are sent to a node in one batch.
            let request = request.expect("one of them");
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    // A clearcoat killed meanwhile gives no answer.
                    scope.spawn(|| _ = exchange(*address, &request));
                }
            });
            sent += 2;
        }
        let next = run.now() + Duration::from_millis(random.u64(1500..3500));
        while run.now() < next && !run.is_over() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    sent
}

fn purge_one_by_one(run: &Run, nodes: &[SocketAddr], pattern: &str) -> Answer {
    for (index, &node) in nodes.iter().enumerate() {
        if !run.is_hung(index) {
            // Magento ignores both errors and the status.
            _ = purge(node, pattern);
        }
    }
    Answer { status: 200, head: String::new(), body: b"who knows".to_vec(), trailers: String::new() }
}

/// Reads random pages until the run is over, through the edge of one of the clearcoats.
pub fn read(run: &Run, number: usize, shop: &Shop, edges: &[SocketAddr], seed: u64) -> Tally {
    let mut random = Rng::with_seed(seed);
    let pages: Vec<u64> = run.pages().collect();
    // In pairs, so that each clearcoat has both kinds of readers.
    let clearcoat = number / 2 % edges.len();
    let edge = edges[clearcoat];
    let mut reader = Reader { run, number, clearcoat, shop, edge, connection: None, tally: Tally::default() };
    while !run.is_over() {
        if random.u8(..20) == 0 {
            reader.connection = None;
        }
        let page = some_page(&mut random, &pages);
        while !reader.read(page) && !run.is_over() {}
        std::thread::sleep(Duration::from_micros(random.u64(..READER_RESTS * 1000)));
    }
    reader.tally
}

struct Reader<'r> {
    run: &'r Run,
    number: usize,
    clearcoat: usize,
    shop: &'r Shop,
    edge: SocketAddr,
    connection: Option<Kept>,
    tally: Tally,
}

struct Kept {
    connection: Connection,
    opened: Moment,
    requests: usize,
}

impl Reader<'_> {
    /// Reads a page; returns whether it arrived.
    fn read(&mut self, page: u64) -> bool {
        let opening = self.connection.as_ref().map_or_else(|| self.run.now(), |kept| kept.opened);
        let result = self.get(page, opening);
        let failure = match result {
            Ok((began, answer)) if answer.status == 200 => {
                self.judge(page, (began, self.run.now()), &answer);
                return true;
            }
            Err(error) if self.reloads() && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                self.connection = None;
                self.tally.reloads += 1;
                return false;
            }
            Ok((_, answer)) => format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body)),
            Err(error) => error.to_string(),
        };
        let requests = self.connection.take().map_or(0, |kept| kept.requests);
        let what = || format!("request {requests} of its connection, page {page}: {failure}");
        self.tally.cut_off += usize::from(self.run.read_failed(self.clearcoat, opening, what));
        std::thread::sleep(AFTER_FAILURE);
        false
    }

    fn reloads(&self) -> bool {
        self.number % 2 == 1
    }

    /// One request, on the kept connection if there is one, with the time before it was sent.
    fn get(&mut self, page: u64, opened: Moment) -> io::Result<(Moment, Answer)> {
        if self.connection.is_none() {
            let connection = Connection::open(self.edge)?;
            let patience = if self.reloads() { RELOAD_AFTER } else { PATIENCE };
            connection.stream.set_read_timeout(Some(patience))?;
            self.connection = Some(Kept { connection, opened, requests: 0 });
        }
        let kept = self.connection.as_mut().expect("one was opened");
        kept.requests += 1;
        let began = self.run.now();
        kept.connection.send(format!("GET /p/{page} HTTP/1.1\r\nHost: shop.test\r\n\r\n"))?;
        Ok((began, kept.connection.answer(false)?))
    }

    fn judge(&mut self, page: u64, (began, ended): (Moment, Moment), answer: &Answer) {
        self.tally.reads += 1;
        self.tally.hits += usize::from(answer.cache() == "HIT");
        self.tally.slowest_read = self.tally.slowest_read.max(ended - began);
        let content = answer.text().parse().expect("the content of a page");
        self.run.seen(page, Read { began, ended, content }, || {
            let rendered = self.shop.last_rendered(page, content).map(|at| self.run.moment(at));
            format!("as a {}, last rendered at {rendered:?}", answer.cache())
        });
        if answer.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.connection = None;
        }
    }
}
