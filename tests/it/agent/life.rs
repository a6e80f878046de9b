//! The epoch of a Varnish identifies its worker process.

use std::path::Path;

use crate::support::agent::{Agent, arguments, children, is, recorded};
use crate::support::etcd::Etcd;
use crate::support::eventually;
use crate::support::varnish::signal;

/// A currently free port.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}

/// The command line of a real varnishd without a backend.
fn varnishd(folder: &Path, port: u16) -> Vec<String> {
    let (cache, pid) = (folder.join("varnish"), folder.join("varnishd.pid"));
    let mut words = vec!["varnishd".to_owned(), "-F".to_owned(), "-n".to_owned(), cache.display().to_string()];
    words.extend(["-a", &format!("127.0.0.1:{port}"), "-b", "none", "-j", "none", "-T", "none"].map(str::to_owned));
    words.extend(["-s", "malloc,16m", "-p", "thread_pools=1", "-p", "thread_pool_min=10"].map(str::to_owned));
    words.extend(["-P".to_owned(), pid.display().to_string()]);
    words
}

#[test]
fn an_epoch_is_kept_with_the_worker_and_another_with_the_next() {
    let etcd = Etcd::start();
    let folder = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let address = ["--address".to_owned(), format!("127.0.0.1:{port}")];
    let mut as_child = arguments("varnish", "as-child", &etcd.endpoints());
    as_child.extend(address.iter().cloned());
    as_child.push("--".to_owned());
    // A script that execs varnishd, as container images have it.
    as_child.extend(["sh".to_owned(), "-c".to_owned(), format!("exec {}", varnishd(folder.path(), port).join(" "))]);
    let mut agent = Agent::start(as_child);
    let first = is(&etcd, "varnish/as-child", "up");
    let epoch = first.value["epoch"].as_str().expect("an epoch").to_owned();

    let pid_file = folder.path().join("varnishd.pid").display().to_string();
    let mut beside = arguments("varnish", "beside", &etcd.endpoints());
    beside.extend(address.iter().cloned().chain(["--pid-file".to_owned(), pid_file]));
    let _beside = Agent::start(beside);
    assert_eq!(is(&etcd, "varnish/beside", "up").value["epoch"], epoch, "two agents, one cache");

    etcd.revoke(first.lease);
    let again = recorded(&etcd, "varnish/as-child", "is written again", |record| record.lease != first.lease);
    assert_eq!(again.value["epoch"], epoch, "nothing has happened to the cache");

    let manager = children(agent.pid())[0];
    signal("-KILL", &children(manager));
    for node in ["varnish/as-child", "varnish/beside"] {
        let other = recorded(&etcd, node, "has another cache", |record| record.value["epoch"] != epoch);
        assert!(other.value["epoch"].is_string(), "{}", other.value);
    }
    assert_eq!(is(&etcd, "varnish/as-child", "up").value["epoch"], is(&etcd, "varnish/beside", "up").value["epoch"]);

    // A varnishd that is stopped while it starts a worker may do neither (seen with 7.1).
    let serves = || crate::support::client::get(([127, 0, 0, 1], port).into(), "/").ok();
    eventually("the new worker serves", serves);
    agent.signal("-TERM");
    // varnishd's exit status reflects that a worker was killed.
    agent.status();
    eventually("the pid file names nobody", || {
        (is(&etcd, "varnish/beside", "drain").value["epoch"] != epoch).then_some(())
    });
}

#[test]
fn an_epoch_that_is_given_wins() {
    let etcd = Etcd::start();
    let node = crate::support::agent::Node::start(200);
    let mut arguments = node.arguments("varnish", "varnish-1", &etcd.endpoints());
    arguments.extend(["--epoch", "disk-1", "--", "sleep", "1000"].map(str::to_owned));
    let _agent = Agent::start(arguments);
    assert_eq!(is(&etcd, "varnish/varnish-1", "up").value["epoch"], "disk-1");
}
