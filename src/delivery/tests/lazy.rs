//! Purges that wait for no Varnish.

use std::thread::{self, ThreadId};

use tokio::sync::Semaphore;

use super::*;
use crate::fleet::SealsShown;
use crate::journal::{BoxFuture, Cursor, Readable, WriteError};
use crate::seal::{Lineage, Name, PastNames, PurgedNames, Run, StaleBecause, StalePage};

/// A node that returns seals, and for which purges gather for longer than a test takes.
pub(super) async fn sealing(pace: Pace, journal: Arc<dyn Journal>) -> Rig {
    sealing_at(obedient(&[]).await, pace, journal)
}

/// The same at a node of the test.
pub(super) fn sealing_at(node: (SocketAddr, Told), pace: Pace, journal: Arc<dyn Journal>) -> Rig {
    let rig = untried_at(node, pace, journal);
    rig.node.live.seals.record_trial(SealsShown::Returned);
    rig.node.live.seals.record_emptied(rig.node.live.seals.doubts());
    rig
}

/// A node of which it is not known whether it returns seals, beside a clearcoat that judges them.
pub(super) async fn untried(pace: Pace, journal: Arc<dyn Journal>) -> Rig {
    untried_at(obedient(&[]).await, pace, journal)
}

fn untried_at(node: (SocketAddr, Told), pace: Pace, journal: Arc<dyn Journal>) -> Rig {
    let purged = PurgedNames::new(Lineage::new(1, Run(1), Vec::new()), 100, &PastNames::default());
    let sealed = Arc::new(SealedPurges::new(Arc::new(purged), Duration::from_secs(600), false));
    let guard = Arc::new(Guard::new(long_ago()));
    Rig::of(node, pace, journal, (guard, Some(sealed)), None)
}

pub(super) fn memory() -> Memory {
    Memory::new(Limits::default(), Arc::new(|_| ()))
}

/// A page with this tag that the node still had when it had acknowledged `asked_at`.
fn old_page(tag: &str, purged: Position, asked_at: Position) -> StalePage {
    let names = vec![Name::of_tag(tag.as_bytes())];
    let because = StaleBecause::Purged(purged);
    StalePage {
        because,
        position: 0,
        id: purged,
        has_own_stamp: true,
        names,
        target: b"/".to_vec(),
        host: b"shop".to_vec(),
        asked_at,
    }
}

#[tokio::test]
async fn whoever_waits_for_a_purge_gets_it_though_other_bans_go_first() {
    let rig = sealing(Pace { max_bans_per_second: NonZeroU32::new(4), ..CALM }, Arc::new(memory())).await;
    let refresh = |page| rig.deliveries.refresh(rig.node.id(), page, PATIENCE);
    // It uses up its ration.
    for number in 0..5 {
        let position = rig.append(&format!("tag_{number}_end")).await;
        assert!(refresh(old_page("x", position, position - 1)).await);
    }
    let position = rig.append("waited").await;
    // Both wait for the ration now, and that of the page that was banned before goes first.
    let kept = old_page("tag_0_end", 1, position - 1);
    assert_eq!(tokio::join!(refresh(old_page("waited", position, position - 1)), refresh(kept)), (true, true));
    assert_eq!(rig.told("waited").len(), 1);
}

/// A journal that notes which threads read it, and writes what is noted of blocks slowly.
struct Watched {
    journal: Memory,
    readers: Mutex<Vec<ThreadId>>,
    /// The tags of each note.
    noted: Mutex<Vec<Vec<Name>>>,
    /// Notes are durable when there is a permit for each.
    room: Semaphore,
}

impl Watched {
    fn new(room: usize) -> Arc<Self> {
        let room = Semaphore::new(room);
        Arc::new(Watched { journal: memory(), readers: Mutex::default(), noted: Mutex::default(), room })
    }
}

impl Journal for Watched {
    fn readable(&self) -> &Readable {
        self.journal.readable()
    }

