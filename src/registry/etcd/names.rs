//! Nodes whose address is a name: looked up again and again until it resolves, each by itself, so that one that does not
//! delays no other.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use crate::registry::resolve::{RETRY, resolve};
use crate::telemetry::causes;

/// How many look-ups there are at once: each has a thread.
const AT_ONCE: usize = 16;

/// The look-ups that are under way.
pub(super) struct NameLookups {
    tasks: JoinSet<FoundAddress>,
    /// The address that each key waits for.
    wanted: HashMap<String, (String, AbortHandle)>,
    room: Arc<Semaphore>,
}

/// A name that resolved.
pub(super) struct FoundAddress {
    pub(super) key: String,
    /// The name, with its port.
    name: String,
    pub(super) address: SocketAddr,
}

impl NameLookups {
    pub(super) fn new() -> Self {
        NameLookups { tasks: JoinSet::new(), wanted: HashMap::new(), room: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Looks up the address of a key, instead of whatever was looked up for it before.
    pub(super) fn want(&mut self, key: &str, name: &str) {
        if self.wanted.get(key).is_some_and(|(wanted, _)| wanted == name) {
            return;
        }
        self.forget(key);
        let task = self.tasks.spawn(look_up(key.to_owned(), name.to_owned(), Arc::clone(&self.room)));
        self.wanted.insert(key.to_owned(), (name.to_owned(), task));
    }

    /// Stops looking up the address of a key.
    pub(super) fn forget(&mut self, key: &str) {
        if let Some((_, task)) = self.wanted.remove(key) {
            task.abort();
        }
    }

    /// Whether all have been found.
    pub(super) fn is_idle(&self) -> bool {
        self.wanted.is_empty()
    }

    /// The next one that is found; never returns while none is looked for.
    pub(super) async fn found(&mut self) -> FoundAddress {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(found)) => {
                    let is_wanted = self.wanted.get(&found.key).is_some_and(|(name, _)| *name == found.name);
                    if is_wanted {
                        self.wanted.remove(&found.key);
                        return found;
                    }
                }
                Some(Err(error)) if error.is_panic() => {
                    tracing::error!(error = %causes(&error), "a look-up of a name panicked");
                }
                // It was forgotten.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

async fn look_up(key: String, name: String, room: Arc<Semaphore>) -> FoundAddress {
    let mut told = String::new();
    loop {
        // It is closed with the runtime.
        let permit = room.acquire().await;
        let looked_up = resolve(&name).await;
        drop(permit);
        match looked_up {
            Ok(address) => return FoundAddress { key, name, address },
            Err(reason) if reason != told => {
                tracing::warn!(key, address = name, reason, "node address does not resolve yet");
                told = reason;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}
