//! The consistency test: whatever is killed or hangs, no read is stale, no purge is lost, no request is refused.
//!
//! # The model
//!
//! A page has versions, 0, 1, 2, and so on. One writer owns it: he sets the next version at the shop, then purges the
//! page's tag as Magento does, on a separate connection, and repeats the purge until it is answered 200. At that moment
//! the version is *promised*. A purge without an answer promises nothing, whether or not it was carried out; the
//! answered one that follows promises its version, too.
//!
//! A reader notes the time before he sends the first byte of a request. If a version was promised by then, he must not
//! see an older one: the read would be *stale*. While a purge is in progress he may see either version. All clocks are
//! one clock, because all clients are threads of this process. If two events are too close to be ordered, the reader
//! gets the benefit of the doubt: a promise counts from a moment after the answer was read, a read from a moment before
//! it was sent. So a reported stale read is real, and scheduling hides none that began later than a few microseconds
//! after the answer.
//!
//! Meanwhile Varnish nodes hang (SIGSTOP) and are killed, and clearcoat is killed and restarted. Half of the readers
//! are patient, the others reload a slow page: a Varnish that resumes after a hang then finds both old and fresh
//! requests in its sockets, the fresh ones from readers for whom a newer version is already promised. Requests in
//! flight when clearcoat was killed, or sent before it was ready again, may fail. Any other failure is a *refused*
//! request. In the end every node is healed, and each Varnish must have the last version of every page, so that a lost
//! purge is found even in a cache that was not read.
//!
//! # What makes it strict
//!
//! The checker is a pure function of histories ([`history`]), with its own tests. And the same harness runs against
//! Magento's own way of purging, where it must see stale reads: a test that has never failed proves nothing.
//!
//! A page is rendered from the version at its start, and takes up to [`RENDER`]; a writer sends his purge immediately
//! after his change. So there are always pages on their way into a cache that are older than a purge, and only the
//! guard on the origin path keeps them out: without it the harness must see stale reads, too.
//!
//! # What it does not cover
//!
//! Two Varnish nodes that fail at the same moment: clearcoat tries a request on two nodes, not on three. So a second
//! node fails only when the first one's failure must have been detected.
//!
//! `CLEARCOAT_SEED` repeats a schedule of faults and the choices of every client (not the timing, which depends on the
//! machine); `CLEARCOAT_CONSISTENCY_SECONDS` sets the duration of the test.

mod faults;
mod history;
mod load;
mod run;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::support::fleet::{Fleet, Plan};
use crate::support::slow_link::{self, Quality};
use crate::support::{client, disk, eventually, say};
use faults::Step;
use load::Purging;
use run::{Findings, Run, StopGuard, Tally};

const PAGES: u64 = 240;
const WRITERS: u64 = 4;
/// Most readers wait for a render, and the rest keeps the caches busy.
const READERS: usize = 40;
const NODES: usize = 3;
const MEMBERS: usize = 3;

/// The longest render of a page.
const RENDER: Duration = Duration::from_millis(300);

/// The link to the last Varnish: its latency in one direction, with one packet in a hundred lost; and the clock skew of
/// the last clearcoat, which is ahead of all others.
const ONE_WAY: Duration = Duration::from_millis(20);
const AHEAD: &str = "+3s";

/// Magento's timeout for a purge. `ack_timeout` is 1 s, and a quiet machine stays close to it (the failover tests check
/// that); here fsync and two cores are shared with everything else, perhaps with another build.
const SLOWEST_PURGE: Duration = Duration::from_secs(10);

/// All readers of a page go to the same Varnish, even if that hangs: only the fence keeps them away. The web nodes are
/// part of this process and never fail, so their timeouts are those of a busy machine.
const CONFIG: &str =
    "[edge]\nlisten = [\"127.0.0.1:0\"]\nbounded_load = 0\n[health.web]\ninterval = \"5s\"\ntimeout = \"5s\"\n";

#[test]
fn no_page_is_older_than_an_answered_purge_whatever_hangs_or_is_killed() {
    let seed = setting("CLEARCOAT_SEED").unwrap_or_else(|| fastrand::u64(..100_000_000));
    let length = Duration::from_secs(setting("CLEARCOAT_CONSISTENCY_SECONDS").unwrap_or(30));
    let slow_link = slow_link::is_possible().then_some(Quality { delay: ONE_WAY, one_lost_in: 100, seed });
    let disk = disk::is_possible();
    let plan = Plan { slow_link, disk, vcl: poisoned, config: CONFIG, varnish: NODES, ..Plan::default() };
    let mut steps = faults::random(seed, NODES, length);
    if disk {
        steps = faults::both(steps, faults::of_disk(seed, length));
    }
    keeps_its_promise("consistency", Fleet::start(&plan), &steps, seed, length);
}

