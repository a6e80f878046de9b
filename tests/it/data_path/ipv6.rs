//! IPv6: listeners, nodes, and what a node is told of its client.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};

use super::rig::Rig;
use crate::support::client::{get, purge, tag};
use crate::support::eventually;
use crate::support::upstream::{Call, Upstream};

fn anywhere() -> SocketAddr {
    SocketAddr::from((Ipv6Addr::LOCALHOST, 0))
}

#[test]
fn listeners_and_nodes_with_ipv6_addresses_serve_and_purge() {
    if UdpSocket::bind(anywhere()).is_err() {
        println!("this machine has no IPv6: nothing is shown");
        return;
    }
    let node = |page: &'static str| Upstream::start_at(anywhere(), move |call: &mut Call<'_>| call.answer(page));
    let listen = "listen = [\"[::1]:0\"]";
    let config = format!("[edge]\n{listen}\nseal = false\n[origin]\n{listen}\n[purge]\n{listen}\n[admin]\n{listen}\n");
    let rig = Rig::start(&config, vec![node("cached")], vec![node("rendered")]);
    let clearcoat = &rig.clearcoat;
    for address in [clearcoat.edge, clearcoat.origin, clearcoat.purge, clearcoat.admin] {
        assert!(address.is_ipv6(), "{address}");
    }
    eventually("both nodes serve", || clearcoat.nodes().iter().all(|node| node["state"] == "serving").then_some(()));
    assert_eq!(get(clearcoat.edge, "/").unwrap().text(), "cached");
    assert_eq!(get(clearcoat.origin, "/").unwrap().text(), "rendered");
    let asked = rig.varnish[0].calls();
    let page = asked.iter().find(|call| call.head.starts_with("GET / ")).expect("the page");
    assert_eq!(page.header("X-Forwarded-For"), Some("::1"));
    assert_eq!(purge(clearcoat.purge, &tag("cat_p_1")).unwrap().status, 200);
    let has_purge = || rig.varnish[0].calls().iter().any(|call| call.head.contains("cat_p_1"));
    eventually("the purge arrives", || has_purge().then_some(()));
}
