//! What the registry counts. The gauges that follow from its state are filled in when somebody asks.

use prometheus::{Gauge, IntCounter, IntGauge, Registry};

use super::family::{Counters, IntGauges, counters, int_gauges};
use super::labels::Resync;
use super::{counter, register};
use crate::fleet::Role;

/// The metrics of the registry; 0 where there is none but the configuration file.
#[derive(Debug)]
pub struct RegistryMetrics {
    /// 1 while changes come in.
    pub connected: IntGauge,
    /// Up to where every change is known.
    pub revision: IntGauge,
    /// How long ago it was last heard of, in seconds.
    pub last_contact: Gauge,
    /// Keys and values that meant nothing.
    pub rejected: IntCounter,
    resyncs: Counters<Resync>,
    held: IntGauges<Role>,
}

impl RegistryMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        let resyncs = counters(r, "registry_resyncs_total", "Times all nodes were listed, by reason")?;
        let held =
            int_gauges(r, "registry_held", "Nodes that are kept though the registry has lost them: too many at once")?;
        Ok(RegistryMetrics {
            connected: register(r, IntGauge::new("registry_connected", "1 while changes of the registry come in")?)?,
            revision: register(
                r,
                IntGauge::new("registry_revision", "The revision up to which every change of the registry is known")?,
            )?,
            last_contact: register(
                r,
                Gauge::new("registry_last_contact_seconds", "Time since the registry was last heard of")?,
            )?,
            rejected: counter(r, "registry_rejected_total", "Keys and values of the registry that meant nothing")?,
            resyncs: resyncs.with(Resync::ALL),
            held: held.with([Role::Web, Role::Varnish]),
        })
    }

    /// Counts a list of all nodes.
    pub fn resynced(&self, reason: Resync) {
        self.resyncs.get(&reason).inc();
    }

    /// So many nodes of a role are held.
    pub fn held(&self, role: Role, nodes: usize) {
        self.held.get(&role).set(i64::try_from(nodes).unwrap_or(i64::MAX));
    }
}
