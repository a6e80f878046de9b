//! Whether the VCL in use is to be replaced, and when. Pure.

use std::time::Duration;

use tokio::time::Instant;

use super::PushTurn;
use crate::varnish::fleet_vcl::PREFIX;

/// The head start of each clearcoat before the next one.
const TURN: Duration = Duration::from_secs(1);

/// How long a VCL stays that somebody has put in use by hand, or a tool; twice as long each further time.
const BY_HAND: Duration = Duration::from_secs(5);

/// The longest of these times.
const LONGEST_BY_HAND: Duration = Duration::from_secs(300);

/// How long a VCL stays that another clearcoat has put in use, if we are the first of all.
const BY_PEER: Duration = Duration::from_secs(10);

/// By how much longer for each one before us.
const BY_PEER_EACH: Duration = Duration::from_secs(60);

/// How often a VCL of another clearcoat is replaced while what we want is the same, by the first of all and by the second. More often by
/// the first, so that it has the last word. Who comes later than both leaves it to them: when they are gone, it is one of them.
const MOST_REPAIRS: [u32; 2] = [3, 2];

/// The VCL that a Varnish uses, as far as we have seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VclInUse {
    /// Its name.
    pub(super) name: String,
    /// Since when we know.
    pub(super) since: Instant,
    /// It was in use when we connected: we have not seen who did it. varnishd may have been restarted.
    pub(super) at_connect: bool,
}

/// What should be in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WantedVcl {
    /// Its name.
    pub(super) name: String,
    /// Since when we want it.
    pub(super) since: Instant,
    /// How often a VCL of another clearcoat was replaced by it.
    pub(super) over_peers: u32,
    /// How often one was that somebody had put in use.
    pub(super) over_hands: u32,
}

/// Who has put in use what is in use, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReplaceCause {
    /// It is what was there before the last change, or what a varnishd starts with.
    Old,
    /// Somebody.
    Hand,
    /// Another clearcoat, after our last change.
    Peer,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Nothing.
    InPlace,
    /// Replace it at this time.
    Replace(Instant, ReplaceCause),
    /// Leave it to the other clearcoat whose it is.
    LeaveToPeer,
}

