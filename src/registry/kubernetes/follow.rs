//! Follows the slices of one service: all of them once, and then every change.
//!
//! ```text
//! LIST at version V ─> WATCH from V ── events, bookmarks ──> V moves with them
//!    ^                    │ ^   │
//!    │                    │ └───┴── its time is over, or it was cut: WATCH from V, after a pause if it was cut
//!    └── 410, or RELIST ──┘
//! ```
//!
//! **A watch that hangs is found by its own end.** The API server ends each one after the time that we ask for ([`WATCH`]). One
//! that has not ended by then hangs: behind a balancer the connection to us may stay open for ever when the one behind it is
//! gone (kubernetes/kubernetes#107266). A new watch costs one request, so the time is short.
//!
//! **410 means: list again**, as the status of a watch and as an event in one, of which clients have known only the other
//! (kubernetes-sigs/headlamp#7451: they asked for the version that was too old, for ever). If the watch after a list is gone
//! at once, the next list comes after a pause.
//!
//! **History can begin anew**: after a restore from a backup a watch from our version waits for a future that will be another
//! one, without an error. So everything is listed again from time to time ([`RELIST`]).
//!
//! **A watch that ends at once** without an event, as some proxies do it, counts as a failure: otherwise it would be asked for
//! without a pause. A permission to watch that is missing counts as one, too, and the next try lists again: so nodes that
//! join are seen all the same, if late.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use super::access::ApiServerSettings;
use super::api::{ApiError, SliceApi};
use super::slice::{EndpointSlice, SliceList, WatchEvent};
use crate::backoff::Backoff;
use crate::telemetry::{Resync, causes};

/// How long one watch lasts at least; up to [`SPREAD`] more, at random.
const WATCH: Duration = Duration::from_secs(30);
const SPREAD: Duration = Duration::from_secs(10);

/// How long after its end it may still be open.
const GRACE: Duration = Duration::from_secs(5);

/// How often all slices are listed again.
const RELIST: Duration = Duration::from_secs(300);

/// A watch that was shorter, and had no event, was none.
const SHORTEST: Duration = Duration::from_secs(1);

/// The longest line of a watch, in bytes: one slice.
const MAX_LINE: usize = 16 << 20;

/// The bounds of the pauses after failures.
const BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(30) };

/// What is new of a service.
#[derive(Debug)]
pub(super) struct ServiceReport {
    /// Its number.
    pub(super) service: usize,
    pub(super) news: ServiceNews,
}

/// What is new.
#[derive(Debug)]
pub(super) enum ServiceNews {
    /// All its slices, and why they were listed; `None`: as they are from time to time.
    Listed(Vec<EndpointSlice>, Option<Resync>),
    /// One is new, or another.
    Changed(EndpointSlice),
    /// The one with this name is gone.
    Deleted(String),
    /// The API server answers, and nothing has changed.
    Alive,
    /// It does not, for this reason.
    Failed(String),
}

/// Follows one service.
pub(super) struct ServiceFollower {
    service: usize,
    api: SliceApi,
    /// The version up to which every change is known.
    version: Option<String>,
    listed_at: Instant,
    failures: u32,
    /// Why the next list is made.
    cause: Option<Resync>,
}

/// The receiver is gone.
pub(super) struct ReceiverGone;

/// Why a round ended.
enum RoundEnd {
    Failed(ApiError),
    ReceiverGone,
}

impl From<ApiError> for RoundEnd {
    fn from(error: ApiError) -> Self {
        RoundEnd::Failed(error)
    }
}

impl From<ReceiverGone> for RoundEnd {
    fn from(_: ReceiverGone) -> Self {
        RoundEnd::ReceiverGone
    }
}

impl ServiceFollower {
    pub(super) fn new(service: usize, server: &ApiServerSettings, namespace: &str, name: &str) -> Self {
        let (api, listed_at) = (SliceApi::new(server, namespace, name), Instant::now());
        ServiceFollower { service, api, version: None, listed_at, failures: 0, cause: Some(Resync::Start) }
    }

