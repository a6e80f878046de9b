//! Spans to a collector, by OTLP over HTTP (<https://opentelemetry.io/docs/specs/otlp/#otlphttp>).
//!
//! **Why not the `opentelemetry-otlp` crate.** What that and its SDK do is sampling, ids, batches and a runtime to send them;
//! here spans come with ids and times, already sampled. Left over is the wire format, which is nine messages of protobuf and
//! a POST: [`message`] has them, in the prost that etcd's client brings anyway, and [`HttpConnection`] posts them. The crates
//! would be eleven more to build and ship, four of them a second time in another version (rand 0.9 and what it needs). The
//! official types are in the tests, where they read what is written here.
//!
//! **Why HTTP and not gRPC.** It is what OTLP recommends by default, every collector takes it (port 4318), and a proxy or a
//! `curl` can be put between. A hosted collector is reached by TLS, with the fields that it knows its customers by.
//!
//! **Nobody waits for it.** One thread with its own runtime takes the spans, and nothing else runs there. A batch that cannot
//! be sent is dropped and counted, not kept: the spans that come meanwhile are worth more than those that are old. After
//! a failure it pauses, and what does not fit into the queue meanwhile is dropped there. The log says when it begins to fail
//! and when it works again, not for each batch.

mod message;

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use http::{HeaderValue, Request, header};
use http_body_util::Full;
use hyper::body::Bytes;
use prometheus::IntCounter;
use prost::Message;
use tokio::sync::{mpsc, oneshot};

use crate::backoff::Backoff;
use crate::config::{HeaderError, ServerUrl, reveal};
use crate::fleet::SecretHeaders;
use crate::http_client::server::{self, ConnectError, ServerKeys};
use crate::http_client::{self, HttpConnection};
use crate::telemetry::causes;
use crate::telemetry::traces::FinishedSpan;
use message::{ExportRequest, ExportResponse};

/// A batch is sent when it has this many spans, as the SDKs of OpenTelemetry do.
const FULL: usize = 512;

/// It is sent after this time if it is not full.
const GATHER: Duration = Duration::from_secs(1);

/// How long a collector may take for a batch: the default of OTLP's exporters.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the collector is configured.
const KEYS: ServerKeys = ServerKeys { url: "traces.endpoint", ca: "traces.ca" };

/// The bounds of the pauses after failures.
const BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(5) };

/// The longest answer that is read, in bytes, and the longest text of a collector in the log, in characters.
const MAX_ANSWER: usize = 64 * 1024;
const MAX_TEXT: usize = 256;

/// How spans are exported.
#[derive(Debug)]
pub struct ExportOptions {
    /// The collector.
    pub endpoint: ServerUrl,
    /// The file with the CAs of its certificate; `None`: those that this system trusts.
    pub ca: Option<PathBuf>,
    /// Fields of each request.
    pub headers: SecretHeaders,
    /// `service.name` of all spans.
    pub service_name: String,
    /// Counts spans that were lost.
    pub dropped: IntCounter,
}

/// The thread that exports.
#[derive(Debug)]
pub struct ExporterThread {
    end: oneshot::Sender<()>,
    ended: Receiver<()>,
}

impl ExporterThread {
    /// Starts it.
    ///
    /// # Errors
    /// If the system refuses a thread, or what a runtime needs.
    pub fn start(options: ExportOptions, spans: mpsc::Receiver<Vec<FinishedSpan>>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (end, asked) = oneshot::channel();
        let (running, ended) = sync_channel(0);
        let exporter = Exporter { options, spans, batch: Vec::new(), connection: None, failures: 0, is_told: None };
        std::thread::Builder::new().name("traces".into()).spawn(move || {
            runtime.block_on(exporter.run(asked));
            // A name that is being resolved is not waited for.
            runtime.shutdown_background();
            drop::<SyncSender<()>>(running);
        })?;
        Ok(ExporterThread { end, ended })
    }

    /// Has it send what there is, and waits for that; at most this long, as the collector may hang. Returns whether it has
    /// ended.
    pub fn end(self, patience: Duration) -> bool {
        // It has ended by itself if nobody hears this.
        _ = self.end.send(());
        matches!(self.ended.recv_timeout(patience), Err(RecvTimeoutError::Disconnected))
    }
}

