//! The documented ways to register a node without the agent, against a real etcd.

use std::process::{Command, Stdio};

use crate::support::agent::{Agent, is, is_gone, record, recorded};
use crate::support::etcd::Etcd;
use crate::support::eventually;

/// How many refreshes of a lease prove that it is kept alive.
const REFRESHES: usize = 3;

/// The example's command, for one node.
fn example(program: &str, etcd: &Etcd) -> Command {
    let file = format!("{}/examples/register.{program}", env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(if program == "sh" { "sh" } else { "php" });
    command.arg(file).env("ETCD", etcd.endpoint(0)).env("ROLE", "web").env("ID", "web-1");
    command.env("ADDRESS", "10.0.0.5:80").env("TTL", "3").env("DRAIN", "1").stdin(Stdio::null());
    command
}

/// Waits until a lease was refreshed several times.
fn is_kept(etcd: &Etcd, lease: i64) {
    let (mut before, mut refreshes) = (0, 0);
    eventually("the lease is refreshed", || {
        let left = etcd.lease_ttl(lease).expect("a lease");
        refreshes += usize::from(left > before);
        before = left;
        (refreshes > REFRESHES).then_some(())
    });
}

fn runs_until_it_is_told_to_end(program: &str) {
    let mut etcd = Etcd::start();
    let mut command = example(program, &etcd);
    command.arg("run");
    let mut node = Agent::spawn(command);
    let first = is(&etcd, "web/web-1", "up");
    assert_eq!(first.value, serde_json::json!({"address": "10.0.0.5:80", "state": "up"}));
    is_kept(&etcd, first.lease);

    etcd.revoke(first.lease);
    let second = recorded(&etcd, "web/web-1", "is back", |record| record.lease != first.lease);
    etcd.kill(0);
    eventually("etcd is missed", || node.log().has("it is tried again").then_some(()));
    etcd.restart(0);
    is_kept(&etcd, second.lease);

    node.signal("-TERM");
    is(&etcd, "web/web-1", "drain");
    assert_eq!(node.status(), 0);
    assert!(record(&etcd, "web/web-1").is_none());
    assert_eq!(etcd.lease_ttl(second.lease), None);
}

#[test]
fn the_shell_script_keeps_a_node_until_it_is_told_to_end() {
    runs_until_it_is_told_to_end("sh");
}

#[test]
fn the_php_script_keeps_a_node_until_it_is_told_to_end() {
    runs_until_it_is_told_to_end("php");
}

#[test]
fn both_scripts_register_and_deregister_step_by_step() {
    let mut etcd = Etcd::start();
    for program in ["sh", "php"] {
        let step = |etcd: &Etcd, step: &str, lease: &str| {
            let output = example(program, etcd).env("LEASE", lease).arg(step).output().expect("the example");
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
            (output.status.code(), text(&output.stdout), text(&output.stderr))
        };
        let (status, lease, error) = step(&etcd, "register", "");
        assert_eq!((status, error.as_str()), (Some(0), ""), "{program}");
        assert_eq!(is(&etcd, "web/web-1", "up").lease.to_string(), lease);
        let (status, same, _) = step(&etcd, "refresh", &lease);
        assert_eq!((status, &same), (Some(0), &lease), "{program}");
        etcd.revoke(lease.parse().expect("a lease"));
        let (_, other, _) = step(&etcd, "refresh", &lease);
        assert_eq!(is(&etcd, "web/web-1", "up").lease.to_string(), other);
        assert_ne!(other, lease);

        // A key that another client has written meanwhile stays.
        let stranger = etcd.grant(60);
        let (old, _, _) = step(&etcd, "register", "");
        assert_eq!(old, Some(0));
        etcd.put_with_lease("/clearcoat/v1/nodes/web/web-1", r#"{"address":"10.0.0.6:80"}"#, stranger);
        assert_eq!(step(&etcd, "deregister", &other).0, Some(0), "{program}");
        assert!(record(&etcd, "web/web-1").is_some(), "{program} took away a key of another");
        etcd.revoke(stranger);
        is_gone(&etcd, "web/web-1");
    }
    etcd.kill(0);
    for program in ["sh", "php"] {
        let output = example(program, &etcd).arg("register").output().expect("the example");
        assert!(!output.status.success() && !output.stderr.is_empty(), "{program}: {output:?}");
        let output = example(program, &etcd).arg("regster").output().expect("the example");
        assert_eq!(output.status.code(), Some(2), "{program}: {output:?}");
    }
}
