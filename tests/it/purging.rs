//! Purges end to end: Magento's own bytes, real varnishd.

use crate::support::fleet::{Fleet, Plan};

#[test]
fn a_purged_page_is_rendered_again_and_others_stay() {
    let fleet = Fleet::start(&Plan::default());
    for page in ["/p/1", "/p/2"] {
        assert_eq!(fleet.get(page).cache(), "MISS");
        assert_eq!(fleet.get(page).cache(), "HIT");
    }
    fleet.shop.set(1, 7);
    let answer = fleet.purge_tag("cat_p_1");
    assert_eq!((answer.status, answer.json()["applied"].as_array().unwrap().len()), (200, 3));
    let page = fleet.get("/p/1");
    assert_eq!((page.cache(), page.text()), ("MISS", "7"));
    assert_eq!(fleet.get("/p/2").cache(), "HIT");
}
