//! Requests of the corpus: refused before a byte is forwarded, or forwarded in exactly one form.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use super::case::Case;
use super::{Failures, Message, Writes, all_bytes, connect, half_close, is_served, messages, shown};
use crate::data_path::rig::Rig;
use crate::support::client::Ending;
use crate::support::eventually;
use crate::support::upstream::{Then, Upstream, has_seen_all_ends};

/// The required fate of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// An answer with this status, or any refusal, and the end of the connection. Nothing is forwarded.
    Refused(Option<u16>),
    /// The same, but the fault is in the body: if the body arrives after its head, the head and the body's start may be
    /// forwarded.
    RefusedInBody(Option<u16>),
    /// It is forwarded as in the file.
    Passes,
    /// The first requests are forwarded as in the file, the rest is refused.
    PassesThenRefused(Option<u16>),
    /// The client closes mid-request. The node never sees a complete request.
    Cut,
}

impl Verdict {
    pub(super) fn of(case: &Case) -> Result<Verdict, String> {
        let refusal = |text: &str| match text.strip_prefix("refused")?.split_once(' ') {
            None => (text == "refused").then_some(None),
            Some(("", status)) => status.parse().ok().filter(|status| is_refusal(*status)).map(Some),
            Some(_) => None,
        };
        let text = case.verdict();
        let verdict = if let Some(text) = text.strip_suffix(" in the body") {
            refusal(text).map(Verdict::RefusedInBody)
        } else if let Some(text) = text.strip_prefix("passes, then ") {
            refusal(text).map(Verdict::PassesThenRefused)
        } else {
            match text {
                "passes" => Some(Verdict::Passes),
                "cut" => Some(Verdict::Cut),
                text => refusal(text).map(Verdict::Refused),
            }
        };
        let verdict = verdict.ok_or_else(|| format!("{}: an unknown verdict: {text}", case.name))?;
        case.has_only(&[], &["sent", "node sees"])?;
        case.section("sent")?;
        let passes = matches!(verdict, Verdict::Passes | Verdict::PassesThenRefused(_));
        if passes == case.sections("node sees").is_empty() {
            return Err(format!("{}: `node sees` belongs to a case that passes, and only there", case.name));
        }
        Ok(verdict)
    }

    /// Whether a second request, which must not be answered, is sent after the case.
    fn is_followed(self) -> bool {
        !matches!(self, Verdict::Passes | Verdict::Cut)
    }
}

/// Statuses of a client error or an unsupported version.
fn is_refusal(status: u16) -> bool {
    (400..=499).contains(&status) || status == 505
}

/// A request as received by a node.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Arrived {
    /// The head with its blank line, then the body without its framing.
    bytes: Vec<u8>,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Arriving,
    Whole,
    Cut,
}

type Log = Arc<Mutex<Vec<Arrived>>>;

/// A node that records everything, and answers complete requests with their path.
fn recorder(log: &Log) -> Upstream {
    let log = Arc::clone(log);
    Upstream::start(move |call| {
        // The fake stores a head as characters, one for each byte.
        let mut bytes: Vec<u8> = call.seen.head.chars().map(|c| u8::try_from(c).expect("a byte")).collect();
        let path = call.path().to_owned();
        let number = {
            let mut log = log.lock().unwrap();
            log.push(Arrived { bytes: bytes.clone(), progress: Progress::Arriving });
            log.len() - 1
        };
        let whole = call.each_piece(|piece| bytes.extend_from_slice(piece)).is_ok();
        let progress = if whole { Progress::Whole } else { Progress::Cut };
        log.lock().unwrap()[number] = Arrived { bytes, progress };
        match (whole, call.is("HEAD")) {
            (false, _) => Then::Close,
            (true, true) => call.send_then("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", Then::KeepAlive),
            (true, false) => call.answer(&path),
        }
    })
}

/// The request after a hostile one. Its answer would end the connection, so that the test need not wait.
const SMUGGLED: &[u8] = b"GET /smuggled HTTP/1.1\r\nHost: shop.test\r\nConnection: close\r\n\r\n";

/// One listener and the node behind it.
struct Side {
    address: SocketAddr,
    node: SocketAddr,
    log: Log,
}

/// Runs these cases at both listeners. Returns what all nodes received.
fn run(cases: &[(Case, Verdict, Writes)]) -> Vec<(Vec<String>, u64)> {
    let logs = [Log::default(), Log::default()];
    let nodes = [recorder(&logs[0]), recorder(&logs[1])];
    let addresses = nodes.each_ref().map(|node| node.address);
    let [varnish, web] = nodes;
    let mut rig = Rig::start("", vec![varnish], vec![web]);
    let mut failures = Failures::default();
    let sides = [("edge", rig.clearcoat.edge), ("origin", rig.clearcoat.origin)];
    for (((name, address), node), log) in sides.into_iter().zip(addresses).zip(logs) {
        let side = Side { address, node, log };
        for (case, verdict, writes) in cases {
            failures.note(case, name, *writes, side.judge(case, *verdict, *writes));
        }
    }
    failures.assert_none();
    all_bytes(&mut rig)
}

