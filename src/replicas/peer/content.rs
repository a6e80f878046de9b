//! What another replica is to be told next: purges of ours, and how they were answered.
//!
//! A message fits into what the other one takes (`purge.max_request`), whatever is in it: one that does not would be refused
//! for ever.

use std::time::Duration;

use super::super::Replicas;
use super::Peer;
use crate::journal::{Entry, Missed, Position, PurgeMessage, Shared};
use crate::purge::{Purge, Target};

/// Bytes of purges in one message, as near as it can be told, where `purge.max_request` is not less.
const MAX_MESSAGE: usize = 256 << 10;

/// Names of refused purges in one message.
const MAX_REFUSED: usize = 500;

/// Of those in a farewell, which is to fit whatever the other one takes.
const MAX_REFUSED_LAST: usize = 100;

/// What is to be told next.
pub(super) struct Next {
    pub(super) purges: Vec<PurgeMessage>,
    /// The names of those of them that were answered as done.
    pub(super) done: Vec<String>,
    /// How many bytes all that takes, as near as it can be told.
    pub(super) bytes: usize,
    /// Up to where the other one has everything then.
    pub(super) last: Position,
    pub(super) tells_gap: bool,
}

/// What was accepted here after `sent`, as much as a message of `room` bytes takes.
pub(super) fn next(
    replicas: &Replicas,
    peer: &Peer,
    journal: &dyn Shared,
    sent: Option<Position>,
    room: usize,
) -> Next {
    // Read first: what is appended from here on is told after it.
    let head = journal.head();
    let missed = sent.map_or(Missed::Truncated, |sent| journal.since(sent));
    let Missed::Entries(entries) = missed else {
        if replicas.has_journal_in_common() {
            // Whoever missed so much has a gap in its journal, too.
            return Next { purges: Vec::new(), done: Vec::new(), bytes: 0, last: head, tells_gap: true };
        }
        tracing::warn!(
            replica = %peer.id, head,
            "what a replica missed is not known any more: it is told one purge of everything"
        );
        let id = super::super::gap_name(&replicas.own.boot, &peer.record.boot, head);
        let told = PurgeMessage { id, revision: None, at_ms: journal.now_ms(), purge: everything_missed() };
        return Next { purges: vec![told], done: Vec::new(), bytes: 0, last: head, tells_gap: true };
    };
    let (mut purges, mut done, mut bytes, mut last) = (Vec::new(), Vec::new(), 0, sent.unwrap_or(0));
    for entry in entries {
        let ours = entry.origin.as_ref().filter(|origin| origin.ours);
        if let Some(origin) = ours {
            let (told, size) = fitting(told(journal.revision(entry.position), &origin.id, &entry), room);
            let is_done = replicas.context.deliveries.is_done(entry.position);
            let size = if is_done { size + listed(&origin.id) } else { size };
            if bytes + size > MAX_MESSAGE.min(room) && !purges.is_empty() {
                break;
            }
            bytes += size;
            purges.push(told);
            done.extend(is_done.then(|| origin.id.to_string()));
        }
        last = entry.position;
    }
    Next { purges, done, bytes, last, tells_gap: false }
}

/// What stands for any number of purges: among them may be some of pages without tags.
fn everything_missed() -> Purge {
    Purge { targets: vec![Target::All], soft: false }
}

/// A purge that fits into a message, and how large it is there: as JSON one can be larger than it was as a request, and
/// the other one would refuse it for ever.
fn fitting(told: PurgeMessage, room: usize) -> (PurgeMessage, usize) {
    let size = |told: &PurgeMessage| serde_json::to_vec(told).map_or(0, |json| json.len());
    let as_it_is = size(&told);
    if as_it_is <= room {
        return (told, as_it_is);
    }
    let told = PurgeMessage { purge: Purge::everything(), ..told };
    let size = size(&told);
    (told, size)
}

fn told(revision: Option<u64>, id: &str, entry: &Entry) -> PurgeMessage {
    PurgeMessage { id: id.to_owned(), revision, at_ms: entry.at_ms, purge: entry.purge.clone() }
}

