//! A complete fleet: a shop with web nodes, real varnishd, and clearcoat between and in front of them.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clearcoat::fleet::{DEFAULT_HEADER_LIMIT, PurgeDialect};
use clearcoat::varnish::vcl;

use super::clearcoat::Clearcoat;
use super::client::{Answer, get, purge, tag};
use super::disk::Disk;
use super::etcd::Etcd;
use super::etcd::link::Link;
use super::slow_link::{Quality, SlowLink};
use super::varnish::{Listens, Varnish};
use super::web::{Shop, Web};
use super::{eventually, hold};

/// The parts of a fleet.
pub struct Plan {
    pub varnish: usize,
    pub web: usize,
    /// The number of Varnish nodes, from the first, that get a PROXY header.
    pub send_proxy: usize,
    /// TOML before the nodes. The harness adds missing sections: the listeners' addresses are `127.0.0.1:0` unless this
    /// text has the section.
    pub config: &'static str,
    pub ack_timeout: &'static str,
    pub journal: &'static str,
    /// The value of `journal.first_start`: whether cached pages are trusted without a journal.
    pub first_start: &'static str,
    pub guard: bool,
    /// The number of clearcoats. A journal in etcd needs members of etcd; without any, each clearcoat is configured
    /// with all of them, itself included (`replica.peers`).
    pub replicas: usize,
    /// The last clearcoat has its own link to the first Varnish ([`Fleet::own_way`]).
    pub own_way: bool,
    pub etcd: usize,
    /// Whether etcd's members sync to disk, as in production.
    pub etcd_on_disk: bool,
    /// The storage limit of an etcd member in bytes, if not the default.
    pub etcd_quota: Option<u64>,
    /// The nodes are registered in etcd, and not in the configuration.
    pub registered: bool,
    /// Each clearcoat has its own links to the members of etcd, and one on which the others reach it.
    pub links: bool,
    /// More keys of `[registry.etcd]`.
    pub etcd_keys: &'static str,
    /// How the Varnish nodes are told to drop pages, and the longest header they take.
    pub delivery: PurgeDialect,
    pub header_limit: usize,
    /// The last Varnish is behind this link.
    pub slow_link: Option<Quality>,
    /// The journal of the first clearcoat is on a disk that can be frozen.
    pub disk: bool,
    /// The clock offset of the last of several clearcoats. (A varnishd uses jemalloc, which reads the time before
    /// libfaketime is initialised: they cannot be combined.)
    pub ahead: Option<&'static str>,
    /// Changes the VCL of a node, given its id and folder.
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
            first_start: "trust",
            guard: true,
            replicas: 1,
            own_way: false,
            etcd: 0,
            etcd_on_disk: false,
            etcd_quota: None,
            registered: false,
            links: false,
            etcd_keys: "",
            delivery: PurgeDialect::Magento,
            header_limit: DEFAULT_HEADER_LIMIT,
            slow_link: None,
            disk: false,
            ahead: None,
            vcl: |vcl, _, _| vcl.to_owned(),
        }
    }
}

/// A running fleet. Fields are dropped in this order: clearcoat first, its nodes after it. The disk before all of them,
/// which thaws it: a process that waits for a frozen one cannot be killed.
pub struct Fleet {
    /// The disk of the first clearcoat's journal, if planned.
    pub disk: Option<Disk>,
    pub clearcoat: Clearcoat,
    /// The other replicas.
    pub others: Vec<Clearcoat>,
    pub varnish: Vec<Varnish>,
    /// The last Varnish's link, if planned.
    pub slow_link: Option<SlowLink>,
    pub web: Vec<Web>,
    pub shop: Arc<Shop>,
    etcd: Option<Etcd>,
    /// The links of each clearcoat, if planned.
    pub links: Vec<Links>,
    /// The link of the last clearcoat to the first Varnish, if planned.
    pub own_way: Option<Link>,
    pub folder: tempfile::TempDir,
}

/// The links of a clearcoat.
pub struct Links {
    /// To each member of etcd.
    pub etcd: Vec<Link>,
    /// From the other clearcoats.
    pub others: Link,
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

    /// All clearcoats of this fleet.
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

    /// The folder of a clearcoat's journal.
    pub fn journal_of(&self, number: usize) -> PathBuf {
        own_folder(self.folder.path(), number).join("journal")
    }

    /// The etcd of the plan.
    pub fn etcd(&mut self) -> &mut Etcd {
        self.etcd.as_mut().expect("a plan with etcd")
    }

    /// Waits until every clearcoat knows all others, and they confirm purges.
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

    /// Waits until every Varnish has seen every clearcoat: it started before them, and uses only those that it believes
    /// to be up. A clearcoat that refused a probe, because it was not there yet, is not probed for 250 ms
    /// (`backend_remote_error_holddown`).
    pub fn origins_are_up(&self) {
        let replicas = 1 + self.others.len();
        if replicas > 1 {
            eventually("every Varnish has seen every clearcoat", || {
                self.varnish.iter().all(|varnish| varnish.origins_up() == replicas).then_some(())
            });
            eventually("every Varnish reaches a clearcoat", || {
                self.varnish.iter().all(|varnish| varnish.get("/customer/").status == 404).then_some(())
            });
        }
    }

