//! How an agent ends: the order of its steps, and its exit status.

use std::path::{Path, PathBuf};

use crate::support::agent::{Agent, Node, children, is, is_gone, record, script};
use crate::support::etcd::Etcd;
use crate::support::eventually;
use crate::support::varnish::signal;

/// An etcd that is not running: the agent's other work does not depend on it.
const NO_ETCD: &str = "http://127.0.0.1:9";

/// A node that logs its events to a file, and runs until it is stopped. It is up once the file exists.
struct Diary {
    folder: tempfile::TempDir,
}

impl Diary {
    fn new() -> Self {
        Diary { folder: tempfile::tempdir().expect("a folder") }
    }

    fn file(&self) -> PathBuf {
        self.path().join("diary")
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until this line was written.
    fn says(&self, line: &str) {
        eventually(&format!("the node says {line}"), || self.has(line).then_some(()));
    }

    fn has(&self, line: &str) -> bool {
        std::fs::read_to_string(self.file()).unwrap_or_default().lines().any(|one| one == line)
    }

    /// A node that runs `first`, then writes `began` and waits.
    fn node(&self, first: &str) -> Vec<String> {
        let diary = self.file();
        let text = format!(
            "say() {{ echo \"$1\" >>{}; }}\n{first}\nsay began\nwhile :; do sleep 0.05; done\n",
            diary.display()
        );
        script(self.path(), &text)
    }
}

/// An agent without a reachable etcd.
fn alone(node: &Node, more: &[&str], command: Vec<String>) -> Agent {
    let mut arguments = node.arguments("web", "web-1", &[NO_ETCD.to_owned()]);
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    arguments.extend(command);
    Agent::start(arguments)
}

#[test]
fn a_node_drains_then_ends_then_leaves() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let diary = Diary::new();
    let may_end = diary.path().join("may-end");
    let mut arguments = node.arguments("web", "web-1", &etcd.endpoints());
    arguments.extend(["--drain".to_owned(), "1h".to_owned()]);
    let wait = format!("while [ ! -e {} ]; do sleep 0.02; done", may_end.display());
    arguments.extend(diary.node(&format!("trap 'say told; {wait}; exit 3' TERM")));
    let mut agent = Agent::start(arguments);
    diary.says("began");
    let lease = is(&etcd, "web/web-1", "up").lease;

    agent.signal("-TERM");
    is(&etcd, "web/web-1", "drain");
    assert!(agent.runs() && !diary.has("told"), "it was told to end while it drains");
    agent.signal("-TERM");
    diary.says("told");
    assert_eq!(record(&etcd, "web/web-1").expect("a key while the node ends").value["state"], "drain");
    std::fs::write(&may_end, "").expect("a file in our folder");
    assert_eq!(agent.status(), 3);
    assert!(record(&etcd, "web/web-1").is_none());
    assert_eq!(etcd.lease_ttl(lease), None);
}

#[test]
fn a_node_that_ends_by_itself_leaves_at_once_and_its_status_is_the_agents() {
    let etcd = Etcd::start();
    let node = Node::start(200);
    let diary = Diary::new();
    let mut arguments = node.arguments("web", "web-1", &etcd.endpoints());
    arguments.extend(diary.node("trap 'exit 7' USR1"));
    let mut agent = Agent::start(arguments);
    diary.says("began");
    is(&etcd, "web/web-1", "up");
    agent.signal("-USR1");
    assert_eq!(agent.status(), 7);
    is_gone(&etcd, "web/web-1");
}

#[test]
fn an_end_does_not_wait_for_an_etcd_that_does_not_answer() {
    let mut etcd = Etcd::start();
    let node = Node::start(200);
    let mut agent = Agent::start(node.arguments("web", "web-1", &etcd.endpoints()));
    is(&etcd, "web/web-1", "up");
    etcd.hang(0);
    agent.signal("-TERM");
    assert_eq!(agent.status(), 0);
    eventually("it says why", || {
        let reasons = ["does not take the key away in time", "its lease runs out by itself"];
        reasons.iter().any(|reason| agent.log().has(reason)).then_some(())
    });
    etcd.resume(0);
    is_gone(&etcd, "web/web-1");
}

