//! The cost of a purge between its request and the bans: parse, union, compile.
//!
//! It is paid for each Varnish and batch of a storm, on the runtime that all deliveries share. The requests are
//! Magento's own: chunks of at most 7,680 bytes.

use std::fmt::Write;
use std::hint::black_box;

use clearcoat::fleet::{DEFAULT_HEADER_LIMIT, PurgeDialect};
use clearcoat::purge::{Ban, CompiledBans, Purge, PurgeRules, compile, parse};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, Method, Uri};

/// Magento starts another request before a pattern exceeds this length.
const CHUNK: usize = 7_680;

/// Product tags with numbers from 10,000, some of 50,000, without duplicates and in no order.
fn some_products(count: usize) -> Vec<String> {
    let mut ids: Vec<u32> = (10_000..60_000).collect();
    fastrand::Rng::with_seed(7).shuffle(&mut ids);
    ids.truncate(count);
    ids.iter().map(|id| format!("cat_p_{id}")).collect()
}

/// The headers of Magento's requests for these tags.
fn requests(tags: &[String]) -> Vec<HeaderMap> {
    let mut patterns = vec![String::new()];
    for tag in tags {
        let term = format!("((^|,){tag}(,|$))");
        let open = patterns.last_mut().expect("there is always one");
        if open.is_empty() {
            *open = term;
        } else if open.len() + 1 + term.len() <= CHUNK {
            write!(open, "|{term}").expect("memory");
        } else {
            patterns.push(term);
        }
    }
    let headers = |pattern: String| {
        HeaderMap::from_iter([(
            "x-magento-tags-pattern".parse().expect("a name"),
            HeaderValue::try_from(pattern).expect("a value"),
        )])
    };
    patterns.into_iter().map(headers).collect()
}

fn parsed(requests: &[HeaderMap]) -> Vec<Purge> {
    let (method, rules) = (Method::from_bytes(b"PURGE").expect("a method"), PurgeRules::default());
    let parse = |headers| parse(&method, &Uri::from_static("/"), headers, &rules);
    requests.iter().map(|headers| parse(headers).expect("a purge").purge).collect()
}

fn compiled(purges: &[Purge], delivery: PurgeDialect) -> CompiledBans {
    compile(purges, delivery, DEFAULT_HEADER_LIMIT)
}

const FORMS: [(&str, PurgeDialect); 3] =
    [("magento", PurgeDialect::Magento), ("magento-plain", PurgeDialect::MagentoPlain), ("xkey", PurgeDialect::Xkey)];

fn batches(criterion: &mut Criterion) {
    for count in [1, 2_000] {
        let requests = requests(&some_products(count));
        let mut group = criterion.benchmark_group(format!("{count} tags in {} requests", requests.len()));
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function("parse", |bencher| bencher.iter(|| parsed(black_box(&requests))));
        let purges = parsed(&requests);
        for (name, delivery) in FORMS {
            group.bench_function(format!("compile, {name}"), |bencher| {
                bencher.iter(|| compiled(black_box(&purges), delivery));
            });
        }
        group.bench_function("parse and compile, magento", |bencher| {
            bencher.iter(|| compiled(&parsed(black_box(&requests)), PurgeDialect::Magento));
        });
    }
}

/// Not times but sizes: the bytes that the node has to read and to match.
fn sizes(_: &mut Criterion) {
    let every_id: Vec<String> = (0..100_000).map(|id| format!("cat_p_{id}")).collect();
    for tags in [some_products(2_000), every_id] {
        let requests = requests(&tags);
        let purges = parsed(&requests);
        for (name, delivery) in FORMS {
            let CompiledBans { bans, .. } = compiled(&purges, delivery);
            let bytes = |ban: &Ban| match ban {
                Ban::Tags { pattern: value, .. } | Ban::Pool { pattern: value, .. } => value.len(),
                Ban::Keys { keys, .. } => keys.len(),
                Ban::Everything | Ban::Forward(_) => 0,
            };
            let bytes: usize = bans.iter().map(bytes).sum();
            println!("{} tags in {} requests, {name}: {} bans, {bytes} bytes", tags.len(), requests.len(), bans.len());
        }
    }
}

criterion_group!(benches, sizes, batches);
criterion_main!(benches);
