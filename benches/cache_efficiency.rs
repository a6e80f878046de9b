//! How well three Varnish of limited memory are used: more pages than one can hold, asked for as shoppers do (a Zipf
//! distribution), through clearcoat, through HAProxy with a consistent hash, and through HAProxy in turns. In one run, each in
//! front of Varnish and a web node of its own; and while a Varnish leaves, returns empty, is added, and while one page is 30 %
//! of all that is asked for.

#[path = "../tests/it"]
mod it {
    #[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "written for the tests, which need all of it")]
    pub mod support;
}

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use clearcoat::fleet::PurgeDialect;
use clearcoat::varnish::vcl;

use it::support::clearcoat::Clearcoat;
use it::support::client::{Connection, get};
use it::support::varnish::Varnish;
use it::support::web::{Shop, Web};
use it::support::{eventually, hold};

/// All pages; three Varnish hold about half of them, each a sixth.
const PAGES: usize = 6_000;
/// Page number n is asked for in proportion to n to the power of minus this.
const ZIPF: f64 = 0.9;
const STORAGE: &str = "malloc,2m";
const READERS: u64 = 16;
/// Requests of a phase, by all readers at once.
const REQUESTS: u64 = 16_000;
const RENDERED_WITHIN: Duration = Duration::from_millis(4);

enum Balancer {
    Clearcoat(Box<Clearcoat>),
    Haproxy(Child),
}

impl Drop for Balancer {
    fn drop(&mut self) {
        if let Balancer::Haproxy(child) = self {
            // An error means that it has ended.
            _ = child.kill();
            _ = child.wait();
        }
    }
}

/// A balancer in front of four Varnish, the last of which is not there at first, and a web node.
struct Contender {
    name: &'static str,
    edge: SocketAddr,
    // Dropped in this order.
    _balancer: Balancer,
    varnish: Vec<Varnish>,
    _web: Web,
    shop: Arc<Shop>,
    /// How many there were.
    phases: AtomicU64,
    _folder: tempfile::TempDir,
}

/// What readers got in a phase.
#[derive(Default)]
struct Phase {
    requests: AtomicU64,
    hits: AtomicU64,
    errors: AtomicU64,
}

impl Contender {
    fn start(name: &'static str, balance: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let shop = Arc::new(Shop::default());
        shop.render_within(RENDERED_WITHIN);
        let web = Web::start(&shop);
        let held = hold(SocketAddr::from(([127, 0, 0, 1], 0)));
        let reserved = held.local_addr().expect("an address").as_socket().expect("an IP socket");
        // clearcoat is between Varnish and the web node as well, HAProxy only in front.
        let origin = if balance.is_some() { web.address } else { reserved };
        let allow = ["127.0.0.0/8".parse().expect("a network")];
        let text = vcl::render(vcl::VarnishVersion::Seven, PurgeDialect::Magento, &[origin.into()], &allow);
        let file = folder.path().join("shop.vcl");
        std::fs::write(&file, text.expect("a VCL")).expect("a file");
        let spawn = |number| Varnish::spawn_small(STORAGE, folder.path(), &format!("varnish-{number}"), &file);
        let mut varnish: Vec<Varnish> = (1..=4).map(spawn).collect();
        varnish.iter_mut().for_each(Varnish::ready);
        let balancer = match balance {
            Some(balance) => Balancer::Haproxy(haproxy(folder.path(), reserved, balance, &varnish)),
            None => Balancer::Clearcoat(Box::new(clearcoat(folder.path(), reserved, &varnish, &web))),
        };
        drop(held);
        varnish[3].kill();
        let edge = match &balancer {
            Balancer::Clearcoat(clearcoat) => {
                eventually("all but one Varnish are up", || {
                    let nodes = clearcoat.nodes();
                    let is_up = |id: &str| nodes.iter().any(|node| node["id"] == id && node["health"] == "up");
                    let well = (1..=3).all(|number| is_up(&format!("varnish-{number}")));
                    (well && is_up("web-1") && !is_up("varnish-4")).then_some(())
                });
                clearcoat.edge
            }
            Balancer::Haproxy(_) => {
                eventually("haproxy serves", || {
                    get(reserved, "/p/1").is_ok_and(|page| page.status == 200).then_some(())
                });
                reserved
            }
        };
        Contender {
            name,
            edge,
            _balancer: balancer,
            varnish,
            _web: web,
            shop,
            phases: AtomicU64::new(0),
            _folder: folder,
        }
    }

    /// Readers ask for pages; `hot` is the share of requests that are for one page. Prints what they got.
    fn phase(&self, what: &str, hot: f64, weights: &[f64]) {
        let (phase, renders, began) = (Phase::default(), self.shop.renders.load(SeqCst), Instant::now());
        // Other pages in each phase, and the same ones for each contender.
        let seeds = READERS * self.phases.fetch_add(1, SeqCst);
        let before: Vec<u64> = self.varnish.iter().map(requests_of).collect();
        std::thread::scope(|scope| {
            for reader in 0..READERS {
                let phase = &phase;
                let random = fastrand::Rng::with_seed(seeds + reader);
                scope.spawn(move || self.read(random, hot, weights, phase));
            }
        });
        let took = began.elapsed();
        let renders = self.shop.renders.load(SeqCst) - renders;
        let (requests, hits, errors) =
            (phase.requests.into_inner(), phase.hits.into_inner(), phase.errors.into_inner());
        let of: Vec<u64> =
            self.varnish.iter().zip(before).map(|(now, before)| requests_of(now).saturating_sub(before)).collect();
        let busiest = of.iter().max().copied().unwrap_or_default() as f64 / of.iter().sum::<u64>() as f64;
        println!(
            "{:<38}{:<34}{:>8.1} %{:>10}{:>10.0}{:>8}{:>9.0} %",
            self.name,
            what,
            hits as f64 / requests as f64 * 100.0,
            renders,
            renders as f64 / took.as_secs_f64(),
            errors,
            busiest * 100.0
        );
    }

