//! The purge listener: accepts Magento's purges, appends them to the journal and waits for every Varnish.
//!
//! A GET ends with its client; a purge outlives it. Once its head is read, it runs in a task of its own (see
//! [`crate::http_server`]), so it is carried out even if PHP hangs up, times out or is killed. (Magento before 2.2 hung
//! up at once.)
//!
//! The number of purges under way is bounded twice. A connection occupies a slot until its purge is answered, even if
//! nobody is left to read the answer, and a connection without a slot waits ([`crate::http_server`]). Waiting is best
//! for Magento, which never looks at a status. Each address of the listener has its own slots, so the total is bounded
//! here: beyond [`MAX_UNDER_WAY`] a purge is answered 503 with `Retry-After` before any part of it is accepted.

mod purge_span;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use http::header;
use hyper::body::Bytes;
use ipnet::IpNet;
use parking_lot::Mutex;
use prometheus::IntGauge;
use serde::Serialize;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::attribution::{Attribution, Ended, NamedTargets, Throttle, describe};
use crate::clock;
use crate::config::{PurgeListener, Token};
use crate::delivery::{Acknowledged, Deliveries, Expected, Refusable};
use crate::fleet::NodeId;
use crate::http_server::{self, Handler, Response, json, text};
use crate::journal::{Journal, Position};
use crate::purge::{ParsedPurge, Purge, PurgeRules, Refusal, Target, parse};
use crate::replicas::{self, GivenNames, PeerAnswers, Received, Replicas};
use crate::telemetry::traces::Tracer;
use crate::telemetry::{IncidentKind, Metrics, PurgeResult, causes};
use purge_span::PurgeSpan;

/// The most purges under way at once. A shop has tens; each takes some KiB of memory.
pub const MAX_UNDER_WAY: usize = 4096;

/// The request handler of the purge listener.
pub struct PurgeApi {
    senders: ArcSwap<PurgeSenders>,
    ack_timeout: Duration,
    journal: Arc<dyn Journal>,
    deliveries: Arc<Deliveries>,
    /// The other clearcoats in front of this fleet, if their discovery is configured.
    replicas: Option<Arc<Replicas>>,
    attribution: Arc<Attribution>,
    metrics: Arc<Metrics>,
    /// Makes spans of purges, if there are traces.
    tracer: Option<Arc<Tracer>>,
    under_way: Semaphore,
    overload_told: Mutex<Throttle>,
    not_durable_told: Mutex<Throttle>,
    forbidden_told: Mutex<Throttle>,
    refused_told: Mutex<Throttle>,
}

/// Who may purge, and what a purge is: what a reload of the configuration changes.
struct PurgeSenders {
    allow: Vec<IpNet>,
    token: Option<Token>,
    rules: PurgeRules,
}

impl PurgeSenders {
    fn of(config: &PurgeListener) -> Self {
        PurgeSenders { allow: config.allow.clone(), token: config.token.clone(), rules: config.rules() }
    }
}

/// Counts a purge as under way until it is dropped.
struct PurgeInFlight<'a> {
    _permit: SemaphorePermit<'a>,
    waiting: &'a IntGauge,
}

impl Drop for PurgeInFlight<'_> {
    fn drop(&mut self) {
        self.waiting.dec();
    }
}

/// The body of an answer to an accepted purge.
#[derive(Serialize)]
struct AcceptedBody<'a> {
    position: Position,
    applied: &'a [NodeId],
    /// The nodes that have yet to apply it. Until then the edge checks their answers for staleness.
    pending: &'a [NodeId],
    fenced: &'a [NodeId],
    invalidated: u64,
    /// The nodes among `fenced` that another replica has not reached, by the name of that replica.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    fenced_at: &'a BTreeMap<NodeId, Vec<NodeId>>,
    /// Replicas that were sent the purge and have not confirmed it.
    #[serde(skip_serializing_if = "<[NodeId]>::is_empty")]
    unconfirmed: &'a [NodeId],
}

/// Whether this is a message of another replica.
fn is_told(method: &http::Method, uri: &http::Uri) -> bool {
    method == http::Method::POST && [replicas::PATH, replicas::NAMES, replicas::PURGES].contains(&uri.path())
}

/// The body of any other answer.
#[derive(Serialize)]
struct RefusedBody<'a> {
    error: &'a str,
}

fn refused(status: u16, error: &str) -> Response {
    json(status, &RefusedBody { error })
}

