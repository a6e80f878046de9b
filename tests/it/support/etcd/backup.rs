//! Backup and restore of an etcd.

use std::io::Write;
use std::process::{Command, Stdio};

use super::Etcd;

/// A backup of an etcd.
pub struct Snapshot {
    file: tempfile::NamedTempFile,
    /// Passwords are part of it.
    root: Option<String>,
}

/// The id of a restored cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterId {
    /// As before: only the revision shows that it went back.
    Kept,
    /// A new one, as in the manual of etcd.
    New,
}

impl Etcd {
    /// The output of `etcdctl snapshot save`.
    pub fn snapshot(&self) -> Snapshot {
        let mut file = tempfile::NamedTempFile::new_in(self.folder.path()).expect("a file in our folder");
        self.call("give a snapshot", async |mut client| {
            let mut pieces = client.snapshot().await?;
            while let Some(piece) = pieces.message().await? {
                file.write_all(piece.blob())?;
            }
            Ok(())
        });
        Snapshot { file, root: self.root.clone() }
    }

    /// Kills all members, restores their data with the same addresses, and waits until they serve.
    pub fn restore(&mut self, snapshot: &Snapshot, id: ClusterId) {
        self.kill_all();
        if id == ClusterId::New {
            self.cluster.token.push('\'');
        }
        let restore = |member: &super::Member| {
            std::fs::remove_dir_all(&member.data).expect("our folder");
            let mut command = Command::new("etcdctl");
            command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("ETCDCTL_API", "3");
            command.args(["snapshot", "restore"]).arg(snapshot.file.path());
            command.args(["--name", &member.name]).arg("--data-dir").arg(&member.data);
            command.args(["--initial-advertise-peer-urls", &member.peer_url]);
            command.args(["--initial-cluster", &self.cluster.members]);
            command.args(["--initial-cluster-token", &self.cluster.token]);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().expect("etcdctl is installed (make test installs it)")
        };
        // Concurrently: each writes as much as etcd itself does at its start.
        let restores: Vec<_> = self.members.iter().map(restore).collect();
        for restore in restores {
            let output = restore.wait_with_output().expect("our child");
            assert!(output.status.success(), "etcdctl snapshot restore: {output:?}");
        }
        self.root.clone_from(&snapshot.root);
        self.restart_all();
        self.healthy();
    }
}
