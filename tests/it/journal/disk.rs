//! A disk that hangs or is full: purges are refused in time with the cause, traffic continues, and so does the journal.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::client::{get, purge, tag};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

/// A small file system of its own, mounted until this value is dropped.
struct Volume {
    at: PathBuf,
    _folder: tempfile::TempDir,
}

impl Volume {
    /// `None` if this machine does not allow it, with the reason printed.
    fn mount(kind: Kind) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let at = folder.path().join("volume");
        std::fs::create_dir(&at).expect("a folder");
        let mounted = match kind {
            Kind::Ext4 => {
                let image = folder.path().join("image");
                std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("a file");
                run("mkfs.ext4", &["-qF", &path(&image)])
                    .and_then(|()| run("mount", &["-o", "loop", &path(&image), &path(&at)]))
            }
            Kind::Small => run("mount", &["-t", "tmpfs", "-o", "size=3m", "tmpfs", &path(&at)]),
        };
        match mounted {
            Ok(()) => Some(Volume { at, _folder: folder }),
            Err(reason) => {
                eprintln!("not tried: {reason}");
                None
            }
        }
    }

    /// Blocks all writes until the returned value is dropped.
    fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", &["-f", &path(&self.at)]).expect("it can be frozen");
        Frozen(self)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Remaining processes that write to it end by themselves.
        eventually("the volume is let go", || run("umount", &[&path(&self.at)]).ok());
    }
}

struct Frozen<'v>(&'v Volume);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run("fsfreeze", &["-u", &path(&self.0.at)]).expect("it can be thawed");
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Ext4,
    /// A tmpfs of 3 MiB.
    Small,
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// A fleet whose journal is on this volume.
fn fleet_on(volume: &Volume, journal: &'static str) -> Fleet {
    let etcd = usize::from(journal == "etcd");
    let mut fleet = Fleet::start(&Plan { varnish: 2, web: 1, journal, etcd, ..Plan::default() });
    fleet.clearcoat.kill();
    let own = fleet.folder.path().join("journal").display().to_string();
    let text = fleet.clearcoat.config().replace(&own, &path(&volume.at.join("journal")));
    fleet.clearcoat.configure(&text);
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    fleet.clearcoat.current();
    fleet
}

fn readyz(fleet: &Fleet) -> (u16, String) {
    let answer = get(fleet.clearcoat.admin, "/readyz").expect("the admin listener answers");
    (answer.status, answer.text().to_owned())
}

#[test]
fn a_frozen_volume_refuses_purges_in_time_but_not_traffic_or_shutdown() {
    let Some(volume) = Volume::mount(Kind::Ext4) else { return };
    let mut fleet = fleet_on(&volume, "disk");
    fleet.warm("/p/1");
    assert_eq!(fleet.purge_tag("cat_p_9").status, 200);
    fleet.shop.set(1, 7);

    let frozen = volume.freeze();
    let began = Instant::now();
    let refused = fleet.purge_tag("cat_p_1");
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    assert!(refused.text().contains("could not be made durable"), "{}", refused.text());
    // Far more than `ack_timeout`, but too short to wait for the disk.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let (status, text) = readyz(&fleet);
    assert_eq!(status, 503);
    assert!(text.starts_with("journal: no answer from ") && text.contains("journal.redb for "), "{text}");
    assert_eq!(fleet.clearcoat.metric("clearcoat_journal_stalled"), 1.0);
    // Further purges do not wait.
    let began = Instant::now();
    for _ in 0..200 {
        assert_eq!(fleet.purge_tag("cat_p_2").status, 503);
    }
    assert!(began.elapsed() < Duration::from_secs(20), "200 refusals took {:?}", began.elapsed());
    assert_eq!(fleet.get("/p/1").status, 200);
    assert_eq!(fleet.clearcoat.log().count("the journal does not answer"), 1);

    // The hanging purge is carried out when the disk answers again, and everything else continues.
    drop(frozen);
    eventually("the journal answers", || (readyz(&fleet).0 == 200).then_some(()));
    eventually("the purge that hung is carried out", || (fleet.get("/p/1").text() == "7").then_some(()));
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
    assert_eq!(fleet.clearcoat.metric("clearcoat_journal_stalled"), 0.0);
    assert_eq!(fleet.clearcoat.log().count("the journal answers again"), 1);

    // Shutdown does not wait for it.
    let frozen = volume.freeze();
    assert_eq!(fleet.purge_tag("cat_p_3").status, 503);
    fleet.clearcoat.terminate();
    assert_eq!(fleet.clearcoat.wait().code(), Some(0));
    drop(frozen);
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    assert!(!fleet.clearcoat.log().has("begun") && !fleet.clearcoat.log().has("not the one"), "it is the same journal");
    assert_eq!(fleet.purge_tag("cat_p_1").status, 200);
}

