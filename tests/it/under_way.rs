//! Pages in flight to a Varnish when their purge is answered: over a link that is slow, loses packets, or holds the
//! origin's data.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::client::Answer;
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::slow_link::{Quality, is_possible};
use crate::support::upstream::{Then, Upstream};

/// One segment or a few, several windows, and longer than the hold limit.
const SIZES: [usize; 4] = [2_000, 60_000, 900_000, 3 << 20];

/// A Varnish behind a link, and a web node whose pages have the length given by their path and begin with a version.
struct Rig {
    fleet: Fleet,
    version: Arc<AtomicU64>,
    _web: Upstream,
}

impl Rig {
    fn start(quality: Quality) -> Self {
        let version = Arc::new(AtomicU64::new(1));
        let now = Arc::clone(&version);
        let web = Upstream::start(move |call| {
            let path = call.path().to_owned();
            let mut numbers = path.split('/').filter_map(|part| part.parse::<usize>().ok());
            let (size, page) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
            let version = now.load(Ordering::SeqCst);
            call.send_then(
                format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nCache-Control: public, max-age=86400\r\n\
                     X-Magento-Tags: cat_p_{size}_{page},cat_p\r\nContent-Length: {}\r\n\r\n{version} {}",
                    size + 2,
                    ".".repeat(size)
                ),
                Then::KeepAlive,
            )
        });
        // The page of a trial would be held, too.
        let node = format!(
            "[health.varnish]\ntrial = false\n[[node]]\nrole = \"web\"\nid = \"long\"\naddress = \"{}\"\n",
            web.address
        );
        let plan = Plan { varnish: 1, web: 0, slow_link: Some(quality), config: node.leak(), ..Plan::default() };
        Rig { fleet: Fleet::start(&plan), version, _web: web }
    }

    /// The page on a Varnish and behind the edge.
    fn everywhere(&self, path: &str) -> Vec<String> {
        let reads = [self.fleet.get(path), self.fleet.varnish[0].get(path), self.fleet.get(path)];
        reads.iter().map(version).collect()
    }
}

fn version(answer: &Answer) -> String {
    answer.text().split(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn a_page_in_flight_when_its_purge_is_answered_is_not_served_afterwards() {
    if !is_possible() {
        return;
    }
    let rig = Rig::start(Quality { delay: Duration::from_millis(2), one_lost_in: 0, seed: 1 });
    let (fleet, link) = (&rig.fleet, rig.fleet.slow_link.as_ref().expect("the plan has one"));
    for (page, size) in SIZES.into_iter().enumerate() {
        // The fetch leaves a connection for the next one, so that no handshake is held.
        fleet.get(&format!("/10/{page}"));
        rig.version.store(1, Ordering::SeqCst);
        let path = format!("/{size}/{page}");
        let held = link.hold(fleet.clearcoat.origin.port());
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| fleet.get(&path));
            eventually("the page is on the wire", || (link.held_bytes() >= size.min(10_000) as u64).then_some(()));
            rig.version.store(2, Ordering::SeqCst);
            let answer = fleet.purge_tag(&format!("cat_p_{size}_{page}"));
            assert_eq!(answer.status, 200, "{size}");
            assert_eq!(fleet.clearcoat.node("varnish-1")["current"], false, "{size}: {}", answer.text());
            drop(held);
            assert_eq!(reader.join().expect("a reader").status, 200, "{size}");
        });
        fleet.clearcoat.current();
        assert_eq!(rig.everywhere(&path), ["2", "2", "2"], "{size}");
    }
}

#[test]
fn a_page_that_has_arrived_holds_up_no_purge() {
    if !is_possible() {
        return;
    }
    let rig = Rig::start(Quality { delay: Duration::from_millis(2), one_lost_in: 0, seed: 1 });
    for (page, size) in SIZES.into_iter().enumerate() {
        rig.fleet.get(&format!("/{size}/{page}"));
        rig.version.store(2, Ordering::SeqCst);
        let answer = rig.fleet.purge_tag(&format!("cat_p_{size}_{page}"));
        assert_eq!(answer.json()["applied"][0], "varnish-1", "{size}: {}", answer.text());
        assert_eq!(rig.everywhere(&format!("/{size}/{page}")), ["2", "2", "2"], "{size}");
        rig.version.store(1, Ordering::SeqCst);
    }
}

/// Purges arrive at any moment of a fetch that takes some round trips, more with lost packets.
#[test]
fn a_link_that_is_slow_and_loses_packets_keeps_no_old_page() {
    if !is_possible() {
        return;
    }
    let seed = fastrand::u64(..100_000_000);
    let rig = Rig::start(Quality { delay: Duration::from_millis(20), one_lost_in: 100, seed });
    let mut random = fastrand::Rng::with_seed(seed);
    for page in 0..8 {
        rig.version.store(1, Ordering::SeqCst);
        let moments: Vec<_> = SIZES.iter().map(|_| Duration::from_millis(random.u64(20..400))).collect();
        std::thread::scope(|scope| {
            for (size, moment) in SIZES.into_iter().zip(moments) {
                let rig = &rig;
                scope.spawn(move || {
                    let path = format!("/{size}/{page}");
                    let reader = scope.spawn(move || rig.fleet.get(&format!("/{size}/{page}")));
                    // No gate: any moment is a case of its own.
                    std::thread::sleep(moment);
                    rig.version.store(2, Ordering::SeqCst);
                    assert_eq!(rig.fleet.purge_tag(&format!("cat_p_{size}_{page}")).status, 200);
                    let after = rig.fleet.get(&path);
                    assert_eq!(
                        version(&after),
                        "2",
                        "seed {seed}, {size}, purged after {moment:?}: {:?}",
                        after.cache()
                    );
                    reader.join().expect("a reader");
                    assert_eq!(version(&rig.fleet.get(&path)), "2", "seed {seed}, {size}, purged after {moment:?}");
                });
            }
        });
        rig.fleet.clearcoat.current();
        SIZES.iter().for_each(|size| {
            assert_eq!(rig.everywhere(&format!("/{size}/{page}")), ["2", "2", "2"], "seed {seed}, {size}");
        });
    }
}
