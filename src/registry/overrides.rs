//! Where operators' overrides of nodes are kept ([`crate::fleet::NodeOverride`]): in etcd if there is one, otherwise here and at
//! the other replicas, which tell each other ([`crate::replicas`]).
//!
//! **Keys of their own in etcd**, `overrides/<role>/<id>`, beside `nodes/` and not in it: an agent writes and deletes its node's
//! key as it likes and has no lease to spare for a word that is to outlive it, and who may register a node need not be
//! allowed to drain others. clearcoat itself may only read `nodes/`, and stays so. The price is a second watch. Its first list
//! is waited for at the start, so that a drained node gets no request of a clearcoat that has just begun.
//!
//! **On disk** there is a copy in either case, so that a start without etcd, or before another replica is met, drains what
//! was drained before. It is written after the change is in effect: who drains a node because a disk hangs must not wait for
//! that disk. The operator is told if it was not written in time.

mod file;
mod in_etcd;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::etcd::{EtcdError, SharedEtcd};
use crate::fleet::{NamedOverride, NodeKey, OverrideChange, Overrides, TooManyOverrides};

/// The maximum time that a change waits until it is on disk, or until the watch of etcd has brought it.
const PATIENCE: Duration = Duration::from_secs(2);

/// All overrides that are known here.
#[derive(Clone, Debug, Default)]
pub struct KnownOverrides {
    /// Increases with every change.
    pub serial: u64,
    /// Nothing more can be learnt from etcd at the start: it has listed them, or does not answer.
    pub is_complete: bool,
    /// The revision of etcd up to which every change is known; 0 without etcd.
    pub revision: i64,
    /// The overrides.
    pub overrides: Overrides,
}

