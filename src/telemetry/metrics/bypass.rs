//! What becomes of pages that pass the caches by.

use prometheus::{IntCounter, Registry};

use super::family::counters;
use super::labels::FragmentResult;

/// Fragments (`<esi:include>`) of pages that no Varnish fills in.
#[derive(Debug)]
pub struct FragmentMetrics {
    /// Filled in.
    pub included: IntCounter,
    /// Left out of their page: the log says why.
    pub left_out: IntCounter,
    /// Pages whose encoding hides whether they have any: these pass as they are.
    pub hidden: IntCounter,
}

impl FragmentMetrics {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let fragments = counters(
            registry,
            "bypass_fragments_total",
            "Fragments of pages that passed the caches by, by what became of them",
        )?;
        let [included, left_out, hidden] = FragmentResult::ALL.map(|result| fragments.get(&result));
        Ok(FragmentMetrics { included, left_out, hidden })
    }
}
