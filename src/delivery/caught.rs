//! Repeats purges to a node that still returns purged pages.
//!
//! The edge has detected such an answer ([`crate::seal`]), and its client waits. The node may have acknowledged the
//! purge long ago, so these bans are sent independently of its cursor, and only for the purged tags and URLs of these
//! pages. Bans are batched per node: pages that are caught while a ban is in flight go into the next one.
//!
//! If it is unknown which purge concerned a page, only a flush drops it. One flush covers all such pages that the node
//! has by then, the pauses between flushes grow, and stale pages that remain afterwards are fetched from other nodes.
//! The same holds for a page that is still returned after its ban was acknowledged: this node does not purge it. The
//! node is flushed once, and reported in the status; repeating the ban would not help.

use std::collections::HashSet;
use std::sync::Arc;

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::walk::Sources;
use crate::journal::{Entry, Missed, Position};
use crate::purge::{Forward, Purge, Target};
use crate::seal::{Name, StalePage, path_key};

/// With more pages than this the node is flushed instead.
const MAX_PAGES: usize = 1_000;

/// The maximum number of remembered pages that a node did not drop. When it is reached all are forgotten; such pages
/// are detected again.
const MAX_KEPT: usize = 10_000;

/// The pause after a flush for pages whose purge is unknown, at first and at most. It doubles each time: one flush is
/// enough after a lost journal, but none helps against a node that keeps returning such pages.
const EMPTIED: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));

/// The stale pages caught from one node.
#[derive(Debug, Default)]
pub(super) struct Caught {
    state: Mutex<Gathered>,
    ring: Notify,
    /// The number of the last ban that the node has acknowledged.
    told: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Gathered {
    pages: Vec<StalePage>,
    /// Whether the next ban is a flush.
    is_all: bool,
    /// The number of bans taken so far.
    taken: u64,
    /// The last flush.
    flush: Option<Flush>,
    /// Limits the flushes for caught pages.
    pace: EmptyingPace,
    /// The ids of pages that are not banned again: the node kept them after acknowledging a ban, or their purge is
    /// unknown.
    kept: HashSet<u64>,
    /// Whether the first kept page was reported.
    is_reported: bool,
}

/// A ban of everything.
#[derive(Clone, Copy, Debug)]
struct Flush {
    /// Its number.
    number: u64,
    /// The journal head when it was taken: older pages should be gone.
    at: Position,
}

/// The rate limit of flushes for caught pages: the last flush, and the pause after it.
#[derive(Debug, Default)]
struct EmptyingPace(Option<(Instant, Duration)>);

impl EmptyingPace {
    /// Whether a flush is allowed now; if so, it is recorded.
    fn admits(&mut self, now: Instant) -> bool {
        let (first, longest) = EMPTIED;
        let pause = match self.0 {
            Some((at, pause)) if now.duration_since(at) < pause => return false,
            Some((at, pause)) if now.duration_since(at) < 2 * longest => (2 * pause).min(longest),
            _ => first,
        };
        self.0 = Some((now, pause));
        true
    }
}

/// The batch of pages of one ban.
#[derive(Debug)]
pub(super) struct Taken {
    /// The number of its ban.
    pub(super) number: u64,
    pages: Vec<StalePage>,
    is_all: bool,
    /// The journal head at the last flush: older pages were already flushed.
    flushed_at: Position,
}

impl Caught {
    /// Adds a caught page. Returns the number of the ban that will contain it; `None` if no ban drops it at this node.
    fn push(&self, page: StalePage) -> Option<u64> {
        let mut gathered = self.state.lock();
        if gathered.kept.contains(&page.id) {
            return None;
        }
        let flushed = gathered.flush.filter(|flush| page.is_foreign() || page.position < flush.at);
        match (page.known_since(), flushed) {
            (None, Some(flush)) => return (*self.told.borrow() < flush.number).then_some(flush.number),
            (None, None) if gathered.is_all || gathered.pace.admits(Instant::now()) => gathered.is_all = true,
            (None, None) => return None,
            (Some(_), _) if gathered.pages.len() == MAX_PAGES => gathered.is_all = true,
            (Some(_), _) if gathered.pages.contains(&page) => {}
            (Some(_), _) => gathered.pages.push(page),
        }
        self.ring.notify_one();
        Some(gathered.taken + 1)
    }

