//! VCL pushed to real varnishd over their management ports.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::Value;

use crate::support::clearcoat::{Clearcoat, run};
use crate::support::client::{exchange, get};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::say;
use crate::support::varnish::Varnish;
use crate::support::web::{Shop, Web};

/// Without seals, which go with origins alone; checks of web nodes are quick, as Varnish's are the same.
const WITHOUT_SEALS: &str = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n\
                             [admin]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"tests/it/data/operator-token\"\n\
                             [health.web]\ninterval = \"200ms\"\ntimeout = \"200ms\"\nhost = \"shop.test\"\n";

const WEB: &str = "mode = \"push\"\nbackends = \"web\"\nallow = [\"127.0.0.0/8\"]\n";
const ORIGIN: &str = "mode = \"push\"\nallow = [\"127.0.0.0/8\"]\n";

/// The configuration of a clearcoat, with this `[vcl]` and with what it has to know to manage these.
fn pushing(clearcoat: &Clearcoat, varnish: &[Varnish], vcl: &str) -> toml::Table {
    let mut config: toml::Table = clearcoat.config().parse().expect("TOML");
    config.insert("vcl".into(), toml::Value::Table(vcl.parse().expect("TOML")));
    let nodes = config["node"].as_array_mut().expect("nodes");
    for varnish in varnish {
        let node = nodes.iter_mut().find(|node| node["id"].as_str() == Some(&varnish.id)).expect("its table");
        let table = node.as_table_mut().expect("a table");
        table.insert("management".into(), varnish.management().to_string().into());
        table.insert("management_secret_file".into(), varnish.secret_file().to_str().expect("a path").into());
    }
    config
}

/// Has a clearcoat push this `[vcl]` from now on.
fn push(clearcoat: &Clearcoat, varnish: &[Varnish], vcl: &str) {
    clearcoat.configure(&pushing(clearcoat, varnish, vcl).to_string());
    clearcoat.reload();
}

fn vcl_of(clearcoat: &Clearcoat, id: &str) -> Value {
    clearcoat.node(id)["vcl"].clone()
}

/// Waits until this Varnish uses what it should, and returns the name.
fn in_place(clearcoat: &Clearcoat, id: &str) -> String {
    eventually(&format!("{id} uses its VCL"), || {
        let vcl = vcl_of(clearcoat, id);
        (vcl["state"] == "in-place" && vcl["wanted"] == vcl["in_use"])
            .then(|| vcl["in_use"].as_str().map(str::to_owned))
    })
    .expect("a name")
}

/// The VCLs of a varnishd: the first word, the temperature and the name of each.
fn loaded(varnish: &Varnish) -> Vec<[String; 3]> {
    let text = varnish.adm(&["vcl.list"]);
    let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).filter(|words| words.len() > 4);
    lines.map(|words| [words[0], words[2], words[4]].map(str::to_owned)).collect()
}

fn active(varnish: &Varnish) -> String {
    loaded(varnish).into_iter().find(|[status, ..]| status == "active").expect("one is in use")[2].clone()
}

/// Those of clearcoat that are not on their way out.
fn ours(varnish: &Varnish) -> usize {
    let is_ours = |vcl: &&[String; 3]| vcl[0] != "discarded" && vcl[2].starts_with("clearcoat-");
    loaded(varnish).iter().filter(is_ours).count()
}

fn pushes(clearcoat: &Clearcoat, id: &str, result: &str) -> f64 {
    clearcoat.metric(&format!("clearcoat_vcl_pushes_total{{node=\"{id}\",result=\"{result}\"}}"))
}

/// Gives a web node this weight, or drains it.
fn order(clearcoat: &Clearcoat, id: &str, body: &str) {
    let head = format!(
        "POST /api/v1/nodes/web/{id} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer s3cret-of-the-tests\r\nContent-Type: \
         application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let answer = exchange(clearcoat.admin, head + body).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// Reads pages that no cache has from a Varnish, until it is stopped: not through the edge, which would ask another node.
struct Misses {
    stop: Arc<AtomicBool>,
    good: Arc<AtomicU64>,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl Misses {
    fn start(varnish: SocketAddr) -> Self {
        let (stop, good) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&good));
        let thread = std::thread::spawn(move || {
            let mut bad = Vec::new();
            for page in 1_000_000.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                match get(varnish, &format!("/p/{page}")) {
                    Ok(answer) if answer.status == 200 => _ = counted.fetch_add(1, Ordering::SeqCst),
                    other => bad.push(format!("{other:?}")),
                }
            }
            bad
        });
        Misses { stop, good, thread: Some(thread) }
    }

    fn count(&self) -> u64 {
        self.good.load(Ordering::SeqCst)
    }

    /// Fails the test if an answer was bad.
    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        let bad = self.thread.take().expect("a reader").join().expect("a reader");
        assert!(
            bad.is_empty(),
            "{} bad answers and {} good ones: {:#?}",
            bad.len(),
            self.count(),
            &bad[..bad.len().min(3)]
        );
        self.count()
    }
}