/// The answer 503: nothing was accepted, but the same request may succeed a moment later.
fn not_now(error: &str) -> Response {
    let mut response = refused(503, error);
    response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    response
}

impl PurgeApi {
    /// A purge listener as configured, in front of this journal and these deliveries.
    pub fn new(
        config: &PurgeListener,
        journal: Arc<dyn Journal>,
        deliveries: Arc<Deliveries>,
        replicas: Option<Arc<Replicas>>,
        metrics: Arc<Metrics>,
        tracer: Option<Arc<Tracer>>,
    ) -> Self {
        PurgeApi {
            senders: ArcSwap::from_pointee(PurgeSenders::of(config)),
            ack_timeout: config.ack_timeout,
            journal,
            deliveries,
            replicas,
            attribution: Arc::default(),
            metrics,
            tracer,
            under_way: Semaphore::new(MAX_UNDER_WAY),
            overload_told: Mutex::default(),
            not_durable_told: Mutex::default(),
            forbidden_told: Mutex::default(),
            refused_told: Mutex::default(),
        }
    }

    /// Requests that arrive from now on are judged by this configuration: its networks, its token and its methods.
    pub fn configure(&self, config: &PurgeListener) {
        self.senders.store(Arc::new(PurgeSenders::of(config)));
    }

    /// Who purged what, for the purges that were accepted here.
    pub fn attribution(&self) -> Arc<Attribution> {
        Arc::clone(&self.attribution)
    }
}

impl Handler for PurgeApi {
    /// Only messages of other replicas have a body, and only from allowed senders.
    fn wants_body(&self, head: &http::request::Parts, peer: SocketAddr) -> bool {
        is_told(&head.method, &head.uri) && self.objection(&head.headers, peer).is_none()
    }

    async fn handle(&self, request: http::Request<Bytes>, peer: SocketAddr) -> Response {
        if request.method() == http::Method::GET && request.uri().path() == "/healthz" {
            return text(200, "ok\n");
        }
        if is_told(request.method(), request.uri()) {
            return match self.authorise(request.headers(), peer) {
                Ok(()) if request.uri().path() == replicas::NAMES => self.give_names(&request.into_body()).await,
                // As its admin listener answers to anybody.
                Ok(()) if request.uri().path() == replicas::PURGES => json(200, &self.attribution.report()),
                Ok(()) => self.be_told(request.into_body()).await,
                Err(response) => *response,
            };
        }
        let purge = match self.admit(&request, peer) {
            Ok(purge) => purge,
            Err(response) => return *response,
        };
        let span = self.begin_span(&request, peer);
        // Frees up to `max_request` bytes of headers, which are not needed during the wait for the fleet.
        drop(request);
        self.accept(purge, peer, span).await
    }
}

impl PurgeApi {
    /// Carries out a purge whose sender was found out to be allowed to, and answers as this listener does.
    pub async fn purge(&self, request: &http::Request<()>, peer: SocketAddr) -> Response {
        match self.understand(request, peer) {
            Ok(purge) => self.accept(purge, peer, self.begin_span(request, peer)).await,
            Err(response) => *response,
        }
    }

    fn begin_span<B>(&self, request: &http::Request<B>, peer: SocketAddr) -> Option<PurgeSpan> {
        PurgeSpan::begin(self.tracer.as_ref(), request.headers(), peer.ip().to_canonical())
    }

    async fn accept(&self, purge: Purge, peer: SocketAddr, span: Option<PurgeSpan>) -> Response {
        let at_ms = clock::now_ms();
        let Some(_under_way) = self.begin() else { return self.overloaded(purge.kind(), at_ms) };
        self.carry_out(purge, (peer.ip().to_canonical(), at_ms), span).await
    }

