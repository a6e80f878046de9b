//! A fake of a Kubernetes API server: a real one cannot be had where the tests run.
//!
//! It keeps EndpointSlices, and answers lists and watches of them as <https://kubernetes.io/docs/reference/using-api/api-concepts/>
//! says, with Kubernetes' own types. It can do what goes wrong with real ones: refuse, forget, cut, hang, and be away. It knows
//! nothing else: no other resource, no pods, no controller that writes slices. The test is the controller.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use k8s_openapi::List;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ListMeta, ObjectMeta, Status};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use socket2::Socket;

use super::tls::Issued;
use super::{eventually, hold};

/// The namespace of everything in it.
pub const NAMESPACE: &str = "shop";

/// The label that says whose slice it is.
const SERVICE: &str = "kubernetes.io/service-name";

/// The server, stopped when this value is dropped.
pub struct FakeApiServer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    tls: Option<Arc<rustls::ServerConfig>>,
    listener: Option<JoinHandle<()>>,
    /// Its port, reserved while it is away.
    held: Option<Socket>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    slices: BTreeMap<String, EndpointSlice>,
    version: u64,
    /// Every change: its version, its type, the slice after it, or before a deletion.
    history: Vec<(u64, &'static str, EndpointSlice)>,
    /// Versions up to this one are forgotten.
    compacted: u64,
    /// How a watch is told so.
    gone: Gone,
    /// The only token that is let in; `None`: anybody is.
    token: Option<String>,
    /// The verb and the status that it gets.
    refused: Option<(&'static str, u16)>,
    /// Watches are accepted, and nothing is ever sent on them.
    hangs: bool,
    /// How long a watch lasts at most, whatever is asked for.
    longest_watch: Option<Duration>,
    requests: Vec<FakeRequest>,
    sockets: Vec<TcpStream>,
    is_away: bool,
    bookmarks: u64,
    bookmarks_sent: u64,
}

/// What a watch of a forgotten version gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// 200, and an event.
    #[default]
    Event,
    /// 410.
    Status,
}

/// A request that it has got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FakeRequest {
    /// `list` or `watch`.
    pub verb: &'static str,
    pub service: String,
    /// The version from which it watches.
    pub from: Option<u64>,
}

/// One pod of a slice.
#[derive(Clone, Debug)]
pub struct FakePod {
    pub name: String,
    pub uid: String,
    pub address: String,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
}

impl FakePod {
    /// One that is ready. Its uid is made of its name and its address.
    pub fn ready(name: &str, address: &impl ToString) -> Self {
        let (name, address) = (name.to_owned(), address.to_string());
        FakePod { uid: format!("{name}-{address}"), name, address, ready: true, serving: true, terminating: false }
    }

    /// The same while it terminates, and still serves.
    pub fn terminating(&self) -> Self {
        FakePod { ready: false, terminating: true, ..self.clone() }
    }

    /// The same when its readiness probe fails.
    pub fn unready(&self) -> Self {
        FakePod { ready: false, serving: false, ..self.clone() }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            addresses: vec![self.address.clone()],
            conditions: Some(EndpointConditions {
                ready: Some(self.ready),
                serving: Some(self.serving),
                terminating: Some(self.terminating),
            }),
            node_name: Some("machine-1".to_owned()),
            zone: Some("zone-a".to_owned()),
            target_ref: Some(ObjectReference {
                kind: Some("Pod".to_owned()),
                name: Some(self.name.clone()),
                namespace: Some(NAMESPACE.to_owned()),
                uid: Some(self.uid.clone()),
                ..ObjectReference::default()
            }),
            ..Endpoint::default()
        }
    }
}

/// A slice of a service with one port.
pub fn slice(service: &str, name: &str, port: u16, pods: &[FakePod]) -> EndpointSlice {
    let is_six = pods.iter().any(|pod| pod.address.contains(':'));
    EndpointSlice {
        address_type: if is_six { "IPv6" } else { "IPv4" }.to_owned(),
        endpoints: pods.iter().map(FakePod::endpoint).collect(),
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            labels: Some([(SERVICE.to_owned(), service.to_owned())].into()),
            ..ObjectMeta::default()
        },
        ports: Some(vec![EndpointPort {
            name: Some("http".to_owned()),
            port: Some(port.into()),
            protocol: Some("TCP".to_owned()),
            ..EndpointPort::default()
        }]),
    }
}