impl Drop for Misses {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().map(JoinHandle::join);
    }
}

#[test]
fn each_varnish_uses_the_vcl_of_the_fleet_and_keeps_cache_and_seals() {
    let mut fleet = Fleet::start(&Plan { varnish: 2, web: 1, first_start: "flush", ..Plan::default() });
    fleet.seals();
    fleet.warm("/p/1");
    push(&fleet.clearcoat, &fleet.varnish, ORIGIN);
    for varnish in &fleet.varnish {
        let name = in_place(&fleet.clearcoat, &varnish.id);
        assert_eq!(active(varnish), name);
        assert_eq!(pushes(&fleet.clearcoat, &varnish.id, "compiled"), 1.0);
    }
    assert_eq!(fleet.cached("/p/1"), ["HIT", "HIT"]);
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    assert_eq!(fleet.get("/p/2").status, 200);
    fleet.seals();
    // A restart of clearcoat finds it there.
    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    for varnish in &fleet.varnish {
        in_place(&fleet.clearcoat, &varnish.id);
        assert_eq!(pushes(&fleet.clearcoat, &varnish.id, "compiled"), 0.0);
        assert_eq!(ours(varnish), 1);
    }
}

#[test]
fn a_second_clearcoat_finds_what_the_first_has_pushed() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, replicas: 2, ..Plan::default() });
    let origins: Vec<String> = fleet.clearcoats().map(|clearcoat| clearcoat.origin.to_string()).collect();
    let vcl = format!("{ORIGIN}origins = {origins:?}\n");
    let config =
        |clearcoat: &Clearcoat, vcl: &str| clearcoat.configure(&pushing(clearcoat, &fleet.varnish, vcl).to_string());
    fleet.clearcoats().for_each(|clearcoat| config(clearcoat, &vcl));
    fleet.clearcoats().for_each(Clearcoat::reload);
    for varnish in &fleet.varnish {
        let names: BTreeSet<String> = fleet.clearcoats().map(|clearcoat| in_place(clearcoat, &varnish.id)).collect();
        assert_eq!(names, [active(varnish)].into());
        let replaced: f64 = fleet.clearcoats().map(|clearcoat| clearcoat.sum("clearcoat_vcl_drifts_total")).sum();
        assert_eq!(replaced, 0.0, "nobody has replaced what the other has pushed");
        assert_eq!(ours(varnish), 1);
        assert_eq!(varnish.origins_up(), 2);
    }
    // They are told at different times that the fleet is another one: the first of them decides.
    let turned = format!("{ORIGIN}origins = {:?}\n", &origins[..1]);
    config(&fleet.others[0], &turned);
    fleet.others[0].reload();
    eventually("the second one knows another VCL", || {
        let vcl = vcl_of(&fleet.others[0], "varnish-1");
        (vcl["wanted"] != vcl_of(&fleet.clearcoat, "varnish-1")["wanted"]).then_some(())
    });
    config(&fleet.clearcoat, &turned);
    fleet.clearcoat.reload();
    for varnish in &fleet.varnish {
        eventually("both find the one with a single origin in use", || {
            let vcls: Vec<Value> = fleet.clearcoats().map(|clearcoat| vcl_of(clearcoat, &varnish.id)).collect();
            let is_there = |vcl: &Value| vcl["state"] == "in-place" && vcl["wanted"] == active(varnish).as_str();
            (vcls.iter().all(is_there) && !active_vcl(varnish).contains("origin_2")).then_some(())
        });
    }
}

