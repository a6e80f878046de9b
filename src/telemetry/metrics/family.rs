//! Families of series, and who holds a series.
//!
//! A series that is of a node goes with the node, or dashboards show ghosts. Two may hold the same one: `node` is the only
//! label beside the status of what the edge counts, and a web node that is asked past the caches may have the name of a
//! Varnish (both are named after their host, say). So a series goes with the last who holds it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::core::{MetricVec, MetricVecBuilder};
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::labels::Labels;
use super::register;
use super::sharded::{DurationHistogramVec, ShardedCounterVec, duration_histograms, sharded_counters};

/// Counters that differ in the labels `L`.
pub(super) type Counters<L> = MetricFamily<IntCounterVec, L>;

/// Counters of the data path that differ in the labels `L`.
pub(super) type ShardedCounters<L> = MetricFamily<ShardedCounterVec, L>;

/// Whole numbers that go up and down, and differ in the labels `L`.
pub(super) type IntGauges<L> = MetricFamily<IntGaugeVec, L>;

/// Numbers that go up and down, and differ in the labels `L`.
pub(super) type Gauges<L> = MetricFamily<GaugeVec, L>;

/// Distributions that differ in the labels `L`.
pub(super) type Histograms<L> = MetricFamily<DurationHistogramVec, L>;

/// Series of one name that differ in the labels `L`.
#[derive(Clone, Debug)]
pub(super) struct MetricFamily<V, L> {
    series: V,
    /// How many hold a series. One that nobody ever held is not here, and stays.
    holders: Arc<Mutex<BTreeMap<L, usize>>>,
}

impl<B: MetricVecBuilder, L: Labels> MetricFamily<MetricVec<B>, L> {
    fn new(registry: &Registry, series: MetricVec<B>) -> prometheus::Result<Self>
    where
        MetricVec<B>: 'static,
    {
        Ok(MetricFamily { series: register(registry, series)?, holders: Arc::default() })
    }

    /// The series with these labels, made when first asked for.
    pub(super) fn get(&self, labels: &L) -> B::M {
        self.series.with_label_values(labels.texts().as_ref())
    }

    /// The same family with these series in it from the start, so that what is counted first is a rise and not a new series.
    pub(super) fn with(self, series: impl IntoIterator<Item = L>) -> Self {
        series.into_iter().for_each(|labels| drop(self.get(&labels)));
        self
    }

    /// Drops a series.
    pub(super) fn remove(&self, labels: &L) {
        // One that was never made is no fault, and there are no others: the labels have the right names.
        _ = self.series.remove_label_values(labels.texts().as_ref());
    }

    fn hold(&self, labels: L) -> B::M {
        let mut holders = self.holders.lock();
        let series = self.get(&labels);
        *holders.entry(labels).or_default() += 1;
        series
    }

    fn release(&self, labels: &L) {
        let mut holders = self.holders.lock();
        let Some(left) = holders.get_mut(labels) else { return };
        *left -= 1;
        if *left == 0 {
            holders.remove(labels);
            self.remove(labels);
        }
    }
}

/// Series that go together, whatever family each is in: when this is dropped.
#[derive(Default)]
pub(super) struct NodeSeries(Vec<Box<dyn Fn() + Send + Sync>>);

impl NodeSeries {
    /// Holds the series with these labels.
    pub(super) fn bind<B: MetricVecBuilder, L: Labels>(
        &mut self,
        family: &MetricFamily<MetricVec<B>, L>,
        labels: L,
    ) -> B::M
    where
        MetricVec<B>: 'static,
    {
        let series = family.hold(labels.clone());
        let family = family.clone();
        self.0.push(Box::new(move || family.release(&labels)));
        series
    }
}

impl Drop for NodeSeries {
    fn drop(&mut self) {
        self.0.iter().for_each(|release| release());
    }
}

impl fmt::Debug for NodeSeries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} series", self.0.len())
    }
}

pub(super) fn histograms<L: Labels>(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: &[f64],
) -> prometheus::Result<Histograms<L>> {
    MetricFamily::new(registry, duration_histograms(name, help, buckets, L::NAMES)?)
}

/// Of the data path: each worker counts apart.
pub(super) fn data_path_counters<L: Labels>(
    registry: &Registry,
    name: &str,
    help: &str,
) -> prometheus::Result<ShardedCounters<L>> {
    MetricFamily::new(registry, sharded_counters(name, help, L::NAMES)?)
}

pub(super) fn counters<L: Labels>(registry: &Registry, name: &str, help: &str) -> prometheus::Result<Counters<L>> {
    MetricFamily::new(registry, IntCounterVec::new(Opts::new(name, help), L::NAMES)?)
}

pub(super) fn int_gauges<L: Labels>(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauges<L>> {
    MetricFamily::new(registry, IntGaugeVec::new(Opts::new(name, help), L::NAMES)?)
}

pub(super) fn gauges<L: Labels>(registry: &Registry, name: &str, help: &str) -> prometheus::Result<Gauges<L>> {
    MetricFamily::new(registry, GaugeVec::new(Opts::new(name, help), L::NAMES)?)
}
