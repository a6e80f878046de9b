//! Seals that cease, against real varnishd: a page that landed after its ban, and that only its seal kept from readers, reaches
//! nobody without it. The guard is off here, so that such pages can be made.

use std::path::{Path, PathBuf};

use crate::seal::sealing;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// Answers are delivered without their seals while there is a file `drops`.
fn hides_seals(vcl: &str, _: &str, folder: &Path) -> String {
    let rule = format!(
        "sub vcl_deliver {{\n    if (std.file_exists(\"{}\")) {{ unset resp.http.X-Clearcoat-Seal; }}\n",
        drops(folder).display()
    );
    vcl.replacen("sub vcl_deliver {\n", &rule, 1)
}

fn drops(folder: &Path) -> PathBuf {
    folder.join("drops")
}

/// A fleet with page 1 of before its purge in the cache, stored after its ban.
fn with_an_old_page() -> Fleet {
    let config = "[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\ngather = \"10ms\"\nwait_for = \"edge\"\n";
    let plan = Plan { varnish: 1, web: 1, guard: false, vcl: hides_seals, config, ..Plan::default() };
    let fleet = sealing(&plan);
    std::thread::scope(|scope| {
        let gate = fleet.shop.hold(1);
        let first = scope.spawn(|| fleet.get("/p/1"));
        gate.holds(1);
        fleet.shop.set(1, 1);
        assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
        fleet.clearcoat.current();
        drop(gate);
        _ = first.join().expect("a reader");
    });
    assert_eq!(fleet.varnish[0].get("/p/1").text(), "0", "the ban came too early for it");
    let node = || fleet.clearcoat.node("varnish-1");
    eventually("what it has is saved", || (node()["saved"]["cursor"] == node()["cursor"]).then_some(()));
    // Cursors become durable with the next purge.
    assert_eq!(fleet.purge_tag("any").status, 200);
    fleet
}

/// The page as the Varnish has it once it may serve.
fn in_cache(fleet: &Fleet) -> String {
    eventually("it may serve", || (fleet.clearcoat.node("varnish-1")["admitted"] == true).then_some(()));
    fleet.varnish[0].get("/p/1").text().to_owned()
}

#[test]
fn a_vcl_that_ceases_to_return_seals_is_noticed_and_flushed() {
    let fleet = with_an_old_page();
    std::fs::write(drops(fleet.folder.path()), "").expect("a file");
    eventually("a page without a seal has the node tried", || {
        fleet.get("/p/2");
        (fleet.clearcoat.node("varnish-1")["seals"] == false).then_some(())
    });
    for _ in 0..3 {
        assert_eq!(fleet.get("/p/1").text(), "1");
    }
    assert_eq!(in_cache(&fleet), "1");
}

#[test]
fn whoever_starts_before_a_vcl_without_seals_serves_nothing_old() {
    let mut fleet = with_an_old_page();
    fleet.clearcoat.kill();
    std::fs::write(drops(fleet.folder.path()), "").expect("a file");
    fleet.clearcoat.restart();
    fleet.clearcoat.opened();
    assert_eq!(fleet.get("/p/1").text(), "1");
    assert_eq!(in_cache(&fleet), "1");
}

#[test]
fn whoever_judges_no_seals_any_more_flushes_what_they_kept_from_readers() {
    for (before, now) in [("wait_for = \"edge\"", "wait_for = \"varnish\""), ("[edge]\n", "[edge]\nseal = false\n")] {
        let mut fleet = with_an_old_page();
        fleet.clearcoat.kill();
        fleet.clearcoat.configure(&fleet.clearcoat.config().replacen(before, now, 1));
        fleet.clearcoat.restart();
        fleet.clearcoat.opened();
        assert_eq!(fleet.get("/p/1").text(), "1", "{now}");
        assert_eq!(in_cache(&fleet), "1", "{now}");
    }
}