/// Our VCL, which some purges make fail: those of [`load::poison`].
fn poisoned(vcl: &str, _id: &str, _folder: &Path) -> String {
    let (purge, synth) = ("    if (req.method == \"PURGE\") {", "sub vcl_synth {\n");
    assert!(vcl.contains(purge) && vcl.contains(synth), "{vcl}");
    let poison = "    if (req.url == \"/poison/piped\") { return (pipe); }\n    \
        if (req.url == \"/poison/503\") { return (synth(503)); }\n    \
        if (req.url == \"/poison/fail\") { return (fail); }\n    \
        if (req.url ~ \"^/poison/\") { return (synth(200)); }\n";
    let closed = "    if (req.url == \"/poison/closed\") { set resp.http.Connection = \"close\"; }\n";
    vcl.replacen(purge, &format!("{poison}{purge}"), 1).replacen(synth, &format!("{synth}{closed}"), 1)
}

/// The same with two clearcoats, readers and writers using both, and a journal in a three-member etcd whose members
/// hang and are killed as well.
#[test]
fn no_page_is_older_than_an_answered_purge_behind_any_replica() {
    of_replicas("consistency with replicas", &Plan { ahead: Some(AHEAD), ..Plan::default() });
}

/// The same with purges that wait for no Varnish: each begins empty, and returns seals. Bans gather, so most of what a Varnish
/// has is older than a purge that was answered, and only the edge keeps it from readers.
#[test]
fn no_page_is_older_than_a_purge_that_no_varnish_was_waited_for() {
    sealed("consistency with seals", true);
}

/// The same without the guard: of what a Varnish stores after its ban, too, only the seal tells.
#[test]
fn no_page_is_older_than_a_purge_where_seals_alone_tell() {
    sealed("consistency with seals alone", false);
}

fn sealed(name: &str, guard: bool) {
    let seed = setting("CLEARCOAT_SEED").unwrap_or_else(|| fastrand::u64(..100_000_000));
    let length = Duration::from_secs(setting("CLEARCOAT_CONSISTENCY_SECONDS").unwrap_or(30));
    let disk = disk::is_possible();
    let plan =
        Plan { disk, vcl: poisoned, config: CONFIG, varnish: NODES, first_start: "flush", guard, ..Plan::default() };
    let mut steps = faults::random(seed, NODES, length);
    if disk {
        steps = faults::both(steps, faults::of_disk(seed, length));
    }
    let fleet = Fleet::start(&plan);
    fleet.seals();
    keeps_its_promise(name, fleet, &steps, seed, length);
}

/// Seals alone behind two clearcoats: each judges by its own journal what the other has sealed, whichever of them is killed,
/// and while etcd is away.
#[test]
fn no_page_is_older_than_a_purge_where_seals_alone_tell_any_replica() {
    of_replicas("consistency with seals of replicas", &Plan { first_start: "flush", guard: false, ..Plan::default() });
}

/// Two clearcoats with a journal in etcd, whose members fail, too. Where each Varnish begins empty, it returns seals before the
/// test begins.
fn of_replicas(name: &str, plan: &Plan) {
    let seed = setting("CLEARCOAT_SEED").unwrap_or_else(|| fastrand::u64(..100_000_000));
    let length = Duration::from_secs(setting("CLEARCOAT_CONSISTENCY_SECONDS").unwrap_or(30));
    let (varnish, etcd, journal) = (NODES, MEMBERS, "etcd");
    let plan = Plan { varnish, config: CONFIG, replicas: 2, etcd, journal, vcl: poisoned, ..*plan };
    let fleet = Fleet::start(&plan);
    if plan.first_start == "flush" {
        fleet.seals();
    }
    let steps = faults::both(faults::random(seed, NODES, length), faults::of_etcd(seed, MEMBERS, length));
    keeps_its_promise(name, fleet, &steps, seed, length);
}