    fn read(&self, mut random: fastrand::Rng, hot: f64, weights: &[f64], phase: &Phase) {
        let mut connection = None;
        for _ in 0..REQUESTS / READERS {
            let page = if random.f64() < hot { 1 } else { 1 + weights.partition_point(|sum| *sum < random.f64()) };
            let ask = |connection: &mut Option<Connection>| {
                if connection.is_none() {
                    *connection = Some(Connection::open(self.edge)?);
                }
                let open = connection.as_mut().expect("it was opened");
                open.send(format!("GET /p/{page} HTTP/1.1\r\nHost: shop.test\r\n\r\n"))?;
                open.answer(false)
            };
            phase.requests.fetch_add(1, SeqCst);
            match ask(&mut connection) {
                Ok(answer) if answer.status == 200 => {
                    phase.hits.fetch_add(u64::from(answer.cache() == "HIT"), SeqCst);
                }
                _ => {
                    phase.errors.fetch_add(1, SeqCst);
                    connection = None;
                }
            }
        }
    }
}

/// The requests that a Varnish has had since it was started, or 0 if it is not there.
fn requests_of(varnish: &Varnish) -> u64 {
    if varnish.worker().is_empty() { 0 } else { varnish.counter("MAIN.client_req") }
}

fn haproxy(folder: &Path, address: SocketAddr, balance: &str, varnish: &[Varnish]) -> Child {
    let servers =
        varnish.iter().map(|node| format!("    server {} {} check inter 1s fall 2 rise 2\n", node.id, node.address));
    let config = format!(
        "global\n    nbthread 2\ndefaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n    \
         option redispatch 1\n    retries 3\n    http-reuse always\nfrontend edge\n    bind {address}\n    default_backend varnish\n\
         backend varnish\n{balance}    option httpchk\n    http-check send meth PURGE uri /.clearcoat/probe\n    \
         http-check expect status 200\n{}",
        servers.collect::<String>()
    );
    let file = folder.join("haproxy.cfg");
    std::fs::write(&file, config).expect("a file");
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("haproxy is installed (make bench installs it)")
}

fn clearcoat(folder: &Path, origin: SocketAddr, varnish: &[Varnish], web: &Web) -> Clearcoat {
    let mut config = format!(
        "[edge]\nlisten = [\"127.0.0.1:0\"]\n[purge]\nlisten = [\"127.0.0.1:0\"]\n[admin]\nlisten = [\"127.0.0.1:0\"]\n\
         [origin]\nlisten = [\"{origin}\"]\n[health.web]\ninterval = \"1s\"\ntimeout = \"1s\"\n[journal]\nkind = \"memory\"\n\
         [log]\nlevel = \"info\"\nformat = \"json\"\n"
    );
    for (role, id, address) in
        varnish.iter().map(|node| ("varnish", node.id.as_str(), node.address)).chain([("web", "web-1", web.address)])
    {
        config += &format!("[[node]]\nrole = \"{role}\"\nid = \"{id}\"\naddress = \"{address}\"\n");
    }
    Clearcoat::start(folder, &config)
}

fn main() {
    let mut weights: Vec<f64> = (1..=PAGES).map(|page| (page as f64).powf(-ZIPF)).collect();
    let total: f64 = weights.iter().sum();
    let mut sum = 0.0;
    for weight in &mut weights {
        sum += *weight / total;
        *weight = sum;
    }
    println!(
        "{PAGES} pages (Zipf {ZIPF}) of which three Varnish ({STORAGE} each) hold a part, {READERS} readers, {REQUESTS} requests a phase\n"
    );
    println!("{:<38}{:<34}{:>10}{:>10}{:>10}{:>8}{:>11}", "", "", "hits", "renders", "a second", "errors", "busiest");
    let uri = "    balance uri whole\n    hash-type consistent\n";
    let bounded = "    balance uri whole\n    hash-type consistent\n    hash-balance-factor 125\n";
    let mut contenders = [
        Contender::start("clearcoat", None),
        Contender::start("haproxy, uri, consistent", Some(uri)),
        Contender::start("haproxy, the same, balance factor 125", Some(bounded)),
        Contender::start("haproxy, round robin", Some("    balance roundrobin\n")),
    ];
    for contender in &mut contenders {
        contender.phase("(they fill)", 0.0, &weights);
        contender.phase("(they fill)", 0.0, &weights);
        contender.phase("three Varnish", 0.0, &weights);
        contender.varnish[2].kill();
        contender.phase("one of them was killed", 0.0, &weights);
        contender.varnish[2].restart();
        contender.phase("it is back, and empty", 0.0, &weights);
        contender.varnish[3].restart();
        contender.phase("a fourth one is added", 0.0, &weights);
        contender.phase("four Varnish", 0.0, &weights);
        contender.phase("one page is 30 % of all", 0.3, &weights);
    }
}
