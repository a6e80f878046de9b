//! What is wrong with a real Varnish, kind by kind: the API, `clearcoat status`, the status page and the log name the kind, and say
//! what to do about that and nothing else.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::support::browser::Page;
use crate::support::clearcoat::run;
use crate::support::eventually;
use crate::support::faults::{fail_purges, purges_can_fail};
use crate::support::fleet::{Fleet, Plan};

/// Takes connections (the system does) and answers nothing.
fn hole() -> u16 {
    static HOLE: OnceLock<TcpListener> = OnceLock::new();
    let hole = HOLE.get_or_init(|| TcpListener::bind("127.0.0.1:0").expect("a socket"));
    hole.local_addr().expect("an address").port()
}

/// The file that makes a Varnish leave these requests unanswered.
fn switch(folder: &Path, what: &str) -> PathBuf {
    folder.join(format!("leaves-{what}"))
}

/// A VCL that hands purges on to a backend that hangs, or those of health checks, too, as the switches say.
fn purges_can_hang(vcl: &str, id: &str, folder: &Path) -> String {
    let backend = format!(
        "backend hole {{ .host = \"127.0.0.1\"; .port = \"{}\"; .first_byte_timeout = 3s; }}\nsub vcl_recv {{\n",
        hole()
    );
    let hang = |condition: &str, what: &str| {
        format!(
            "    if (req.method == \"PURGE\" && {condition} && std.file_exists(\"{}\")) {{\n        \
             set req.backend_hint = hole;\n        return (pass);\n    }}\n",
            switch(folder, what).display()
        )
    };
    let hangs = hang("req.url != \"/.clearcoat/probe\"", "purges") + &hang("true", "all");
    purges_can_fail(vcl, id, folder).replacen("sub vcl_recv {\n", &(backend + &hangs), 1)
}

/// Waits until its only Varnish is out for a fault of this kind, and everybody says so with this advice.
fn is_named(fleet: &Fleet, page: &mut Page, (state, kind): (&str, &str), advice: &str) {
    let node = eventually(&format!("it is {state}: {kind}"), || {
        let node = fleet.clearcoat.node("varnish-1");
        (node["state"] == state && node["fault"] == kind).then_some(node)
    });
    assert_eq!(node["gets_traffic"], false, "{node}");
    let said = node["advice"].as_str().expect("advice");
    assert!(said.contains(advice), "{kind}: {said}");
    let admin = format!("http://{}", fleet.clearcoat.admin);
    let status = String::from_utf8(run(&["status", "--admin", &admin]).stdout).expect("text");
    assert!(status.contains(&format!("\nvarnish varnish-1: {said}\n")), "{status}");
    page.waits_for("#problems", said);
    fleet.clearcoat.log().waits_for(&format!("\"fault\":\"{kind}\""));
}

#[test]
fn each_fault_of_a_varnish_is_told_from_others_with_what_to_do_about_it() {
    let config = "[edge]\nlisten = [\"127.0.0.1:0\"]\nseal = false\n";
    let mut fleet = Fleet::start(&Plan { varnish: 1, web: 1, vcl: purges_can_hang, config, ..Plan::default() });
    let mut page = Page::open(fleet.clearcoat.admin, "/");
    let serves = |fleet: &Fleet| {
        eventually("it serves", || (fleet.clearcoat.node("varnish-1")["gets_traffic"] == true).then_some(()));
    };
    let folder = fleet.folder.path().to_owned();

    fail_purges(&fleet, "varnish-1", true);
    fleet.purge_tag("cat_p_1");
    is_named(&fleet, &mut page, ("behind", "fails"), "varnishlog -q 'ReqMethod eq PURGE'");
    fail_purges(&fleet, "varnish-1", false);
    serves(&fleet);

    std::fs::write(switch(&folder, "purges"), "").expect("a file");
    fleet.purge_tag("cat_p_1");
    is_named(&fleet, &mut page, ("behind", "silent-to-purges"), "leaves purges alone unanswered");
    std::fs::remove_file(switch(&folder, "purges")).expect("a file");
    serves(&fleet);

    // Its health check is a PURGE, too: what it leaves unanswered is not all.
    std::fs::write(switch(&folder, "all"), "").expect("a file");
    is_named(&fleet, &mut page, ("down", "silent-to-purges"), "leaves purges alone unanswered");
    std::fs::remove_file(switch(&folder, "all")).expect("a file");
    serves(&fleet);

    fleet.varnish[0].hang();
    is_named(&fleet, &mut page, ("down", "silent"), "hangs, or its machine does");
    fleet.varnish[0].resume();
    serves(&fleet);

    fleet.varnish[0].kill();
    is_named(&fleet, &mut page, ("down", "not-listening"), "start varnishd");
}
