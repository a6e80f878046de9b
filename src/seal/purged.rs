//! The table of purged names, by which seals are judged.
//!
//! The table maps names to the position of their last purge. It has a fixed size and forgets the oldest names, with a
//! floor per bucket ([`Index`]): a seal counts as stale if it is older than the floor of the bucket of one of its
//! names, since the forgotten name may have been that one. The same holds for the floor of the whole table, up to which
//! the previous process has forgotten the purges.
//!
//! A position of an earlier run covers what was recorded here. A purge that only other replicas were told of, while no process ran
//! here, is in their tables alone until it arrives. So until it is known that all of these have arrived, their tables can make an
//! answer of an earlier run stale.
//!
//! There is one writer, which records a purge once it is durable and before it is visible to anybody. Readers take no
//! lock. The head is written last: a reader that has loaded it finds every purge up to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::text::{MAX_STAMPS, path_of};
use super::{Lineage, Name, Position, Seal, Stamp, UnsealableTags};
use crate::mutants::Mutant;
use crate::purge::index::Index;
use crate::purge::{Purge, Target};

/// Separates the hash of a path from that of a tag.
const PATH: u64 = 1;

/// The maximum number of other journals in a seal; the reader's own may come on top.
const MAX_HEARD: usize = MAX_STAMPS - 2;

/// The maximum number of tables of other replicas. An answer that only a forgotten one could judge is stale.
const MAX_INHERITED: usize = 8;

/// The names and paths that were purged, and when.
pub struct PurgedNames {
    pub(super) lineage: Lineage,
    pub(super) names: Index,
    /// Purges before this position are unknown.
    pub(super) floor: AtomicU64,
    /// The last purge of all pages.
    pub(super) all: AtomicU64,
    /// The last purge of all pages with tags.
    pub(super) tagged: AtomicU64,
    pub(super) head: AtomicU64,
    pub(super) unsealable: UnsealableTags,
    /// The journals of the other replicas, each with the last position that it was heard to have; `None` without any.
    heard: ArcSwapOption<Vec<Stamp>>,
    /// Taken to change `heard`.
    hearing: Mutex<()>,
    /// What the other replicas knew when this one met them, for answers without our stamp.
    inherited: ArcSwapOption<InheritedTables>,
    /// Purges that an earlier process knew are forgotten.
    has_forgotten_past: bool,
    /// All purges that others were told of before this process are here, too.
    has_caught_up: AtomicBool,
}

/// What the other replicas knew.
#[derive(Clone, Default)]
struct InheritedTables {
    tables: Vec<Inherited>,
    /// There were more of them than are kept.
    are_some_dropped: bool,
}

/// What another replica knew.
#[derive(Clone)]
struct Inherited {
    /// The name of the replica.
    from: Arc<str>,
    table: Arc<PurgedNames>,
}

/// The data kept of the purges before this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PastNames {
    /// The head.
    pub head: Position,
    /// Purges up to this position are unknown.
    pub floor: Position,
    /// The keys of names and paths with the position of their last purge, by position.
    pub keys: Vec<(u64, Position)>,
    /// The last purge of all pages.
    pub all: Position,
    /// The last purge of all pages with tags.
    pub tagged: Position,
    /// The unsealable tags.
    pub unsealable: Vec<Name>,
}

/// The verdict on an answer by its seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// No purge concerned it since it was rendered.
    Fresh,
    /// One did, or may have.
    Stale(StaleBecause),
}

/// Why an answer is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleBecause {
    /// Its seal has no stamp of our journal, or one with a position that it never had.
    Foreign,
    /// It is older than the floor, so that purges of it may be forgotten.
    Forgotten,
    /// A purge at this position concerned it, or one that was forgotten since and may have.
    Purged(Position),
    /// It has no seal, and its cache had not acknowledged everything up to here when it was asked.
    Unsealed(Position),
}

impl PurgedNames {
    /// A table for about this many names, of a journal with this lineage, filled with `remembered`.
    pub fn new(lineage: Lineage, names: usize, remembered: &PastNames) -> Self {
        // A bucket has room for seven, and a purged name in a full one makes all pages with names of that bucket stale that
        // are older than what it pushes out. With one name a bucket on average that is one page of 30 names in 2,000 after
        // `names` purges; with two it was one in 40, with four most of them.
        let purged = PurgedNames::of(lineage, Index::new(names), remembered);
        remembered.keys.iter().for_each(|(key, position)| purged.names.insert(*key, *position));
        purged
    }

