//! The cost of HTTP/1.1's steps: scan, parse and rewrite of heads, and the framing of a chunked body.
//!
//! The data path pays for each of them with every request, so a step that becomes slower shows here long before it
//! shows in requests per second. Structs and buffers are reused, as in a worker.

#[path = "http1/messages.rs"]
mod messages;

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use clearcoat::http1::{
    ChunkedDecoder, Forwarding, HeadLimits, HeadScan, Method, RequestHead, ResponseHead, Version, write_request,
    write_response,
};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

/// Larger than any head here.
const LIMITS: HeadLimits = HeadLimits { bytes: 64 * 1024, fields: 100 };

/// The content of the chunked body, and the chunk size of PHP and Apache.
const BODY: usize = 64 * 1024;
const CHUNK: usize = 8 * 1024;

const FORWARDING: Forwarding<'static> = Forwarding {
    peer: "192.0.2.7",
    proto: "https",
    trusted: false,
    node: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), 80),
    received: Version::Http11,
    offload_header: None,
    asked: b"",
    request_id: b"",
    traceparent: b"",
};

fn request(criterion: &mut Criterion) {
    let bytes = messages::request();
    let mut group = criterion.benchmark_group("request");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    let mut head = RequestHead::default();
    group.bench_function("read", |bencher| {
        bencher.iter(|| head.read(black_box(&bytes), &mut HeadScan::default(), LIMITS).expect("a head without fault"));
    });
    let mut out = Vec::new();
    group.bench_function("rewrite", |bencher| {
        bencher.iter(|| {
            out.clear();
            write_request(&mut out, black_box(&head), FORWARDING);
            out.len()
        });
    });
}

fn answer(criterion: &mut Criterion) {
    let bytes = messages::answer_head(1024);
    let mut group = criterion.benchmark_group("answer");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    let mut head = ResponseHead::default();
    group.bench_function("read", |bencher| {
        bencher.iter(|| {
            let read = head.read(black_box(&bytes), Method::Get, &mut HeadScan::default(), LIMITS);
            read.expect("a head without fault")
        });
    });
    let mut out = Vec::new();
    group.bench_function("rewrite", |bencher| {
        bencher.iter(|| {
            out.clear();
            write_response(&mut out, black_box(&head), Version::Http11, true)
        });
    });
}

fn chunked(criterion: &mut Criterion) {
    let mut wire = Vec::new();
    for chunk in vec![b'x'; BODY].chunks(CHUNK) {
        wire.extend(format!("{:x}\r\n", chunk.len()).bytes());
        wire.extend_from_slice(chunk);
        wire.extend_from_slice(b"\r\n");
    }
    wire.extend_from_slice(b"0\r\n\r\n");
    let mut group = criterion.benchmark_group("chunked body");
    group.throughput(Throughput::Bytes(BODY as u64));
    group.bench_function("decode 64 KiB", |bencher| {
        // It is decoded in place, so each round needs its own body; making it is not measured.
        bencher.iter_batched_ref(
            || wire.clone(),
            |wire| {
                let mut decoder = ChunkedDecoder::default();
                let decoded = decoder.decode_in_place(black_box(wire)).expect("a body without fault");
                assert!(decoder.is_done() && decoded.0 == BODY);
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(steps, request, answer, chunked);
criterion_main!(steps);
