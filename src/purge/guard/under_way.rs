//! Answers under way to a Varnish: from the moment their head passes the guard until the kernel of the Varnish has
//! acknowledged their last byte.
//!
//! **Why order and not time.** A page whose bytes are still in a socket buffer of ours, or lost and retransmitted, is
//! stored after any ban that arrives meanwhile, and no constant bounds that time. So an acknowledgement of a purge
//! counts only when no answer that the purge concerns is under way any more.
//!
//! **What proves that an answer has arrived**, from the cheapest to the most expensive:
//! - The next request on the same connection: Varnish sends it only after it has read the previous answer, and never
//!   pipelines. Costs nothing.
//! - The kernel's count of acknowledged bytes ([`Wire`]). Costs system calls, so it is read only if a purge concerns an
//!   answer that was written and is not known to have arrived.
//!
//! **What it costs.** An answer records its names at its own connection, without contention, and counts itself at their
//! slots ([`Passed`]). A purge checks the slots of its own names, and the connections only if one of them is not 0.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use slab::Slab;

use super::Page;
use super::passed::Passed;

/// An answer with more names than this counts as one that any purge may concern, so that a connection's record is
/// bounded, at 16 KiB.
const MOST_NAMES: usize = 2048;

/// From this number of closed connections with answers possibly under way, they are checked without waiting for a
/// purge.
const MANY_CLOSED: usize = 64;

/// The most addresses recorded as having fetched pages: enough for all Varnish nodes, and some strangers.
const MOST_FETCHERS: usize = 4096;

/// The kernel's time since an acknowledgement is counted in ticks of up to this.
const TICK: Duration = Duration::from_millis(10);

/// How long a purge waits for an answer that is still being written to a Varnish. The Varnish is behind the fence
/// meanwhile, so the wait must end: an answer without an end is cut, and Varnish stores no part of it.
pub(super) const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketPair {
    /// Our end.
    pub ours: SocketAddr,
    /// The Varnish's end.
    pub theirs: SocketAddr,
}

/// The state of the bytes that were written to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SentBytes {
    /// The other end has not acknowledged all of them.
    Waiting,
    /// All are acknowledged; the last acknowledgement came this long ago.
    Arrived(Duration),
    /// The connection no longer exists: all bytes arrived, or the rest never will.
    Closed,
    /// The system does not say.
    Unknown,
}

/// Reports the state of sent bytes.
pub trait Wire: Send + Sync {
    /// The state of all bytes written to this connection so far.
    fn sent(&self, ends: SocketPair) -> SentBytes;
}

/// A [`Wire`] without information.
pub(super) struct Untold;

impl Wire for Untold {
    fn sent(&self, _ends: SocketPair) -> SentBytes {
        SentBytes::Unknown
    }
}

/// The times of a query, in ms.
#[derive(Clone, Copy)]
pub(super) struct Moments {
    /// Answers that passed later are ignored.
    pub(super) noted: u64,
    pub(super) now: u64,
}

/// The answers that may be under way on one connection.
#[derive(Debug, Default)]
struct ConnectionAnswers {
    /// The hashes of their names. There are several answers if a client pipelines.
    names: Vec<u64>,
    /// One of them has tags.
    tagged: bool,
    /// One of them has a pool.
    pooled: bool,
    /// One of them has unknown names, or too many.
    nameless: bool,
    /// There is at least one.
    any: bool,
    /// When the first of them passed, in ms.
    passed: u64,
    /// When a purge first waited for it while it was being written, in ms.
    awaited: Option<u64>,
    /// When the last byte of the last answer was written, in ms.
    written: Option<u64>,
    /// The connection was closed.
    closed: bool,
    /// The writing task, woken if the answer is to be cut.
    writer: Option<Waker>,
    /// Changes with every answer written.
    turn: u64,
}

