//! Answers that are on their way to a Varnish, from the moment at which their head passed the guard until the system of
//! the Varnish has acknowledged their last byte.
//!
//! **Why order and not time.** A page whose bytes are still in a socket of ours, or lost on the wire and sent again, is
//! stored after any ban that arrives meanwhile, and no constant says how long that takes. So an acknowledgement of a
//! purge counts only when nothing that the purge concerns is under way any more.
//!
//! **What proves that an answer has arrived**, from the cheapest to the dearest:
//! - The next request on the same connection: Varnish sends one only when it has read the answer before it, and never
//!   several ahead. Costs nothing.
//! - The system's own book of what the other end has acknowledged ([`Wire`]). Costs system calls, so it is asked only
//!   where a purge concerns an answer that was written and is not known to have arrived.
//!
//! **What it costs.** An answer takes note of its names at its own connection, where nobody else writes, and counts itself
//! at their slots ([`Passed`]). A purge looks at the slots of its own names, and at the connections only where one of
//! them is not 0.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use slab::Slab;

use super::Page;
use super::passed::Passed;

/// An answer with more names than this counts as one that any purge may concern, so that what a connection keeps of it
/// is bounded, at 16 KiB.
const MOST_NAMES: usize = 2048;

/// Closed connections of which something may still be under way, from which on they are looked after without a purge.
const MANY_CLOSED: usize = 64;

/// The system counts the time since an acknowledgement in ticks of up to this.
const TICK: Duration = Duration::from_millis(10);

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Ours.
    pub ours: SocketAddr,
    /// That of the Varnish.
    pub theirs: SocketAddr,
}

/// What became of the bytes that were written to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The other end has not acknowledged all of them.
    Waiting,
    /// It has; the last acknowledgement came so long ago.
    Arrived(Duration),
    /// There is no such connection any more: all arrived, or none of the rest will.
    Closed,
    /// The system does not tell.
    Unknown,
}

/// Who knows what became of bytes.
pub trait Wire: Send + Sync {
    /// What became of all that was written to this connection so far.
    fn sent(&self, ends: Ends) -> Sent;
}

/// Knows of nothing.
pub(super) struct Untold;

impl Wire for Untold {
    fn sent(&self, _ends: Ends) -> Sent {
        Sent::Unknown
    }
}

/// What may be under way on one connection.
#[derive(Debug, Default)]
struct Answers {
    /// The hashes of their names. Of several answers where a client asks for the next before it has read the last.
    names: Vec<u64>,
    /// One of them has tags.
    tagged: bool,
    /// One of them has names that nobody can see, or too many.
    nameless: bool,
    /// There is any.
    any: bool,
    /// When the last byte of the last one was written, in ms.
    written: Option<u64>,
    /// The connection was closed.
    closed: bool,
    /// Changes with everything that is written.
    turn: u64,
}

/// One connection as the guard keeps it.
struct Connection {
    ends: Ends,
    answers: Mutex<Answers>,
}

impl Connection {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a purge wants to know of.
pub(super) enum Wanted {
    /// Answers with one of these names, sorted.
    Names(Vec<u64>),
    /// Answers with tags.
    Tagged,
    /// Any answer.
    Any,
}

impl Wanted {
    fn concerns(&self, answers: &Answers) -> bool {
        answers.any
            && match self {
                Wanted::Names(names) => {
                    answers.nameless || answers.names.iter().any(|name| names.binary_search(name).is_ok())
                }
                Wanted::Tagged => answers.nameless || answers.tagged,
                Wanted::Any => true,
            }
    }
}

/// All connections on which something may be under way.
#[derive(Default)]
pub(super) struct UnderWay {
    connections: Mutex<Slab<Arc<Connection>>>,
    any: AtomicU32,
    tagged: AtomicU32,
    nameless: AtomicU32,
    closed: AtomicU32,
}

impl UnderWay {
    fn connections(&self) -> MutexGuard<'_, Slab<Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the counts allow for an answer that is wanted. Never wrong where they do not.
    fn may_have(&self, wanted: &Wanted, passed: &Passed) -> bool {
        let counted = |count: &AtomicU32| count.load(Ordering::Acquire) > 0;
        match wanted {
            Wanted::Names(names) => counted(&self.nameless) || names.iter().any(|&name| passed.is_open(name)),
            Wanted::Tagged => counted(&self.tagged) || counted(&self.nameless),
            Wanted::Any => counted(&self.any),
        }
    }

