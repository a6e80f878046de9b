//! The guard: a page rendered before a purge is not stored after it.
//!
//! A ban affects only the objects that exist when it arrives. A page that a web node began to render before the change,
//! and that Varnish stores after the ban, is newer than the ban and never tested against it: it would be stale for its
//! whole lifetime. A proxy between Varnish and the web nodes can prevent that: a request records the purge sequence
//! when it begins ([`Guard::now`]), and when its answer arrives, with its tags, [`Guard::may_be_stored`] says whether
//! any of them was purged since.
//!
//! **It errs to one side only.** A page that is marked needlessly is fetched once more; a page that should have been
//! marked and was not breaks the promise. So all state here has a fixed size and forgets, and forgotten entries count
//! as purged: tags and paths in `Index`, patterns and pools in `Patterns`. A purge whose pages are unknown (a `BAN` for
//! a custom VCL, a pattern that is too long) counts as a purge of everything.
//!
//! **A 304 has no tags.** It makes a new object from an old body, newer than all bans, so it is marked if any purge
//! came since its request began.
//!
//! **A page in flight.** A page can pass the check a moment before the purge arrives, and the ban can still overtake
//! it: Varnish reads them from two sockets. So the page stamps its names *before* it is checked, and the purge, once
//! noted, can ask whether a page that it concerns has just passed ([`Guard::last_passed`]): then the bans must be sent
//! again. A page that has passed counts as under way until it has arrived, however long that takes
//! ([`Guard::under_way`]). Both sides write, fence, and read the other's writes: with a sequentially consistent fence
//! on both sides at least one of them sees the other, so no page slips through.
//!
//! Sequence numbers are the guard's own, not journal positions, which may restart after a journal was restored.

mod passed;
mod patterns;
mod under_way;

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::index::Index;
use super::{Forward, Purge, Target};
use crate::mutants::Mutant;
use passed::Passed;
use patterns::{Patterns, Subject};
use under_way::{Kinds, Moments, UnderWay, Untold, Wanted};

pub use under_way::{Passage, SentBytes, SocketPair, Wire};

/// Buckets of the index: 512 KiB for about 57,000 names, more than a shop purges while it renders a page.
const BUCKETS: usize = 8192;

/// Separates the hash of a path from that of a tag with the same bytes.
const PATH: u64 = 1;

/// Records the recent purges, and the pages passed recently.
///
/// Workers query it without a lock, except briefly if a pattern was purged while their page was rendered.
pub struct Guard {
    epoch: Instant,
    /// The number of noted purges.
    sequence: AtomicU64,
    /// The newest purge of everything.
    everything: AtomicU64,
    /// Whether any purge was by something other than a URL.
    has_tags: AtomicBool,
    names: Index,
    patterns: Patterns,
    passed: Passed,
    under_way: UnderWay,
    wire: Box<dyn Wire>,
    // Held by the thread that notes a purge.
    turn: Mutex<()>,
}

/// An answer, for the guard's check.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a, F> {
    /// Its status code.
    pub status: u16,
    /// The request target, in origin form.
    pub target: &'a [u8],
    /// Its header fields, names in any case.
    pub fields: F,
}

impl Guard {
    /// A guard without any purge, and without a way to learn when written pages have arrived. `epoch` is any time
    /// before the first page.
    pub fn new(epoch: Instant) -> Self {
        Guard::with_wire(epoch, Untold)
    }

    /// The same with a source for the arrival of written pages.
    pub fn with_wire(epoch: Instant, wire: impl Wire + 'static) -> Self {
        Guard {
            epoch,
            sequence: AtomicU64::new(0),
            everything: AtomicU64::new(0),
            has_tags: AtomicBool::new(false),
            names: Index::new(BUCKETS),
            patterns: Patterns::default(),
            passed: Passed::default(),
            under_way: UnderWay::default(),
            wire: Box::new(wire),
            turn: Mutex::new(()),
        }
    }

    /// Whether pages were purged by their tags, patterns or pools, or all at once, and not only by URL.
    pub fn has_tags(&self) -> bool {
        self.has_tags.load(Ordering::SeqCst)
    }

    /// Records a purge from before this process: no page from before it can be in flight.
    pub fn remember(&self, purge: &Purge) {
        if purge.targets.iter().any(|target| !matches!(target, Target::Forward(_))) {
            self.has_tags.store(true, Ordering::SeqCst);
        }
    }

