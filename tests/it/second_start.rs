//! A second clearcoat, started by mistake beside one that serves, takes no connection of its clients when it cannot start. Both
//! would listen at the edge by `SO_REUSEPORT`, and the kernel gives a share of all connections to each.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::clearcoat::{Clearcoat, run};
use crate::support::client::{Connection, get};
use crate::support::fleet::{Fleet, Plan};
use crate::support::reader::{Outage, Reader};
use crate::support::{eventually, hold};

/// How often each mistake is made.
const STARTS: usize = 25;

/// A mistake: what is changed in the configuration of the one that serves.
type Mistake = fn(&mut toml::Table, &Path);

fn section<'c>(config: &'c mut toml::Table, name: &str) -> &'c mut toml::Table {
    config.entry(name).or_insert_with(|| toml::Table::new().into()).as_table_mut().expect("a table")
}

fn other_journal(config: &mut toml::Table, folder: &Path) {
    section(config, "journal").insert("path".into(), folder.join("other").display().to_string().into());
}

/// The mistakes, and what the log says of each.
const MISTAKES: [(&str, Mistake, &str); 5] = [
    ("the same journal", |_, _| {}, "journal"),
    ("the ports of purge and admin listener", other_journal, "purge.listen"),
    (
        "the port of the admin listener",
        |config, folder| {
            other_journal(config, folder);
            section(config, "purge").insert("listen".into(), vec!["127.0.0.1:0"].into());
        },
        "admin.listen",
    ),
    (
        "no certificate",
        |config, folder| {
            other_journal(config, folder);
            let missing = folder.join("missing.pem").display().to_string();
            let table = format!("listen = [\"127.0.0.1:0\"]\ncert = {missing:?}\nkey = {missing:?}");
            section(config, "edge").insert("tls".into(), vec![table.parse::<toml::Table>().expect("TOML")].into());
        },
        "missing.pem",
    ),
    (
        "no token",
        |config, folder| {
            let missing = folder.join("missing-token").display().to_string();
            section(config, "purge").insert("token_file".into(), missing.into());
        },
        "missing-token",
    ),
];

/// The configuration of a running clearcoat, with the addresses that it listens at.
fn configuration_of(clearcoat: &Clearcoat) -> toml::Table {
    let mut config: toml::Table = clearcoat.config().parse().expect("TOML");
    let listeners = [
        ("edge", clearcoat.edge),
        ("origin", clearcoat.origin),
        ("purge", clearcoat.purge),
        ("admin", clearcoat.admin),
    ];
    for (name, address) in listeners {
        section(&mut config, name).insert("listen".into(), vec![address.to_string()].into());
    }
    config
}

/// The sockets that listen at this address of IPv4, of all processes, as the kernel lists them.
fn listeners_at(address: SocketAddr) -> usize {
    let SocketAddr::V4(address) = address else { panic!("an address of IPv4") };
    let local = format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port());
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's sockets");
    let listens = |row: &&str| {
        let columns: Vec<&str> = row.split_whitespace().collect();
        columns[1] == local && columns[3] == "0A"
    };
    table.lines().skip(1).filter(listens).count()
}

/// The most that listened at this address at any time, seen by looking all the time.
fn watch_listeners(address: SocketAddr, ended: &AtomicBool) -> usize {
    let mut most = 0;
    while !ended.load(Ordering::SeqCst) {
        most = most.max(listeners_at(address));
        std::thread::sleep(Duration::from_micros(500));
    }
    most
}

#[test]
fn a_second_process_that_cannot_start_takes_no_connection_of_the_first() {
    let fleet = Fleet::start(&Plan { varnish: 1, config: "[runtime]\nworkers = 2\n", ..Plan::default() });
    let mut kept = Connection::open(fleet.clearcoat.edge).expect("a connection");
    let readers: Vec<Reader> = (0..4).map(|_| Reader::start(fleet.clearcoat.edge, 20, Outage::None)).collect();
    eventually("readers read", || readers.iter().all(|reader| reader.reads() > 10).then_some(()));
    let folder = fleet.folder.path().join("second");
    std::fs::create_dir(&folder).expect("a folder");
    let (edge, ended) = (fleet.clearcoat.edge, Arc::new(AtomicBool::new(false)));
    assert_eq!(listeners_at(edge), 2, "one for each worker");
    let watcher = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || watch_listeners(edge, &ended)
    });
    for start in 0..STARTS {
        let (mistake, make, said) = MISTAKES[start % MISTAKES.len()];
        let mut config = configuration_of(&fleet.clearcoat);
        make(&mut config, &folder);
        let file = folder.join("second.toml");
        std::fs::write(&file, config.to_string()).expect("a file");
        let output = run(&["serve", "--config", file.to_str().expect("a path")]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(said), "{mistake}: {errors}");
        // Whether a port is free is found out before the edge listens, so nothing was said to.
        assert!(!errors.contains("\"message\":\"listening\""), "{mistake}: {errors}");
    }
    ended.store(true, Ordering::SeqCst);
    assert_eq!(watcher.join().expect("a thread"), 2, "somebody else has listened at the edge");
    readers.into_iter().for_each(Reader::stop);
    kept.send("GET /p/1 HTTP/1.1\r\nHost: shop.test\r\n\r\n").expect("it is open");
    assert_eq!(kept.answer(false).expect("an answer").status, 200);
}

#[test]
fn an_edge_that_another_program_has_is_an_error_that_names_it() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("clearcoat.toml");
    let free = "listen = [\"127.0.0.1:0\"]\n";
    let config = format!(
        "[edge]\nlisten = [\"{address}\"]\n[origin]\n{free}[purge]\n{free}[admin]\n{free}[journal]\npath = {:?}\n",
        folder.path().join("journal")
    );
    std::fs::write(&file, config).expect("a file");
    let output = run(&["serve", "--config", file.to_str().expect("a path")]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains(&format!("edge.listen: {address}")), "{errors}");
    // A port that is only reserved, as by the program that will be replaced, is no error.
    drop(taken);
    let _reserved = hold(address);
    let clearcoat = Clearcoat::start(folder.path(), &std::fs::read_to_string(&file).expect("our file"));
    assert_eq!(clearcoat.edge, address);
    clearcoat.opened();
    assert!(get(clearcoat.edge, "/").is_ok_and(|answer| answer.status == 503), "it has no nodes");
}