#[test]
fn the_status_is_that_of_a_shell() {
    let node = Node::start(200);
    let folder = tempfile::tempdir().expect("a folder");
    let text = folder.path().join("text");
    std::fs::write(&text, "no program").expect("a file in our folder");
    let text = text.to_str().expect("a path");
    for (command, status) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 3"], 3),
        (&["sh", "-c", "kill -KILL $$"], 128 + 9),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15),
        (&["/nowhere/node"], 127),
        (&[text], 126),
    ] {
        let command = ["--"].iter().chain(command).map(|word| (*word).to_owned()).collect();
        assert_eq!(alone(&node, &[], command).status(), status);
    }
}

#[test]
fn a_node_that_does_not_end_is_killed_with_all_that_it_has_started() {
    let node = Node::start(200);
    let diary = Diary::new();
    let mut agent = alone(&node, &["--kill-after", "100ms"], diary.node("trap '' TERM; sleep 1000 & say $!"));
    diary.says("began");
    let text = std::fs::read_to_string(diary.file()).expect("our file");
    let helper: u32 = text.lines().next().and_then(|line| line.parse().ok()).expect("a pid");
    agent.signal("-TERM");
    assert_eq!(agent.status(), 128 + 9);
    eventually("its helper is gone", || (!runs(helper)).then_some(()));
}

/// Whether a process exists and is not a zombie.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[test]
fn signals_are_passed_on_but_those_that_end() {
    let node = Node::start(200);
    let diary = Diary::new();
    let signals = ["HUP", "USR1", "USR2", "QUIT", "WINCH", "CONT"];
    let traps: String = signals.iter().map(|name| format!("trap 'say {name}' {name}\n")).collect();
    let mut agent = alone(&node, &[], diary.node(&traps));
    diary.says("began");
    for name in signals {
        agent.signal(&format!("-{name}"));
        diary.says(name);
    }
    agent.signal("-INT");
    assert_eq!(agent.status(), 128 + 15, "the node gets TERM whichever it was");
}

#[test]
fn a_node_gets_its_configured_stop_signal_whichever_the_agent_gets() {
    let node = Node::start(200);
    for sent in ["-TERM", "-QUIT"] {
        let diary = Diary::new();
        let mut agent = alone(&node, &["--stop-signal", "QUIT"], diary.node("trap 'exit 5' QUIT"));
        diary.says("began");
        agent.signal(sent);
        assert_eq!(agent.status(), 5, "{sent}");
    }
}

#[test]
fn orphans_are_buried_where_the_agent_is_process_1() {
    let namespace = ["--user", "--map-root-user", "--pid", "--fork", "--kill-child"];
    let possible = std::process::Command::new("unshare").args(namespace).arg("true").output();
    if let Some(refused) = possible.as_ref().map_or_else(
        |error| Some(error.to_string()),
        |output| (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned()),
    ) {
        println!("skipped: this machine gives no namespace of processes: {refused}");
        return;
    }
    let node = Node::start(200);
    let diary = Diary::new();
    let mut command = std::process::Command::new("unshare");
    command.args(namespace).arg(env!("CARGO_BIN_EXE_clearcoat"));
    command.args(["agent", "--log-format", "json", "--log-level", "debug"]);
    command.args(node.arguments("web", "web-1", &[NO_ETCD.to_owned()]));
    command.args(diary.node("for one in 1 2 3; do (sh -c 'exit 4' & exit 0); done; trap 'exit 6' USR1"));
    let mut unshare = Agent::spawn(command);
    diary.says("began");
    eventually("three orphans are buried", || (unshare.log().count("an orphan has ended") >= 3).then_some(()));
    let agent = children(unshare.pid())[0];
    let left: Vec<u32> = children(agent).into_iter().filter(|pid| !runs(*pid)).collect();
    assert!(left.is_empty(), "not buried: {left:?}");
    signal("-USR1", &[agent]);
    assert_eq!(unshare.status(), 6, "an orphan's status is not the node's");
}
