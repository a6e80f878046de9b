//! Answers of the corpus: an invalid answer never reaches a client looking complete, and its connection is not reused.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use super::case::Case;
use super::{Failures, Writes, connect, half_close, is_served, messages, shown};
use crate::data_path::rig::Rig;
use crate::support::client::Ending;
use crate::support::upstream::{Call, Gate, Then, Upstream};

/// The required fate of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The client gets a 502.
    BadGateway,
    /// The client gets a 502, or a reset before the answer looks complete.
    Cut,
    /// The client gets the expected answer, and the connection to the node is reused.
    Passes,
    /// The client gets the expected answer, and the connection to the node is not reused.
    PassesOnce,
}

impl Verdict {
    pub(super) fn of(case: &Case) -> Result<Verdict, String> {
        let (verdict, passes) = match case.verdict() {
            "502" => (Verdict::BadGateway, false),
            "cut" => (Verdict::Cut, false),
            "passes" => (Verdict::Passes, true),
            "passes, connection dropped" => (Verdict::PassesOnce, true),
            other => return Err(format!("{}: an unknown verdict: {other}", case.name)),
        };
        case.has_only(&["request", "then"], &["node sends", "node sends later", "client sees"])?;
        case.section("node sends")?;
        Script::of(case, Writes::AtOnce)?;
        if passes == case.sections("client sees").is_empty() {
            return Err(format!("{}: `client sees` belongs to a case that passes, and only there", case.name));
        }
        Ok(verdict)
    }
}

/// The node's behaviour for the request of a case.
#[derive(Clone)]
struct Script {
    bytes: Vec<u8>,
    /// Bytes to send once the client has its answer.
    later: Vec<u8>,
    writes: Writes,
    then: Then,
    /// The client has its answer.
    answered: Gate,
    /// Everything was sent.
    sent: Gate,
}

impl Script {
    fn of(case: &Case, writes: Writes) -> Result<Script, String> {
        let then = match case.key("then") {
            None | Some("keep") => Then::KeepAlive,
            Some("close") => Then::Close,
            Some("reset") => Then::Reset,
            Some(other) => return Err(format!("{}: `then` is keep, close or reset and not {other}", case.name)),
        };
        let later = case.sections("node sends later").concat();
        let bytes = case.section("node sends")?.to_vec();
        Ok(Script { bytes, later, writes, then, answered: Gate::default(), sent: Gate::default() })
    }

    fn play(&self, call: &mut Call<'_>) -> Then {
        let begun = self.writes.each(&self.bytes, |piece| call.send(piece)).is_ok();
        // A node whose connection was closed meanwhile cannot send the rest.
        let goes_on = begun && (self.later.is_empty() || call.wait(&self.answered));
        let ended = goes_on && self.writes.each(&self.later, |piece| call.send(piece)).is_ok();
        self.sent.open();
        if ended { self.then } else { Then::Close }
    }
}

/// The scripts of the running cases, by path.
type Scripts = Arc<Mutex<HashMap<String, Script>>>;

/// A node that follows the script for a path, and answers any other path with the path itself.
fn node(scripts: &Scripts) -> Upstream {
    let scripts = Arc::clone(scripts);
    Upstream::start(move |call| {
        let path = call.path().to_owned();
        let script = scripts.lock().unwrap().get(&path).cloned();
        match script {
            Some(script) => script.play(call),
            None => call.answer(&path),
        }
    })
}

/// One listener and the node behind it.
struct Side<'r> {
    address: SocketAddr,
    node: &'r Upstream,
    scripts: &'r Scripts,
}