impl FakeApiServer {
    /// Starts one without slices, which lets anybody in.
    pub fn start() -> Self {
        let mut this = FakeApiServer::prepare();
        this.resume();
        this
    }

    /// The same by TLS with this certificate.
    pub fn start_tls(issued: &Issued) -> Self {
        let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).expect("a key");
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![issued.der.clone()], key)
            .expect("a certificate");
        let mut this = FakeApiServer::prepare();
        this.tls = Some(Arc::new(config));
        this.resume();
        this
    }

    /// One that is not there yet: [`FakeApiServer::resume`] starts it.
    pub fn prepare() -> Self {
        let held = hold(SocketAddr::from(([127, 0, 0, 1], 0)));
        let address = held.local_addr().expect("an address").as_socket().expect("an IP socket");
        let shared =
            Arc::new(Shared { state: Mutex::new(State { version: 1000, ..State::default() }), ..Shared::default() });
        FakeApiServer { address, shared, tls: None, listener: None, held: Some(held) }
    }

    /// The section of the configuration that follows these services.
    pub fn config(&self, more: &str) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!(
            "[registry]\nkind = \"kubernetes\"\n[registry.kubernetes]\nurl = \"{scheme}://{}\"\nnamespace = \"{NAMESPACE}\"\n{more}\n",
            self.address
        )
    }

    /// Writes a slice, new or not.
    pub fn put(&self, mut slice: EndpointSlice) {
        self.change(|state| {
            let name = slice.metadata.name.clone().expect("a name");
            slice.metadata.resource_version = Some(state.version.to_string());
            let kind = if state.slices.contains_key(&name) { "MODIFIED" } else { "ADDED" };
            state.slices.insert(name, slice.clone());
            (kind, slice)
        });
    }

    /// Deletes a slice.
    pub fn delete(&self, name: &str) {
        self.change(|state| {
            let mut slice = state.slices.remove(name).expect("a slice of this name");
            slice.metadata.resource_version = Some(state.version.to_string());
            ("DELETED", slice)
        });
    }

    fn change(&self, change: impl FnOnce(&mut State) -> (&'static str, EndpointSlice)) {
        let mut state = self.shared.state();
        state.version += 1;
        let (kind, slice) = change(&mut state);
        let version = state.version;
        state.history.push((version, kind, slice));
        self.shared.changed.notify_all();
    }

    /// Something else in the cluster changes, of which watches hear by a bookmark alone. Waits until one was sent.
    pub fn bookmark(&self) {
        let sent = {
            let mut state = self.shared.state();
            state.version += 100;
            state.bookmarks += 1;
            self.shared.changed.notify_all();
            state.bookmarks_sent
        };
        eventually("a bookmark was sent", || (self.shared.state().bookmarks_sent > sent).then_some(()));
    }

    /// Forgets all that has happened so far. Watches that are open go on.
    pub fn compact(&self, gone: Gone) {
        let mut state = self.shared.state();
        (state.compacted, state.gone) = (state.version, gone);
        // What comes next is a later version.
        state.version += 1;
    }

    /// Lets only requests with this token in.
    pub fn want_token(&self, token: &str) {
        self.shared.state().token = Some(token.to_owned());
    }

    /// Answers this verb with this status from now on, and cuts what is open.
    pub fn refuse(&self, verb: &'static str, status: u16) {
        self.shared.state().refused = Some((verb, status));
        self.cut();
    }

    /// Refuses nothing any more.
    pub fn accept(&self) {
        self.shared.state().refused = None;
    }

    /// Open watches, and those that come, are sent nothing more, not even their end.
    pub fn hang(&self) {
        self.shared.state().hangs = true;
    }

    /// Watches that come are answered again. Those that hang go on to hang.
    pub fn unhang(&self) {
        self.shared.state().hangs = false;
    }

    /// Watches end after this time, as they do when an API server is about to end.
    pub fn end_watches_after(&self, time: Duration) {
        self.shared.state().longest_watch = Some(time);
        self.shared.changed.notify_all();
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        for socket in self.shared.state().sockets.drain(..) {
            // The client may have closed it.
            _ = socket.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// Goes away: nobody listens any more. Its port stays reserved.
    pub fn kill(&mut self) {
        self.shared.state().is_away = true;
        self.cut();
        self.held = Some(hold(self.address));
        // Its listener waits for one more.
        _ = TcpStream::connect(self.address);
        self.listener.take().expect("it runs").join().expect("a listener");
    }

    /// Comes back, with what it had.
    pub fn resume(&mut self) {
        let socket = self.held.take().expect("it is away");
        socket.listen(64).expect("a socket that can listen");
        let listener = TcpListener::from(socket);
        self.shared.state().is_away = false;
        let (shared, tls) = (Arc::clone(&self.shared), self.tls.clone());
        self.listener = Some(std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("a connection");
                let mut state = shared.state();
                if state.is_away {
                    return;
                }
                state.sockets.push(stream.try_clone().expect("a socket"));
                drop(state);
                let (shared, tls) = (Arc::clone(&shared), tls.clone());
                std::thread::spawn(move || {
                    // Its end is a cut, by either side.
                    _ = match tls {
                        Some(config) => {
                            let connection = rustls::ServerConnection::new(config).expect("a configuration");
                            shared.serve(rustls::StreamOwned::new(connection, stream))
                        }
                        None => shared.serve(stream),
                    };
                });
            }
        }));
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<FakeRequest> {
        self.shared.state().requests.clone()
    }

    /// The number of requests of this verb for this service.
    pub fn count(&self, verb: &str, service: &str) -> usize {
        let is_it = |request: &&FakeRequest| request.verb == verb && request.service == service;
        self.shared.state().requests.iter().filter(is_it).count()
    }

    /// The version of the last change.
    pub fn version(&self) -> u64 {
        self.shared.state().version
    }
}

