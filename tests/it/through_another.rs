//! Pages that are on their way to a Varnish through one clearcoat while another one takes their purge.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Instant;

use crate::support::clearcoat::Clearcoat;
use crate::support::client::{Answer, get, purge, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::upstream::{Gate, Then, Upstream};

/// What a web node sends of a page before its gate: more than the sockets between it and a Varnish hold, so that the page has
/// passed the clearcoat when all of it is sent.
const FIRST_PART: usize = 12 << 20;

const PAGE: &str = "/through-the-last/1";

/// Several clearcoats, a Varnish that the last of them cannot tell of purges but that fetches through it, and a web node
/// whose first page is slow: it stops in the middle.
struct Rig {
    fleet: Fleet,
    version: Arc<AtomicU64>,
    /// Open when the first part of the page has passed.
    passed: Gate,
    /// Opened for the rest of it.
    rest: Gate,
    _web: Upstream,
}

impl Rig {
    fn start(plan: &Plan) -> Self {
        let (version, passed, rest) = (Arc::new(AtomicU64::new(1)), Gate::default(), Gate::default());
        let (now, first_has_passed, may_end) = (Arc::clone(&version), passed.clone(), rest.clone());
        let web = Upstream::start(move |call| {
            if call.path() != PAGE {
                return call.send_then("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", Then::KeepAlive);
            }
            let version = now.load(Ordering::SeqCst);
            let length = if version == 1 { FIRST_PART + 1 } else { 1 };
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nCache-Control: public, max-age=86400\r\n\
                 X-Magento-Tags: cat_p_1,cat_p\r\nContent-Length: {length}\r\n\r\n{version}"
            );
            if version != 1 {
                return call.send_then(head, Then::KeepAlive);
            }
            if call.send(head).and_then(|()| call.send(vec![b'.'; FIRST_PART - 1])).is_err() {
                return Then::Close;
            }
            first_has_passed.open();
            if !call.wait(&may_end) {
                return Then::Close;
            }
            call.send_then(".", Then::KeepAlive)
        });
        // The page of a trial would go through the first one.
        let node = format!(
            "[health.varnish]\ntrial = false\n[[node]]\nrole = \"web\"\nid = \"slow\"\naddress = \"{}\"\n",
            web.address
        );
        let fleet =
            Fleet::start(&Plan { varnish: 1, web: 0, own_way: true, config: node.leak(), vcl: by_path, ..*plan });
        let rig = Rig { fleet, version, passed, rest, _web: web };
        rig.cut();
        rig
    }

    /// Cuts the last clearcoat off from the Varnish, and waits until it has noticed.
    fn cut(&self) {
        self.fleet.own_way.as_ref().expect("a plan with it").cut();
        eventually("the last one has noticed, and all confirm", || {
            let answer = purge_by(&self.fleet.clearcoat, "before");
            let has_noticed = self.last().node("varnish-1")["current"] == false;
            (has_noticed && answer["unconfirmed"].is_null()).then_some(())
        });
        eventually("the others serve", || {
            let mut others = self.fleet.clearcoats().take(1 + self.fleet.others.len() - 1);
            others.all(is_current).then_some(())
        });
    }

    fn last(&self) -> &Clearcoat {
        self.fleet.others.last().expect("several clearcoats")
    }

    /// Has the Varnish fetch the page, and purges it when it is on its way. Gives what reads the page and the purge's answer.
    fn purge_on_the_way<'s>(
        &'s self,
        scope: &'s std::thread::Scope<'s, '_>,
    ) -> (ScopedJoinHandle<'s, Answer>, serde_json::Value) {
        let fetch = scope.spawn(|| self.fleet.varnish[0].get(PAGE));
        self.passed.wait("the first part of the page has passed");
        self.version.store(2, Ordering::SeqCst);
        (fetch, purge_by(&self.fleet.clearcoat, "cat_p_1"))
    }
}

/// Has the page fetched through the last clearcoat, and all else through the first.
fn by_path(vcl: &str, _: &str, _: &Path) -> String {
    let last = vcl.matches("backend origin_").count();
    let any = "set req.backend_hint = origins.backend();";
    assert!(last > 1 && vcl.contains(any), "{vcl}");
    let by_path = format!(
        "set req.backend_hint = origin_1; if (req.url ~ \"^/through-the-last/\") {{ set req.backend_hint = origin_{last}; }}"
    );
    vcl.replacen(any, &format!("{any} {by_path}"), 1)
}

