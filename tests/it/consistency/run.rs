//! The shared state of one run's threads, and their findings.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use super::history::{History, Moment, Outages, Promise, Read, Verdict};
use crate::support::clearcoat::{Clearcoat, Log};

/// Findings of one kind that are reported in full; the rest is counted.
const TOLD: usize = 20;

/// A run in progress.
pub struct Run {
    began: Instant,
    pages: Vec<Mutex<History>>,
    /// Per clearcoat.
    outages: Vec<RwLock<Outages>>,
    /// When the disk of a journal was frozen: then purges may be refused, but not reads.
    freezes: RwLock<Outages>,
    hung: Vec<AtomicBool>,
    stop: AtomicBool,
    faults: Mutex<Vec<(Moment, String)>>,
    logs: Mutex<Vec<Log>>,
    /// Answers that the edge has judged, and those that were old, at clearcoats up to their end.
    judged: Mutex<[f64; 2]>,
    findings: Mutex<Findings>,
}

/// The violations found.
#[derive(Debug, Default)]
pub struct Findings {
    pub stale: Kind,
    pub refused: Kind,
    pub refused_purges: Kind,
    pub impossible: Kind,
}

/// Violations of one kind.
#[derive(Debug, Default)]
pub struct Kind {
    pub count: usize,
    pub told: Vec<String>,
}

impl Kind {
    fn add(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        if self.told.len() < TOLD {
            self.told.push(text());
        }
    }
}

/// The counts of a thread, and the sum of all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub reads: usize,
    pub hits: usize,
    pub slowest_read: Duration,
    /// Reads that took too long for an impatient reader.
    pub reloads: usize,
    /// Reads and purges that failed because clearcoat was killed.
    pub cut_off: usize,
    pub purges: usize,
    pub slowest_purge: Duration,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.reads += other.reads;
        self.hits += other.hits;
        self.slowest_read = self.slowest_read.max(other.slowest_read);
        self.reloads += other.reloads;
        self.cut_off += other.cut_off;
        self.purges += other.purges;
        self.slowest_purge = self.slowest_purge.max(other.slowest_purge);
    }
}

/// Ends a run when dropped, so that threads do not continue after a failed test.
pub struct StopGuard<'r>(pub &'r Run);

impl Drop for StopGuard<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
    }
}

impl Run {
    /// A run with the pages 1 to `pages` and these numbers of Varnish nodes and clearcoats; it begins now.
    pub fn new(pages: u64, nodes: usize, clearcoats: usize) -> Self {
        Run {
            began: Instant::now(),
            pages: (1..=pages).map(|page| Mutex::new(History::new(page))).collect(),
            outages: (0..clearcoats).map(|_| RwLock::default()).collect(),
            freezes: RwLock::default(),
            hung: (0..nodes).map(|_| AtomicBool::default()).collect(),
            stop: AtomicBool::new(false),
            faults: Mutex::default(),
            logs: Mutex::default(),
            judged: Mutex::default(),
            findings: Mutex::default(),
        }
    }

    /// Notes what a clearcoat has judged, which ends now.
    pub fn note_judged(&self, clearcoat: &Clearcoat) {
        let mut judged = self.judged.lock().unwrap();
        for (sum, metric) in judged.iter_mut().zip(["clearcoat_seal_checks_total", "clearcoat_stale_caught_total"]) {
            *sum += clearcoat.sum(metric);
        }
    }

    /// Answers that were judged, and those of them that were old: thrown away at the edge.
    pub fn judged(&self) -> [f64; 2] {
        *self.judged.lock().unwrap()
    }

    pub fn now(&self) -> Moment {
        self.began.elapsed()
    }