    /// Queues a ban for a page that the node still has. Returns `true` once the node has acknowledged it, and `false`
    /// at once if no ban drops the page at this node.
    pub(super) async fn tell(&self, page: StalePage) -> bool {
        let Some(number) = self.push(page) else { return false };
        // Cannot fail: `self` owns the sender.
        self.told.subscribe().wait_for(|told| *told >= number).await.is_ok()
    }

    /// Records that the node still returned this page after acknowledging its ban. Returns whether it is the first such
    /// page of the node: if so, the node is flushed.
    pub(super) fn record_kept(&self, id: u64) -> bool {
        let mut gathered = self.state.lock();
        if gathered.kept.contains(&id) {
            return false;
        }
        gathered.keep(id);
        let is_first = !std::mem::replace(&mut gathered.is_reported, true);
        gathered.is_all |= is_first && gathered.pace.admits(Instant::now());
        drop(gathered);
        self.ring.notify_one();
        is_first
    }

    /// Returns when a ban is due.
    pub(super) async fn due(&self) {
        while self.state.lock().is_empty() {
            self.ring.notified().await;
        }
    }

    /// Takes the queued pages; later ones go into the next ban. `head`: the head of the journal.
    pub(super) fn take(&self, head: Position) -> Taken {
        let mut gathered = self.state.lock();
        gathered.taken += 1;
        let (number, flushed_at) = (gathered.taken, gathered.flush.map_or(0, |flush| flush.at));
        let (pages, is_all) = (std::mem::take(&mut gathered.pages), std::mem::take(&mut gathered.is_all));
        if is_all {
            gathered.flush = Some(Flush { number, at: head });
        }
        Taken { number, pages, is_all, flushed_at }
    }

    /// The purge to send: the targets purged since these pages were rendered. It is a flush if the purge of a page is
    /// unknown, no flush has covered that page yet, and the pace allows one. Pages that remain unknown are not banned
    /// again. Reads the journal, which takes a moment if it is long. `head`: the head of the journal when the pages
    /// were taken.
    pub(super) fn purge(&self, taken: &Taken, sources: &Sources, head: Position) -> Purge {
        let all = Purge { targets: vec![Target::All], soft: false };
        if taken.is_all {
            return all;
        }
        let oldest = taken.pages.iter().filter_map(StalePage::known_since).min();
        let entries = match oldest.map(|oldest| sources.journal.since(oldest)) {
            Some(Missed::Entries(entries)) => entries,
            Some(Missed::Truncated) | None => Vec::new(),
        };
        let (targets, unknown) = purged_of(&taken.pages, &entries);
        let mut gathered = self.state.lock();
        if unknown.iter().any(|page| page.position >= taken.flushed_at) && gathered.pace.admits(Instant::now()) {
            gathered.flush = Some(Flush { number: taken.number, at: head });
            return all;
        }
        unknown.iter().for_each(|page| gathered.keep(page.id));
        Purge { targets, soft: false }
    }

    /// Records that the node has acknowledged this ban.
    pub(super) fn done(&self, number: u64) {
        self.told.send_replace(number);
    }
}

impl Gathered {
    fn is_empty(&self) -> bool {
        self.pages.is_empty() && !self.is_all
    }