fn purge_by(clearcoat: &Clearcoat, name: &str) -> serde_json::Value {
    let answer = purge(clearcoat.purge, &tag(name)).expect("the purge listener answers");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn is_current(clearcoat: &Clearcoat) -> bool {
    clearcoat.node("varnish-1")["current"] == true
}

/// A reader behind a clearcoat, and what it got.
#[derive(Default)]
struct Reads {
    all: AtomicUsize,
    old: AtomicUsize,
    stop: AtomicBool,
}

impl Reads {
    /// Reads on and on until it is to stop.
    fn run(&self, clearcoat: &Clearcoat) {
        while !self.stop.load(Ordering::SeqCst) {
            let answer = get(clearcoat.edge, PAGE).expect("the edge answers");
            let is_old = answer.status == 200 && !answer.text().starts_with('2');
            self.old.fetch_add(usize::from(is_old), Ordering::SeqCst);
            self.all.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Stops when this is dropped, also where a test fails.
    fn ends(&self) -> impl Drop + '_ {
        struct Ends<'r>(&'r Reads);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.stop.store(true, Ordering::SeqCst);
            }
        }
        Ends(self)
    }

    /// Waits for some more reads, and stops. Gives how many old pages there were of how many.
    fn end(&self) -> (usize, usize) {
        let before = self.all.load(Ordering::SeqCst);
        eventually("there are more reads", || (self.all.load(Ordering::SeqCst) > before + 20).then_some(()));
        self.stop.store(true, Ordering::SeqCst);
        (self.old.load(Ordering::SeqCst), self.all.load(Ordering::SeqCst))
    }
}

fn plans(replicas: usize) -> [Plan; 2] {
    // Long enough for whoever answers at all on a busy machine.
    let plan = || Plan { replicas, ack_timeout: "4s", ..Plan::default() };
    [plan(), Plan { etcd: 1, journal: "etcd", ..plan() }]
}

#[test]
fn a_page_that_lands_through_another_clearcoat_is_not_served() {
    for plan in plans(2) {
        let rig = Rig::start(&plan);
        let (fleet, reads) = (&rig.fleet, Reads::default());
        std::thread::scope(|scope| {
            let (fetch, answer) = rig.purge_on_the_way(scope);
            assert_eq!(answer["fenced_at"], serde_json::json!({"clearcoat-2": ["varnish-1"]}), "{answer}");
            assert!(answer["unconfirmed"].is_null(), "{answer}");
            let _ends = reads.ends();
            scope.spawn(|| reads.run(&fleet.clearcoat));
            fleet.clearcoat.log().waits_for("on its way through another replica");
            let was_current = is_current(&fleet.clearcoat);
            let problem = fleet.clearcoat.node("varnish-1")["delivery_error"].to_string();
            rig.rest.open();
            assert_eq!(fetch.join().expect("a reader").status, 200);
            fleet.clearcoat.current();
            // Had it the old page, it would have it for good: who passed it on cannot tell it.
            let last = fleet.varnish[0].get(PAGE);
            let (old, all) = reads.end();
            assert_eq!(old, 0, "of {all} pages");
            assert!(!was_current && problem.contains("through clearcoat-2"), "{problem}");
            assert!(last.text().starts_with('2'), "{} bytes", last.body.len());
        });
        // What it was held back for is over.
        let answer = purge_by(&fleet.clearcoat, "cat_p_1");
        assert_eq!(answer["fenced_at"], serde_json::json!({"clearcoat-2": ["varnish-1"]}), "{answer}");
        assert!(is_current(&fleet.clearcoat));
    }
}

#[test]
fn a_node_counts_again_when_the_clearcoat_is_killed_that_passed_its_page() {
    for plan in plans(2) {
        let mut rig = Rig::start(&plan);
        std::thread::scope(|scope| {
            // The page dies with its clearcoat, and is fetched through the other one.
            let fetch = scope.spawn({
                let varnish = rig.fleet.varnish[0].address;
                move || get(varnish, PAGE).expect("varnishd answers")
            });
            rig.passed.wait("the first part of the page has passed");
            rig.version.store(2, Ordering::SeqCst);
            purge_by(&rig.fleet.clearcoat, "cat_p_1");
            assert!(!is_current(&rig.fleet.clearcoat));
            rig.fleet.replica(1).kill();
            rig.fleet.clearcoat.current();
            let answer = fetch.join().expect("a reader");
            assert!(answer.status != 200 || answer.text().starts_with('2'), "{}", answer.status);
        });
        assert_eq!(rig.fleet.get(PAGE).text(), "2");
    }
}