    /// Records a purge. Call it before any Varnish is told of the purge.
    pub fn note(&self, purge: &Purge) {
        self.remember(purge);
        let _turn = self.turn.lock();
        let sequence = self.sequence.load(Ordering::Relaxed) + 1;
        for target in &purge.targets {
            let cannot_be_told = match target {
                Target::All | Target::Everything => true,
                Target::Tags(tags) => {
                    tags.iter().for_each(|tag| self.names.insert(tag_hash(tag.as_bytes()), sequence));
                    false
                }
                Target::Pattern(pattern) => !self.patterns.insert(Subject::Tags, pattern, sequence),
                Target::Pool(pattern) => !self.patterns.insert(Subject::Pool, pattern, sequence),
                Target::Forward(forward) => match forward.page() {
                    Some(target) => {
                        self.names.insert(path_hash(target.as_bytes()), sequence);
                        false
                    }
                    None => true,
                },
            };
            if cannot_be_told {
                self.everything.store(sequence, Ordering::Relaxed);
            }
        }
        // Last: a thread that reads this value sees all writes above.
        self.sequence.store(sequence, Ordering::Release);
        // Between the writes above and the reads of `last_passed`: see `may_be_stored`.
        fence(Ordering::SeqCst);
    }

    /// The current sequence number. A request records it before it is sent to a web node.
    pub fn now(&self) -> u64 {
        self.sequence.load(Ordering::Acquire)
    }

    /// Registers a Varnish's connection. Pages passed on it are known to be under way until they have arrived.
    pub fn connected(self: &Arc<Self>, ends: SocketPair) -> Passage {
        Passage::open(Arc::clone(self), ends)
    }

