//! Counters and distributions of the data path, kept apart for each worker.
//!
//! A request raises a dozen numbers. If all workers raised the same ones, each would first fetch the cache line that
//! another core has just written: some hundred nanoseconds for each number, and more with each core. So a number is several,
//! one for each thread in cache lines of its own, which are added up when somebody reads it (Java's `LongAdder` does the
//! same). The price is memory: [`SHARDS`] times as much.
//!
//! A distribution is a number for each bucket, and one for the sum of the times in nanoseconds: whole numbers are added in
//! one step, where a floating-point sum needs a loop of them.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus::core::{Metric, MetricVec, MetricVecBuilder};
use prometheus::proto::{self, LabelPair, MetricType};
use prometheus::{HistogramOpts, Opts};

/// The most threads that have a shard for themselves. With more workers, some share one.
const SHARDS: usize = 16;

/// The numbers in a cache line, which has 64 bytes on the machines that Rust's tier 1 is about.
const IN_LINE: usize = 8;

#[derive(Debug, Default)]
#[repr(align(64))]
struct CacheLine([AtomicU64; IN_LINE]);

thread_local! {
    static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The shard of this thread: the next one in turn, when it is first asked for.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    SHARD.with(|shard| {
        shard.get().unwrap_or_else(|| {
            let next = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            shard.set(Some(next));
            next
        })
    })
}

/// Some numbers, in each shard.
#[derive(Debug)]
struct ShardedNumbers {
    lines: Box<[CacheLine]>,
    lines_per_shard: usize,
}

impl ShardedNumbers {
    fn new(numbers: usize) -> Self {
        let lines_per_shard = numbers.div_ceil(IN_LINE);
        let lines = (0..SHARDS * lines_per_shard).map(|_| CacheLine::default()).collect();
        ShardedNumbers { lines, lines_per_shard }
    }

    fn add(&self, number: usize, by: u64) {
        let line = shard() * self.lines_per_shard + number / IN_LINE;
        self.lines[line].0[number % IN_LINE].fetch_add(by, Ordering::Relaxed);
    }

    fn sum(&self, number: usize) -> u64 {
        let lines = self.lines.iter().skip(number / IN_LINE).step_by(self.lines_per_shard);
        lines.fold(0, |sum, line| sum.wrapping_add(line.0[number % IN_LINE].load(Ordering::Relaxed)))
    }
}

/// A number that only rises.
#[derive(Clone, Debug)]
pub struct ShardedCounter {
    numbers: Arc<ShardedNumbers>,
    labels: Arc<[LabelPair]>,
}

impl ShardedCounter {
    /// Raises it by one.
    pub fn inc(&self) {
        self.inc_by(1);
    }

    /// Raises it.
    pub fn inc_by(&self, by: u64) {
        self.numbers.add(0, by);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.numbers.sum(0)
    }
}

impl Metric for ShardedCounter {
    fn metric(&self) -> proto::Metric {
        let mut counter = proto::Counter::default();
        counter.set_value(self.get() as f64);
        let mut metric = proto::Metric::from_label(self.labels.to_vec());
        metric.set_counter(counter);
        metric
    }
}

/// A distribution of times.
#[derive(Clone, Debug)]
pub struct DurationHistogram {
    /// One for each bucket, one for what is longer than all of them, and the sum in nanoseconds.
    numbers: Arc<ShardedNumbers>,
    /// The upper bounds of the buckets, in seconds.
    bounds: Arc<[f64]>,
    /// The same in nanoseconds.
    nanos: Arc<[u64]>,
    labels: Arc<[LabelPair]>,
}

impl DurationHistogram {
    /// Counts a time.
    pub fn observe(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.numbers.add(self.nanos.partition_point(|&bound| bound < nanos), 1);
        self.numbers.add(self.bounds.len() + 1, nanos);
    }

    /// The sum of all times.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.numbers.sum(self.bounds.len() + 1))
    }

    /// The upper bound of each bucket in seconds, with the number of times up to it; and the number of all times.
    pub fn cumulated(&self) -> (Vec<(f64, u64)>, u64) {
        let mut count = 0;
        let mut up_to = |bucket| {
            count += self.numbers.sum(bucket);
            count
        };
        let buckets = self.bounds.iter().enumerate().map(|(bucket, &bound)| (bound, up_to(bucket))).collect();
        (buckets, up_to(self.bounds.len()))
    }
}

impl Metric for DurationHistogram {
    fn metric(&self) -> proto::Metric {
        let (buckets, count) = self.cumulated();
        let bucket = |(bound, count)| {
            let mut bucket = proto::Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        };
        let mut histogram = proto::Histogram::default();
        histogram.set_bucket(buckets.into_iter().map(bucket).collect());
        histogram.set_sample_count(count);
        histogram.set_sample_sum(self.sum().as_secs_f64());
        let mut metric = proto::Metric::from_label(self.labels.to_vec());
        metric.set_histogram(histogram);
        metric
    }
}

