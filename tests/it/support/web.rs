//! A web node in the test's own process: pages with tags whose content is a version set by the test.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use clearcoat::http_server::{self, Handler, Response, response, text};
use clearcoat::shutdown::{self, ShutdownHandle, Stage};

use super::eventually;

/// The number of renders recorded.
const NEWEST: usize = 10_000;

/// The state shared by the web nodes of one shop. `/p/N` is a page with the tags `cat_p_N,cat_p` unless others are set,
/// whose body is its version.
#[derive(Debug, Default)]
pub struct Shop {
    versions: Mutex<HashMap<u64, u64>>,
    tags: Mutex<HashMap<u64, String>>,
    /// The number of renders.
    pub renders: AtomicU64,
    /// The newest of them: page, version, time.
    newest: Mutex<VecDeque<(u64, u64, Instant)>>,
    /// In ms.
    render_time: AtomicU64,
    /// Whether pages expire after a second and are then revalidated by `ETag`.
    pub revalidated: AtomicBool,
    /// The number of 304 answers.
    pub not_modified: AtomicU64,
    held: Mutex<HashMap<u64, Held>>,
}

/// The held renders of a page: their number, and whether they may continue.
type Held = (Arc<AtomicU64>, watch::Receiver<bool>);

/// Holds the renders of a page until this value is dropped: their content is determined, but not sent.
pub struct Gate {
    shop: Arc<Shop>,
    page: u64,
    held: Arc<AtomicU64>,
    open: watch::Sender<bool>,
}

impl Gate {
    /// The number of renders held so far.
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::SeqCst)
    }

    /// Waits until this many renders are held.
    pub fn holds(&self, renders: u64) {
        eventually("a render is held", || (self.held() >= renders).then_some(()));
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shop.held.lock().unwrap().remove(&self.page);
        self.open.send_replace(true);
    }
}

impl Shop {
    /// Sets the version rendered from now on.
    pub fn set(&self, page: u64, version: u64) {
        self.versions.lock().unwrap().insert(page, version);
    }

    /// Sets the tags of a page, as in its header; an empty text means no header.
    pub fn set_tags(&self, page: u64, tags: &str) {
        self.tags.lock().unwrap().insert(page, tags.to_owned());
    }

    fn tags(&self, page: u64) -> String {
        self.tags.lock().unwrap().get(&page).cloned().unwrap_or_else(|| format!("cat_p_{page},cat_p"))
    }

    pub fn version(&self, page: u64) -> u64 {
        self.versions.lock().unwrap().get(&page).copied().unwrap_or(0)
    }

    /// Sets the longest render time: each render takes a random part of it.
    pub fn render_within(&self, most: Duration) {
        self.render_time.store(u64::try_from(most.as_millis()).expect("a short time"), Ordering::SeqCst);
    }

    /// Holds the renders of a page that begin from now on.
    pub fn hold(self: &Arc<Self>, page: u64) -> Gate {
        let (open, opened) = watch::channel(false);
        let held = Arc::<AtomicU64>::default();
        self.held.lock().unwrap().insert(page, (Arc::clone(&held), opened));
        Gate { shop: Arc::clone(self), page, held, open }
    }

    /// When this version of a page was last rendered, if it is among the newest.
    pub fn last_rendered(&self, page: u64, version: u64) -> Option<Instant> {
        let newest = self.newest.lock().unwrap();
        newest.iter().rev().find(|render| (render.0, render.1) == (page, version)).map(|render| render.2)
    }

    /// The content is determined first; then the render takes its time.
    async fn render(&self, page: u64) -> String {
        let content = self.look_up(page);
        let held = self.held.lock().unwrap().get(&page).cloned();
        if let Some((held, mut open)) = held {
            held.fetch_add(1, Ordering::SeqCst);
            // A dropped gate is open.
            _ = open.wait_for(|open| *open).await;
        }
        let most = self.render_time.load(Ordering::SeqCst);
        if most > 0 {
            tokio::time::sleep(Duration::from_millis(fastrand::u64(..=most))).await;
        }
        content
    }

