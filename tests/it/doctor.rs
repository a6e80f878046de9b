//! `clearcoat doctor` before a real fleet. Faults are made one by one: each has to be found by its name, and what doctor says
//! that is to be done has to mend it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::clearcoat::run;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::varnish::signal;

/// A fleet of one Varnish and one web node, and doctor's own copy of its configuration.
struct Patient {
    fleet: Fleet,
    /// Of doctor alone, so that a fault in it is none of the fleet.
    config: toml::Table,
}

/// What doctor said.
struct Said {
    status: i32,
    findings: Vec<Value>,
}

impl Patient {
    fn new(plan: &Plan) -> Self {
        let fleet = Fleet::start(plan);
        fleet.seals();
        let mut patient = Patient { config: toml::Table::new(), fleet };
        patient.read_configuration();
        patient
    }

    fn small() -> Self {
        Patient::new(&Plan { varnish: 1, web: 1, first_start: "flush", ..Plan::default() })
    }

    /// The configuration of the fleet, and where the Varnish is managed.
    fn read_configuration(&mut self) {
        self.config = self.fleet.clearcoat.config().parse().expect("TOML");
        let varnish = &self.fleet.varnish[0];
        let management: toml::Table = format!(
            "management_port = {}\nmanagement_secret_file = {:?}\n",
            varnish.management().port(),
            varnish.secret_file()
        )
        .parse()
        .expect("TOML");
        section(&mut self.config, "health").insert("varnish".into(), management.into());
    }

    /// Doctor, with these arguments beside those that it needs here.
    fn doctor(&self, arguments: &[&str]) -> Said {
        let file = self.fleet.folder.path().join("doctor.toml");
        std::fs::write(&file, self.config.to_string()).expect("a file");
        let admin = format!("http://{}", self.fleet.clearcoat.admin);
        let mut all = vec!["doctor", "--json", "--admin", &admin, "--config", file.to_str().expect("a path")];
        all.extend(arguments);
        let output = run(&all);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let report: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{output:?}"));
        let findings = report["findings"].as_array().expect("findings").clone();
        Said { status: output.status.code().expect("a status"), findings }
    }

    /// Waits until doctor finds no error and no warning.
    fn is_well(&self) {
        let mut last = Vec::new();
        let well = |last: &mut Vec<Value>| {
            let said = self.doctor(&["--strict"]);
            *last = said.bad();
            assert_eq!(said.status == 0, last.is_empty(), "{last:#?}");
            last.is_empty().then_some(())
        };
        eventually("doctor finds nothing", || {
            let found = well(&mut last);
            if found.is_none() {
                crate::support::say(&format!(
                    "doctor still finds {:?}",
                    last.iter().map(|one| one["name"].clone()).collect::<Vec<_>>()
                ));
            }
            found
        });
    }

    /// Waits until doctor finds this, and returns it.
    fn finds(&self, name: &str) -> Value {
        let found = || self.doctor(&[]).findings.into_iter().find(|finding| finding["name"] == name);
        let finding = eventually(&format!("doctor finds {name}"), found);
        for key in ["what", "why", "change"] {
            assert!(finding[key].as_str().is_some_and(|text| !text.is_empty()), "{finding:#?}");
        }
        finding
    }

    /// Makes a fault of the Varnish, and mends it with the command that doctor names.
    fn is_mended_by_command(&self, break_it: &[&str], name: &str) {
        let varnish = &self.fleet.varnish[0];
        varnish.adm(break_it);
        let finding = self.finds(name);
        assert_eq!(finding["id"], "varnish-1");
        let change = finding["change"].as_str().expect("text");
        let commands = change.split('`').skip(1).step_by(2).filter_map(|text| text.strip_prefix("varnishadm "));
        // A command that only shows something mends nothing.
        let command = commands.into_iter().find(|command| !command.contains(".show")).expect("a command");
        varnish.adm(&command.split(' ').collect::<Vec<_>>());
        self.is_well();
    }

