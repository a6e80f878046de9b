//! `clearcoat status`: the fleet as a table in the terminal, or who purged what.
//!
//! Whether a node gets traffic, and why not, is said by the admin listener, in the same words as on its status page. A node
//! that gets none always has a note.

mod purges;
mod replicas;

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use http::Request;
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Deserialize;

use super::http::Endpoint;
use super::printable;
use replicas::{ReplicaRow, push_replicas};

const TIMEOUT: Duration = Duration::from_secs(5);
const BETWEEN_LOOKS: Duration = Duration::from_secs(1);
const CLEAR_SCREEN: &str = "\x1b[2J\x1b[H";

/// For those who ask another listener, the edge above all.
const WHICH_LISTENER: &str = "is that the admin listener (admin.listen, port 9180)?";

/// In bytes: room for tens of thousands of nodes.
const MAX_ANSWER: usize = 16 << 20;

/// Show the fleet: who is healthy, who gets traffic, who is behind; or who purged what. Fails if it is not ready for traffic
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  clearcoat status --admin http://192.0.2.2:9180 --watch\n  clearcoat status --purges"
)]
pub(super) struct Status {
    /// The admin listener
    #[arg(long, value_name = "URL", env = "CLEARCOAT_ADMIN", default_value = "http://127.0.0.1:9180")]
    admin: Endpoint,
    /// Look again every second until Ctrl-C
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// Show who purged what since each clearcoat started, at all of them, instead of the fleet
    #[arg(long)]
    purges: bool,
    /// Print the JSON of the API instead of a table
    #[arg(long)]
    json: bool,
    /// Say only whether it may get traffic (/readyz): the exit status is 1 while it starts, drains, or is not there
    #[arg(long, conflicts_with_all = ["watch", "purges", "json"])]
    ready: bool,
}

impl Status {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let stdout = std::io::stdout();
        if self.ready {
            return match self.not_ready().await? {
                Some(reason) => bail!("{} is not ready: {reason}", self.admin),
                None => Ok(writeln!(&stdout, "ready")?),
            };
        }
        let colour = stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        if !self.watch {
            let answer = self.look().await?;
            let text = if self.json { answer } else { self.table(&answer, colour)? };
            writeln!(&stdout, "{}", text.trim_end())?;
            return match self.not_ready().await? {
                Some(reason) if !self.purges => bail!("{} is not ready: {reason}", self.admin),
                _ => Ok(()),
            };
        }
        loop {
            // During a restart an error is shown, and the next attempt may succeed.
            let shown = match self.look().await.and_then(|answer| self.table(&answer, colour)) {
                Ok(table) => table,
                Err(error) => format!("{error:#}\n"),
            };
            write!(&stdout, "{CLEAR_SCREEN}{shown}")?;
            (&stdout).flush()?;
            tokio::select! {
                () = tokio::time::sleep(BETWEEN_LOOKS) => {}
                interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
            }
        }
    }

    async fn look(&self) -> anyhow::Result<String> {
        let path = if self.purges { "/api/v1/purges/all" } else { "/api/v1/fleet" };
        let (status, body) = self.ask(path).await?;
        match status.as_u16() {
            200..=299 => Ok(body),
            // Its own words say what to do.
            421 => bail!("{} answered {status}: {}", self.admin, printable(body.trim())),
            _ => bail!("{} answered {status}: {}; {WHICH_LISTENER}", self.admin, printable(body.trim())),
        }
    }

    /// Why no traffic should be sent to it, if none should: as a load balancer sees it.
    async fn not_ready(&self) -> anyhow::Result<Option<String>> {
        let (status, body) = self.ask("/readyz").await?;
        Ok((!status.is_success()).then(|| printable(body.trim())))
    }

    async fn ask(&self, path: &str) -> anyhow::Result<(http::StatusCode, String)> {
        let request = Request::get(path).body(Full::default())?;
        let answer: http::Response<Bytes> = tokio::time::timeout(TIMEOUT, self.admin.send(request, MAX_ANSWER))
            .await
            .with_context(|| format!("{} has not answered within {} s", self.admin, TIMEOUT.as_secs()))??;
        Ok((answer.status(), String::from_utf8_lossy(answer.body()).into_owned()))
    }

    fn table(&self, answer: &str, colour: bool) -> anyhow::Result<String> {
        let table = if self.purges {
            serde_json::from_str(answer).map(|purges: purges::FleetPurges| purges.tables())
        } else {
            serde_json::from_str(answer).map(|fleet: Fleet| fleet.table(colour))
        };
        table.map_err(|error| match error.classify() {
            serde_json::error::Category::Data => {
                anyhow!("the answer of {} is of another version of clearcoat: {error}", self.admin)
            }
            _ => anyhow!("{} sent no JSON; {WHICH_LISTENER}", self.admin),
        })
    }
}

