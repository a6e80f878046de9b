//! Pages that a node has though they were purged: what it is told once more.
//!
//! The edge has caught such an answer ([`crate::seal`]), and its reader waits. The node may have acknowledged the purge long
//! ago, so this is beside its cursor: it gets a ban of just what was purged of these pages. All that wait for one node
//! wait for the same ban: what is caught while one is on its way goes with the next.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::Deliveries;
use super::walk::{Batch, Sources};
use crate::fleet::NodeId;
use crate::journal::{Entry, Missed, Position};
use crate::purge::{Purge, Target};
use crate::seal::{Name, StalePage, path_key};

/// Beyond this many pages the node is told to drop everything.
const MAX_PAGES: usize = 1_000;

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
    /// How many bans were taken before.
    taken: u64,
}

/// What is told at once.
#[derive(Debug)]
pub(super) struct Taken {
    /// The number of its ban.
    pub(super) number: u64,
    pages: Vec<StalePage>,
}

impl Caught {
    /// A page was caught. Returns the number of the ban that it is in.
    fn push(&self, page: StalePage) -> u64 {
        let mut gathered = self.state.lock();
        // One more than allowed says that there were more.
        if gathered.pages.len() <= MAX_PAGES && !gathered.pages.contains(&page) {
            gathered.pages.push(page);
        }
        self.ring.notify_one();
        gathered.taken + 1
    }

    /// Returns when there is something to tell.
    pub(super) async fn due(&self) {
        while self.state.lock().pages.is_empty() {
            self.ring.notified().await;
        }
    }

    /// What there is to tell. Whoever comes later is in the next ban.
    pub(super) fn take(&self) -> Taken {
        let mut gathered = self.state.lock();
        gathered.taken += 1;
        Taken { number: gathered.taken, pages: std::mem::take(&mut gathered.pages) }
    }

    /// The node has acknowledged this ban.
    pub(super) fn done(&self, number: u64) {
        self.told.send_replace(number);
    }
}

impl Taken {
    /// The ban, at the end of a walk that ends at `at`. Reads what was purged since these pages were rendered: of a long journal that takes a moment.
    pub(super) fn batch(&self, at: Position, sources: &Sources) -> Batch {
        Batch::of(&self.purge(sources), at, sources)
    }

    /// What was purged of these pages; everything, if nobody knows any more.
    fn purge(&self, sources: &Sources) -> Purge {
        let all = Purge { targets: vec![Target::All], soft: false };
        let oldest = self.pages.iter().map(StalePage::known_since).min().flatten();
        let (Some(oldest), true) = (oldest, self.pages.len() <= MAX_PAGES) else { return all };
        match sources.journal.since(oldest) {
            Missed::Entries(entries) => purged_of(&self.pages, &entries).unwrap_or(all),
            Missed::Truncated => all,
        }
    }
}

/// What these purges are of these pages; `None` if there is a page of which they are nothing.
fn purged_of(pages: &[StalePage], entries: &[Arc<Entry>]) -> Option<Purge> {
    let (mut targets, mut told, mut told_paths) = (Vec::new(), HashSet::new(), HashSet::new());
    let mut has_flush = false;
    let names: HashSet<Name> = pages.iter().flat_map(|page| page.names.iter().copied()).collect();
    let paths: HashSet<u64> = pages.iter().map(|page| path_key(&page.path)).collect();
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
            Target::All => return Some(Purge { targets: vec![Target::All], soft: false }),
            Target::Everything => has_flush = true,
            Target::Forward(forward) => {
                let path = forward.page().map(|page| path_key(page.as_bytes())).filter(|path| paths.contains(path));
                // Each of them: they may be of several hosts.
                targets.extend(path.map(|path| {
                    told_paths.insert(path);
                    target.clone()
                }));
            }
            Target::Pattern(_) | Target::Pool(_) => {}
        }
    }
    targets.extend(has_flush.then_some(Target::Everything));
    let is_told = |page: &StalePage| {
        (has_flush && !page.names.is_empty())
            || page.names.iter().any(|name| told.contains(name))
            || told_paths.contains(&path_key(&page.path))
    };
    pages.iter().all(is_told).then_some(Purge { targets, soft: false })
}

impl Deliveries {
    /// Has a node told once more of what was purged of this page, which it still has. Returns whether it has acknowledged
    /// that within `patience`.
    pub async fn drop_caught(&self, node: &NodeId, page: StalePage, patience: Duration) -> bool {
        let (caught, number) = {
            let Some(delivery) = self.nodes.get(node) else { return false };
            let caught = Arc::clone(&delivery.state.caught);
            let number = caught.push(page);
            (caught, number)
        };
        let mut told = caught.told.subscribe();
        let acknowledged = told.wait_for(|told| *told >= number);
        tokio::time::timeout(patience, acknowledged).await.is_ok_and(|told| told.is_ok())
    }
}
