use std::fs;
use std::io::Read;
use std::os::fd::AsFd;

use rustix::time::{ClockId, clock_gettime};

use super::*;
use crate::telemetry::access::line::RequestLine;

fn options(file: PathBuf) -> AccessOptions {
    AccessOptions { format: LineFormat::Json, file: Some(file), sample: 1.0, redaction: Redaction::new(["token"]) }
}

fn line<'a>(target: &'a [u8], host: &'a [u8]) -> AccessLine<'a> {
    AccessLine {
        listener: "edge",
        client: "192.0.2.7",
        request: Some(RequestLine { method: b"GET", target, host: Some(host), protocol: "HTTP/1.1" }),
        status: 200,
        bytes_down: 1234,
        head_down: 234,
        bytes_up: 56,
        node: Some("varnish-1"),
        tries: 1,
        cache: Some("hit"),
        queue: Some(Duration::ZERO),
        connect: None,
        first_byte: Some(Duration::from_nanos(1_042_999)),
        total: Duration::from_millis(2003),
        termination: *b"--",
        reason: None,
        request_id: b"abc",
    }
}

fn written(format: LineFormat, line: &AccessLine<'_>) -> String {
    let mut out = Vec::new();
    // 2026-11-27T16:57:34.500Z
    let now = std::time::UNIX_EPOCH + Duration::from_millis(1_795_798_654_500);
    LineWriter::new(format).write(&mut out, line, now, &Redaction::new(["token"]));
    String::from_utf8(out).unwrap()
}

#[test]
fn a_line_of_json_says_when_a_request_began_and_all_that_is_known_of_it() {
    let text = written(LineFormat::Json, &line(b"/p?token=s&a=1", b"shop.test"));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected = serde_json::json!({
        "time": "2026-11-27T16:57:32.497Z", "listener": "edge", "client": "192.0.2.7", "method": "GET",
        "host": "shop.test", "target": "/p?token=***&a=1", "protocol": "HTTP/1.1", "status": 200,
        "bytes_down": 1234, "bytes_up": 56, "node": "varnish-1", "tries": 1, "cache": "hit",
        "queue_ms": 0.0, "connect_ms": null, "first_byte_ms": 1.042, "total_ms": 2003.0,
        "termination": "--", "reason": null, "request_id": "abc",
    });
    assert_eq!(json, expected);
    assert!(text.contains("\"queue_ms\":0.000,") && text.ends_with("}\n"), "{text}");
}

#[test]
fn the_common_format_is_that_of_ncsa_httpd() {
    let common = written(LineFormat::Common, &line(b"/p?token=s", b"shop.test"));
    assert_eq!(common, "192.0.2.7 - - [27/Nov/2026:16:57:32 +0000] \"GET /p?token=*** HTTP/1.1\" 200 1000\n");
    let unread = AccessLine { request: None, status: 400, bytes_down: 0, ..line(b"", b"") };
    let common = written(LineFormat::Common, &unread);
    assert_eq!(common, "192.0.2.7 - - [27/Nov/2026:16:57:32 +0000] \"-\" 400 -\n");
}