    /// A table with these names, and what else was `remembered`.
    pub(super) fn of(lineage: Lineage, names: Index, remembered: &PastNames) -> Self {
        PurgedNames {
            lineage,
            names,
            floor: AtomicU64::new(remembered.floor),
            all: AtomicU64::new(remembered.all),
            tagged: AtomicU64::new(remembered.tagged),
            head: AtomicU64::new(remembered.head),
            unsealable: UnsealableTags::new(remembered.unsealable.iter().copied()),
            heard: ArcSwapOption::empty(),
            hearing: Mutex::default(),
            inherited: ArcSwapOption::empty(),
            has_forgotten_past: remembered.floor > 0,
            has_caught_up: AtomicBool::new(false),
        }
    }

    /// The journal that its positions belong to.
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// The unsealable tags.
    pub fn unsealable(&self) -> &UnsealableTags {
        &self.unsealable
    }

    /// The position up to which every purge is recorded. A request that loads it before it is sent to a web node may
    /// use it as the position of the seal; a reader remembers the position loaded when its request arrived.
    pub fn head(&self) -> Position {
        self.head.load(Ordering::Acquire)
    }

    /// Records a durable purge. Positions must increase, and there must be one caller at a time.
    pub fn note(&self, position: Position, purge: &Purge) {
        for target in targets(purge) {
            match target {
                PurgedKey::Name(key) => self.names.insert(key, position),
                PurgedKey::All => self.all.store(position, Ordering::Relaxed),
                PurgedKey::Tagged => self.tagged.store(position, Ordering::Relaxed),
            }
        }
        self.head.store(position, Ordering::Release);
    }

    /// Marks the purges up to this position as unknown, since some are missing.
    pub fn forget_up_to(&self, position: Position) {
        // They may be missing in what was inherited, too.
        self.inherited.store(None);
        self.floor.fetch_max(position, Ordering::Relaxed);
        self.head.fetch_max(position, Ordering::Release);
    }

    /// The stamp of the head.
    pub fn stamp(&self) -> Stamp {
        self.lineage.stamp(self.head())
    }

    /// Records a position that the journal of another replica has reached.
    pub fn hear(&self, stamp: Stamp) {
        if stamp.journal == self.lineage.journal() {
            return;
        }
        let _hearing = self.hearing.lock();
        let mut heard = self.heard.load().as_deref().cloned().unwrap_or_default();
        let known = heard.iter().position(|known| known.journal == stamp.journal).map(|known| heard.remove(known));
        // Messages overtake each other.
        let newest = known.filter(|known| known.run == stamp.run && known.position > stamp.position).unwrap_or(stamp);
        if known == Some(newest) && heard.is_empty() {
            return;
        }
        // The ones that were heard last are at the end.
        heard.push(newest);
        if heard.len() > MAX_HEARD {
            heard.remove(0);
        }
        self.heard.store(Some(Arc::new(heard)));
    }

    /// Forgets the journals of replicas that are gone, but for the last two: such a replica may be back in a moment, and then
    /// knows pages of the meantime by its stamp. `present`: the journals of those that are there.
    pub fn forget_journals_but(&self, present: &[u64]) {
        let _hearing = self.hearing.lock();
        let mut heard = self.heard.load().as_deref().cloned().unwrap_or_default();
        let is_gone = |stamp: &Stamp| !present.contains(&stamp.journal);
        let mut surplus = heard.iter().filter(|stamp| is_gone(stamp)).count().saturating_sub(2);
        heard.retain(|stamp| {
            let is_dropped = surplus > 0 && is_gone(stamp);
            surplus -= usize::from(is_dropped);
            !is_dropped
        });
        self.heard.store((!heard.is_empty()).then(|| Arc::new(heard)));
    }

    /// What the journals of the other replicas have reached: a page that is requested after this is loaded is rendered
    /// after every purge up to there. `None` without other replicas.
    pub fn heard(&self) -> Option<Arc<Vec<Stamp>>> {
        self.heard.load_full()
    }

    /// Judges answers from before another replica was met by what that one, `from`, knew: `table`, read after it knew to tell
    /// us of all later purges.
    pub fn inherit(&self, from: Arc<str>, table: PurgedNames) {
        let _hearing = self.hearing.lock();
        let mut inherited = self.inherited.load().as_deref().cloned().unwrap_or_default();
        let is_other =
            |known: &Inherited| known.from != from && known.table.lineage.journal() != table.lineage.journal();
        inherited.tables.retain(is_other);
        if inherited.tables.len() == MAX_INHERITED {
            inherited.tables.remove(0);
            inherited.are_some_dropped = true;
        }
        inherited.tables.push(Inherited { from, table: Arc::new(table) });
        self.inherited.store(Some(Arc::new(inherited)));
    }

