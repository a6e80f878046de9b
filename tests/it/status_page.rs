//! The status page in a real browser, what it shows of a fleet that is well, ill and large; and what is behind it: the stream
//! of events, and purges by an operator.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::browser::Page;
use crate::support::clearcoat::{Clearcoat, run};
use crate::support::client::{Answer, Connection, exchange, get, get_of};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::simulated::SimulatedFleet;

/// What a reader of the page needs to see: text that stands out from what is behind it (WCAG 2.2, 1.4.3), controls that
/// have names and targets that a finger hits, and headings in order. Returns what is at fault.
const CHECKS: &str = r#"(() => {
  const faults = [];
  const luminance = (c) => [0, 1, 2].map((i) => c[i] / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (text) => text.match(/[\d.]+/g).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0.99) return color;
    }
    return [255, 255, 255];
  };
  let checked = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("svg")) continue;
    const [front, back] = [luminance(parse(getComputedStyle(element).color)), luminance(behind(element))];
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    checked += 1;
    if (ratio < 4.5) faults.push(`contrast ${ratio.toFixed(2)}: ${element.className} ${element.textContent.slice(0, 30)}`);
    if (parseFloat(getComputedStyle(element).fontSize) < 12) faults.push(`small: ${element.textContent.slice(0, 30)}`);
  }
  if (checked < 20) faults.push(`only ${checked} texts`);
  for (const element of document.querySelectorAll("a, button, input, select, summary, svg[role=img]")) {
    if (!element.checkVisibility()) continue;
    const label = element.labels?.[0]?.textContent || element.getAttribute("aria-label") || element.textContent.trim();
    if (!label) faults.push(`no name: ${element.outerHTML.slice(0, 80)}`);
  }
  for (const name of document.querySelectorAll(".rows .name b")) {
    if (name.scrollWidth > name.clientWidth) faults.push(`cut: ${name.textContent}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size !== ids.length) faults.push("an id twice");
  for (const element of document.querySelectorAll("[aria-labelledby]")) {
    if (!document.getElementById(element.getAttribute("aria-labelledby"))) faults.push("a label that is not there");
  }
  if (document.querySelectorAll("h1:not([role])").length !== 1 || !document.documentElement.lang) faults.push("h1 or lang");
  if (document.documentElement.scrollWidth > innerWidth) faults.push(`${document.documentElement.scrollWidth} px wide`);
  return faults;
})()"#;

/// The checks, in light and dark, on a desk and on a telephone.
fn is_readable(page: &mut Page) {
    for (width, dark) in [(1320, false), (1250, true), (1180, false), (800, true), (390, false), (390, true)] {
        page.size(width, 900);
        page.dark(dark);
        assert_eq!(page.value(CHECKS), json!([]), "{width} px, dark: {dark}");
    }
    page.size(1320, 900);
    page.dark(false);
    assert_eq!(page.faults(), Vec::<String>::new());
}

/// A clearcoat alone, with more configuration.
fn clearcoat(folder: &tempfile::TempDir, more: &str) -> Clearcoat {
    let mut config = String::new();
    for section in ["edge", "origin", "purge"] {
        write!(config, "[{section}]\nlisten = [\"127.0.0.1:0\"]\n").unwrap();
    }
    if !more.contains("[admin]") {
        config += "[admin]\nlisten = [\"127.0.0.1:0\"]\n";
    }
    let journal = folder.path().join("journal");
    write!(config, "[journal]\nkind = \"disk\"\npath = \"{}\"\n{more}", journal.display()).unwrap();
    Clearcoat::start(folder.path(), &config)
}

#[test]
fn a_fleet_that_is_well_is_shown_with_its_traffic_hits_and_purges() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 2, ..Plan::default() });
    let mut page = Page::open(fleet.clearcoat.admin, "/");
    page.waits_for("#headline", "All is well: 2 Varnish and 2 web nodes serve.");
    assert_eq!(page.text("#link"), "live");
    for number in [1, 2, 3, 4, 5].iter().cycle().take(50) {
        fleet.get(&format!("/p/{number}"));
    }
    fleet.purge_tag("cat_p_1");
    let row = page.waits_for("#purges details", "all 2 after");
    assert!(row.contains("cat_p_1") && row.contains("127.0.0.1") && row.contains(" ban"), "{row}");
    // A minute is read every five seconds: 45 of 50 were in a cache.
    page.waits_for(".nodes[data-role=varnish] .rows", "90 %");
    assert_ne!(page.text("#now-requests"), "–");
    assert!(page.value("document.querySelector('#chart-hits path.first').getAttribute('d').length").as_u64() > Some(5));
    is_readable(&mut page);
    // What a node is, and what became of a purge where, by the keyboard alone.
    for (summary, facts) in [(".rows summary", "has every purge"), ("#purges summary", "for 1 purge")] {
        page.value(&format!("document.querySelector('{summary}').focus()"));
        page.press("Enter");
        let details = format!("{}[open]", summary.replace("summary", "details"));
        page.waits_for(&details, facts);
    }
    let sum = |result: &str| -> f64 {
        let series = |node: &&str| format!("clearcoat_cache_results_total{{node=\"{node}\",result=\"{result}\"}}");
        ["varnish-1", "varnish-2"].iter().map(|node| fleet.clearcoat.metric(&series(node))).sum()
    };
    assert_eq!(["hit", "miss", "pass"].map(sum), [45.0, 5.0, 0.0]);
}

#[test]
fn a_varnish_that_hangs_is_named_with_why_and_what_to_do() {
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, ..Plan::default() });
    let mut page = Page::open(fleet.clearcoat.admin, "/");
    page.waits_for("#headline", "All is well");
    fleet.varnish[1].hang();
    page.waits_for("#headline", "1 of 2 Varnish gets no traffic.");
    fleet.purge_tag("cat_p_1");
    let problem = page.waits_for("#problems", "1 purge behind");
    for part in ["varnish-2", "down", "for ", "no answer within", "hangs", &fleet.varnish[1].address.to_string()] {
        assert!(problem.contains(part), "{part}: {problem}");
    }
    page.waits_for("#purges details", "1 of 2; not yet varnish-2");
    is_readable(&mut page);
    // The same words on a terminal.
    let admin = format!("http://{}", fleet.clearcoat.admin);
    let table = String::from_utf8(run(&["status", "--admin", &admin]).stdout).unwrap();
    let row = table.lines().find(|line| line.contains("varnish-2")).unwrap();
    assert!(row.contains(" no ") && row.contains("no answer within 500ms; 1 purge behind"), "{table}");
    fleet.varnish[1].resume();
    page.waits_for("#headline", "All is well: 2 Varnish and 1 web node serve.");
    page.waits_for("#purges details", "all 2 after");
    assert_eq!(page.text("#problems"), "");
}

/// A VCL that carries out no purge by tags, though it answers health checks.
fn no_tags(vcl: &str, id: &str, _folder: &Path) -> String {
    let purges = "if (req.http.X-Magento-Tags-Pattern || req.http.X-Pool) {";
    assert!(vcl.contains(purges));
    if id == "varnish-1" {
        vcl.to_owned()
    } else {
        vcl.replace(purges, &format!("{purges} return (synth(503, \"no\"));"))
    }
}

#[test]
fn a_varnish_that_is_up_and_behind_says_what_it_lacks_and_why() {
    let config = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n[health.varnish]\ntrial = false\n";
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, config, vcl: no_tags, ..Plan::default() });
    let mut page = Page::open(fleet.clearcoat.admin, "/");
    page.waits_for("#headline", "All is well");
    fleet.purge_tag("cat_p_1");
    fleet.purge_tag("cat_p_2");
    page.waits_for("#headline", "1 of 2 Varnish gets no traffic.");
    let problem = page.waits_for("#problems li", "2 purges behind, the oldest for");
    assert!(problem.contains("varnish-2") && problem.contains("the node answered 503"), "{problem}");
    assert_eq!(page.text("#problems .badge"), "behind");
    assert_eq!(page.text(".nodes[data-role=varnish] .lacks"), "2");
    assert_eq!(fleet.clearcoat.node("varnish-2")["health"], "up");
    let row = page.waits_for("#purges details", "1 of 2; not yet varnish-2");
    assert!(row.contains("done, some out"), "{row}");
    is_readable(&mut page);
}

#[test]
fn with_every_node_down_or_without_an_address_the_page_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = String::new();
    for (role, id, address) in [
        ("varnish", "varnish-1", "127.0.0.1:1"),
        ("varnish", "varnish-2", "127.0.0.1:2"),
        ("web", "web-1", "127.0.0.1:3"),
        ("web", "web-2", "nowhere.invalid:80"),
    ] {
        write!(nodes, "[[node]]\nrole = \"{role}\"\nid = \"{id}\"\naddress = \"{address}\"\n").unwrap();
    }
    let health = "[health.web]\ninterval = \"1s\"\ntimeout = \"1s\"\npanic_threshold = 0\n";
    let clearcoat = clearcoat(&folder, &format!("{health}{nodes}"));
    let mut page = Page::open(clearcoat.admin, "/");
    page.waits_for("#headline", "No node gets traffic. The shop is down.");
    let problems = page.waits_for("#problems", "Nothing listens at 127.0.0.1:3: start its web server.");
    assert!(problems.contains("start varnishd") && problems.contains("Connection refused"), "{problems}");
    assert!(problems.contains("web-2") && problems.contains("its name does not resolve"), "{problems}");
    is_readable(&mut page);
    let admin = format!("http://{}", clearcoat.admin);
    let table = String::from_utf8(run(&["status", "--admin", &admin]).stdout).unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| line.contains(" no ")).collect();
    assert_eq!(rows.len(), 4, "{table}");
    // ROLE, ID, ADDRESS, HEALTH, TRAFFIC, INFLIGHT, LAG: and then the note.
    assert!(rows.iter().all(|row| row.split_whitespace().count() > 8), "{table}");
    assert!(table.contains("nowhere.invalid:80"), "{table}");
}

#[test]
fn two_hundred_nodes_fit_on_the_page_and_those_that_are_out_stand_first() {
    let simulated = SimulatedFleet::start(197, Duration::ZERO);
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = simulated.toml();
    for port in 1..=3 {
        write!(nodes, "[[node]]\nrole = \"varnish\"\nid = \"gone-{port}\"\naddress = \"127.0.0.1:{port}\"\n").unwrap();
    }
    let clearcoat = clearcoat(&folder, &nodes);
    let mut page = Page::open(clearcoat.admin, "/");
    page.waits_for("#count-varnish", "197 of 200 serve");
    page.waits_for("#headline", "3 of 200 Varnish get no traffic.");
    assert_eq!(page.count(".rows details"), 3);
    assert_eq!(page.count(".tile"), 197);
    is_readable(&mut page);
    page.value("document.querySelectorAll('.tile')[100].focus()");
    page.press("Enter");
    let facts = page.waits_for(".picked", "has every purge");
    assert!(facts.contains("simulated-") && facts.contains("127.0.0.1:"), "{facts}");
    // It is redrawn every second, and nothing of that takes the focus away.
    page.waits_for("#problems .since", "for 1");
    assert_eq!(page.value("document.activeElement.className"), "tile");
    let height = page.value("document.documentElement.scrollHeight").as_f64().unwrap();
    assert!(height < 2500.0, "{height}");
}

#[test]
fn an_operator_drains_and_resumes_from_the_page_after_a_confirmation() {
    let config = "[admin]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"tests/it/data/operator-token\"\n";
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, config, ..Plan::default() });
    let mut page = Page::open(fleet.clearcoat.admin, "/");
    page.waits_for("#headline", "All is well: 2 Varnish and 1 web node serve.");
    let open = |page: &mut Page, id: &str, button: &str| {
        page.value(&format!(
            "[...document.querySelectorAll('.rows details')].find((row) => row.dataset.key === '{id}').open = true"
        ));
        page.waits_for(&format!(".rows details[data-key='{id}'] .order"), button);
        page.value(&format!("document.querySelector(\".rows details[data-key='{id}'] .order button\").focus()"));
        page.press("Enter");
    };
    let give = |page: &mut Page, token: &str| {
        page.value(&format!("document.getElementById('order-token').value = '{token}'"));
        page.value("document.getElementById('order-token').focus()");
        page.press("Enter");
    };
    open(&mut page, "varnish-1", "Drain…");
    page.waits_for("#order-text", "gets no new requests");
    is_readable(&mut page);
    assert_eq!(fleet.clearcoat.node("varnish-1")["state"], "serving", "not before it is confirmed");
    give(&mut page, "wrong");
    page.waits_for("#order-result", "Not done: the token is missing or wrong");
    assert_eq!(page.faults().len(), 1, "the browser notes the 401");
    give(&mut page, "s3cret-of-the-tests");
    page.waits_for("#headline", "All is well: 1 Varnish and 1 web node serve, 1 drained.");
    page.waits_for("#problems", "drained by an operator since 2");
    assert_eq!(page.value("document.getElementById('order').open"), json!(false));
    is_readable(&mut page);
    // The last one only when the operator says so twice.
    open(&mut page, "varnish-2", "Drain…");
    give(&mut page, "s3cret-of-the-tests");
    page.waits_for("#order-result", "no other varnish node gets traffic");
    page.waits_for("#order-yes", "Drain all the same");
    assert_eq!(page.faults().len(), 1, "the browser notes the 409");
    page.value("document.getElementById('order-no').focus()");
    page.press("Enter");
    open(&mut page, "varnish-1", "Resume…");
    page.waits_for("#order-text", "its share of the traffic again");
    give(&mut page, "s3cret-of-the-tests");
    page.waits_for("#headline", "All is well: 2 Varnish and 1 web node serve.");
    is_readable(&mut page);
}

/// A clearcoat whose operators may purge, and its token.
fn with_token(folder: &tempfile::TempDir) -> Clearcoat {
    let token = folder.path().join("token");
    std::fs::write(&token, "s3cret\n").unwrap();
    clearcoat(folder, &format!("[admin]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"{}\"\n", token.display()))
}

fn head(clearcoat: &Clearcoat) -> u64 {
    clearcoat.fleet()["head"].as_u64().expect("a position")
}

fn post(clearcoat: &Clearcoat, fields: &str, body: &str) -> Answer {
    let (host, length) = (clearcoat.admin, body.len());
    let head = format!("POST /api/v1/purge HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n{fields}\r\n");
    exchange(clearcoat.admin, head + body).unwrap()
}

#[test]
fn an_operator_with_the_token_purges_from_the_page_after_a_confirmation() {
    let folder = tempfile::tempdir().unwrap();
    let clearcoat = with_token(&folder);
    clearcoat.opened();
    let mut page = Page::open(clearcoat.admin, "/");
    page.waits_for("#headline", "No node is known yet.");
    page.waits_for("#purge", "Token");
    let before = head(&clearcoat);
    let ask = |page: &mut Page, token: &str| {
        page.value("document.getElementById('purge-what').value = 'cat_p_1, cat_p_2'");
        page.value(&format!("document.getElementById('purge-token').value = '{token}'"));
        page.value("document.getElementById('purge-token').focus()");
        page.press("Enter");
        page.waits_for("#confirm-text", "Every page with cat_p_1 or cat_p_2 is dropped");
        assert_eq!(head(&clearcoat), before, "not before it is confirmed");
        page.value("document.getElementById('confirm-yes').focus()");
        page.press("Enter");
    };
    ask(&mut page, "wrong");
    page.waits_for("#purge-result", "Not purged: the token is missing or wrong");
    assert_eq!(page.faults().len(), 1, "the browser notes the 401");
    ask(&mut page, "s3cret");
    page.waits_for("#purge-result", &format!("Purged at position {}.", before + 1));
    let row = page.waits_for("#purges details", "cat_p_1");
    assert!(row.contains("no Varnish is there"), "{row}");
    is_readable(&mut page);
}

#[test]
fn a_strangers_name_that_leads_here_is_shown_nothing_and_purges_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "s3cret\n").unwrap();
    let admin =
        format!("listen = [\"127.0.0.1:0\"]\ntoken_file = \"{}\"\nhosts = [\"cc.shop.internal\"]", token.display());
    let clearcoat = clearcoat(&folder, &format!("[admin]\n{admin}\n"));
    clearcoat.opened();
    let ask = |start: &str, host: &str, more: &str| {
        exchange(clearcoat.admin, format!("{start} HTTP/1.1\r\nHost: {host}\r\n{more}")).unwrap()
    };
    let port = clearcoat.admin.port();
    for path in ["/", "/page.js", "/api/v1/fleet", "/api/v1/purges"] {
        for ours in ["127.0.0.1", "localhost", "clearcoat", "cc.shop.internal"] {
            assert_eq!(ask(&format!("GET {path}"), &format!("{ours}:{port}"), "\r\n").status, 200, "{path} of {ours}");
        }
        let refused = ask(&format!("GET {path}"), &format!("evil.test:{port}"), "\r\n");
        assert!(refused.status == 421 && refused.text().contains("admin.hosts"), "{refused:?}");
    }
    // Monitoring comes by whatever name it has.
    for path in ["/metrics", "/healthz", "/readyz", "/sd/prometheus?role=web&port=1"] {
        assert_eq!(ask(&format!("GET {path}"), "lb.example.com", "\r\n").status, 200, "{path}");
    }
    let body = r#"{"tags":["cat_p_1"]}"#;
    let fields = |host: &str| {
        format!(
            "Origin: http://{host}\r\nAuthorization: Bearer s3cret\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let before = head(&clearcoat);
    for _ in 0..30 {
        assert_eq!(ask("POST /api/v1/purge", "evil.test", &fields("evil.test")).status, 421);
    }
    assert_eq!(head(&clearcoat), before);
    let host = "cc.shop.internal";
    assert_eq!(ask("POST /api/v1/purge", host, &fields(host)).json()["position"], before + 1);
    clearcoat.log().waits_for("an operator's request was refused");
    let said = clearcoat.log().text().matches("an operator's request was refused").count();
    assert!(said < 30, "{said} lines of 30 refusals");
}

#[test]
fn a_purge_by_the_admin_listener_wants_the_token_from_its_own_page() {
    let folder = tempfile::tempdir().unwrap();
    let clearcoat = with_token(&folder);
    clearcoat.opened();
    let before = head(&clearcoat);
    let own = format!("Origin: http://{}\r\nSec-Fetch-Site: same-origin\r\n", clearcoat.admin);
    let json = "Content-Type: application/json\r\n";
    let token = "Authorization: Bearer s3cret\r\n";
    let body = r#"{"tags":["cat_p_1"]}"#;
    for (fields, status) in [
        (format!("{json}{own}"), 401),
        (format!("{json}{own}Authorization: Bearer wrong\r\n"), 401),
        (format!("{json}{token}Origin: http://shop.test\r\n"), 403),
        (format!("{json}{token}Sec-Fetch-Site: cross-site\r\n"), 403),
        (format!("{token}{own}Content-Type: text/plain\r\n"), 415),
    ] {
        let answer = post(&clearcoat, &fields, body);
        assert_eq!(answer.status, status, "{fields}: {answer:?}");
    }
    assert_eq!(post(&clearcoat, &format!("{json}{token}"), r#"{"tags":["a.*"]}"#).status, 400);
    assert_eq!(head(&clearcoat), before);
    assert_eq!(post(&clearcoat, &format!("{json}{token}{own}"), body).json()["position"], before + 1);
    let page = r#"{"url":"https://shop.test/a"}"#;
    assert_eq!(post(&clearcoat, &format!("{json}{token}{own}"), page).json()["position"], before + 2);
    let newest = get(clearcoat.admin, "/api/v1/purges").unwrap().json()["newest"].take();
    assert_eq!(newest[0]["sample"], json!(["PURGE shop.test/a"]));

    // Off by default, whatever is presented.
    let folder = tempfile::tempdir().unwrap();
    let without = self::clearcoat(&folder, "");
    let answer = post(&without, &format!("{json}{token}"), body);
    assert!(answer.status == 403 && answer.text().contains("admin.token_file"), "{answer:?}");
}

/// A connection on which events come, and the head of its answer.
fn listen(clearcoat: &Clearcoat) -> (Connection, Answer) {
    let mut connection = Connection::open(clearcoat.admin).unwrap();
    connection.send("GET /api/v1/events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let head = connection.head().unwrap();
    (connection, head)
}

#[test]
fn the_stream_of_events_begins_with_all_that_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let mut clearcoat = clearcoat(&folder, "");
    clearcoat.opened();
    let (mut connection, head) = listen(&clearcoat);
    assert_eq!((head.status, head.header("Content-Type")), (200, Some("text/event-stream")));
    let mut text = String::new();
    while !text.contains("event: purges") {
        text += &String::from_utf8(connection.some()).unwrap();
    }
    for name in ["hello", "history", "fleet"] {
        let event = text.split_once(&format!("event: {name}\ndata: ")).and_then(|(_, rest)| rest.lines().next());
        let data: Value = serde_json::from_str(event.unwrap_or_else(|| panic!("no {name}: {text}"))).unwrap();
        assert!(data.is_object() || data.is_array(), "{data}");
    }
    // An open page keeps no process from ending.
    clearcoat.terminate();
    assert_eq!(clearcoat.wait().code(), Some(0));
    while !connection.some().is_empty() {}
}

#[test]
fn so_many_listen_and_no_more_and_who_reads_nothing_delays_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let clearcoat = clearcoat(&folder, "");
    clearcoat.opened();
    // They read no more than the head.
    let mut listeners: Vec<_> = (0..32).map(|_| listen(&clearcoat)).collect();
    assert!(listeners.iter().all(|(_, head)| head.status == 200));
    assert_eq!(listen(&clearcoat).1.status, 503);
    assert_eq!(get(clearcoat.admin, "/readyz").unwrap().text(), "ready\n");
    listeners.pop();
    eventually("one that left makes room", || (listen(&clearcoat).1.status == 200).then_some(()));
}

#[test]
fn the_page_loads_nothing_from_anywhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let clearcoat = clearcoat(&folder, "");
    for (path, kind) in [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")] {
        let answer = get_of(clearcoat.admin, "localhost", path).unwrap();
        assert!(answer.header("Content-Type").is_some_and(|found| found.starts_with(kind)), "{answer:?}");
        let policy = answer.header("Content-Security-Policy").unwrap();
        assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"), "{policy}");
        let text =
            answer.text().replace("http://www.w3.org/2000/svg", "").replace("https://shop.example/sale.html", "");
        assert!(!text.contains("://") && !text.contains("innerHTML"), "{path}");
    }
}