    /// Makes a fault by another VCL, and mends it with that which was there before.
    fn is_mended_by_vcl(&self, name: &str, vcl: &str, says: &str) -> Value {
        let varnish = &self.fleet.varnish[0];
        assert_ne!(vcl, varnish.started_with(), "the VCL has not what the test changes in it");
        varnish.load(&name.replace('-', "_"), vcl);
        self.comes_up_again(name);
        let finding = self.finds(name);
        assert!(finding["change"].as_str().is_some_and(|change| change.contains(says)), "{finding:#?}");
        varnish.adm(&["vcl.use", "boot"]);
        self.comes_up_again(name);
        self.is_well();
        finding
    }

    /// Has the Varnish tried again where only a trial sees the fault: it is tried when it comes up.
    fn comes_up_again(&self, name: &str) {
        if name == "no-seals" {
            let is = |health: &'static str| {
                eventually(health, || (self.fleet.clearcoat.node("varnish-1")["health"] == health).then_some(()));
            };
            self.fleet.varnish[0].hang();
            is("down");
            self.fleet.varnish[0].resume();
            is("up");
        }
    }

    /// Makes a fault in doctor's configuration, and takes it back.
    fn is_mended_by_configuration(&mut self, name: &str, says: &str, change: impl FnOnce(&mut toml::Table)) {
        let before = self.config.clone();
        change(&mut self.config);
        let finding = self.finds(name);
        assert!(finding["change"].as_str().expect("text").contains(says), "{finding:#?}");
        self.config = before;
        self.is_well();
    }
}

impl Said {
    fn bad(&self) -> Vec<Value> {
        self.findings.iter().filter(|finding| finding["severity"] != "info").cloned().collect()
    }

    fn has(&self, name: &str) -> bool {
        self.findings.iter().any(|finding| finding["name"] == name)
    }
}

fn section<'t>(config: &'t mut toml::Table, name: &str) -> &'t mut toml::Table {
    config.entry(name).or_insert_with(|| toml::Table::new().into()).as_table_mut().expect("a table")
}

fn node(config: &mut toml::Table, at: usize) -> &mut toml::Table {
    config["node"].as_array_mut().expect("nodes")[at].as_table_mut().expect("a node")
}

#[test]
fn what_is_wrong_with_varnishd_is_mended_by_the_command_that_is_named() {
    let patient = Patient::small();
    patient.is_well();
    for (parameter, value, name) in [
        ("http_req_hdr_len", "4k", "header-limit"),
        ("timeout_idle", "3", "idle-timeout"),
        ("ban_lurker_sleep", "0", "ban-lurker-off"),
        ("http_resp_hdr_len", "8k", "response-header"),
        ("max_retries", "0", "no-retries"),
    ] {
        patient.is_mended_by_command(&["param.set", parameter, value], name);
    }
    patient.is_mended_by_command(&["stop"], "worker-stopped");
    // It dies before it can answer, which is what it is asked for.
    signal("-ABRT", &patient.fleet.varnish[0].worker());
    let finding = patient.finds("panicked");
    assert!(finding["change"].as_str().expect("text").contains("`varnishadm panic.clear`"), "{finding:#?}");
    patient.fleet.varnish[0].adm(&["panic.clear"]);
    patient.is_well();
    // It says whose VCL it is, and what it could not see of a list that was cut.
    patient.fleet.varnish[0].adm(&["param.set", "cli_limit", "128b"]);
    let said = patient.doctor(&[]);
    assert!(said.has("truncated") && said.has("vcl"), "{:#?}", said.findings);
    assert!(
        said.findings.iter().any(|finding| finding["what"].as_str().is_some_and(|what| what.contains("clearcoat's")))
    );
}

#[test]
fn what_is_wrong_with_a_vcl_is_mended_by_the_right_one() {
    let patient = Patient::small();
    patient.is_well();
    let ours = patient.fleet.varnish[0].started_with();
    let others = ours.replace("\"127.0.0.0\"/8;", "\"192.0.2.7\";");
    patient.is_mended_by_vcl("refuses", &others, "acl purge");
    let deaf = ours.replace("return (synth(400, std.ban_error()));", "return (synth(200, \"Purged\"));");
    patient.is_mended_by_vcl("malformed-accepted", &deaf, "clearcoat vcl");
    let skewed =
        ours.replace("sub vcl_synth {", "sub vcl_synth {\n set resp.http.Date = \"Sat, 01 Jan 2000 00:00:00 GMT\";");
    let finding = patient.is_mended_by_vcl("clock-differs", &skewed, "take out of its VCL what writes Date");
    assert!(finding["what"].as_str().expect("text").contains("behind its own clock"), "{finding:#?}");
    let sealless = ours.replace("sub vcl_deliver {", "sub vcl_deliver {\n unset resp.http.X-Clearcoat-Seal;");
    patient.is_mended_by_vcl("no-seals", &sealless, "keep X-Clearcoat-Seal");
}

