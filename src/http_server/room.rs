//! Room for connections, and who leaves where there is none.
//!
//! A client that finds no room could be turned away, but Magento takes a closed connection for a purge that failed,
//! says so in a log and forgets the purge. So a place is taken *before* a connection is accepted, and who finds none
//! waits in the kernel's backlog: a connection with a request under way ends it within `ack_timeout` or so.
//!
//! That alone would let connections hold every place that want nothing: kept ones between two requests, and those of
//! whoever connects and says nothing, for as long as a head may take. While there is no place, they leave once they
//! have been at rest for a moment. The moment is there for those that have just been accepted or answered, and is far
//! below the 10 s that Magento waits.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

/// How long a connection may be at rest while others wait for a place.
const MOMENT: Duration = Duration::from_secs(1);

/// The places of one listener.
pub(super) struct Room {
    places: Arc<Semaphore>,
    is_full: watch::Sender<bool>,
}

/// A connection that has a place, as far as it matters here.
pub(super) struct Guest {
    _place: OwnedSemaphorePermit,
    is_full: watch::Receiver<bool>,
    /// Since when it has no request under way; `None` while it has one.
    at_rest_since: Mutex<Option<Instant>>,
}

impl Room {
    pub(super) fn new(places: usize) -> Self {
        Room { places: Arc::new(Semaphore::new(places)), is_full: watch::channel(false).0 }
    }

    /// Waits for a place. Nothing is lost where this is given up.
    pub(super) async fn enter(&self) -> Place {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return self.take(place);
        }
        self.is_full.send_replace(true);
        match Arc::clone(&self.places).acquire_owned().await {
            Ok(place) => self.take(place),
            // The semaphore is never closed.
            Err(_) => std::future::pending().await,
        }
    }

    fn take(&self, place: OwnedSemaphorePermit) -> Place {
        self.is_full.send_if_modified(std::mem::take);
        Place { place, is_full: self.is_full.subscribe() }
    }
}

/// A place that nobody has yet.
pub(super) struct Place {
    place: OwnedSemaphorePermit,
    is_full: watch::Receiver<bool>,
}

impl Place {
    /// Somebody came.
    pub(super) fn seat(self) -> Guest {
        Guest { _place: self.place, is_full: self.is_full, at_rest_since: Mutex::new(Some(Instant::now())) }
    }
}

impl Guest {
    /// A request has come.
    pub(super) fn request_began(&self) {
        *self.lock() = None;
    }

    /// Its answer is on its way.
    pub(super) fn request_ended(&self) {
        *self.lock() = Some(Instant::now());
    }

    /// Returns when others wait for a place and this connection has been at rest for a moment.
    pub(super) async fn must_leave(&self) {
        let mut is_full = self.is_full.clone();
        loop {
            if is_full.wait_for(|is_full| *is_full).await.is_err() {
                // The listener is closed: nobody waits any more.
                return std::future::pending().await;
            }
            let rest = self.lock().map_or(Duration::ZERO, |since| since.elapsed());
            if rest >= MOMENT {
                return;
            }
            tokio::time::sleep(MOMENT - rest).await;
        }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, Option<Instant>> {
        self.at_rest_since.lock()
    }
}