    /// Checks address and token. On refusal: the reason for the log, and the message for the client.
    fn objection(&self, headers: &http::HeaderMap, peer: SocketAddr) -> Option<(&'static str, String)> {
        let address = peer.ip().to_canonical();
        let senders = self.senders.load();
        if !senders.allow.iter().any(|network| network.contains(&address)) {
            let answer = format!("{address} may not purge: it is not in purge.allow");
            return Some(("this address is not in purge.allow", answer));
        }
        let token = senders.token.as_ref()?;
        let presented = headers.get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes);
        if presented.and_then(bearer).is_some_and(|presented| token.matches(presented)) {
            return None;
        }
        Some(("token missing or wrong", "Authorization: Bearer with the purge token is wanted".to_owned()))
    }

    fn authorise(&self, headers: &http::HeaderMap, peer: SocketAddr) -> Result<(), Box<Response>> {
        let Some((reason, answer)) = self.objection(headers, peer) else { return Ok(()) };
        self.metrics.purge.requested("none", PurgeResult::Forbidden);
        self.was_refused(&format!("a purge from {} was refused: {reason}", peer.ip().to_canonical()));
        if let Some(left_out) = self.forbidden_told.lock().pass(clock::now_ms()) {
            tracing::warn!(address = %peer.ip().to_canonical(), left_out, "purge refused: {reason}");
        }
        Err(Box::new(refused(403, &answer)))
    }

    /// Applies purges that another replica has accepted, and answers with our confirmation, which it waits for.
    async fn be_told(&self, body: Bytes) -> Response {
        let message = match serde_json::from_slice(&body) {
            Ok(message) => message,
            Err(error) => return refused(400, &format!("no purges of a replica: {error}")),
        };
        let Some(replicas) = &self.replicas else {
            return refused(409, "this clearcoat knows of no replicas: its replica.peers is empty, and it has no etcd");
        };
        match replicas.receive(message).await {
            Received::Confirmed(confirmation) => json(200, &confirmation),
            Received::Refused(reason) => refused(409, &reason),
            Received::Misdirected => refused(replicas::MISDIRECTED, "another process was here before this one"),
            Received::Failed(error) => {
                tracing::error!(error = %causes(&error), "purges of another replica could not be taken in");
                not_now("the purges could not be taken in")
            }
        }
    }

    /// Answers another replica that asks for the purged names that are known here.
    async fn give_names(&self, body: &[u8]) -> Response {
        let message = match serde_json::from_slice(body) {
            Ok(message) => message,
            Err(error) => return refused(400, &format!("no message of a replica: {error}")),
        };
        let alone = || refused(409, "this clearcoat does not seal answers together with others");
        let Some(replicas) = &self.replicas else { return alone() };
        match replicas.give_names(&message).await {
            GivenNames::Names(bytes) => http_server::response(200, "application/octet-stream", bytes),
            GivenNames::NotYet => not_now("this replica has not met the one that asks yet, or others ask, too"),
            GivenNames::Failed(error) => refused(500, &format!("the purged names cannot be written down: {error}")),
            GivenNames::Never => alone(),
        }
    }

    /// Checks the sender and parses the purge.
    fn admit(&self, request: &http::Request<Bytes>, peer: SocketAddr) -> Result<Purge, Box<Response>> {
        self.authorise(request.headers(), peer)?;
        self.understand(request, peer)
    }

    fn understand<B>(&self, request: &http::Request<B>, peer: SocketAddr) -> Result<Purge, Box<Response>> {
        let address = peer.ip().to_canonical();
        let parsed = parse(request.method(), request.uri(), request.headers(), &self.senders.load().rules);
        let ParsedPurge { purge, is_wider } = parsed.map_err(|refusal| Box::new(self.refuse(&refusal, peer)))?;
        if is_wider {
            let carried_out = purge.targets.iter().find_map(|target| match target {
                Target::Pattern(pattern) | Target::Pool(pattern) => Some(pattern.as_str()),
                _ => None,
            });
            tracing::info!(%address, carried_out, "a pattern that Varnish would give up on is carried out as a wider one");
        }
        Ok(purge)
    }

    fn refuse(&self, refusal: &Refusal, peer: SocketAddr) -> Response {
        let address = peer.ip().to_canonical();
        if refusal.is_empty_chunk() {
            self.metrics.purge.requested("none", PurgeResult::Empty);
            tracing::debug!(%address, "a purge with an empty pattern, as Magento sends before a long one");
        } else {
            self.metrics.purge.requested("none", PurgeResult::Refused);
            self.was_refused(&format!("a purge from {address} was refused: {refusal}"));
            if let Some(left_out) = self.refused_told.lock().pass(clock::now_ms()) {
                tracing::warn!(%address, %refusal, left_out, "purge refused");
            }
        }
        let mut response = refused(refusal.status(), &refusal.to_string());
        // Methods are tokens, so they are valid in a header value.
        if let Refusal::Method { accepted, .. } = refusal
            && let Ok(accepted) = header::HeaderValue::try_from(accepted)
        {
            response.headers_mut().insert(header::ALLOW, accepted);
        }
        response
    }

    fn was_refused(&self, words: &str) {
        self.metrics.incidents.note(IncidentKind::PurgeRefused, words);
    }

    /// Counts a purge as under way; `None` if [`MAX_UNDER_WAY`] are already.
    fn begin(&self) -> Option<PurgeInFlight<'_>> {
        let permit = self.under_way.try_acquire().ok()?;
        self.metrics.purge.waiting.inc();
        Some(PurgeInFlight { _permit: permit, waiting: &self.metrics.purge.waiting })
    }

    /// `cause` is logged but not sent to the client, because it contains paths.
    fn not_durable(
        &self,
        (kind, now_ms): (&'static str, u64),
        span: Option<PurgeSpan>,
        cause: &dyn Display,
    ) -> Response {
        if let Some(span) = span {
            span.end(PurgeResult::NotDurable);
        }
        self.metrics.purge.requested(kind, PurgeResult::NotDurable);
        self.was_refused(&format!("a purge could not be made durable: {cause}"));
        if let Some(left_out) = self.not_durable_told.lock().pass(now_ms) {
            tracing::error!(error = %cause, left_out, "a purge could not be made durable and was not accepted");
        }
        not_now("the purge could not be made durable and was not accepted")
    }

    fn overloaded(&self, kind: &'static str, now_ms: u64) -> Response {
        self.metrics.purge.requested(kind, PurgeResult::Overload);
        self.was_refused(&format!("a purge was not accepted: {MAX_UNDER_WAY} are under way"));
        if let Some(left_out) = self.overload_told.lock().pass(now_ms) {
            tracing::warn!(left_out, "a purge was not accepted: {MAX_UNDER_WAY} are under way and not answered yet");
        }
        not_now("too many purges are under way: this one was not accepted")
    }

    /// Makes the purge durable, waits for the fleet, answers.
    async fn carry_out(&self, purge: Purge, (source, at_ms): (IpAddr, u64), mut span: Option<PurgeSpan>) -> Response {
        let began = Instant::now();
        let kind = purge.kind();
        let named = NamedTargets::of(&purge);
        let refusable = Refusable::of(&purge);
        if let Some(span) = &mut span {
            span.is_of(&purge);
        }
        if let Some(replicas) = &self.replicas {
            replicas.until_met(self.ack_timeout / 2).await;
        }
        let mut expected = self.deliveries.expect();
        let position = match tokio::time::timeout(self.ack_timeout, self.journal.append(purge)).await {
            Ok(Ok(position)) => position,
            Ok(Err(error)) => return self.not_durable((kind, at_ms), span, &causes(&error)),
            // The append may still succeed, and then the purge is carried out. That breaks no promise: the sender gets
            // a 503.
            Err(elapsed) => return self.not_durable((kind, at_ms), span, &elapsed),
        };
        if let Some(span) = &mut span {
            span.is_at(position);
        }
        // A purge is followed by its position from here to each Varnish (docs/logging.md).
        tracing::debug!(position, kind, %source, "purge accepted");
        self.metrics.journal.append_duration.observe(began.elapsed());
        self.metrics.journal.head.set(self.journal.head().cast_signed());
        // The time of the append counts towards `ack_timeout`, but at least a quarter of it is left for the fleet.
        let left = self.ack_timeout.saturating_sub(began.elapsed()).max(self.ack_timeout / 4);
        if let Some(refusable) = refusable {
            expected.record_accepted(position, refusable, source);
        }
        let (mut outcome, heard) = self.settle(position, &expected, left).await;
        drop(expected);
        heard.fenced_at.values().flatten().for_each(|node| outcome.miss(node));
        let took = began.elapsed();
        self.metrics.purge.ack_duration.observe(took);
        let result = result_of(&outcome);
        self.metrics.purge.requested(kind, result);
        if let Some(span) = span {
            span.end(result);
        }
        let (applied, fenced) = (outcome.applied.len(), outcome.fenced.clone());
        let (invalidated, result) = (outcome.invalidated, result.as_str());
        tracing::debug!(position, kind, result, applied, ?fenced, took_ms = took.as_millis(), "purge answered");
        self.attribute(source, named, Ended { position, at_ms, took, result, applied, fenced, invalidated });
        answer(kind, position, &outcome, &heard)
    }

    /// Waits for the fleet and for the other replicas, for about `left` in all, and raises the fence.
    async fn settle(&self, position: Position, expected: &Expected<'_>, left: Duration) -> (Acknowledged, PeerAnswers) {
        let Some(replicas) = self.replicas.as_ref().filter(|replicas| replicas.are_several()) else {
            return (expected.acknowledge(position, left, false).await, PeerAnswers::default());
        };
        let began = Instant::now();
        // An eighth is kept for `agree`, which may have the purge delivered once more.
        let first = left * 7 / 8;
        let mut confirmed = std::pin::pin!(replicas.confirmed(position, first));
        let mut early = None;
        if self.deliveries.is_sealed(position) {
            // No Varnish is waited for yet. If not all confirm it in half of the time, the other half is for that.
            early = tokio::time::timeout(left / 2, &mut confirmed).await.ok();
            if !early.as_ref().is_some_and(PeerAnswers::is_sealed_everywhere) {
                self.deliveries.unseal(position);
            }
        }
        // A block with one of its tags may have passed another replica before that one knew of the purge: so after those that
        // confirm it early.
        let here = self.deliveries.reached(position, first.saturating_sub(began.elapsed()));
        let ((reached, missed), mut heard) = match early {
            Some(heard) => (here.await, heard),
            None => tokio::join!(here, confirmed),
        };
        // What shows by seals need not be agreed on.
        if !reached.is_empty() || !missed.is_empty() {
            let rest = left.saturating_sub(began.elapsed()).max(left / 8);
            replicas.agree(position, (&reached, &missed), &mut heard, rest).await;
        }
        let rest = left.saturating_sub(began.elapsed());
        let outcome = expected.acknowledge(position, rest, heard.is_taken()).await;
        replicas.count_unconfirmed(&heard);
        (outcome, heard)
    }

    /// Records an accepted purge for attribution, and logs it if it is wide.
    fn attribute(&self, source: IpAddr, named: NamedTargets, ended: Ended) {
        let position = ended.position;
        let noted = self.attribution.note(source, named, ended);
        let metrics = &self.metrics.purge;
        metrics.sent_by(&noted.source);
        noted.families.iter().for_each(|(family, tags)| metrics.named(family, *tags));
        for wide in &noted.wide {
            metrics.wide(wide.what);
            if let Some(left_out) = wide.left_out {
                tracing::info!(%source, what = wide.what, position, left_out, "{}", describe(wide.what));
            }
        }
    }
}

