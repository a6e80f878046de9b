//! Nodes from DNS: the records of configured names.
//!
//! # What is a node
//!
//! `NAME:PORT` has one node for each address of the name. That is what containers have: a service in Docker Compose
//! (`tasks.SERVICE` in Swarm), a headless service in Kubernetes. The id is the address with the port, `10.0.0.5:6081`:
//! nothing else could identify it, and a container that returns with another address is another container. AAAA records
//! are used only if the name has no A records: an address does not identify its machine, so a machine with both would
//! be two nodes, with twice the traffic and half of a cache each. To reach nodes by IPv6, configure a name without A
//! records. (So AAAA is queried only if there is no A: the answer would not change anything.)
//!
//! `_SERVICE._PROTO.NAME` has one node for each service record, identified by the name and the port in it: an id that
//! survives a new address, such as the name of a pod of a StatefulSet. If a target has several addresses, the lowest is
//! used. Only records of the lowest priority value are used: the others are fallbacks (RFC 2782), but in a pool they
//! would always get traffic. Health checks serve that purpose. A weight is the node's share. If all weights of a name
//! are equal, each is 1: RFC 2782 recommends 0 if there is nothing to choose, and CoreDNS divides 100 by the number of
//! pods, so each pod that joins or leaves would change the weight of every node. Otherwise 0 means no new traffic, as
//! everywhere here; in RFC 2782 it means a very small chance.
//!
//! # What an answer means
//!
//! Records: new ones join, and missing ones have *vanished*. DNS does not report why a record is missing, whether a
//! readiness check failed for a second or the node was removed; so the fleet keeper checks the node itself.
//!
//! No records, or no such name: all nodes of the name have vanished. This is unusual, but a valid answer.
//!
//! No answer (SERVFAIL, REFUSED, a timeout, no server): nothing is known, so nothing changes, however long it lasts. It
//! is logged once, and again if the reason changes.
//!
//! Each name is queried again when its records expire ([`pace`]), in a task of its own, so that an unanswered name
//! delays no other.

mod answers;
mod lookup;
mod pace;
mod question;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::config::Dns;
use crate::fleet::{Event, NodeId, NodeSource, NodeSpec, Role};
use crate::registry::source_status::SourceStatus;
use crate::telemetry::causes;

use answers::LastAnswers;
use lookup::{DnsAnswer, Lookup, LookupError};
use question::DnsQuestion;

/// Announces the nodes of the names, and every change of them, until the receiver of the events is gone.
///
/// [`Event::Listed`] follows once every name was answered or has failed, after 3 seconds at most. `status` is kept up
/// to date; `rejected` is called for each record that is not a valid node.
pub async fn follow(dns: Dns, events: mpsc::Sender<Event>, status: Arc<SourceStatus>, rejected: impl Fn() + Send) {
    let questions = |role, names: Vec<String>| names.into_iter().map(move |name| DnsQuestion::new(role, &name));
    let questions: Vec<_> = questions(Role::Web, dns.web).chain(questions(Role::Varnish, dns.varnish)).collect();
    let (sender, mut outcomes) = mpsc::channel(16);
    let mut follower = DnsFollower::new(questions.len(), status);
    // Dropping this set, and so this future, aborts the tasks.
    let mut askers = JoinSet::new();
    for (index, question) in questions.into_iter().enumerate() {
        askers.spawn(Asker::new(index, question, dns.servers.clone()).run(sender.clone()));
    }
    loop {
        let outcome = tokio::select! {
            Some(outcome) = outcomes.recv() => outcome,
            Some(Err(error)) = askers.join_next() => {
                tracing::error!(error = %causes(&error), "who asks for a DNS name panicked; its nodes stay as they are");
                continue;
            }
        };
        for event in follower.take(outcome, &rejected) {
            if events.send(event).await.is_err() {
                return;
            }
        }
    }
}

/// The result of one look-up.
struct Outcome {
    question: usize,
    /// The answer, or the name and the reason of the failure.
    heard: Result<AnsweredNodes, String>,
}

/// An answer, as nodes.
struct AnsweredNodes {
    nodes: Vec<NodeSpec>,
    /// The number of records that are not valid nodes.
    rejected: usize,
}

/// The state of all names together.
struct DnsFollower {
    answers: LastAnswers,
    /// The names that were answered or have failed.
    asked: BTreeSet<usize>,
    /// The names that were not answered the last time, and why.
    failing: BTreeMap<usize, String>,
    count: usize,
    status: Arc<SourceStatus>,
}

impl DnsFollower {
    fn new(count: usize, status: Arc<SourceStatus>) -> Self {
        DnsFollower { answers: LastAnswers::default(), asked: BTreeSet::new(), failing: BTreeMap::new(), count, status }
    }

    /// Applies an outcome. Returns the resulting events.
    fn take(&mut self, Outcome { question, heard }: Outcome, rejected: &impl Fn()) -> Vec<Event> {
        let was_complete = self.asked.len() == self.count;
        self.asked.insert(question);
        let is_complete = self.asked.len() == self.count;
        let mut events = match heard {
            Ok(heard) => {
                self.status.record_contact();
                self.failing.remove(&question);
                (0..heard.rejected).for_each(|_| rejected());
                self.answers.replace(question, heard.nodes)
            }
            Err(reason) => {
                self.failing.insert(question, reason);
                Vec::new()
            }
        };
        self.status.set(is_complete, &self.failing);
        if is_complete && !was_complete {
            events.push(Event::Listed(NodeSource::Dns));
        }
        events
    }
}

