//! Caches that rely on seals, when seals cease.

use super::lazy::{memory, sealing, sealing_at, untried};
use super::*;
use crate::fleet::{ReturnsSeals, SealsShown, TrialState};

/// A flush in the form of these nodes.
const FLUSH: &str = "X-Clearcoat-Flush";

/// The node's trial shows this, as the trials hand it on.
fn shown(rig: &Rig, shown: SealsShown) {
    let before = rig.node.live.seals.record_trial(shown);
    match (before, shown) {
        (ReturnsSeals::No, SealsShown::Returned) => rig.deliveries.empty(rig.node.id()),
        (_, SealsShown::Returned) => {}
        _ => rig.deliveries.distrust(rig.node.id()),
    }
}

fn may_serve(rig: &Rig) -> bool {
    rig.deliveries.context.fence.admits(&rig.node.live)
}

async fn until_it_may_serve(rig: &Rig) {
    let serves = rig.deliveries.progress.until(|| may_serve(rig));
    tokio::time::timeout(PATIENCE, serves).await.unwrap();
}

/// A node that was told a purge of this tag once.
async fn relying(journal: Arc<dyn Journal>) -> Rig {
    relying_at(obedient(&[]).await, journal).await
}

/// The same at a node of the test.
async fn relying_at(node: (SocketAddr, Told), journal: Arc<dyn Journal>) -> Rig {
    let rig = sealing_at(node, CALM, journal);
    rig.ran(&[400, 200]);
    let position = rig.append("old").await;
    rig.deliveries.nodes.get(rig.node.id()).unwrap().state.hurry(position);
    rig.until_at(position).await;
    rig
}

#[tokio::test]
async fn a_cache_whose_seals_cease_serves_after_a_flush_that_found_all_pages() {
    let rig = relying(Arc::new(memory())).await;
    let (first, second) = (rig.begin_page("old"), rig.begin_page("another"));
    shown(&rig, SealsShown::NotReturned);
    assert!(!may_serve(&rig), "from the moment of the trial on");
    rig.until_told(FLUSH, 1).await;
    first.taken(Instant::now());
    tokio::time::sleep(FILL_LATENCY * 2).await;
    assert!(!may_serve(&rig) && rig.told(FLUSH).len() == 1);
    second.taken(Instant::now());
    until_it_may_serve(&rig).await;
    assert_eq!(rig.told(FLUSH).len(), 2);
    // Nothing relies on seals any more.
    shown(&rig, SealsShown::NotReturned);
    assert!(may_serve(&rig));
    assert!(!rig.deliveries.cursors()[0].1.relies_on_seals);
}

#[tokio::test]
async fn a_cache_that_was_told_nothing_once_is_not_flushed_when_seals_cease() {
    let rig = sealing(CALM, Arc::new(memory())).await;
    rig.ran(&[400, 200]);
    let position = rig.append("waits").await;
    rig.deliveries.unseal(position);
    rig.until_at(position).await;
    shown(&rig, SealsShown::NotReturned);
    assert!(may_serve(&rig));
    rig.purge("later").await;
    assert!(rig.told(FLUSH).is_empty());
}

#[tokio::test]
async fn a_process_that_finds_no_seals_flushes_what_an_earlier_one_told_once() {
    // A trial says that seals are returned, or that they are not; or this process judges none.
    let verdicts = [Some(SealsShown::Returned), Some(SealsShown::NotReturned), None];
    for verdict in verdicts {
        let journal: Arc<dyn Journal> = Arc::new(memory());
        let earlier = relying(Arc::clone(&journal)).await;
        journal.save_cursors(earlier.deliveries.cursors()).await.unwrap();
        let later = match verdict {
            Some(_) => untried(CALM, Arc::clone(&journal)).await,
            None => Rig::with(CALM, Arc::clone(&journal), Arc::new(Guard::new(long_ago())), None).await,
        };
        assert_eq!((may_serve(&later), later.node.live.may_hide_seals()), (verdict.is_some(), true), "no verdict yet");
        if let Some(seals) = verdict {
            later.until_at(journal.head()).await;
            assert!(later.told(FLUSH).is_empty());
            shown(&later, seals);
        }
        until_it_may_serve(&later).await;
        assert!(!later.node.live.may_hide_seals());
        assert_eq!(later.told(FLUSH).is_empty(), verdict == Some(SealsShown::Returned), "{verdict:?}");
    }
}

