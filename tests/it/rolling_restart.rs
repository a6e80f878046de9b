//! Two clearcoats are restarted one after the other, by SIGTERM, in front of real Varnish that fetch through both: no read, no
//! order and no upload is refused or cut. Clients ask those that are ready, as behind a balancer.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::client::{Connection, exchange, get};
use crate::support::fleet::{Fleet, Plan};
use crate::support::{eventually, say};

/// Each upload takes this many times a tenth of a second.
const PIECES: usize = 50;

/// The clients, and the balancer that tells them whom to ask.
struct Clients {
    /// Edge and admin listener of each clearcoat.
    clearcoats: Vec<(SocketAddr, SocketAddr)>,
    ready: Vec<AtomicBool>,
    stop: AtomicBool,
    reads: AtomicU64,
    orders: AtomicU64,
    uploads: AtomicU64,
}

impl Clients {
    fn of(fleet: &Fleet) -> Self {
        let clearcoats: Vec<_> = fleet.clearcoats().map(|clearcoat| (clearcoat.edge, clearcoat.admin)).collect();
        let ready = clearcoats.iter().map(|_| AtomicBool::new(true)).collect();
        let (reads, orders, uploads) = Default::default();
        Clients { clearcoats, ready, stop: AtomicBool::new(false), reads, orders, uploads }
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// What a balancer does: it asks each clearcoat whether it is ready, ten times in its `shutdown.leave`.
    fn balance(&self) {
        while !self.is_over() {
            for ((_, admin), ready) in self.clearcoats.iter().zip(&self.ready) {
                ready.store(get(*admin, "/readyz").is_ok_and(|answer| answer.status == 200), Ordering::SeqCst);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The edge of a clearcoat that is ready, in turn.
    fn edge(&self, turn: u64) -> SocketAddr {
        let ready = |number: &usize| self.ready[*number].load(Ordering::SeqCst);
        let count = self.clearcoats.len();
        let turns = (0..count).map(|next| (usize::try_from(turn).expect("a number") + next) % count);
        self.clearcoats[turns.into_iter().find(ready).expect("a clearcoat is ready")].0
    }

    /// Reads and sends orders in turn, each on a new connection: pages that a cache has, pages that it has to fetch, and what is
    /// sent on as it is.
    fn browse(&self) {
        for turn in 0.. {
            if self.is_over() {
                return;
            }
            let began = Instant::now();
            let page = get(self.edge(turn), &format!("/p/{}?{}", turn % 7, turn % 100)).expect("a page");
            assert_eq!(page.status, 200, "{page:?}");
            self.reads.fetch_add(1, Ordering::SeqCst);
            let order = "POST /upload HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 5\r\n\r\norder";
            let answer = exchange(self.edge(turn + 1), order).expect("an answer to an order");
            assert_eq!((answer.status, answer.text()), (200, "5"), "{answer:?}");
            self.orders.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20).saturating_sub(began.elapsed()));
        }
    }

    /// Uploads slowly, again and again.
    fn upload(&self, first: u64) {
        for turn in first.. {
            if self.is_over() {
                return;
            }
            let mut client = Connection::open(self.edge(turn)).expect("a connection for an upload");
            let head = format!("POST /upload HTTP/1.1\r\nHost: shop.test\r\nContent-Length: {}\r\n\r\n", PIECES * 100);
            client.send(head).expect("sent");
            for _ in 0..PIECES {
                client.stream.write_all(&[b'x'; 100]).expect("an upload goes on");
                std::thread::sleep(Duration::from_millis(100));
            }
            let answer = client.answer(false).expect("an answer to an upload");
            assert_eq!((answer.status, answer.text()), (200, (PIECES * 100).to_string().as_str()), "{answer:?}");
            self.uploads.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn done(&self) -> [u64; 3] {
        [&self.reads, &self.orders, &self.uploads].map(|count| count.load(Ordering::SeqCst))
    }
}

/// Ends the clients, also when the test fails.
struct StopsAtTheEnd<'c>(&'c AtomicBool);

impl Drop for StopsAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_rolling_restart_refuses_nobody_and_cuts_no_upload() {
    let mut fleet = Fleet::start(&Plan {
        varnish: 2,
        replicas: 2,
        config: "[shutdown]\nleave = \"1s\"\ndrain = \"30s\"\n",
        ..Plan::default()
    });
    let clients = &Clients::of(&fleet);
    std::thread::scope(|scope| {
        let _stops = StopsAtTheEnd(&clients.stop);
        scope.spawn(|| clients.balance());
        let mut busy = vec![scope.spawn(|| clients.browse()), scope.spawn(|| clients.browse())];
        busy.extend((0..4).map(|first| scope.spawn(move || clients.upload(first))));
        let goes_on = || {
            let before = clients.done();
            eventually("there is traffic", || {
                let moved = clients.done().iter().zip(before).all(|(now, before)| *now > before);
                (moved || busy.iter().any(|client| client.is_finished())).then_some(())
            });
        };
        for number in [0, 1] {
            goes_on();
            fleet.replica(number).end();
            assert!(!fleet.replica(number).log().has("are cut"), "{}", fleet.replica(number).log().text());
            // Its Varnish nodes have taken it out before it closed.
            goes_on();
            fleet.replica(number).restart();
            fleet.replica(number).ready();
            fleet.know_each_other();
            fleet.origins_are_up();
        }
        goes_on();
        clients.stop.store(true, Ordering::SeqCst);
        busy.into_iter().for_each(|client| client.join().expect("nobody was refused or cut"));
    });
    let [reads, orders, uploads] = clients.done();
    say(&format!("2 restarts: {reads} reads, {orders} orders and {uploads} uploads of 5 s, none refused or cut"));
}