    /// Records that all purges that others were told of before this process are here, too.
    pub fn set_caught_up(&self) {
        self.has_caught_up.store(true, Ordering::Release);
    }

    /// Parses a seal; `None` if it is none of this version.
    pub fn read<'s>(&self, seal: &'s [u8]) -> Option<Seal<'s>> {
        Seal::parse(seal, self.lineage.journal())
    }

    /// Judges an answer with this seal to a request for `target`, whose reader remembers `remembered`: the
    /// [head](PurgedNames::head) when the request arrived.
    pub fn judge(&self, seal: &Seal<'_>, target: &[u8], remembered: Position) -> Judgement {
        let Some(stamp) = seal.own else { return self.judge_by_inherited(seal, target) };
        if !self.lineage.covers(stamp, self.head()) {
            return Judgement::Stale(StaleBecause::Foreign);
        }
        let judgement = self.judge_at(stamp.position, seal, target, remembered);
        let may_have_missed = || stamp.run != self.lineage.run() && !self.has_caught_up.load(Ordering::Acquire);
        if judgement == Judgement::Fresh && may_have_missed() {
            return self.inherited_judgement(seal, target).unwrap_or(judgement);
        }
        judgement
    }

    /// The verdict on an answer that was rendered at this position.
    fn judge_at(&self, position: Position, seal: &Seal<'_>, target: &[u8], remembered: Position) -> Judgement {
        if position < self.floor.load(Ordering::Acquire) && !Mutant::IgnoredFloor.lives() {
            return Judgement::Stale(StaleBecause::Forgotten);
        }
        let last = self.last_purge(position, seal, target, remembered);
        if last > position { Judgement::Stale(StaleBecause::Purged(last)) } else { Judgement::Fresh }
    }

    /// The last purge that may concern an answer that was rendered at this position; `position` or less if there is none
    /// that its reader remembers.
    fn last_purge(&self, position: Position, seal: &Seal<'_>, target: &[u8], remembered: Position) -> Position {
        // Purges that also concern pages without names come first.
        let last = self.all.load(Ordering::Acquire).max(self.names.last(path_key(target)));
        if last > position || seal.names().len() == 0 || position >= remembered {
            return last;
        }
        let names = seal.names().map(|name| self.names.last(name.key()));
        names.max().unwrap_or(0).max(self.tagged.load(Ordering::Acquire))
    }

    /// The verdict on an answer without a stamp of our journal, which is from before this replica joined: by our purges
    /// since, and by what the others knew of earlier ones.
    fn judge_by_inherited(&self, seal: &Seal<'_>, target: &[u8]) -> Judgement {
        let foreign = Judgement::Stale(StaleBecause::Foreign);
        if self.has_forgotten_past || self.inherited.load().is_none() {
            return foreign;
        }
        let last = self.last_purge(0, seal, target, Position::MAX);
        if last > 0 {
            return Judgement::Stale(StaleBecause::Purged(last));
        }
        self.inherited_judgement(seal, target).unwrap_or(foreign)
    }

    /// The verdict on an answer by what the others knew. Each of them may know of a purge that the others were not told of yet, so
    /// each can make it stale, and one with whose stamp it comes can show it to be fresh. `None` if none does either.
    fn inherited_judgement(&self, seal: &Seal<'_>, target: &[u8]) -> Option<Judgement> {
        let inherited = self.inherited.load();
        let InheritedTables { tables, are_some_dropped } = inherited.as_deref()?;
        let stale = Some(Judgement::Stale(StaleBecause::Forgotten));
        let mut judgement = None;
        for Inherited { table, .. } in tables {
            let stamp =
                seal.stamp_of(table.lineage.journal()).filter(|stamp| table.lineage.covers(*stamp, table.head()));
            let position = stamp.map_or(0, |stamp| stamp.position);
            match table.judge_at(position, seal, target, Position::MAX) {
                Judgement::Fresh if stamp.is_some() => judgement = Some(Judgement::Fresh),
                Judgement::Fresh => {}
                Judgement::Stale(_) => return stale,
            }
        }
        if *are_some_dropped { stale } else { judgement }
    }
}

impl std::fmt::Debug for PurgedNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PurgedNames").field("lineage", &self.lineage).field("head", &self.head).finish_non_exhaustive()
    }
}