    /// Excludes this page from further bans.
    fn keep(&mut self, id: u64) {
        if self.kept.len() == MAX_KEPT {
            self.kept.clear();
        }
        self.kept.insert(id);
    }
}

/// The targets in these entries that concern these pages, and the pages that no target concerns.
fn purged_of<'p>(pages: &'p [StalePage], entries: &[Arc<Entry>]) -> (Vec<Target>, Vec<&'p StalePage>) {
    let (mut targets, mut told, mut told_urls) = (Vec::new(), HashSet::new(), HashSet::new());
    let (mut purged_paths, mut has_flush) = (HashSet::new(), false);
    let names: HashSet<Name> = pages.iter().flat_map(|page| page.names.iter().copied()).collect();
    let paths: HashSet<u64> = pages.iter().map(|page| path_key(&page.target)).collect();
    for target in entries.iter().filter(|entry| !entry.purge.soft).flat_map(|entry| &entry.purge.targets) {
        match target {
            Target::Tags(tags) => {
                // Each tag once, however often it was purged.
                let tags = tags.filter(|tag| {
                    let name = Name::of_tag(tag.as_bytes());
                    names.contains(&name) && told.insert(name)
                });
                targets.extend(tags.map(Target::Tags));
            }
            // Ignored, so that the page counts as unknown: only another flush would drop it, and those are
            // rate-limited.
            Target::All => {}
            Target::Everything => has_flush = true,
            Target::Forward(forward) => {
                let path = forward.page().map(|page| path_key(page.as_bytes())).filter(|path| paths.contains(path));
                purged_paths.extend(path);
            }
            Target::Pattern(_) | Target::Pool(_) => {}
        }
    }
    // The page's own URL is sent: a purge for another query or host makes the page stale by its seal, but does not drop
    // it.
    let is_purged = |page: &&StalePage| purged_paths.contains(&path_key(&page.target));
    for url in pages.iter().filter(is_purged).filter_map(|page| Forward::of_page(&page.host, &page.target)) {
        if told_urls.insert(url.clone()) {
            targets.push(Target::Forward(url));
        }
    }
    targets.extend(has_flush.then_some(Target::Everything));
    let is_told = |page: &StalePage| {
        (has_flush && !page.names.is_empty()) || page.names.iter().any(|name| told.contains(name)) || is_purged(&page)
    };
    (targets, pages.iter().filter(|page| !is_told(page)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::TagSet;
    use crate::seal::StaleBecause;

    fn page(path: &str, tags: &[&str]) -> StalePage {
        let names = tags.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect();
        let because = StaleBecause::Purged(9);
        StalePage {
            because,
            position: 1,
            id: 7,
            has_own_stamp: true,
            names,
            target: path.into(),
            host: b"shop".into(),
            asked_at: 9,
        }
    }

    fn entry(targets: Vec<Target>, soft: bool) -> Arc<Entry> {
        Arc::new(Entry { position: 2, at_ms: 0, purge: Purge { targets, soft }, origin: None })
    }

    fn tags(tags: &[&str]) -> Target {
        Target::Tags(tags.iter().copied().collect::<TagSet>())
    }

    fn url(target: &str) -> Target {
        let forward = format!(r#"{{"method":"PURGE","target":"{target}","headers":[]}}"#);
        Target::Forward(serde_json::from_str(&forward).unwrap())
    }

    #[test]
    fn a_node_is_told_only_what_was_purged_of_its_pages_and_each_tag_once() {
        let pages = [page("/a", &["a", "x"]), page("/b", &["b"])];
        let entries = [
            entry(vec![tags(&["a", "other"])], false),
            entry(vec![tags(&["other"]), url("/another")], false),
            entry(vec![tags(&["x"])], true),
            entry(vec![tags(&["a", "b"])], false),
        ];
        let (told, unknown) = purged_of(&pages, &entries);
        assert_eq!((told, unknown.len()), (vec![tags(&["a"]), tags(&["b"])], 0));
    }

    #[test]
    fn a_page_of_which_nothing_is_known_to_be_purged_is_named() {
        let pages = [page("/a", &["a"]), page("/b", &["b"])];
        let unknown = |pages: &[StalePage], entries: &[Arc<Entry>]| purged_of(pages, entries).1.len();
        assert_eq!(unknown(&pages, &[entry(vec![tags(&["a"])], false)]), 1);
        // A page without tags is dropped by its URL, not by a purge of all pages with tags.
        let bare = [page("/a", &[])];
        assert_eq!(unknown(&bare, &[entry(vec![Target::Everything], false)]), 1);
        let own = Target::Forward(Forward::of_page(b"shop", b"/a").unwrap());
        let (told, unknown) = purged_of(&bare, &[entry(vec![url("/a?b=c"), url("/a")], false)]);
        assert_eq!((told, unknown.len()), (vec![own], 0));
    }

    #[test]
    fn a_node_is_flushed_once_for_what_nobody_knows() {
        let caught = Caught::default();
        let foreign = || StalePage { because: StaleBecause::Foreign, ..page("/a", &[]) };
        let forgotten = |position| StalePage { because: StaleBecause::Forgotten, position, ..page("/a", &["a"]) };
        let first = caught.push(foreign());
        assert_eq!((first, caught.push(forgotten(3))), (Some(1), Some(1)));
        let taken = caught.take(10);
        assert!(taken.is_all);
        // They wait for the flush in flight, not for another one.
        assert_eq!((caught.push(foreign()), caught.push(forgotten(9))), (Some(1), Some(1)));
        caught.done(taken.number);
        assert_eq!((caught.push(foreign()), caught.push(forgotten(9))), (None, None));
        assert!(caught.state.lock().is_empty());
        // A page stored since then needs another flush, which the pace delays.
        assert_eq!(caught.push(forgotten(10)), None);
        caught.state.lock().pace = EmptyingPace::default();
        assert_eq!(caught.push(forgotten(10)), Some(2));
    }

    #[test]
    fn a_page_that_is_kept_in_spite_of_its_ban_is_not_banned_again() {
        let caught = Caught::default();
        assert!(caught.push(page("/a", &["a"])).is_some());
        caught.done(caught.take(10).number);
        assert!(caught.record_kept(7));
        assert!(caught.take(10).is_all, "it is flushed once");
        assert_eq!(caught.push(page("/a", &["a"])), None);
        assert!(!caught.record_kept(8) && caught.state.lock().is_empty());
        assert!(caught.push(StalePage { id: 9, ..page("/a", &["a"]) }).is_some());
    }

    #[tokio::test]
    async fn all_that_is_caught_while_a_ban_is_under_way_goes_with_the_next() {
        let caught = Caught::default();
        let first = caught.push(page("/a", &["a"]));
        assert_eq!(caught.push(page("/a", &["a"])), first);
        caught.due().await;
        let under_way = caught.take(9);
        let second = caught.push(page("/b", &["b"]));
        assert_eq!((Some(under_way.number), under_way.pages.len(), second), (first, 1, Some(2)));
        caught.done(under_way.number);
        assert_eq!(*caught.told.borrow(), 1);
        caught.due().await;
        assert_eq!(caught.take(9).number, 2);
    }

    #[test]
    fn more_pages_than_are_kept_are_everything() {
        let caught = Caught::default();
        for number in 0..=MAX_PAGES {
            caught.push(page(&format!("/{number}"), &["a"]));
        }
        let taken = caught.take(9);
        assert!(taken.is_all && taken.pages.len() == MAX_PAGES);
    }

    #[test]
    fn everything_is_dropped_ever_more_seldom() {
        let (mut pace, began) = (EmptyingPace::default(), Instant::now());
        let admitted = (0..86_400).filter(|second| pace.admits(began + Duration::from_secs(*second))).count();
        // After 0, 10, 30, 70, ... seconds, and in the end once an hour.
        assert!((24..=34).contains(&admitted), "{admitted}");
        assert!(
            pace.admits(began + Duration::from_secs(200_000)) && !pace.admits(began + Duration::from_secs(200_009))
        );
        assert!(pace.admits(began + Duration::from_secs(200_010)), "long after the last one it begins anew");
    }
}