/// Queries one name repeatedly.
struct Asker {
    index: usize,
    question: DnsQuestion,
    servers: Vec<SocketAddr>,
    /// Recreated after a failure: the system may have other servers by now.
    lookup: Option<Lookup>,
    failures: u32,
    /// The ongoing failure, as logged.
    failure: Option<String>,
    was_empty: bool,
    /// The rejected records, which are already logged.
    rejected: BTreeSet<String>,
}

impl Asker {
    fn new(index: usize, question: DnsQuestion, servers: Vec<SocketAddr>) -> Self {
        let (lookup, failure, rejected) = (None, None, BTreeSet::new());
        Asker { index, question, servers, lookup, failures: 0, failure, was_empty: false, rejected }
    }

    async fn run(mut self, outcomes: mpsc::Sender<Outcome>) {
        loop {
            let (heard, pause) = match self.ask().await {
                Ok(answer) => {
                    let pause = pace::after_answer(answer.ttl, fastrand::f64());
                    (Ok(self.answered(answer)), pause)
                }
                Err(failure) => {
                    let reason = self.failed(&failure);
                    (Err(reason), pace::after_failure(self.failures, fastrand::f64()))
                }
            };
            if outcomes.send(Outcome { question: self.index, heard }).await.is_err() {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn ask(&mut self) -> Result<DnsAnswer, LookupError> {
        let lookup = match self.lookup.take() {
            Some(lookup) => lookup,
            None => Lookup::new(&self.servers)?,
        };
        let answer = lookup.answer(&self.question).await?;
        self.lookup = Some(lookup);
        Ok(answer)
    }

    /// The name and why it is not answered.
    fn failed(&mut self, failure: &LookupError) -> String {
        self.failures = self.failures.saturating_add(1);
        let reason = causes(failure).to_string();
        let problem = format!("{}: {reason}", self.question);
        if self.failure.as_ref() != Some(&reason) {
            tracing::warn!(name = %self.question, reason, "DNS name is not answered; its nodes stay as they are");
            self.failure = Some(reason);
        }
        problem
    }

    fn answered(&mut self, answer: DnsAnswer) -> AnsweredNodes {
        self.failures = 0;
        if self.failure.take().is_some() {
            tracing::info!(name = %self.question, "DNS name is answered again");
        }
        let is_empty = answer.nodes.is_empty();
        if is_empty && !self.was_empty {
            tracing::warn!(name = %self.question, "DNS name has no addresses");
        }
        self.was_empty = is_empty;
        let (mut nodes, mut rejected) = (Vec::new(), BTreeSet::new());
        for found in answer.nodes {
            match NodeId::try_from(found.id.as_str()) {
                Ok(id) => nodes.push(NodeSpec {
                    source: NodeSource::Dns,
                    weight: found.weight,
                    ..NodeSpec::new(self.question.role, id, found.address)
                }),
                Err(reason) => {
                    if !self.rejected.contains(&found.id) {
                        tracing::warn!(name = %self.question, %reason, "DNS record is left out");
                    }
                    rejected.insert(found.id);
                }
            }
        }
        self.rejected = rejected;
        AnsweredNodes { nodes, rejected: self.rejected.len() }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::registry::dns::lookup::DnsNode;

    fn answer(ids: &[&str]) -> DnsAnswer {
        let found =
            |id: &&str| DnsNode { id: (*id).to_owned(), address: SocketAddr::from(([10, 0, 0, 1], 80)), weight: 1 };
        DnsAnswer { nodes: ids.iter().map(found).collect(), ttl: std::time::Duration::ZERO }
    }

    #[test]
    fn the_start_waits_for_every_name_once_whether_it_is_answered_or_not() {
        let status = Arc::new(SourceStatus::default());
        let mut follower = DnsFollower::new(2, Arc::clone(&status));
        let count = Cell::new(0);
        let mut listed = |question, heard| {
            let events = follower.take(Outcome { question, heard }, &|| count.set(count.get() + 1));
            (matches!(events.last(), Some(Event::Listed(NodeSource::Dns))), status.is_connected(), status.problem())
        };
        let some = |rejected| Ok(AnsweredNodes { nodes: Vec::new(), rejected });
        assert_eq!(listed(1, some(0)), (false, false, None));
        assert_eq!(listed(1, some(0)), (false, false, None));
        assert_eq!(listed(0, Err("a:80: SERVFAIL".into())), (true, false, Some("a:80: SERVFAIL".into())));
        assert_eq!(listed(0, some(2)), (false, true, None));
        assert_eq!(count.get(), 2);
    }

    #[test]
    fn a_record_that_is_no_node_takes_no_other_with_it() {
        let mut asker = Asker::new(0, DnsQuestion::new(Role::Varnish, "varnish:6081"), Vec::new());
        let AnsweredNodes { nodes, rejected } = asker.answered(answer(&["a*b:80", "a:80"]));
        assert_eq!((nodes.len(), nodes[0].id.as_str(), rejected), (1, "a:80", 1));
        assert_eq!((nodes[0].source, nodes[0].role()), (NodeSource::Dns, Role::Varnish));
    }
}