/// The properties of an answer that purges match.
#[derive(Clone, Copy)]
pub(super) struct Kinds {
    /// Has a tag header, even an empty one.
    pub(super) tagged: bool,
    /// Has a pool.
    pub(super) pooled: bool,
    /// Has unknown names.
    pub(super) nameless: bool,
}

/// The guard's record of one connection.
struct VarnishConnection {
    ends: SocketPair,
    answers: Mutex<ConnectionAnswers>,
    /// A purge has waited too long for the current answer.
    to_be_cut: AtomicBool,
    /// A page was passed on this connection.
    has_fetched: AtomicBool,
}

impl VarnishConnection {
    fn lock(&self) -> MutexGuard<'_, ConnectionAnswers> {
        self.answers.lock()
    }
}

/// The answers that a purge concerns.
pub(super) enum Wanted {
    /// Answers with one of these names, sorted.
    Names(Vec<u64>),
    /// Answers with tags.
    Tagged,
    /// Answers with a pool.
    Pooled,
    /// Any answer.
    Any,
}

impl Wanted {
    fn concerns(&self, answers: &ConnectionAnswers, noted: u64) -> bool {
        answers.any
            && answers.passed <= noted
            && match self {
                Wanted::Names(names) => {
                    answers.nameless || answers.names.iter().any(|name| names.binary_search(name).is_ok())
                }
                Wanted::Tagged => answers.nameless || answers.tagged,
                Wanted::Pooled => answers.nameless || answers.pooled,
                Wanted::Any => true,
            }
    }
}

/// All connections that may have an answer under way.
#[derive(Default)]
pub(super) struct UnderWay {
    connections: Mutex<Slab<Arc<VarnishConnection>>>,
    /// The addresses that pages were passed to.
    fetchers: Mutex<BTreeSet<IpAddr>>,
    any: AtomicU32,
    tagged: AtomicU32,
    pooled: AtomicU32,
    nameless: AtomicU32,
    closed: AtomicU32,
}

