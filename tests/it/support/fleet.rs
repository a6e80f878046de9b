//! A whole fleet: a shop with web nodes, real varnishd, and clearcoat between and before them.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use clearcoat::fleet::{DEFAULT_HEADER_LIMIT, Delivery};
use clearcoat::varnish::vcl;

use super::clearcoat::Clearcoat;
use super::client::{Answer, get, purge, tag};
use super::etcd::Etcd;
use super::varnish::{Listens, Varnish};
use super::web::{Shop, Web};
use super::{eventually, hold};

/// What a fleet is made of.
pub struct Plan {
    pub varnish: usize,
    pub web: usize,
    /// How many of the Varnish nodes, the first ones, are told by a PROXY header who the client is.
    pub send_proxy: usize,
    /// TOML that goes before the nodes; sections that the harness writes itself: the listeners' addresses are
    /// `127.0.0.1:0` unless this text has the section.
    pub config: &'static str,
    pub ack_timeout: &'static str,
    pub journal: &'static str,
    pub guard: bool,
    /// How many clearcoats stand before the fleet. More than one, or a journal in etcd, needs members of etcd.
    pub replicas: usize,
    pub etcd: usize,
    /// Whether a single member waits for a disk, as it does in earnest.
    pub etcd_on_disk: bool,
    /// How the Varnish nodes are told to drop pages, and the longest header they take.
    pub delivery: Delivery,
    pub header_limit: usize,
    /// Changes the VCL of a node, whose id and folder it is told.
    pub vcl: fn(vcl: &str, id: &str, folder: &Path) -> String,
}

impl Default for Plan {
    fn default() -> Self {
        Plan {
            varnish: 3,
            web: 2,
            send_proxy: 0,
            config: "",
            ack_timeout: "1s",
            journal: "disk",
            guard: true,
            replicas: 1,
            etcd: 0,
            etcd_on_disk: false,
            delivery: Delivery::Magento,
            header_limit: DEFAULT_HEADER_LIMIT,
            vcl: |vcl, _, _| vcl.to_owned(),
        }
    }
}

/// A running fleet. Fields are dropped in this order: clearcoat first, its nodes after it.
pub struct Fleet {
    pub clearcoat: Clearcoat,
    /// The other replicas.
    pub others: Vec<Clearcoat>,
    pub varnish: Vec<Varnish>,
    pub web: Vec<Web>,
    pub shop: Arc<Shop>,
    etcd: Option<Etcd>,
    pub folder: tempfile::TempDir,
}

impl Fleet {
    /// Starts everything and waits until every node is up and the edge is open.
    pub fn start(plan: &Plan) -> Self {
        let fleet = Fleet::launch(plan);
        fleet.clearcoats().for_each(Clearcoat::ready);
        fleet.know_each_other();
        fleet.origins_are_up();
        fleet
    }

    /// All clearcoats before this fleet.
    pub fn clearcoats(&self) -> impl Iterator<Item = &Clearcoat> {
        std::iter::once(&self.clearcoat).chain(&self.others)
    }

    /// One of them, by its number from 0.
    pub fn replica(&mut self, number: usize) -> &mut Clearcoat {
        match number {
            0 => &mut self.clearcoat,
            other => &mut self.others[other - 1],
        }
    }

    /// The etcd that the plan has.
    pub fn etcd(&mut self) -> &mut Etcd {
        self.etcd.as_mut().expect("a plan with etcd")
    }

    /// Waits until every clearcoat has heard of all others, and they confirm what they are told.
    pub fn know_each_other(&self) {
        let replicas = 1 + self.others.len();
        for clearcoat in self.clearcoats().filter(|_| replicas > 1) {
            eventually("the replicas know each other", || {
                let fleet = clearcoat.fleet();
                let known = fleet["replicas"].as_array()?;
                (known.len() == replicas && known.iter().all(|replica| replica["confirmed"] == true)).then_some(())
            });
        }
    }

    /// Waits until every Varnish has seen every clearcoat: it started before them, and of several it asks those that it
    /// believes to be there.
    pub fn origins_are_up(&self) {
        let replicas = 1 + self.others.len();
        if replicas > 1 {
            eventually("every Varnish has seen every clearcoat", || {
                self.varnish.iter().all(|varnish| varnish.origins_up() == replicas).then_some(())
            });
        }
    }