#[tokio::test]
async fn a_flush_of_a_node_that_carries_no_purges_out_does_not_count() {
    let rig = relying(Arc::new(memory())).await;
    rig.node.live.set_trial(TrialState::Failed);
    shown(&rig, SealsShown::NotPurged);
    rig.until_told(FLUSH, 1).await;
    let position = rig.append("later").await;
    rig.deliveries.unseal(position);
    rig.until_at(position).await;
    assert!(!may_serve(&rig) && rig.deliveries.cursors()[0].1.relies_on_seals);
    // Somebody has mended its VCL.
    rig.node.live.set_trial(TrialState::Passed);
    shown(&rig, SealsShown::NotReturned);
    until_it_may_serve(&rig).await;
    assert!(!rig.deliveries.cursors()[0].1.relies_on_seals);
}

#[tokio::test]
async fn a_page_that_arrives_while_a_flush_is_sent_is_found_by_another() {
    // The flush, which is the second that it is told, takes a while to be answered.
    let rig = relying_at(obedient(&[0, 300]).await, Arc::new(memory())).await;
    assert_eq!(rig.told.lock().len(), 1);
    let page = rig.begin_page("old");
    shown(&rig, SealsShown::NotReturned);
    rig.until_told(FLUSH, 1).await;
    page.taken(Instant::now());
    rig.ran(&[0]);
    until_it_may_serve(&rig).await;
    assert_eq!(rig.told(FLUSH).len(), 2);
}

#[tokio::test]
async fn a_node_that_is_registered_anew_owes_its_flush_still() {
    let rig = relying(Arc::new(memory())).await;
    let page = rig.begin_page("old");
    shown(&rig, SealsShown::NotReturned);
    rig.until_told(FLUSH, 1).await;
    rig.deliveries.stop(rig.node.id());
    let again = Arc::new(Node::new(rig.node.spec.clone(), Arc::default(), 2));
    rig.deliveries.start(&again, again.spec.varnish.as_ref().unwrap());
    let may_serve = || rig.deliveries.context.fence.admits(&again.live);
    assert!(again.live.may_hide_seals() && again.live.must_be_flushed(), "before any trial of it");
    again.live.seals.record_trial(SealsShown::NotReturned);
    rig.deliveries.distrust(again.id());
    page.taken(Instant::now());
    tokio::time::timeout(PATIENCE, rig.deliveries.progress.until(may_serve)).await.unwrap();
}

#[tokio::test]
async fn a_cache_is_sealed_after_a_flush_that_found_what_was_under_way() {
    let rig = sealing(CALM, Arc::new(memory())).await;
    rig.ran(&[400, 200]);
    shown(&rig, SealsShown::NotReturned);
    let page = rig.begin_page("without a seal");
    shown(&rig, SealsShown::Returned);
    rig.until_told(FLUSH, 1).await;
    tokio::time::sleep(FILL_LATENCY * 2).await;
    assert!(may_serve(&rig) && !rig.node.live.seals.is_sealing());
    page.taken(Instant::now());
    let seals = rig.deliveries.progress.until(|| rig.node.live.seals.is_sealing());
    tokio::time::timeout(PATIENCE, seals).await.unwrap();
    assert_eq!(rig.told(FLUSH).len(), 2);
}

#[tokio::test]
async fn a_node_that_is_doubted_gathers_no_purge_that_comes_later() {
    let rig = sealing(CALM, Arc::new(memory())).await;
    rig.ran(&[400, 200]);
    let first = rig.append("waits").await;
    rig.deliveries.unseal(first);
    // From then on its task waits for the next one.
    rig.until_at(first).await;
    rig.node.live.seals.set_doubted_elsewhere(true);
    rig.purge("a").await;
}

#[tokio::test]
async fn what_a_node_owes_a_mended_vcl_does_not_pay() {
    // The flush, which is the second that it is told, is not answered.
    let rig = relying_at(obedient(&[0, 60_000]).await, Arc::new(memory())).await;
    shown(&rig, SealsShown::NotReturned);
    rig.until_told(FLUSH, 1).await;
    assert!(!may_serve(&rig));
    // It returns them now: what it stored without one meanwhile is there still.
    rig.node.live.seals.record_trial(SealsShown::Returned);
    assert!(!may_serve(&rig) && rig.node.live.must_be_flushed());
}

