//! Limits the connections from one address, of IPv6 from one /64 ([`site_of`]). An address at its limit gets no more; other
//! addresses are not affected. The total is limited by [`crate::files`].

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use prometheus::IntGauge;

use super::site::site_of;

/// The connections of the process's public listeners.
#[derive(Debug)]
pub struct Admission {
    /// 0 is no limit.
    most_from_one: AtomicUsize,
    connections: IntGauge,
    by_address: DashMap<u128, usize>,
}

impl Admission {
    /// Room for at most `most_from_one` from one address. All are counted in `connections`.
    pub fn new(most_from_one: Option<NonZeroUsize>, connections: IntGauge) -> Self {
        let admission = Admission { most_from_one: AtomicUsize::new(0), connections, by_address: DashMap::default() };
        admission.limit_each(most_from_one);
        admission
    }

    /// Room for at most this many from one address from now on. Nobody is turned out, and those who came while there was no limit
    /// are not counted.
    pub fn limit_each(&self, most_from_one: Option<NonZeroUsize>) {
        self.most_from_one.store(most_from_one.map_or(0, NonZeroUsize::get), Ordering::Relaxed);
    }

    /// Counts a connection until the permit is dropped.
    pub(super) fn enter(self: &Arc<Self>) -> AddressPermit {
        self.connections.inc();
        AddressPermit { admission: Arc::clone(self), address: None }
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct AddressPermit {
    admission: Arc<Admission>,
    address: Option<u128>,
}

impl AddressPermit {
    /// Also counts the connection for this address. False if the address is at its limit.
    pub(super) fn count_for(&mut self, address: IpAddr) -> bool {
        let most = self.admission.most_from_one.load(Ordering::Relaxed);
        if most == 0 {
            return true;
        }
        let address = site_of(address);
        let mut count = self.admission.by_address.entry(address).or_default();
        if *count >= most {
            return false;
        }
        *count += 1;
        self.address = Some(address);
        true
    }
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        if let Some(address) = self.address
            && let Entry::Occupied(mut count) = self.admission.by_address.entry(address)
        {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        self.admission.connections.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gauge() -> IntGauge {
        IntGauge::new("connections", "Connections").unwrap()
    }

    #[test]
    fn an_address_is_limited_and_a_closed_connection_frees_its_place() {
        let admission = Arc::new(Admission::new(NonZeroUsize::new(2), gauge()));
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let mut permits: Vec<AddressPermit> = (0..4).map(|_| admission.enter()).collect();
        assert!(permits[0].count_for(one) && permits[1].count_for(one));
        assert!(!permits[2].count_for(one) && permits[3].count_for(other));
        permits.remove(0);
        assert!(permits[1].count_for(one));
        permits.clear();
        assert!(admission.by_address.is_empty());
        let of_a_64 = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"];
        let mut permits: Vec<AddressPermit> = of_a_64.iter().map(|_| admission.enter()).collect();
        let counted =
            permits.iter_mut().zip(of_a_64).map(|(permit, address)| permit.count_for(address.parse().unwrap()));
        assert_eq!(counted.collect::<Vec<_>>(), [true, true, false, true]);
    }
}
