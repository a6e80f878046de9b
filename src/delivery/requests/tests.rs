use super::*;
use crate::journal::EntryOrigin;
use crate::purge::{Forward, Pattern, Purge, Target};

const SENDER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

/// Beyond the journal of any test.
const LAST: Position = 99;

fn node(id: &str) -> NodeId {
    NodeId::try_from(id).unwrap()
}

fn url(path: &str) -> Purge {
    let forward = Forward { method: "PURGE".into(), target: path.into(), headers: vec![] };
    Purge { targets: vec![Target::Forward(forward)], soft: false }
}

fn pool(pattern: &str) -> Purge {
    Purge { targets: vec![Target::Pool(Pattern::new(pattern).unwrap())], soft: false }
}

/// An entry that was accepted here, or by another replica.
fn entry(position: Position, purge: Purge, ours: bool) -> Arc<Entry> {
    let origin = Some(EntryOrigin { id: position.to_string().into(), revision: None, ours });
    Arc::new(Entry { position, at_ms: 0, purge, origin })
}

impl Requests {
    /// Accepts this purge here, and waits for it.
    fn accept(&mut self, position: Position, purge: &Purge) {
        self.record_accepted(position, Refusable::of(purge).unwrap(), SENDER, 0);
    }

    /// Notes purges that other replicas have accepted.
    fn told(&mut self, entries: &[(Position, Purge)]) {
        let entries: Vec<_> = entries.iter().map(|(position, purge)| entry(*position, purge.clone(), false)).collect();
        self.note_all(&entries, 0);
    }

    /// A node refuses this purge at any position.
    fn refuse(&mut self, id: &str, purge: &Purge) -> Owed {
        self.refuse_before(id, purge, 0).owed
    }

    /// The same with the fence at this position.
    fn refuse_before(&mut self, id: &str, purge: &Purge, fence: Position) -> Consequence {
        let fingerprint = Refusable::of(purge).unwrap().fingerprint;
        let (node, fleet) = (node(id), [node("v"), node("w")]);
        let refused = Refused { fingerprint, after: 0, last: LAST };
        self.record_refusal(&node, refused, &"it answered 405".into(), fence, &[&fleet[0], &fleet[1]])
    }

    fn leaves_doubt(&self) -> bool {
        self.lie_in((0, LAST))
    }
}

fn refusals(verdict: PurgeVerdict) -> Refusals {
    let PurgeVerdict::Refused(refusals) = verdict else { panic!("{verdict:?}") };
    refusals
}

fn ids(refusals: &Refusals) -> Vec<&str> {
    refusals.iter().map(|(id, _)| id.as_str()).collect()
}

#[test]
fn what_cannot_be_replayed_goes_unless_it_has_yet_to_be_decided() {
    let mut requests = Requests::default();
    requests.accept(1, &url("/due"));
    requests.told(&[(2, url("/open")), (3, url("/refused"))]);
    requests.refuse("v", &url("/refused"));
    requests.note_all(&[entry(4, url("/never answered"), true)], 0);
    requests.retire(4);
    assert_eq!(requests.noted.keys().copied().collect::<Vec<_>>(), [1, 3]);
    assert_eq!((requests.answer(1, true), requests.record_done(3)), (PurgeVerdict::Done, vec![node("v")]));
    requests.retire(4);
    assert!(requests.noted.is_empty() && requests.open.is_empty());
    // A forgotten purge may have been answered as done.
    assert_eq!(requests.refuse("v", &url("/due")), Owed::FlushOfAll);
}

#[test]
fn a_refusal_before_the_answer_makes_it_a_400_that_leaves_no_doubt() {
    let mut requests = Requests::default();
    requests.accept(1, &url("/a"));
    assert!(requests.leaves_doubt());
    assert_eq!(requests.refuse("v", &url("/a")), Owed::Nothing);
    // Refused from now on, even if other nodes are down: it will not be answered as done.
    assert!(!requests.leaves_doubt());
    assert_eq!((requests.refused_from(0, 9), requests.newest_refused(9)), (vec![(0, 1)], vec![1]));
    assert_eq!(ids(&refusals(requests.answer(1, true))), ["v"]);
    assert_eq!((requests.refuse("w", &url("/a")), requests.leaves_doubt()), (Owed::Nothing, false));
    assert!(requests.refused_from(1, 9).is_empty());
}