#[test]
fn what_is_wrong_with_the_configuration_is_mended_by_the_right_line() {
    let mut patient = Patient::small();
    patient.is_well();
    patient.is_mended_by_configuration("not-listening", "start varnishd", |config| {
        node(config, 0).insert("address".into(), "127.0.0.1:9".into());
    });
    let other = patient.fleet.folder.path().join("other-secret");
    std::fs::write(&other, "of another varnishd\n").expect("a file");
    patient.is_mended_by_configuration("management-secret", "-S", |config| {
        node(config, 0).insert("management_secret_file".into(), other.to_str().expect("a path").into());
    });
    patient.is_mended_by_configuration("management-unreachable", "-T", |config| {
        node(config, 0).insert("management".into(), "127.0.0.1:9".into());
    });
    patient.is_mended_by_configuration("purge-allow-too-wide", "take \"0.0.0.0/0\" out", |config| {
        section(config, "purge").insert("allow".into(), vec!["0.0.0.0/0"].into());
    });
    patient.is_mended_by_configuration("journal-on-tmpfs", "a disk or a volume", |config| {
        section(config, "journal").insert("path".into(), "/dev/shm/clearcoat-doctor/journal".into());
    });
    // Who has no management port is told what was not looked at, and how to give it.
    section(&mut patient.config, "health").remove("varnish");
    let finding = patient.finds("management-not-configured");
    assert!(finding["severity"] == "info" && finding["what"].as_str().expect("text").contains("varnish-1"));
}

#[test]
fn a_delivery_that_fails_is_mended_by_the_one_that_is_named() {
    let mut patient = Patient::small();
    patient.is_well();
    let right = patient.fleet.clearcoat.config();
    let mut wrong: toml::Table = right.parse().expect("TOML");
    node(&mut wrong, 0).insert("delivery".into(), "xkey".into());
    patient.fleet.clearcoat.configure(&wrong.to_string());
    patient.fleet.clearcoat.reload();
    patient.read_configuration();
    let finding = patient.finds("trial-failed");
    assert!(
        finding["severity"] == "error" && finding["what"].as_str().expect("text").contains("\"magento\""),
        "{finding:#?}"
    );
    assert_eq!(patient.doctor(&[]).status, 1);
    patient.fleet.clearcoat.configure(&right);
    patient.fleet.clearcoat.reload();
    patient.read_configuration();
    patient.is_well();
}

#[test]
fn a_node_that_hangs_or_fails_is_found_soon_and_can_be_looked_at_alone() {
    let patient = Patient::small();
    patient.is_well();
    patient.fleet.varnish[0].hang();
    let began = Instant::now();
    let said = patient.doctor(&[]);
    assert!(said.has("silent") && said.status == 1, "{:#?}", said.findings);
    // Ten seconds are what one node may take, and what this machine may take beside it.
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let web = patient.doctor(&["--node", "web-1"]);
    assert!(web.status == 0 && !web.has("silent"), "{:#?}", web.findings);
    patient.fleet.varnish[0].resume();
    patient.is_well();

    patient.fleet.web[0].healthy.store(false, Ordering::SeqCst);
    let finding = patient.finds("fails");
    assert!(finding["role"] == "web" && finding["change"].as_str().expect("text").contains("Ask the node itself"));
    patient.fleet.web[0].healthy.store(true, Ordering::SeqCst);
    patient.is_well();
    let admin = format!("http://{}", patient.fleet.clearcoat.admin);
    let nobody = run(&["doctor", "--admin", &admin, "--node", "varnish-9"]);
    assert!(nobody.status.code() == Some(1) && String::from_utf8_lossy(&nobody.stderr).contains("no node varnish-9"));
}
