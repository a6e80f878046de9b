//! How many connections there may be: in all, and from one address.
//!
//! In all: when there is no room, nobody is turned away. Connections wait in the kernel until others end, and those at
//! rest are ended for them. From one address: whoever has as many as it may gets no more, and the others do not notice.

use std::net::IpAddr;
use std::sync::Arc;

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use prometheus::IntGauge;
use tokio::sync::Notify;

/// The connections of the process's public listeners.
#[derive(Debug)]
pub struct Admission {
    most: i64,
    most_from_one: usize,
    connections: IntGauge,
    by_address: DashMap<IpAddr, usize>,
    room: Notify,
}

impl Admission {
    /// Room for `most` in all, and for `most_from_one` from one address, where 0 is no limit. They are counted in
    /// `connections`.
    pub fn new(most: usize, most_from_one: usize, connections: IntGauge) -> Self {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        Admission { most, most_from_one, connections, by_address: DashMap::default(), room: Notify::new() }
    }

    /// Whether there is no room for another connection.
    pub(super) fn is_full(&self) -> bool {
        self.connections.get() >= self.most
    }

    /// Returns when there is room for another connection. Several workers may see the same room: a few more connections
    /// than the limit is what that costs, and none is lost.
    pub(super) async fn room(&self) {
        while self.is_full() {
            let freed = self.room.notified();
            if self.is_full() {
                freed.await;
            }
        }
    }

    /// Counts a connection for as long as the permit lives.
    pub(super) fn enter(self: &Arc<Self>) -> Permit {
        self.connections.inc();
        Permit { admission: Arc::clone(self), address: None }
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Permit {
    admission: Arc<Admission>,
    address: Option<IpAddr>,
}

impl Permit {
    /// Counts the connection for this address as well. False where it has as many as it may.
    pub(super) fn count_for(&mut self, address: IpAddr) -> bool {
        if self.admission.most_from_one == 0 {
            return true;
        }
        let mut count = self.admission.by_address.entry(address).or_default();
        if *count >= self.admission.most_from_one {
            return false;
        }
        *count += 1;
        self.address = Some(address);
        true
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(address) = self.address
            && let Entry::Occupied(mut count) = self.admission.by_address.entry(address)
        {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        let was_full = self.admission.is_full();
        self.admission.connections.dec();
        if was_full {
            self.admission.room.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn gauge() -> IntGauge {
        IntGauge::new("connections", "Connections").unwrap()
    }

    #[test]
    fn an_address_has_as_many_connections_as_it_may_and_its_place_is_free_again_when_one_ends() {
        let admission = Arc::new(Admission::new(100, 2, gauge()));
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let mut permits: Vec<Permit> = (0..4).map(|_| admission.enter()).collect();
        assert!(permits[0].count_for(one) && permits[1].count_for(one));
        assert!(!permits[2].count_for(one) && permits[3].count_for(other));
        permits.remove(0);
        assert!(permits[1].count_for(one));
        permits.clear();
        assert!(admission.by_address.is_empty());
    }

    #[test]
    fn who_finds_no_room_waits_until_somebody_leaves() {
        let admission = Arc::new(Admission::new(1, 0, gauge()));
        let permit = admission.enter();
        let mut room = pin!(admission.room());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(room.as_mut().poll(&mut cx).is_pending());
        drop(permit);
        assert!(room.as_mut().poll(&mut cx).is_ready());
    }
}