#[test]
fn of_two_that_are_configured_differently_the_first_has_its_way() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, replicas: 2, ..Plan::default() });
    let (varnish, second) = (&fleet.varnish[0], &fleet.others[0]);
    let origins: Vec<String> = fleet.clearcoats().map(|clearcoat| clearcoat.origin.to_string()).collect();
    push(&fleet.clearcoat, &fleet.varnish, &format!("{ORIGIN}origins = {origins:?}\n"));
    let name = in_place(&fleet.clearcoat, &varnish.id);
    push(second, &fleet.varnish, &format!("{ORIGIN}origins = {:?}\n", &origins[..1]));
    // What it finds there is another clearcoat's, which is the first: it waits for a minute.
    let vcl = eventually("the second one sees it", || {
        Some(vcl_of(second, &varnish.id)).filter(|vcl| vcl["wanted"].is_string())
    });
    assert_eq!((vcl["state"].as_str(), vcl["in_use"].as_str()), (Some("pending"), Some(name.as_str())));
    assert_eq!(vcl["problem"], format!("another VCL is in use, {name}"));
    // A change of its own is pushed, and taken back.
    push(second, &fleet.varnish, &format!("{ORIGIN}origins = {:?}\n", &origins[1..]));
    eventually("the second one has pushed its change", || (active(varnish) != name).then_some(()));
    eventually("the first has put its own back", || (active(varnish) == name).then_some(()));
    in_place(&fleet.clearcoat, &varnish.id);
    assert_eq!(fleet.clearcoat.metric("clearcoat_vcl_drifts_total{node=\"varnish-1\"}"), 1.0);
}

#[test]
fn a_varnish_is_let_go_when_nothing_is_pushed_any_more() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, ..Plan::default() });
    let bad = fleet.folder.path().join("bad.vcl");
    std::fs::write(&bad, "vcl 4.1;\n# clearcoat: backends\n# clearcoat: end\nwrong\n").expect("a file");
    push(&fleet.clearcoat, &fleet.varnish, &format!("{ORIGIN}template = {bad:?}\n"));
    eventually("it is refused", || (vcl_of(&fleet.clearcoat, "varnish-1")["state"] == "refused").then_some(()));
    push(&fleet.clearcoat, &fleet.varnish, "mode = \"off\"\n");
    eventually("nothing is said of it", || vcl_of(&fleet.clearcoat, "varnish-1").is_null().then_some(()));
    assert_eq!(fleet.clearcoat.metric("clearcoat_vcl_outdated{node=\"varnish-1\"}"), 0.0);
    push(&fleet.clearcoat, &fleet.varnish, ORIGIN);
    in_place(&fleet.clearcoat, "varnish-1");
}

#[test]
fn a_web_node_that_is_added_serves_and_a_drained_one_gets_nothing() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config: WITHOUT_SEALS, ..Plan::default() });
    let varnish = &fleet.varnish[0];
    push(&fleet.clearcoat, &fleet.varnish, WEB);
    in_place(&fleet.clearcoat, &varnish.id);
    assert!(varnish.adm(&["backend.list"]).contains(".web_web-1 "), "{}", varnish.adm(&["backend.list"]));
    // Pages of another shop show who has rendered them.
    let other = Arc::new(Shop::default());
    let added = Web::start(&other);
    let mut config = pushing(&fleet.clearcoat, &fleet.varnish, WEB);
    let table = format!("role = \"web\"\nid = \"web.2\"\naddress = \"{}\"\n", added.address);
    config["node"].as_array_mut().expect("nodes").push(toml::Value::Table(table.parse().expect("TOML")));
    let misses = Misses::start(varnish.address);
    fleet.clearcoat.configure(&config.to_string());
    let began = Instant::now();
    fleet.clearcoat.reload();
    eventually("the new node serves", || (other.renders.load(Ordering::SeqCst) > 0).then_some(()));
    say(&format!("a new web node serves through Varnish after {} ms", began.elapsed().as_millis()));
    order(&fleet.clearcoat, "web-1", r#"{"state":"drain"}"#);
    eventually("the drained one is not in the VCL", || (!active_vcl(varnish).contains("web_web-1")).then_some(()));
    in_place(&fleet.clearcoat, &varnish.id);
    let (before, good) = (fleet.shop.renders.load(Ordering::SeqCst), misses.count());
    eventually("pages are read", || (misses.count() > good + 20).then_some(()));
    assert!(fleet.shop.renders.load(Ordering::SeqCst) <= before + 1, "a request was under way at most");
    misses.stop();
    order(&fleet.clearcoat, "web-1", r#"{"state":"ready","weight":7}"#);
    eventually("it is back with its weight", || {
        active_vcl(varnish).contains("webs.add_backend(web_web-1, 7);").then_some(())
    });
}

#[test]
fn each_director_and_the_form_of_delivery_is_taken_by_varnishd() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 2, config: WITHOUT_SEALS, ..Plan::default() });
    let varnish = &fleet.varnish[0];
    for (director, delivery) in [("random", "xkey"), ("round_robin", "magento"), ("shard", "magento-plain")] {
        let mut config = pushing(&fleet.clearcoat, &fleet.varnish, &format!("{WEB}director = \"{director}\"\n"));
        let node = config["node"]
            .as_array_mut()
            .expect("nodes")
            .iter_mut()
            .find(|node| node["role"].as_str() == Some("varnish"));
        node.and_then(toml::Value::as_table_mut).expect("a table").insert("delivery".into(), delivery.into());
        fleet.clearcoat.configure(&config.to_string());
        fleet.clearcoat.reload();
        eventually(director, || active_vcl(varnish).contains(&format!("directors.{director}()")).then_some(()));
        in_place(&fleet.clearcoat, &varnish.id);
        assert_eq!(active_vcl(varnish).contains("import xkey;"), delivery == "xkey");
        assert_eq!(varnish.get(&format!("/p/{}", fastrand::u32(1..))).status, 200);
    }
}