impl Side {
    fn judge(&self, case: &Case, verdict: Verdict, writes: Writes) -> Result<(), String> {
        let before = self.log.lock().unwrap().len();
        let seen = case.sections("node sees");
        let to_head: Vec<bool> = seen.iter().map(|bytes| bytes.starts_with(b"HEAD ")).collect();
        let (bytes, ending) = self.exchange(case.section("sent")?, verdict, writes)?;
        // A request cut after its head has been sent to the node, which may not have read it yet.
        let has_head = case.section("sent")?.windows(4).any(|window| window == b"\r\n\r\n");
        let expected = if verdict == Verdict::Cut && has_head { before + 1 } else { before };
        eventually("no request is on its way to the node", || {
            let log = self.log.lock().unwrap();
            // Clearcoat closes abandoned connections before it answers, but the node may not have noticed yet.
            let came = log.len() >= expected && has_seen_all_ends(self.node);
            (came && log.iter().all(|arrived| arrived.progress != Progress::Arriving)).then_some(())
        });
        let arrived = self.log.lock().unwrap()[before..].to_vec();
        let got = || format!("the client got {}, {ending:?}", shown(&bytes));
        match verdict {
            Verdict::Cut => {
                never_ends(&arrived)?;
                let answers = messages(&bytes, &ending, &[]);
                let served = answers.iter().flatten().any(|answer| !is_refusal(answer.status));
                if served || ending == Ending::Open {
                    return Err(got());
                }
            }
            Verdict::Refused(status) => {
                arrives_as(&arrived, &[])?;
                refuses(messages(&bytes, &ending, &[]), 0, status, &ending).ok_or_else(got)?;
            }
            Verdict::RefusedInBody(status) => {
                let together = writes == Writes::AtOnce && fits_one_read(case);
                if together {
                    arrives_as(&arrived, &[])?;
                } else {
                    never_ends(&arrived)?;
                }
                refuses(messages(&bytes, &ending, &[]), 0, status, &ending).ok_or_else(got)?;
            }
            Verdict::Passes => {
                arrives_as(&arrived, &seen)?;
                let answers = messages(&bytes, &ending, &to_head).map_err(|error| format!("{error}; {}", got()))?;
                let ends_well =
                    ending == Ending::Clean || (ending == Ending::Reset && says_close(case.section("sent")?));
                if answers.len() != seen.len() || !answers_to(&seen, &answers) || !ends_well {
                    return Err(got());
                }
            }
            Verdict::PassesThenRefused(status) => {
                arrives_as(&arrived, &seen)?;
                let answers = messages(&bytes, &ending, &to_head);
                let served = answers.as_ref().is_ok_and(|answers| answers_to(&seen, answers));
                refuses(answers, seen.len(), status, &ending).filter(|()| served).ok_or_else(got)?;
            }
        }
        is_served(self.address, &format!("/next/{}", case.name))
    }