impl Drop for FakeApiServer {
    fn drop(&mut self) {
        if self.held.is_none() && !std::thread::panicking() {
            self.kill();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    /// Answers the requests of a connection, one after the other.
    fn serve(&self, stream: impl Read + Write) -> std::io::Result<()> {
        let mut stream = BufReader::new(stream);
        loop {
            let (mut target, mut token) = (String::new(), None);
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                let line = line.trim_end();
                if let Some(rest) = line.strip_prefix("GET ") {
                    target = rest.trim_end_matches(" HTTP/1.1").to_owned();
                } else if let Some(bearer) = line.strip_prefix("authorization: Bearer ") {
                    token = Some(bearer.to_owned());
                } else if line.is_empty() {
                    break;
                }
            }
            let stream = stream.get_mut();
            let (path, query) = target.split_once('?').unwrap_or((&target, ""));
            let query: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
            let wanted = format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices");
            let label = query.get("labelSelector").copied().unwrap_or_default().replace("%2F", "/").replace("%3D", "=");
            let service = label.strip_prefix(&format!("{SERVICE}=")).unwrap_or_default().to_owned();
            let verb = if query.contains_key("watch") { "watch" } else { "list" };
            let from = query.get("resourceVersion").and_then(|version| version.parse().ok());
            let mut state = self.state();
            state.requests.push(FakeRequest { verb, service: service.clone(), from });
            let is_let_in = state.token.is_none() || state.token == token;
            let refused = state.refused.filter(|(of, _)| *of == verb).map(|(_, status)| status);
            drop(state);
            if !is_let_in {
                refuse(stream, 401, "Unauthorized", "Unauthorized")?;
            } else if let Some(status) = refused {
                let message = format!(
                    "endpointslices.discovery.k8s.io is forbidden: User \"system:serviceaccount:shop:clearcoat\" cannot {verb} \
                     resource \"endpointslices\""
                );
                refuse(stream, status, "Forbidden", &message)?;
            } else if path != wanted || service.is_empty() {
                refuse(stream, 404, "NotFound", "the server could not find the requested resource")?;
            } else if verb == "list" {
                self.list(stream, &service)?;
            } else {
                let seconds = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).expect("a limit");
                assert_eq!(query.get("allowWatchBookmarks"), Some(&"true"));
                self.watch(stream, &service, from.expect("a version"), Duration::from_secs(seconds))?;
            }
        }
    }