fn active_vcl(varnish: &Varnish) -> String {
    varnish.adm(&["vcl.show", &active(varnish)])
}

#[test]
fn five_hundred_changes_fail_no_request_and_leave_three_vcls_at_most() {
    const CHANGES: usize = 500;
    let fleet = Fleet::start(&Plan { varnish: 1, web: 2, config: WITHOUT_SEALS, ..Plan::default() });
    let varnish = &fleet.varnish[0];
    push(&fleet.clearcoat, &fleet.varnish, WEB);
    in_place(&fleet.clearcoat, &varnish.id);
    let misses = Misses::start(varnish.address);
    let mut most = 0;
    for change in 1..=CHANGES {
        // Each is another VCL: weights, and now and then a node that leaves.
        match change % 10 {
            0 => order(&fleet.clearcoat, "web-2", r#"{"state":"drain"}"#),
            1 => order(&fleet.clearcoat, "web-2", r#"{"state":"ready"}"#),
            _ => order(&fleet.clearcoat, "web-1", &format!("{{\"weight\":{change}}}")),
        }
        if change % 5 == 0 {
            most = most.max(ours(varnish));
        }
    }
    order(&fleet.clearcoat, "web-2", r#"{"state":"ready"}"#);
    eventually("the last change is in use", || {
        most = most.max(ours(varnish));
        let vcl = active_vcl(varnish);
        (vcl.contains("add_backend(web_web-1, 499)") && vcl.contains("add_backend(web_web-2, 1)")).then_some(())
    });
    in_place(&fleet.clearcoat, &varnish.id);
    let reads = misses.stop();
    let compiled = pushes(&fleet.clearcoat, &varnish.id, "compiled");
    say(&format!("{CHANGES} changes, {reads} reads, {compiled} pushes, {most} VCLs at most"));
    assert!(reads > 50 && (2.0..=CHANGES as f64 / 4.0).contains(&compiled), "{reads} reads, {compiled} pushes");
    assert!(most <= 3, "{most} VCLs of ours were loaded");
    for result in ["refused", "failed"] {
        assert_eq!(pushes(&fleet.clearcoat, &varnish.id, result), 0.0, "{result}");
    }
    eventually("the one in use is warm, and the one before is not", || {
        let of_ours: Vec<_> = loaded(varnish).into_iter().filter(|vcl| vcl[2].starts_with("clearcoat-")).collect();
        let warm = of_ours.iter().filter(|vcl| vcl[0] != "discarded" && vcl[1] == "warm").count();
        (warm == 1).then_some(())
    });
}

#[test]
fn a_template_that_does_not_compile_leaves_the_traffic_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("shop.vcl");
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, ..Plan::default() });
    let varnish = &fleet.varnish[0];
    let write = |more: &str| {
        let new = file.with_extension("new");
        std::fs::write(&new, template(&varnish.started_with(), more)).expect("a file");
        std::fs::rename(&new, &file).expect("a file");
    };
    write("");
    compiles_without_clearcoat(&file);
    push(&fleet.clearcoat, &fleet.varnish, &format!("{ORIGIN}template = {file:?}\n"));
    let good = in_place(&fleet.clearcoat, &varnish.id);
    assert!(active_vcl(varnish).contains("backend origin_1 {"), "{}", active_vcl(varnish));
    let misses = Misses::start(varnish.address);

    write("sub vcl_recv { set req.http.X = no_such_thing; }");
    let refused = eventually("it is refused", || {
        Some(vcl_of(&fleet.clearcoat, &varnish.id)).filter(|vcl| vcl["state"] == "refused")
    });
    let problem = refused["problem"].as_str().expect("words");
    assert!(problem.contains("no_such_thing"), "{problem}");
    assert_eq!((active(varnish).as_str(), &refused["in_use"]), (good.as_str(), &good.as_str().into()));
    let status = run(&["status", "--admin", &format!("http://{}", fleet.clearcoat.admin)]);
    assert!(String::from_utf8_lossy(&status.stdout).contains("no_such_thing"), "{status:?}");
    assert!(fleet.clearcoat.log().text().contains("no_such_thing"));
    assert_eq!(fleet.clearcoat.metric("clearcoat_vcl_outdated{node=\"varnish-1\"}"), 1.0);
    // By itself, after a pause: what was missing there may be there now.
    eventually("it is tried again", || (pushes(&fleet.clearcoat, &varnish.id, "refused") >= 2.0).then_some(()));

    // What is no template is not pushed at all.
    std::fs::write(&file, "vcl 4.1;\n").expect("a file");
    let problem = eventually("it is named", || {
        let problems = fleet.clearcoat.fleet()["problems"].clone();
        problems.as_array()?.iter().find(|one| one["alert"] == "ClearcoatVclOutdated").cloned()
    });
    assert!(problem["why"].as_str().expect("words").contains("# clearcoat: backends"), "{problem}");
    assert_eq!(active(varnish), good);

    write("sub vcl_deliver { set resp.http.X-Mended = \"yes\"; }");
    eventually("the new one is in use", || active_vcl(varnish).contains("X-Mended").then_some(()));
    in_place(&fleet.clearcoat, &varnish.id);
    assert_eq!(get(fleet.clearcoat.edge, "/p/1").expect("an answer").header("X-Mended"), Some("yes"));
    misses.stop();
}

