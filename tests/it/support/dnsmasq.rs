//! A real name server, authoritative for `shop.test`.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::varnish::signal;
use super::{eventually, own_loopback};

/// A port without a listener on our own addresses, and outside the range of ephemeral ports.
const PORT: u16 = 10_053;

/// A dnsmasq, killed when this value is dropped. Its records have a TTL of a second; an unknown name of `shop.test`
/// does not exist, and all others are refused.
pub struct Dnsmasq {
    pub address: SocketAddr,
    folder: PathBuf,
    services: Vec<Service>,
    child: Option<Child>,
}

/// A service record.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: &'static str,
    pub target: &'static str,
    pub port: u16,
    pub priority: u16,
    pub weight: u16,
}

impl Dnsmasq {
    /// Starts one with these addresses, such as `10.0.0.1 web.shop.test`.
    pub fn start(folder: &Path, addresses: &[(Ipv4Addr, &str)]) -> Self {
        let mut this = Dnsmasq::prepare(folder);
        this.write(addresses);
        this.resume();
        this
    }

    /// Prepares one to be started later, by [`Dnsmasq::resume`].
    pub fn prepare(folder: &Path) -> Self {
        let address = SocketAddr::from((own_loopback(), PORT));
        let this = Dnsmasq { address, folder: folder.to_owned(), services: vec![], child: None };
        this.write(&[]);
        this
    }

    /// Replaces its addresses.
    pub fn set(&self, addresses: &[(Ipv4Addr, &str)]) {
        self.write(addresses);
        let child = self.child.as_ref().expect("it runs");
        // Makes it reload its files.
        signal("-HUP", &[child.id()]);
    }

    /// Replaces its services. It is away for a moment.
    pub fn set_services(&mut self, services: &[Service]) {
        self.services = services.to_vec();
        self.kill();
        self.resume();
    }

    fn write(&self, addresses: &[(Ipv4Addr, &str)]) {
        let lines: String = addresses.iter().map(|(address, name)| format!("{address} {name}\n")).collect();
        std::fs::write(self.folder.join("hosts"), lines).expect("a file");
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("our child");
            child.wait().expect("our child");
        }
    }

    /// Starts it, again or for the first time.
    pub fn resume(&mut self) {
        let mut command = Command::new("dnsmasq");
        command.args(["--no-daemon", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts"]);
        command.args(["--bind-interfaces", "--local=/shop.test/", "--local-ttl=1"]);
        command.arg(format!("--listen-address={}", self.address.ip())).arg(format!("--port={}", self.address.port()));
        command.arg(format!("--addn-hosts={}", self.folder.join("hosts").display()));
        for Service { name, target, port, priority, weight } in &self.services {
            command.arg(format!("--srv-host={name},{target},{port},{priority},{weight}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("dnsmasq is installed (make test installs it)");
        eventually("dnsmasq listens", || {
            assert_eq!(child.try_wait().expect("our child"), None, "dnsmasq ended at once");
            TcpStream::connect(self.address).is_ok().then_some(())
        });
        self.child = Some(child);
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        self.kill();
    }
}
