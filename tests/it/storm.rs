//! A storm of purges: the bans that a Varnish gets.

use std::time::Instant;

use crate::support::client::{purge, tag};
use crate::support::fleet::{Fleet, Plan};

const CLIENTS: u64 = 20;
const EACH: u64 = 25;

#[test]
fn a_storm_of_purges_is_few_bans_and_none_is_missing() {
    let fleet = Fleet::start(&Plan { varnish: 1, web: 1, ..Plan::default() });
    let pages = 1..=CLIENTS * EACH;
    for page in pages.clone().step_by(7).chain([1000]) {
        fleet.warm(&format!("/p/{page}"));
    }
    let began = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let fleet = &fleet;
            scope.spawn(move || {
                for number in 1..=EACH {
                    let pattern = tag(&format!("cat_p_{}", client * EACH + number));
                    let answer = purge(fleet.clearcoat.purge, &pattern).expect("an answer");
                    assert_eq!(answer.json()["applied"], serde_json::json!(["varnish-1"]));
                }
            });
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    let bans = fleet.varnish[0].adm(&["ban.list"]).lines().filter(|line| line.contains("X-Magento-Tags")).count();
    // Twenty a second with a burst of one second, and a few more that the longest wait lets through.
    assert!((bans as f64) <= 20.0 + 20.0 * seconds + 5.0, "{bans} bans in {seconds} s");
    assert!((bans as f64) < (CLIENTS * EACH) as f64 / 2.0, "{bans} bans in {seconds} s");
    for page in pages.step_by(7) {
        assert_eq!(fleet.cached(&format!("/p/{page}")), ["MISS"], "page {page}");
    }
    assert_eq!(fleet.cached("/p/1000"), ["HIT"]);
}