/// A VCL of a shop: ours, with blocks.
fn template(vcl: &str, more: &str) -> String {
    let (before, rest) = vcl.split_once("backend origin {").expect("a backend");
    let (backend, after) = rest.split_once("\n}\n").expect("its end");
    let (head, entries) = after.split_once("acl purge {\n").expect("a list");
    let (entries, tail) = entries.split_once("}\n").expect("its end");
    format!(
        "{before}# clearcoat: backends\nbackend origin {{{backend}\n}}\n# clearcoat: end\n{head}acl purge {{\n    # clearcoat: \
         allow\n{entries}    # clearcoat: end\n}}\n{tail}\n{more}\n"
    )
}

fn compiles_without_clearcoat(file: &Path) {
    let folder = tempfile::tempdir().expect("a folder");
    let output =
        Command::new("varnishd").args(["-C", "-j", "none", "-n"]).arg(folder.path()).arg("-f").arg(file).output();
    let output = output.expect("varnishd");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_varnishd_that_is_restarted_has_its_vcl_again_at_once() {
    let mut fleet = Fleet::start(&Plan { varnish: 1, web: 1, ..Plan::default() });
    push(&fleet.clearcoat, &fleet.varnish, ORIGIN);
    let name = in_place(&fleet.clearcoat, "varnish-1");
    fleet.varnish[0].kill();
    eventually("its end is noticed", || {
        (vcl_of(&fleet.clearcoat, "varnish-1")["state"] == "unreachable").then_some(())
    });
    fleet.varnish[0].restart();
    let began = Instant::now();
    eventually("its VCL is back", || (active(&fleet.varnish[0]) == name).then_some(()));
    say(&format!("the VCL was back {} ms after varnishd served", began.elapsed().as_millis()));
    assert_eq!(in_place(&fleet.clearcoat, "varnish-1"), name);
    assert_eq!(pushes(&fleet.clearcoat, "varnish-1", "compiled"), 2.0);
    // A worker that dies alone is started by its manager with what was in use.
    let worker = fleet.varnish[0].worker();
    crate::support::varnish::signal("-KILL", &worker);
    eventually("another worker runs", || {
        (fleet.varnish[0].worker() != worker && !fleet.varnish[0].worker().is_empty()).then_some(())
    });
    eventually("it uses the same VCL", || (active(&fleet.varnish[0]) == name).then_some(()));
    in_place(&fleet.clearcoat, "varnish-1");
}

#[test]
fn what_somebody_has_put_in_use_is_put_back_and_what_has_a_label_stays() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config: WITHOUT_SEALS, ..Plan::default() });
    let varnish = &fleet.varnish[0];
    push(&fleet.clearcoat, &fleet.varnish, WEB);
    let name = in_place(&fleet.clearcoat, &varnish.id);
    varnish.adm(&["vcl.label", "kept", &name]);
    varnish.adm(&["vcl.use", "boot"]);
    let pending = eventually("it is noticed", || {
        Some(vcl_of(&fleet.clearcoat, &varnish.id)).filter(|vcl| vcl["state"] == "pending" && vcl["in_use"] == "boot")
    });
    assert_eq!(pending["problem"], "another VCL is in use, boot");
    eventually("it is put back", || (active(varnish) == name).then_some(()));
    in_place(&fleet.clearcoat, &varnish.id);
    assert_eq!(fleet.clearcoat.metric("clearcoat_vcl_drifts_total{node=\"varnish-1\"}"), 1.0);
    assert_eq!(pushes(&fleet.clearcoat, &varnish.id, "reused"), 1.0);
    // Three more contents: the one with the label would be gone.
    for weight in [2, 3, 4] {
        order(&fleet.clearcoat, "web-1", &format!("{{\"weight\":{weight}}}"));
        eventually("it is in use", || active_vcl(varnish).contains(&format!("web_web-1, {weight})")).then_some(()));
    }
    in_place(&fleet.clearcoat, &varnish.id);
    assert!(loaded(varnish).iter().any(|vcl| vcl[2] == name), "{:?}", loaded(varnish));
}