/// How long the other one may wait for its Varnish nodes. It keeps some of our patience for itself (it takes the purge in,
/// and answers), and what etcd has taken before is gone: its answer is to be here when the purge's sender gets one. What is
/// older was answered long ago, and fences there almost at once.
fn others_patience(ack_timeout: Duration, accepted_ms: u64, now_ms: u64) -> Duration {
    let gone = Duration::from_millis(now_ms.saturating_sub(accepted_ms));
    (ack_timeout * 5 / 8).saturating_sub(gone).max(ack_timeout / 8)
}

/// How long the other one may wait with these.
pub(super) fn patience(replicas: &Replicas, journal: &dyn Shared, purges: &[PurgeMessage]) -> Duration {
    let newest_ms = purges.iter().map(|told| told.at_ms).max().unwrap_or(0);
    // Both times are of our own clock: what is told was accepted here.
    others_patience(replicas.context.ack_timeout, newest_ms, journal.now_ms())
}

/// The names of the purges that were refused last, for the farewell: what is not said by then, nobody says.
pub(super) fn refused_last(replicas: &Replicas) -> Vec<String> {
    let Some(journal) = &replicas.context.journal else { return Vec::new() };
    let positions = replicas.context.deliveries.newest_refused(MAX_REFUSED_LAST);
    positions.into_iter().filter_map(|position| Some(journal.name_of(position)?.to_string())).collect()
}

/// The names of purges that were refused to their senders, from this number on, that the other one has confirmed, as many
/// as fit into so many bytes.
pub(super) fn refused(
    replicas: &Replicas,
    peer: &Peer,
    journal: &dyn Shared,
    next: &mut u64,
    room: usize,
) -> Vec<String> {
    let confirmed = peer.confirmed_up_to();
    let refused = replicas.context.deliveries.refused_from(*next, MAX_REFUSED);
    let refused =
        refused.into_iter().take_while(|(_, position)| confirmed.is_some_and(|confirmed| *position <= confirmed));
    let (mut names, mut bytes) = (Vec::new(), 0);
    for (number, position) in refused {
        // What is not held any more leaves doubt there or not, as it was when it went.
        if let Some(name) = journal.name_of(position) {
            bytes += listed(&name);
            if bytes > room {
                break;
            }
            names.push(name.to_string());
        }
        *next = number + 1;
    }
    names
}

/// How many bytes a name takes in a list.
fn listed(name: &str) -> usize {
    name.len() + "\"\",".len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_purge_that_no_message_takes_is_told_as_one_of_everything() {
        let request = |pattern: &str| {
            let mut headers = http::HeaderMap::new();
            headers.insert("X-Magento-Tags-Pattern", pattern.parse().unwrap());
            let (method, rules) = (http::Method::from_bytes(b"PURGE").unwrap(), crate::purge::PurgeRules::default());
            crate::purge::parse(&method, &"/".parse().unwrap(), &headers, &rules).unwrap().purge
        };
        let told = |purge| PurgeMessage { id: "a".to_owned(), revision: None, at_ms: 1, purge };
        let (small, large) =
            (told(request("((^|,)cat_p_1(,|$))")), told(request(&format!("a{}", r"\.".repeat(2_000)))));
        assert_eq!(fitting(small.clone(), 4_500).0, small);
        let (fitted, size) = fitting(large, 4_500);
        assert!(fitted.purge.targets == [Target::Everything] && size < 200, "{size}");
    }

    #[test]
    fn the_other_one_answers_before_the_sender_of_the_purge_is_answered() {
        let ack = Duration::from_millis(1_000);
        let patience = |gone: u64| others_patience(ack, 10_000, 10_000 + gone).as_millis();
        assert_eq!([0, 350, 700, 60_000].map(patience), [625, 275, 125, 125]);
        // A clock that was set back.
        assert_eq!(others_patience(ack, 10_000, 9_000).as_millis(), 625);
    }
}
