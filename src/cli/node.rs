//! `clearcoat node`: drains and resumes a node of a running fleet, and gives it a weight.
//!
//! Ids are unique within a role. So the role is asked of the fleet, and has to be said only where both have the id.

use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Subcommand;
use http::{Request, Response, header};
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::Endpoint;
use super::{node_id, printable};
use crate::config::Token;
use crate::fleet::{NodeId, Role};

/// Longer than the longest `purge.ack_timeout`, which an answer may take where replicas tell each other.
const TIMEOUT: Duration = Duration::from_secs(70);

/// In bytes: room for tens of thousands of nodes.
const MAX_ANSWER: usize = 16 << 20;

/// Drain or resume a node, or give it another weight, at every clearcoat and until it is taken back
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
        clearcoat node drain varnish-2 --token-file /etc/clearcoat/admin-token\n  \
        clearcoat node resume varnish-2\n  \
        clearcoat node weight web-1 5 --role web")]
pub(super) struct NodeCommand {
    #[command(subcommand)]
    order: Order,
}

#[derive(Debug, Subcommand)]
enum Order {
    /// Give it no new requests. It finishes those that it has, and gets every purge
    Drain {
        #[command(flatten)]
        target: NodeArgs,
        /// Also if no other node of its role gets traffic
        #[arg(long)]
        force: bool,
    },
    /// Let it serve again
    Resume {
        #[command(flatten)]
        target: NodeArgs,
    },
    /// Change its share of the traffic
    Weight {
        #[command(flatten)]
        target: NodeArgs,
        /// 1 to 65535, or `registered` for what its source says
        #[arg(value_parser = weight)]
        weight: Weight,
    },
}

#[derive(Debug, clap::Args)]
struct NodeArgs {
    /// The id of the node
    #[arg(value_name = "ID", value_parser = node_id)]
    id: NodeId,
    /// Its role; needed if a web node and a Varnish have this id
    #[arg(long)]
    role: Option<Role>,
    /// The admin listener
    #[arg(long, value_name = "URL", env = "CLEARCOAT_ADMIN", default_value = "http://127.0.0.1:9180")]
    admin: Endpoint,
    /// A file with the operator's token (admin.token_file)
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_ADMIN__TOKEN_FILE")]
    token_file: PathBuf,
}

/// `None`: the registered one. A type of its own, as clap reads an `Option` as one that may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Weight(Option<NonZeroU16>);

fn weight(text: &str) -> Result<Weight, String> {
    match text {
        "registered" => Ok(Weight(None)),
        "0" => Err("a node without any traffic is drained: clearcoat node drain".to_owned()),
        _ => text.parse().map(|weight| Weight(Some(weight))).map_err(|_| "wanted 1 to 65535, or registered".to_owned()),
    }
}

/// The answer to an order.
#[derive(Debug, Deserialize)]
struct CarriedOut {
    role: String,
    id: String,
    state: String,
    drained_since: Option<String>,
    weight: Option<u32>,
    #[serde(default)]
    unconfirmed: Vec<String>,
    warning: Option<String>,
}

impl NodeCommand {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let (target, body) = match &self.order {
            Order::Drain { target, force } => (target, json!({"state": "drain", "force": force})),
            Order::Resume { target } => (target, json!({"state": "ready"})),
            Order::Weight { target, weight: Weight(weight) } => (target, json!({"weight": weight})),
        };
        let seconds = TIMEOUT.as_secs();
        let said = tokio::time::timeout(TIMEOUT, target.order(&body))
            .await
            .with_context(|| format!("{} has not answered within {seconds} s", target.admin))??;
        println!("{}", said.line());
        for warning in said.warnings() {
            eprintln!("warning: {warning}");
        }
        Ok(())
    }
}

impl NodeArgs {
    async fn order(&self, body: &Value) -> anyhow::Result<CarriedOut> {
        let token = Token::read(&self.token_file).with_context(|| self.token_file.display().to_string())?;
        let role = match self.role {
            Some(role) => role,
            None => self.role_in_fleet().await?,
        };
        let request = Request::post(format!("/api/v1/nodes/{role}/{}", self.id))
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {}", token.reveal()))
            .body(Full::from(body.to_string()))?;
        let answer = self.admin.send(request, MAX_ANSWER).await?;
        self.read(&answer)
    }