/// Runs a schedule, and fails if any read was stale, any purge lost or any request refused.
fn keeps_its_promise(name: &str, mut fleet: Fleet, steps: &[Step], seed: u64, length: Duration) {
    let purging: Vec<Purging> =
        fleet.clearcoats().map(|clearcoat| clearcoat.purge).enumerate().map(to_purging).collect();
    let run = Run::new(PAGES, NODES, purging.len());
    fleet.shop.render_within(RENDER);
    let tally = play(&run, &mut fleet, &purging, steps, seed, length);
    // A Varnish whose answers are judged may keep an old page: no reader gets it.
    let is_judged = fleet.clearcoat.nodes().iter().any(|node| node["seals"] == true);
    let lost = lost(&run, &fleet, is_judged);
    fleet.clearcoats().for_each(|clearcoat| run.note_judged(clearcoat));
    let [judged, caught] = run.judged();

    let counts = [run.faults("Hang("), run.faults("Kill("), run.faults("KillClearcoat")];
    let etcd = (run.faults("HangEtcd"), run.faults("KillEtcd"));
    let frozen = run.faults("Freeze");
    let (findings, chronicle) = run.findings();
    let summary = format!(
        "{}; etcd hung {}, killed {}; disk frozen {frozen}; answers judged {judged}, old and caught {caught}",
        summary(name, seed, length, &tally, counts, &findings),
        etcd.0,
        etcd.1
    );
    say(&summary);
    let mut wrong = String::new();
    let mut require = |holds: bool, what: &str| {
        if !holds {
            wrong += &format!("- {what}\n");
        }
    };
    require(findings.stale.count == 0, "stale reads");
    require(findings.refused.count == 0, "refused reads");
    // A purge that was not durable in time was answered 503 and promised nothing: the machine's disk is busy.
    require(findings.refused_purges.count * 2 <= tally.purges, "purges that were refused, more than a few");
    require(findings.impossible.count == 0, "answers that nobody wrote");
    require(lost.is_empty(), "purges that were lost");
    require(tally.slowest_purge <= SLOWEST_PURGE, "a purge that took too long");
    require(tally.hits * 5 > tally.reads, "caches that were hardly used");
    require(tally.purges > 50 && tally.reads > 1000, "too little load to show anything");
    assert!(wrong.is_empty(), "\n{wrong}{summary}\n{findings}lost: {lost:#?}\n{chronicle}");
}

/// The same harness with Magento's purging, node by node, so that a hanging node misses purges: the checker must detect
/// that.
#[test]
fn the_harness_sees_stale_reads_where_a_varnish_misses_purges() {
    let seed = setting("CLEARCOAT_SEED").unwrap_or_else(|| fastrand::u64(..100_000_000));
    let length = Duration::from_secs(6);
    let mut fleet = Fleet::start(&Plan { varnish: NODES, config: CONFIG, ..Plan::default() });
    let purging = [Purging::OneByOne(fleet.varnish.iter().map(|varnish| varnish.address).collect())];
    let run = Run::new(PAGES, NODES, 1);
    let steps = faults::hang_in_turn(NODES, Duration::from_millis(700), length);
    let tally = play(&run, &mut fleet, &purging, &steps, seed, length);
    let counts = [run.faults("Hang("), 0, 0];
    let (findings, _) = run.findings();
    let summary = summary("without clearcoat's purges", seed, length, &tally, counts, &findings);
    say(&summary);
    assert!(findings.stale.count > 0, "{summary}");
    assert_eq!(findings.impossible.count, 0, "{findings}");
}

/// The same harness without faults: every purge reaches every node, but pages rendered before a purge are stored after
/// it.
#[test]
fn the_harness_sees_stale_reads_where_the_guard_is_off() {
    let seed = setting("CLEARCOAT_SEED").unwrap_or_else(|| fastrand::u64(..100_000_000));
    let length = Duration::from_secs(6);
    let config = CONFIG.replace("bounded_load", "seal = false\nbounded_load").leak();
    let mut fleet = Fleet::start(&Plan { varnish: NODES, config, guard: false, ..Plan::default() });
    let purging = [Purging::Clearcoat(0, fleet.clearcoat.purge)];
    let run = Run::new(PAGES, NODES, 1);
    fleet.shop.render_within(RENDER);
    let tally = play(&run, &mut fleet, &purging, &[], seed, length);
    let (findings, _) = run.findings();
    let summary = summary("without the guard", seed, length, &tally, [0, 0, 0], &findings);
    say(&summary);
    assert!(findings.stale.count > 0, "{summary}");
    assert_eq!(findings.impossible.count, 0, "{findings}");
}

