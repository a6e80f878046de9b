//! A journal other than the one on which purges were promised: no Varnish is trusted.

use std::path::{Path, PathBuf};

use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};

const PAGES: [&str; 3] = ["/p/1", "/p/2", "/p/3"];

/// A fleet whose second Varnish misses a purge of every page; then clearcoat is killed.
fn missed(journal: &'static str) -> Fleet {
    // Each Varnish is asked past the edge.
    let config = "[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"1s\"\nwait_for = \"varnish\"\n";
    let plan =
        Plan { varnish: 2, web: 1, journal, first_start: "flush", config, vcl: purges_can_fail, ..Plan::default() };
    let mut fleet = Fleet::start(&plan);
    fleet.clearcoat.current();
    assert_eq!(fleet.purge_tag("cat_p_99").status, 200);
    PAGES.iter().for_each(|page| fleet.warm(page));
    fail_purges(&fleet, "varnish-2", true);
    (1..=3).for_each(|product| fleet.shop.set(product, 7));
    for product in 1..=3 {
        let answer = fleet.purge_tag(&format!("cat_p_{product}"));
        assert_eq!((answer.status, &answer.json()["fenced"]), (200, &serde_json::json!(["varnish-2"])));
    }
    fleet.clearcoat.kill();
    fail_purges(&fleet, "varnish-2", false);
    fleet
}

fn file(fleet: &Fleet) -> PathBuf {
    folder(fleet).join("journal.redb")
}

fn folder(fleet: &Fleet) -> PathBuf {
    fleet.folder.path().join("journal")
}

/// Restarts clearcoat: no old page is served, and the reason is logged.
fn nothing_is_old(fleet: &mut Fleet, reason: &str, text: &str) {
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    fleet.clearcoat.current();
    assert_eq!(fleet.clearcoat.metric(&format!("clearcoat_journal_anew{{reason=\"{reason}\"}}")), 1.0);
    assert!(fleet.clearcoat.log().has(text), "{}", fleet.clearcoat.log().text());
    for page in PAGES {
        for varnish in &fleet.varnish {
            assert_eq!(varnish.get(page).text(), "7", "{page} of {} is old", varnish.id);
        }
        assert_eq!(fleet.get(page).text(), "7");
    }
}

#[test]
fn a_journal_in_memory_trusts_no_cache_after_a_restart() {
    let mut fleet = missed("memory");
    nothing_is_old(&mut fleet, "memory", "the journal is in memory");
}

#[test]
fn a_volume_that_was_lost_is_no_first_start_that_may_trust() {
    let mut fleet = missed("disk");
    std::fs::remove_dir_all(folder(&fleet)).expect("our folder");
    nothing_is_old(&mut fleet, "first_start", "there is no journal yet");
}

#[test]
fn a_journal_that_is_gone_empty_or_cut_trusts_no_cache_and_is_put_aside() {
    type Fault = fn(&Path);
    let faults: [(&str, Fault); 4] = [
        ("lost", |file| std::fs::remove_file(file).expect("our file")),
        ("lost", |file| std::fs::write(file, "").expect("our file")),
        // As an operator does it.
        ("lost", |file| std::fs::rename(file, file.with_extension("redb.away")).expect("our file")),
        ("damaged", |file| {
            let length = std::fs::metadata(file).expect("our file").len();
            std::fs::OpenOptions::new().write(true).open(file).and_then(|file| file.set_len(length / 2)).expect("cut");
        }),
    ];
    for (reason, fault) in faults {
        let mut fleet = missed("disk");
        fault(&file(&fleet));
        let text = if reason == "lost" { "not the one that was here" } else { "the journal is damaged" };
        nothing_is_old(&mut fleet, reason, text);
        let is_aside = |name: &str| name.starts_with("journal.redb.damaged-");
        let names = std::fs::read_dir(folder(&fleet)).expect("our folder");
        let mut names = names.map(|entry| entry.expect("our folder").file_name().into_string().expect("a name"));
        assert_eq!(names.any(|name| is_aside(&name)), reason == "damaged");
    }
}

#[test]
fn an_older_copy_of_the_journal_trusts_no_cache() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, web: 1, vcl: purges_can_fail, ..Plan::default() });
    assert_eq!(fleet.purge_tag("cat_p_99").status, 200);
    end(&mut fleet);
    let copy = std::fs::read(file(&fleet)).expect("our file");
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    PAGES.iter().for_each(|page| fleet.warm(page));
    (1..=3).for_each(|product| fleet.shop.set(product, 7));
    fail_purges(&fleet, "varnish-2", true);
    (1..=3).for_each(|product| assert_eq!(fleet.purge_tag(&format!("cat_p_{product}")).status, 200));
    end(&mut fleet);
    fail_purges(&fleet, "varnish-2", false);
    std::fs::write(file(&fleet), copy).expect("our file");
    nothing_is_old(&mut fleet, "replaced", "it is an older copy");
}

#[test]
fn a_journal_whose_bytes_are_wrong_is_not_started_with_unless_it_may_be() {
    let mut fleet = missed("disk");
    let mut bytes = std::fs::read(file(&fleet)).expect("our file");
    bytes[4096..].iter_mut().step_by(64).for_each(|byte| *byte ^= 0xff);
    std::fs::write(file(&fleet), &bytes).expect("our file");
    let config = fleet.folder.path().join("clearcoat.toml").display().to_string();
    let refused = crate::support::clearcoat::run(&["serve", "--config", &config]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    for part in ["journal.redb is not a journal, or it is damaged", "journal.damaged", "DB corrupted"] {
        assert!(told.contains(part), "{told}");
    }
    let text = fleet.clearcoat.config().replace("[journal]", "[journal]\ndamaged = \"anew\"");
    fleet.clearcoat.configure(&text);
    nothing_is_old(&mut fleet, "damaged", "the journal is damaged");
}

#[test]
fn a_journal_of_a_newer_format_is_left_alone() {
    let mut fleet = Fleet::start(&Plan { varnish: 0, web: 1, ..Plan::default() });
    end(&mut fleet);
    std::fs::write(folder(&fleet).join("identity.json"), "{\"format\":9}").expect("our file");
    let config = fleet.folder.path().join("clearcoat.toml").display().to_string();
    let refused = crate::support::clearcoat::run(&["serve", "--config", &config]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(told.contains("identity.json was written by a newer clearcoat: it has format 9"), "{told}");
}

fn end(fleet: &mut Fleet) {
    eventually("every Varnish that obeys is current", || {
        fleet.clearcoat.nodes().iter().any(|node| node["current"] == true || node["role"] == "web").then_some(())
    });
    fleet.clearcoat.terminate();
    assert_eq!(fleet.clearcoat.wait().code(), Some(0));
}
