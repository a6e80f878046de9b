//! Pages that a node has though they were purged: what it is told once more.
//!
//! The edge has caught such an answer ([`crate::seal`]), and its reader waits. The node may have acknowledged the purge long
//! ago, so this is beside its cursor: it gets a ban of just what was purged of these pages. All that wait for one node
//! wait for the same ban: what is caught while one is on its way goes with the next.

use std::collections::HashSet;
use std::sync::Arc;

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::walk::{Batch, Sources};
use crate::journal::{Entry, Missed, Position};
use crate::purge::{Forward, Purge, Target};
use crate::seal::{Name, StalePage, path_key};

/// Beyond this many pages the node is told to drop everything.
const MAX_PAGES: usize = 1_000;

/// The pause after everything was dropped for pages of which nobody knows what was purged, at first and at most. It doubles
/// each time: what helps against a journal that was lost, once, does not help against a node that shows such a page for ever.
const EMPTIED: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));

/// What was caught of one node.
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
    /// The node is to drop everything.
    is_all: bool,
    /// It is, whatever was caught.
    is_ordered: bool,
    /// How many bans were taken before.
    taken: u64,
}

/// How often everything is dropped for what was caught of a node.
#[derive(Debug, Default)]
pub(super) struct EmptyingPace(Option<(Instant, Duration)>);

impl EmptyingPace {
    /// Whether it may be now.
    pub(super) fn admits(&mut self, now: Instant) -> bool {
        let (first, longest) = EMPTIED;
        let pause = match self.0 {
            Some((at, pause)) if now.duration_since(at) < pause => return false,
            Some((at, pause)) if now.duration_since(at) < pause + longest => (2 * pause).min(longest),
            _ => first,
        };
        self.0 = Some((now, pause));
        true
    }
}

/// What is told at once.
#[derive(Debug)]
pub(super) struct Taken {
    /// The number of its ban.
    pub(super) number: u64,
    pages: Vec<StalePage>,
    is_all: bool,
    is_ordered: bool,
}

impl Caught {
    /// A page was caught. Returns the number of the ban that it is in.
    fn push(&self, page: StalePage) -> u64 {
        let mut gathered = self.state.lock();
        let is_full = gathered.pages.len() == MAX_PAGES;
        gathered.is_all |= is_full || page.known_since().is_none();
        if !is_full && page.known_since().is_some() && !gathered.pages.contains(&page) {
            gathered.pages.push(page);
        }
        self.ring.notify_one();
        gathered.taken + 1
    }

    /// Has the node told of a page that it still has. Returns when it has acknowledged that.
    pub(super) async fn tell(&self, page: StalePage) {
        let number = self.push(page);
        // The sender lives as long as this.
        _ = self.told.subscribe().wait_for(|told| *told >= number).await;
    }

    /// Returns when there is something to tell.
    pub(super) async fn due(&self) {
        while self.state.lock().is_empty() {
            self.ring.notified().await;
        }
    }

    /// What there is to tell. Whoever comes later is in the next ban.
    pub(super) fn take(&self) -> Taken {
        let mut gathered = self.state.lock();
        gathered.taken += 1;
        let (pages, is_all) = (std::mem::take(&mut gathered.pages), std::mem::take(&mut gathered.is_all));
        let is_ordered = std::mem::take(&mut gathered.is_ordered);
        Taken { number: gathered.taken, pages, is_all, is_ordered }
    }

    /// The node is to drop everything.
    pub(super) fn drop_everything(&self) {
        self.state.lock().is_ordered = true;
        self.ring.notify_one();
    }

    /// The node has acknowledged this ban.
    pub(super) fn done(&self, number: u64) {
        self.told.send_replace(number);
    }
}

impl Gathered {
    fn is_empty(&self) -> bool {
        self.pages.is_empty() && !self.is_all && !self.is_ordered
    }
}

impl Taken {
    /// The ban, at the end of a walk that ends at `at`. If everything would be dropped and `pace` does not admit that, what is
    /// known to be purged of these pages. Reads what was purged since they were rendered: of a long journal that takes a moment.
    pub(super) fn batch(&self, at: Position, sources: &Sources, pace: &mut EmptyingPace) -> Batch {
        let oldest = self.pages.iter().filter_map(StalePage::known_since).min();
        let entries = match oldest.map(|oldest| sources.journal.since(oldest)) {
            Some(Missed::Entries(entries)) => entries,
            Some(Missed::Truncated) | None => Vec::new(),
        };
        let (mut targets, is_enough) = purged_of(&self.pages, &entries);
        let empties = self.is_all || !is_enough || targets.contains(&Target::All);
        if self.is_ordered || (empties && pace.admits(Instant::now())) {
            targets = vec![Target::All];
        } else {
            targets.retain(|target| *target != Target::All);
        }
        Batch::of(&Purge { targets, soft: false }, at, sources)
    }
}