#[tokio::test]
async fn a_node_whose_flush_counts_after_more_purges_once_relies_on_seals() {
    let rig = relying(Arc::new(memory())).await;
    rig.node.live.set_trial(TrialState::Failed);
    shown(&rig, SealsShown::NotPurged);
    rig.until_told(FLUSH, 1).await;
    let state = Arc::clone(&rig.deliveries.nodes.get(rig.node.id()).unwrap().state);
    let begun = (state.wanted_flush.times(), rig.deliveries.relying.told(&rig.node));
    // It keeps pages: no other flush is wanted for that.
    rig.deliveries.note_told_once(&rig.node, &state.wanted_flush);
    rig.node.live.set_trial(TrialState::Passed);
    rig.node.live.seals.record_trial(SealsShown::Returned);
    assert!(!may_serve(&rig));
    assert!(rig.deliveries.settle_flush(&rig.node, &state.wanted_flush, begun));
    assert!(may_serve(&rig) && rig.node.live.relies_on_seals());
}

#[tokio::test]
async fn whoever_waits_for_a_verdict_is_told_that_the_cache_must_be_flushed() {
    let rig = relying(Arc::new(memory())).await;
    rig.deliveries.stop(rig.node.id());
    let live = Arc::default();
    let again = Arc::new(Node::new(rig.node.spec.clone(), Arc::clone(&live), 2));
    rig.deliveries.start(&again, again.spec.varnish.as_ref().unwrap());
    let page = crate::seal::StalePage::unsealed(live.cursor(), (b"shop.test", b"/"), live.cursor());
    let deliveries = Arc::clone(&rig.deliveries);
    let (id, forever) = (again.id().clone(), Duration::from_secs(3600));
    let waits = tokio::spawn(async move { deliveries.refresh(&id, page, forever).await });
    // It waits by now: all else is done.
    tokio::task::yield_now().await;
    rig.deliveries.give_up_on_seals(again.id());
    assert!(!tokio::time::timeout(PATIENCE, waits).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_cache_of_whose_seals_trials_say_nothing_is_flushed_and_serves() {
    let rig = relying(Arc::new(memory())).await;
    rig.deliveries.give_up_on_seals(rig.node.id());
    assert!(may_serve(&rig) && rig.told(FLUSH).is_empty(), "it was seen to return them");
    rig.deliveries.stop(rig.node.id());
    let live = Arc::default();
    let again = Arc::new(Node::new(rig.node.spec.clone(), Arc::clone(&live), 2));
    rig.deliveries.start(&again, again.spec.varnish.as_ref().unwrap());
    let rests = rig.deliveries.progress.until(|| live.relies_on_seals() && live.may_hide_seals());
    tokio::time::timeout(PATIENCE, rests).await.unwrap();
    rig.deliveries.give_up_on_seals(again.id());
    rig.until_told(FLUSH, 1).await;
    let serves = rig.deliveries.progress.until(|| !live.relies_on_seals() && !live.may_hide_seals());
    tokio::time::timeout(PATIENCE, serves).await.unwrap();
}

#[tokio::test]
async fn an_answer_without_a_seal_waits_for_a_trial_and_costs_no_cache() {
    let rig = relying(Arc::new(memory())).await;
    let live = &rig.node.live;
    let seals = &live.seals;
    // As at a start: it relies, and nothing has been shown.
    let page = crate::seal::StalePage::unsealed(live.cursor(), (b"shop.test", b"/"), live.cursor());
    assert_eq!(page.awaited_delivery(), None);
    seals.record_trial(SealsShown::NotReturned);
    assert!(!rig.deliveries.refresh(rig.node.id(), page.clone(), PATIENCE).await, "it is flushed, and not asked again");
    seals.record_trial(SealsShown::Returned);
    assert!(rig.deliveries.refresh(rig.node.id(), page, PATIENCE).await);
    assert!(rig.told(FLUSH).is_empty());
}