#[test]
fn a_frozen_volume_that_is_killed_over_lets_the_next_one_in_when_it_thaws() {
    let Some(volume) = Volume::mount(Kind::Ext4) else { return };
    let mut fleet = fleet_on(&volume, "disk");
    let position = fleet.purge_tag("cat_p_9").json()["position"].clone();
    let frozen = volume.freeze();
    assert_eq!(fleet.purge_tag("cat_p_1").status, 503);
    fleet.clearcoat.kill();
    drop(frozen);
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    let next = fleet.purge_tag("cat_p_2").json()["position"].as_u64();
    assert!(next > position.as_u64(), "{next:?} after {position}");
}

#[test]
fn what_etcd_takes_needs_no_disk() {
    let Some(volume) = Volume::mount(Kind::Ext4) else { return };
    let mut fleet = fleet_on(&volume, "etcd");
    fleet.warm("/p/1");
    fleet.shop.set(1, 7);
    let frozen = volume.freeze();
    for _ in 0..5 {
        let answer = fleet.purge_tag("cat_p_1");
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.json()["fenced"], serde_json::json!([]));
    }
    assert_eq!(fleet.get("/p/1").text(), "7");
    eventually("it is said", || (fleet.clearcoat.metric("clearcoat_journal_stalled") == 1.0).then_some(()));
    assert_eq!(readyz(&fleet).0, 200, "it takes purges");
    drop(frozen);
    eventually("the disk answers", || (fleet.clearcoat.metric("clearcoat_journal_stalled") == 0.0).then_some(()));
    let head = fleet.purge_tag("cat_p_2").json()["position"].clone();
    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    fleet.clearcoat.ready();
    assert_eq!(fleet.clearcoat.fleet()["head"], head, "what the disk did not take is on it");
}

#[test]
fn a_full_disk_is_named_with_its_path_and_takes_purges_again_by_itself() {
    let Some(volume) = Volume::mount(Kind::Small) else { return };
    let mut fleet = fleet_on(&volume, "disk");
    let fill = volume.at.join("fill");
    // Returns when there is no room for another byte.
    _ = std::io::copy(&mut std::io::repeat(b'x'), &mut std::fs::File::create(&fill).expect("a file"));
    // The file's own free room is used first.
    eventually("it takes no more", || {
        let tags: Vec<String> = (0..150).map(|tag| crate::support::client::tag(&format!("aaaa_{tag}"))).collect();
        (purge(fleet.clearcoat.purge, &tags.join("|")).expect("an answer").status == 503).then_some(())
    });
    assert_eq!(purge(fleet.clearcoat.purge, &tag("cat_p_1")).map(|answer| answer.status).ok(), Some(503));
    let log = fleet.clearcoat.log().text();
    let cause = format!("{} cannot be written", path(&volume.at.join("journal/journal.redb")));
    assert!(log.contains(&cause) && log.contains("No space left on device (os error 28)"), "{log}");
    let (status, text) = readyz(&fleet);
    assert!(status == 503 && text.contains("No space left on device"), "{status} {text}");
    // A restart does not need room.
    fleet.clearcoat.kill();
    fleet.clearcoat.restart();
    eventually("the edge is open", || {
        get(fleet.clearcoat.edge, "/p/1").is_ok_and(|answer| answer.status == 200).then_some(())
    });
    std::fs::remove_file(fill).expect("our file");
    eventually("the journal takes purges", || (fleet.purge_tag("cat_p_1").status == 200).then_some(()));
    eventually("and says so", || (readyz(&fleet).0 == 200).then_some(()));
}