impl UnderWay {
    fn connections(&self) -> MutexGuard<'_, Slab<Arc<VarnishConnection>>> {
        self.connections.lock()
    }

    fn fetchers(&self) -> MutexGuard<'_, BTreeSet<IpAddr>> {
        self.fetchers.lock()
    }

    /// Whether a page was passed to this address, as far as is known.
    pub(super) fn has_fetched(&self, address: IpAddr) -> bool {
        self.fetchers().contains(&address)
    }

    /// Records that a page is passed to this address.
    fn fetches(&self, address: IpAddr) {
        let mut fetchers = self.fetchers();
        if fetchers.len() < MOST_FETCHERS {
            fetchers.insert(address);
        }
    }

    /// Whether the counters allow for a wanted answer. A `false` is never wrong.
    fn may_have(&self, wanted: &Wanted, passed: &Passed) -> bool {
        let counted = |count: &AtomicU32| count.load(Ordering::Acquire) > 0;
        match wanted {
            Wanted::Names(names) => counted(&self.nameless) || names.iter().any(|&name| passed.is_open(name)),
            Wanted::Tagged => counted(&self.tagged) || counted(&self.nameless),
            Wanted::Pooled => counted(&self.pooled) || counted(&self.nameless),
            Wanted::Any => counted(&self.any),
        }
    }

    /// Whether a wanted answer is under way to a Varnish that may have this address. An answer found to have arrived is
    /// stamped with its arrival time before it stops counting.
    pub(super) fn has(
        &self,
        wanted: &Wanted,
        to: impl Fn(IpAddr) -> bool,
        moments: Moments,
        (passed, wire): (&Passed, &dyn Wire),
    ) -> bool {
        if !self.may_have(wanted, passed) {
            return false;
        }
        let concerned: Vec<_> = {
            let connections = self.connections();
            let concerned = connections.iter().filter(|(_, connection)| {
                to(connection.ends.theirs.ip().to_canonical()) && wanted.concerns(&connection.lock(), moments.noted)
            });
            concerned.map(|(key, connection)| (key, Arc::clone(connection))).collect()
        };
        // No early exit: every arrival found here saves the next purge a check.
        let now = moments.now;
        let left = concerned.iter().filter(|(key, connection)| !self.has_arrived(*key, connection, now, passed, wire));
        left.count() > 0
    }

    /// Checks a connection that may have an answer under way.
    fn has_arrived(
        &self,
        key: usize,
        connection: &VarnishConnection,
        now: u64,
        passed: &Passed,
        wire: &dyn Wire,
    ) -> bool {
        let (turn, written) = {
            let mut answers = connection.lock();
            if !answers.any {
                return true;
            }
            if answers.written.is_none() {
                let awaited = *answers.awaited.get_or_insert(now);
                if now.saturating_sub(awaited) >= milliseconds(LONGEST_WAIT) {
                    connection.to_be_cut.store(true, Ordering::Relaxed);
                    // Its node may stay silent forever: nothing else would wake the task.
                    if let Some(writer) = answers.writer.take() {
                        writer.wake();
                    }
                }
            }
            (answers.turn, answers.written)
        };
        let Some(written) = written else { return false };
        let arrived = match wire.sent(connection.ends) {
            SentBytes::Waiting => return false,
            SentBytes::Arrived(ago) => now.saturating_sub(milliseconds(ago.saturating_sub(TICK))).max(written),
            SentBytes::Closed => now,
            // The same as without a wire.
            SentBytes::Unknown => written,
        };
        let mut answers = connection.lock();
        // Another answer was written meanwhile.
        if answers.turn != turn {
            return !answers.any;
        }
        self.end(&mut answers, passed, Some(arrived));
        if answers.closed {
            self.closed.fetch_sub(1, Ordering::Relaxed);
            drop(answers);
            self.connections().try_remove(key);
        }
        true
    }

    /// Nothing is under way on the connection any more; the answers arrived at this time, or will not be stored.
    fn end(&self, answers: &mut ConnectionAnswers, passed: &Passed, arrived: Option<u64>) {
        if !std::mem::take(&mut answers.any) {
            return;
        }
        if let Some(at) = arrived {
            passed.stamp_any(at);
            if answers.nameless {
                passed.stamp_nameless(at);
            }
            answers.names.iter().for_each(|&name| passed.stamp(name, at));
        }
        // After the stamps: a thread that does not find the answer here finds its stamps.
        answers.names.iter().for_each(|&name| passed.close(name));
        answers.names = Vec::new();
        let ConnectionAnswers { tagged, pooled, nameless, .. } = answers;
        for (had, count) in [(tagged, &self.tagged), (pooled, &self.pooled), (nameless, &self.nameless)] {
            if std::mem::take(had) {
                count.fetch_sub(1, Ordering::Release);
            }
        }
        self.any.fetch_sub(1, Ordering::Release);
        (answers.written, answers.awaited) = (None, None);
        answers.turn += 1;
    }

    /// Checks the closed connections if there are many.
    fn tidy(&self, now: u64, passed: &Passed, wire: &dyn Wire) {
        if self.closed.load(Ordering::Relaxed) as usize % MANY_CLOSED != MANY_CLOSED - 1 {
            return;
        }
        let closed: Vec<_> = {
            let connections = self.connections();
            let closed = connections.iter().filter(|(_, connection)| connection.lock().closed);
            closed.map(|(key, connection)| (key, Arc::clone(connection))).collect()
        };
        closed.iter().for_each(|(key, connection)| _ = self.has_arrived(*key, connection, now, passed, wire));
    }
}

/// A Varnish's connection to the origin listener, for the task that writes to it. Dropped when the connection is
/// closed.
pub struct Passage {
    guard: Arc<super::Guard>,
    key: usize,
    connection: Arc<VarnishConnection>,
}