    /// Starts everything. Nodes may still be down, and the edge closed.
    pub fn launch(plan: &Plan) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let shop = Arc::new(Shop::default());
        let web: Vec<Web> = (0..plan.web).map(|_| Web::start(&shop)).collect();
        let etcd = (plan.etcd > 0).then(|| match plan.etcd_quota {
            Some(bytes) => Etcd::cluster_with_quota(plan.etcd, bytes),
            None if plan.etcd_on_disk => Etcd::on_disk(plan.etcd),
            None => Etcd::cluster(plan.etcd),
        });
        // The VCL names the origin listeners, so their ports must be known before the Varnish nodes start, which
        // clearcoat's configuration names in turn: reserved until clearcoat itself binds them (its sockets share the
        // port for that moment).
        let held: Vec<_> = (0..plan.replicas).map(|_| hold(SocketAddr::from(([127, 0, 0, 1], 0)))).collect();
        let address = |socket: &socket2::Socket| socket.local_addr().expect("an address").as_socket();
        let origins: Vec<SocketAddr> = held.iter().map(|socket| address(socket).expect("an IP socket")).collect();
        let allow = ["127.0.0.0/8", "10.192.0.0/10"].map(|network| network.parse().expect("a network"));
        let slow_link = plan.slow_link.map(SlowLink::start);
        let spawn = |number| {
            let id = format!("varnish-{number}");
            let file = folder.path().join(format!("{id}.vcl"));
            let link = slow_link.as_ref().filter(|_| number == plan.varnish);
            let seen = |origin: &SocketAddr| link.map_or(*origin, |link| link.near(*origin)).into();
            let by_origin: Vec<_> = origins.iter().map(seen).collect();
            let text = vcl::render(vcl::VarnishVersion::Seven, plan.delivery, &by_origin, &allow).expect("a VCL");
            std::fs::write(&file, (plan.vcl)(&text, &id, folder.path())).expect("a file");
            if let Some(link) = link {
                return Varnish::spawn_behind(link, folder.path(), &id, &file);
            }
            let listens = if number <= plan.send_proxy { Listens::Proxy } else { Listens::Http };
            Varnish::spawn_for(listens, folder.path(), &id, &file)
        };
        let mut varnish: Vec<Varnish> = (1..=plan.varnish).map(spawn).collect();
        varnish.iter_mut().for_each(Varnish::ready);

        let mut nodes: Vec<(&str, String, SocketAddr)> = Vec::new();
        nodes.extend(varnish.iter().map(|varnish| ("varnish", varnish.id.clone(), varnish.address)));
        nodes.extend(web.iter().enumerate().map(|(index, web)| ("web", format!("web-{}", index + 1), web.address)));
        if let Some(etcd) = etcd.as_ref().filter(|_| plan.registered) {
            for (role, id, address) in nodes.drain(..) {
                etcd.put(&format!("/clearcoat/v1/nodes/{role}/{id}"), &address.to_string());
            }
        }
        let mut links = Vec::new();
        let disk = plan.disk.then(|| Disk::mount(folder.path()));
        let own_way = plan.own_way.then(|| Link::to(&format!("http://{}", varnish[0].address)));
        let purges: Vec<_> = (0..plan.replicas).map(|_| hold(SocketAddr::from(([127, 0, 0, 1], 0)))).collect();
        let peers: Vec<String> =
            purges.iter().map(|socket| address(socket).expect("an IP socket").to_string()).collect();
        let mut clearcoats = origins.iter().enumerate().map(|(number, origin)| {
            let own = own_folder(folder.path(), number);
            std::fs::create_dir_all(&own).expect("a folder");
            let mut listen = vec![*origin];
            listen.extend(slow_link.as_ref().map(|link| link.near(*origin)));
            let journal = disk.as_ref().filter(|_| number == 0).map_or(&own, |disk| &disk.folder).join("journal");
            let mut config = configuration(plan, &listen, &journal, &nodes);
            if let Some(way) = own_way.as_ref().filter(|_| number + 1 == plan.replicas) {
                let by_way = way.endpoint().replace("http://", "");
                config = config.replacen(&varnish[0].address.to_string(), &by_way, 1);
            }
            if plan.etcd == 0 && plan.replicas > 1 {
                let id = number + 1;
                config += &format!("\n[replica]\nid = \"clearcoat-{id}\"\npeers = {peers:?}\n");
                let listen = format!("listen = [\"{}\"]\nack", peers[number]);
                config = config.replacen("listen = [\"127.0.0.1:0\"]\nack", &listen, 1);
            }
            if let Some(etcd) = &etcd {
                // Reserved until clearcoat binds it, like its origin.
                let purge = hold(SocketAddr::from(([127, 0, 0, 1], 0)));
                config += &shared(plan, number, etcd, &purge, &mut links);
                if plan.links {
                    let listen = format!("listen = [\"{}\"]\nack", address(&purge).expect("an IP socket"));
                    config = config.replacen("listen = [\"127.0.0.1:0\"]\nack", &listen, 1);
                }
            }
            let is_last = number > 0 && number + 1 == plan.replicas;
            Clearcoat::start_ahead(plan.ahead.filter(|_| is_last), &own, &config)
        });
        let clearcoat = clearcoats.next().expect("one replica at least");
        let others = clearcoats.collect();
        drop((held, purges));
        Fleet { clearcoat, others, varnish, slow_link, web, shop, etcd, links, own_way, disk, folder }
    }

    /// Waits until every Varnish returns seals to each clearcoat, and began empty.
    pub fn seals(&self) {
        for clearcoat in self.clearcoats() {
            eventually("every Varnish returns seals", || {
                let nodes = clearcoat.nodes();
                nodes.iter().all(|node| node["role"] == "web" || node["seals"] == true).then_some(())
            });
        }
    }

    /// Reads a page through the edge.
    pub fn get(&self, path: &str) -> Answer {
        get(self.clearcoat.edge, path).expect("the edge answers")
    }

    /// Reads a page from each Varnish directly: `HIT` or `MISS` of each.
    pub fn cached(&self, path: &str) -> Vec<String> {
        self.varnish.iter().map(|varnish| varnish.get(path).cache().to_owned()).collect()
    }

    /// Puts a page into the cache of each Varnish.
    pub fn warm(&self, path: &str) {
        for varnish in &self.varnish {
            let answers = [varnish.get(path), varnish.get(path)];
            assert_eq!(answers[1].cache(), "HIT", "{} does not keep {path}: {answers:#?}", varnish.id);
        }
    }

    /// Purges one tag as Magento does.
    pub fn purge_tag(&self, name: &str) -> Answer {
        purge(self.clearcoat.purge, &tag(name)).expect("the purge listener answers")
    }
}

