//! Builds with a part of the promise broken on purpose: for each part a test that passes, and fails once it is broken.
//!
//! Only in a build with the feature `mutants` (`make mutants`). The tests run as they stand, each in a process of its own, in
//! which `CLEARCOAT_MUTANT` tells the clearcoats that it starts what does not work in them.

use std::process::Command;
use std::time::{Duration, Instant};

use clearcoat::mutants::Mutant;

use crate::support::say;

/// A test, and what it says when readers got an old page.
type Watch = (&'static str, &'static str);

const SEALS: Watch = ("consistency::no_page_is_older_than_a_purge_that_no_varnish_was_waited_for", STALE);
const SEALS_ALONE: Watch = ("consistency::no_page_is_older_than_a_purge_where_seals_alone_tell", STALE);
/// What the consistency test says, and what comparisons say where a reader got the first version of something.
const STALE: &str = "\n- stale reads\n";
const OLD: &str = "left: \"0\"";
const OLD_HIT: &str = "left: (\"HIT\", \"0\")";
const OLD_BLOCK: &str = "left: \"<p>block 0</p>\"";

/// The length of a consistency test in seconds.
const LENGTH: &str = "10";

/// The tests that have to notice that this part is broken.
fn watches(mutant: Mutant) -> &'static [Watch] {
    match mutant {
        Mutant::LateSeal => {
            &[("seal::a_page_that_is_stored_after_its_ban_is_dropped_before_a_reader_sees_it", OLD_HIT), SEALS_ALONE]
        }
        Mutant::BlindEdge => &[SEALS, SEALS_ALONE],
        Mutant::LostName => &[SEALS, SEALS_ALONE],
        Mutant::LostFloor => &[("seal::a_page_whose_purge_was_pushed_out_of_memory_is_caught_all_the_same", OLD)],
        Mutant::IgnoredFloor => &[("seal::a_page_whose_purge_the_disk_has_forgotten_is_caught_after_a_restart", OLD)],
        Mutant::SealedPattern => &[("seal::a_page_that_a_pattern_purges_is_not_served_after_the_answer", OLD)],
        Mutant::SealedBlock => &[("seal_attacks::a_warm_fleet_seals_from_its_first_flush_on", OLD_BLOCK)],
        Mutant::LowFence => &[("seal::a_varnish_that_misses_a_purge_that_no_seal_shows_is_out", OLD)],
        Mutant::EarlyConfirmation => {
            &[("peers::a_varnish_that_one_could_not_purge_is_avoided_by_the_other_at_once", OLD)]
        }
        Mutant::BlindGuard => &[("guard::a_304_does_not_renew_a_page_that_was_purged_meanwhile", OLD)],
    }
}

/// What a test says that has failed, and how long it took; `None` if it has passed.
fn failure(test: &str, mutant: Option<Mutant>) -> (Option<String>, Duration) {
    let began = Instant::now();
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", test]).env("CLEARCOAT_CONSISTENCY_SECONDS", LENGTH).env_remove("CLEARCOAT_MUTANT");
    if let Some(mutant) = mutant {
        command.env("CLEARCOAT_MUTANT", format!("{mutant:?}"));
    }
    let output = command.output().expect("this program runs");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("running 1 test"), "no test {test}");
    ((!output.status.success()).then_some(text), began.elapsed())
}

#[test]
fn every_part_that_is_broken_is_noticed() {
    let mut missed = Vec::new();
    let mut healthy: Vec<Watch> = Mutant::ALL.into_iter().flat_map(watches).copied().collect();
    // A run of the consistency test that is so short shows old pages, but not that there are none.
    healthy.retain(|(test, _)| !test.starts_with("consistency::"));
    healthy.sort_unstable();
    healthy.dedup();
    for (test, _) in healthy {
        let (failure, took) = failure(test, None);
        assert_eq!(failure, None, "nothing is broken");
        say(&format!("nothing broken: {test} passes in {:.1} s", took.as_secs_f64()));
    }
    for mutant in Mutant::ALL {
        for (test, says) in watches(mutant) {
            let (failure, took) = failure(test, Some(mutant));
            let is_caught = failure.as_ref().is_some_and(|text| text.contains(says));
            let what = if is_caught { "caught" } else { "NOT CAUGHT" };
            say(&format!("{mutant:?}: {what} by {test} in {:.1} s", took.as_secs_f64()));
            if !is_caught {
                missed.push(format!("{mutant:?} by {test}: {}", failure.unwrap_or_else(|| "it passes".to_owned())));
            }
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}
