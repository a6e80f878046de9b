//! Members that die, and members that hang.

use super::rig::{Rig, plan};

/// Any other member.
fn another(leader: usize) -> usize {
    (leader + 1) % 3
}

#[test]
fn members_that_are_killed_cost_no_purge_and_no_reader_an_old_page() {
    let mut rig = Rig::start(&plan());
    for (what, choose) in
        [("a follower is killed", another as fn(usize) -> usize), ("the leader is killed", |leader| leader)]
    {
        let member = choose(rig.fleet.etcd().leader());
        rig.fleet.etcd().kill(member);
        rig.recovers(what);
        rig.suffer();
        rig.fleet.etcd().restart(member);
        rig.fleet.etcd().healthy();
    }
    rig.fleet.etcd().kill_all();
    rig.suffer();
    assert!(rig.fleet.clearcoats().any(|clearcoat| clearcoat.fleet()["spooled"] != 0));
    rig.fleet.etcd().restart_all();
    rig.recovers("all members are killed, and started again");
    rig.more(6);
    rig.ends("members are killed");
}

#[test]
fn members_that_hang_cost_no_purge_and_no_reader_an_old_page() {
    let mut rig = Rig::start(&plan());
    for (what, choose) in [("a follower hangs", another as fn(usize) -> usize), ("the leader hangs", |leader| leader)] {
        let member = choose(rig.fleet.etcd().leader());
        rig.fleet.etcd().hang(member);
        rig.suffer();
        rig.recovers(what);
        rig.fleet.etcd().resume(member);
        rig.fleet.etcd().healthy();
    }
    (0..3).for_each(|member| rig.fleet.etcd().hang(member));
    rig.suffer();
    assert!(rig.fleet.clearcoats().any(|clearcoat| clearcoat.fleet()["spooled"] != 0));
    (0..3).for_each(|member| rig.fleet.etcd().resume(member));
    rig.recovers("all members hang, and go on");
    rig.more(6);
    rig.ends("members hang");
}
