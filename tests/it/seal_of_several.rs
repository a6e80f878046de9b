//! Seals with several clearcoats: each judges by its own journal what any of them has sealed.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use crate::seal::{WITHOUT_TRIAL, blocks, drops_seals, of_blocks, says_purged};
use crate::support::clearcoat::Clearcoat;
use crate::support::client::{Answer, exchange, get, purge, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::varnish::signal;

/// Purges that are sealed gather for so long that no test sees them sent for that reason.
const GATHERED: &str = "[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"15s\"\ngather = \"60s\"\n";

/// Both ways to be several: with a journal that all share in etcd, and with journals of their own.
fn plans() -> [Plan; 2] {
    let plan = || Plan { varnish: 2, web: 1, replicas: 2, first_start: "flush", config: GATHERED, ..Plan::default() };
    [Plan { etcd: 1, journal: "etcd", ..plan() }, plan()]
}

fn all_seal(fleet: &Fleet) {
    for clearcoat in fleet.clearcoats() {
        eventually("every Varnish returns seals, for every clearcoat", || {
            let nodes = clearcoat.nodes();
            let seal = nodes.iter().all(|node| node["role"] == "web" || node["seals"] == true);
            let waits_for_nobody =
                || purge_by(clearcoat, "nothing")["pending"].as_array().is_some_and(|ids| ids.len() == 2);
            (seal && waits_for_nobody()).then_some(())
        });
    }
}

fn purge_by(clearcoat: &Clearcoat, name: &str) -> serde_json::Value {
    let answer = purge(clearcoat.purge, &tag(name)).expect("the purge listener answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn read(clearcoat: &Clearcoat, path: &str) -> Answer {
    get(clearcoat.edge, path).expect("the edge answers")
}

fn caught(clearcoat: &Clearcoat) -> f64 {
    clearcoat.metric("clearcoat_stale_caught_total{node=\"varnish-1\"}")
        + clearcoat.metric("clearcoat_stale_caught_total{node=\"varnish-2\"}")
}

#[test]
fn a_sealed_purge_waits_for_no_varnish_and_holds_behind_every_clearcoat() {
    for plan in plans() {
        let mut fleet = Fleet::start(&plan);
        all_seal(&fleet);
        for version in 1..=6 {
            fleet.shop.set(1, version);
            let answer = purge_by(fleet.replica(version as usize % 2), "cat_p_1");
            assert_eq!(
                (answer["pending"].as_array().unwrap().len(), &answer["unconfirmed"]),
                (2, &serde_json::Value::Null)
            );
            for _ in 0..2 {
                let seen: Vec<String> = fleet.clearcoats().map(|each| read(each, "/p/1").text().to_owned()).collect();
                assert_eq!(seen, [version.to_string(), version.to_string()]);
            }
            // While the nodes start slowly, the page may move to the other one.
            eventually("each takes what the other has sealed", || {
                fleet.clearcoats().all(|each| read(each, "/p/1").cache() == "HIT").then_some(())
            });
        }
    }
}

#[test]
fn a_page_through_a_clearcoat_that_lags_is_taken_by_the_reader_who_asked() {
    for plan in plans() {
        let fleet = Fleet::start(&Plan { varnish: 1, ..plan });
        let [first, other] = [&fleet.clearcoat, &fleet.others[0]];
        eventually("both seal", || {
            fleet
                .clearcoats()
                .all(|each| purge_by(each, "nothing")["pending"].as_array().unwrap().len() == 1)
                .then_some(())
        });
        assert_eq!(read(first, "/p/1").text(), "0");
        // Its answer names the other one, and what that passes on to Varnish does not say that it knows of the purge.
        signal("-STOP", &[other.pid()]);
        fleet.shop.set(1, 1);
        let answer = purge_by(first, "cat_p_1");
        assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
        assert_eq!(read(first, "/p/1").text(), "1");
        signal("-CONT", &[other.pid()]);
        eventually("the other one has it", || (read(other, "/p/1").text() == "1").then_some(()));
    }
}

#[test]
fn a_block_is_known_to_the_other_clearcoat_before_it_is_stored() {
    for plan in plans() {
        let (web, block) = blocks();
        let config: &'static str = format!("{GATHERED}{}", of_blocks(&web)).leak();
        let mut fleet = Fleet::start(&Plan { web: 0, config, ..plan });
        all_seal(&fleet);
        for round in 0..4 {
            for clearcoat in fleet.clearcoats() {
                assert_eq!(read(clearcoat, "/page").text(), format!("<p>block {round}</p>"));
            }
            block.store(round + 1, Ordering::SeqCst);
            let answer = purge_by(fleet.replica(round as usize % 2), "of_block");
            assert_eq!(answer["pending"], serde_json::json!([]), "{answer}");
        }
        let answer = purge_by(&fleet.clearcoat, "of_page");
        assert_eq!(answer["pending"].as_array().unwrap().len(), 2, "the page itself is shown by its seal: {answer}");
    }
}

#[test]
fn a_clearcoat_that_joins_knows_the_pages_and_the_blocks_of_the_others() {
    let [shared, _] = plans();
    let (web, block) = blocks();
    let config: &'static str = format!("{GATHERED}{}", of_blocks(&web)).leak();
    let mut fleet = Fleet::start(&Plan { web: 0, config, ..shared });
    all_seal(&fleet);
    assert_eq!(read(&fleet.clearcoat, "/page").text(), "<p>block 0</p>");
    assert_eq!(read(&fleet.clearcoat, "/other").text(), "<p>block 0</p>");
    // What each cache has is found in etcd: a node of which nothing is known is emptied.
    eventually("the cursors are in etcd", || (fleet.etcd().list("/clearcoat/v1/cursors/").len() == 2).then_some(()));
    // It comes without anything that it knew.
    fleet.replica(1).kill();
    purge_by(&fleet.clearcoat, "of_nothing");
    std::fs::remove_dir_all(fleet.journal_of(1)).expect("its journal");
    // With `flush` it would take no page from before it came.
    let config = fleet.others[0].config().replacen("first_start = \"flush\"", "first_start = \"trust\"", 1);
    fleet.others[0].configure(&config);
    fleet.replica(1).restart();
    fleet.others[0].opened();
    all_seal(&fleet);
    let old = read(&fleet.others[0], "/other");
    assert_eq!((old.cache(), old.text()), ("HIT", "<p>block 0</p>"), "nothing of the page was purged");
    block.store(1, Ordering::SeqCst);
    let answer = purge_by(&fleet.others[0], "of_block");
    assert_eq!(answer["pending"], serde_json::json!([]), "{answer}");
    for clearcoat in fleet.clearcoats() {
        assert_eq!(read(clearcoat, "/page").text(), "<p>block 1</p>");
    }
}

#[test]
fn beside_a_clearcoat_that_does_not_seal_purges_wait() {
    for plan in plans() {
        let mut fleet = Fleet::start(&plan);
        all_seal(&fleet);
        fleet.replica(1).kill();
        let config = fleet.others[0].config();
        let config = config.replacen("[purge]\n", "[purge]\nwait_for = \"varnish\"\n", 1);
        fleet.others[0].configure(&config);
        fleet.replica(1).restart();
        fleet.others[0].opened();
        eventually("purges wait for Varnish", || {
            (purge_by(&fleet.clearcoat, "cat_p_1")["pending"] == serde_json::json!([])).then_some(())
        });
        assert!(fleet.clearcoat.nodes().iter().all(|node| node["seals"] != true), "what is cached may have no seal");
    }
}

/// Ends both when each has saved what it knows of caches, and of the other one.
fn end_both(fleet: &mut Fleet) {
    eventually("each has saved what it knows", || {
        let knows_other = |number| {
            std::fs::read_dir(fleet.journal_of(number)).expect("its folder").flatten().any(|file| {
                let name = file.file_name();
                let is_of_others = name == "replicas.json" || name == "peers.json";
                is_of_others && std::fs::read_to_string(file.path()).is_ok_and(|text| text.contains("clearcoat-"))
            })
        };
        let are_saved = |clearcoat: &Clearcoat| {
            clearcoat.nodes().iter().all(|node| node["role"] == "web" || node["saved"]["seals"] == true)
        };
        (knows_other(0) && knows_other(1) && fleet.clearcoats().all(are_saved)).then_some(())
    });
    (0..2).for_each(|number| end(fleet.replica(number)));
}

#[test]
fn clearcoats_that_were_all_down_at_once_seal_again() {
    for plan in plans() {
        let mut fleet = Fleet::start(&plan);
        all_seal(&fleet);
        end_both(&mut fleet);
        (0..2).for_each(|number| fleet.replica(number).restart());
        fleet.clearcoats().for_each(Clearcoat::opened);
        all_seal(&fleet);
    }
}

#[test]
fn a_second_restart_before_the_other_is_met_forgets_no_sealed_cache() {
    for plan in plans() {
        let mut fleet = Fleet::start(&plan);
        all_seal(&fleet);
        end_both(&mut fleet);
        fleet.replica(0).restart();
        fleet.clearcoat.opened();
        let position = purge_by(&fleet.clearcoat, "any")["position"].as_u64();
        eventually("it has saved what each Varnish has", || {
            let nodes = fleet.clearcoat.nodes();
            let is_saved = |node: &serde_json::Value| node["saved"]["cursor"].as_u64() >= position;
            nodes.iter().all(|node| node["role"] == "web" || is_saved(node)).then_some(())
        });
        assert_eq!(seals(&fleet.clearcoat), [false, false], "what the other one passed meanwhile is not known");
        end(fleet.replica(0));
        (0..2).for_each(|number| fleet.replica(number).restart());
        fleet.clearcoats().for_each(Clearcoat::opened);
        all_seal(&fleet);
    }
}

#[test]
fn clearcoats_that_wait_for_varnish_take_each_others_pages() {
    for plan in plans() {
        let config: &'static str = GATHERED.replacen("gather", "wait_for = \"varnish\"\ngather", 1).leak();
        let fleet = Fleet::start(&Plan { config, ..plan });
        for page in 1..=5 {
            let path = format!("/p/{page}");
            for clearcoat in fleet.clearcoats() {
                assert_eq!(read(clearcoat, &path).text(), "0");
            }
            // While the nodes start slowly, a page may move to the other one.
            eventually("both take it from a cache", || {
                fleet.clearcoats().all(|each| read(each, &path).cache() == "HIT").then_some(())
            });
        }
        fleet.clearcoats().for_each(|clearcoat| assert_eq!(caught(clearcoat), 0.0));
    }
}

fn end(clearcoat: &mut Clearcoat) {
    clearcoat.terminate();
    assert!(clearcoat.wait().success());
}

fn knows(clearcoat: &Clearcoat, replicas: &[&str]) {
    eventually("it knows the others", || {
        let fleet = clearcoat.fleet();
        let mut known: Vec<&str> = fleet["replicas"].as_array()?.iter().filter_map(|one| one["id"].as_str()).collect();
        known.sort_unstable();
        (known == replicas).then_some(())
    });
}

fn seals(clearcoat: &Clearcoat) -> Vec<bool> {
    let nodes = clearcoat.nodes();
    nodes.iter().filter(|node| node["role"] == "varnish").map(|node| node["seals"] == true).collect()
}

#[test]
fn what_one_knows_not_to_be_sealed_no_other_believes_after_a_restart() {
    let [shared, _] = plans();
    let mut fleet = Fleet::start(&Plan { replicas: 3, ..shared });
    all_seal(&fleet);
    end(fleet.replica(2));
    (0..2).for_each(|number| knows(fleet.replica(number), &["clearcoat-1", "clearcoat-2"]));
    eventually("what it knows is saved", || {
        let nodes = fleet.others[0].nodes();
        let are_saved = nodes.iter().all(|node| node["role"] == "web" || node["saved"]["seals"] == true);
        let known = std::fs::read_to_string(fleet.journal_of(1).join("replicas.json")).expect("its file");
        (are_saved && !known.contains("clearcoat-3")).then_some(())
    });
    // With which cursors become durable.
    purge_by(&fleet.others[0], "any");
    fleet.replica(1).kill();
    // One that does not seal is there only while that one is away.
    let config = fleet.others[1].config().replacen("[purge]\n", "[purge]\nwait_for = \"varnish\"\n", 1);
    fleet.others[1].configure(&config);
    fleet.replica(2).restart();
    fleet.others[1].opened();
    eventually("what is cached may have no seal", || (seals(&fleet.clearcoat) == [false, false]).then_some(()));
    end(fleet.replica(2));
    fleet.replica(1).restart();
    fleet.others[0].opened();
    fleet.others[0].log().waits_for("all replicas know the same blocks");
    eventually("each has been tried", || {
        let nodes = fleet.others[0].nodes();
        nodes.iter().all(|node| node["role"] == "web" || node["trial"] == "passed").then_some(())
    });
    assert_eq!(seals(&fleet.others[0]), [false, false]);
    let flush = "PURGE / HTTP/1.1\r\nHost: a\r\nX-Clearcoat-Flush: all\r\n\r\n";
    assert_eq!(exchange(fleet.clearcoat.purge, flush).expect("an answer").status, 200);
    (0..2).for_each(|number| {
        let clearcoat: &Clearcoat = fleet.replica(number);
        eventually("a flush makes them sealed", || (seals(clearcoat) == [true, true]).then_some(()));
    });
}

#[test]
fn a_clearcoat_that_joins_learns_of_one_that_lost_etcd() {
    let [shared, _] = plans();
    let mut fleet = Fleet::start(&Plan { links: true, ..shared });
    fleet.links[1].etcd.iter().for_each(|link| link.cut());
    eventually("its key is gone", || {
        let keys = fleet.etcd().list("/clearcoat/v1/replicas/");
        (!keys.keys().any(|key| key.ends_with("clearcoat-2"))).then_some(())
    });
    // One that nobody has heard of, at an address of its own.
    let mut config: toml::Table = fleet.clearcoat.config().parse().expect("its configuration");
    let folder = fleet.folder.path().join("joins");
    std::fs::create_dir_all(&folder).expect("a folder");
    let journal = folder.join("journal").display().to_string();
    for (section, key, value) in [
        ("replica", "id", toml::Value::from("clearcoat-9")),
        ("replica", "address", "".into()),
        ("purge", "listen", vec!["127.0.0.1:0"].into()),
        ("origin", "listen", vec!["127.0.0.1:0"].into()),
        ("edge", "listen", vec!["127.0.0.1:0"].into()),
        ("admin", "listen", vec!["127.0.0.1:0"].into()),
        ("journal", "path", journal.into()),
    ] {
        config[section].as_table_mut().expect("a section").insert(key.into(), value);
    }
    let joined = Clearcoat::start(&folder, &config.to_string());
    joined.opened();
    knows(&joined, &["clearcoat-1", "clearcoat-2", "clearcoat-9"]);
    assert_eq!(read(&fleet.others[0], "/p/1").text(), "0");
    fleet.shop.set(1, 1);
    let answer = purge_by(&joined, "cat_p_1");
    assert_eq!(answer["unconfirmed"], serde_json::Value::Null, "{answer}");
    let edges: Vec<SocketAddr> = fleet.clearcoats().chain([&joined]).map(|each| each.edge).collect();
    for edge in edges {
        assert_eq!(get(edge, "/p/1").expect("an answer").text(), "1");
    }
}

#[test]
fn a_purge_from_while_it_was_away_that_only_another_one_knows_is_seen() {
    let [shared, _] = plans();
    let config: &'static str = format!("{GATHERED}{WITHOUT_TRIAL}").leak();
    let mut fleet = Fleet::start(&Plan { replicas: 3, links: true, varnish: 1, config, vcl: says_purged, ..shared });
    // Both are kept, and one of them is purged.
    ["/p/1", "/p/2"].iter().for_each(|page| assert_eq!(read(&fleet.clearcoat, page).text(), "0"));
    fleet.clearcoat.kill();
    fleet.shop.set(1, 1);
    purge_by(&fleet.others[1], "cat_p_1");
    // Who took it is gone, and etcd, where it is, too.
    fleet.replica(2).kill();
    fleet.links[0].etcd.iter().for_each(|link| link.cut());
    fleet.replica(0).restart();
    fleet.clearcoat.log().waits_for("the purged names of a replica are known");
    fleet.clearcoat.opened();
    assert_eq!(read(&fleet.clearcoat, "/p/2").text(), "0");
    assert_eq!(read(&fleet.clearcoat, "/p/1").text(), "1");
}

/// Has the last clearcoat try the first Varnish anew, as one that comes up is tried.
fn try_again(fleet: &mut Fleet) {
    let health = |fleet: &Fleet, wanted: &str| {
        eventually(wanted, || (fleet.others[0].node("varnish-1")["health"] == wanted).then_some(()));
    };
    fleet.own_way.as_ref().expect("a plan with it").cut();
    health(fleet, "down");
    fleet.own_way.as_mut().expect("a plan with it").mend();
    health(fleet, "up");
}

#[test]
fn a_varnish_that_one_sees_to_drop_seals_is_waited_for_by_all() {
    for plan in plans() {
        let mut fleet = Fleet::start(&Plan { own_way: true, vcl: drops_seals, ..plan });
        all_seal(&fleet);
        let file = fleet.folder.path().join("drops");
        std::fs::write(&file, "").expect("a file");
        try_again(&mut fleet);
        eventually("the one that has not tried it knows", || (seals(&fleet.clearcoat) == [false, true]).then_some(()));
        let answer = purge_by(&fleet.clearcoat, "any");
        assert_eq!(answer["applied"], serde_json::json!(["varnish-1"]), "{answer}");
        assert_eq!(answer["pending"], serde_json::json!(["varnish-2"]), "{answer}");
        std::fs::remove_file(&file).expect("our file");
        try_again(&mut fleet);
        eventually("it is flushed, and counts for both", || {
            fleet.clearcoats().all(|clearcoat| seals(clearcoat) == [true, true]).then_some(())
        });
        // Who has seen it ends. The other one may have tried it as well, and flushes it then when it returns seals again; or nobody
        // can say when it is over.
        std::fs::write(&file, "").expect("a file");
        try_again(&mut fleet);
        eventually("it knows again", || (seals(&fleet.clearcoat) == [false, true]).then_some(()));
        std::fs::remove_file(&file).expect("our file");
        end(fleet.replica(1));
        knows(&fleet.clearcoat, &["clearcoat-1"]);
        let flush = "PURGE / HTTP/1.1\r\nHost: a\r\nX-Clearcoat-Flush: all\r\n\r\n";
        assert_eq!(exchange(fleet.clearcoat.purge, flush).expect("an answer").status, 200);
        eventually("a flush makes it a sealed one", || (seals(&fleet.clearcoat) == [true, true]).then_some(()));
    }
}

#[test]
fn a_block_that_the_other_clearcoat_cannot_be_told_of_is_not_stored() {
    for plan in plans() {
        let (web, block) = blocks();
        let config: &'static str = format!("{}{}", GATHERED.replacen("15s", "3s", 1), of_blocks(&web)).leak();
        let fleet = Fleet::start(&Plan { web: 0, config, ..plan });
        all_seal(&fleet);
        signal("-STOP", &[fleet.others[0].pid()]);
        eventually("each Varnish fetches through the first one", || {
            fleet.varnish.iter().all(|varnish| varnish.origins_up() == 1).then_some(())
        });
        let answer = purge_by(&fleet.clearcoat, "any");
        assert_eq!(answer["unconfirmed"], serde_json::json!(["clearcoat-2"]), "{answer}");
        let show = |version| {
            block.store(version, Ordering::SeqCst);
            read(&fleet.clearcoat, "/page").text().to_owned()
        };
        for version in 0..3 {
            assert_eq!(show(version), format!("<p>block {version}</p>"));
        }
        signal("-CONT", &[fleet.others[0].pid()]);
        let mut versions = 3..;
        let stored = eventually("it is stored when the other one knows of it", || {
            let (first, second) = (show(versions.next()?), show(versions.next()?));
            (first == second).then_some(first)
        });
        let answer = purge_by(&fleet.others[0], "of_block");
        assert_eq!(answer["pending"], serde_json::json!([]), "{answer}");
        assert_ne!(read(&fleet.clearcoat, "/page").text(), stored);
    }
}

#[test]
fn a_purge_that_only_another_one_knows_to_be_unsealed_is_agreed_on() {
    let [shared, _] = plans();
    let (web, _) = blocks();
    let config: &'static str = format!("{GATHERED}{}", of_blocks(&web)).leak();
    let mut fleet = Fleet::start(&Plan { web: 0, own_way: true, links: true, config, ..shared });
    all_seal(&fleet);
    // A block passes it of which it cannot tell.
    fleet.links[0].others.close();
    let block = "GET /block HTTP/1.1\r\nHost: a\r\nX-Clearcoat-Asked: 1 0000000000000001.00000001 0 0000000000000001 /page\r\n\r\n";
    let answer = exchange(fleet.others[0].origin, block).expect("an answer");
    assert_eq!((answer.text(), answer.header("surrogate-control")), ("block 0", Some("no-store")), "{answer:?}");
    fleet.links[0].others.mend();
    fleet.own_way.as_ref().expect("a plan with it").cut();
    eventually("it does not reach the first Varnish", || {
        (fleet.others[0].node("varnish-1")["health"] == "down").then_some(())
    });
    assert!(!fleet.clearcoat.log().has("\"Recalled\""));
    let answer = purge_by(&fleet.clearcoat, "of_block");
    assert_eq!(answer["pending"], serde_json::json!([]), "{answer}");
    assert_eq!(answer["fenced_at"], serde_json::json!({"clearcoat-2": ["varnish-1"]}), "{answer}");
    // Pages that passed the other one may be on their way to it.
    fleet.clearcoat.log().waits_for("\"Recalled\"");
}