/// Why a batch did not arrive.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("traces.headers: {0}")]
    Header(#[from] HeaderError),
    #[error("the request cannot be written: {0}")]
    Request(#[from] http::Error),
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Late,
    #[error("the answer cannot be read: {0}")]
    Answer(Box<dyn std::error::Error + Send + Sync>),
    #[error("the collector answers {0}: see traces.headers")]
    NoAccess(http::StatusCode),
    #[error("the collector answers {0}")]
    Status(http::StatusCode),
    #[error("the collector rejects {spans} spans: {text}")]
    Rejected { spans: u64, text: String },
}

/// Takes spans and sends them.
struct Exporter {
    options: ExportOptions,
    spans: mpsc::Receiver<Vec<FinishedSpan>>,
    /// What is sent next.
    batch: Vec<FinishedSpan>,
    connection: Option<HttpConnection>,
    failures: u32,
    /// What the log has said last: whether it works.
    is_told: Option<bool>,
}

impl Exporter {
    async fn run(mut self, asked_to_end: oneshot::Receiver<()>) {
        let is_over = tokio::select! {
            () = self.export_all() => true,
            _ = asked_to_end => false,
        };
        if !is_over {
            self.spans.close();
            // A batch that was on its way is sent once more: half of one is none.
            while self.gather().await {
                self.export().await;
            }
        }
    }

    /// Exports until nobody makes spans any more.
    async fn export_all(&mut self) {
        while self.gather().await {
            self.export().await;
            if self.failures > 0 {
                tokio::time::sleep(BACKOFF.bound(self.failures)).await;
            }
        }
    }

    /// Gathers a batch. False at the end. Nothing is lost if it is cancelled.
    async fn gather(&mut self) -> bool {
        if self.batch.is_empty() {
            let Some(first) = self.spans.recv().await else { return false };
            self.batch = first;
        }
        let more = async {
            while self.batch.len() < FULL {
                let Some(more) = self.spans.recv().await else { return };
                self.batch.extend(more);
            }
        };
        // A batch that is not full is sent as it is.
        _ = tokio::time::timeout(GATHER, more).await;
        true
    }

    /// Sends the batch, or drops and counts it.
    async fn export(&mut self) {
        let spans = self.batch.len() as u64;
        let body = ExportRequest::new(&self.options.service_name, &self.batch).encode_to_vec().into();
        let sent = tokio::time::timeout(PATIENCE, self.post(body)).await.unwrap_or(Err(ExportError::Late));
        self.batch.clear();
        match sent {
            Ok(()) => self.failures = 0,
            // It works, and does not like some of them.
            Err(ExportError::Rejected { spans, .. }) => {
                self.failures = 0;
                self.options.dropped.inc_by(spans);
            }
            Err(_) => {
                self.failures = self.failures.saturating_add(1);
                self.options.dropped.inc_by(spans);
            }
        }
        self.tell(sent.err());
    }

    async fn post(&mut self, body: Bytes) -> Result<(), ExportError> {
        let answer = match self.connection.take().filter(HttpConnection::is_ready) {
            // A collector may close an idle connection at any time.
            Some(kept) => match self.send_over(kept, body.clone()).await {
                Err(ExportError::Http(_)) => self.send_anew(body).await?,
                answered => answered?,
            },
            None => self.send_anew(body).await?,
        };
        match ExportResponse::decode(answer).map_err(|error| ExportError::Answer(error.into()))?.partial_success {
            Some(partial) if partial.rejected_spans > 0 => Err(ExportError::Rejected {
                spans: partial.rejected_spans.unsigned_abs(),
                text: partial.error_message.chars().take(MAX_TEXT).collect(),
            }),
            _ => Ok(()),
        }
    }

    async fn send_anew(&mut self, body: Bytes) -> Result<Bytes, ExportError> {
        let ExportOptions { endpoint, ca, .. } = &self.options;
        let connection = server::connect(endpoint, ca.as_deref(), KEYS).await?;
        self.send_over(connection, body).await
    }

    /// Sends it, and keeps the connection if all is well. Returns the body of the answer.
    async fn send_over(&mut self, mut connection: HttpConnection, body: Bytes) -> Result<Bytes, ExportError> {
        let ExportOptions { endpoint, headers, .. } = &self.options;
        let mut request = Request::post(endpoint.path())
            .header(header::HOST, endpoint.authority())
            .header(header::CONTENT_TYPE, "application/x-protobuf");
        for (name, value) in reveal(headers).await? {
            let mut value = HeaderValue::try_from(value).map_err(http::Error::from)?;
            value.set_sensitive(true);
            request = request.header(name, value);
        }
        let request = request.body(Full::new(body))?;
        let answer = connection.send(request).await?;
        let status = answer.status();
        let body = http_client::read(answer.into_body(), MAX_ANSWER).await.map_err(ExportError::Answer)?;
        match status.as_u16() {
            200..=299 => {}
            401 | 403 => return Err(ExportError::NoAccess(status)),
            _ => return Err(ExportError::Status(status)),
        }
        self.connection = Some(connection);
        Ok(body)
    }

    /// Says what has changed.
    fn tell(&mut self, error: Option<ExportError>) {
        let works = error.is_none();
        if self.is_told.replace(works) == Some(works) {
            return;
        }
        let collector = self.options.endpoint.to_string();
        match error {
            None => tracing::info!(%collector, "spans are exported"),
            Some(error) => {
                let error = causes(&error);
                tracing::warn!(%collector, %error, "spans are not exported: they are lost, and nothing else");
            }
        }
    }
}