impl Passage {
    pub(super) fn open(guard: Arc<super::Guard>, ends: SocketPair) -> Self {
        let connection = Arc::new(VarnishConnection {
            ends,
            answers: Mutex::default(),
            to_be_cut: AtomicBool::new(false),
            has_fetched: AtomicBool::new(false),
        });
        let key = guard.under_way.connections().insert(Arc::clone(&connection));
        Passage { guard, key, connection }
    }

    /// Whether Varnish may store this answer: see [`Guard::may_be_stored`](super::Guard::may_be_stored). It is about to
    /// be written here; call [`Passage::written`] afterwards.
    pub fn may_be_stored<'a, F>(&self, began: u64, page: &Page<'a, F>, at: Instant) -> bool
    where
        F: Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    {
        self.guard.passes(began, page, at, Some(self))
    }

    /// Begins an answer with these names. Returns whether it is the only one that may be under way here.
    pub(super) fn begin(&self, names: impl Iterator<Item = u64>, kinds: Kinds, at: u64) -> bool {
        let super::Guard { under_way, passed, .. } = &*self.guard;
        if !self.connection.has_fetched.swap(true, Ordering::Relaxed) {
            under_way.fetches(self.connection.ends.theirs.ip().to_canonical());
        }
        let mut answers = self.connection.lock();
        let known = answers.names.len();
        let is_new = !std::mem::replace(&mut answers.any, true);
        answers.names.extend(names.take(MOST_NAMES + 1));
        let too_many = answers.names.len() > MOST_NAMES;
        answers.names.truncate(MOST_NAMES);
        answers.names.iter().skip(known).for_each(|&name| passed.open(name));
        let Kinds { tagged, pooled, nameless } = kinds;
        let ConnectionAnswers { tagged: had_tagged, pooled: had_pooled, nameless: had_nameless, .. } = &mut *answers;
        for (has, had, count) in [
            (tagged, had_tagged, &under_way.tagged),
            (pooled, had_pooled, &under_way.pooled),
            (nameless || too_many, had_nameless, &under_way.nameless),
        ] {
            if has && !std::mem::replace(had, true) {
                count.fetch_add(1, Ordering::Release);
            }
        }
        if is_new {
            answers.passed = at;
            under_way.any.fetch_add(1, Ordering::Release);
        }
        // The wait of a purge starts anew, however long the last answer took.
        (answers.written, answers.awaited) = (None, None);
        self.connection.to_be_cut.store(false, Ordering::Relaxed);
        answers.turn += 1;
        is_new
    }

    /// Forgets the only answer begun, which will not be stored.
    pub(super) fn forget(&self) {
        self.guard.under_way.end(&mut self.connection.lock(), &self.guard.passed, None);
    }

    /// Whether a purge has waited too long for the current answer.
    pub fn is_to_be_cut(&self) -> bool {
        self.connection.to_be_cut.load(Ordering::Relaxed)
    }

    /// Ready when a purge has waited too long for the current answer.
    pub fn poll_to_be_cut(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut answers = self.connection.lock();
        if self.is_to_be_cut() {
            return Poll::Ready(());
        }
        if !answers.writer.as_ref().is_some_and(|writer| writer.will_wake(cx.waker())) {
            answers.writer = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Records that all bytes were handed to the kernel.
    pub fn written(&self, at: Instant) {
        let mut answers = self.connection.lock();
        if answers.any {
            (answers.written, answers.awaited) = (Some(self.guard.milliseconds(at)), None);
            answers.writer = None;
            self.connection.to_be_cut.store(false, Ordering::Relaxed);
            answers.turn += 1;
        }
    }

    /// Records that the Varnish sent another request, and so has read the answers before it.
    pub fn taken(&self, at: Instant) {
        let Passage { guard, connection, .. } = self;
        let mut answers = connection.lock();
        if answers.any {
            guard.under_way.end(&mut answers, &guard.passed, Some(guard.milliseconds(at)));
        }
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        let Passage { guard, key, connection } = self;
        let under_way = &guard.under_way;
        let last = {
            let mut answers = connection.lock();
            // An answer cut in the middle is never stored, and one written completely is in the kernel.
            answers.closed = answers.written.is_some();
            if answers.closed {
                under_way.closed.fetch_add(1, Ordering::Relaxed);
            } else {
                under_way.end(&mut answers, &guard.passed, None);
            }
            answers.written
        };
        match last {
            None => _ = under_way.connections().try_remove(*key),
            Some(written) => under_way.tidy(written, &guard.passed, &*guard.wire),
        }
    }
}

impl std::fmt::Debug for Passage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passage").field("ends", &self.connection.ends).finish_non_exhaustive()
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::{Guard, Pattern, Purge, Target};

    /// Reports the last set state for every connection.
    struct FakeWire(Arc<Mutex<SentBytes>>);

    impl Wire for FakeWire {
        fn sent(&self, _ends: SocketPair) -> SentBytes {
            *self.0.lock()
        }
    }

    struct Rig {
        guard: Arc<Guard>,
        wire: Arc<Mutex<SentBytes>>,
        epoch: Instant,
    }

    const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    impl Rig {
        fn new() -> Self {
            let (wire, epoch) = (Arc::new(Mutex::new(SentBytes::Waiting)), Instant::now());
            Rig { guard: Arc::new(Guard::with_wire(epoch, FakeWire(Arc::clone(&wire)))), wire, epoch }
        }

        fn at(&self, ms: u64) -> Instant {
            self.epoch + Duration::from_millis(ms)
        }

        fn connect(&self) -> Passage {
            let ends = SocketPair { ours: "10.0.0.1:80".parse().unwrap(), theirs: (NODE, 1000).into() };
            self.guard.connected(ends)
        }

        /// Passes an answer at this time; returns whether it was unmarked.
        fn pass(&self, passage: &Passage, status: u16, fields: &[(&str, &str)], ms: u64) -> bool {
            let fields = fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
            passage.may_be_stored(self.guard.now(), &Page { status, target: b"/p/1?a=b", fields }, self.at(ms))
        }

        /// Whether a purge noted just before this time finds an answer.
        fn finds(&self, purge: &Purge, ms: u64) -> bool {
            self.guard.under_way(purge, (self.at(ms), self.at(ms)), |_| true)
        }

        fn is_counted(&self) -> bool {
            let UnderWay { any, tagged, pooled, nameless, closed, .. } = &self.guard.under_way;
            [any, tagged, pooled, nameless, closed].iter().any(|count| count.load(Ordering::Relaxed) > 0)
        }
    }

    fn purge(target: Target) -> Purge {
        Purge { targets: vec![target], soft: false }
    }

    fn tag(name: &str) -> Purge {
        purge(Target::Tags([name].into_iter().collect()))
    }

    const PAGE: &[(&str, &str)] = &[("X-Magento-Tags", "cat_p_1,cat_p"), ("Cache-Control", "public, max-age=9")];

    #[test]
    fn an_answer_is_under_way_from_its_head_until_it_has_arrived() {
        let rig = Rig::new();
        let passage = rig.connect();
        assert!(!rig.finds(&tag("cat_p_1"), 1));
        assert!(rig.pass(&passage, 200, PAGE, 2));
        // While it is written, the wire is not queried.
        *rig.wire.lock() = SentBytes::Arrived(Duration::ZERO);
        assert!(rig.finds(&tag("cat_p_1"), 3));
        *rig.wire.lock() = SentBytes::Waiting;
        passage.written(rig.at(10));
        assert!(rig.finds(&tag("cat_p_1"), 500) && rig.finds(&Purge::everything(), 500));
        assert_eq!(rig.guard.last_passed(&tag("cat_p_1")), Some(rig.at(2)));
        *rig.wire.lock() = SentBytes::Arrived(Duration::from_millis(300));
        assert!(!rig.finds(&tag("cat_p_1"), 1000));
        // The arrival time, to within a tick of the kernel's.
        assert_eq!(rig.guard.last_passed(&tag("cat_p_1")), Some(rig.at(710)));
        assert!(!rig.is_counted());
    }

    #[test]
    fn the_next_request_proves_that_the_answer_before_it_was_read() {
        let rig = Rig::new();
        let passage = rig.connect();
        rig.pass(&passage, 200, PAGE, 2);
        passage.written(rig.at(3));
        passage.taken(rig.at(80));
        assert!(!rig.finds(&tag("cat_p_1"), 90) && !rig.is_counted());
        assert_eq!(rig.guard.last_passed(&tag("cat_p_1")), Some(rig.at(80)));
    }

    #[test]
    fn of_several_answers_ahead_all_count_until_the_last_has_arrived() {
        let rig = Rig::new();
        let passage = rig.connect();
        rig.pass(&passage, 200, PAGE, 2);
        passage.written(rig.at(3));
        rig.pass(&passage, 200, &[("X-Magento-Tags", "cms_b")], 4);
        // A third one is marked, and does not affect those before it.
        rig.guard.note(&tag("cat_c"));
        let fields = [(&b"X-Magento-Tags"[..], &b"cat_c"[..])];
        let page = Page { status: 200, target: b"/c", fields: fields.iter().copied() };
        assert!(!passage.may_be_stored(0, &page, rig.at(5)));
        passage.written(rig.at(6));
        assert!(rig.finds(&tag("cat_p_1"), 7) && rig.finds(&tag("cms_b"), 7));
        *rig.wire.lock() = SentBytes::Arrived(Duration::ZERO);
        assert!(!rig.finds(&tag("cat_p_1"), 8) && !rig.finds(&tag("cms_b"), 8) && !rig.is_counted());
    }

    #[test]
    fn a_purge_waits_for_what_it_concerns_and_for_nothing_else() {
        let concerned = |status, fields: &[(&str, &str)], purge: Purge| {
            let rig = Rig::new();
            let passage = rig.connect();
            rig.pass(&passage, status, fields, 2);
            rig.finds(&purge, 3)
        };
        let pattern = || purge(Target::Pattern(Pattern::new("x").unwrap()));
        let pool = || purge(Target::Pool(Pattern::new("x").unwrap()));
        let (all, pooled) = (purge(Target::All), &[("X-Pool", "shop"), ("Cache-Control", "max-age=9")]);
        assert!(concerned(200, PAGE, all.clone()) && concerned(200, &[], all.clone()) && concerned(304, &[], all));
        // These ban pages with tags, and pages with a pool: a long download with neither is not concerned.
        for of_tags in [Purge::everything(), pattern()] {
            assert!(concerned(200, PAGE, of_tags.clone()) && concerned(304, &[], of_tags.clone()));
            assert!(!concerned(200, &[], of_tags.clone()) && !concerned(200, pooled, of_tags.clone()));
            assert!(concerned(200, &[("X-Magento-Tags", "")], of_tags));
        }
        assert!(concerned(200, pooled, pool()) && concerned(304, &[], pool()));
        assert!(!concerned(200, &[], pool()) && !concerned(200, PAGE, pool()));
        assert!(concerned(200, PAGE, tag("cat_p")) && !concerned(200, PAGE, tag("cat_p_2")));
        assert!(concerned(304, &[], tag("cat_p_2")));
        // A purge does not wait for an answer that forbids storing, even an endless one.
        for (name, value) in
            [("Cache-Control", "no-store"), ("cache-control", "max-age=0, no-cache"), ("Cache-Control", "private")]
        {
            assert!(!concerned(200, &[PAGE[0], (name, value)], purge(Target::All)), "{value}");
        }
        let surrogate = ("Surrogate-Control", "no-store, content=\"ESI/1.0\"");
        assert!(!concerned(200, &[PAGE[0], surrogate], tag("cat_p")));
        // A line for surrogates takes precedence over all others.
        assert!(concerned(
            200,
            &[PAGE[0], ("Surrogate-Control", "max-age=9"), ("Cache-Control", "no-store")],
            tag("cat_p")
        ));
    }

    #[test]
    fn what_passed_after_the_purge_was_noted_knew_of_it() {
        let rig = Rig::new();
        let passage = rig.connect();
        rig.pass(&passage, 200, PAGE, 20);
        let asked = |noted| rig.guard.under_way(&tag("cat_p"), (rig.at(noted), rig.at(30)), |_| true);
        assert!(!asked(19) && asked(20) && asked(21));
    }

    #[test]
    fn a_node_waits_for_its_own_answers() {
        let rig = Rig::new();
        let passage = rig.connect();
        rig.pass(&passage, 200, PAGE, 2);
        let asked = |of: fn(IpAddr) -> bool| rig.guard.under_way(&tag("cat_p"), (rig.at(3), rig.at(3)), of);
        assert!(asked(|ip| ip == NODE) && !asked(|ip| ip != NODE));
    }

    #[test]
    fn a_marked_answer_is_waited_for_by_nobody() {
        let rig = Rig::new();
        let passage = rig.connect();
        rig.guard.note(&tag("cat_p"));
        let fields = [(&b"X-Magento-Tags"[..], &b"cat_p"[..])];
        let page = Page { status: 200, target: b"/", fields: fields.iter().copied() };
        assert!(!passage.may_be_stored(0, &page, rig.at(2)));
        assert!(!rig.finds(&tag("cat_p"), 3) && !rig.is_counted());
    }

    #[test]
    fn an_answer_outlives_its_connection_and_one_that_was_cut_does_not() {
        let rig = Rig::new();
        let passage = rig.connect();
        rig.pass(&passage, 200, PAGE, 2);
        drop(passage);
        assert!(!rig.finds(&tag("cat_p"), 3) && !rig.is_counted());

        let passage = rig.connect();
        rig.pass(&passage, 200, PAGE, 4);
        passage.written(rig.at(5));
        drop(passage);
        assert!(rig.finds(&tag("cat_p"), 6));
        *rig.wire.lock() = SentBytes::Closed;
        assert!(!rig.finds(&tag("cat_p"), 7) && !rig.is_counted());
        assert!(rig.guard.under_way.connections().is_empty());
    }

    #[test]
    fn closed_connections_are_forgotten_without_any_purge() {
        let rig = Rig::new();
        *rig.wire.lock() = SentBytes::Closed;
        for _ in 0..1000 {
            let passage = rig.connect();
            rig.pass(&passage, 200, PAGE, 2);
            passage.written(rig.at(3));
        }
        let kept = rig.guard.under_way.connections().len();
        assert!(kept < MANY_CLOSED, "{kept}");
    }

    #[test]
    fn an_answer_with_too_many_names_concerns_every_purge() {
        let rig = Rig::new();
        let passage = rig.connect();
        let tags: Vec<String> = (0..MOST_NAMES).map(|n| format!("t{n}")).collect();
        rig.pass(&passage, 200, &[("X-Magento-Tags", &tags.join(","))], 2);
        assert!(rig.finds(&tag("another"), 3));
        passage.taken(rig.at(4));
        assert!(!rig.finds(&tag("another"), 5) && !rig.is_counted());
    }

    #[test]
    fn a_system_that_does_not_tell_is_not_waited_for() {
        let rig = Rig::new();
        *rig.wire.lock() = SentBytes::Unknown;
        let passage = rig.connect();
        rig.pass(&passage, 200, PAGE, 2);
        assert!(rig.finds(&tag("cat_p"), 3));
        passage.written(rig.at(40));
        assert!(!rig.finds(&tag("cat_p"), 50));
        assert_eq!(rig.guard.last_passed(&tag("cat_p")), Some(rig.at(40)));
    }

    #[test]
    fn an_answer_without_an_end_is_cut_when_it_was_waited_for_long_enough() {
        let rig = Rig::new();
        let passage = rig.connect();
        let limit = u64::try_from(LONGEST_WAIT.as_millis()).unwrap();
        rig.pass(&passage, 200, PAGE, 2);
        assert!(rig.finds(&tag("cat_p"), 100_000) && !passage.is_to_be_cut());
        assert!(rig.finds(&tag("cat_p"), 99_999 + limit) && !passage.is_to_be_cut());
        let woken = Arc::new(WakeFlag::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut cx = Context::from_waker(&waker);
        assert!(passage.poll_to_be_cut(&mut cx).is_pending());
        assert!(rig.finds(&tag("cat_p"), 100_000 + limit) && passage.is_to_be_cut());
        assert!(woken.0.load(Ordering::Relaxed) && passage.poll_to_be_cut(&mut cx).is_ready());
    }

    #[derive(Default)]
    struct WakeFlag(AtomicBool);

    impl std::task::Wake for WakeFlag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn an_answer_that_came_to_its_end_does_not_cut_the_next_one() {
        let rig = Rig::new();
        let passage = rig.connect();
        let limit = u64::try_from(LONGEST_WAIT.as_millis()).unwrap();
        rig.pass(&passage, 200, PAGE, 2);
        assert!(rig.finds(&tag("cat_p"), 100) && rig.finds(&tag("cat_p"), 100 + limit) && passage.is_to_be_cut());
        passage.written(rig.at(101 + limit));
        assert!(!passage.is_to_be_cut());
        // Another answer before the first was read: its time begins anew.
        rig.pass(&passage, 200, PAGE, 102 + limit);
        assert!(rig.finds(&tag("cat_p"), 103 + limit) && !passage.is_to_be_cut());
        assert!(rig.finds(&tag("cat_p"), 102 + 2 * limit) && !passage.is_to_be_cut());
        assert!(rig.finds(&tag("cat_p"), 103 + 2 * limit) && passage.is_to_be_cut());
    }

    /// An answer and its purge at the same moment: it is marked, or the purge finds it.
    #[test]
    fn an_answer_and_its_purge_do_not_miss_each_other() {
        const ROUNDS: u64 = 2_000;
        let (rig, turn) = (Rig::new(), std::sync::Barrier::new(2));
        let missed = std::thread::scope(|scope| {
            let (rig, turn) = (&rig, &turn);
            let pages = scope.spawn(move || {
                let one = |_| {
                    let (passage, began) = (rig.connect(), rig.guard.now());
                    let fields = [(&b"X-Magento-Tags"[..], &b"cat_p"[..])];
                    let page = Page { status: 200, target: b"/", fields: fields.iter().copied() };
                    turn.wait();
                    let stored = passage.may_be_stored(began, &page, Instant::now());
                    // The other thread has looked.
                    turn.wait();
                    stored
                };
                (0..ROUNDS).map(one).collect::<Vec<_>>()
            });
            let found = (0..ROUNDS).map(|round| {
                turn.wait();
                // Varies which of the two comes first.
                (0..round % 256).for_each(|_| std::hint::spin_loop());
                rig.guard.note(&tag("cat_p"));
                let now = Instant::now();
                let found = rig.guard.under_way(&tag("cat_p"), (now, now), |_| true);
                turn.wait();
                found
            });
            let found: Vec<bool> = found.collect();
            let stored = pages.join().unwrap();
            stored.iter().zip(&found).filter(|&(&stored, &found)| stored && !found).count()
        });
        assert_eq!(missed, 0, "of {ROUNDS} pages");
    }
}