    /// Sends a case, and reads to the end of the connection. After a refusal clearcoat must close the connection
    /// itself; in other cases the client half-closes.
    fn exchange(&self, sent: &[u8], verdict: Verdict, writes: Writes) -> Result<(Vec<u8>, Ending), String> {
        let mut client = connect(self.address)?;
        let mut bytes = sent.to_vec();
        if verdict.is_followed() {
            bytes.extend(SMUGGLED);
        }
        let sending = writes.each(&bytes, |piece| client.send(piece));
        // Who goes on behind "close" may be cut off once the answer is out, as late as the rest comes.
        let is_cut_off = sending.as_ref().is_err_and(is_closed) && says_close(sent);
        if !is_cut_off {
            sending.map_err(|error| format!("clearcoat does not read to the end: {error}"))?;
        }
        if !verdict.is_followed() && !is_cut_off {
            half_close(&client)?;
        }
        Ok(client.rest())
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Whether a request of these ends its connection.
fn says_close(sent: &[u8]) -> bool {
    let line = b"\r\nConnection: close\r\n";
    sent.windows(line.len()).any(|window| window == line)
}

/// Whether clearcoat certainly reads head and body together if they are written at once: it reads 16 KiB.
fn fits_one_read(case: &Case) -> bool {
    case.section("sent").is_ok_and(|bytes| bytes.len() < 15 * 1024)
}

/// Checks that the node got exactly these requests.
fn arrives_as(arrived: &[Arrived], expected: &[&[u8]]) -> Result<(), String> {
    let same = |(arrived, expected): (&Arrived, &&[u8])| {
        arrived.progress == Progress::Whole && arrived.bytes.as_slice() == *expected
    };
    if arrived.len() == expected.len() && arrived.iter().zip(expected).all(same) {
        return Ok(());
    }
    let got: Vec<_> =
        arrived.iter().map(|arrived| format!("{:?} {}", arrived.progress, shown(&arrived.bytes))).collect();
    Err(format!("the node got {got:?}"))
}

/// Checks that the node got at most the beginning of one request.
fn never_ends(arrived: &[Arrived]) -> Result<(), String> {
    match arrived {
        [] | [Arrived { progress: Progress::Cut, .. }] => Ok(()),
        _ => arrives_as(arrived, &[]),
    }
}

/// Checks that each request got its own answer.
fn answers_to(requests: &[&[u8]], answers: &[Message]) -> bool {
    requests.iter().zip(answers).all(|(request, answer)| {
        let path = request.split(|&byte| byte == b' ').nth(1);
        answer.status == 200 && (Some(answer.body.as_slice()) == path || request.starts_with(b"HEAD "))
    })
}

/// Checks that the answers to `served` requests are followed by one refusal and a clean end.
fn refuses(answers: Result<Vec<Message>, String>, served: usize, status: Option<u16>, ending: &Ending) -> Option<()> {
    let answers = answers.ok().filter(|answers| answers.len() == served + 1)?;
    let refusal = answers.last()?;
    let right = status.map_or(is_refusal(refusal.status), |status| status == refusal.status);
    let closes = refusal.field("Connection").as_deref() == Some("close") && *ending == Ending::Clean;
    (right && closes && !refusal.body.is_empty()).then_some(())
}

/// The cases of the corpus selected by `choose`, in the selected ways of writing.
fn chosen(choose: impl Fn(&Case, Verdict, Writes) -> bool) -> Vec<(Case, Verdict, Writes)> {
    let mut chosen = Vec::new();
    for case in Case::read_all("requests") {
        let verdict = Verdict::of(&case).unwrap_or_else(|error| panic!("{error}"));
        let ways = Writes::ALL.into_iter().filter(|writes| choose(&case, verdict, *writes));
        chosen.extend(ways.map(|writes| (case.clone(), verdict, writes)));
    }
    chosen
}

/// The number of distinct cases.
fn count(cases: &[(Case, Verdict, Writes)]) -> usize {
    cases.iter().filter(|(.., writes)| *writes == Writes::AtOnce).count()
}

#[test]
fn no_hostile_request_passes_and_not_a_byte_of_it_goes_on() {
    let cases = chosen(|case, verdict, writes| match verdict {
        Verdict::Refused(_) => true,
        Verdict::RefusedInBody(_) => writes == Writes::AtOnce && fits_one_read(case),
        _ => false,
    });
    assert!(count(&cases) >= 60, "only {} cases", count(&cases));
    for (calls, bytes) in run(&cases) {
        let (next, smuggled): (Vec<_>, Vec<_>) = calls.iter().partition(|head| head.starts_with("GET /next/"));
        assert_eq!((next.len(), smuggled), (cases.len(), Vec::new()));
        assert_eq!(bytes, calls.iter().map(String::len).sum::<usize>() as u64, "bytes went on that are no request");
    }
}

#[test]
fn a_body_that_turns_out_hostile_or_cut_never_comes_to_an_end() {
    let cases = chosen(|case, verdict, writes| match verdict {
        Verdict::Cut => true,
        Verdict::RefusedInBody(_) => writes == Writes::ByteByByte || !fits_one_read(case),
        _ => false,
    });
    assert!(cases.len() >= 20, "only {} cases", cases.len());
    for (calls, _) in run(&cases) {
        let next = calls.iter().filter(|head| head.starts_with("GET /next/")).count();
        let smuggled: Vec<_> = calls.iter().filter(|head| head.starts_with("GET /smuggled")).collect();
        assert_eq!((next, smuggled), (cases.len(), Vec::<&String>::new()));
    }
}

#[test]
fn what_is_right_and_only_looks_odd_passes_in_one_form() {
    let cases = chosen(|_, verdict, _| matches!(verdict, Verdict::Passes | Verdict::PassesThenRefused(_)));
    assert!(count(&cases) >= 20, "only {} cases", count(&cases));
    for (calls, _) in run(&cases) {
        let expected: usize = cases.iter().map(|(case, ..)| case.sections("node sees").len() + 1).sum();
        assert_eq!(calls.len(), expected, "requests went on that no case expects");
    }
}