    /// The role of the node with this id, if only one has it. One that is not there may still be drained.
    async fn role_in_fleet(&self) -> anyhow::Result<Role> {
        #[derive(Deserialize)]
        struct Named {
            role: Role,
            id: String,
        }
        #[derive(Deserialize)]
        struct NamedNodes {
            nodes: Vec<Named>,
            #[serde(default)]
            absent: Vec<Named>,
        }
        let request = Request::get("/api/v1/fleet").body(Full::default())?;
        let fleet: NamedNodes = self.read(&self.admin.send(request, MAX_ANSWER).await?)?;
        let of_this_id = fleet.nodes.iter().chain(&fleet.absent).filter(|node| node.id == self.id.as_str());
        let mut roles: Vec<Role> = of_this_id.map(|node| node.role).collect();
        roles.sort_unstable();
        roles.dedup();
        match roles[..] {
            [role] => Ok(role),
            [] => bail!("{} knows no node {}", self.admin, self.id),
            _ => bail!("a web node and a Varnish are named {}: say which with --role", self.id),
        }
    }

    fn read<T: for<'de> Deserialize<'de>>(&self, answer: &Response<Bytes>) -> anyhow::Result<T> {
        #[derive(Deserialize)]
        struct Refused {
            error: String,
        }
        if answer.status().is_success() {
            let foreign = || format!("the answer of {} is not that of an admin listener", self.admin);
            return serde_json::from_slice(answer.body()).with_context(foreign);
        }
        let reason = match serde_json::from_slice(answer.body()) {
            Ok(Refused { error }) => error,
            Err(_) => String::from_utf8_lossy(answer.body()).trim().to_owned(),
        };
        bail!("{} answered {}: {}", self.admin, answer.status(), printable(&reason))
    }
}

impl CarriedOut {
    fn line(&self) -> String {
        let state = match (self.state.as_str(), &self.drained_since) {
            ("drain", Some(since)) => format!("drained since {since}"),
            (state, _) => state.to_owned(),
        };
        let weight = self.weight.map_or(String::new(), |weight| format!(", with weight {weight}"));
        printable(&format!("{} {} is {state}{weight}", self.role, self.id))
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = self.warning.iter().map(|warning| printable(warning)).collect();
        if !self.unconfirmed.is_empty() {
            let others = printable(&self.unconfirmed.join(", "));
            warnings.push(format!(
                "these clearcoats do not know it yet, or may not: {others}; they are told again and again"
            ));
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_said_in_a_line_and_what_is_uncertain_below() {
        let said: CarriedOut = serde_json::from_str(
            r#"{"role":"varnish","id":"v1","state":"drain","drained_since":"2026-11-27T20:53:30.000Z","weight":3,
                "unconfirmed":["clearcoat-2"],"warning":"it is in effect, and not on disk yet"}"#,
        )
        .unwrap();
        assert_eq!(said.line(), "varnish v1 is drained since 2026-11-27T20:53:30.000Z, with weight 3");
        assert!(said.warnings()[0].contains("not on disk") && said.warnings()[1].contains("clearcoat-2"));
        let said: CarriedOut =
            serde_json::from_str(r#"{"role":"web","id":"w","state":"ready","weight":null}"#).unwrap();
        assert_eq!((said.line().as_str(), said.warnings().len()), ("web w is ready", 0));
    }

    #[test]
    fn a_weight_is_a_number_above_zero_or_the_registered_one() {
        assert_eq!(weight("registered"), Ok(Weight(None)));
        assert_eq!(weight("65535"), Ok(Weight(NonZeroU16::new(65535))));
        assert!(weight("0").unwrap_err().contains("node drain"));
        for bad in ["", "-1", "65536", "x"] {
            assert!(weight(bad).is_err(), "{bad}");
        }
    }
}