#[test]
fn the_answer_names_the_nodes_in_their_order_whichever_was_quickest() {
    let mut requests = Requests::default();
    requests.accept(1, &url("/a"));
    for id in ["w", "v", "w"] {
        requests.refuse(id, &url("/a"));
    }
    assert_eq!(ids(&refusals(requests.answer(1, true))), ["v", "w"]);
}

#[test]
fn a_node_may_refuse_a_purge_before_its_acceptance_is_heard_of() {
    let mut requests = Requests::default();
    requests.expect(0);
    requests.note_all(&[entry(1, url("/a"), true)], 0);
    requests.refuse("v", &url("/a"));
    requests.retire(5);
    requests.accept(1, &url("/a"));
    assert_eq!(ids(&refusals(requests.answer(1, true))), ["v"]);
    requests.expect_no_more(0, Some(1));
    assert!(requests.expected.is_empty());
}

#[test]
fn what_was_answered_as_done_is_not_passed_over() {
    let mut requests = Requests::default();
    requests.accept(1, &url("/a"));
    requests.accept(2, &pool("p"));
    assert!([1, 2].iter().all(|position| requests.answer(*position, true) == PurgeVerdict::Done));
    assert_eq!(requests.refuse("v", &url("/a")), Owed::FlushOfAll);
    assert_eq!(requests.refuse("v", &pool("p")), Owed::Flush);
    // Any flush covers a pool.
    assert!(requests.lie_in((0, 1)) && !requests.lie_in((1, LAST)));
    // The replica that answered it decides.
    assert!(!requests.record_refused(1));
}

#[test]
fn a_flush_that_is_owed_stands_for_the_same_purge_before_its_answer() {
    let mut requests = Requests::default();
    requests.accept(1, &url("/a"));
    requests.answer(1, true);
    requests.accept(2, &url("/a"));
    assert_eq!(requests.refuse("v", &url("/a")), Owed::FlushOfAll);
    assert_eq!(requests.answer(2, true), PurgeVerdict::Done);
}

#[test]
fn a_confirmation_carries_what_nodes_refuse_and_without_it_is_final() {
    let mut requests = Requests::default();
    requests.told(&[(1, url("/a")), (2, url("/b"))]);
    assert_eq!(requests.refuse("v", &url("/a")), Owed::Nothing);
    assert_eq!([1, 2].map(|position| ids(&requests.confirm(position)).join("")), ["v", ""]);
    // The first was refused there; the second may have been answered as done.
    assert_eq!([1, 2].map(|position| requests.is_done(position)), [false, true]);
    assert_eq!(requests.refuse("w", &url("/a")), Owed::Nothing);
    assert_eq!(requests.refuse("w", &url("/b")), Owed::FlushOfAll);
    // Until the refusal is reported.
    assert!(requests.record_refused(1) && requests.record_refused(2) && !requests.record_refused(2));
    assert_eq!(requests.refuse("w", &url("/b")), Owed::Nothing);
    // A new replica may ask us for it.
    assert_eq!(requests.refused_from(0, 9), [(0, 1), (1, 2)]);
    assert!(!requests.leaves_doubt() && requests.open.is_empty());
}

#[test]
fn what_a_node_has_passed_over_it_owes_once_that_was_answered_as_done() {
    let mut requests = Requests::default();
    requests.told(&[(1, url("/told")), (2, url("/time is up")), (3, url("/still open"))]);
    for path in ["/told", "/time is up", "/still open"] {
        requests.refuse("v", &url(path));
    }
    assert_eq!((requests.first_open(&node("v")), requests.first_open(&node("w"))), (Some(1), None));
    assert_eq!(requests.record_done(1), [node("v")]);
    assert_eq!(requests.expire_open(2), [(2, node("v"))]);
    assert_eq!(requests.first_open(&node("v")), Some(3));
    assert_eq!(requests.refuse("v", &url("/told")), Owed::FlushOfAll);
    assert_eq!(requests.refuse("v", &url("/still open")), Owed::Nothing);
    // Once, and not if it was refused.
    assert!(requests.record_refused(3) && requests.record_done(1).is_empty() && requests.expire_open(LAST).is_empty());
}