    /// Whether a wanted answer is under way to a Varnish that may have this address. What turns out to have arrived is
    /// stamped with the time at which it did, before it stops to count.
    pub(super) fn has(
        &self,
        wanted: &Wanted,
        to: impl Fn(IpAddr) -> bool,
        now: u64,
        (passed, wire): (&Passed, &dyn Wire),
    ) -> bool {
        if !self.may_have(wanted, passed) {
            return false;
        }
        let concerned: Vec<_> = {
            let connections = self.connections();
            let concerned = connections.iter().filter(|(_, connection)| {
                to(connection.ends.theirs.ip().to_canonical()) && wanted.concerns(&connection.lock())
            });
            concerned.map(|(key, connection)| (key, Arc::clone(connection))).collect()
        };
        // Not cut short: each that has arrived is one less for the next purge.
        let left = concerned.iter().filter(|(key, connection)| !self.has_arrived(*key, connection, now, passed, wire));
        left.count() > 0
    }

    /// Looks at a connection on which something may be under way.
    fn has_arrived(&self, key: usize, connection: &Connection, now: u64, passed: &Passed, wire: &dyn Wire) -> bool {
        let (turn, written) = {
            let answers = connection.lock();
            if !answers.any {
                return true;
            }
            (answers.turn, answers.written)
        };
        let Some(written) = written else { return false };
        let arrived = match wire.sent(connection.ends) {
            Sent::Waiting => return false,
            Sent::Arrived(ago) => now.saturating_sub(milliseconds(ago.saturating_sub(TICK))).max(written),
            Sent::Closed => now,
            // No worse than it is without this book.
            Sent::Unknown => written,
        };
        let mut answers = connection.lock();
        // What was written meanwhile is another answer.
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

    /// Nothing is under way there any more; it arrived at this time, or it will not be stored.
    fn end(&self, answers: &mut Answers, passed: &Passed, arrived: Option<u64>) {
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
        // After the stamps: who does not find it here finds those.
        answers.names.iter().for_each(|&name| passed.close(name));
        answers.names = Vec::new();
        for (had, count) in [(&mut answers.tagged, &self.tagged), (&mut answers.nameless, &self.nameless)] {
            if std::mem::take(had) {
                count.fetch_sub(1, Ordering::Release);
            }
        }
        self.any.fetch_sub(1, Ordering::Release);
        answers.written = None;
        answers.turn += 1;
    }

    /// Looks after the closed connections, where there are many.
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

/// A connection of a Varnish to the origin listener, for whoever writes to it. Dropped when that is closed.
pub struct Passage {
    guard: Arc<super::Guard>,
    key: usize,
    connection: Arc<Connection>,
}

impl Passage {
    pub(super) fn open(guard: Arc<super::Guard>, ends: Ends) -> Self {
        let connection = Arc::new(Connection { ends, answers: Mutex::default() });
        let key = guard.under_way.connections().insert(Arc::clone(&connection));
        Passage { guard, key, connection }
    }

    /// Whether Varnish may store this answer: see [`Guard::may_be_stored`](super::Guard::may_be_stored). It is about to be
    /// written here, and [`Passage::written`] is to be called when it was.
    pub fn may_be_stored<'a, F>(&self, began: u64, page: &Page<'a, F>, at: Instant) -> bool
    where
        F: Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    {
        self.guard.passes(began, page, at, Some(self))
    }

    /// An answer with these names, of which the first is its path, is about to be written. Returns whether it is the only one that may be under way here.
    pub(super) fn begin(&self, names: impl Iterator<Item = u64>, nameless: bool) -> bool {
        let super::Guard { under_way, passed, .. } = &*self.guard;
        let mut answers = self.connection.lock();
        let known = answers.names.len();
        let is_new = !std::mem::replace(&mut answers.any, true);
        answers.names.extend(names.take(MOST_NAMES + 1));
        let too_many = answers.names.len() > MOST_NAMES;
        answers.names.truncate(MOST_NAMES);
        answers.names.iter().skip(known).for_each(|&name| passed.open(name));
        let tagged = answers.names.len() > known + 1;
        if tagged && !std::mem::replace(&mut answers.tagged, true) {
            under_way.tagged.fetch_add(1, Ordering::Release);
        }
        if (nameless || too_many) && !std::mem::replace(&mut answers.nameless, true) {
            under_way.nameless.fetch_add(1, Ordering::Release);
        }
        if is_new {
            under_way.any.fetch_add(1, Ordering::Release);
        }
        answers.written = None;
        answers.turn += 1;
        is_new
    }

    /// The only answer that was begun will not be stored.
    pub(super) fn forget(&self) {
        self.guard.under_way.end(&mut self.connection.lock(), &self.guard.passed, None);
    }

    /// All that there is to write was handed to the system.
    pub fn written(&self, at: Instant) {
        let mut answers = self.connection.lock();
        if answers.any {
            answers.written = Some(self.guard.milliseconds(at));
            answers.turn += 1;
        }
    }

    /// The Varnish sent another request, and so has read the answers before it.
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
            // What was cut in the middle is never stored, and what was written is in the hands of the system.
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
