//! Which web node a request gets, by what its nodes have answered and where they stand.

use crate::support::client::{exchange, get};
use crate::support::eventually;
use crate::support::upstream::{Call, Checks, Then, Upstream};

use super::rig::{Rig, always, get_request};

const REQUESTS: usize = 60;

/// The share that a node gets when nobody knows that it fails is half of them.
const FEW: usize = 6;

fn answers() -> Upstream {
    Upstream::start(|call: &mut Call<'_>| call.answer("page"))
}

#[test]
fn a_web_node_that_fails_at_once_draws_no_traffic_whatever_its_failure() {
    let failures = [
        ("a 503", "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno", Then::KeepAlive),
        ("no answer", "", Then::Reset),
        ("a cut", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", Then::Reset),
        ("no HTTP", "nonsense\r\n\r\n", Then::Close),
    ];
    for (failure, answer, then) in failures {
        let config = "[origin]\nlisten = [\"127.0.0.1:0\"]\npolicy = \"peak_ewma\"\n";
        let rig = Rig::start(config, Vec::new(), vec![always(answer, then), answers()]);
        for request in 0..REQUESTS {
            // Some are answered by the failing one, or cut.
            _ = exchange(rig.clearcoat.origin, get_request(&format!("/p/{request}")));
        }
        let [failing, sound] = [0, 1].map(|node| rig.web[node].calls().len());
        assert!(failing <= FEW && failing + sound >= REQUESTS, "{failure}: {failing} and {sound}");
    }
}

#[test]
fn the_web_node_of_the_own_zone_is_asked_until_it_is_down() {
    let (near, far) = (answers(), answers());
    let mut config = "[replica]\nid = \"a\"\nzone = \"a\"\n".to_owned();
    for (zone, node) in [("a", &near), ("b", &far)] {
        let address = node.address;
        config += &format!("[[node]]\nrole = \"web\"\nid = \"{zone}\"\naddress = \"{address}\"\nzone = \"{zone}\"\n");
    }
    let rig = Rig::start(&config, Vec::new(), Vec::new());
    let ask = || {
        for request in 0..REQUESTS {
            assert_eq!(get(rig.clearcoat.origin, &format!("/p/{request}")).expect("an answer").status, 200);
        }
    };
    eventually("both are up", || ["a", "b"].iter().all(|id| rig.clearcoat.node(id)["health"] == "up").then_some(()));
    // What came before that went to the one that was up.
    let before = [&near, &far].map(|node| node.calls().len());
    ask();
    assert_eq!([&near, &far].map(|node| node.calls().len()), [before[0] + REQUESTS, before[1]]);
    near.set_checks(Checks::Fail);
    eventually("the near one is out", || (rig.clearcoat.node("a")["health"] == "down").then_some(()));
    ask();
    assert_eq!([&near, &far].map(|node| node.calls().len()), [before[0] + REQUESTS, before[1] + REQUESTS]);
}