/// A fenced node must catch up with a moving fence: otherwise the first hang in a storm of purges would disable its
/// cache until the storm ends, and one by one the whole fleet's.
#[test]
fn a_varnish_that_was_fenced_comes_back_while_purges_go_on() {
    let fleet = Fleet::start(&Plan { varnish: 2, ..Plan::default() });
    let address = fleet.clearcoat.purge;
    let run = Run::new(1, 1, 1);
    std::thread::scope(|scope| {
        let _stop = StopGuard(&run);
        scope.spawn(|| {
            while !run.is_over() {
                assert_eq!(client::purge(address, &client::tag("cat_p_1")).expect("an answer").status, 200);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        fleet.varnish[0].hang();
        eventually("the node is fenced", || (fleet.clearcoat.node("varnish-1")["current"] == false).then_some(()));
        fleet.varnish[0].resume();
        fleet.clearcoat.current();
    });
}

fn to_purging((number, address): (usize, SocketAddr)) -> Purging {
    Purging::Clearcoat(number, address)
}

/// Runs readers, writers and faults for `length`. On return every purge is answered and every node is healed.
fn play(run: &Run, fleet: &mut Fleet, purging: &[Purging], steps: &[Step], seed: u64, length: Duration) -> Tally {
    run.pages().for_each(|page| fleet.shop.set(page, history::content(page, 0)));
    let edges: Vec<SocketAddr> = fleet.clearcoats().map(|clearcoat| clearcoat.edge).collect();
    let (shop, edges) = (Arc::clone(&fleet.shop), &*edges);
    let shop = &*shop;
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for index in 0..WRITERS {
            let own: Vec<u64> = run.pages().filter(|page| page % WRITERS == index).collect();
            let purging = &purging[index as usize % purging.len()];
            threads.push(scope.spawn(move || load::write(run, shop, purging, &own, seed + 100 + index)));
        }
        for number in 0..READERS {
            threads.push(scope.spawn(move || load::read(run, number, shop, edges, seed + 200 + number as u64)));
        }
        if purging.iter().all(|purging| matches!(purging, Purging::Clearcoat(..))) {
            scope.spawn(move || load::poison(run, purging, seed + 300));
        }
        {
            let _stop = StopGuard(run);
            faults::inject(run, fleet, steps, length);
        }
        let mut sum = Tally::default();
        threads.into_iter().for_each(|thread| sum += thread.join().expect("a reader or writer"));
        sum
    })
}

/// Waits until every node has every purge, then reads every page everywhere. Returns pages that are not the last
/// version.
fn lost(run: &Run, fleet: &Fleet, is_judged: bool) -> Vec<String> {
    fleet.know_each_other();
    for clearcoat in fleet.clearcoats() {
        clearcoat.ready();
        clearcoat.current();
    }
    fleet.shop.render_within(Duration::ZERO);
    let mut lost = Vec::new();
    for page in run.pages() {
        let wanted = run.page(page, |history| history.latest()).to_string();
        let path = format!("/p/{page}");
        let direct = fleet.varnish.iter().filter(|_| !is_judged);
        let everywhere = direct.map(|varnish| (varnish.id.as_str(), varnish.get(&path)));
        let edges = fleet
            .clearcoats()
            .map(|clearcoat| ("an edge", client::get(clearcoat.edge, &path).expect("the edge answers")));
        for (place, answer) in everywhere.chain(edges) {
            if answer.status != 200 || answer.text() != wanted {
                let (status, cache, text) = (answer.status, answer.cache(), answer.text());
                lost.push(format!("page {page} of {place}: {status} {cache} {text}, not {wanted}"));
            }
        }
    }
    lost
}

fn summary(name: &str, seed: u64, length: Duration, tally: &Tally, faults: [usize; 3], findings: &Findings) -> String {
    let [hung, killed, clearcoat] = faults;
    format!(
        "{name}: seed {seed}, {} s, reads {}, stale {}, refused {}, cut off by a kill {}, reloaded {}, slowest read {} ms, hits {} %; \
         purges {}, refused {}, slowest {} ms; Varnish hung {hung}, killed {killed}; clearcoat killed {clearcoat}",
        length.as_secs(),
        tally.reads,
        findings.stale.count,
        findings.refused.count,
        tally.cut_off,
        tally.reloads,
        tally.slowest_read.as_millis(),
        tally.hits * 100 / tally.reads.max(1),
        tally.purges,
        findings.refused_purges.count,
        tally.slowest_purge.as_millis(),
    )
}

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|error| panic!("{name}={value}: {error}")))
}