/// Counters of one name.
pub(super) type ShardedCounterVec = MetricVec<ShardedCounterBuilder>;

/// Distributions of one name.
pub(super) type DurationHistogramVec = MetricVec<DurationHistogramBuilder>;

/// Makes the counters of a family.
#[derive(Clone, Copy, Debug)]
pub(super) struct ShardedCounterBuilder;

/// Makes the distributions of a family.
#[derive(Clone, Copy, Debug)]
pub(super) struct DurationHistogramBuilder;

impl MetricVecBuilder for ShardedCounterBuilder {
    type M = ShardedCounter;
    type P = Opts;

    fn build<V: AsRef<str>>(&self, options: &Opts, values: &[V]) -> prometheus::Result<ShardedCounter> {
        let labels = labels(&options.variable_labels, values)?;
        Ok(ShardedCounter { numbers: Arc::new(ShardedNumbers::new(1)), labels })
    }
}

impl MetricVecBuilder for DurationHistogramBuilder {
    type M = DurationHistogram;
    type P = HistogramOpts;

    fn build<V: AsRef<str>>(&self, options: &HistogramOpts, values: &[V]) -> prometheus::Result<DurationHistogram> {
        let labels = labels(&options.common_opts.variable_labels, values)?;
        let bounds: Arc<[f64]> = options.buckets.as_slice().into();
        let nanos = bounds.iter().map(|bound| (bound * 1e9).round() as u64).collect();
        Ok(DurationHistogram { numbers: Arc::new(ShardedNumbers::new(bounds.len() + 2)), bounds, nanos, labels })
    }
}

/// The counters of a new family, whose series differ in these labels.
pub(super) fn sharded_counters(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<ShardedCounterVec> {
    let options = Opts::new(name, help).variable_labels(owned(labels));
    MetricVec::create(MetricType::COUNTER, ShardedCounterBuilder, options)
}

/// The distributions of a new family, whose series differ in these labels. `buckets`: upper bounds in seconds, ascending.
pub(super) fn duration_histograms(
    name: &str,
    help: &str,
    buckets: &[f64],
    labels: &[&str],
) -> prometheus::Result<DurationHistogramVec> {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec()).variable_labels(owned(labels));
    MetricVec::create(MetricType::HISTOGRAM, DurationHistogramBuilder, options)
}

fn owned(labels: &[&str]) -> Vec<String> {
    labels.iter().map(|&label| label.to_owned()).collect()
}

/// The labels of a series, by their names, as the crate itself sorts them.
fn labels<V: AsRef<str>>(names: &[String], values: &[V]) -> prometheus::Result<Arc<[LabelPair]>> {
    if names.len() != values.len() {
        return Err(prometheus::Error::InconsistentCardinality { expect: names.len(), got: values.len() });
    }
    let pair = |(name, value): (&String, &V)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.clone());
        pair.set_value(value.as_ref().to_owned());
        pair
    };
    let mut pairs: Vec<LabelPair> = names.iter().zip(values).map(pair).collect();
    pairs.sort();
    Ok(pairs.into())
}

#[cfg(test)]
mod tests {
    use prometheus::{Encoder, Registry, TextEncoder};

    use super::*;

    fn text(registry: &Registry) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn what_many_threads_count_is_added_up() {
        let registry = Registry::new();
        let family = sharded_counters("a_total", "a", &["z", "b"]).unwrap();
        registry.register(Box::new(family.clone())).unwrap();
        let counter = family.with_label_values(&["1", "2"]);
        std::thread::scope(|scope| {
            for _ in 0..3 * SHARDS {
                scope.spawn(|| (0..1000).for_each(|_| counter.inc()));
            }
        });
        counter.inc_by(5);
        assert_eq!(counter.get(), 3 * SHARDS as u64 * 1000 + 5);
        assert_eq!(text(&registry), "# HELP a_total a\n# TYPE a_total counter\na_total{b=\"2\",z=\"1\"} 48005\n");
    }

    #[test]
    fn a_distribution_is_written_as_prometheus_has_it() {
        let registry = Registry::new();
        let family = duration_histograms("a_seconds", "a", &[0.00025, 0.1, 1.0], &[]).unwrap();
        registry.register(Box::new(family.clone())).unwrap();
        let histogram = family.with_label_values::<&str>(&[]);
        // A bound belongs to its bucket.
        for micros in [250, 251, 100_000, 2_000_000] {
            histogram.observe(Duration::from_micros(micros));
        }
        let expected = "# HELP a_seconds a\n# TYPE a_seconds histogram\na_seconds_bucket{le=\"0.00025\"} 1\n\
                        a_seconds_bucket{le=\"0.1\"} 3\na_seconds_bucket{le=\"1\"} 3\na_seconds_bucket{le=\"+Inf\"} 4\n\
                        a_seconds_sum 2.100501\na_seconds_count 4\n";
        assert_eq!(text(&registry), expected);
    }
}
