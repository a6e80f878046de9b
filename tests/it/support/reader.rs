//! A client that reads continuously while something happens to the fleet.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::client::get;

/// Reads pages through the edge, one at a time, each on a new connection, until [`Reader::stop`].
///
/// An answer is bad if its status is not 200, or if the page is older than the version promised when the request began.
pub struct Reader {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    promised: AtomicU64,
    reads: AtomicU64,
    bad: std::sync::Mutex<Vec<String>>,
}

/// Whether a reader may meet a closed port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// Never: clearcoat runs all the time.
    None,
    /// Until the edge is open; never again after the first answer.
    AtFirst,
}

impl Reader {
    /// Reads `/p/1` to `/p/<pages>` repeatedly.
    pub fn start(edge: SocketAddr, pages: u64, outage: Outage) -> Self {
        let state = Arc::<State>::default();
        let of_thread = Arc::clone(&state);
        let thread = std::thread::spawn(move || of_thread.read(edge, pages, outage));
        Reader { state, thread: Some(thread) }
    }

    /// Every page has this version or a later one from now on: call it after the answer to a purge.
    pub fn promise(&self, version: u64) {
        self.state.promised.store(version, Ordering::SeqCst);
    }

    /// The number of good answers.
    pub fn reads(&self) -> u64 {
        self.state.reads.load(Ordering::SeqCst)
    }

    /// Stops it. Fails the test if an answer was bad.
    pub fn stop(mut self) {
        self.end();
        let bad = self.state.bad.lock().unwrap();
        assert!(
            bad.is_empty(),
            "{} bad answers and {} good ones: {:#?}",
            bad.len(),
            self.reads(),
            &bad[..bad.len().min(5)]
        );
    }

    fn end(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking(), "a reader panicked");
        }
    }
}

impl State {
    fn read(&self, edge: SocketAddr, pages: u64, outage: Outage) {
        let mut may_fail = outage == Outage::AtFirst;
        for number in (1..=pages).cycle() {
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // A pace that leaves the machine to the code under test.
            std::thread::sleep(Duration::from_millis(1));
            let promised = self.promised.load(Ordering::SeqCst);
            let path = format!("/p/{number}");
            let bad = match get(edge, &path) {
                Ok(answer) => {
                    may_fail = false;
                    let fresh = answer.text().parse().is_ok_and(|version: u64| version >= promised);
                    (answer.status != 200 || !fresh).then(|| format!("{path}, promised {promised}: {answer:?}"))
                }
                Err(_) if may_fail => continue,
                Err(error) => Some(format!("{path}: {error}")),
            };
            match bad {
                Some(bad) => self.bad.lock().unwrap().push(bad),
                None => _ = self.reads.fetch_add(1, Ordering::SeqCst),
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end();
    }
}
