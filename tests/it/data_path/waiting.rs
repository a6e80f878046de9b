//! Waits that time out: a hanging node, an incomplete head. And idle connections that do not.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Ending, get};
use crate::support::eventually;
use crate::support::upstream::{Checks, Gate, Then, Upstream};

#[test]
fn a_client_of_a_hung_cache_is_answered_by_another_once_it_is_down() {
    let hangs = Arc::new(AtomicBool::new(false));
    let goes_on = Gate::default();
    let nodes = ["hanging", "healthy"].map(|name| {
        let (hangs, goes_on) = (Arc::clone(&hangs), goes_on.clone());
        Upstream::start(move |call| {
            if name == "hanging" && hangs.load(Ordering::SeqCst) && !call.wait(&goes_on) {
                return Then::Close;
            }
            call.answer(name)
        })
    });
    let rig = Rig::start("", nodes.into(), Vec::new());
    let of_hanging = |path: &String| get(rig.clearcoat.edge, path).unwrap().text() == "hanging";
    let path = (0..100).map(|number| format!("/{number}")).find(of_hanging).expect("a page that this node has");

    hangs.store(true, Ordering::SeqCst);
    let before = rig.varnish[0].calls().len();
    let (mut reader, mut writer) = (rig.edge(), rig.edge());
    reader.send(get_request(&path)).unwrap();
    writer.send(format!("POST {path} HTTP/1.1\r\nHost: shop.test\r\nContent-Length: 0\r\n\r\n")).unwrap();
    eventually("the node has both requests", || (rig.varnish[0].calls().len() == before + 2).then_some(()));
    let began = Instant::now();
    rig.varnish[0].set_checks(Checks::Hang);

    let answer = reader.answer(false).unwrap();
    assert_eq!((answer.status, answer.text()), (200, "healthy"), "{answer:?}");
    // Two failed checks, a second apart, each after half a second; and a tolerance for a busy machine.
    assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
    assert_eq!(rig.retries("varnish", "node_down"), 1.0);
    assert_eq!(rig.clearcoat.node("varnish-1")["health"], "down");
    // From now on no request waits.
    let began = Instant::now();
    assert_eq!(get(rig.clearcoat.edge, &path).unwrap().text(), "healthy");
    assert!(began.elapsed() < Duration::from_secs(1), "it took {:?}", began.elapsed());
    // A request that may have been executed is not retried, and waits for its node.
    goes_on.open();
    assert_eq!(writer.answer(false).unwrap().text(), "hanging");
    rig.becomes_idle();
}

#[test]
fn half_a_head_has_ten_seconds_even_if_trickling_and_idling_has_longer() {
    let rig = Rig::web([Upstream::echo()]);
    let (mut silent, mut used) = (rig.origin(), rig.origin());
    used.send(get_request("/before")).unwrap();
    assert_eq!(used.answer(false).unwrap().text(), "/before");

    let began = Instant::now();
    let mut stalled = rig.origin();
    stalled.send("GET / HTTP/1.1\r\nHost: a\r\nX: ").unwrap();
    let mut trickling = rig.origin();
    trickling.send("GET / HTTP/1.1\r\nHost: a\r\nX: ").unwrap();
    let trickle = std::thread::spawn({
        let mut stream = trickling.stream.try_clone().unwrap();
        move || {
            while stream.write_all(b"y").is_ok() {
                // The pace of this client, not a synchronisation.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    });
    for (mut client, what) in [(stalled, "stalled"), (trickling, "trickling")] {
        let answer = client.answer(false).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((answer.status, answer.header("Connection")), (408, Some("close")), "{what}: {answer:?}");
        let waited = began.elapsed();
        assert!((9..20).contains(&waited.as_secs()), "{what}: {waited:?}");
        if what == "stalled" {
            assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "{what}");
        }
    }
    trickle.join().unwrap();

    for client in [&mut silent, &mut used] {
        client.send(get_request("/after")).unwrap();
        assert_eq!(client.answer(false).unwrap().text(), "/after");
    }
    let (_, calls) = rig.web[0].all_traffic();
    assert_eq!(calls.len(), 3, "{calls:?}");
}
