//! Sends one batch to one Varnish, and finds out who is to blame for a failure.
//!
//! If a request fails, either the node is at fault (it hangs, its ACL is wrong, it is about to end) or the request is: it
//! was refused, broke the connection or got no answer, and would do so again. The first must keep the node out of traffic
//! until it is repaired, the second must not. So:
//!
//! - Answered requests of a batch are done, whatever follows them.
//! - A request that failed becomes a *suspect*: from then on it is sent alone, and each time just after the node has obeyed
//!   a test request ([`PurgeEndpoint::obeys`](crate::varnish::http::PurgeEndpoint::obeys)). If the node does not obey, it is
//!   at fault itself, and the request gets no strike.
//! - A suspect that is refused (4xx) at that point is refused for good. One that fails otherwise fails for good the second
//!   time. It is passed over, and the waiting sender is told. If its sender was already told that it is done, because the
//!   node was fenced at the time, a ban of everything replaces it ([`Owed`]).
//! - Our own bans are never passed over, because pages would stay that a sender believes purged. If the node accepts another
//!   ban of the same form, this ban is at fault and becomes a ban of everything; otherwise the node is at fault.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::refusal::{Owed, fingerprint_of_ban};
use super::walk::{Batch, Item};
use crate::fleet::{Live, VarnishSettings};
use crate::purge::{Ban, Purge, TagSet, Target as Purged, compile};
use crate::telemetry::causes;
use crate::varnish::http::{Answer, DeliveryError, PIPELINE, PurgeClient};

/// The timeout for connecting, for writing, and for an answer of a node that answers nothing else. Longer than a healthy
/// Varnish needs, and short enough to retry soon after a hang.
const ATTEMPT: Duration = Duration::from_secs(2);

/// The timeout of an answer before the node is tested with another request: this time, or this number of its round trips.
const PATIENCE: Duration = Duration::from_millis(400);
const PATIENT_ROUND_TRIPS: u32 = 8;

/// The number of failures without a refusal after which a suspect is given up.
const STRIKES: u32 = 2;

/// The result of a batch.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// The number of objects that the node said it dropped.
    pub(super) invalidated: u64,
    /// The fingerprints of requests that the node refuses although it accepts others, with the reasons.
    pub(super) refused: Vec<(u64, Arc<str>)>,
    /// The node confirmed that a ban of everything dropped pages without tags and pools, too.
    pub(super) flushed_all: bool,
    /// The node carried out a ban of everything without that confirmation.
    pub(super) flushed_in_part: bool,
    /// The node was stopped for a while.
    pub(super) stood_still: bool,
    /// A refused ban was replaced by one of everything.
    pub(super) widened: bool,
    /// The number of bans and requests that the node accepted.
    pub(super) sent: u64,
}

impl Report {
    /// Whether the accepted bans of everything are enough for this.
    pub(super) fn covers(&self, owed: Owed) -> bool {
        match owed {
            Owed::Nothing => true,
            Owed::Flush => self.flushed_all || self.flushed_in_part,
            Owed::FlushOfAll => self.flushed_all,
        }
    }
}

/// The connection to one Varnish, with the state of its pipeline.
pub(super) struct Dispatch {
    link: PurgeClient,
    settings: VarnishSettings,
    live: Arc<Live>,
    /// When the process started.
    started: Instant,
    /// The number of requests in flight at once: reduced after a failure, and 1 for a node that closes after each answer.
    window: usize,
    answers: Vec<Answer>,
}

impl Dispatch {
    pub(super) fn new(address: SocketAddr, settings: VarnishSettings, live: Arc<Live>, started: Instant) -> Self {
        let link = PurgeClient::to(address, &settings, ATTEMPT);
        Dispatch { link, settings, live, started, window: PIPELINE, answers: Vec::new() }
    }

    /// Connects if there is no connection, so that nothing expensive is done for an unreachable node.
    pub(super) async fn connect(&mut self) -> Result<(), DeliveryError> {
        self.link.connect().await
    }

    /// Sends the rest of the batch. On success the batch is empty; an error means that the node is at fault.
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

    /// Sends the first `count` requests and collects their answers in `self.answers`.
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

    /// Removes answered requests from the batch. Returns the number of answers.
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

    /// Handles the first request without an answer: either it or the node is at fault.
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
        // A node that answered nothing else either gets no more requests now.
        if matches!(error, DeliveryError::Timeout(_)) { Err(error) } else { Ok(()) }
    }

    /// Gives up an item that would fail however often it is sent.
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

    /// Whether the node accepts purges of tags in this form, tested with a tag that no page has.
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
