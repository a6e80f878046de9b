//! The spans of a request: one of its own, and one for each try. Made once, at its end, of what its [`Trace`] has noted.
//!
//! While it is under way a request only keeps its ids and when each try began and ended. Without `[traces]` it keeps nothing.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use super::access;
use super::client::Client;
use super::request::Request;
use super::span_notes::{RequestSpans, TrySpan};
use super::trace::Trace;
use crate::fleet::Node;
use crate::http1::RequestHead;
use crate::telemetry::FailureReason;
use crate::telemetry::traces::{Attribute, DayTime, FinishedSpan, SpanKind, TraceContext};

/// The fields of W3C Trace Context.
const TRACEPARENT: &[u8] = b"traceparent";
const TRACESTATE: &[u8] = b"tracestate";

/// The longest path in a span, in bytes.
const LONGEST_PATH: usize = 1024;

/// The methods that spans name (semantic conventions for HTTP). Others are strangers' words.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"];

/// Begins the span of a request with a valid head, if there are traces: within that of its sender, or a new one. Whose
/// decision counts, see [`crate::telemetry::traces`].
pub(super) fn begin(client: &Client, request: &mut Request) {
    let Some(tracer) = &client.worker.shared.tracer else { return };
    let Request { head, trace, .. } = request;
    if trace.spans.is_some() || !trace.has_head {
        return;
    }
    let incoming = incoming(head);
    // Without a valid traceparent a tracestate means nothing (W3C Trace Context section 3.3).
    head.drop_fields(|name| {
        name.eq_ignore_ascii_case(TRACEPARENT) || incoming.is_none() && name.eq_ignore_ascii_case(TRACESTATE)
    });
    let own = tracer.begin(incoming, client.trusted);
    trace.spans = Some(Box::new(RequestSpans::new(own)));
}

/// The span that the sender names; `None` if it names none, or more than one.
fn incoming(head: &RequestHead) -> Option<TraceContext> {
    let mut named = head.kept_fields().filter(|(name, _)| name.eq_ignore_ascii_case(TRACEPARENT));
    let (_, value) = named.next()?;
    if named.next().is_some() {
        return None;
    }
    TraceContext::parse(value)
}

/// Hands over the spans of a request that has ended. `node` answered it, or failed last.
pub(super) fn finish(client: &Client, request: &mut Request, node: Option<&Node>, took: Duration) {
    let Some(tracer) = &client.worker.shared.tracer else { return };
    begin(client, request);
    let Some(spans) = request.trace.spans.take().filter(|spans| spans.own.context.is_sampled) else { return };
    let RequestSpans { own, tries, .. } = *spans;
    let time = DayTime::now();
    let ended = request.began + took;
    let method = method(&request.head);
    let last = tries.len();
    let mut finished = Vec::with_capacity(1 + last);
    finished.push(FinishedSpan {
        ids: own,
        name: method.name(),
        kind: SpanKind::Server,
        began: time.of(request.began),
        ended: time.of(ended),
        is_error: is_error(request.status, &request.trace),
        attributes: attributes(client, request, node),
    });
    for (number, a_try) in tries.into_iter().enumerate() {
        let answered = request.status.filter(|_| number + 1 == last && a_try.failed.is_none());
        finished.push(a_try.finish(number, (method, answered), ended, time));
    }
    tracer.hand_over(finished);
}

impl TrySpan {
    fn finish(
        self,
        number: usize,
        (method, status): (KnownMethod, Option<u16>),
        ended: Instant,
        time: DayTime,
    ) -> FinishedSpan {
        let address = self.node.spec.address;
        let mut attributes = vec![
            ("http.request.method", method.attribute()),
            ("server.address", address.ip().to_string().into()),
            ("server.port", address.port().into()),
            ("clearcoat.node", self.node.id().to_string().into()),
        ];
        if number > 0 {
            attributes.push(("http.request.resend_count", number.into()));
        }
        attributes.extend(status.map(|status| ("http.response.status_code", status.into())));
        attributes.extend(self.failed.map(|(_, reason)| ("error.type", reason.as_str().into())));
        FinishedSpan {
            ids: self.ids,
            name: method.name(),
            kind: SpanKind::Client,
            began: time.of(self.began),
            ended: time.of(self.failed.map_or(ended, |(failed, _)| failed)),
            is_error: self.failed.is_some_and(|(_, reason)| reason != FailureReason::ClientGone)
                || status.is_some_and(|status| status >= 400),
            attributes,
        }
    }
}

/// Whether a request failed, as the conventions have it: a status of 4xx is the client's fault and no error here. Neither is
/// that a client left.
fn is_error(status: Option<u16>, trace: &Trace) -> bool {
    let is_failed = trace.reason().is_some_and(|reason| reason != FailureReason::ClientGone);
    match status {
        Some(status) => status >= 500 || status < 400 && is_failed,
        None => is_failed,
    }
}

fn attributes(client: &Client, request: &Request, node: Option<&Node>) -> Vec<(&'static str, Attribute)> {
    let Request { head, trace, status, .. } = request;
    let path = head.path();
    let path = String::from_utf8_lossy(&path[..path.len().min(LONGEST_PATH)]).into_owned();
    let [who, phase] = trace.termination().map(char::from);
    let mut attributes = vec![
        ("http.request.method", method(head).attribute()),
        ("url.path", path.into()),
        ("url.scheme", client.proto().into()),
        ("network.peer.address", client.peer.text.to_string().into()),
        ("clearcoat.listener", access::name_of(&client.frontend).into()),
        ("clearcoat.termination", format!("{who}{phase}").into()),
    ];
    attributes.extend(status.map(|status| ("http.response.status_code", status.into())));
    attributes.extend(access::cache_of(request, node).map(|cache| ("clearcoat.cache", cache.as_str().into())));
    attributes.extend(node.map(|node| ("clearcoat.node", node.id().to_string().into())));
    attributes.extend(trace.reason().map(|reason| ("error.type", reason.as_str().into())));
    attributes
}

/// A method of [`METHODS`]; `None` for any other.
#[derive(Clone, Copy)]
struct KnownMethod(Option<&'static str>);

fn method(head: &RequestHead) -> KnownMethod {
    KnownMethod(METHODS.into_iter().find(|method| method.as_bytes() == head.method_name()))
}

impl KnownMethod {
    /// Of a span.
    fn name(self) -> &'static str {
        self.0.unwrap_or("HTTP")
    }

    fn attribute(self) -> Attribute {
        Attribute::Text(Cow::Borrowed(self.0.unwrap_or("_OTHER")))
    }
}
