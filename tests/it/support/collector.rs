//! The test's own collector of OTLP over HTTP. It reads spans with the official types of OpenTelemetry.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use clearcoat::http_server::{self, Handler, Response, response};
use clearcoat::shutdown::{self, ShutdownHandle, Stage};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::eventually;
use super::tls::Issued;

/// A running collector.
pub struct Collector {
    pub address: SocketAddr,
    received: Arc<Received>,
    shutdown: ShutdownHandle,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Received {
    spans: Mutex<Vec<Collected>>,
    /// The status of its answers, if it is no 200.
    refuses: Mutex<Option<u16>>,
    /// What the requests had in `Authorization`.
    keys: Mutex<Vec<String>>,
}

/// A span as it was exported.
#[derive(Clone, Debug)]
pub struct Collected {
    pub service: String,
    pub span: Span,
}

impl Collected {
    /// An attribute as text; empty if it is not there.
    pub fn get(&self, key: &str) -> String {
        let pair = self.span.attributes.iter().find(|pair| pair.key == key);
        match pair.and_then(|pair| pair.value.clone()?.value) {
            Some(Value::StringValue(text)) => text,
            Some(Value::IntValue(number)) => number.to_string(),
            Some(Value::BoolValue(flag)) => flag.to_string(),
            _ => String::new(),
        }
    }

    /// Whether it is a part of that span.
    pub fn is_within(&self, parent: &Collected) -> bool {
        self.span.trace_id == parent.span.trace_id && self.span.parent_span_id == parent.span.span_id
    }

    pub fn trace_id(&self) -> String {
        self.span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub fn is_client(&self) -> bool {
        self.span.kind == 3
    }
}

impl Collector {
    pub fn start() -> Self {
        let received = Arc::new(Received::default());
        let (shutdown, stages) = shutdown::channel();
        let (send, address) = std::sync::mpsc::channel();
        let handler = Arc::clone(&received);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let socket = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
                send.send(socket.local_addr().expect("an address")).expect("the test waits");
                http_server::serve(socket, handler, 64, 16 << 20, stages).await;
            });
        });
        let address = address.recv().expect("an address");
        Collector { address, received, shutdown, thread: Some(thread) }
    }

    /// A listener before it that speaks TLS with this certificate, for as long as the runtime lives that is returned with its
    /// address.
    pub fn by_tls(&self, issued: &Issued) -> (SocketAddr, tokio::runtime::Runtime) {
        let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).expect("a key");
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![issued.der.clone()], key)
            .expect("a certificate");
        let (acceptor, behind) = (TlsAcceptor::from(Arc::new(config)), self.address);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let socket = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a socket");
        let address = socket.local_addr().expect("an address");
        runtime.spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    // A client that does not accept the certificate ends the handshake.
                    let Ok(mut client) = acceptor.accept(stream).await else { return };
                    let mut collector = TcpStream::connect(behind).await.expect("the collector");
                    _ = copy_bidirectional(&mut client, &mut collector).await;
                });
            }
        });
        (address, runtime)
    }

    /// What the requests so far had in `Authorization`.
    pub fn keys(&self) -> Vec<String> {
        self.received.keys.lock().unwrap().clone()
    }

    /// The section of the configuration that exports to it.
    pub fn config(&self, sample: f64) -> String {
        format!("[traces]\nendpoint = \"http://{}\"\nsample = {sample:?}\nservice_name = \"shop\"\n", self.address)
    }

    /// It answers with this status from now on.
    pub fn refuse(&self, status: u16) {
        *self.received.refuses.lock().unwrap() = Some(status);
    }

    /// It takes spans again.
    pub fn accept(&self) {
        *self.received.refuses.lock().unwrap() = None;
    }

    pub fn spans(&self) -> Vec<Collected> {
        self.received.spans.lock().unwrap().clone()
    }

    /// What is made of the spans so far, once it is something.
    pub fn eventually<T>(&self, what: &str, mut find: impl FnMut(&[Collected]) -> Option<T>) -> T {
        eventually(what, || find(&self.spans()))
    }

    /// The span of this path at this listener, once it is there.
    pub fn request(&self, listener: &str, path: &str) -> Collected {
        self.eventually(&format!("the span of {path} at {listener}"), |spans| {
            let is_it = |span: &&Collected| span.get("clearcoat.listener") == listener && span.get("url.path") == path;
            spans.iter().find(is_it).cloned()
        })
    }

    /// The spans within this one, in their order, once there are so many.
    pub fn within(&self, parent: &Collected, count: usize) -> Vec<Collected> {
        self.eventually(&format!("{count} spans within {}", parent.span.name), |spans| {
            let mut within: Vec<_> = spans.iter().filter(|span| span.is_within(parent)).cloned().collect();
            within.sort_by_key(|span| span.span.start_time_unix_nano);
            (within.len() >= count).then_some(within)
        })
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.shutdown.advance(Stage::Stopping);
        let ended = self.thread.take().expect("once").join();
        if !std::thread::panicking() {
            ended.expect("the collector did not panic");
        }
    }
}

impl Handler for Received {
    fn wants_body(&self, _: &http::request::Parts, _: SocketAddr) -> bool {
        true
    }

    async fn handle(&self, request: http::Request<hyper::body::Bytes>, _: SocketAddr) -> Response {
        if let Some(key) = request.headers().get("authorization") {
            self.keys.lock().unwrap().push(key.to_str().expect("text").to_owned());
        }
        if let Some(status) = *self.refuses.lock().unwrap() {
            return response(status, "text/plain", b"not now".to_vec());
        }
        assert_eq!(request.uri().path(), "/v1/traces");
        assert_eq!(request.headers()["content-type"], "application/x-protobuf");
        let export = ExportTraceServiceRequest::decode(request.into_body()).expect("OTLP");
        for resource in export.resource_spans {
            let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let named = attributes.into_iter().find(|pair| pair.key == "service.name");
            let Some(Value::StringValue(service)) = named.and_then(|pair| pair.value?.value) else { panic!("a name") };
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let spans = spans.map(|span| Collected { service: service.clone(), span });
            self.spans.lock().unwrap().extend(spans);
        }
        // An empty ExportTraceServiceResponse.
        response(200, "application/x-protobuf", Vec::new())
    }
}