#[test]
fn no_byte_of_a_stranger_ends_a_line_or_a_text() {
    let hostile: Vec<u8> = (0..=255).collect();
    let hostile = AccessLine { request_id: &hostile, ..line(&hostile, &hostile[1..]) };
    let text = written(LineFormat::Json, &hostile);
    assert!(text.is_ascii() && text.lines().count() == 1, "{text}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected: String = (0..=255_u8).map(char::from).collect();
    assert_eq!([&json["target"], &json["host"], &json["request_id"]], [&expected, &expected[1..], &expected]);
    let text = written(LineFormat::Common, &hostile);
    assert!(text.is_ascii() && text.lines().count() == 1 && text.matches('"').count() == 2, "{text}");
}

#[test]
fn what_a_client_makes_long_is_cut_so_that_collectors_take_the_line() {
    let long = [b"/\\".repeat(20_000).as_slice(), b"?token=secret"].concat();
    for format in [LineFormat::Json, LineFormat::Common] {
        let mut line = line(&long, &long);
        line.request.as_mut().unwrap().method = &long;
        let text = written(format, &line);
        assert!(text.len() < 16 * 1024 && !text.contains("secret"), "{} bytes", text.len());
        assert_eq!(text.matches("...").count(), if format == LineFormat::Json { 3 } else { 2 }, "{text}");
    }
    let whole = AccessLine {
        request: Some(RequestLine {
            method: &[b'M'; 32],
            target: b"/p",
            host: Some(&[b'h'; 255]),
            protocol: "HTTP/1.1",
        }),
        ..line(b"", b"")
    };
    assert!(!written(LineFormat::Json, &whole).contains("..."));
}

#[test]
fn the_id_alone_decides_whether_a_request_is_sampled() {
    let log = |sample| {
        let folder = tempfile::tempdir().unwrap();
        let options = AccessOptions { sample, ..options(folder.path().join("access.log")) };
        AccessLog::start(options, IntCounter::new("dropped", "d").unwrap()).unwrap().0
    };
    let ids: Vec<String> = (0..10_000).map(|number| format!("{number:032x}")).collect();
    let count = |log: &AccessLog| ids.iter().filter(|id| log.is_sampled(id.as_bytes())).count();
    assert_eq!((count(&log(0.0)), count(&log(1.0))), (0, 10_000));
    let tenth = log(0.1);
    assert!((900..1100).contains(&count(&tenth)), "{}", count(&tenth));
    assert_eq!(count(&tenth), count(&log(0.1)));
}

/// Nobody reads the pipe until the end, as with a collector that hangs.
#[test]
fn lines_into_a_full_pipe_are_dropped_and_counted_and_nobody_waits() {
    const LINES: u64 = 200_000;
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    // Opened for both, so that the other end can be opened, and stays open.
    let mut reader = fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let dropped = IntCounter::new("dropped", "d").unwrap();
    let (log, thread) = AccessLog::start(options(pipe), dropped.clone()).unwrap();
    let buffer = AccessBuffer::new(Arc::clone(&log));
    // Time on the CPU: whatever else runs here does not count.
    let worked = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
    let began = worked();
    for _ in 0..LINES {
        buffer.write(&line(b"/p", b"shop.test"));
    }
    let took = worked() - began;
    drop((buffer, log));
    assert!(took < Duration::from_secs(2), "{LINES} lines took {took:?}: less than 100,000 a second");
    assert!(dropped.get() > 0, "more lines than a pipe and the queue hold");
    assert!(!thread.wait(Duration::ZERO), "the thread still waits for the pipe");

    // From here on it is read: what was not dropped arrives whole.
    rustix::io::ioctl_fionbio(reader.as_fd(), true).unwrap();
    let mut text = Vec::new();
    loop {
        let ended = thread.wait(Duration::from_millis(1));
        let mut piece = [0; 64 * 1024];
        while let Ok(read) = reader.read(&mut piece) {
            text.extend_from_slice(&piece[..read]);
        }
        if ended {
            break;
        }
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.lines().all(|line| line.starts_with('{') && line.ends_with('}')));
    assert_eq!(text.lines().count() as u64 + dropped.get(), LINES);
}

#[test]
fn a_file_that_cannot_be_opened_costs_lines_until_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("later/access.log");
    let dropped = IntCounter::new("dropped", "d").unwrap();
    let mut sink = Sink::new(Some(file.clone()), dropped.clone()).unwrap();
    sink.write(b"lost\n", 1);
    assert_eq!(dropped.get(), 1);
    fs::create_dir(folder.path().join("later")).unwrap();
    sink.open_again();
    sink.write(b"written\n", 1);
    assert_eq!((fs::read_to_string(&file).unwrap().as_str(), dropped.get()), ("written\n", 1));
}

#[test]
fn a_file_that_was_moved_away_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (file, old) = (folder.path().join("access.log"), folder.path().join("access.log.1"));
    let mut sink = Sink::new(Some(file.clone()), IntCounter::new("dropped", "d").unwrap()).unwrap();
    sink.write(b"one\n", 1);
    fs::rename(&file, &old).unwrap();
    sink.write(b"two\n", 1);
    sink.open_again();
    sink.write(b"three\n", 1);
    let texts = [old, file].map(|file| fs::read_to_string(file).unwrap());
    assert_eq!(texts, ["one\ntwo\n", "three\n"]);
}

#[test]
fn a_disk_that_is_full_costs_the_lines_of_that_time() {
    let dropped = IntCounter::new("dropped", "d").unwrap();
    let mut sink = Sink::new(Some("/dev/full".into()), dropped.clone()).unwrap();
    sink.write(b"one\ntwo\n", 2);
    sink.write(b"three\n", 1);
    assert_eq!(dropped.get(), 3);
}