impl Side<'_> {
    /// Runs a case. Returns whether the node's connection was reused.
    fn judge(&self, case: &Case, verdict: Verdict, writes: Writes) -> Result<bool, String> {
        let script = Script::of(case, writes)?;
        let (method, version) = case.key("request").unwrap_or("GET HTTP/1.1").split_once(' ').ok_or("no version")?;
        let path = format!("/case/{}/{writes:?}", case.name);
        self.scripts.lock().unwrap().insert(path.clone(), script.clone());
        let mut client = connect(self.address)?;
        client
            .send(format!("{method} {path} {version}\r\nHost: shop.test\r\n\r\n"))
            .map_err(|error| error.to_string())?;
        // Makes the connection end with the answer, so that bytes after the answer are noticed.
        half_close(&client)?;
        let (bytes, ending) = client.rest();
        script.answered.open();
        script.sent.wait("the node has sent everything");
        follows(case, verdict, &bytes, &ending, method == "HEAD")
            .map_err(|error| format!("{error}; the client got {}, {ending:?}", shown(&bytes)))?;
        let next = format!("/next/{}/{writes:?}", case.name);
        is_served(self.address, &next)?;
        let again = self.is_used_again(&path, &next)?;
        if again && verdict != Verdict::Passes {
            return Err("the connection to the node was used again".into());
        }
        Ok(again)
    }

    /// Whether the request for `next` arrived on the connection of the one for `path`.
    fn is_used_again(&self, path: &str, next: &str) -> Result<bool, String> {
        let calls = self.node.calls();
        let connections = |path: &str| -> Vec<usize> {
            let asks = |head: &str| head.split(' ').nth(1) == Some(path);
            calls.iter().filter(|call| asks(&call.head)).map(|call| call.connection).collect()
        };
        match connections(next).as_slice() {
            [connection] => Ok(connections(path).contains(connection)),
            other => Err(format!("the next request came {} times", other.len())),
        }
    }
}

/// Whether the client got the answer required by the verdict.
fn follows(case: &Case, verdict: Verdict, bytes: &[u8], ending: &Ending, to_head: bool) -> Result<(), String> {
    let answers = messages(bytes, ending, &[to_head]);
    let is_502 = answers.as_ref().is_ok_and(|answers| match answers.split_last() {
        Some((last, interim)) => last.status == 502 && interim.iter().all(|answer| answer.status < 200),
        None => false,
    });
    match verdict {
        Verdict::BadGateway | Verdict::Cut if is_502 && *ending == Ending::Clean => Ok(()),
        Verdict::BadGateway => Err("that is no 502".into()),
        Verdict::Cut if *ending != Ending::Reset => Err("the client cannot see the cut".into()),
        Verdict::Cut => match answers {
            Ok(answers) if answers.iter().any(|answer| answer.status >= 200) => Err("a cut answer looks whole".into()),
            Ok(_) | Err(_) => Ok(()),
        },
        Verdict::Passes | Verdict::PassesOnce => {
            let seen = answers?.into_iter().map(|answer| [answer.head, answer.body].concat());
            let seen: Vec<Vec<u8>> = seen.collect();
            let as_expected = seen == case.sections("client sees") && *ending == Ending::Clean;
            as_expected.then_some(()).ok_or_else(|| "that is not what the file says".into())
        }
    }
}

#[test]
fn no_hostile_answer_looks_right_and_its_connection_is_not_used_again() {
    let cases = Case::read_all("answers");
    // One map for both nodes: a request that fails at a Varnish may go to a web node.
    let scripts = Scripts::default();
    let rig = Rig::start("", vec![node(&scripts)], vec![node(&scripts)]);
    let mut failures = Failures::default();
    let (mut hostile, mut odd, mut used_again) = (0, 0, 0);
    for (name, address, node) in
        [("edge", rig.clearcoat.edge, &rig.varnish[0]), ("origin", rig.clearcoat.origin, &rig.web[0])]
    {
        let side = Side { address, node, scripts: &scripts };
        for case in &cases {
            let verdict = Verdict::of(case).unwrap_or_else(|error| panic!("{error}"));
            if verdict == Verdict::Passes {
                odd += 1;
            } else {
                hostile += 1;
            }
            for writes in Writes::ALL {
                let result = side.judge(case, verdict, writes);
                used_again += usize::from(result == Ok(true));
                failures.note(case, name, writes, result.map(|_| ()));
            }
        }
    }
    failures.assert_none();
    assert!(hostile >= 2 * 20 && odd >= 2 * 5, "only {hostile} and {odd} cases");
    // A proxy that never reuses a connection would pass otherwise. On a slow machine a connection may exceed its idle
    // limit, so not every one is required.
    assert!(used_again >= odd, "of {odd} connections that were right, each with two answers, {used_again} were kept");
}