#[test]
fn a_third_clearcoat_holds_back_a_node_though_the_one_that_told_it_dies() {
    for plan in plans(3) {
        let mut rig = Rig::start(&plan);
        let reads = Reads::default();
        let rest = rig.rest.clone();
        std::thread::scope(|scope| {
            let varnish = rig.fleet.varnish[0].address;
            let fetch = scope.spawn(move || get(varnish, PAGE).expect("varnishd answers"));
            rig.passed.wait("the first part of the page has passed");
            rig.version.store(2, Ordering::SeqCst);
            let answer = purge_by(&rig.fleet.clearcoat, "cat_p_1");
            assert!(answer["unconfirmed"].is_null(), "{answer}");
            rig.fleet.clearcoat.kill();
            let third = &rig.fleet.others[0];
            let _ends = reads.ends();
            scope.spawn(|| reads.run(third));
            third.log().waits_for("on its way through another replica");
            let was_current = is_current(third);
            rest.open();
            assert_eq!(fetch.join().expect("a reader").status, 200);
            third.current();
            let last = rig.fleet.varnish[0].get(PAGE);
            let (old, all) = reads.end();
            assert_eq!(old, 0, "of {all} pages");
            assert!(!was_current);
            assert!(last.text().starts_with('2') || last.status != 200, "{}", last.status);
        });
    }
}

#[test]
fn a_clearcoat_that_ends_in_order_is_asked_until_its_pages_have_passed() {
    let [plan, _] = plans(2);
    let rig = Rig::start(&plan);
    let (fleet, reads) = (&rig.fleet, Reads::default());
    std::thread::scope(|scope| {
        let (fetch, answer) = rig.purge_on_the_way(scope);
        assert_eq!(answer["fenced_at"], serde_json::json!({"clearcoat-2": ["varnish-1"]}), "{answer}");
        rig.last().terminate();
        eventually("it takes no readers", || get(rig.last().edge, PAGE).is_err().then_some(()));
        let _ends = reads.ends();
        scope.spawn(|| reads.run(&fleet.clearcoat));
        // It is told of purges, too, as long as its pages pass.
        let answer = purge_by(&fleet.clearcoat, "cat_p_2");
        assert!(answer["unconfirmed"].is_null(), "{answer}");
        assert!(!is_current(&fleet.clearcoat));
        rig.rest.open();
        assert_eq!(fetch.join().expect("a reader").status, 200);
        fleet.clearcoat.current();
        let last = fleet.varnish[0].get(PAGE);
        let (old, all) = reads.end();
        assert_eq!(old, 0, "of {all} pages");
        assert!(last.text().starts_with('2'), "{} bytes", last.body.len());
    });
}

#[test]
fn a_storm_of_purges_keeps_no_node_back_when_the_page_has_landed() {
    let [plan, _] = plans(2);
    let rig = Rig::start(&plan);
    let (fleet, reads, longest_ms) = (&rig.fleet, Reads::default(), AtomicU64::new(0));
    let purges = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (fetch, _) = rig.purge_on_the_way(scope);
        let _ends = reads.ends();
        scope.spawn(|| reads.run(&fleet.clearcoat));
        for sender in 0..8 {
            let (reads, purges, longest_ms) = (&reads, &purges, &longest_ms);
            scope.spawn(move || {
                for number in 0.. {
                    if reads.stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let began = Instant::now();
                    // The first of them concerns the page, and so do others behind it.
                    purge_by(&fleet.clearcoat, &format!("cat_p_{}", 1 + number * sender % 50));
                    longest_ms.fetch_max(began.elapsed().as_millis() as u64, Ordering::SeqCst);
                    purges.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        eventually("there is a storm", || (purges.load(Ordering::SeqCst) > 500).then_some(()));
        // Nobody waits for a node that is held back: that would be for all of `ack_timeout`.
        let longest_ms = longest_ms.load(Ordering::SeqCst);
        assert!(longest_ms < 3_500, "{longest_ms}");
        assert!(!is_current(&fleet.clearcoat));
        rig.rest.open();
        assert_eq!(fetch.join().expect("a reader").status, 200);
        fleet.clearcoat.current();
        let (old, all) = reads.end();
        assert_eq!(old, 0, "of {all} pages");
    });
    fleet.clearcoat.current();
    assert!(fleet.varnish[0].get(PAGE).text().starts_with('2'));
}