#[test]
fn what_a_node_refuses_at_another_replica_counts_before_the_answer_only() {
    let mut requests = Requests::default();
    let elsewhere: Refusals = vec![(node("v"), "it answered 405, asked by b".into())];
    requests.accept(1, &url("/a"));
    assert_eq!(requests.record_refusal_elsewhere(1, &elsewhere), Some(true));
    assert_eq!(requests.record_refusal_elsewhere(1, &elsewhere), Some(false));
    assert_eq!(refusals(requests.answer(1, true)), elsewhere);
    requests.accept(2, &url("/b"));
    assert_eq!(requests.answer(2, true), PurgeVerdict::Done);
    assert_eq!(requests.record_refusal_elsewhere(2, &elsewhere), None);
    assert!(requests.is_done(2) && !requests.is_done(1));
}

#[test]
fn of_the_past_what_is_not_marked_was_answered_as_done() {
    let mut requests = Requests::default();
    let past = [entry(1, url("/a"), true), entry(2, url("/b"), true), entry(3, pool("p"), true)];
    requests.note_past(&past, |position| position == 1);
    assert_eq!(
        [url("/a"), url("/b"), pool("p")].map(|purge| requests.refuse("v", &purge)),
        [Owed::Nothing, Owed::FlushOfAll, Owed::Flush]
    );
    assert!(requests.lie_in((1, 3)) && !requests.lie_in((0, 1)) && !requests.lie_in((2, 3)));
    // The other replicas may not know of it.
    assert_eq!((requests.refused_from(0, 9), requests.newest_refused(9)), (vec![(0, 1)], vec![1]));
}

#[test]
fn for_an_older_replicas_purge_a_flush_is_enough_if_a_node_took_it() {
    let mut requests = Requests::default();
    requests.told(&[(1, url("/a")), (2, url("/b")), (3, url("/c"))]);
    // That they come from an older version may become known after the refusals.
    requests.refuse("v", &url("/c"));
    requests.refuse("w", &url("/c"));
    let fleet = [node("v"), node("w")];
    let taken_by_nobody = |position| requests.record_older_version(position, &[&fleet[0], &fleet[1]]);
    assert_eq!([1, 2, 3].map(taken_by_nobody), [false, false, true]);
    assert_eq!(requests.refuse_before("v", &url("/a"), 1).owed, Owed::Flush);
    assert_eq!(requests.refuse_before("v", &url("/b"), 1), Consequence::default());
    assert!(requests.lie_in((1, 2)));
    assert_eq!(requests.refuse_before("w", &url("/b"), 1).taken_by_nobody, [2]);
    assert!(!requests.lie_in((1, 2)) && requests.confirm(2).is_empty());
}

#[test]
fn what_no_node_took_in_time_is_promised_to_nobody() {
    let mut requests = Requests::default();
    requests.accept(1, &url("/a"));
    requests.accept(2, &url("/b"));
    assert_eq!([requests.answer(1, false), requests.answer(2, true)], [PurgeVerdict::Untaken, PurgeVerdict::Done]);
    // The others receive it as a refused one.
    assert_eq!((requests.refused_from(0, 9), requests.newest_refused(9)), (vec![(0, 1)], vec![1]));
    assert_eq!([requests.refuse("v", &url("/a")), requests.refuse("v", &url("/b"))], [Owed::Nothing, Owed::FlushOfAll]);
    assert!(!requests.lie_in((0, 1)) && requests.lie_in((1, 2)));
}

#[test]
fn a_refusal_that_comes_back_from_another_replica_is_still_ours_to_answer() {
    let mut requests = Requests::default();
    // The journal has one of our purges before its handler knows that it is durable.
    requests.note_all(&[entry(5, url("/a"), true)], 0);
    assert!(requests.refuse_before("v", &url("/a"), 0).is_news);
    assert!(!requests.record_refused(5));
    requests.accept(5, &url("/a"));
    assert_eq!(ids(&refusals(requests.answer(5, true))), ["v"]);
}
