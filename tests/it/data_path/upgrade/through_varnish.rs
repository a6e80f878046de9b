//! The complete path: edge, a real varnishd whose VCL pipes a WebSocket, origin, web node.

use std::net::SocketAddr;

use crate::data_path::upgrade::noise;
use crate::data_path::upgrade::websocket::{ASK, Opcode, echo, frame, read_frame, shake_hands};
use crate::support::client::{Connection, Ending, exchange, get};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::upstream::Upstream;

/// One Varnish, with or without a PROXY header, and this fake as the web node behind it.
fn before(web: &Upstream, send_proxy: usize) -> Fleet {
    let SocketAddr::V4(address) = web.address else { panic!("a fake listens on IPv4") };
    let node = format!("[[node]]\nrole = \"web\"\nid = \"fake\"\naddress = \"{address}\"\n[runtime]\nworkers = 1");
    Fleet::start(&Plan { varnish: 1, web: 0, send_proxy, config: node.leak(), ..Plan::default() })
}

#[test]
fn a_websocket_goes_the_whole_way() {
    for send_proxy in [0, 1] {
        let web = Upstream::start(echo);
        let fleet = before(&web, send_proxy);
        let mut client = Connection::open(fleet.clearcoat.edge).unwrap();
        shake_hands(&mut client);
        for (length, seed) in [(5, 1), (100_000, 2)] {
            let message = noise(length, seed);
            client.send(frame(Opcode::Binary, Some([5, 6, 7, 8]), &message)).unwrap();
            let (opcode, back) = read_frame(|length, take| client.exactly(length, take)).unwrap();
            assert!(opcode == Opcode::Binary && back == message, "{length} bytes did not come back as they were");
        }
        client.send(frame(Opcode::Close, Some([9; 4]), b"\x03\xe8")).unwrap();
        let (opcode, _) = read_frame(|length, take| client.exactly(length, take)).unwrap();
        assert_eq!((opcode, client.rest().1), (Opcode::Close, Ending::Clean));
        drop(client);
        eventually("the web node's connection ends", || (web.open_connections() == 0).then_some(()));
    }
}

/// Varnish pipes such a request whatever its backend answers: later requests on the connection bypass the VCL. So a
/// connection with a refused offer must not be reused.
#[test]
fn an_offer_that_is_not_taken_opens_no_way_past_the_vcl() {
    for send_proxy in [0, 1] {
        let web = Upstream::echo();
        let fleet = before(&web, send_proxy);
        let edge = fleet.clearcoat.edge;
        let mut client = Connection::open(edge).unwrap();
        client.send(ASK).unwrap();
        let answer = client.answer(false).unwrap();
        assert_eq!((answer.status, answer.text()), (200, "/socket"), "{answer:?}");
        let hidden = "GET /.clearcoat/hidden HTTP/1.1\r\nHost: shop.test\r\n\r\n";
        client.send(hidden).unwrap();
        let refused = client.answer(false).unwrap();
        assert_eq!((refused.status, refused.text().contains("/.clearcoat/hidden")), (404, false), "{refused:?}");
        assert_eq!(exchange(edge, hidden).unwrap().status, 404);
        assert_eq!(exchange(edge, format!("{ASK}{hidden}")).unwrap().text(), "/socket");
        assert_eq!(get(edge, "/.clearcoat/hidden").unwrap().status, 404);
        let hidden = web.calls().into_iter().find(|call| call.head.contains("/.clearcoat/hidden"));
        assert_eq!(hidden, None, "the web node was reached past the VCL");
    }
}