/// The names of the tags of a purge; `None` if the purge has other targets or is soft, and so cannot be sealed.
pub fn sealed_by(purge: &Purge) -> Option<Vec<Name>> {
    let mut names = Vec::new();
    for target in &purge.targets {
        let Target::Tags(tags) = target else { return None };
        names.extend(tags.iter().map(|tag| Name::of_tag(tag.as_bytes())));
    }
    (!purge.soft).then_some(names)
}

/// One recorded target of a purge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PurgedKey {
    /// A name or a path, by its key.
    Name(u64),
    /// All pages.
    All,
    /// All pages with tags.
    Tagged,
}

/// The targets of a purge that are recorded. None of a soft purge, whose first reader gets the old page on purpose; and
/// none that a seal cannot show: patterns, pools, and requests that only a VCL can interpret.
pub fn targets(purge: &Purge) -> impl Iterator<Item = PurgedKey> {
    let targets = if purge.soft { &[][..] } else { &purge.targets };
    targets.iter().flat_map(|target| {
        let (keys, one) = match target {
            Target::Tags(tags) => (Some(tags), None),
            Target::All => (None, Some(PurgedKey::All)),
            Target::Everything => (None, Some(PurgedKey::Tagged)),
            Target::Forward(forward) => (None, forward.page().map(|page| PurgedKey::Name(path_key(page.as_bytes())))),
            Target::Pattern(_) | Target::Pool(_) => (None, None),
        };
        let names = keys.into_iter().flat_map(|tags| tags.iter());
        names.map(|tag| PurgedKey::Name(Name::of_tag(tag.as_bytes()).key())).chain(one)
    })
}

