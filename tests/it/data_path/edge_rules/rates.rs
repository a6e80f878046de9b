//! How many requests clients may make.

use super::{BALANCER, STRANGER, TRUSTED, ask, refused as counted, reloaded, served, table, with};
use crate::data_path::rig::get_request;
use crate::data_path::tls::Secure;
use crate::support::client::Connection;
use crate::support::http2::Http2;
use crate::support::upstream::Upstream;

/// One token in an hour would be best; this is as slow as it gets, and each test takes far more than it refills.
fn limited(limit: &str) -> Secure {
    Secure::start(&format!("{TRUSTED}\nrate_limit = {{ {limit} }}"), "", vec![Upstream::echo()])
}

/// How many of this many requests are served, one after the other on new connections.
fn admitted(secure: &Secure, from: [u8; 4], fields: &str, count: usize) -> usize {
    let request = with("shop.test", "/", fields);
    (0..count).filter(|_| ask(secure.rig.clearcoat.edge, from, &request).status == 200).count()
}

#[test]
fn a_client_that_asks_too_much_is_told_when_to_come_again() {
    let secure = limited("client_rate = 1, client_burst = 20");
    let (rig, plain) = (&secure.rig, secure.rig.clearcoat.edge);
    // All in one go on one connection, so that no time passes.
    let mut pipelined = Connection::open_from(STRANGER, plain).expect("the edge accepts");
    pipelined.send(get_request("/").repeat(60)).expect("clearcoat reads");
    let mut statuses = Vec::new();
    let refused = loop {
        let answer = pipelined.answer(false).expect("an answer");
        statuses.push(answer.status);
        if answer.status != 200 {
            break answer;
        }
    };
    assert!((21..40).contains(&statuses.len()), "{statuses:?}");
    assert_eq!((refused.status, refused.text()), (429, "too many requests\n"));
    assert_eq!((refused.header("Retry-After"), refused.header("Connection")), (Some("1"), Some("close")));
    counted(rig, "client_rate", 1);
    assert_eq!(served(rig), statuses.len() - 1);
    let upload = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n";
    assert_eq!(ask(plain, STRANGER, upload).status, 429);
    // Others have their own.
    assert_eq!(admitted(&secure, [127, 0, 0, 4], "", 5), 5);

    let http2 = Http2::open(secure.address());
    let statuses: Vec<u16> = (0..40).map(|_| http2.get("/").expect("an answer").status).collect();
    assert!(statuses[..20].iter().all(|&status| status == 200), "{statuses:?}");
    assert!(statuses.contains(&429) && statuses.len() == 40, "{statuses:?}");
}

#[test]
fn behind_a_balancer_each_client_has_its_own_rate() {
    let secure = limited("client_rate = 1, client_burst = 5");
    let of = |client: &str| admitted(&secure, BALANCER, &format!("X-Forwarded-For: {client}\r\n"), 15);
    for (client, twin) in [("192.0.2.1", "6.6.6.6, 192.0.2.1"), ("2001:db8::1", "2001:db8::2")] {
        assert!((5..15).contains(&of(client)), "{client}");
        assert!((0..10).contains(&of(twin)), "{twin}");
    }
    // What a stranger says of others is no way out.
    let forged: usize =
        (0..15).map(|number| admitted(&secure, STRANGER, &format!("X-Forwarded-For: 192.0.2.{number}\r\n"), 1)).sum();
    assert!((5..15).contains(&forged), "{forged}");
    // The balancer itself checks as often as it likes.
    assert_eq!(admitted(&secure, BALANCER, "", 15), 15);
}

#[test]
fn all_together_have_a_rate_and_a_reload_forgives_nothing() {
    let secure =
        limited("client_rate = 1, client_burst = 8, total_rate = 1, total_burst = 12, exempt = [\"127.0.0.4\"]");
    let (rig, plain) = (&secure.rig, secure.rig.clearcoat.edge);
    assert_eq!(admitted(&secure, STRANGER, "", 8), 8);
    let others: usize = (10..40).map(|number| admitted(&secure, [127, 0, 1, number], "", 1)).sum();
    assert!((4..25).contains(&others), "{others}");
    counted(rig, "total_rate", 30 - others);
    assert_eq!(admitted(&secure, [127, 0, 0, 4], "", 30), 30);
    // A client that has used up its own is refused for that, and takes nothing of the others'.
    reloaded(rig, |edge| {
        _ = edge.insert("rate_limit".into(), table("client_rate = 1\nclient_burst = 8\ntotal_rate = 100000"));
    });
    let mut pipelined = Connection::open_from(STRANGER, plain).expect("the edge accepts");
    pipelined.send(get_request("/").repeat(30)).expect("clearcoat reads");
    let served = (0..30).take_while(|_| pipelined.answer(false).is_ok_and(|answer| answer.status == 200)).count();
    assert!(served < 30, "{served}");
    counted(rig, "client_rate", 1);
    reloaded(rig, |edge| _ = edge.remove("rate_limit"));
    assert_eq!(admitted(&secure, STRANGER, "", 30), 30);
}