/// A clearcoat's configuration about etcd and itself, through its links.
fn shared(plan: &Plan, number: usize, etcd: &Etcd, purge: &socket2::Socket, links: &mut Vec<Links>) -> String {
    let (mut endpoints, mut address) = (etcd.endpoints(), String::new());
    if plan.links {
        let purge = purge.local_addr().expect("an address").as_socket().expect("an IP socket");
        let own = Links {
            etcd: endpoints.iter().map(|endpoint| Link::to(endpoint)).collect(),
            others: Link::to(&format!("http://{purge}")),
        };
        endpoints = own.etcd.iter().map(Link::endpoint).collect();
        address = own.others.endpoint().replace("http://", "");
        links.push(own);
    }
    format!(
        "\n[registry.etcd]\nendpoints = {endpoints:?}\n{}\n[replica]\nid = \"clearcoat-{}\"\naddress = \"{address}\"\n",
        plan.etcd_keys,
        number + 1
    )
}

/// The first clearcoat uses the fleet's folder, others a subfolder.
fn own_folder(fleet: &Path, number: usize) -> PathBuf {
    match number {
        0 => fleet.to_owned(),
        other => fleet.join(format!("clearcoat-{}", other + 1)),
    }
}

fn configuration(
    plan: &Plan,
    origin: &[SocketAddr],
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
    section(
        "origin",
        format!("listen = {:?}\nguard = {}", origin.iter().map(ToString::to_string).collect::<Vec<_>>(), plan.guard),
    );
    section("purge", format!("listen = [\"127.0.0.1:0\"]\nack_timeout = \"{}\"", plan.ack_timeout));
    section("admin", "listen = [\"127.0.0.1:0\"]".into());
    // The caches are as new as the journal, and many tests count the requests sent to them.
    let first_start = if plan.journal == "memory" { "flush" } else { plan.first_start };
    let keys = [("kind", plan.journal), ("path", &journal.display().to_string()), ("first_start", first_start)];
    section("journal", keys.map(|(key, value)| format!("{key} = \"{value}\"\n")).concat());
    section("health.web", "interval = \"1s\"\ntimeout = \"1s\"".into());
    for (number, (role, id, address)) in nodes.iter().enumerate() {
        write!(config, "\n[[node]]\nrole = \"{role}\"\nid = \"{id}\"\naddress = \"{address}\"\n").expect("memory");
        if *role == "varnish" {
            let delivery = toml::Value::try_from(plan.delivery).expect("a string");
            write!(config, "delivery = {delivery}\nheader_limit = {}\n", plan.header_limit).expect("memory");
        }
        // Varnish nodes come first.
        if number < plan.send_proxy {
            config += "send_proxy = \"v2\"\n";
        }
    }
    config
}