    /// Works until the receiver of the reports is gone.
    pub(super) async fn run(mut self, reports: mpsc::Sender<ServiceReport>) {
        loop {
            let listed_before = self.listed_at;
            match self.round(&reports).await {
                Ok(()) => self.failures = 0,
                Err(RoundEnd::ReceiverGone) => return,
                Err(RoundEnd::Failed(error)) => {
                    match error {
                        ApiError::Forbidden { .. } => self.version = None,
                        ApiError::Gone { .. } => {
                            self.version = None;
                            self.cause = self.cause.or(Some(Resync::Compacted));
                            if self.listed_at == listed_before {
                                // Only what we know is outdated: the API server works.
                                continue;
                            }
                        }
                        _ => {}
                    }
                    let reason = causes(&error).to_string();
                    if self.tell(&reports, ServiceNews::Failed(reason)).await.is_err() {
                        return;
                    }
                    self.failures = self.failures.saturating_add(1);
                    sleep(BACKOFF.pause(self.failures, fastrand::f64())).await;
                }
            }
        }
    }

    /// Lists if that is due, and watches until the watch ends.
    async fn round(&mut self, reports: &mpsc::Sender<ServiceReport>) -> Result<(), RoundEnd> {
        if self.listed_at.elapsed() >= RELIST {
            self.version = None;
        }
        let version = match self.version.take() {
            Some(version) => version,
            None => {
                let SliceList { metadata, items } = self.api.list().await?;
                self.listed_at = Instant::now();
                let cause = self.cause.take();
                self.tell(reports, ServiceNews::Listed(items, cause)).await?;
                metadata.resource_version
            }
        };
        let lasts = WATCH + SPREAD.mul_f64(fastrand::f64());
        self.version = Some(version.clone());
        let began = Instant::now();
        let (body, connection) = self.api.watch(&version, lasts).await?;
        self.tell(reports, ServiceNews::Alive).await?;
        let lines = self.read(body, began + lasts + GRACE, reports).await?;
        if lines == 0 && began.elapsed() < SHORTEST {
            return Err(ApiError::Short.into());
        }
        self.api.give_back(connection);
        Ok(())
    }

    /// Reads a watch to its end. Returns the number of its lines.
    async fn read(
        &mut self,
        mut body: Incoming,
        until: Instant,
        reports: &mpsc::Sender<ServiceReport>,
    ) -> Result<usize, RoundEnd> {
        let (mut line, mut lines) = (Vec::new(), 0);
        loop {
            let frame = timeout_at(until, body.frame()).await.map_err(|_| ApiError::Silent)?;
            let Some(frame) = frame else { return Ok(lines) };
            let Ok(data) = frame.map_err(ApiError::Cut)?.into_data() else { continue };
            for piece in data.split_inclusive(|&byte| byte == b'\n') {
                line.extend_from_slice(piece);
                if line.len() > MAX_LINE {
                    return Err(ApiError::LongLine(MAX_LINE).into());
                }
                if !line.ends_with(b"\n") {
                    continue;
                }
                if !line.trim_ascii().is_empty() {
                    self.take(&line, reports).await?;
                    lines += 1;
                    self.failures = 0;
                }
                line.clear();
            }
        }
    }

    async fn take(&mut self, line: &[u8], reports: &mpsc::Sender<ServiceReport>) -> Result<(), RoundEnd> {
        let (version, news) = match WatchEvent::parse(line).map_err(ApiError::Json)? {
            WatchEvent::Put(slice) => (slice.metadata.resource_version.clone(), ServiceNews::Changed(slice)),
            WatchEvent::Deleted(metadata) => (metadata.resource_version, ServiceNews::Deleted(metadata.name)),
            WatchEvent::Bookmark(version) => (version, ServiceNews::Alive),
            WatchEvent::Refused(status) => return Err(ApiError::of_event(status).into()),
        };
        self.tell(reports, news).await?;
        // After it was taken: what is lost in between is asked for again.
        self.version = Some(version).filter(|version| !version.is_empty()).or(self.version.take());
        Ok(())
    }

    async fn tell(&self, reports: &mpsc::Sender<ServiceReport>, news: ServiceNews) -> Result<(), ReceiverGone> {
        reports.send(ServiceReport { service: self.service, news }).await.map_err(|_| ReceiverGone)
    }
}