/// What is to be done with what is in use.
pub(super) fn decide(aim: &WantedVcl, sight: &VclInUse, turn: PushTurn) -> Decision {
    if sight.name == aim.name {
        return Decision::InPlace;
    }
    let later = TURN * turn.rank;
    // All of us are about to replace it. (What was seen in the same moment is nobody's past: it is the first look.)
    if sight.since < aim.since {
        return Decision::Replace(aim.since + later, ReplaceCause::Old);
    }
    let is_of_peer = sight.name.starts_with(PREFIX);
    if sight.at_connect && (!is_of_peer || turn.rank == 0) {
        return Decision::Replace(sight.since + later, ReplaceCause::Old);
    }
    if !is_of_peer {
        let stays = BY_HAND.saturating_mul(1 << aim.over_hands.min(16)).min(LONGEST_BY_HAND);
        return Decision::Replace(sight.since + stays + later, ReplaceCause::Hand);
    }
    let most = usize::try_from(turn.rank).ok().and_then(|rank| MOST_REPAIRS.get(rank)).copied().unwrap_or(0);
    if !turn.is_informed || aim.over_peers >= most {
        return Decision::LeaveToPeer;
    }
    Decision::Replace(sight.since + BY_PEER + BY_PEER_EACH * turn.rank, ReplaceCause::Peer)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: PushTurn = PushTurn { rank: 0, is_informed: true };
    const SECOND: PushTurn = PushTurn { rank: 1, is_informed: true };

    fn at(seconds: u64) -> Instant {
        // The same origin for all of a test.
        static ORIGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *ORIGIN.get_or_init(Instant::now) + Duration::from_secs(seconds)
    }

    fn aim(since: u64) -> WantedVcl {
        WantedVcl { name: "clearcoat-a".to_owned(), since: at(since), over_peers: 0, over_hands: 0 }
    }

    fn sight(name: &str, since: u64, at_connect: bool) -> VclInUse {
        VclInUse { name: name.to_owned(), since: at(since), at_connect }
    }

    #[test]
    fn what_is_in_use_already_is_left_alone_whoever_did_it() {
        assert_eq!(decide(&aim(5), &sight("clearcoat-a", 9, false), FIRST), Decision::InPlace);
    }

    #[test]
    fn a_change_is_pushed_at_once_by_the_first_and_later_by_the_next() {
        for old in ["clearcoat-b", "boot"] {
            let old = sight(old, 1, false);
            assert_eq!(decide(&aim(5), &old, FIRST), Decision::Replace(at(5), ReplaceCause::Old));
            assert_eq!(decide(&aim(5), &old, SECOND), Decision::Replace(at(6), ReplaceCause::Old));
        }
    }

    #[test]
    fn a_varnishd_that_was_restarted_gets_its_vcl_at_once() {
        let restarted = sight("boot", 20, true);
        assert_eq!(decide(&aim(5), &restarted, FIRST), Decision::Replace(at(20), ReplaceCause::Old));
        // Also where the others know no fleet of now: it is the last that is known.
        let blind = PushTurn { is_informed: false, ..FIRST };
        assert_eq!(decide(&aim(5), &restarted, blind), Decision::Replace(at(20), ReplaceCause::Old));
    }

    #[test]
    fn what_somebody_has_put_in_use_is_replaced_ever_later() {
        let by_hand = sight("emergency", 20, false);
        let after = |over_hands| decide(&WantedVcl { over_hands, ..aim(5) }, &by_hand, FIRST);
        assert_eq!(after(0), Decision::Replace(at(25), ReplaceCause::Hand));
        assert_eq!(after(1), Decision::Replace(at(30), ReplaceCause::Hand));
        assert_eq!(after(40), Decision::Replace(at(320), ReplaceCause::Hand));
    }

    #[test]
    fn another_clearcoats_vcl_is_replaced_a_few_times_if_the_fleet_is_known() {
        let of_peer = sight("clearcoat-b", 20, false);
        assert_eq!(decide(&aim(5), &of_peer, FIRST), Decision::Replace(at(30), ReplaceCause::Peer));
        assert_eq!(decide(&aim(5), &of_peer, SECOND), Decision::Replace(at(90), ReplaceCause::Peer));
        let blind = PushTurn { is_informed: false, ..FIRST };
        assert_eq!(decide(&aim(5), &of_peer, blind), Decision::LeaveToPeer);
        let tired = WantedVcl { over_peers: MOST_REPAIRS[0], ..aim(5) };
        assert_eq!(decide(&tired, &of_peer, FIRST), Decision::LeaveToPeer);
        let third = PushTurn { rank: 2, is_informed: true };
        assert_eq!(decide(&aim(5), &of_peer, third), Decision::LeaveToPeer);
        // Whoever comes anew decides if he is the first: also in the moment in which he begins to want something.
        assert_eq!(
            decide(&aim(20), &sight("clearcoat-b", 20, true), SECOND),
            Decision::Replace(at(90), ReplaceCause::Peer)
        );
        let met = sight("clearcoat-b", 20, true);
        assert_eq!(decide(&aim(5), &met, FIRST), Decision::Replace(at(20), ReplaceCause::Old));
        assert_eq!(decide(&aim(5), &met, SECOND), Decision::Replace(at(90), ReplaceCause::Peer));
    }

    /// Three that want different VCLs for good, and one Varnish that does what any of them says at once.
    #[test]
    fn those_that_never_agree_come_to_an_end() {
        let turns = [FIRST, SECOND, PushTurn { rank: 2, is_informed: true }];
        let names = ["clearcoat-a", "clearcoat-b", "clearcoat-c"];
        for begins_with in names {
            ends_with_the_first(begins_with, names.map(|name| WantedVcl { name: name.to_owned(), ..aim(0) }), turns);
        }
    }

    fn ends_with_the_first(begins_with: &str, mut aims: [WantedVcl; 3], turns: [PushTurn; 3]) {
        let mut seen = sight(begins_with, 1, false);
        let mut changes = 0;
        for now in 1..3600 {
            for (aim, turn) in aims.iter_mut().zip(turns) {
                let Decision::Replace(due, cause) = decide(aim, &seen, turn) else { continue };
                if due <= at(now) {
                    aim.over_peers += u32::from(cause == ReplaceCause::Peer);
                    seen = sight(&aim.name, now, false);
                    changes += 1;
                }
            }
        }
        assert!(changes <= MOST_REPAIRS[0] + MOST_REPAIRS[1], "{changes} changes");
        assert_eq!(seen.name, "clearcoat-a", "the first has the last word");
    }

    #[test]
    fn two_that_agree_in_the_end_push_once() {
        let mut changes = 0;
        let mut seen = sight("clearcoat-old", 0, false);
        // The second one hears of the change two seconds later.
        let aims = [(aim(10), FIRST), (aim(12), SECOND)];
        for now in 10..100 {
            for (aim, turn) in aims.iter().filter(|(aim, _)| aim.since <= at(now)) {
                if matches!(decide(aim, &seen, *turn), Decision::Replace(due, _) if due <= at(now)) {
                    seen = sight(&aim.name, now, false);
                    changes += 1;
                }
            }
        }
        assert_eq!((changes, seen.name.as_str()), (1, "clearcoat-a"));
    }
}
