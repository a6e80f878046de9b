//! The VCL that is pushed to Varnish nodes: series of a node that has any.

use prometheus::{IntCounter, IntGauge, Registry};

use super::family::{Counters, IntGauges, NodeSeries, counters, int_gauges};
use super::labels::PushResult;
use crate::fleet::NodeId;

/// The families.
#[derive(Clone, Debug)]
pub(super) struct VclFamilies {
    pushes: Counters<(NodeId, PushResult)>,
    drifts: Counters<NodeId>,
    outdated: IntGauges<NodeId>,
    loaded: IntGauges<NodeId>,
}

/// The handles of one Varnish.
#[derive(Debug)]
pub struct VclMetrics {
    /// Pushes of a VCL that was compiled for it.
    pub compiled: IntCounter,
    /// Pushes of one that was loaded still.
    pub reused: IntCounter,
    /// VCLs that varnishd did not take.
    pub refused: IntCounter,
    /// Pushes whose connection broke.
    pub failed: IntCounter,
    /// Times a VCL was replaced that somebody else had put in use.
    pub drifts: IntCounter,
    /// 1 while it uses another VCL than it should, or does not say.
    pub outdated: IntGauge,
    /// VCLs of ours that it has.
    pub loaded: IntGauge,
}

impl VclFamilies {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(VclFamilies {
            pushes: counters(r, "vcl_pushes_total", "Times a VCL was pushed to a Varnish")?,
            drifts: counters(
                r,
                "vcl_drifts_total",
                "Times a VCL was replaced that somebody else had put in use at a Varnish",
            )?,
            outdated: int_gauges(
                r,
                "vcl_outdated",
                "1 while a Varnish uses another VCL than the one that is pushed to it, or does not say",
            )?,
            loaded: int_gauges(
                r,
                "vcl_loaded",
                "VCLs of clearcoat that a Varnish has, with those that it is yet to drop",
            )?,
        })
    }

    pub(super) fn bind(&self, id: &NodeId, held: &mut NodeSeries) -> VclMetrics {
        let pushes = PushResult::ALL.map(|result| held.bind(&self.pushes, (id.clone(), result)));
        let [compiled, reused, refused, failed] = pushes;
        VclMetrics {
            compiled,
            reused,
            refused,
            failed,
            drifts: held.bind(&self.drifts, id.clone()),
            outdated: held.bind(&self.outdated, id.clone()),
            loaded: held.bind(&self.loaded, id.clone()),
        }
    }
}
