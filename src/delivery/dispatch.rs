//! Sends one batch to one Varnish, and finds out who is to blame where that fails.
//!
//! A request that a node does not carry out is either the node's fault (it hangs, its ACL has gone wrong, it is about to
//! end) or the request's own: it was refused, or broke the connection, or is never answered, and will be for as long as it
//! is repeated. The first must keep the node out of traffic until it is mended, the second must not. So:
//!
//! - What was answered inside a batch is done, whatever comes after it.
//! - Whoever failed is a *suspect*: it goes alone from then on, and each time just after the node was seen to obey
//!   ([`PurgeEndpoint::obeys`](crate::varnish::http::PurgeEndpoint::obeys)). A node that does not obey is at fault itself, and nothing
//!   is held against the request.
//! - A suspect that is refused (4xx) then is refused for good; one that fails in any other way fails for good the second
//!   time. It is passed over, and whoever waits for it is told. Where nobody waits any more, because it was answered as done
//!   while the node was fenced, a ban of everything is sent in its place ([`Owed`]).
//! - A ban of our own is never passed over, for pages would stay that somebody was told are gone. If the node takes another
//!   ban of this form, this one is at fault, and is carried out as a ban of everything; if it does not, the node is.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::refusal::{Owed, fingerprint_of_ban};
use super::walk::{Batch, Item};
use crate::fleet::{Live, VarnishSettings};
use crate::purge::{Ban, Purge, TagSet, Target as Purged, compile};
use crate::telemetry::causes;
use crate::varnish::http::{Answer, DeliveryError, PIPELINE, PurgeClient};

/// How long connecting, writing, or an answer of a node that answers nothing else may take. Longer than any healthy
/// Varnish needs, and short enough that a node that wakes up from a hang is tried again soon.
const ATTEMPT: Duration = Duration::from_secs(2);

/// How long an answer may take before the node is asked whether it answers others: this, or so many of its round trips.
const PATIENCE: Duration = Duration::from_millis(400);
const PATIENT_ROUND_TRIPS: u32 = 8;

/// How often a suspect may fail without an answer that says no.
const STRIKES: u32 = 2;

/// What a node made of a batch beside carrying it out.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// The objects it said it dropped.
    pub(super) invalidated: u64,
    /// What it does not take though it takes others, by fingerprint, and why.
    pub(super) refused: Vec<(u64, Arc<str>)>,
    /// It says that a ban of everything dropped pages without tags and pools as well.
    pub(super) flushed_all: bool,
    /// It carried a ban of everything out and did not say so.
    pub(super) flushed_in_part: bool,
    /// It stood still for a while.
    pub(super) stood_still: bool,
    /// A ban that it does not take was carried out as one of everything.
    pub(super) widened: bool,
    /// Bans and requests that it took.
    pub(super) sent: u64,
}

impl Report {
    /// Whether the bans of everything that it took are enough for this.
    pub(super) fn covers(&self, owed: Owed) -> bool {
        match owed {
            Owed::Nothing => true,
            Owed::Flush => self.flushed_all || self.flushed_in_part,
            Owed::FlushOfAll => self.flushed_all,
        }
    }
}

/// The way to one Varnish.
pub(super) struct Dispatch {
    link: PurgeClient,
    settings: VarnishSettings,
    live: Arc<Live>,
    /// When the process started.
    started: Instant,
    /// How many requests may be on their way at once: fewer after a failure, one to a node that closes after each answer.
    window: usize,
    answers: Vec<Answer>,
}

impl Dispatch {
    pub(super) fn new(address: SocketAddr, settings: VarnishSettings, live: Arc<Live>, started: Instant) -> Self {
        let link = PurgeClient::to(address, &settings, ATTEMPT);
        Dispatch { link, settings, live, started, window: PIPELINE, answers: Vec::new() }
    }

    /// Connects if there is no connection: what costs anything is done for nodes that can be reached.
    pub(super) async fn connect(&mut self) -> Result<(), DeliveryError> {
        self.link.connect().await
    }

    /// Sends what is left of the batch. On return nothing is left, or the node is at fault.
    pub(super) async fn send(&mut self, batch: &mut Batch, report: &mut Report) -> Result<(), DeliveryError> {
        while let Some(first) = batch.left.front() {
            let is_suspect = first.is_suspect;
            if is_suspect {
                self.link.target().obeys().await?;
            }
            let fits = batch.left.iter().take(self.window).take_while(|item| !item.is_suspect).count();
            let count = if is_suspect { 1 } else { fits };
            let result = self.round_trip(batch, count, report).await;
            let answered = self.take_answers(batch, is_suspect, report).await?;
            match result {
                Ok(()) if answered == count => self.window = (self.window * 2).min(PIPELINE),
                Ok(()) => self.window = 1,
                Err(error @ DeliveryError::Connect(_)) => return Err(error),
                Err(error) => {
                    self.window = 1;
                    self.suspect(batch, error, is_suspect, count == 1, report).await?;
                }
            }
        }
        Ok(())
    }