    fn look_up(&self, page: u64) -> String {
        self.renders.fetch_add(1, Ordering::SeqCst);
        let version = self.version(page);
        let mut newest = self.newest.lock().unwrap();
        if newest.len() == NEWEST {
            newest.pop_front();
        }
        newest.push_back((page, version, Instant::now()));
        version.to_string()
    }
}

/// A web node, stopped when this value is dropped.
pub struct Web {
    pub address: SocketAddr,
    /// Whether its health check passes.
    pub healthy: Arc<AtomicBool>,
    stop: ShutdownHandle,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Node {
    shop: Arc<Shop>,
    healthy: Arc<AtomicBool>,
}

impl Web {
    pub fn start(shop: &Arc<Shop>) -> Self {
        Web::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), shop)
    }

    /// Starts one at this address.
    pub fn start_at(address: SocketAddr, shop: &Arc<Shop>) -> Self {
        let healthy = Arc::new(AtomicBool::new(true));
        let node = Arc::new(Node { shop: Arc::clone(shop), healthy: Arc::clone(&healthy) });
        let listener = std::net::TcpListener::bind(address).expect("a free port");
        listener.set_nonblocking(true).expect("a socket option");
        let address = listener.local_addr().expect("an address");
        let (stop, shutdown) = shutdown::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                http_server::serve(listener, node, 2048, 64 * 1024, shutdown).await;
            });
        });
        Web { address, healthy, stop, thread: Some(thread) }
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        self.stop.advance(Stage::Stopping);
        if let Some(thread) = self.thread.take() {
            assert!(thread.join().is_ok() || std::thread::panicking(), "a web node panicked");
        }
    }
}

impl Handler for Node {
    fn wants_body(&self, head: &http::request::Parts, _peer: SocketAddr) -> bool {
        head.uri.path() == "/upload"
    }

    async fn handle(&self, request: http::Request<hyper::body::Bytes>, _peer: SocketAddr) -> Response {
        let path = request.uri().path();
        if path == "/health_check.php" {
            return if self.healthy.load(Ordering::SeqCst) { text(200, "ok") } else { text(500, "ill") };
        }
        if path == "/upload" {
            return text(200, request.body().len().to_string());
        }
        let Some(page) = path.strip_prefix("/p/").and_then(|number| number.parse().ok()) else {
            return text(404, "no such page");
        };
        let content = self.shop.render(page).await;
        let tag = format!("\"{content}\"");
        let revalidated = self.shop.revalidated.load(Ordering::SeqCst);
        // Varnish turns it into a weak one if it has compressed the page.
        let asked = request.headers().get("if-none-match").and_then(|value| value.to_str().ok()).unwrap_or_default();
        if revalidated && asked.trim_start_matches("W/") == tag {
            self.shop.not_modified.fetch_add(1, Ordering::SeqCst);
            let mut response = response(304, "text/html; charset=utf-8", Vec::new());
            response.headers_mut().insert("cache-control", lifetime(true));
            return response;
        }
        let mut response = response(200, "text/html; charset=utf-8", content.into_bytes());
        let headers = response.headers_mut();
        headers.insert("cache-control", lifetime(revalidated));
        if revalidated {
            headers.insert("etag", tag.parse().expect("a header"));
        }
        let tags = self.shop.tags(page);
        if !tags.is_empty() {
            headers.insert("x-magento-tags", http::HeaderValue::from_bytes(tags.as_bytes()).expect("a header"));
        }
        headers.insert("x-pool", http::HeaderValue::from_static("shop"));
        for name in ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "via"] {
            if let Some(value) = request.headers().get(name) {
                headers.insert(http::HeaderName::try_from(format!("x-saw-{name}")).expect("a name"), value.clone());
            }
        }
        response
    }
}

fn lifetime(short: bool) -> http::HeaderValue {
    http::HeaderValue::from_static(if short {
        "public, max-age=1, s-maxage=1"
    } else {
        "public, max-age=86400, s-maxage=86400"
    })
}