/// Why an override was not changed.
#[derive(Debug, thiserror::Error)]
pub enum OverrideError {
    /// There are too many.
    #[error(transparent)]
    TooMany(#[from] TooManyOverrides),
    /// etcd has not taken it.
    #[error("etcd has not taken it")]
    Etcd(#[from] EtcdError),
    /// Others change the same one all the time.
    #[error("others change it at the same time")]
    Contended,
    /// It cannot be written down.
    #[error(transparent)]
    Encode(#[from] serde_json::Error),
}

/// The overrides, and where they are kept.
pub struct OverrideStore {
    known: watch::Sender<Arc<KnownOverrides>>,
    etcd: Option<SharedEtcd>,
    /// The copy on disk; `None` for none.
    path: Option<PathBuf>,
    /// The serial of what is on disk.
    saved: watch::Sender<u64>,
}

impl OverrideStore {
    /// A store with the overrides of the last run. Keeps them in etcd if there is one, and a copy at `path`.
    pub async fn open(etcd: Option<SharedEtcd>, path: Option<PathBuf>) -> Arc<Self> {
        let overrides = match path.clone() {
            Some(path) => file::read(path).await,
            None => Overrides::default(),
        };
        Arc::new(OverrideStore::new(etcd, path, overrides))
    }

    /// A store that begins with these overrides.
    pub fn new(etcd: Option<SharedEtcd>, path: Option<PathBuf>, overrides: Overrides) -> Self {
        let known = KnownOverrides { serial: 0, is_complete: etcd.is_none(), revision: 0, overrides };
        let (known, saved) = (watch::channel(Arc::new(known)).0, watch::channel(0).0);
        OverrideStore { known, etcd, path, saved }
    }

    /// Starts the tasks that keep the copy on disk and follow etcd.
    pub fn start(self: &Arc<Self>, tasks: &mut JoinSet<()>) {
        if let Some(path) = self.path.clone() {
            tasks.spawn(file::keep(path, self.known.subscribe(), self.saved.clone()));
        }
        if let Some(etcd) = self.etcd.clone() {
            tasks.spawn(in_etcd::follow(Arc::clone(self), etcd));
        }
    }

    /// The overrides as they are now, and their changes.
    pub fn watch(&self) -> watch::Receiver<Arc<KnownOverrides>> {
        self.known.subscribe()
    }

    /// The overrides as they are now.
    pub fn known(&self) -> Arc<KnownOverrides> {
        Arc::clone(&self.known.borrow())
    }

    /// Changes the override of a node, in effect here when this returns. Returns what could not be made certain in time, in words.
    ///
    /// # Errors
    /// [`OverrideError`]: nothing was changed, or, where etcd has not answered, perhaps.
    pub async fn change(
        &self,
        node: &NodeKey,
        change: OverrideChange,
        now_ms: u64,
    ) -> Result<Option<String>, OverrideError> {
        match &self.etcd {
            Some(etcd) => {
                let mut planned = self.known().overrides.clone();
                planned.change(node, change, now_ms)?;
                let revision = in_etcd::change(etcd, node, change, now_ms).await?;
                let mut known = self.watch();
                let seen = known.wait_for(|known| known.revision >= revision);
                let in_time = tokio::time::timeout(PATIENCE, seen).await.is_ok_and(|seen| seen.is_ok());
                Ok((!in_time).then(|| "it is in etcd, whose watch has not brought it here yet".to_owned()))
            }
            None => {
                self.update(|overrides| overrides.change(node, change, now_ms))?;
                Ok(self.is_saved().await)
            }
        }
    }

    /// Takes what another replica says. Not for a store in etcd.
    pub fn merge(&self, theirs: Vec<NamedOverride>) {
        // Cannot fail: `merge` has no bound of its own.
        _ = self.update(|overrides| Ok::<_, TooManyOverrides>(overrides.merge(theirs)));
    }

    /// Changes the table; `false` and an error leave it as it is.
    fn update<E>(&self, change: impl FnOnce(&mut Overrides) -> Result<bool, E>) -> Result<(), E> {
        let mut outcome = Ok(());
        self.known.send_if_modified(|known| {
            let mut next = KnownOverrides::clone(known);
            match change(&mut next.overrides) {
                Ok(true) => {
                    next.serial += 1;
                    *known = Arc::new(next);
                    true
                }
                Ok(false) => false,
                Err(error) => {
                    outcome = Err(error);
                    false
                }
            }
        });
        outcome
    }

    /// Waits until what is known now is on disk. Returns why it is not.
    async fn is_saved(&self) -> Option<String> {
        if self.path.is_none() {
            return Some("it is lost with this process: the journal is in memory, and so is this".to_owned());
        }
        let serial = self.known().serial;
        let mut saved = self.saved.subscribe();
        let is_on_disk = saved.wait_for(|saved| *saved >= serial);
        let in_time = tokio::time::timeout(PATIENCE, is_on_disk).await.is_ok_and(|saved| saved.is_ok());
        (!in_time).then(|| "it is in effect, and not on disk yet: a restart may forget it".to_owned())
    }

    /// Takes what etcd says.
    fn set(&self, change: impl FnOnce(&mut KnownOverrides)) {
        self.known.send_modify(|known| {
            let mut next = KnownOverrides::clone(known);
            change(&mut next);
            next.serial += 1;
            *known = Arc::new(next);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{NodeId, Role};

    const DRAIN: OverrideChange = OverrideChange { drains: Some(true), weight: None };

    fn node(id: &str) -> NodeKey {
        (Role::Web, NodeId::try_from(id).unwrap())
    }

    #[tokio::test]
    async fn what_was_drained_is_drained_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal/overrides.json");
        let mut tasks = JoinSet::new();
        let store = OverrideStore::open(None, Some(path.clone())).await;
        store.start(&mut tasks);
        assert_eq!(store.change(&node("a"), DRAIN, 7).await.unwrap(), None);
        assert_eq!(store.change(&node("a"), DRAIN, 8).await.unwrap(), None, "nothing new is on disk, too");
        let again = OverrideStore::open(None, Some(path)).await;
        assert_eq!(again.known().overrides, store.known().overrides);
        assert!(again.known().is_complete);
    }

    #[tokio::test]
    async fn a_change_that_no_disk_keeps_is_in_effect_and_says_so() {
        let store = OverrideStore::open(None, None).await;
        let said = store.change(&node("a"), DRAIN, 7).await.unwrap().unwrap();
        assert!(said.contains("in memory"), "{said}");
        assert_eq!(store.known().overrides.of(&node("a")).drained_at_ms, Some(7));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let store = OverrideStore::open(None, Some(folder.path().join("file/overrides.json"))).await;
        let mut tasks = JoinSet::new();
        store.start(&mut tasks);
        let said = store.change(&node("a"), DRAIN, 7).await.unwrap().unwrap();
        assert!(said.contains("not on disk"), "{said}");
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("overrides.json");
        for text in ["", "{}", r#"{"format":2,"overrides":[]}"#] {
            std::fs::write(&path, text).unwrap();
            let store = OverrideStore::open(None, Some(path.clone())).await;
            assert_eq!(store.known().overrides, Overrides::default());
            assert!(!path.exists() && path.with_extension("json.unreadable").exists(), "{text}");
        }
    }

    #[tokio::test]
    async fn what_others_say_counts_as_news_once() {
        let (here, there) = (OverrideStore::open(None, None).await, OverrideStore::open(None, None).await);
        there.change(&node("a"), DRAIN, 7).await.unwrap();
        let mut news = here.watch();
        here.merge(there.known().overrides.to_named());
        assert!(news.has_changed().unwrap());
        news.mark_unchanged();
        here.merge(there.known().overrides.to_named());
        assert!(!news.has_changed().unwrap());
    }
}
