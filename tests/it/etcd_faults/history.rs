//! History that etcd has lost: by a compaction, and by restoring a backup.

use super::rig::{PURGES, Rig, plan};
use crate::support::etcd::backup::ClusterId;
use crate::support::etcd::link::Link;
use crate::support::eventually;
use crate::support::fleet::Plan;

#[test]
fn purges_compacted_while_a_replica_was_cut_off_are_in_both_journals() {
    let mut rig = Rig::start(&Plan { links: true, ..plan() });
    rig.fleet.links[1].etcd.iter().for_each(|link| link.cut());
    rig.suffer();
    let revision = rig.fleet.etcd().revision();
    rig.fleet.etcd().compact(revision);
    rig.more(2);
    rig.fleet.links[1].etcd.iter_mut().for_each(|link| link.mend());
    rig.recovers("compacted while a replica was cut off");
    rig.more(6);
    rig.ends("compacted while a replica was cut off");
}

#[test]
fn purges_that_a_restored_etcd_has_lost_are_there_again() {
    for id in [ClusterId::Kept, ClusterId::New] {
        let mut rig = Rig::start(&plan());
        rig.more(5);
        let backup = rig.fleet.etcd().snapshot();
        rig.more(10);
        let before: Vec<u64> = heads(&rig);
        rig.fleet.etcd().restore(&backup, id);
        rig.recovers(&format!("restored, the cluster's id {id:?}"));
        rig.more(6);
        let after = heads(&rig);
        assert!(before.iter().zip(&after).all(|(before, after)| before < after), "{before:?} {after:?}");
        rig.ends(&format!("restored, the cluster's id {id:?}"));
        // A replica that starts from nothing has the same journal in the end.
        let names = rig.in_etcd();
        std::fs::remove_dir_all(rig.fleet.journal_of(1)).expect("our folder");
        rig.fleet.replica(1).restart();
        rig.fleet.others[0].opened();
        rig.holds_all(1, &names);
    }
}

#[test]
fn purges_of_two_histories_of_one_length_are_all_in_every_journal() {
    // Purges from etcd are published without the disk if that takes a quarter of the timeout: here the disk is what is looked at.
    let mut rig = Rig::start(&Plan { links: true, ack_timeout: "20s", ..plan() });
    rig.more(5);
    let backup = rig.fleet.etcd().snapshot();
    rig.more(5);
    let of_another = rig.fleet.etcd().list(PURGES).into_values().next().expect("a purge");
    rig.fleet.links.iter_mut().flat_map(|links| &mut links.etcd).for_each(Link::close);
    rig.fleet.etcd().restore(&backup, ClusterId::Kept);
    // As if by an unknown replica. Neither a revision nor the length of the log shows it.
    rig.others = 60;
    for number in 0..rig.others {
        rig.fleet.etcd().put(&format!("{PURGES}0190c0000000-00000000000000aa-{number:x}"), &of_another);
    }
    rig.fleet.links.iter_mut().flat_map(|links| &mut links.etcd).for_each(Link::mend);
    rig.recovers("another history of the same length");
    rig.more(6);
    rig.ends("another history of the same length");
}

fn heads(rig: &Rig) -> Vec<u64> {
    rig.fleet.clearcoats().map(|clearcoat| clearcoat.fleet()["head"].as_u64().expect("a position")).collect()
}

#[test]
fn an_unreadable_purge_purges_everything_other_bad_records_are_ignored() {
    let mut rig = Rig::start(&plan());
    let etcd = rig.fleet.etcd();
    for neighbour in
        ["/clearcoat/v1/purges2/x", "/clearcoat/v10/purges/x", "/clearcoat/v1/purges", "/clearcoat/v1/purget"]
    {
        etcd.put(neighbour, "of somebody else");
    }
    etcd.put("/clearcoat/v1/cursors/varnish-1", "garbage");
    etcd.put("/clearcoat/v1/cursors/not an id", "{}");
    etcd.put("/clearcoat/v1/replicas/garbage", "10.0.0.1:80");
    rig.more(6);
    for clearcoat in rig.fleet.clearcoats() {
        eventually("a strange replica is said", || clearcoat.log().has("this is no replica").then_some(()));
        assert!(!clearcoat.log().has("no purge that this version knows"), "a neighbour was taken for a purge");
        assert_eq!(clearcoat.fleet()["replicas"].as_array().expect("replicas").len(), 2);
    }
    rig.ends("garbage");
    rig.fleet.replica(0).restart();
    rig.fleet.replica(1).restart();
    rig.fleet.clearcoats().for_each(|clearcoat| clearcoat.opened());
    // An unreadable purge drops this page, which no other purge names.
    rig.fleet.warm("/p/9");
    rig.fleet.etcd().put(&format!("{PURGES}garbage"), "no JSON");
    for varnish in &rig.fleet.varnish {
        eventually("everything was dropped", || (varnish.get("/p/9").cache() == "MISS").then_some(()));
    }
    for clearcoat in rig.fleet.clearcoats() {
        eventually("it is said", || clearcoat.log().has("no purge that this version knows").then_some(()));
        clearcoat.log().waits_for("connected to etcd");
    }
}