/// The result of an accepted purge, for metrics and attribution.
fn result_of(outcome: &Acknowledged) -> PurgeResult {
    match outcome {
        Acknowledged { refused, .. } if !refused.is_empty() => PurgeResult::RefusedByNode,
        Acknowledged { is_untaken: true, .. } => PurgeResult::Untaken,
        Acknowledged { fenced, pending, .. } if fenced.is_empty() => {
            if pending.is_empty() {
                PurgeResult::Applied
            } else {
                PurgeResult::Pending
            }
        }
        _ => PurgeResult::Fenced,
    }
}

fn answer(kind: &'static str, position: Position, outcome: &Acknowledged, heard: &PeerAnswers) -> Response {
    if let Some((node, reason)) = outcome.refused.first() {
        let refusing = outcome.refused.len();
        let error = format!(
            "{refusing} of {} Varnish do not take this request though they take others ({node}: {reason}): their VCL does \
             not purge so",
            outcome.applied.len() + outcome.fenced.len(),
        );
        // Only at debug level, because the delivery has already logged it, once for each node.
        tracing::debug!(position, error, "purge refused");
        return refused(400, &error);
    }
    if outcome.is_untaken {
        let error = format!(
            "none of {} Varnish has taken this request in time, and whether their VCL does is not known: it is in the journal, \
             and each gets it before it serves; send it again to know",
            outcome.fenced.len(),
        );
        tracing::debug!(position, error, "purge not confirmed");
        return refused(504, &error);
    }
    let Acknowledged { applied, pending, fenced, invalidated, .. } = outcome;
    tracing::debug!(position, kind, applied = applied.len(), fenced = fenced.len(), "purged");
    let PeerAnswers { fenced_at, unconfirmed, .. } = heard;
    let body = AcceptedBody { position, applied, pending, fenced, invalidated: *invalidated, fenced_at, unconfirmed };
    let mut response = json(200, &body);
    // Varnish says "200 Purged", and there are scripts that look for it.
    response.extensions_mut().insert(hyper::ext::ReasonPhrase::from_static(b"Purged"));
    response
}

/// The token of `Bearer …` (RFC 6750 section 2.1; the scheme in any case, RFC 9110 section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
}
