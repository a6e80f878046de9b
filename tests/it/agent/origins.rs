//! The VCL of a real varnishd follows the addresses of its origins.
//!
//! The agent resolves names as everything on its host does. So it runs in a namespace of mounts, in which `/etc/hosts` is
//! a file of the test. The origins are web nodes of the test, in the place of clearcoat's origin listeners: on the same
//! port, each at an address of its own.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use crate::support::agent::{Agent, arguments};
use crate::support::client::get;
use crate::support::reader::{Outage, Reader};
use crate::support::web::{Shop, Web};
use crate::support::{eventually, own_loopback};

/// An etcd that is not running: the VCL does not depend on it.
const NO_ETCD: &str = "http://127.0.0.1:9";
const LOADED: &str = "varnishd has loaded the VCL with the addresses of now";
const NAMESPACE: [&str; 3] = ["--user", "--map-root-user", "--mount"];

/// A host with a varnishd, an agent, and a `/etc/hosts` of its own.
struct Host {
    folder: tempfile::TempDir,
    /// Where this varnishd serves, and where it is managed.
    serves: SocketAddr,
    manages: SocketAddr,
    /// The port of all origins.
    port: u16,
}

/// A varnishd that is not the agent's child, killed when this value is dropped.
struct Varnishd(Child);

impl Drop for Varnishd {
    fn drop(&mut self) {
        // With it goes its worker.
        crate::support::varnish::signal("-TERM", &[self.0.id()]);
        self.0.wait().expect("our child");
    }
}