    pub fn is_over(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Accesses the history of a page.
    pub fn page<T>(&self, page: u64, look: impl FnOnce(&mut History) -> T) -> T {
        look(&mut self.pages[page as usize - 1].lock().unwrap())
    }

    pub fn pages(&self) -> std::ops::RangeInclusive<u64> {
        1..=self.pages.len() as u64
    }

    /// Records that a purge of these versions was answered. The time is taken under the lock, so that no read that
    /// began after it can be judged before the promise is recorded.
    pub fn promised(&self, versions: &[(u64, u64)], sent: Moment, answer: &str) {
        for &(page, number) in versions {
            self.page(page, |history| {
                let promise = Promise { number, sent, answered: self.now(), answer: answer.to_owned() };
                history.promise(promise);
            });
        }
    }

    /// The time of an instant since the run began.
    pub fn moment(&self, instant: Instant) -> Moment {
        instant.saturating_duration_since(self.began)
    }

    /// Judges a read of a page; `how` describes the read.
    pub fn seen(&self, page: u64, read: Read, how: impl Fn() -> String) {
        self.page(page, |history| match history.judge(read) {
            Verdict::Fine => {}
            Verdict::Stale(promise) => {
                self.findings.lock().unwrap().stale.add(|| format!("page {page}: {read} {}, but {promise}", how()));
            }
            Verdict::Impossible => self
                .findings
                .lock()
                .unwrap()
                .impossible
                .add(|| format!("page {page}: {read} {}, but the last was {}", how(), history.latest())),
        });
    }

    /// A read failed, on a connection to this clearcoat opened at `opened`. Returns whether a kill of that clearcoat
    /// explains it.
    pub fn read_failed(&self, clearcoat: usize, opened: Moment, what: impl FnOnce() -> String) -> bool {
        self.failed(clearcoat, opened, what, |findings| &mut findings.refused)
    }

    /// The same for a purge.
    pub fn purge_failed(&self, clearcoat: usize, opened: Moment, what: impl FnOnce() -> String) -> bool {
        if self.freezes.read().unwrap().explain(opened, self.now()) {
            return true;
        }
        self.failed(clearcoat, opened, what, |findings| &mut findings.refused_purges)
    }

    fn failed(
        &self,
        clearcoat: usize,
        opened: Moment,
        what: impl FnOnce() -> String,
        kind: fn(&mut Findings) -> &mut Kind,
    ) -> bool {
        let failed = self.now();
        let explained = self.outages[clearcoat].read().unwrap().explain(opened, failed);
        if !explained {
            let text = || format!("opened at {opened:?}, failed at {failed:?}: {}", what());
            kind(&mut self.findings.lock().unwrap()).add(text);
        }
        explained
    }

    /// Whether this clearcoat ran from `from` until now.
    pub fn was_alive_since(&self, clearcoat: usize, from: Moment) -> bool {
        let now = self.now();
        let was_away = self.outages[clearcoat].read().unwrap().explain(from, now);
        !was_away && !self.freezes.read().unwrap().explain(from, now)
    }

    /// Call before a clearcoat is killed.
    pub fn outage_begins(&self, clearcoat: usize) {
        let mut outages = self.outages[clearcoat].write().unwrap();
        outages.begin(self.now());
    }

    /// Call after it has reported ready.
    pub fn outage_ends(&self, clearcoat: usize) {
        let mut outages = self.outages[clearcoat].write().unwrap();
        outages.end(self.now());
    }

    /// Call before a disk is frozen.
    pub fn freeze_begins(&self) {
        self.freezes.write().unwrap().begin(self.now());
    }

    /// Call after it was thawed and clearcoat has reported ready.
    pub fn freeze_ends(&self) {
        self.freezes.write().unwrap().end(self.now());
    }

    pub fn set_hung(&self, node: usize, hung: bool) {
        self.hung[node].store(hung, Ordering::SeqCst);
    }

    pub fn is_hung(&self, node: usize) -> bool {
        self.hung[node].load(Ordering::SeqCst)
    }

    /// Records an action of the fault injector.
    pub fn happened(&self, what: String) {
        self.faults.lock().unwrap().push((self.now(), what));
    }

    /// Keeps the log of a clearcoat that is about to be killed.
    pub fn keep_log(&self, log: Log) {
        self.logs.lock().unwrap().push(log);
    }

    /// The number of executed acts whose name starts with `name`.
    pub fn faults(&self, name: &str) -> usize {
        let faults = self.faults.lock().unwrap();
        faults.iter().filter(|(_, what)| what.starts_with(name) && what.ends_with("done")).count()
    }

    pub fn findings(self) -> (Findings, Chronicle) {
        let findings = self.findings.into_inner().unwrap();
        let logs = self.logs.into_inner().unwrap().iter().map(Log::text).collect();
        (findings, Chronicle { faults: self.faults.into_inner().unwrap(), logs })
    }
}

/// The event log, for debugging.
pub struct Chronicle {
    faults: Vec<(Moment, String)>,
    /// The logs of the clearcoats that were killed.
    logs: Vec<String>,
}

impl std::fmt::Display for Chronicle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "faults:")?;
        for (at, what) in &self.faults {
            writeln!(f, "  {at:?} {what}")?;
        }
        for (life, log) in self.logs.iter().enumerate() {
            writeln!(f, "log of clearcoat until it was killed for time {}:\n{log}", life + 1)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Findings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kinds = [
            ("stale", &self.stale),
            ("refused", &self.refused),
            ("refused purges", &self.refused_purges),
            ("impossible", &self.impossible),
        ];
        for (name, kind) in kinds.into_iter().filter(|(_, kind)| kind.count > 0) {
            writeln!(f, "{name}, the first {} of {}:", kind.told.len(), kind.count)?;
            kind.told.iter().try_for_each(|text| writeln!(f, "  {text}"))?;
        }
        Ok(())
    }
}
