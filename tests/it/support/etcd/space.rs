//! An etcd without free space.

use etcd_client::{AlarmAction, AlarmOptions, AlarmType};

use super::super::eventually;
use super::Etcd;

/// The prefix of the keys that fill it.
const FILLER: &str = "/filler/";

/// The most that a member without filler takes, in bytes: a quarter of the smallest limit of any test.
const LITTLE: i64 = 1 << 20;

impl Etcd {
    /// The same as [`Etcd::cluster`], with a storage limit per member.
    pub fn cluster_with_quota(members: usize, bytes: u64) -> Self {
        Etcd::launch(members, "http", Some(bytes), |_, _| None)
    }

    /// Writes until it refuses writes.
    pub fn fill(&self) {
        let piece = "x".repeat(100_000);
        let leader = self.leader();
        let put = async |number: i32| {
            let mut client = self.client(leader).await?;
            client.put(format!("{FILLER}{number}"), piece.as_str(), None).await
        };
        let full = self.runtime.block_on(async {
            for number in 0..1_000 {
                if let Err(error) = put(number).await {
                    return error.to_string();
                }
            }
            "it takes everything".to_owned()
        });
        assert!(full.contains("space exceeded"), "{full}");
    }

    /// The operator's repair: frees space, and disarms the alarm.
    pub fn free(&self) {
        self.delete_prefix(FILLER);
        self.compact(self.revision());
        for member in 0..self.members.len() {
            // The others carry out a compaction after the one that was asked, and until then nothing of it is free.
            eventually("a member has room", || {
                let size = self.ask(super::PATIENCE, member, async |mut client| {
                    client.defragment().await?;
                    Ok(client.status().await?.db_size())
                });
                let size = size.unwrap_or_else(|error| panic!("{}: {error}", self.members[member].name));
                (size < LITTLE).then_some(())
            });
        }
        self.call("say that there is room", async |mut client| {
            let alarms = client.alarm(AlarmAction::Get, AlarmType::Nospace, None).await?;
            for alarm in alarms.alarms() {
                let mut of_member = AlarmOptions::new();
                of_member.with_member(alarm.member_id());
                client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(of_member)).await?;
            }
            Ok(())
        });
    }
}
