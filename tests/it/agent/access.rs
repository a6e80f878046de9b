//! The least privileges in etcd that an agent needs.

use std::path::Path;

use crate::support::agent::{Agent, Node, is, record};
use crate::support::etcd::Etcd;
use crate::support::etcd::access::Access;
use crate::support::eventually;

const PASSWORD: &str = "correct horse battery";

/// The flags of a user whose password is in a file.
fn user(name: &str, folder: &Path) -> Vec<String> {
    let file = folder.join("password");
    std::fs::write(&file, format!("{PASSWORD}\n")).expect("a file in our folder");
    ["--username", name, "--password-file", file.to_str().expect("a path")].map(str::to_owned).into()
}

#[test]
fn read_and_write_of_its_own_key_is_all_that_an_agent_needs() {
    let mut etcd = Etcd::start();
    etcd.add_user("own-key", PASSWORD, &[("/clearcoat/v1/nodes/web/web-1", Access::ReadWrite)]);
    etcd.add_user("role", PASSWORD, &[("/clearcoat/v1/nodes/web/", Access::ReadWrite)]);
    etcd.add_user("writer", PASSWORD, &[("/clearcoat/v1/nodes/web/", Access::Write)]);
    etcd.enable_auth("root of the test");
    let folder = tempfile::tempdir().expect("a folder");
    let node = Node::start(200);
    let start = |name: &str, role: &str, id: &str| {
        let mut arguments = node.arguments(role, id, &etcd.endpoints());
        arguments.extend(user(name, folder.path()));
        Agent::start(arguments)
    };

    for (name, id) in [("own-key", "web-1"), ("role", "web-2")] {
        let mut agent = start(name, "web", id);
        let key = format!("web/{id}");
        let first = is(&etcd, &key, "up");
        // All operations of a registration: rewritten with another lease, changed, deleted, its lease revoked.
        etcd.revoke(first.lease);
        let lease = crate::support::agent::recorded(&etcd, &key, "is back", |record| record.lease != first.lease).lease;
        agent.signal("-TERM");
        assert_eq!(agent.status(), 0);
        assert!(record(&etcd, &key).is_none(), "{name}");
        assert_eq!(etcd.lease_ttl(lease), None, "{name}");
        assert!(!agent.log().has(PASSWORD), "a secret is in the log");
    }

    // Agents without the rights keep trying, and log it.
    for (name, role, id) in [("own-key", "web", "web-2"), ("role", "varnish", "varnish-1"), ("writer", "web", "web-3")]
    {
        let mut agent = start(name, role, id);
        if name == "writer" {
            // It may put, but not read whether its key is still its own.
            is(&etcd, "web/web-3", "up");
        }
        eventually("the agent is refused", || agent.log().has("permission denied").then_some(()));
        assert!(agent.runs());
        assert!(name == "writer" || record(&etcd, &format!("{role}/{id}")).is_none(), "{name}");
    }
}

#[test]
fn credentials_are_used_if_etcd_wants_them_and_a_new_password_is_reread() {
    let mut etcd = Etcd::start();
    etcd.add_user("agent", PASSWORD, &[("/clearcoat/v1/nodes/web/", Access::ReadWrite)]);
    let folder = tempfile::tempdir().expect("a folder");
    let node = Node::start(200);
    let mut arguments = node.arguments("web", "web-1", &etcd.endpoints());
    arguments.extend(user("agent", folder.path()));
    arguments.extend(["--fall", "1", "--check", &node.page()].map(str::to_owned));
    let _agent = Agent::start(arguments);
    let first = is(&etcd, "web/web-1", "up");
    let goes_on = |etcd: &Etcd, status, state| {
        node.answer(status);
        let later = is(etcd, "web/web-1", state);
        assert_eq!((later.created, later.lease), (first.created, first.lease), "its key was away");
    };
    etcd.enable_auth("root of the test");
    goes_on(&etcd, 500, "drain");
    std::fs::write(folder.path().join("password"), "another").expect("our file");
    etcd.change_password("agent", "another");
    goes_on(&etcd, 200, "up");
}

#[test]
fn an_agent_shows_a_certificate_where_etcd_wants_one() {
    let etcd = Etcd::start_tls();
    let node = Node::start(200);
    let tls = etcd.tls();
    let path = |path: &Path| path.to_str().expect("a path").to_owned();
    let mut arguments = node.arguments("web", "web-1", &etcd.endpoints());
    arguments.extend(["--ca".to_owned(), path(&tls.ca)]);
    let refused = Agent::start(&arguments);
    eventually("the agent is refused", || refused.log().has("not registered in etcd").then_some(()));
    assert!(record(&etcd, "web/web-1").is_none());
    drop(refused);

    arguments.extend(["--cert".to_owned(), path(&tls.client.cert), "--key".to_owned(), path(&tls.client.key)]);
    let mut agent = Agent::start(&arguments);
    is(&etcd, "web/web-1", "up");
    agent.signal("-TERM");
    assert_eq!(agent.status(), 0);
    assert!(record(&etcd, "web/web-1").is_none());
}