/// The key of a target's path, without its query: a VCL may leave parts of that out of its key.
pub fn path_key(target: &[u8]) -> u64 {
    xxh3_64_with_seed(path_of(target), PATH)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::{Run, write_seal};
    use super::*;
    use crate::purge::{Pattern, TagSet};

    const JOURNAL: u64 = 7;

    fn lineage() -> Lineage {
        Lineage::new(JOURNAL, Run(1), vec![])
    }

    fn purged(names: usize) -> PurgedNames {
        PurgedNames::new(lineage(), names, &PastNames::default())
    }

    fn one(target: Target) -> Purge {
        Purge { targets: vec![target], soft: false }
    }

    fn tags(tags: &[&str]) -> Purge {
        one(Target::Tags(tags.iter().copied().collect::<TagSet>()))
    }

    fn url(target: &str) -> Purge {
        let forward = format!(r#"{{"method":"PURGE","target":"{target}","headers":[["host","shop.test"]]}}"#);
        one(Target::Forward(serde_json::from_str(&forward).unwrap()))
    }

    /// Judges a page with these tags that was sealed at `position`.
    fn judge(purged: &PurgedNames, tags: &[&str], position: Position, remembered: Position) -> Judgement {
        judge_by(purged, &lineage(), tags, position, remembered)
    }

    fn judge_by(
        purged: &PurgedNames,
        by: &Lineage,
        tags: &[&str],
        position: Position,
        remembered: Position,
    ) -> Judgement {
        let mut text = Vec::new();
        let mut names = tags.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect();
        write_seal(&mut text, std::iter::once(by.stamp(position)), 1, &mut names);
        purged.judge(&Seal::parse(&text, JOURNAL).unwrap(), b"/p/1?a=b", remembered)
    }

    fn is_stale(verdict: Judgement) -> bool {
        verdict != Judgement::Fresh
    }

    #[test]
    fn few_pages_are_stale_that_were_never_purged_when_the_table_is_full() {
        // A power of two: others have more buckets than names.
        const NAMES: usize = 1 << 16;
        const PAGES: usize = 20_000;
        let purged = purged(NAMES);
        let purge = |range: std::ops::Range<usize>| {
            range.for_each(|number| purged.note(number as u64 + 1, &tags(&[&format!("purged_{number}")])));
        };
        // The page is rendered when the table is full already.
        purge(0..2 * NAMES);
        let rendered = purged.head();
        purge(2 * NAMES..3 * NAMES);
        let pages = (0..PAGES).map(|page| (0..30).map(|tag| format!("page_{page}_{tag}")).collect::<Vec<_>>());
        let of = |page: Vec<String>| page.iter().map(|tag| Name::of_tag(tag.as_bytes()).key()).collect::<Vec<_>>();
        let is_stale = |page: &Vec<u64>| page.iter().any(|key| purged.names.has_since(*key, rendered));
        let stale = pages.map(of).filter(is_stale).count();
        assert!(stale * 1_000 < PAGES, "{stale} of {PAGES}");
    }

    #[test]
    fn a_page_is_stale_from_the_purge_of_one_of_its_tags_on() {
        let purged = purged(100);
        purged.note(3, &tags(&["a", "x"]));
        purged.note(4, &tags(&["y"]));
        assert_eq!(judge(&purged, &["a", "b"], 2, 4), Judgement::Stale(StaleBecause::Purged(3)));
        assert_eq!(judge(&purged, &["a", "b"], 3, 4), Judgement::Fresh);
        assert_eq!(judge(&purged, &["b"], 0, 4), Judgement::Fresh);
        // A reader who came before the purge may get it: the purge is newer than the position that he remembers.
        assert_eq!(judge(&purged, &["a"], 2, 2), Judgement::Fresh);
    }

    #[test]
    fn what_concerns_pages_without_tags_is_looked_at_whoever_asks() {
        for (purge, concerns_nameless) in [
            (url("/p/1"), true),
            (url("/p/1?other=query"), true),
            (url("/p/2"), false),
            (one(Target::All), true),
            (one(Target::Everything), false),
        ] {
            let purged = purged(100);
            purged.note(5, &purge);
            let stale = |tags: &[&str], remembered| is_stale(judge(&purged, tags, 4, remembered));
            assert_eq!(stale(&[], 5), concerns_nameless, "{purge:?}");
            assert_eq!(stale(&["a"], 4), concerns_nameless, "{purge:?}");
            assert!(!is_stale(judge(&purged, &["a"], 5, 5)), "{purge:?}");
        }
        let purged = purged(100);
        purged.note(5, &Purge::everything());
        assert!(is_stale(judge(&purged, &["a"], 4, 5)));
    }

    #[test]
    fn what_no_seal_can_show_and_what_is_soft_makes_nothing_stale() {
        let purged = purged(100);
        let pattern = || Pattern::try_from("a".to_owned()).unwrap();
        purged.note(1, &one(Target::Pattern(pattern())));
        purged.note(2, &one(Target::Pool(pattern())));
        purged.note(3, &Purge { soft: true, ..tags(&["a"]) });
        purged.note(4, &Purge { soft: true, ..Purge::everything() });
        assert_eq!(judge(&purged, &["a"], 0, 4), Judgement::Fresh);
    }

    #[test]
    fn a_seal_of_another_journal_or_beyond_its_run_is_stale_whatever_it_says() {
        let now = Lineage::new(JOURNAL, Run(2), vec![(Run(1), 4)]);
        let purged = PurgedNames::new(now.clone(), 100, &PastNames { head: 9, ..PastNames::default() });
        let foreign = Judgement::Stale(StaleBecause::Foreign);
        let by = |lineage: &Lineage, position| judge_by(&purged, lineage, &[], position, 0);
        assert_eq!(by(&Lineage::new(JOURNAL + 1, Run(2), vec![]), 1), foreign);
        assert_eq!(by(&Lineage::new(JOURNAL, Run(3), vec![]), 1), foreign);
        assert_eq!((by(&lineage(), 4), by(&lineage(), 5)), (Judgement::Fresh, foreign));
        assert_eq!((by(&now, 9), by(&now, 10)), (Judgement::Fresh, foreign));
    }

    #[test]
    fn below_the_floor_is_stale_and_above_it_what_is_remembered_counts() {
        let key = Name::of_tag(b"a").key();
        let remembered = PastNames { head: 20, floor: 10, keys: vec![(key, 15)], tagged: 12, ..PastNames::default() };
        let purged = PurgedNames::new(lineage(), 100, &remembered);
        assert_eq!(judge(&purged, &[], 9, 20), Judgement::Stale(StaleBecause::Forgotten));
        assert_eq!(judge(&purged, &[], 10, 20), Judgement::Fresh);
        assert_eq!(judge(&purged, &["b"], 11, 20), Judgement::Stale(StaleBecause::Purged(12)));
        assert_eq!(judge(&purged, &["b"], 12, 20), Judgement::Fresh);
        assert_eq!(judge(&purged, &["a"], 14, 20), Judgement::Stale(StaleBecause::Purged(15)));
    }

    /// A step of a history.
    #[derive(Clone, Debug)]
    enum Step {
        /// A purge of these tags.
        Purge(BTreeSet<u8>),
        /// A purge of the page by its path.
        Url,
        Everything,
        All,
        /// A page with these tags is requested, and is stored this many steps later.
        Render(BTreeSet<u8>, usize),
        /// The process ends; the next one finds what was durable.
        Restart,
    }

    fn some_tags() -> impl Strategy<Value = BTreeSet<u8>> {
        prop::collection::btree_set(0..12_u8, 0..4)
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => some_tags().prop_map(Step::Purge),
            1 => Just(Step::Url),
            1 => Just(Step::Everything),
            1 => Just(Step::All),
            8 => (some_tags(), 0..4_usize).prop_map(|(tags, later)| Step::Render(tags, later)),
            1 => Just(Step::Restart),
        ]
    }

    /// A page as a cache has it.
    struct Stored {
        tags: BTreeSet<u8>,
        /// The position up to which its content reflects every purge.
        rendered_at: Position,
        seal: Vec<u8>,
    }

    fn tag_texts(tags: &BTreeSet<u8>) -> Vec<String> {
        tags.iter().map(|tag| format!("t{tag}")).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// No ban is ever sent here: whatever a cache still has, no verdict "fresh" is wrong; and if the table is large
        /// enough, no verdict "stale" is.
        #[test]
        fn no_page_that_is_older_than_its_purge_is_called_fresh(
            steps in prop::collection::vec(step(), 1..60), is_small: bool,
        ) {
            let capacity = if is_small { 7 } else { 7 * 64 };
            let (mut run, mut ended) = (1, Vec::new());
            let mut current = Lineage::new(JOURNAL, Run(run), vec![]);
            let mut table = PurgedNames::new(current.clone(), capacity, &PastNames::default());
            let mut history: Vec<Purge> = Vec::new();
            let mut under_way: Vec<(usize, Stored)> = Vec::new();
            let mut stored: Vec<Stored> = Vec::new();
            for step in &steps {
                let purge = match step {
                    Step::Purge(set) => {
                        let texts = tag_texts(set);
                        Some(tags(&texts.iter().map(String::as_str).collect::<Vec<_>>()))
                    }
                    Step::Url => Some(url("/p/1")),
                    Step::Everything => Some(Purge::everything()),
                    Step::All => Some(one(Target::All)),
                    Step::Render(..) | Step::Restart => None,
                };
                if let Some(purge) = purge {
                    history.push(purge);
                    table.note(history.len() as Position, history.last().unwrap());
                }
                if let Step::Render(set, later) = step {
                    let position = table.head();
                    let texts = tag_texts(set);
                    let mut names = texts.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect();
                    let mut seal = Vec::new();
                    write_seal(&mut seal, std::iter::once(current.stamp(position)), 1, &mut names);
                    under_way.push((*later, Stored { tags: set.clone(), rendered_at: position, seal }));
                }
                if let Step::Restart = step {
                    ended.push((Run(run), table.head()));
                    run += 1;
                    current = Lineage::new(JOURNAL, Run(run), ended.clone());
                    let mut remembered = PastNames { head: table.head(), ..PastNames::default() };
                    for (position, purge) in (1..).zip(&history) {
                        for noted in targets(purge) {
                            match noted {
                                PurgedKey::Name(key) => remembered.keys.push((key, position)),
                                PurgedKey::All => remembered.all = position,
                                PurgedKey::Tagged => remembered.tagged = position,
                            }
                        }
                    }
                    table = PurgedNames::new(current.clone(), capacity, &remembered);
                }
                for (later, _) in &mut under_way {
                    *later = later.saturating_sub(1);
                }
                let landed = under_way.extract_if(.., |(later, _)| *later == 0);
                stored.extend(landed.map(|(_, page)| page));
                for page in &stored {
                    let concerns = |purge: &Purge| purge.targets.iter().any(|target| match target {
                        Target::Tags(purged) => purged.iter().any(|tag| tag_texts(&page.tags).contains(&tag.to_owned())),
                        Target::Everything => !page.tags.is_empty(),
                        _ => true,
                    });
                    let since = &history[page.rendered_at as usize..];
                    let is_old = since.iter().any(concerns);
                    let seal = Seal::parse(&page.seal, JOURNAL).unwrap();
                    let verdict = table.judge(&seal, b"/p/1", table.head());
                    if is_old {
                        prop_assert_ne!(verdict, Judgement::Fresh, "{:?} of {}", page.tags, page.rendered_at);
                    } else if !is_small {
                        prop_assert_eq!(verdict, Judgement::Fresh, "{:?} of {}", page.tags, page.rendered_at);
                    }
                }
            }
        }
    }
}