    /// Whether Varnish may store this answer, whose request began when [`Guard::now`] was `began`: none of its names
    /// was purged since. Its head came at `at`. If it is about to be written to a registered connection, use
    /// [`Passage::may_be_stored`].
    pub fn may_be_stored<'a, F>(&self, began: u64, page: &Page<'a, F>, at: Instant) -> bool
    where
        F: Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    {
        self.passes(began, page, at, None)
    }

    fn passes<'a, F>(&self, began: u64, page: &Page<'a, F>, at: Instant, passage: Option<&Passage>) -> bool
    where
        F: Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    {
        let opened = self.stamp(page, self.milliseconds(at), passage.filter(|_| !page.forbids_storing()));
        // Between the writes above and the reads below. If this fence comes before that of `note`, the purge's
        // `under_way` and `last_passed` see these writes; if it comes after it, this sees the purge.
        fence(Ordering::SeqCst);
        let may_be_stored = self.now() <= began || !self.was_purged_since(began, page) || Mutant::BlindGuard.lives();
        if !may_be_stored && let Some(opened) = opened {
            opened.forget();
        }
        may_be_stored
    }

    /// Whether an answer that this purge concerns, and that passed unmarked, may be under way to a Varnish whose
    /// address satisfies `to`. `noted` is any time after the purge was noted: answers that passed later were checked
    /// against it. Ask this before [`Guard::last_passed`], which then knows the arrival times of those that have
    /// arrived.
    ///
    /// An acknowledgement received before this returns `false` does not count; once it returns `false`, it always will.
    /// There is no notification: callers poll, for example every 25 ms. A call costs system calls only for the answers
    /// concerned. An answer still being written [`LONGEST_WAIT`](under_way::LONGEST_WAIT) after the first call is to be
    /// cut ([`Passage::is_to_be_cut`]).
    pub fn under_way(&self, purge: &Purge, (noted, now): (Instant, Instant), to: impl Fn(IpAddr) -> bool) -> bool {
        let moments = Moments { noted: self.milliseconds(noted), now: self.milliseconds(now) };
        let mut names = Vec::new();
        let mut others = Vec::new();
        for target in &purge.targets {
            match target {
                Target::Tags(tags) => names.extend(tags.iter().map(|tag| tag_hash(tag.as_bytes()))),
                Target::Forward(forward) => match forward.page() {
                    Some(target) => names.push(path_hash(target.as_bytes())),
                    None => others.push(Wanted::Any),
                },
                // They match against tags or pools, so pages without any are not affected.
                Target::Pattern(_) | Target::Everything => others.push(Wanted::Tagged),
                Target::Pool(_) => others.push(Wanted::Pooled),
                Target::All => others.push(Wanted::Any),
            }
        }
        names.sort_unstable();
        let has = |wanted| self.under_way.has(&wanted, &to, moments, (&self.passed, &*self.wire));
        has(Wanted::Names(names)) || others.into_iter().any(has)
    }

    /// Whether a Varnish at this address has fetched a page since the process started: if so, it fetches from there. A
    /// `false` may be wrong.
    pub fn has_fetched(&self, address: IpAddr) -> bool {
        self.under_way.has_fetched(address)
    }

    /// When a page that this purge concerns last passed unmarked, or arrived as far as [`Guard::under_way`] has found
    /// out, if there was one. Ask after the purge was noted. It may return a time at which no such page passed, or at
    /// which one was marked.
    pub fn last_passed(&self, purge: &Purge) -> Option<Instant> {
        let last = |target: &Target| match target {
            Target::Tags(tags) => tags.iter().map(|tag| self.passed.last(tag_hash(tag.as_bytes()))).max().unwrap_or(0),
            Target::Forward(forward) => match forward.page() {
                Some(target) => self.passed.last(path_hash(target.as_bytes())),
                None => self.passed.last_any(),
            },
            Target::All | Target::Everything | Target::Pattern(_) | Target::Pool(_) => self.passed.last_any(),
        };
        let newest = purge.targets.iter().map(last).max().filter(|&at| at > 0)?;
        self.epoch.checked_add(Duration::from_millis(newest))
    }

    /// Records that this page passes. Returns the passage if nothing else may be under way on it.
    fn stamp<'a, 'p, F>(&self, page: &Page<'a, F>, at: u64, passage: Option<&'p Passage>) -> Option<&'p Passage>
    where
        F: Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    {
        self.passed.stamp_any(at);
        if page.is_nameless() {
            self.passed.stamp_nameless(at);
        }
        let names = std::iter::once(path_hash(page.target)).chain(page.tags().map(tag_hash));
        let stamped = names.inspect(|&name| self.passed.stamp(name, at));
        let Some(passage) = passage else {
            stamped.for_each(drop);
            return None;
        };
        passage.begin(stamped, page.kinds(), at).then_some(passage)
    }

    fn was_purged_since<'a, F>(&self, began: u64, page: &Page<'a, F>) -> bool
    where
        F: Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
    {
        page.is_nameless()
            || self.everything.load(Ordering::Relaxed) > began
            || self.names.has_since(path_hash(page.target), began)
            || page.tags().any(|tag| self.names.has_since(tag_hash(tag), began))
            || self.patterns.match_since(began, || [page.all_tags(), page.pools()])
    }

    /// Milliseconds since the epoch, and never 0.
    fn milliseconds(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.epoch).as_millis()).map_or(u64::MAX, |since| since.max(1))
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl<'a, F> Page<'a, F>
where
    F: Iterator<Item = (&'a [u8], &'a [u8])> + Clone,
{
    /// A `304 Not Modified` refers to a page whose tags were sent with an earlier answer.
    fn is_nameless(&self) -> bool {
        self.status == 304
    }

    /// The answer itself says what we say for pages that must not be stored, or what every VCL based on Varnish's
    /// `builtin.vcl` treats the same: an endless stream is not a page that a purge waits for.
    fn forbids_storing(&self) -> bool {
        let mut for_surrogates = self.values(b"surrogate-control").peekable();
        let has = |value: &[u8], word: &[u8]| memchr::memmem::find(value, word).is_some();
        if for_surrogates.peek().is_some() {
            return for_surrogates.any(|value| has(value, b"no-store"));
        }
        let forbids =
            |value: &[u8]| [&b"no-store"[..], b"no-cache", b"private"].into_iter().any(|word| has(value, word));
        self.values(b"cache-control").any(forbids)
    }

    fn values(&self, wanted: &'static [u8]) -> impl Iterator<Item = &'a [u8]> + use<'a, F> {
        self.fields.clone().filter(move |(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value)
    }

    /// The tags one by one, trimmed: as the origin writes them and the bans find them.
    pub fn tags(&self) -> impl Iterator<Item = &'a [u8]> + use<'a, F> {
        let values = self.values(b"x-magento-tags");
        let pieces = values.flat_map(|value| value.split(|&byte| byte == b','));
        pieces.map(<[u8]>::trim_ascii).filter(|tag| !tag.is_empty())
    }

    /// All tags as one line, to match patterns; and as the web node wrote them, in case an empty tag was dropped.
    fn all_tags(&self) -> Vec<Cow<'a, [u8]>> {
        let mut lines: Vec<Cow<'a, [u8]>> = self.values(b"x-magento-tags").map(Cow::Borrowed).collect();
        if !lines.is_empty() {
            let tags: Vec<&[u8]> = self.tags().collect();
            lines.push(Cow::Owned(tags.join(&b',')));
        }
        lines
    }

    fn kinds(&self) -> Kinds {
        let has = |name: &'static [u8]| self.values(name).next().is_some();
        Kinds { tagged: has(b"x-magento-tags"), pooled: has(b"x-pool"), nameless: self.is_nameless() }
    }

    fn pools(&self) -> Vec<Cow<'a, [u8]>> {
        self.values(b"x-pool").map(Cow::Borrowed).collect()
    }
}

