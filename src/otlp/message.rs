//! The messages of OTLP that say what a trace is (opentelemetry-proto 1.x: `collector/trace/v1/trace_service.proto`,
//! `trace/v1/trace.proto`, `common/v1/common.proto`), without the fields that are never written.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::telemetry::traces::{Attribute, FinishedSpan, SpanKind};

/// `ExportTraceServiceRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

/// `ExportTraceServiceResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ExportResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) partial_success: Option<PartialSuccess>,
}

/// `ExportTracePartialSuccess`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PartialSuccess {
    #[prost(int64, tag = "1")]
    pub(super) rejected_spans: i64,
    #[prost(string, tag = "2")]
    pub(super) error_message: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<InstrumentationScope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<SpanMessage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct InstrumentationScope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

/// `Span`.
#[derive(Clone, PartialEq, prost::Message)]
struct SpanMessage {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    /// `SpanKind`: 2 is a server, 3 a client.
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<SpanStatus>,
    /// The lowest byte has the flags of `traceparent`: 1 is sampled.
    #[prost(fixed32, tag = "16")]
    flags: u32,
}

/// `Status`.
#[derive(Clone, PartialEq, prost::Message)]
struct SpanStatus {
    /// 2 is an error.
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnyValue {
    #[prost(oneof = "ValueKind", tags = "1, 2, 3")]
    value: Option<ValueKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum ValueKind {
    #[prost(string, tag = "1")]
    Text(String),
    #[prost(bool, tag = "2")]
    Flag(bool),
    #[prost(int64, tag = "3")]
    Number(i64),
}

impl ExportRequest {
    /// These spans, of the service with this name.
    pub(super) fn new(service_name: &str, spans: &[FinishedSpan]) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        let resource = Resource {
            attributes: vec![
                KeyValue::new("service.name", Attribute::Text(Cow::Owned(service_name.to_owned()))),
                KeyValue::new("service.version", version.into()),
            ],
        };
        let scope = InstrumentationScope { name: "clearcoat".to_owned(), version: version.to_owned() };
        let scope_spans = ScopeSpans { scope: Some(scope), spans: spans.iter().map(SpanMessage::from).collect() };
        ExportRequest {
            resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans: vec![scope_spans] }],
        }
    }
}

impl From<&FinishedSpan> for SpanMessage {
    fn from(span: &FinishedSpan) -> Self {
        let context = span.ids.context;
        SpanMessage {
            trace_id: context.trace_id.to_be_bytes().to_vec(),
            span_id: context.span_id.to_be_bytes().to_vec(),
            parent_span_id: span.ids.parent.map(|parent| parent.to_be_bytes().to_vec()).unwrap_or_default(),
            name: span.name.to_owned(),
            kind: match span.kind {
                SpanKind::Server => 2,
                SpanKind::Client => 3,
            },
            start_time_unix_nano: nanos(span.began),
            end_time_unix_nano: nanos(span.ended),
            attributes: span.attributes.iter().map(|(key, value)| KeyValue::new(key, value.clone())).collect(),
            status: span.is_error.then_some(SpanStatus { code: 2 }),
            flags: u32::from(context.is_sampled),
        }
    }
}

impl KeyValue {
    fn new(key: &str, value: Attribute) -> Self {
        let value = match value {
            Attribute::Text(text) => ValueKind::Text(text.into_owned()),
            Attribute::Number(number) => ValueKind::Number(number),
            Attribute::Flag(flag) => ValueKind::Flag(flag),
        };
        KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
    }
}

/// Nanoseconds since 1970. A clock before that says 0.
fn nanos(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use opentelemetry_proto::tonic::collector::trace::v1 as official;
    use opentelemetry_proto::tonic::common::v1::any_value::Value;
    use prost::Message;

    use super::*;
    use crate::telemetry::traces::{OpenSpan, TraceContext};

    #[test]
    fn the_official_types_read_what_is_written() {
        let context = TraceContext { trace_id: 0x0102 << 112 | 3, span_id: 0x0405, is_sampled: true };
        let span = FinishedSpan {
            ids: OpenSpan { context, parent: Some(6) },
            name: "GET",
            kind: SpanKind::Client,
            began: UNIX_EPOCH + Duration::from_nanos(7),
            ended: UNIX_EPOCH + Duration::from_nanos(8),
            is_error: true,
            attributes: vec![("text", "a".into()), ("number", 9_u64.into()), ("flag", true.into())],
        };
        let bytes = ExportRequest::new("shop", &[span]).encode_to_vec();
        let read = official::ExportTraceServiceRequest::decode(&*bytes).unwrap();
        // Nothing is left over: what they write of it is the same.
        assert_eq!(read.encode_to_vec(), bytes);
        let resource = &read.resource_spans[0];
        assert_eq!(resource.resource.as_ref().unwrap().attributes[0].key, "service.name");
        let span = &resource.scope_spans[0].spans[0];
        assert_eq!((span.trace_id.len(), &span.trace_id[..2]), (16, &[1, 2][..]));
        assert_eq!(
            (&*span.span_id, &*span.parent_span_id),
            (&[0, 0, 0, 0, 0, 0, 4, 5][..], &[0, 0, 0, 0, 0, 0, 0, 6][..])
        );
        assert_eq!((span.start_time_unix_nano, span.end_time_unix_nano, span.flags), (7, 8, 1));
        assert_eq!((span.kind().as_str_name(), &*span.name), ("SPAN_KIND_CLIENT", "GET"));
        assert_eq!(span.status.as_ref().unwrap().code().as_str_name(), "STATUS_CODE_ERROR");
        let values: Vec<_> = span.attributes.iter().map(|pair| pair.value.clone().unwrap().value.unwrap()).collect();
        assert_eq!(values, [Value::StringValue("a".into()), Value::IntValue(9), Value::BoolValue(true)]);
    }

    #[test]
    fn what_a_collector_rejects_is_read() {
        let partial = official::ExportTracePartialSuccess { rejected_spans: 3, error_message: "too old".into() };
        let bytes = official::ExportTraceServiceResponse { partial_success: Some(partial) }.encode_to_vec();
        let read = ExportResponse::decode(&*bytes).unwrap().partial_success.unwrap();
        assert_eq!((read.rejected_spans, &*read.error_message), (3, "too old"));
    }
}
