//! The data of an etcd. All reads are linearizable.

use std::collections::BTreeMap;

use etcd_client::{CompactionOptions, DeleteOptions, GetOptions, GetResponse, KeyValue, PutOptions, Txn, TxnOp};

use super::{Etcd, NOWHERE};

/// How many keys [`Etcd::put_many`] puts at once. etcd allows at most 128.
const AT_ONCE: usize = 100;

impl Etcd {
    /// Puts a key, and returns its new revision.
    pub fn put(&self, key: &str, value: &str) -> i64 {
        self.put_with(key, value, PutOptions::new())
    }

    /// Puts a key that is deleted with its lease.
    pub fn put_with_lease(&self, key: &str, value: &str, lease: i64) -> i64 {
        self.put_with(key, value, PutOptions::new().with_lease(lease))
    }

    fn put_with(&self, key: &str, value: &str, options: PutOptions) -> i64 {
        let answer = self.call(&format!("put {key}"), async |mut client| client.put(key, value, Some(options)).await);
        answer.header().expect("a header").revision()
    }

    /// Puts many keys fast, a hundred per transaction (which has one revision), and returns the last revision.
    pub fn put_many<K: Into<String>, V: Into<String>>(&self, entries: impl IntoIterator<Item = (K, V)>) -> i64 {
        let mut puts = entries.into_iter().map(|(key, value)| TxnOp::put(key.into(), value.into(), None)).peekable();
        self.call("put many keys", async |mut client| {
            let mut revision = 0;
            while puts.peek().is_some() {
                let some: Vec<TxnOp> = puts.by_ref().take(AT_ONCE).collect();
                revision = client.txn(Txn::new().and_then(some)).await?.header().expect("a header").revision();
            }
            Ok(revision)
        })
    }

    pub fn get(&self, key: &str) -> Option<String> {
        self.entry(key).map(|entry| entry.value_str().expect("text").to_owned())
    }

    /// All keys with this prefix, and their values.
    pub fn list(&self, prefix: &str) -> BTreeMap<String, String> {
        let text = |text: Result<&str, _>| text.expect("text").to_owned();
        self.entries(prefix).iter().map(|entry| (text(entry.key_str()), text(entry.value_str()))).collect()
    }

    /// A key with its revisions and its lease.
    pub fn entry(&self, key: &str) -> Option<KeyValue> {
        self.range(key, GetOptions::new()).take_kvs().pop()
    }

    /// All keys with this prefix, with their revisions and leases.
    pub fn entries(&self, prefix: &str) -> Vec<KeyValue> {
        self.range(prefix, GetOptions::new().with_prefix()).take_kvs()
    }

    fn range(&self, key: &str, options: GetOptions) -> GetResponse {
        self.call(&format!("get {key}"), async |client| {
            client.kv_client().max_decoding_message_size(usize::MAX).get(key, Some(options)).await
        })
    }

    /// Deletes a key; returns whether it existed.
    pub fn delete(&self, key: &str) -> bool {
        self.delete_with(key, DeleteOptions::new()) == 1
    }

    /// Deletes all keys with this prefix; returns their number.
    pub fn delete_prefix(&self, prefix: &str) -> i64 {
        self.delete_with(prefix, DeleteOptions::new().with_prefix())
    }

    fn delete_with(&self, key: &str, options: DeleteOptions) -> i64 {
        self.call(&format!("delete {key}"), async |mut client| client.delete(key, Some(options)).await).deleted()
    }

    /// Grants a lease of this many seconds that is not kept alive.
    pub fn grant(&self, seconds: i64) -> i64 {
        self.call("grant a lease", async |mut client| client.lease_grant(seconds, None).await).id()
    }

    /// Ends a lease, and all keys with it.
    pub fn revoke(&self, lease: i64) {
        self.call("revoke a lease", async |mut client| client.lease_revoke(lease).await);
    }

    /// The remaining seconds of a lease, unless it is gone.
    pub fn lease_ttl(&self, lease: i64) -> Option<i64> {
        let answer = self.call("tell of a lease", async |mut client| client.lease_time_to_live(lease, None).await);
        // 0 is a lease whose end is not yet committed.
        (answer.ttl() >= 0).then_some(answer.ttl())
    }

    /// The last revision.
    pub fn revision(&self) -> i64 {
        self.range(NOWHERE, GetOptions::new()).header().expect("a header").revision()
    }

    /// The identity of the cluster.
    pub fn cluster_id(&self) -> u64 {
        self.range(NOWHERE, GetOptions::new()).header().expect("a header").cluster_id()
    }

    /// Compacts all revisions before this one, and waits until that is done.
    pub fn compact(&self, revision: i64) {
        let options = CompactionOptions::new().with_physical();
        self.call("compact", async |mut client| client.compact(revision, Some(options)).await);
    }
}
