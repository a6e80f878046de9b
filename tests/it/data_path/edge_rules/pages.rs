//! Pages of the shop for answers that clearcoat makes, and the shop that is closed.

use std::path::Path;

use super::{BALANCER, STRANGER, TRUSTED, ask, refused as counted, reloaded, served, table, with};
use crate::data_path::rig::{Rig, get_request};
use crate::data_path::tls::Secure;
use crate::support::client::{Connection, exchange, get, purge, tag};
use crate::support::eventually;
use crate::support::http2::{Http2, request};
use crate::support::upstream::Upstream;

fn page(folder: &Path, name: &str, text: &str) -> String {
    let file = folder.join(name);
    std::fs::write(&file, text).expect("a file");
    file.display().to_string()
}

#[test]
fn errors_of_our_own_have_the_pages_of_the_shop() {
    let folder = tempfile::tempdir().expect("a folder");
    let (down, gone) = (page(folder.path(), "503.html", "<p>sorry</p>"), page(folder.path(), "404.json", "{}"));
    let edge = format!("{TRUSTED}\nerror_pages = {{ 503 = {down:?}, 404 = {gone:?} }}");
    // Nobody is there.
    let secure = Secure::start(&edge, "", Vec::new());
    let clearcoat = &secure.rig.clearcoat;
    for listener in [clearcoat.edge, clearcoat.origin] {
        let answer = get(listener, "/").expect("an answer");
        assert_eq!((answer.status, answer.text()), (503, "<p>sorry</p>"));
        assert_eq!(answer.header("Content-Type"), Some("text/html; charset=utf-8"));
        assert_eq!((answer.header("Retry-After"), answer.header("Cache-Control")), (Some("1"), Some("no-store")));
    }
    let head = ask(clearcoat.edge, STRANGER, "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!((head.status, head.header("Content-Length"), head.body.len()), (503, Some("12"), 0));
    // What has no page has its line of text.
    assert_eq!(exchange(clearcoat.edge, "PURGE / HTTP/1.1\r\nHost: a\r\n\r\n").expect("an answer").status, 405);
    let trial = get(clearcoat.edge, "/.clearcoat/trial/x").expect("an answer");
    assert_eq!((trial.status, trial.header("Content-Type")), (404, Some("application/json")));

    let http2 = Http2::open(secure.address());
    let answer = http2.get("/").expect("an answer");
    assert_eq!((answer.status, answer.text(), answer.header("retry-after")), (503, "<p>sorry</p>", Some("1")));
    let head = http2.exchange(request("HEAD", "/").body(()).expect("a request"), b"").expect("an answer");
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (503, Some("12"), 0));
}

#[test]
fn a_page_is_read_again_with_a_reload_and_a_bad_one_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = page(folder.path(), "503.txt", "one");
    let edge = format!("[edge]\nlisten = [\"127.0.0.1:0\"]\n{TRUSTED}\nerror_pages = {{ 503 = {file:?} }}");
    let rig = Rig::start(&edge, Vec::new(), Vec::new());
    let shown = || get(rig.clearcoat.edge, "/").expect("an answer").text().to_owned();
    assert_eq!(shown(), "one");
    page(folder.path(), "503.txt", &"x".repeat(70_000));
    rig.clearcoat.reload();
    let refused = || rig.counter("clearcoat_reloads_total{result=\"refused\"}");
    eventually("it is refused", || (refused() >= 1.0).then_some(()));
    rig.clearcoat.log().waits_for("edge.error_pages.503");
    assert_eq!(shown(), "one");
    page(folder.path(), "503.txt", "two");
    rig.clearcoat.reload();
    eventually("the new page is shown", || (shown() == "two").then_some(()));
}

#[test]
fn a_shop_that_is_closed_serves_a_few_and_purges_go_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = page(folder.path(), "closed.html", "<p>closed</p>");
    let secure = Secure::start(TRUSTED, "", vec![Upstream::echo()]);
    let (rig, plain) = (&secure.rig, secure.rig.clearcoat.edge);
    let mut kept = Connection::open(plain).expect("the edge accepts");
    let http2 = Http2::open(secure.address());
    let mut answer = || {
        kept.send(get_request("/kept")).expect("clearcoat reads");
        kept.answer(false).expect("an answer")
    };
    assert_eq!((answer().status, http2.get("/").expect("an answer").status), (200, 200));
    assert_eq!(get(rig.clearcoat.admin, "/readyz").expect("an answer").text(), "ready\n");

    let before = served(rig);
    let closed = format!("on = true\nretry_after = \"2m\"\nallow = [\"127.0.0.3\", \"192.0.2.7\"]\npage = {file:?}");
    reloaded(rig, |edge| _ = edge.insert("maintenance".into(), table(&closed)));
    let refused = answer();
    assert_eq!((refused.status, refused.text(), refused.header("Retry-After")), (503, "<p>closed</p>", Some("120")));
    let refused = http2.get("/").expect("an answer");
    assert_eq!((refused.status, refused.text(), refused.header("retry-after")), (503, "<p>closed</p>", Some("120")));
    let upload = ask(plain, BALANCER, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n");
    assert_eq!(upload.status, 503);
    counted(rig, "maintenance", 3);
    assert_eq!(served(rig), before);
    // Nothing is wrong: the log says nothing of it.
    assert!(!rig.clearcoat.log().has("a request found no node"));

    assert_eq!(ask(plain, STRANGER, get_request("/")).status, 200);
    let by_the_balancer =
        |client: &str| ask(plain, BALANCER, with("a", "/", &format!("X-Forwarded-For: {client}\r\n")));
    assert_eq!((by_the_balancer("192.0.2.7").status, by_the_balancer("192.0.2.8").status), (200, 503));
    assert_eq!(purge(rig.clearcoat.purge, &tag("cat_p_1")).expect("an answer").status, 200);
    let ready = get(rig.clearcoat.admin, "/readyz").expect("an answer");
    assert_eq!((ready.status, ready.text()), (200, "ready, in maintenance\n"));
    assert_eq!(rig.counter("clearcoat_edge_maintenance"), 1.0);

    reloaded(rig, |edge| _ = edge.insert("maintenance".into(), table("on = false")));
    assert_eq!(http2.get("/").expect("an answer").status, 200);
    assert_eq!(rig.counter("clearcoat_edge_maintenance"), 0.0);
}