    /// Sends the first `count`; their answers are in `self.answers`.
    async fn round_trip(&mut self, batch: &Batch, count: usize, report: &mut Report) -> Result<(), DeliveryError> {
        let group: Vec<&Ban> = batch.left.iter().take(count).map(|item| &item.ban).collect();
        self.answers.clear();
        self.link.connect().await?;
        let patience = PATIENCE.max(self.live.life_signs.round_trip() * PATIENT_ROUND_TRIPS);
        let asked = Instant::now();
        let result = self.link.round_trip(&group, patience, &mut self.answers).await;
        if result.is_ok() {
            let since_start = asked.saturating_duration_since(self.started);
            report.stood_still |= self.live.life_signs.record_round_trip(since_start, asked.elapsed());
        }
        result
    }

    /// Takes what was answered off the batch. Returns how many that are.
    async fn take_answers(
        &mut self,
        batch: &mut Batch,
        obeyed: bool,
        report: &mut Report,
    ) -> Result<usize, DeliveryError> {
        let mut suspects = Vec::new();
        let answers = std::mem::take(&mut self.answers);
        for answer in &answers {
            let Some(item) = batch.left.pop_front() else { break };
            match *answer {
                Answer::Done { invalidated, flushed_all } => {
                    report.sent += 1;
                    report.invalidated += invalidated;
                    let is_flush = item.ban == Ban::Everything;
                    report.flushed_all |= is_flush && flushed_all;
                    report.flushed_in_part |= is_flush && !flushed_all;
                }
                Answer::Failed { status } => suspects.push((item, status)),
            }
        }
        for (mut item, status) in suspects.into_iter().rev() {
            item.strikes += u32::from(obeyed);
            let is_final = obeyed && (status < 500 || item.strikes >= STRIKES);
            if is_final {
                self.condemn(batch, item, DeliveryError::of_status(status), report).await?;
            } else {
                item.is_suspect = true;
                batch.left.push_front(item);
            }
        }
        let answered = answers.len();
        self.answers = answers;
        Ok(answered)
    }

    /// The first one was not answered: it, or the node, is at fault.
    async fn suspect(
        &mut self,
        batch: &mut Batch,
        error: DeliveryError,
        obeyed: bool,
        was_alone: bool,
        report: &mut Report,
    ) -> Result<(), DeliveryError> {
        let Some(mut item) = batch.left.pop_front() else { return Err(error) };
        let answers_others = obeyed || matches!(error, DeliveryError::Unanswered(_));
        item.strikes += u32::from(was_alone && answers_others);
        if item.strikes >= STRIKES {
            return self.condemn(batch, item, error, report).await;
        }
        item.is_suspect = true;
        batch.left.push_front(item);
        // Of a node that answered nothing else either, no more is asked now.
        if matches!(error, DeliveryError::Timeout(_)) { Err(error) } else { Ok(()) }
    }

    /// This item will not be carried out, however often it is sent.
    async fn condemn(
        &mut self,
        batch: &mut Batch,
        item: Item,
        error: DeliveryError,
        report: &mut Report,
    ) -> Result<(), DeliveryError> {
        let is_refused = matches!(error, DeliveryError::Refused { .. });
        match item.ban {
            Ban::Forward(_) => {}
            Ban::Pool { .. } if is_refused => {}
            Ban::Everything => {
                batch.left.push_front(item);
                return Err(error);
            }
            Ban::Tags { .. } | Ban::Keys { .. } | Ban::Pool { .. } => {
                batch.left.push_front(item);
                self.takes_this_form().await.map_err(|_| error)?;
                batch.widen();
                report.widened = true;
                return Ok(());
            }
        }
        let reason = match error {
            DeliveryError::Refused { status } | DeliveryError::Failed { status } => format!("it answered {status}"),
            other => causes(&other).to_string(),
        };
        let reason = reason.into();
        report.refused.extend(fingerprint_of_ban(&item.ban).map(|refused| (refused, reason)));
        Ok(())
    }

    /// Whether the node takes purges of tags as it is sent them: told by one of a tag that no page has.
    async fn takes_this_form(&mut self) -> Result<(), DeliveryError> {
        let purge = Purge { targets: vec![Purged::Tags(TagSet::no_page_has())], soft: false };
        let bans = compile([&purge], self.settings.delivery, self.settings.header_limit).bans;
        let bans: Vec<&Ban> = bans.iter().collect();
        let mut answers = Vec::new();
        self.link.round_trip(&bans, PATIENCE, &mut answers).await?;
        match answers.first() {
            Some(Answer::Done { .. }) => Ok(()),
            Some(Answer::Failed { status }) => Err(DeliveryError::of_status(*status)),
            None => Err(DeliveryError::Timeout(PATIENCE)),
        }
    }
}