/// What these purges are of these pages, and whether there is something of each.
fn purged_of(pages: &[StalePage], entries: &[Arc<Entry>]) -> (Vec<Target>, bool) {
    let (mut targets, mut told, mut told_urls) = (Vec::new(), HashSet::new(), HashSet::new());
    let mut purged_paths = HashSet::new();
    let (mut has_flush, mut has_all) = (false, false);
    let names: HashSet<Name> = pages.iter().flat_map(|page| page.names.iter().copied()).collect();
    let paths: HashSet<u64> = pages.iter().map(|page| path_key(&page.target)).collect();
    for target in entries.iter().filter(|entry| !entry.purge.soft).flat_map(|entry| &entry.purge.targets) {
        match target {
            Target::Tags(tags) => {
                // Each once, however often it was purged.
                let tags = tags.filter(|tag| {
                    let name = Name::of_tag(tag.as_bytes());
                    names.contains(&name) && told.insert(name)
                });
                targets.extend(tags.map(Target::Tags));
            }
            Target::All => has_all = true,
            Target::Everything => has_flush = true,
            Target::Forward(forward) => {
                let path = forward.page().map(|page| path_key(page.as_bytes())).filter(|path| paths.contains(path));
                purged_paths.extend(path);
            }
            Target::Pattern(_) | Target::Pool(_) => {}
        }
    }
    // Their own URLs: a purge of one with another query, or of another host, concerns them by their seal and drops nothing.
    let is_purged = |page: &&StalePage| purged_paths.contains(&path_key(&page.target));
    for url in pages.iter().filter(is_purged).filter_map(|page| Forward::of_page(&page.host, &page.target)) {
        if told_urls.insert(url.clone()) {
            targets.push(Target::Forward(url));
        }
    }
    targets.extend(has_flush.then_some(Target::Everything));
    targets.extend(has_all.then_some(Target::All));
    let is_told = |page: &StalePage| {
        has_all
            || (has_flush && !page.names.is_empty())
            || page.names.iter().any(|name| told.contains(name))
            || is_purged(&page)
    };
    let is_enough = pages.iter().all(is_told);
    (targets, is_enough)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::TagSet;
    use crate::seal::StaleBecause;

    fn page(path: &str, tags: &[&str]) -> StalePage {
        let names = tags.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect();
        let because = StaleBecause::Purged(9);
        StalePage { because, position: 1, id: 7, names, target: path.into(), host: b"shop".into(), asked_at: 9 }
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
        assert_eq!(purged_of(&pages, &entries), (vec![tags(&["a"]), tags(&["b"])], true));
    }

    #[test]
    fn a_page_of_which_nothing_is_known_is_dropped_with_everything() {
        let pages = [page("/a", &["a"]), page("/b", &["b"])];
        assert_eq!(purged_of(&pages, &[entry(vec![tags(&["a"])], false)]), (vec![tags(&["a"])], false));
        // One without tags is dropped by its URL, and not by what drops pages with tags.
        let bare = [page("/a", &[])];
        assert!(!purged_of(&bare, &[entry(vec![Target::Everything], false)]).1);
        let own = Target::Forward(Forward::of_page(b"shop", b"/a").unwrap());
        assert_eq!(purged_of(&bare, &[entry(vec![url("/a?b=c"), url("/a")], false)]), (vec![own], true));
        let all = entry(vec![tags(&["a"]), Target::All], false);
        assert_eq!(purged_of(&pages, &[all]), (vec![tags(&["a"]), Target::All], true));
    }

    #[tokio::test]
    async fn all_that_is_caught_while_a_ban_is_under_way_goes_with_the_next() {
        let caught = Caught::default();
        let first = caught.push(page("/a", &["a"]));
        assert_eq!(caught.push(page("/a", &["a"])), first);
        caught.due().await;
        let under_way = caught.take();
        let second = caught.push(page("/b", &["b"]));
        assert_eq!((under_way.number, under_way.pages.len(), second), (first, 1, first + 1));
        caught.done(under_way.number);
        assert!(*caught.told.borrow() >= first && *caught.told.borrow() < second);
        caught.due().await;
        assert_eq!(caught.take().number, second);
    }

    #[test]
    fn more_pages_than_are_kept_are_everything() {
        let caught = Caught::default();
        for number in 0..=MAX_PAGES {
            caught.push(page(&format!("/{number}"), &["a"]));
        }
        let taken = caught.take();
        assert!(taken.is_all && taken.pages.len() == MAX_PAGES);
    }

    #[test]
    fn everything_is_dropped_ever_more_seldom() {
        let (mut pace, began) = (EmptyingPace::default(), Instant::now());
        let mut admits = |second| pace.admits(began + Duration::from_secs(second));
        let admitted = (0..86_400).filter(|second| admits(*second)).count();
        // After 0, 10, 30, 70 and so on seconds, and each hour in the end.
        assert!((24..=34).contains(&admitted), "{admitted}");
        assert!(admits(200_000) && !admits(200_009) && admits(200_010), "long after the last one it begins anew");
    }
}
