//! An operator's exercise: for each of eight faults the status page, `clearcoat status`, the log and an alert in a real
//! Prometheus name the cause.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use clearcoat::fleet::PurgeDialect;

use crate::support::browser::Page;
use crate::support::clearcoat::{Clearcoat, run};
use crate::support::client::{Connection, purge, tag};
use crate::support::faults::second_refuses_clearcoat;
use crate::support::fleet::{Fleet, Plan};
use crate::support::prometheus::Prometheus;
use crate::support::tls::Issued;
use crate::support::{disk, eventually, eventually_within};

/// Longer than the slowest alert takes to show: that about a registry which has been away for a minute.
const UNTIL_ALERTED: Duration = Duration::from_secs(3 * 60);

/// What names the cause of a fault.
struct Named {
    /// In the list of what is wrong on the page, and in `clearcoat status`.
    shown: &'static str,
    logged: &'static str,
    alert: &'static str,
}

/// A Prometheus with the alerts that are shipped, which has seen this clearcoat once: a rise after that is one.
fn watched(clearcoat: &Clearcoat, folder: &Path) -> Prometheus {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus/rules.yml");
    let config = format!(
        "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n\
         - job_name: clearcoat\n  static_configs: [{{targets: ['{}']}}]\n",
        rules.display(),
        clearcoat.admin
    );
    let prometheus = Prometheus::start(folder, &config);
    eventually("Prometheus has asked once", || (!prometheus.query("up == 1").is_empty()).then_some(()));
    prometheus
}

/// Makes the fault while Prometheus looks, and checks who names it.
fn exercise(clearcoat: &Clearcoat, fault: impl FnOnce(), Named { shown, logged, alert }: Named) {
    let folder = tempfile::tempdir().expect("a folder");
    let prometheus = watched(clearcoat, folder.path());
    fault();
    let mut page = Page::open(clearcoat.admin, "/");
    page.waits_for("#problems", shown);
    let url = format!("http://{}", clearcoat.admin);
    eventually(&format!("status says {shown}"), || {
        let output = run(&["status", "--admin", &url]);
        String::from_utf8_lossy(&output.stdout).contains(shown).then_some(())
    });
    clearcoat.log().waits_for(logged);
    let query = format!("ALERTS{{alertname=\"{alert}\"}}");
    eventually_within(UNTIL_ALERTED, &query, || (!prometheus.query(&query).is_empty()).then_some(()));
}

/// A clearcoat without nodes.
fn alone(folder: &Path, more: &str) -> String {
    let mut config = String::new();
    for section in ["edge", "origin", "purge", "admin"] {
        write!(config, "[{section}]\nlisten = [\"127.0.0.1:0\"]\n").unwrap();
    }
    write!(config, "[journal]\nkind = \"disk\"\npath = \"{}\"\n{more}", folder.join("journal").display()).unwrap();
    config
}

#[test]
fn an_acl_that_refuses_clearcoat_is_named() {
    let fleet = Fleet::launch(&Plan { varnish: 2, web: 1, vcl: second_refuses_clearcoat, ..Plan::default() });
    let refuses = "its purge ACL refuses clearcoat";
    exercise(&fleet.clearcoat, || {}, Named { shown: refuses, logged: refuses, alert: "ClearcoatNodeOut" });
}

#[test]
fn a_vcl_that_answers_purges_with_something_else_is_named() {
    // It takes a purge of keys for one of a URL, and reports success.
    let vcl: fn(&str, &str, &Path) -> String = |vcl, _, _| {
        let recv = "sub vcl_recv { if (req.http.xkey-purge) { return (synth(200, \"Purged\")); } }\n";
        vcl.replacen("import xkey;\n", &format!("import xkey;\n{recv}"), 1)
    };
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, delivery: PurgeDialect::Xkey, vcl, ..Plan::default() });
    let wrong = "its VCL does not carry out delivery = ";
    exercise(&fleet.clearcoat, || {}, Named { shown: wrong, logged: wrong, alert: "ClearcoatTrialFailed" });
}

#[test]
fn a_varnish_that_hangs_is_named() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, ..Plan::default() });
    let hang = || {
        fleet.varnish[1].hang();
        fleet.purge_tag("cat_p_1");
    };
    exercise(
        &fleet.clearcoat,
        hang,
        Named { shown: "no answer within 500ms", logged: "node is down", alert: "ClearcoatNodeOut" },
    );
    fleet.varnish[1].resume();
}

#[test]
fn an_etcd_that_is_dead_is_named() {
    let config = "[registry]\nkind = \"etcd\"\n";
    let mut fleet = Fleet::start(&Plan { varnish: 1, web: 1, etcd: 1, registered: true, config, ..Plan::default() });
    fleet.etcd().kill_all();
    let named =
        Named { shown: "etcd has been silent for", logged: "etcd cannot be watched", alert: "ClearcoatRegistryAway" };
    exercise(&fleet.clearcoat, || {}, named);
}

#[test]
fn a_certificate_that_has_ended_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let files = Issued::ended_in(&["shop.example"], Some(2020)).write(folder.path(), "shop");
    let clearcoat = Clearcoat::start(folder.path(), &alone(folder.path(), &files.toml("127.0.0.1:0")));
    let named = Named {
        shown: "browsers warn of the shop",
        logged: "the certificate has expired",
        alert: "ClearcoatCertificateEnds",
    };
    exercise(&clearcoat, || {}, named);
}

#[test]
fn a_wrong_token_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    std::fs::write(&token, "a-token-that-only-the-shop-has").expect("a file");
    let config =
        alone(folder.path(), "").replacen("[purge]\n", &format!("[purge]\ntoken_file = \"{}\"\n", token.display()), 1);
    let clearcoat = Clearcoat::start(folder.path(), &config);
    clearcoat.opened();
    let refused = || assert_eq!(purge(clearcoat.purge, &tag("cat_p_1")).expect("an answer").status, 403);
    let named = Named {
        shown: "was refused: token missing or wrong",
        logged: "purge refused: token missing or wrong",
        alert: "ClearcoatPurgesRefused",
    };
    exercise(&clearcoat, refused, named);
}

#[test]
fn a_disk_without_room_is_named() {
    if !disk::is_possible() {
        return;
    }
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, disk: true, ..Plan::default() });
    let fill = || {
        fleet.disk.as_ref().expect("planned").fill();
        // What the file still has room for is taken.
        eventually("a purge is refused", || (fleet.purge_tag("cat_p_1").status == 503).then_some(()));
    };
    let full = "No space left on device";
    exercise(&fleet.clearcoat, fill, Named { shown: full, logged: full, alert: "ClearcoatJournalStalled" });
}

#[test]
fn a_process_without_files_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let clearcoat = Clearcoat::start_with_files((256, 256), folder.path(), &alone(folder.path(), ""));
    clearcoat.opened();
    let out = "all files of this share are in use";
    let mut held = Vec::new();
    let flood = || held.extend((0..400).map_while(|_| Connection::open(clearcoat.edge).ok()));
    exercise(&clearcoat, flood, Named { shown: out, logged: out, alert: "ClearcoatShortage" });
}