    fn list(&self, stream: &mut impl Write, service: &str) -> std::io::Result<()> {
        let state = self.state();
        let items = state.slices.values().filter(|slice| is_of(slice, service)).cloned().collect();
        let metadata = ListMeta { resource_version: Some(state.version.to_string()), ..ListMeta::default() };
        drop(state);
        answer(stream, 200, &serde_json::to_vec(&List { items, metadata }).expect("JSON"))
    }

    fn watch(&self, stream: &mut impl Write, service: &str, from: u64, limit: Duration) -> std::io::Result<()> {
        let began = Instant::now();
        let mut state = self.state();
        let gone = Status {
            code: Some(410),
            message: Some(format!("too old resource version: {from} ({})", state.version)),
            reason: Some("Expired".to_owned()),
            status: Some("Failure".to_owned()),
            ..Status::default()
        };
        let is_gone = from < state.compacted;
        if is_gone && state.gone == Gone::Status {
            drop(state);
            return answer(stream, 410, &serde_json::to_vec(&gone).expect("JSON"));
        }
        let (mut sent, mut bookmarks) = (from, state.bookmarks);
        drop(state);
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        stream.flush()?;
        if is_gone {
            line(stream, &json!({ "type": "ERROR", "object": gone }))?;
            return end(stream);
        }
        let mut hung = false;
        state = self.state();
        loop {
            let is_over = began.elapsed() >= state.longest_watch.map_or(limit, |longest| longest.min(limit));
            hung |= state.hangs;
            if state.is_away {
                return Ok(());
            }
            let news: Vec<_> = state.history.iter().filter(|(version, ..)| *version > sent).cloned().collect();
            if !hung && (!news.is_empty() || is_over || bookmarks != state.bookmarks) {
                let bookmark = (bookmarks != state.bookmarks).then_some(state.version);
                bookmarks = state.bookmarks;
                sent = state.version.max(sent);
                drop(state);
                for (_, kind, slice) in news.iter().filter(|(.., slice)| is_of(slice, service)) {
                    line(stream, &json!({ "type": kind, "object": slice }))?;
                }
                if let Some(version) = bookmark {
                    let metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
                    let object = json!({ "kind": "EndpointSlice", "metadata": metadata, "endpoints": null });
                    line(stream, &json!({ "type": "BOOKMARK", "object": object }))?;
                }
                if is_over {
                    return end(stream);
                }
                state = self.state();
                state.bookmarks_sent += u64::from(bookmark.is_some());
            }
            (state, _) = self.changed.wait_timeout(state, Duration::from_millis(100)).expect("nobody panics with it");
        }
    }
}

fn is_of(slice: &EndpointSlice, service: &str) -> bool {
    slice.metadata.labels.as_ref().is_some_and(|labels| labels.get(SERVICE).is_some_and(|of| of == service))
}

fn answer(stream: &mut impl Write, status: u16, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    write!(stream, "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n")?;
    stream.write_all(body)?;
    stream.flush()
}

fn refuse(stream: &mut impl Write, code: u16, reason: &str, message: &str) -> std::io::Result<()> {
    let status = Status {
        code: Some(code.into()),
        message: Some(message.to_owned()),
        reason: Some(reason.to_owned()),
        status: Some("Failure".to_owned()),
        ..Status::default()
    };
    answer(stream, code, &serde_json::to_vec(&status).expect("JSON"))
}

/// One line of a watch, in two chunks: nobody promises that a line is one.
fn line(stream: &mut impl Write, event: &serde_json::Value) -> std::io::Result<()> {
    let text = format!("{event}\n");
    let (first, second) = text.split_at(text.len() / 2);
    for chunk in [first, second] {
        write!(stream, "{:x}\r\n{chunk}\r\n", chunk.len())?;
    }
    stream.flush()
}

fn end(stream: &mut impl Write) -> std::io::Result<()> {
    stream.write_all(b"0\r\n\r\n")?;
    stream.flush()
}