#[test]
fn a_varnish_that_finds_no_web_node_well_keeps_the_vcl_that_it_has() {
    // clearcoat takes either status, Varnish's probe the first alone.
    const CONFIG: &str = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n[health.web]\nexpect = [418, 200]\n";
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, config: CONFIG, ..Plan::default() });
    push(&fleet.clearcoat, &fleet.varnish, WEB);
    eventually("it is not used", || (vcl_of(&fleet.clearcoat, "varnish-1")["state"] == "unwell").then_some(()));
    assert_eq!(active(&fleet.varnish[0]), "boot");
    assert_eq!(fleet.get("/p/1").status, 200);
}

#[test]
fn who_cannot_be_managed_is_named_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "another one\n").expect("a file");
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, ..Plan::default() });
    let mut config = pushing(&fleet.clearcoat, &fleet.varnish[..1], ORIGIN);
    let nodes = config["node"].as_array_mut().expect("nodes");
    let node = nodes.iter_mut().find(|node| node["id"].as_str() == Some("varnish-1")).expect("its table");
    node.as_table_mut()
        .expect("a table")
        .insert("management_secret_file".into(), secret.to_str().expect("a path").into());
    fleet.clearcoat.configure(&config.to_string());
    fleet.clearcoat.reload();
    for (id, state, says) in [
        ("varnish-1", "unreachable", "it has another secret"),
        ("varnish-2", "not-managed", "nothing says where it is managed"),
    ] {
        let vcl = eventually(&format!("{id} is {state}"), || {
            Some(vcl_of(&fleet.clearcoat, id)).filter(|vcl| vcl["state"] == state)
        });
        assert!(vcl["problem"].as_str().expect("words").contains(says), "{vcl}");
    }
    // A secret that is put right is taken by itself.
    std::fs::copy(fleet.varnish[0].secret_file(), &secret).expect("a file");
    in_place(&fleet.clearcoat, "varnish-1");
}
