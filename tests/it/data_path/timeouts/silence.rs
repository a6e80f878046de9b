//! `node_silence`: a machine that is gone, of which no connection says so.

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

use super::*;
use crate::support::slow_link::{Quality, SlowLink, is_possible};
use crate::support::upstream::local_ports_to;

const PORT: u16 = 8080;

/// A web node behind a link: it passes health checks, and answers nothing else.
struct FarNode(Child);

impl FarNode {
    fn start(link: &SlowLink, folder: &Path) -> Self {
        let script = folder.join("node.sh");
        let passes = "HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n";
        let text = format!("read line\ncase \"$line\" in *health*) printf '{passes}' ;; *) sleep 600 ;; esac\n");
        std::fs::write(&script, text).expect("a file");
        let run = format!("EXEC:sh {}", script.display());
        let mut node = Command::new("ip");
        node.args(["netns", "exec", &link.namespace, "socat", &format!("TCP-LISTEN:{PORT},fork,reuseaddr"), &run]);
        FarNode(node.process_group(0).spawn().expect("socat"))
    }
}

impl Drop for FarNode {
    fn drop(&mut self) {
        // With the processes that it has begun, one for each connection.
        let group = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).expect("it runs");
        self.0.wait().expect("its end");
    }
}

#[test]
fn a_node_whose_machine_is_gone_is_given_up_after_node_silence() {
    if !is_possible() {
        return;
    }
    let link = SlowLink::start(Quality { delay: Duration::ZERO, one_lost_in: 0, seed: 1 });
    let folder = tempfile::tempdir().expect("a folder");
    let _node = FarNode::start(&link, folder.path());
    let far = SocketAddr::from((link.far, PORT));
    eventually("it listens", || std::net::TcpStream::connect(far).ok());
    let (log_config, log) = log_in(folder.path(), "");
    let node = format!("[[node]]\nrole = \"web\"\nid = \"far\"\naddress = \"{far}\"\n");
    let checks = "[health.web]\ninterval = \"1h\"\ntimeout = \"30s\"\n";
    let config = format!("{log_config}{}{checks}{node}", only(&[("node_silence", "5s")]));
    let rig = Rig::start(&config, Vec::new(), Vec::new());
    let mut client = rig.origin();
    client.send(get_request("/page")).unwrap();
    let inflight = "clearcoat_upstream_inflight{node=\"far\",role=\"web\"}";
    let port = eventually("the request is at the node", || {
        let ports = local_ports_to(far);
        (rig.counter(inflight) == 1.0 && ports.len() == 1).then(|| ports[0])
    });
    // From now on nothing of this connection arrives there, and so no reply comes back. Whoever has left the fleet has to show
    // that it lives.
    let _held = link.hold(port);
    reloaded(&rig, |config| _ = config.remove("node"));
    let began = Instant::now();
    assert_eq!(client.answer(false).unwrap().status, 504);
    let waited = began.elapsed();
    assert!(waited > Duration::from_secs(3) && waited < Duration::from_secs(14), "after {waited:?}");
    let line = log.of("/page");
    assert_eq!(ended(&line), (504, "sH", "timeout"));
}