/// The answer of `/api/v1/fleet`.
#[derive(Debug, Deserialize)]
struct Fleet {
    version: u64,
    head: u64,
    fence: u64,
    journal: String,
    /// Purges that are not in etcd yet, if the journal is in etcd.
    spooled: Option<u64>,
    #[serde(default)]
    replicas: Vec<ReplicaRow>,
    /// Only if there is a registry beside the configuration file.
    registry: Option<RegistryRow>,
    /// What is wrong beside single nodes.
    #[serde(default)]
    problems: Vec<ProblemRow>,
    nodes: Vec<NodeRow>,
    /// Requests that wait for a node with room.
    #[serde(default)]
    queues: Vec<QueueRow>,
    /// What operators say of nodes that are not there.
    #[serde(default)]
    absent: Vec<AbsentRow>,
}

#[derive(Debug, Deserialize)]
struct AbsentRow {
    role: String,
    id: String,
    drained_since: Option<String>,
    weight: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct QueueRow {
    listener: String,
    waiting: u64,
    max_queue: u64,
}

impl QueueRow {
    /// Its part of the header line; empty if nobody waits.
    fn shown(&self) -> String {
        if self.waiting == 0 {
            return String::new();
        }
        format!("   {} QUEUE {} of {}", printable(&self.listener), self.waiting, self.max_queue)
    }
}

#[derive(Debug, Deserialize)]
struct ProblemRow {
    severity: String,
    what: String,
    why: String,
    /// When it happened last (RFC 3339).
    at: Option<String>,
    advice: String,
    alert: String,
}

impl ProblemRow {
    /// Its two lines above the table.
    fn push(&self, table: &mut String, colour: bool) {
        let at = self.at.as_deref().map(|at| format!(" (last at {})", printable(at))).unwrap_or_default();
        let line = format!("{}: {}{at}", printable(&self.what), printable(&self.why));
        let code = if self.severity == "critical" { "31" } else { "33" };
        _ = if colour { writeln!(table, "\x1b[{code}m{line}\x1b[0m") } else { writeln!(table, "{line}") };
        _ = writeln!(table, "    {} ({})", printable(&self.advice), printable(&self.alert));
    }
}

#[derive(Debug, Deserialize)]
struct RegistryRow {
    kind: String,
    connected: bool,
}

#[derive(Debug, Deserialize)]
struct NodeRow {
    role: String,
    id: String,
    /// Of a name that does not resolve: the name.
    address: String,
    health: String,
    gets_traffic: bool,
    /// Why it gets none, or not its full share.
    #[serde(default)]
    why: String,
    /// What to do about that.
    #[serde(default)]
    advice: String,
    inflight: u64,
    /// Its source no longer lists it.
    #[serde(default)]
    retained: bool,
    /// Purges that it lacks. Only for a Varnish, like all below.
    lag: Option<u64>,
    #[serde(default)]
    delivery_error: String,
    /// The finding of its trial.
    #[serde(default)]
    trial_finding: String,
    /// Why purges that seals could enforce must still wait for it.
    #[serde(default)]
    seals_not: String,
    /// The VCL that is pushed to it, while one is.
    vcl: Option<VclRow>,
}

#[derive(Debug, Deserialize)]
struct VclRow {
    /// Why it uses another one; empty if it does not.
    problem: String,
}

impl NodeRow {
    fn note(&self) -> String {
        let retained = if self.retained { "retained (not registered any more)" } else { "" };
        let vcl = self.vcl.as_ref().map_or("", |vcl| &vcl.problem);
        let told: [&str; 6] = [&self.why, retained, &self.delivery_error, &self.trial_finding, &self.seals_not, vcl];
        let mut notes: Vec<&str> = Vec::new();
        for note in told.map(str::trim) {
            // Where an error is why, it is told once.
            if !note.is_empty() && !notes.iter().any(|before| before.contains(note)) {
                notes.push(note);
            }
        }
        notes.join("; ")
    }

    /// What to do about a node that gets no traffic, on a line below the table.
    fn advised(&self) -> Option<String> {
        let is_wanted = !self.gets_traffic && !self.advice.is_empty();
        is_wanted.then(|| printable(&format!("{} {}: {}", self.role, self.id, self.advice)))
    }

