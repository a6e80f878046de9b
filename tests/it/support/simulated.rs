//! Simulated Varnish nodes, for fleets larger than one machine has memory for. They only accept, record and answer
//! purges.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// Many of them, in their own runtime. They end with this value.
pub struct SimulatedFleet {
    pub nodes: Vec<SimulatedVarnish>,
    _runtime: Runtime,
}

/// One of them.
pub struct SimulatedVarnish {
    pub address: SocketAddr,
    patterns: Arc<Mutex<Vec<String>>>,
}

impl SimulatedFleet {
    /// Each waits for `think` before it answers, which simulates a round trip.
    pub fn start(nodes: usize, think: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let nodes = (0..nodes).map(|_| runtime.block_on(SimulatedVarnish::start(think))).collect();
        SimulatedFleet { nodes, _runtime: runtime }
    }

    /// The number of nodes that have received a purge of this tag.
    pub fn told_of(&self, tag: &str) -> usize {
        let told = |node: &&SimulatedVarnish| node.patterns.lock().unwrap().iter().any(|pattern| names(pattern, tag));
        self.nodes.iter().filter(told).count()
    }

    /// The nodes as configuration.
    pub fn toml(&self) -> String {
        let node = |(index, node): (usize, &SimulatedVarnish)| {
            format!("[[node]]\nrole = \"varnish\"\nid = \"simulated-{index}\"\naddress = \"{}\"\n", node.address)
        };
        self.nodes.iter().enumerate().map(node).collect()
    }
}

/// Whether a pattern has this tag as a whole word.
fn names(pattern: &str, tag: &str) -> bool {
    pattern.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == tag)
}

impl SimulatedVarnish {
    async fn start(think: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let patterns = Arc::<Mutex<Vec<String>>>::default();
        let of_listener = Arc::clone(&patterns);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // An aborted connection is ignored.
                let patterns = Arc::clone(&of_listener);
                tokio::spawn(async move { _ = converse(stream, &patterns, think).await });
            }
        });
        SimulatedVarnish { address, patterns }
    }
}

/// Answers the requests of one connection in order: 200 to a purge with a pattern, 400 to one without, like Magento's
/// VCL.
async fn converse(mut stream: TcpStream, patterns: &Mutex<Vec<String>>, think: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = Vec::new();
    loop {
        let Some(end) = input.windows(4).position(|window| window == b"\r\n\r\n") else {
            if stream.read_buf(&mut input).await? == 0 {
                return Ok(());
            }
            continue;
        };
        let head = String::from_utf8_lossy(&input[..end]).into_owned();
        input.drain(..end + 4);
        tokio::time::sleep(think).await;
        let mut fields = head.lines().filter_map(|line| line.split_once(": "));
        let pattern = fields.find(|(name, _)| name.eq_ignore_ascii_case("X-Magento-Tags-Pattern"));
        let status = match pattern {
            Some((_, pattern)) if head.starts_with("PURGE ") => {
                patterns.lock().unwrap().push(pattern.to_owned());
                "200 Purged"
            }
            _ => "400 Bad Request",
        };
        stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await?;
    }
}