impl Host {
    /// None if this machine gives no such namespace; it says so then.
    fn new() -> Option<Self> {
        let possible = Command::new("unshare").args(NAMESPACE).arg("true").output().expect("unshare");
        if !possible.status.success() {
            println!("skipped: no namespace of mounts: {}", String::from_utf8_lossy(&possible.stderr));
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("nsswitch.conf"), "hosts: files\n").expect("a file");
        let free = || TcpListener::bind((own_loopback(), 0)).expect("a free port").local_addr().expect("an address");
        let host = Host { folder, serves: free(), manages: free(), port: free().port() };
        host.names(&[]);
        host.secret("of this varnishd");
        Some(host)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the names resolve to from now on.
    fn names(&self, names: &[(&str, Ipv4Addr)]) {
        let mut text = String::new();
        for (name, address) in names {
            writeln!(text, "{address} {name}").expect("a string");
        }
        // Not replaced: it is mounted.
        std::fs::write(self.file("hosts"), text).expect("a file");
    }

    fn secret(&self, text: &str) {
        std::fs::write(self.file("secret"), text).expect("a file");
    }

    /// An origin at an address of its own.
    fn origin(&self, shop: &Arc<Shop>) -> (Ipv4Addr, Web) {
        let address = own_loopback();
        (address, Web::start_at(SocketAddr::from((address, self.port)), shop))
    }

    fn varnishd(&self, vcl: &str) -> Vec<String> {
        let path = |name| self.file(name).display().to_string();
        let words = ["varnishd", "-F", "-j", "none", "-n", &path("varnish"), "-a", &self.serves.to_string()];
        let more = ["-T", &self.manages.to_string(), "-S", &path("secret.varnishd"), "-f", &path(vcl)];
        let few = ["-s", "malloc,16m", "-p", "thread_pools=1", "-p", "thread_pool_min=10"];
        let quick = ["-p", "cc_command=exec gcc -O0 -pthread -fpic -shared -Wl,-x -o %o %s"];
        // The agent reads a file of its own, so that a test can give it another secret.
        std::fs::write(path("secret.varnishd"), "of this varnishd").expect("a file");
        words.into_iter().chain(more).chain(few).chain(quick).map(str::to_owned).collect()
    }

    /// A varnishd with a VCL that somebody else wrote, which imports nothing.
    fn somebody_elses(&self, more: &[&str]) -> Varnishd {
        std::fs::write(self.file("other.vcl"), "vcl 4.1;\nbackend default none;\n").expect("a file");
        let words = self.varnishd("other.vcl");
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = Varnishd(command.spawn().expect("varnishd is installed (make test installs it)"));
        eventually("varnishd serves", || get(self.serves, "/").ok());
        child
    }

    fn adm(&self, command: &[&str]) -> String {
        let output = Command::new("varnishadm").arg("-n").arg(self.file("varnish")).args(command).output();
        let output = output.expect("varnishadm");
        assert!(output.status.success(), "{command:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// An agent for these origins, with this command.
    fn agent(&self, origins: &[&str], command: &[String]) -> Agent {
        let mount = "mount --bind \"$1/hosts\" /etc/hosts && mount --bind \"$1/nsswitch.conf\" /etc/nsswitch.conf \
                     && shift && exec \"$@\"";
        let mut agent = Command::new("unshare");
        agent.args(NAMESPACE).args(["sh", "-c", mount, "sh"]).arg(self.folder.path());
        agent.arg(env!("CARGO_BIN_EXE_clearcoat")).args(["agent", "--log-format", "json"]);
        agent.args(arguments("varnish", "varnish-1", &[NO_ETCD.to_owned()]));
        agent.args(["--address", &self.serves.to_string(), "--management", &self.manages.to_string()]);
        agent.arg("--vcl").arg(self.file("clearcoat.vcl")).arg("--secret-file").arg(self.file("secret"));
        for origin in origins {
            agent.args(["--origin", &format!("{origin}:{}", self.port)]);
        }
        Agent::spawn({
            agent.arg("--").args(command);
            agent
        })
    }

    /// An agent that runs varnishd.
    fn agent_with_varnishd(&self, origins: &[&str]) -> Agent {
        self.agent(origins, &self.varnishd("clearcoat.vcl"))
    }

    /// Waits until a page of this version is there that no cache has had.
    fn serves_version(&self, version: u64) {
        let mut page = version * 1000;
        eventually(&format!("pages have version {version}"), || {
            page += 1;
            let answer = get(self.serves, &format!("/p/{page}")).ok()?;
            (answer.status == 200 && answer.text() == version.to_string()).then_some(())
        });
    }
}

/// A shop whose pages all have this version.
fn shop(version: u64) -> Arc<Shop> {
    let shop = Arc::new(Shop::default());
    (0..20_000).for_each(|page| shop.set(page, version));
    shop
}

#[test]
fn an_origin_with_another_address_is_found_again_and_the_cache_stays() {
    let Some(host) = Host::new() else { return };
    let (first, web) = host.origin(&shop(1));
    host.names(&[("clearcoat", first)]);
    let agent = host.agent_with_varnishd(&["clearcoat"]);
    host.serves_version(1);
    assert_eq!(get(host.serves, "/p/1").expect("varnishd answers").text(), "1");

    drop(web);
    let (second, _web) = host.origin(&shop(2));
    host.names(&[("clearcoat", second)]);
    host.serves_version(2);
    assert_eq!(get(host.serves, "/p/1").expect("varnishd answers").text(), "1", "a page of before is still there");
    agent.log().waits_for_count(LOADED, 1);

    // Its name is gone for a while, as that of a container that is stopped.
    host.names(&[]);
    agent.log().waits_for("the VCL stays as it is");
    host.serves_version(2);
}

#[test]
fn an_origin_of_several_that_has_no_address_is_left_out_until_it_has_one() {
    let Some(host) = Host::new() else { return };
    let (first, second) = (own_loopback(), own_loopback());
    host.names(&[("clearcoat", first), ("clearcoat", second), ("another", first)]);
    let agent = host.agent_with_varnishd(&["clearcoat", "another"]);
    let vcl = || std::fs::read_to_string(host.file("clearcoat.vcl")).unwrap_or_default();
    let names = |address: Ipv4Addr| vcl().contains(&format!(".host = \"{address}\""));
    let allows = |address: Ipv4Addr| vcl().contains(&format!("\"{address}\"/32;"));
    eventually("both are in the VCL", || (names(first) && names(second) && allows(second)).then_some(()));
    assert_eq!(vcl().matches(".host").count(), 2, "each address once: {}", vcl());
    eventually("varnishd has both", || host.adm(&["backend.list"]).contains("boot.origin_2").then_some(()));

    host.names(&[("another", second)]);
    agent.log().waits_for_count(LOADED, 1);
    assert!(!names(first) && names(second) && !allows(first));
    assert!(agent.log().has("the VCL is without the origins that have no address"), "{}", agent.log().text());

    host.names(&[("clearcoat", first), ("another", second)]);
    agent.log().waits_for_count(LOADED, 2);
    assert!(names(first) && names(second));
}

#[test]
fn no_request_fails_while_the_vcl_changes_and_no_vcl_is_left_behind() {
    const CHANGES: usize = 20;
    let Some(host) = Host::new() else { return };
    let shop = Arc::new(Shop::default());
    let origins = [host.origin(&shop), host.origin(&shop)];
    host.names(&[("clearcoat", origins[0].0)]);
    let agent = host.agent_with_varnishd(&["clearcoat"]);
    eventually("varnishd serves", || get(host.serves, "/p/1").ok());
    // Every page is a miss.
    let reader = Reader::start(host.serves, u64::MAX, Outage::None);
    for change in 1..=CHANGES {
        host.names(&[("clearcoat", origins[change % 2].0)]);
        agent.log().waits_for_count(LOADED, change);
    }
    assert!(reader.reads() > 100, "{} reads", reader.reads());
    reader.stop();
    let list = host.adm(&["vcl.list"]);
    // The one of the start, which a restart of the worker does not need, one in use, and one that its last request leaves.
    assert!(list.lines().filter(|line| line.contains("auto")).count() <= 3, "{list}");
}

#[test]
fn a_varnishd_of_somebody_else_loads_it_or_it_is_said_why_not() {
    let Some(host) = Host::new() else { return };
    let (address, _web) = host.origin(&shop(1));
    host.names(&[("clearcoat", address)]);
    let agent = host.agent(&["clearcoat"], &[]);
    agent.log().waits_for("connecting failed");

    host.secret("of another one");
    let nowhere = format!("vmod_path={}", host.folder.path().display());
    let varnishd = host.somebody_elses(&["-p", &nowhere]);
    agent.log().waits_for("it has another secret");
    host.secret("of this varnishd");
    // Our VCL needs vmods; so it is refused.
    agent.log().waits_for("Could not find VMOD std");
    assert_eq!(agent.log().count(LOADED), 0);
    assert_eq!(get(host.serves, "/p/1").expect("varnishd answers").status, 503, "the other VCL is in use");

    host.adm(&["param.reset", "vmod_path"]);
    host.serves_version(1);
    agent.log().waits_for_count(LOADED, 1);
    for complaint in ["connecting failed", "it has another secret", "Could not find VMOD std"] {
        assert_eq!(agent.log().count(complaint), 1, "said once: {}", agent.log().text());
    }

    // The port is away, and back: it reads by itself what is on disk, and a change is loaded again.
    drop(varnishd);
    let (other, _other) = host.origin(&shop(2));
    host.names(&[("clearcoat", other)]);
    agent.log().waits_for_count("connecting failed", 2);
    let _varnishd = host.somebody_elses(&[]);
    host.serves_version(2);
}

#[test]
fn varnishd_waits_for_an_address_and_the_agent_can_be_ended_meanwhile() {
    let Some(host) = Host::new() else { return };
    let mut agent = host.agent_with_varnishd(&["clearcoat"]);
    agent.log().waits_for("varnishd waits for its VCL");
    agent.signal("-TERM");
    assert_eq!(agent.status(), 0);
    assert!(!host.file("clearcoat.vcl").exists());

    let mut agent = host.agent_with_varnishd(&["clearcoat"]);
    agent.log().waits_for("varnishd waits for its VCL");
    let (address, _web) = host.origin(&shop(1));
    host.names(&[("clearcoat", address)]);
    host.serves_version(1);
    agent.signal("-TERM");
    assert_eq!(agent.status(), 0);

    // With the VCL of before it does not wait.
    host.names(&[]);
    let agent = host.agent_with_varnishd(&["clearcoat"]);
    host.serves_version(1);
    assert!(agent.log().has("varnishd starts with the VCL that it had"), "{}", agent.log().text());
}

#[test]
fn a_vcl_that_somebody_else_wrote_is_not_overwritten() {
    let Some(host) = Host::new() else { return };
    host.names(&[("clearcoat", own_loopback())]);
    std::fs::write(host.file("clearcoat.vcl"), "vcl 4.1;\nbackend default none;\n").expect("a file");
    let mut agent = host.agent_with_varnishd(&["clearcoat"]);
    assert_eq!(agent.status(), 1);
    agent.log().waits_for("is somebody else's VCL");
    let left = std::fs::read_to_string(host.file("clearcoat.vcl")).expect("a file");
    assert_eq!(left, "vcl 4.1;\nbackend default none;\n");

    std::fs::remove_file(host.file("clearcoat.vcl")).expect("a file");
    std::fs::create_dir(host.file("clearcoat.vcl")).expect("a folder");
    let mut agent = host.agent_with_varnishd(&["clearcoat"]);
    assert_eq!(agent.status(), 1, "a file that cannot be written is not waited for");
}
