//! What an attack on the seal has found, against real varnishd.

use crate::support::client::{Answer, Connection};
use crate::support::fleet::{Fleet, Plan};

fn sealing(plan: &Plan) -> Fleet {
    let fleet = Fleet::start(&Plan { first_start: "flush", ..*plan });
    fleet.seals();
    fleet
}

/// Nodes whose bans gather for longer than a test takes.
fn lazy(varnish: usize, more: &str) -> Plan {
    let config = format!("[purge]\nlisten = [\"127.0.0.1:0\"]\nack_timeout = \"20s\"\ngather = \"60s\"\n{more}");
    Plan { varnish, web: 1, config: config.leak(), ..Plan::default() }
}

fn said(answer: &Answer) -> (u16, &str, &str) {
    (answer.status, answer.cache(), answer.text())
}

#[test]
fn a_get_with_a_body_gets_no_old_page_either() {
    let length = "GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 1\r\n\r\n";
    let chunked = "GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (head, body) in [(length, "x"), (chunked, "0\r\n\r\n")] {
        let fleet = sealing(&lazy(1, ""));
        let mut client = Connection::open(fleet.clearcoat.edge).expect("a connection");
        for version in 1..=3 {
            fleet.get("/p/1");
            assert_eq!(said(&fleet.get("/p/1")), (200, "HIT", &*(version - 1).to_string()));
            fleet.shop.set(1, version);
            assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
            client.send(format!("{head}{body}")).expect("sent");
            let answer = client.answer(false).expect("an answer");
            assert_eq!((answer.status, answer.text()), (200, &*version.to_string()), "{head}");
        }
    }
}

#[test]
fn a_get_whose_body_comes_late_gets_no_old_page() {
    let fleet = sealing(&lazy(1, ""));
    fleet.get("/p/1");
    assert_eq!(fleet.get("/p/1").cache(), "HIT");
    fleet.shop.set(1, 1);
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    let mut client = Connection::open(fleet.clearcoat.edge).expect("a connection");
    client.send("GET /p/1 HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 200000\r\n\r\n").expect("sent");
    // More than the edge keeps, so that the request cannot be repeated. It may have answered by now.
    _ = client.send("x".repeat(200_000));
    let answer = client.answer(false).expect("an answer");
    assert!(answer.status == 503 || (answer.status, answer.text()) == (200, "1"), "{answer:?}");
}