    fn append(&self, purge: Purge) -> BoxFuture<'_, Result<Position, WriteError>> {
        self.journal.append(purge)
    }

    fn save_cursors(&self, cursors: Vec<(NodeId, Cursor)>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.journal.save_cursors(cursors)
    }

    fn refuse(&self, positions: Vec<Position>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.journal.refuse(positions)
    }

    fn note_unsealable(&self, names: Vec<Name>) -> BoxFuture<'_, Result<(), WriteError>> {
        self.noted.lock().push(names.clone());
        Box::pin(async move {
            let Ok(permit) = self.room.acquire().await else { return Err(WriteError::Closed) };
            permit.forget();
            self.journal.note_unsealable(names).await
        })
    }

    fn since(&self, cursor: Position) -> Missed {
        self.readers.lock().push(thread::current().id());
        self.journal.since(cursor)
    }
}

#[tokio::test]
async fn a_purge_that_gathers_is_unsealed_before_a_block_passes_and_not_here() {
    let journal = Watched::new(1);
    let rig = sealing(CALM, Arc::clone(&journal) as Arc<dyn Journal>).await;
    let purge = rig.append("block").await;
    rig.append("another").await;
    assert!(rig.deliveries.is_sealed(purge) && rig.deliveries.context.fence.admits(&rig.node.live));
    journal.readers.lock().clear();
    assert!(rig.deliveries.note_unsealable(&[Name::of_tag(b"block")]).await);
    // By now nobody is answered by this node before it has the purge.
    assert!(!rig.deliveries.is_sealed(purge) && !rig.deliveries.context.fence.admits(&rig.node.live));
    let here = thread::current().id();
    // What reads it here is the delivery that follows.
    let first = journal.readers.lock().first().copied();
    assert!(first.is_some_and(|first| first != here), "{first:?} {here:?}");
    rig.until_at(purge).await;
}

#[tokio::test]
async fn tags_that_are_being_noted_on_a_slow_disk_are_waited_for_and_noted_once() {
    let journal = Watched::new(0);
    let rig = sealing(CALM, Arc::clone(&journal) as Arc<dyn Journal>).await;
    let tags = |tags: &[&str]| tags.iter().map(|tag| Name::of_tag(tag.as_bytes())).collect::<Vec<Name>>();
    let [first, both, second] = [tags(&["a", "b"]), tags(&["b", "c"]), tags(&["c"])];
    // Nobody waits for as long as the disk takes.
    for _ in 0..2 {
        assert!(!rig.deliveries.note_unsealable(&first).await);
    }
    assert!(!rig.deliveries.note_unsealable(&both).await);
    assert_eq!(*journal.noted.lock(), [first.clone(), second]);
    // What waits for two needs both.
    let waiting = rig.deliveries.note_unsealable(&both);
    journal.room.add_permits(1);
    assert!(!waiting.await && rig.deliveries.note_unsealable(&first).await);
    journal.room.add_permits(1);
    assert!(rig.deliveries.note_unsealable(&both).await);
    assert_eq!(journal.noted.lock().len(), 2, "they are durable");
    // What could not be noted is noted anew.
    journal.room.close();
    for times in 1..3 {
        assert!(!rig.deliveries.note_unsealable(&tags(&["d"])).await);
        assert_eq!(journal.noted.lock().len(), 2 + times);
    }
    assert!(rig.deliveries.note_unsealable(&first).await);
}

#[tokio::test]
async fn a_page_under_way_that_a_seal_shows_keeps_no_other_purge_back() {
    let rig = sealing(CALM, Arc::new(memory())).await;
    rig.ran(&[400, 200]);
    let _slow = rig.begin_page("slow");
    rig.append("slow").await;
    let waits = rig.append("waits").await;
    rig.deliveries.unseal(waits);
    rig.until_at(waits).await;
    assert_eq!((rig.told("slow").len(), rig.told("waits").len()), (1, 1));
    // Of a purge that no seal shows it does.
    let passage = rig.begin_page("later");
    let later = rig.append("later").await;
    rig.deliveries.unseal(later);
    rig.until_told("later", 1).await;
    tokio::time::sleep(FILL_LATENCY * 2).await;
    assert!(rig.node.live.cursor() < later);
    passage.taken(Instant::now());
    rig.until_at(later).await;
}