    /// Starts everything. Nodes may be down still, and the edge not open.
    pub fn launch(plan: &Plan) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let shop = Arc::new(Shop::default());
        let web: Vec<Web> = (0..plan.web).map(|_| Web::start(&shop)).collect();
        let etcd = match plan.etcd {
            0 => None,
            1 if plan.etcd_on_disk => Some(Etcd::on_disk()),
            1 => Some(Etcd::start()),
            members => Some(Etcd::cluster(members)),
        };
        // The VCL names the origin listeners, whose ports must be known before the Varnish nodes that clearcoat's
        // configuration names: held until clearcoat itself binds them (its sockets share the port for that moment).
        let held: Vec<_> = (0..plan.replicas).map(|_| hold(SocketAddr::from(([127, 0, 0, 1], 0)))).collect();
        let address = |socket: &socket2::Socket| socket.local_addr().expect("an address").as_socket();
        let origins: Vec<SocketAddr> = held.iter().map(|socket| address(socket).expect("an IP socket")).collect();
        let allow = ["127.0.0.0/8".parse().expect("a network")];
        let by_origin: Vec<_> = origins.iter().map(|origin| (*origin).into()).collect();
        let text = vcl::render(vcl::Version::Seven, plan.delivery, &by_origin, &allow).expect("a VCL");
        let spawn = |number| {
            let id = format!("varnish-{number}");
            let file = folder.path().join(format!("{id}.vcl"));
            std::fs::write(&file, (plan.vcl)(&text, &id, folder.path())).expect("a file");
            let listens = if number <= plan.send_proxy { Listens::Proxy } else { Listens::Http };
            Varnish::spawn_for(listens, folder.path(), &id, &file)
        };
        let mut varnish: Vec<Varnish> = (1..=plan.varnish).map(spawn).collect();
        varnish.iter_mut().for_each(Varnish::ready);

        let mut nodes = Vec::new();
        nodes.extend(varnish.iter().map(|varnish| ("varnish", varnish.id.clone(), varnish.address)));
        nodes.extend(web.iter().enumerate().map(|(index, web)| ("web", format!("web-{}", index + 1), web.address)));
        let endpoints = etcd.as_ref().map(Etcd::endpoints);
        let mut clearcoats = origins.iter().enumerate().map(|(number, origin)| {
            // The first one has the folder of the fleet, others have one in it.
            let own = match number {
                0 => folder.path().to_owned(),
                other => folder.path().join(format!("clearcoat-{}", other + 1)),
            };
            std::fs::create_dir_all(&own).expect("a folder");
            let mut config = configuration(plan, *origin, &own.join("journal"), &nodes);
            if let Some(endpoints) = &endpoints {
                config = format!(
                    "{config}\n[registry.etcd]\nendpoints = {endpoints:?}\n[replica]\nid = \"clearcoat-{}\"\n",
                    number + 1
                );
            }
            Clearcoat::start(&own, &config)
        });
        let clearcoat = clearcoats.next().expect("one replica at least");
        let others = clearcoats.collect();
        drop(held);
        Fleet { clearcoat, others, varnish, web, shop, etcd, folder }
    }

    /// Reads a page through the edge.
    pub fn get(&self, path: &str) -> Answer {
        get(self.clearcoat.edge, path).expect("the edge answers")
    }

    /// Reads a page from each Varnish alone, past clearcoat's edge: `HIT` or `MISS` of each.
    pub fn cached(&self, path: &str) -> Vec<String> {
        self.varnish.iter().map(|varnish| varnish.get(path).cache().to_owned()).collect()
    }

    /// Puts a page into the cache of each Varnish.
    pub fn warm(&self, path: &str) {
        self.cached(path);
        assert!(self.cached(path).iter().all(|cache| cache == "HIT"), "{path} cannot be cached");
    }

    /// Purges one tag as Magento does.
    pub fn purge_tag(&self, name: &str) -> Answer {
        purge(self.clearcoat.purge, &tag(name)).expect("the purge listener answers")
    }
}

fn configuration(
    plan: &Plan,
    origin: SocketAddr,
    journal: &std::path::Path,
    nodes: &[(&str, String, SocketAddr)],
) -> String {
    let mut config = plan.config.to_owned();
    let mut section = |name: &str, text: String| {
        if !config.contains(&format!("[{name}]")) {
            write!(config, "\n[{name}]\n{text}\n").expect("memory");
        }
    };
    section("edge", "listen = [\"127.0.0.1:0\"]".into());
    section("origin", format!("listen = [\"{origin}\"]\nguard = {}", plan.guard));
    section("purge", format!("listen = [\"127.0.0.1:0\"]\nack_timeout = \"{}\"", plan.ack_timeout));
    section("admin", "listen = [\"127.0.0.1:0\"]".into());
    section("journal", format!("kind = \"{}\"\npath = \"{}\"", plan.journal, journal.display()));
    section("health.web", "interval = \"1s\"\ntimeout = \"1s\"".into());
    for (number, (role, id, address)) in nodes.iter().enumerate() {
        write!(config, "\n[[node]]\nrole = \"{role}\"\nid = \"{id}\"\naddress = \"{address}\"\n").expect("memory");
        if *role == "varnish" {
            let delivery = toml::Value::try_from(plan.delivery).expect("a string");
            write!(config, "delivery = {delivery}\nheader_limit = {}\n", plan.header_limit).expect("memory");
        }
        // Varnish nodes stand first.
        if number < plan.send_proxy {
            config += "send_proxy = \"v2\"\n";
        }
    }
    config
}
