//! The end of the process: what is under way comes to its end, and nothing new begins.

use std::net::TcpStream;

use crate::data_path::rig::{Rig, get_request};
use crate::support::client::{Connection, Ending, get};
use crate::support::eventually;
use crate::support::upstream::{Gate, Then, Upstream};

/// Half of the long download.
const HALF: usize = 1024 * 1024;

#[test]
fn sigterm_lets_what_is_under_way_finish_and_ends_the_rest() {
    let (go_on, answer) = (Gate::default(), Gate::default());
    let node = || {
        let (go_on, answer) = (go_on.clone(), answer.clone());
        Upstream::start(move |call| {
            let path = call.path().to_owned();
            match path.as_str() {
                "/long" => {
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 2 * HALF);
                    let begun = call.send(head).is_ok() && call.send(vec![b'1'; HALF]).is_ok() && call.wait(&go_on);
                    if begun { call.send_then(vec![b'2'; HALF], Then::KeepAlive) } else { Then::Close }
                }
                "/late" => {
                    call.wait(&answer);
                    call.answer(&path)
                }
                _ => call.answer(&path),
            }
        })
    };
    let mut rig = Rig::start("[runtime]\nworkers = 2", vec![node()], vec![node()]);
    let listeners = [rig.clearcoat.edge, rig.clearcoat.origin];
    let connect = || listeners.map(|listener| Connection::open(listener).expect("clearcoat accepts"));
    let ask = |path: &str| {
        let mut clients = connect();
        clients.iter_mut().for_each(|client| client.send(get_request(path)).unwrap());
        clients
    };
    let silent = connect();
    let mut idle = ask("/idle");
    idle.iter_mut().for_each(|client| assert_eq!(client.answer(false).unwrap().text(), "/idle"));
    let mut long = ask("/long");
    let heads = long.each_mut().map(|client| client.head().unwrap());
    let mut late = ask("/late");
    eventually("all requests are at the nodes", || (rig.inflight() == 4.0).then_some(()));

    rig.clearcoat.terminate();
    // It still takes what comes until whoever is in front of it has turned away.
    let admin = rig.clearcoat.admin;
    eventually("it says that it is not ready", || {
        get(admin, "/readyz").is_ok_and(|answer| answer.status == 503).then_some(())
    });
    assert_eq!(get(listeners[0], "/leaving").expect("accepted while it leaves").status, 200);
    for client in idle.into_iter().chain(silent) {
        let mut client = client;
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean), "a connection at rest");
    }
    for listener in listeners {
        eventually("new connections are refused", || TcpStream::connect(listener).is_err().then_some(()));
    }
    answer.open();
    for client in &mut late {
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.text(), answer.header("Connection")), ("/late", Some("close")), "{answer:?}");
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    }
    go_on.open();
    for (client, head) in long.iter_mut().zip(heads) {
        let mut body = Vec::new();
        client.body_in_pieces(&head, |piece| body.extend_from_slice(piece)).expect("the whole download");
        assert!(body.len() == 2 * HALF && body[..HALF].iter().all(|byte| *byte == b'1'), "{} bytes", body.len());
        assert!(body[HALF..].iter().all(|byte| *byte == b'2'));
        assert_eq!(client.rest(), (Vec::new(), Ending::Clean));
    }
    let status = rig.clearcoat.wait();
    assert!(status.success(), "{status}");
}

#[test]
fn a_connection_at_the_moment_of_the_drain_is_answered_or_refused_and_never_dropped() {
    let rig = Rig::start("[runtime]\nworkers = 2", Vec::new(), vec![Upstream::echo(), Upstream::echo()]);
    let listener = rig.clearcoat.origin;
    let answered: u64 = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(move || {
                    let mut answered = 0;
                    // Until it is refused.
                    while let Ok(mut client) = Connection::open(listener) {
                        let asked = client.send("GET /burst HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
                        let answer = asked.and_then(|()| client.answer(false));
                        let answer = answer.unwrap_or_else(|error| panic!("accepted, and then {error}"));
                        assert_eq!(answer.text(), "/burst");
                        answered += 1;
                    }
                    answered
                })
            })
            .collect();
        eventually("requests are answered", || (rig.web[0].calls().len() > 20).then_some(()));
        rig.clearcoat.terminate();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    assert!(answered > 20, "{answered}");
}
