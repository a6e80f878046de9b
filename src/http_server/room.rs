//! Room for connections, and which ones are closed when it is used up.
//!
//! A connection could be refused if there is no room, but Magento treats that as a failed purge, logs it and forgets
//! the purge. So a place is taken *before* a connection is accepted, and a client without one waits in the kernel's
//! backlog: a connection with a request in flight ends within about `ack_timeout`.
//!
//! That alone would let idle connections hold every place: kept-alive ones, and silent new ones for as long as a head
//! may take. While no place is free, connections are closed once they have been idle for a moment. The moment is for
//! those just accepted or answered, and is far below the 10 s that Magento waits.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

/// How long a connection may be idle while others wait for a place.
const MOMENT: Duration = Duration::from_secs(1);

/// The places of one listener.
pub(super) struct Room {
    places: Arc<Semaphore>,
    is_full: watch::Sender<bool>,
}

/// A connection with a place.
pub(super) struct Guest {
    _place: OwnedSemaphorePermit,
    is_full: watch::Receiver<bool>,
    /// Since when it has no request in flight; `None` while it has one.
    at_rest_since: Mutex<Option<Instant>>,
}

impl Room {
    pub(super) fn new(places: usize) -> Self {
        Room { places: Arc::new(Semaphore::new(places)), is_full: watch::channel(false).0 }
    }

    /// Waits for a place. Cancel-safe.
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

/// A place without a connection.
pub(super) struct Place {
    place: OwnedSemaphorePermit,
    is_full: watch::Receiver<bool>,
}

impl Place {
    /// Assigns the place to a connection.
    pub(super) fn seat(self) -> Guest {
        Guest { _place: self.place, is_full: self.is_full, at_rest_since: Mutex::new(Some(Instant::now())) }
    }
}

impl Guest {
    /// Records the start of a request.
    pub(super) fn request_began(&self) {
        *self.lock() = None;
    }

    /// Records that its answer is being sent.
    pub(super) fn request_ended(&self) {
        *self.lock() = Some(Instant::now());
    }

    /// Returns once others wait for a place and this connection has been idle for a moment.
    pub(super) async fn must_leave(&self) {
        let mut is_full = self.is_full.clone();
        loop {
            if is_full.wait_for(|is_full| *is_full).await.is_err() {
                // The listener is closed, so no other connection waits.
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