impl Forward {
    /// The target of a purge of a single page: a request with only the usual headers. The effect of any other request
    /// depends on the VCL.
    pub(crate) fn page(&self) -> Option<&str> {
        let says_nothing = |name: &str| matches!(name, "host" | super::parse::SOFT);
        let names_a_page = self.method == "PURGE" && self.headers.iter().all(|(name, _)| says_nothing(name));
        names_a_page.then_some(&*self.target)
    }
}

fn tag_hash(tag: &[u8]) -> u64 {
    xxh3_64(tag)
}

/// The path only: a VCL may leave parts of the query out of its key.
fn path_hash(target: &[u8]) -> u64 {
    let path = target.split(|&byte| byte == b'?').next().unwrap_or_default();
    xxh3_64_with_seed(path, PATH)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::purge::Pattern;

    fn purge(target: Target) -> Purge {
        Purge { targets: vec![target], soft: false }
    }

    fn tags(tags: &[&str]) -> Purge {
        purge(Target::Tags(tags.iter().copied().collect()))
    }

    fn forward(method: &str, target: &str, headers: &[(&str, &str)]) -> Purge {
        let headers = headers.iter().map(|&(name, value)| (name.into(), value.into())).collect();
        purge(Target::Forward(Forward { method: method.into(), target: target.into(), headers }))
    }

    fn pattern(text: &str) -> Pattern {
        Pattern::new(text).unwrap()
    }

    /// One purge of each kind.
    fn kinds() -> [Purge; 9] {
        [
            tags(&["cat_p_1", "cat_p"]),
            purge(Target::Pattern(pattern("cat_p_[0-9]"))),
            purge(Target::Pool(pattern("^shop$"))),
            purge(Target::Everything),
            purge(Target::All),
            forward("PURGE", "/p/1?a=b", &[("host", "shop.test")]),
            forward("PURGE", "/p/1", &[("host", "shop.test"), ("x-magento-purge-soft", "1")]),
            forward("PURGE", "/", &[("host", "shop.test"), ("x-url", "^/p/")]),
            forward("BAN", "/p/1", &[("host", "shop.test")]),
        ]
    }

    type Fields<'a> = &'a [(&'a str, &'a str)];

    /// Checks an answer to `target` whose request began when the guard knew `began` purges.
    fn admits(guard: &Guard, began: u64, status: u16, target: &str, fields: Fields<'_>, at: Instant) -> bool {
        let fields = fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
        guard.may_be_stored(began, &Page { status, target: target.as_bytes(), fields }, at)
    }

    const PRODUCT: Fields<'static> = &[("X-Magento-Tags", "cat_p_1,cat_p"), ("X-Pool", "shop")];
    const CMS: Fields<'static> = &[("X-Magento-Tags", "cms_b,cat_p_11_x"), ("X-Pool", "shop2")];

    #[test]
    fn a_page_purged_since_its_request_began_is_not_stored_and_later_ones_are() {
        for purge in kinds() {
            let guard = Guard::new(Instant::now());
            let ask = |began| admits(&guard, began, 200, "/p/1", PRODUCT, Instant::now());
            guard.note(&tags(&["another"]));
            assert!(ask(0), "{purge:?}");
            guard.note(&purge);
            assert_eq!((ask(0), ask(1), ask(2)), (false, false, true), "{purge:?}");
        }
    }

    #[test]
    fn a_page_that_a_purge_does_not_concern_is_stored() {
        for purge in kinds() {
            let guard = Guard::new(Instant::now());
            guard.note(&purge);
            let of_everything = match &purge.targets[0] {
                Target::All | Target::Everything => true,
                Target::Forward(forward) => forward.page().is_none(),
                Target::Pattern(_) => true, // it matches `cat_p_11_x` as well
                Target::Tags(_) | Target::Pool(_) => false,
            };
            assert_eq!(admits(&guard, 0, 200, "/cms", CMS, Instant::now()), !of_everything, "{purge:?}");
        }
    }

    #[test]
    fn every_line_of_tags_counts_whatever_the_case_of_its_name() {
        let guard = Guard::new(Instant::now());
        guard.note(&tags(&["cat_p_1"]));
        let ask = |fields| admits(&guard, 0, 200, "/", fields, Instant::now());
        assert!(!ask(&[("x-magento-tags", "a,b"), ("X-MAGENTO-TAGS", "c,cat_p_1")]));
        assert!(!ask(&[("X-Magento-Tags", "a, cat_p_1 ,b")]));
        assert!(ask(&[("X-Magento-Tags", "a,my cat_p_1,b"), ("X-Other", "cat_p_1")]));
    }

    #[test]
    fn a_pattern_is_held_against_all_tags_in_one_line_as_varnish_gets_them() {
        let guard = Guard::new(Instant::now());
        guard.note(&purge(Target::Pattern(pattern("b,c"))));
        let ask = |fields| admits(&guard, 0, 200, "/", fields, Instant::now());
        assert!(!ask(&[("X-Magento-Tags", "a,b"), ("X-Magento-Tags", "c,d")]) && !ask(&[("X-Magento-Tags", "b, c")]));
        assert!(ask(&[("X-Magento-Tags", "c"), ("X-Magento-Tags", "b")]));
    }

    #[test]
    fn a_304_is_stored_only_where_nothing_at_all_was_purged() {
        for purge in kinds() {
            let guard = Guard::new(Instant::now());
            assert!(admits(&guard, 0, 304, "/other", &[], Instant::now()));
            guard.note(&purge);
            assert!(!admits(&guard, 0, 304, "/other", &[], Instant::now()), "{purge:?}");
        }
    }

    #[test]
    fn a_pattern_that_is_not_kept_counts_as_everything() {
        let guard = Guard::new(Instant::now());
        guard.note(&purge(Target::Pattern(pattern(&"x".repeat(20_000)))));
        assert!(!admits(&guard, 0, 200, "/cms", CMS, Instant::now()));
    }

    #[test]
    fn a_purge_finds_when_a_page_that_it_concerns_was_last_passed_on() {
        let epoch = Instant::now();
        let at = |ms| epoch + Duration::from_millis(ms);
        for purge in kinds() {
            let guard = Guard::new(epoch);
            assert_eq!(guard.last_passed(&purge), None);
            admits(&guard, 0, 200, "/p/1", PRODUCT, at(70));
            admits(&guard, 0, 200, "/p/1", PRODUCT, at(50));
            assert_eq!(guard.last_passed(&purge), Some(at(70)), "{purge:?}");
            // A purge that names no particular page may concern any.
            admits(&guard, 0, 200, "/cms", CMS, at(80));
            let names = match &purge.targets[0] {
                Target::Tags(_) => true,
                Target::Forward(forward) => forward.page().is_some(),
                _ => false,
            };
            assert_eq!(guard.last_passed(&purge), Some(at(if names { 70 } else { 80 })), "{purge:?}");
            // A 304 may be for any page.
            admits(&guard, 0, 304, "/cms", &[], at(90));
            assert_eq!(guard.last_passed(&purge), Some(at(90)), "{purge:?}");
        }
    }

    /// The race that stamping before checking prevents: whichever comes first, one of the two sees the other.
    #[test]
    fn a_page_and_its_purge_in_the_same_moment_do_not_miss_each_other() {
        const ROUNDS: u64 = 20_000;
        let epoch = Instant::now();
        let guard = Guard::new(epoch);
        let (turn, ready) = (AtomicU64::new(0), AtomicU64::new(0));
        let at = |round: u64| epoch + Duration::from_millis(round);
        let wait = |for_round: u64| {
            while turn.load(Ordering::SeqCst) < for_round {
                std::thread::yield_now();
            }
        };
        let name = |round: u64| format!("cat_p_{round}");
        std::thread::scope(|scope| {
            let page = scope.spawn(|| {
                let mut stored = Vec::new();
                for round in 1..=ROUNDS {
                    let name = name(round);
                    ready.store(round, Ordering::SeqCst);
                    wait(round);
                    stored.push(admits(&guard, round - 1, 200, "/p", &[("X-Magento-Tags", &name)], at(round)));
                }
                stored
            });
            let mut seen = Vec::new();
            for round in 1..=ROUNDS {
                let purge = tags(&[&name(round)]);
                while ready.load(Ordering::SeqCst) < round {
                    std::thread::yield_now();
                }
                turn.store(round, Ordering::SeqCst);
                // Varies which of the two comes first.
                (0..round % 256).for_each(|_| std::hint::spin_loop());
                guard.note(&purge);
                seen.push(guard.last_passed(&purge) >= Some(at(round)));
            }
            let stored = page.join().unwrap();
            let missed = stored.iter().zip(&seen).filter(|&(&stored, &seen)| stored && !seen).count();
            assert_eq!(missed, 0, "of {ROUNDS} pages");
        });
    }

    #[derive(Clone, Debug)]
    enum Step {
        Tags(Vec<u8>),
        Pattern(u8),
        Pool(u8),
        Path(u8),
        Everything,
    }

    impl Step {
        fn purge(&self) -> Purge {
            match self {
                Step::Tags(names) => {
                    let names: Vec<String> = names.iter().map(|name| format!("t{name}")).collect();
                    tags(&names.iter().map(String::as_str).collect::<Vec<_>>())
                }
                Step::Pattern(name) => purge(Target::Pattern(pattern(&format!("(^|,)t{name}")))),
                Step::Pool(pool) => purge(Target::Pool(pattern(&format!("^pool{pool}$")))),
                Step::Path(path) => forward("PURGE", &format!("/{path}?query"), &[("host", "a")]),
                Step::Everything => purge(Target::Everything),
            }
        }

        /// The same without an index.
        fn concerns(&self, page: &[u8], pool: u8, path: u8) -> bool {
            let begins_with = |name: &u8| page.iter().any(|tag| format!("t{tag}").starts_with(&format!("t{name}")));
            match self {
                Step::Tags(names) => names.iter().any(|name| page.contains(name)),
                Step::Pattern(name) => begins_with(name),
                Step::Pool(of) => *of == pool,
                Step::Path(of) => *of == path,
                Step::Everything => true,
            }
        }
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            20 => prop::collection::vec(0..60_u8, 1..4).prop_map(Step::Tags),
            2 => (0..60_u8).prop_map(Step::Pattern),
            1 => (0..8_u8).prop_map(Step::Pool),
            2 => (0..60_u8).prop_map(Step::Path),
            1 => Just(Step::Everything),
        ]
    }

    proptest! {
        #[test]
        fn the_guard_says_what_a_list_of_all_purges_would_say(
            steps in prop::collection::vec(step(), 1..60),
            age in 0..20_usize,
            page in prop::collection::vec(0..60_u8, 0..6),
            (pool, path) in (0..8_u8, 0..60_u8),
        ) {
            let guard = Guard::new(Instant::now());
            steps.iter().for_each(|step| guard.note(&step.purge()));
            let began = steps.len().saturating_sub(age);
            let purged = steps[began..].iter().any(|step| step.concerns(&page, pool, path));
            let names: Vec<String> = page.iter().map(|tag| format!("t{tag}")).collect();
            let (names, pool) = (names.join(","), format!("pool{pool}"));
            let fields: Fields<'_> = &[("X-Magento-Tags", &names), ("X-Pool", &pool)];
            let admitted = admits(&guard, began as u64, 200, &format!("/{path}"), fields, Instant::now());
            prop_assert_eq!(admitted, !purged);
        }
    }
}
