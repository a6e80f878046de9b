//! The ledger: what happened to every exchange and what was required, to find lost, doubled or mixed-up ones.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::rc::{Rc, Weak};

use super::expect::{Arrivals, Outcome, judge};
use super::generate;
use super::message::{Afterwards, Conversation, Exchange, Number, Side};

/// A violation of a requirement.
#[derive(Debug)]
pub struct Violation {
    pub number: Option<Number>,
    /// The observer.
    pub seen_by: &'static str,
    pub what: String,
}

/// The record of one exchange, over all rounds.
#[derive(Debug, Default)]
struct Record {
    /// How often a node saw its head, and its end.
    begun: u32,
    complete: u32,
    /// How often a node had seen its head when the round began.
    begun_before: u32,
    /// Its ending in each round.
    outcomes: Vec<Outcome>,
    /// How often nodes may have seen it according to these outcomes: minimum, maximum.
    may_begin: [u32; 2],
    may_complete: [u32; 2],
}

/// A run: its plans and its ledger. Clients and nodes share it, on one thread.
pub struct Run {
    pub seed: u64,
    plans: RefCell<HashMap<u32, Weak<Conversation>>>,
    records: RefCell<BTreeMap<Number, Record>>,
    tally: RefCell<BTreeMap<&'static str, u64>>,
    rounds: Cell<usize>,
    /// Open connections on which a node saw requests.
    pub node_connections: Cell<usize>,
}

impl Run {
    pub fn new(seed: u64) -> Self {
        Run {
            seed,
            plans: RefCell::default(),
            records: RefCell::default(),
            tally: RefCell::default(),
            rounds: Cell::new(0),
            node_connections: Cell::new(0),
        }
    }

    /// A conversation. Generated when it begins, and again for a node that clearcoat sends to after the client has
    /// gone.
    pub fn conversation(&self, number: u32) -> Rc<Conversation> {
        let mut plans = self.plans.borrow_mut();
        if let Some(conversation) = plans.get(&number).and_then(Weak::upgrade) {
            return conversation;
        }
        plans.retain(|_, plan| plan.strong_count() > 0);
        let conversation = Rc::new(generate::conversation(self.seed, number));
        plans.insert(number, Rc::downgrade(&conversation));
        conversation
    }

    pub fn count(&self, what: &'static str) {
        *self.tally.borrow_mut().entry(what).or_default() += 1;
    }

    pub fn counted(&self, what: &str) -> u64 {
        self.tally.borrow().get(what).copied().unwrap_or_default()
    }

    /// Allows every exchange to happen once more.
    pub fn begin_round(&self) {
        self.rounds.set(self.rounds.get() + 1);
        self.records.borrow_mut().values_mut().for_each(|record| record.begun_before = record.begun);
    }

    /// Records that a node has the head of this request. Returns how often that has happened in this round.
    pub fn begun(&self, number: Number) -> u32 {
        let mut records = self.records.borrow_mut();
        let record = records.entry(number).or_default();
        record.begun += 1;
        record.begun - record.begun_before
    }

    /// Records that a node has the complete request.
    pub fn completed(&self, number: Number) {
        self.records.borrow_mut().entry(number).or_default().complete += 1;
    }

    /// Records that the client has finished this exchange.
    pub fn settle(&self, exchange: &Exchange, side: Side, outcome: Outcome) -> Result<(), Violation> {
        let number = exchange.number;
        let violation = |what| Violation { number: Some(number), seen_by: "the client", what };
        let arrivals = judge(exchange, side, outcome);
        let arrivals = arrivals.ok_or_else(|| violation(format!("it ended {outcome:?}, which it must not")))?;
        self.count(match (outcome, exchange.mishap) {
            (Outcome::Whole, _) => "whole",
            (Outcome::Cut(_), _) => "cut",
            (Outcome::BadGateway, None) => "502 by chance",
            (Outcome::BadGateway, Some(_)) => "502",
            (Outcome::Left, _) => "left",
        });
        if exchange.answer.afterwards == Afterwards::ClosesUnannounced {
            self.count("closed unannounced");
        }
        let mut records = self.records.borrow_mut();
        let record = records.entry(number).or_default();
        let Arrivals { begun, complete } = arrivals;
        for (sum, range) in [(&mut record.may_begin, begun), (&mut record.may_complete, complete)] {
            *sum = [sum[0] + range.start(), sum[1] + range.end()];
        }
        record.outcomes.push(outcome);
        if record.outcomes.len() <= self.rounds.get() { Ok(()) } else { Err(violation("it was answered twice".into())) }
    }

    /// Checks the complete ledger once all conversations have ended.
    pub fn balance(&self) -> Result<(), Violation> {
        for (number, record) in self.records.borrow().iter() {
            let Record { begun, complete, may_begin, may_complete, outcomes, .. } = record;
            if *begun as usize > self.rounds.get() {
                self.count("tried again");
            }
            let fits = |seen: &u32, [least, most]: &[u32; 2]| least <= seen && seen <= most;
            if outcomes.len() != self.rounds.get() || !fits(begun, may_begin) || !fits(complete, may_complete) {
                let what = format!(
                    "nodes saw {begun} heads of it (from {may_begin:?} expected) and {complete} whole requests (from \
                     {may_complete:?} expected), and it ended {outcomes:?}"
                );
                return Err(Violation { number: Some(*number), seen_by: "the account", what });
            }
        }
        let (lost, closed) = (self.counted("502 by chance"), self.counted("closed unannounced"));
        if lost > closed {
            let what = format!("{lost} requests were lost to connections that nodes closed, and they closed {closed}");
            return Err(Violation { number: None, seen_by: "the account", what });
        }
        Ok(())
    }

    /// The counts, on one line.
    pub fn summary(&self) -> String {
        let mut line = String::new();
        for (what, count) in self.tally.borrow().iter() {
            write!(line, "{what} {count}, ").expect("memory");
        }
        line.trim_end_matches(", ").to_owned()
    }

    /// Everything needed to understand and reproduce a violation.
    pub fn report(&self, violation: &Violation) -> String {
        let Violation { number, seen_by, what } = violation;
        let seed = self.seed;
        let Some(number) = number else { return format!("seed {seed}: seen by {seen_by}: {what}") };
        let conversation = self.conversation(number.conversation);
        let exchange = &conversation.exchanges[number.index as usize];
        let record = format!("{:?}", self.records.borrow().get(number));
        format!(
            "exchange {number}, seen by {seen_by}: {what}\n\
             as generated: {exchange}\n\
             at the nodes: {record}\n\
             its conversation: {conversation}\
             to repeat it: CLEARCOAT_SEED={seed} CLEARCOAT_TORTURE_ONLY={} cargo test --locked --test it -- torture\n",
            number.conversation
        )
    }
}