    fn cells(&self) -> [String; COLUMNS.len()] {
        let lag = self.lag.map_or("-".to_owned(), |lag| lag.to_string());
        let traffic = if self.gets_traffic { "yes" } else { "no" };
        [
            printable(&self.role),
            printable(&self.id),
            printable(&self.address),
            printable(&self.health),
            traffic.to_owned(),
            self.inflight.to_string(),
            lag,
            printable(&self.note()),
        ]
    }
}

const COLUMNS: [&str; 8] = ["ROLE", "ID", "ADDRESS", "HEALTH", "TRAFFIC", "INFLIGHT", "LAG", "NOTE"];

impl Fleet {
    fn table(&self, colour: bool) -> String {
        let mut table = format!(
            "fleet version {}   journal {}{}   head {}   fence {}{}{}\n\n",
            self.version,
            printable(&self.journal),
            self.spooled.filter(|&count| count > 0).map(|count| format!(" ({count} SPOOLED)")).unwrap_or_default(),
            self.head,
            self.fence,
            self.registry.as_ref().map(RegistryRow::shown).unwrap_or_default(),
            self.queues.iter().map(QueueRow::shown).collect::<String>()
        );
        self.problems.iter().for_each(|problem| problem.push(&mut table, colour));
        if !self.problems.is_empty() {
            table.push('\n');
        }
        let rows: Vec<_> = self.nodes.iter().map(NodeRow::cells).collect();
        push_table(&mut table, &COLUMNS, &rows, colour);
        let advised: Vec<String> = self.nodes.iter().filter_map(NodeRow::advised).collect();
        if !advised.is_empty() {
            _ = writeln!(table, "\n{}", advised.join("\n"));
        }
        for absent in &self.absent {
            _ = writeln!(table, "\n{}", absent.line());
        }
        push_replicas(&mut table, &self.replicas, colour);
        table
    }
}

impl AbsentRow {
    fn line(&self) -> String {
        let drained = self.drained_since.as_ref().map(|since| format!("drained by an operator since {since}"));
        let weight = self.weight.map(|weight| format!("with weight {weight}"));
        let says: Vec<String> = drained.into_iter().chain(weight).collect();
        printable(&format!("not there: {} {}, {}, also when it comes back", self.role, self.id, says.join(", ")))
    }
}

impl RegistryRow {
    /// Its part of the header line. Why it is away is a problem, and told below.
    fn shown(&self) -> String {
        format!("   registry {}{}", printable(&self.kind), if self.connected { "" } else { " DISCONNECTED" })
    }
}

/// Adds a heading and the rows below it, in columns.
fn push_table<const N: usize>(table: &mut String, columns: &[&str; N], rows: &[[String; N]], colour: bool) {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([columns[column].len()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    push_row(table, columns, &widths, false);
    for row in rows {
        push_row(table, row, &widths, colour);
    }
}

/// Adds one line, its cells filled up to the widths and its end trimmed.
fn push_row(table: &mut String, cells: &[impl AsRef<str>], widths: &[usize], colour: bool) {
    let mut line = String::new();
    for (cell, &width) in cells.iter().map(AsRef::as_ref).zip(widths) {
        let padded = format!("{cell:width$}");
        match Some(cell).filter(|_| colour).and_then(colour_of) {
            Some(code) => _ = write!(line, "\x1b[{code}m{padded}\x1b[0m  "),
            None => _ = write!(line, "{padded}  "),
        }
    }
    table.push_str(line.trim_end());
    table.push('\n');
}

/// Green for what is well, red for what is not, yellow for what is not known.
fn colour_of(cell: &str) -> Option<&'static str> {
    match cell {
        "up" | "yes" => Some("32"),
        "down" | "no" => Some("31"),
        "unknown" => Some("33"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet() -> Fleet {
        serde_json::from_str(
            r#"{"version":7,"head":42,"fence":42,"journal":"disk","nodes":[
            {"role":"varnish","id":"varnish-1","address":"10.0.1.11:6081","health":"up","gets_traffic":true,"why":"",
             "inflight":3,"lag":0,"delivery_error":""},
            {"role":"varnish","id":"varnish-2","address":"10.0.1.12:6081","health":"up","gets_traffic":false,
             "why":"2 purges behind, the oldest for 3s: timed out","advice":"Look at it.","inflight":0,"lag":2,
             "delivery_error":"timed out"},
            {"role":"web","id":"web-1","address":"10.0.0.5:80","health":"down","gets_traffic":false,
             "why":"connection refused","inflight":0},
            {"role":"web","id":"web-2","address":"10.0.0.6:80","health":"up","gets_traffic":false,
             "why":"drained: its weight is 0","inflight":12}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn the_table_shows_who_gets_traffic_and_why_not() {
        let expected = "\
fleet version 7   journal disk   head 42   fence 42

ROLE     ID         ADDRESS         HEALTH  TRAFFIC  INFLIGHT  LAG  NOTE
varnish  varnish-1  10.0.1.11:6081  up      yes      3         0
varnish  varnish-2  10.0.1.12:6081  up      no       0         2    2 purges behind, the oldest for 3s: timed out
web      web-1      10.0.0.5:80     down    no       0         -    connection refused
web      web-2      10.0.0.6:80     up      no       12        -    drained: its weight is 0

varnish varnish-2: Look at it.
";
        assert_eq!(fleet().table(false), expected);
    }

    #[test]
    fn requests_that_wait_are_shown_with_the_nodes_that_they_wait_for() {
        let mut fleet = fleet();
        let queue = |listener: &str, waiting| QueueRow { listener: listener.to_owned(), waiting, max_queue: 1024 };
        fleet.queues = vec![queue("edge", 0), queue("origin", 7)];
        fleet.nodes[0].why = "at its limit of 3 requests (edge.max_requests_per_node)".to_owned();
        let table = fleet.table(false);
        assert!(
            table.starts_with("fleet version 7   journal disk   head 42   fence 42   origin QUEUE 7 of 1024\n\n"),
            "{table}"
        );
        assert!(table.contains("yes      3         0    at its limit of 3 requests"), "{table}");
    }

    #[test]
    fn colour_changes_no_column() {
        let coloured = fleet().table(true);
        assert!(coloured.contains("\x1b[32mup    \x1b[0m  \x1b[31mno     \x1b[0m  0"), "{coloured:?}");
        let plain = ["\x1b[31m", "\x1b[32m", "\x1b[0m"].iter().fold(coloured, |text, code| text.replace(code, ""));
        assert_eq!(plain, fleet().table(false));
    }

    #[test]
    fn the_registry_and_what_it_has_lost_are_shown() {
        let mut fleet = fleet();
        fleet.nodes[3].retained = true;
        let registry = r#"{"kind":"etcd","connected":true,"revision":5,"last_contact_seconds":0.4,"problem":""}"#;
        fleet.registry = serde_json::from_str(registry).unwrap();
        let table = fleet.table(false);
        assert!(
            table.starts_with("fleet version 7   journal disk   head 42   fence 42   registry etcd\n\n"),
            "{table}"
        );
        assert!(table.contains("drained: its weight is 0; retained (not registered any more)\n"), "{table}");
        let registry = r#"{"kind":"etcd","connected":false,"last_contact_seconds":12.4,"problem":"no leader"}"#;
        fleet.registry = serde_json::from_str(registry).unwrap();
        let table = fleet.table(false);
        assert!(table.contains("fence 42   registry etcd DISCONNECTED\n"), "{table}");
    }

    #[test]
    fn what_is_wrong_beside_nodes_is_told_first_with_what_to_do() {
        let problems = r#"[{"severity":"critical","what":"The journal","why":"no space left","advice":"Make room.","alert":"Full"},
            {"severity":"warning","what":"Purges","why":"token missing","at":"2026-01-02T03:04:05Z","advice":"See purge.allow.",
             "alert":"Refused"}]"#;
        let fleet = Fleet { problems: serde_json::from_str(problems).unwrap(), ..fleet() };
        let expected = "\n\nThe journal: no space left\n    Make room. (Full)\n\
                        Purges: token missing (last at 2026-01-02T03:04:05Z)\n    See purge.allow. (Refused)\n\nROLE ";
        assert!(fleet.table(false).contains(expected), "{}", fleet.table(false));
        assert!(fleet.table(true).contains("\x1b[31mThe journal: no space left\x1b[0m\n"));
    }

    #[test]
    fn what_operators_said_of_nodes_that_left_is_shown() {
        let absent = r#"[{"role":"web","id":"web-9","drained_since":"2026-11-27T20:53:30.000Z"},{"role":"web","id":"web-8","weight":3}]"#;
        let table = Fleet { absent: serde_json::from_str(absent).unwrap(), ..fleet() }.table(false);
        let drained =
            "not there: web web-9, drained by an operator since 2026-11-27T20:53:30.000Z, also when it comes back\n";
        assert!(table.contains(drained), "{table}");
        assert!(table.ends_with("not there: web web-8, with weight 3, also when it comes back\n"), "{table}");
    }

    #[test]
    fn an_empty_fleet_is_a_heading() {
        let fleet = Fleet { nodes: Vec::new(), ..fleet() };
        assert!(fleet.table(true).ends_with("\n\nROLE  ID  ADDRESS  HEALTH  TRAFFIC  INFLIGHT  LAG  NOTE\n"));
    }
}
