//! Refusals of etcd: without a password, and without space.

use super::rig::{PURGES, REPLICAS, Rig, plan};
use crate::support::clearcoat::run;
use crate::support::etcd::access::Access;
use crate::support::eventually;
use crate::support::fleet::Plan;

#[test]
fn least_privileges_suffice_and_passwords_change_during_purges() {
    let password = tempfile::NamedTempFile::new().expect("a file");
    let write = |text: &str| std::fs::write(password.path(), text).expect("our file");
    write("first\n");
    let keys = format!("username = \"clearcoat\"\npassword_file = {:?}", password.path().display().to_string());
    let mut rig = Rig::start(&Plan { etcd_keys: keys.leak(), ..plan() });
    // As in the manual.
    let privileges = [
        ("/clearcoat/v1/nodes/", Access::Read),
        ("/clearcoat/v1/overrides/", Access::ReadWrite),
        (PURGES, Access::ReadWrite),
        ("/clearcoat/v1/cursors/", Access::ReadWrite),
        (REPLICAS, Access::ReadWrite),
    ];
    rig.fleet.etcd().add_user("clearcoat", "first", &privileges);
    rig.fleet.etcd().enable_auth("secret");
    rig.recovers("etcd asks for passwords");
    rig.fleet.etcd().restart_all();
    rig.recovers("and everybody has to connect again");
    write("second\n");
    rig.fleet.etcd().change_password("clearcoat", "second");
    rig.recovers("another password, first in the file");
    rig.fleet.etcd().change_password("clearcoat", "third");
    rig.fleet.etcd().restart_all();
    for clearcoat in rig.fleet.clearcoats() {
        eventually("the old password is refused", || clearcoat.log().has("authentication failed").then_some(()));
    }
    rig.suffer();
    write("third\n");
    rig.recovers("another password, last in the file");
    // Everything that a replica does in etcd.
    let admin = format!("http://{}", rig.fleet.clearcoat.admin);
    for (order, kept) in [("5", 1), ("registered", 0)] {
        let arguments =
            ["node", "weight", "web-1", order, "--admin", &admin, "--token-file", "tests/it/data/operator-token"];
        let output = run(&arguments);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(rig.fleet.etcd().list("/clearcoat/v1/overrides/").len(), kept);
    }
    let lease = rig.fleet.etcd().entry(&format!("{REPLICAS}clearcoat-1")).expect("a replica").lease();
    rig.fleet.etcd().revoke(lease);
    eventually("a replica is registered again", || rig.fleet.etcd().get(&format!("{REPLICAS}clearcoat-1")));
    let cursors = rig.fleet.etcd().list("/clearcoat/v1/cursors/");
    assert_eq!(cursors.len(), 2, "{cursors:?}");
    eventually("cursors are written", || (rig.fleet.etcd().list("/clearcoat/v1/cursors/") != cursors).then_some(()));
    rig.ends("passwords");
    for clearcoat in rig.fleet.clearcoats() {
        assert!(!clearcoat.log().has("permission denied"), "a privilege is missing");
    }
}

#[test]
fn purges_are_spooled_while_etcd_is_full_and_uploaded_once_it_has_room() {
    let mut rig = Rig::start(&Plan { etcd_quota: Some(4 << 20), ..plan() });
    rig.fleet.etcd().fill();
    rig.suffer();
    assert!(rig.fleet.clearcoats().any(|clearcoat| clearcoat.fleet()["spooled"] != 0), "nothing was spooled");
    rig.fleet.etcd().free();
    rig.recovers("etcd was full, and has room");
    rig.more(6);
    rig.ends("etcd is full");
}
