//! Nodes whose address is a name: looked up until it resolves, and [again](crate::registry::resolve) after that. Each
//! has a task of its own, so that a name that does not resolve delays no other.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::registry::resolve::{AT_ONCE, RETRY, Resolve, look_again};

/// The names of nodes.
pub(super) struct NameLookups {
    lookup: NameLookup,
    found: mpsc::Receiver<FoundAddresses>,
    wanted: HashMap<String, WantedName>,
}

/// What a look-up needs.
#[derive(Clone)]
struct NameLookup {
    resolve: Resolve,
    doubted: watch::Receiver<()>,
    room: Arc<Semaphore>,
    found: mpsc::Sender<FoundAddresses>,
}

struct WantedName {
    name: String,
    has_resolved: bool,
    /// Aborted when this value is dropped.
    _task: AbortOnDropHandle<()>,
}

/// The current addresses of a name.
pub(super) struct FoundAddresses {
    pub(super) key: String,
    /// The name, with its port.
    pub(super) name: String,
    /// At least one.
    pub(super) addresses: Vec<SocketAddr>,
}

impl NameLookups {
    /// No names yet. `doubted` changes when a node cannot be reached.
    pub(super) fn new(resolve: Resolve, doubted: watch::Receiver<()>) -> Self {
        let (sender, found) = mpsc::channel(AT_ONCE);
        let lookup = NameLookup { resolve, doubted, room: Arc::new(Semaphore::new(AT_ONCE)), found: sender };
        NameLookups { lookup, found, wanted: HashMap::new() }
    }

    /// Looks up this name for a key from now on, instead of any previous name of the key. A name that has already
    /// resolved is looked up again at once.
    pub(super) fn want(&mut self, key: &str, name: &str) {
        if self.wanted.get(key).is_some_and(|wanted| wanted.name == name && !wanted.has_resolved) {
            return;
        }
        let task = tokio::spawn(self.lookup.clone().run(key.to_owned(), name.to_owned()));
        let wanted = WantedName { name: name.to_owned(), has_resolved: false, _task: AbortOnDropHandle::new(task) };
        self.wanted.insert(key.to_owned(), wanted);
    }

    /// Stops looking up the address of a key.
    pub(super) fn forget(&mut self, key: &str) {
        self.wanted.remove(key);
    }

    /// Whether every name has resolved once.
    pub(super) fn have_resolved(&self) -> bool {
        self.wanted.values().all(|wanted| wanted.has_resolved)
    }

    /// The next name that has resolved; never returns while there is no name to look up.
    pub(super) async fn found(&mut self) -> FoundAddresses {
        loop {
            let Some(found) = self.found.recv().await else { std::future::pending().await };
            // It may have been forgotten, or changed, since it was sent.
            if let Some(wanted) = self.wanted.get_mut(&found.key).filter(|wanted| wanted.name == found.name) {
                wanted.has_resolved = true;
                return found;
            }
        }
    }
}

impl NameLookup {
    async fn run(mut self, key: String, name: String) {
        let (mut has_resolved, mut told) = (false, String::new());
        loop {
            // The semaphore is never closed.
            let permit = self.room.acquire().await;
            let resolved = (self.resolve)(name.clone()).await;
            drop(permit);
            let looked = Instant::now();
            match resolved {
                Ok(addresses) => {
                    if !std::mem::take(&mut told).is_empty() {
                        tracing::info!(key, address = name, "node address resolves again");
                    }
                    has_resolved = true;
                    let found = FoundAddresses { key: key.clone(), name: name.clone(), addresses };
                    if self.found.send(found).await.is_err() {
                        return;
                    }
                }
                Err(reason) if reason != told => {
                    if has_resolved {
                        tracing::warn!(
                            key,
                            address = name,
                            reason,
                            "node address does not resolve any more; it stays as it was"
                        );
                    } else {
                        tracing::warn!(key, address = name, reason, "node address does not resolve yet");
                    }
                    told = reason;
                }
                Err(_) => {}
            }
            if has_resolved {
                look_again(&mut self.doubted, looked).await;
            } else {
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::registry::resolve::{LOOK_EVERY, Resolved};

    type Zone = Arc<Mutex<Resolved>>;

    fn addresses(last: &[u8]) -> Vec<SocketAddr> {
        last.iter().map(|last| SocketAddr::from(([10, 0, 0, *last], 80))).collect()
    }

    fn lookups() -> (Zone, watch::Sender<()>, NameLookups) {
        let zone: Zone = Arc::new(Mutex::new(Ok(addresses(&[1]))));
        let asked = Arc::clone(&zone);
        let resolve: Resolve = Arc::new(move |_| {
            let answer = asked.lock().clone();
            Box::pin(async move { answer })
        });
        let (doubted, doubts) = watch::channel(());
        (zone, doubted, NameLookups::new(resolve, doubts))
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_looked_up_again_soon_if_doubted_and_else_now_and_then() {
        let (zone, doubted, mut names) = lookups();
        *zone.lock() = Err("away".to_owned());
        names.want("web/a", "a:80");
        tokio::time::sleep(3 * RETRY).await;
        assert!(!names.have_resolved());
        *zone.lock() = Ok(addresses(&[1]));
        assert_eq!(names.found().await.addresses, addresses(&[1]));
        assert!(names.have_resolved());
        for (last, is_doubted, within) in [(2, false, LOOK_EVERY), (3, true, RETRY), (4, false, LOOK_EVERY)] {
            let began = Instant::now();
            *zone.lock() = Ok(addresses(&[last]));
            if is_doubted {
                (0..100).for_each(|_| doubted.send_replace(()));
            }
            while names.found().await.addresses != addresses(&[last]) {}
            assert!(began.elapsed() <= within, "{last}: {:?}", began.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_wanted_any_more_is_not_found() {
        let (_zone, _doubted, mut names) = lookups();
        names.want("web/a", "a:80");
        names.want("web/b", "b:80");
        // Both results are sent by then.
        tokio::time::sleep(RETRY).await;
        names.forget("web/a");
        assert_eq!(names.found().await.key, "web/b");
        names.want("web/b", "c:80");
        assert_eq!(names.found().await.name, "c:80");
        names.forget("web/b");
        assert!(tokio::time::timeout(3 * LOOK_EVERY, names.found()).await.is_err());
    }
}
