//! A fleet with web nodes in etcd and no Varnish: the edge forwards everything to them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::clearcoat::Clearcoat;
use crate::support::client::get;
use crate::support::etcd::Etcd;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::web::{Shop, Web};

pub const NODES: &str = "/clearcoat/v1/nodes/";

/// The value of a key that must not be used.
pub const ELSEWHERE: &str = "10.255.255.1:80";

/// Everything that a test needs. Fields are dropped in this order.
pub struct Rig {
    pub fleet: Fleet,
    pub web: Vec<Web>,
    pub etcd: Etcd,
}

/// Nodes for comparison: by key, with the address, the weight and the label `n`.
pub type Nodes = BTreeMap<String, (String, u64, String)>;

impl Rig {
    /// This many web nodes, registered by their bare addresses, and a clearcoat in front of them.
    pub fn start(web: usize) -> Self {
        Rig::start_with(Etcd::start(), web, "")
    }

    /// The same with this etcd, and more keys of `[registry.etcd]`.
    pub fn start_with(etcd: Etcd, web: usize, keys: &str) -> Self {
        let endpoints = etcd.endpoints();
        let rig = Rig::launch(etcd, web, &endpoints, keys);
        rig.fleet.clearcoat.ready();
        rig
    }

    /// The same with other endpoints of etcd. The edge may not be open yet.
    pub fn launch(etcd: Etcd, web: usize, endpoints: &[String], keys: &str) -> Self {
        let shop = Arc::new(Shop::default());
        let web: Vec<Web> = (0..web).map(|_| Web::start(&shop)).collect();
        for (index, web) in web.iter().enumerate() {
            etcd.put(&key(&format!("web-{}", index + 1)), &web.address.to_string());
        }
        let mut config = format!("[registry]\nkind = \"etcd\"\n[registry.etcd]\nendpoints = {endpoints:?}\n{keys}\n");
        if !keys.contains("[health.web]") {
            config += "[health.web]\ninterval = \"200ms\"\ntimeout = \"200ms\"\nslow_start = \"0s\"\nfall = 2\n";
        }
        let fleet = Fleet::launch(&Plan { varnish: 0, web: 0, config: config.leak(), ..Plan::default() });
        Rig { fleet, web, etcd }
    }

    pub fn clearcoat(&self) -> &Clearcoat {
        &self.fleet.clearcoat
    }

    /// Reads pages through the edge until stopped, and tolerates no refusal.
    pub fn reader(&self) -> Reader {
        Reader::start(self.clearcoat().edge, 10, Outage::None)
    }

    pub fn put(&self, id: &str, value: &str) {
        self.etcd.put(&key(id), value);
    }

    pub fn delete(&self, id: &str) {
        assert!(self.etcd.delete(&key(id)), "there is no {id}");
    }

    /// Registers another node, at the address of an existing one, and waits until the fleet has it. Returns the time
    /// taken.
    pub fn another(&self, id: &str) -> Duration {
        let began = Instant::now();
        self.put(id, &self.web[0].address.to_string());
        eventually("the node is in the fleet", || self.has(id).then_some(()));
        began.elapsed()
    }

    pub fn has(&self, id: &str) -> bool {
        self.clearcoat().nodes().iter().any(|node| node["id"] == id)
    }

    /// Waits until these are the web nodes, in the order of their ids.
    pub fn has_only(&self, ids: &[&str]) {
        eventually(&format!("the fleet is {ids:?}"), || (self.ids() == ids).then_some(()));
    }

    pub fn ids(&self) -> Vec<String> {
        self.clearcoat().nodes().iter().map(|node| node["id"].as_str().unwrap().to_owned()).collect()
    }

    /// Waits until the fleet equals the records in etcd. Returns the time taken.
    pub fn equals_etcd(&self) -> Duration {
        let began = Instant::now();
        let wanted = in_etcd(&self.etcd);
        eventually("the fleet is what is in etcd", || (in_fleet(self.clearcoat()) == wanted).then_some(()));
        began.elapsed()
    }

    /// Waits until clearcoat reports this state of its connection to etcd.
    pub fn is_connected(&self, connected: bool) {
        eventually("clearcoat knows how it stands with etcd", || {
            (self.clearcoat().fleet()["registry"]["connected"] == connected).then_some(())
        });
    }

    /// The member of clearcoat's last connection.
    pub fn member(&self) -> usize {
        self.clearcoat().log().waits_for("connected to etcd");
        let log = self.clearcoat().log().text();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut connected = lines.filter(|line| line["message"] == "connected to etcd");
        let endpoint = connected.next_back().expect("a connection")["endpoint"].as_str().unwrap().to_owned();
        self.etcd.endpoints().iter().position(|other| *other == endpoint).expect("one of its members")
    }

    pub fn serves(&self) {
        assert_eq!(get(self.clearcoat().edge, "/p/1").expect("an answer").status, 200);
    }

    pub fn metric(&self, name: &str) -> f64 {
        self.clearcoat().metric(&format!("clearcoat_{name}"))
    }
}

/// The key of a web node.
pub fn key(id: &str) -> String {
    format!("{NODES}web/{id}")
}

pub fn in_etcd(etcd: &Etcd) -> Nodes {
    let node = |(key, value): (String, String)| {
        let value = serde_json::from_str(&value).unwrap_or_else(|_| serde_json::json!({ "address": value }));
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let weight = if value["state"] == "drain" { 0 } else { value["weight"].as_u64().unwrap_or(1) };
        (key[NODES.len()..].to_owned(), (text(&value["address"]), weight, text(&value["labels"]["n"])))
    };
    let is_node = |(key, _): &(String, String)| !key[NODES.len()..].starts_with("other/");
    etcd.list(NODES).into_iter().filter(is_node).map(node).collect()
}

pub fn in_fleet(clearcoat: &Clearcoat) -> Nodes {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let node = |node: serde_json::Value| {
        let key = format!("{}/{}", text(&node["role"]), text(&node["id"]));
        (key, (text(&node["address"]), node["weight"].as_u64().unwrap(), text(&node["labels"]["n"])))
    };
    clearcoat.nodes().into_iter().map(node).collect()
}
