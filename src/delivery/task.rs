//! The loop of one delivery task.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::budget::Budget;
use super::dispatch::{Dispatch, Report};
use super::pending_fills::PendingFills;
use super::redelivery::{RedeliveryQueue, RedeliveryRange};
use super::refusal::{Owed, Refused};
use super::steps::CursorStep;
use super::walk::{Batch, Sources, Walk};
use super::{Deliveries, DeliveryContext, DeliveryState, on_a_thread};
use crate::backoff::Backoff;
use crate::clock;
use crate::fleet::{CacheDoubts, FILL_LATENCY, FaultKind, Node, NodeFault, VarnishSettings};
use crate::journal::{CursorState, Missed, Position};
use crate::purge::Target;
use crate::telemetry::traces::{DayTime, DeliveryNote};
use crate::telemetry::{NodeMetrics, VarnishMetrics, causes};
use crate::varnish::http::DeliveryError;

/// The bounds of the pauses after failures; each pause is a random share.
const BACKOFF: Backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_secs(5) };

/// The minimum of the random pause.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);

/// The pause after a refusal: somebody has to change a VCL first.
const PAUSE_REFUSED: Duration = Duration::from_secs(30);

/// The delay after which a node that was stopped gets its bans again. Within this time, a Varnish that resumes stores the
/// pages that waited in its sockets.
const AFTER_STALL: Duration = Duration::from_millis(250);

/// The number of repetitions to a node that is stopped again and again, before its acknowledgements count all the same.
const MAX_STALLS: u32 = 8;

/// Redeliveries with due times this close to each other are sent together.
const GRAIN: Duration = Duration::from_millis(25);

/// The number of grains in `purge.settle`, for the same purpose.
const SETTLE_GRAINS: u32 = 8;

/// The number of refused requests to remember per node, so that redeliveries and replays do not try them again.
const MAX_REFUSED: usize = 256;

/// Keeps one node at the head of the journal.
pub(super) struct Task {
    deliveries: Arc<Deliveries>,
    node: Arc<Node>,
    state: Arc<DeliveryState>,
    metrics: Arc<NodeMetrics>,
    sources: Sources,
    dispatch: Dispatch,
    /// `None`: no limit.
    budget: Option<Budget>,
    /// The ration that the budget was made for.
    ration: Option<NonZeroU32>,
    failures: u32,
    /// The flush that is wanted of it, once it was begun.
    flush_attempt: Option<FlushAttempt>,
    /// The bans that the node took since its cursor moved.
    bans: u64,
    /// The current work, with its progress.
    work: Option<Work>,
    /// Logged already: the node's VCL does not drop everything.
    flushes_in_part: bool,
    /// Whether `sent` is valid. If not, it is unknown what the node has.
    known: bool,
    /// The node was sent every ban up to here. The cursor follows once none of them has to be repeated.
    sent: Position,
    /// Sent, and to be repeated before the cursor may pass, because a page may have been in flight.
    unsure: RedeliveryQueue,
    /// The pages for which the first range of `unsure` waits.
    fills: Option<PendingFills>,
    /// A page was in flight when one of the ranges of `unsure` was sent.
    saw_fills: bool,
    /// Repetitions of the first range of `unsure` that did not count.
    stalls: u32,
    /// Repetitions of the first recalled range that did not count.
    recall_stalls: u32,
    /// When the sealed purges that gather are sent.
    gathered_at: Option<Instant>,
    /// Where a ban of everything was sent that makes the cache a sealed one, once it is acknowledged, and how often the cache
    /// was doubted before.
    emptied_at: Option<(Position, CacheDoubts)>,
    /// Acknowledged, and to be repeated after `purge.settle`.
    settling: RedeliveryQueue,
    refused: Vec<Refused>,
}

/// A walk with its progress.
struct Work {
    kind: Kind,
    walk: Walk,
    began: Instant,
    /// The current step, if it is not finished.
    batch: Option<Batch>,
    report: Report,
    folded: u64,
    flushes: u32,
    /// How often the cache was doubted before anything of this was sent.
    doubts: CacheDoubts,
}

/// A flush that is wanted, from when it is first sent until it counts.
struct FlushAttempt {
    /// How often the cache was doubted, and told purges once, and how often the flush was wanted, before.
    doubts: CacheDoubts,
    told: Option<u64>,
    times: u64,
    /// The pages that were on their way before it was sent first.
    fills: PendingFills,
    /// It was sent.
    is_sent: bool,
    /// Repetitions that did not count.
    stalls: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Purges that the node was never sent.
    New,
    /// A flush that is wanted of it, with what it was never sent.
    Flush,
    /// Purges that must be repeated before they count.
    Repeat,
    /// Acknowledged purges that another replica could not deliver.
    Recalled,
    /// Purges of pages that it still has: this ban of them.
    Caught(u64),
    /// Purges that count, repeated for pages that were fetched past the guard.
    Settle,
}

/// Why a node made no progress.
#[derive(Debug, thiserror::Error)]
enum Setback {
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    /// The node may have missed purges by URL, for which a ban of everything that has tags is not enough.
    #[error(
        "it missed purges by URL that are no longer held, and its VCL does not say that a flush drops pages without tags: \
         have it answer `X-Clearcoat-Flush: all` as the VCL of `clearcoat vcl` does (docs/vcl.md)"
    )]
    Uncovered,
    /// The same for a purge that it refuses.
    #[error(
        "it does not take a purge that was answered as done while it was away, and its VCL does not say that a flush drops \
         pages without tags: have it take the purge, or answer `X-Clearcoat-Flushed: all` as the VCL of `clearcoat vcl` does \
         (docs/vcl.md)"
    )]
    Refused,
}

impl Setback {
    fn kind(&self) -> FaultKind {
        match self {
            Setback::Delivery(error) => error.kind(),
            Setback::Uncovered | Setback::Refused => FaultKind::FlushesInPart,
        }
    }
}

impl Kind {
    /// What was caught, before it is taken.
    const CAUGHT: Kind = Kind::Caught(0);

    /// Its name in a span.
    fn as_str(self) -> &'static str {
        match self {
            Kind::New => "new",
            Kind::Flush => "flush",
            Kind::Repeat => "repeat",
            Kind::Recalled => "recalled",
            Kind::Caught(_) => "caught",
            Kind::Settle => "settle",
        }
    }
}

impl Task {
    pub(super) fn new(
        deliveries: Arc<Deliveries>,
        node: Arc<Node>,
        settings: &VarnishSettings,
        state: Arc<DeliveryState>,
    ) -> Self {
        let DeliveryContext { journal, guard, pace, started, .. } = &deliveries.context;
        let remembered = journal.remembered(node.id(), settings.epoch.as_deref());
        deliveries.begin_cache(&node, remembered);
        if matches!(remembered, CursorState::CacheRestarted) && deliveries.has_other_origins() {
            // There is little in it, and nobody knows from whom: then it counts as sealed.
            state.wanted_flush.want();
        }
        deliveries.begin_reliance(&node, &state.wanted_flush);
        let cursor = match remembered {
            CursorState::At(position) => Some(position),
            // A new cache has this name, and it is unknown since when it stores pages, and which purges went to the cache
            // before it. So it gets all purges that the journal holds, which costs an empty cache nothing.
            CursorState::CacheRestarted => match journal.remembered(node.id(), None) {
                CursorState::At(position) => Some(position.min(journal.floor())),
                _ => None,
            },
            CursorState::Unknown => None,
        };
        // A cursor beyond the head belongs to another journal.
        let cursor = cursor.filter(|&position| position <= journal.head());
        // A journal without history has made no promise yet.
        let known = cursor.is_some() || !journal.has_history();
        state.known.store(known, Ordering::SeqCst);
        let cursor = cursor.unwrap_or(0);
        node.live.set_cursor(cursor);
        if cursor < journal.head() {
            state.late.mark_late();
        }
        let ration = deliveries.ration();
        let budget = ration.map(|limit| Budget::new(limit, pace.longest_wait, Instant::now()));
        let mut settling = RedeliveryQueue::new(pace.redelivery_delay.unwrap_or_default() / SETTLE_GRAINS);
        if let Some(settle) = pace.redelivery_delay {
            // These were acknowledged to an earlier process, which may have ended before it repeated them.
            let young = journal.older_than(settle);
            if young < cursor {
                settling.push(young, cursor, Instant::now() + settle);
            }
        }
        Task {
            metrics: deliveries.context.metrics.node(node.spec.role(), node.id()),
            sources: Sources {
                journal: Arc::clone(journal),
                guard: Arc::clone(guard),
                address: node.spec.address,
                settings: settings.clone(),
            },
            dispatch: Dispatch::new(node.spec.address, settings.clone(), Arc::clone(&node.live), *started),
            budget,
            ration,
            failures: 0,
            flush_attempt: None,
            bans: 0,
            work: None,
            flushes_in_part: false,
            known,
            sent: cursor,
            unsure: RedeliveryQueue::new(GRAIN),
            fills: None,
            saw_fills: false,
            stalls: 0,
            recall_stalls: 0,
            gathered_at: None,
            emptied_at: None,
            settling,
            refused: Vec::new(),
            deliveries,
            node,
            state,
        }
    }

    pub(super) async fn run(mut self) {
        let mut head = self.deliveries.context.journal.watch();
        loop {
            if self.work.is_none() {
                let Some(work) = self.next(&mut head).await else { return };
                self.work = Some(work);
            }
            match self.go_on().await {
                Ok(()) => {
                    self.failures = 0;
                    *self.state.fault.lock() = None;
                }
                Err(setback) => self.back_off(&setback).await,
            }
        }
    }

    /// Waits for the next work. `None` if the journal is closed, at the end of the process.
    async fn next(&mut self, head: &mut watch::Receiver<Position>) -> Option<Work> {
        loop {
            let (kind, after, last) = self.due(head).await?;
            if kind == Kind::CAUGHT {
                return Some(self.take_caught().await);
            }
            if kind == Kind::Repeat && self.waits_for_pages(after.unwrap_or(0), last) {
                continue;
            }
            if kind == Kind::Flush && self.flush_waits_for_pages() {
                continue;
            }
            // A recall may be for a purge that the node passed over.
            let refused = if matches!(kind, Kind::Recalled) { Vec::new() } else { self.refused.clone() };
            let walk = Walk::new(after, last, refused);
            return Some(Work {
                kind,
                walk: if kind == Kind::Flush { walk.with_flush() } else { walk },
                began: Instant::now(),
                batch: None,
                report: Report::default(),
                folded: 0,
                flushes: 0,
                doubts: self.node.live.seals.doubts(),
            });
        }
    }

    /// What was caught of it, as one ban.
    async fn take_caught(&mut self) -> Work {
        let (head, sources, at) = (self.sources.journal.head(), self.sources.clone(), self.sent);
        let caught = Arc::clone(&self.state.caught);
        let taken = caught.take(head);
        let number = taken.number;
        let batch = on_a_thread(move || Batch::of(&caught.purge(&taken, &sources, head), at, &sources)).await;
        if let Some(budget) = &mut self.budget {
            budget.spend(batch.listed(), Instant::now());
        }
        Work {
            kind: Kind::Caught(number),
            walk: Walk::new(Some(at), at, Vec::new()),
            began: Instant::now(),
            batch: Some(batch),
            report: Report::default(),
            folded: 0,
            flushes: 0,
            doubts: self.node.live.seals.doubts(),
        }
    }

    /// A new ration of bans begins with a full bucket.
    fn follow_ration(&mut self, now: Instant) {
        let ration = self.deliveries.ration();
        if ration != self.ration {
            let longest_wait = self.deliveries.context.pace.longest_wait;
            self.ration = ration;
            self.budget = ration.map(|limit| Budget::new(limit, longest_wait, now));
        }
    }

    /// Waits until work is due: its kind, and the range after the first position, up to the second.
    async fn due(&mut self, head: &mut watch::Receiver<Position>) -> Option<(Kind, Option<Position>, Position)> {
        let now = Instant::now();
        self.follow_ration(now);
        let ready = self.budget.as_mut().map_or(now, |budget| budget.ready_at(now));
        let (unsure, settle) = (self.unsure.first(), self.settling.first());
        let (sealed, seals) = (self.deliveries.context.sealed.as_ref(), &self.node.live.seals);
        let (sent, gathered_at, mut hurry) = (self.sent, &mut self.gathered_at, self.state.hurry.subscribe());
        let moved = async {
            let moved = head.wait_for(|&head| head > sent).await.is_ok();
            // Whether it returns seals matters now: whoever waits for a purge does so by now if it does not.
            if let Some(sealed) = sealed.filter(|_| seals.is_sealing()) {
                let until = *gathered_at.get_or_insert_with(|| Instant::now() + sealed.gather());
                tokio::select! {
                    () = sealed.unsealed_after(sent) => {}
                    _ = hurry.wait_for(|wanted| *wanted > sent) => {}
                    () = tokio::time::sleep_until(until.into()) => {}
                }
            }
            // Purges gather during this time. One that somebody waits for alone has nothing to fold with.
            if !self.deliveries.is_awaited_alone(sent) {
                tokio::time::sleep_until(ready.into()).await;
            }
            moved
        };
        let caught = async {
            self.state.caught.due().await;
            tokio::time::sleep_until(ready.into()).await;
        };
        tokio::select! {
            biased;
            range = due(unsure) => Some((Kind::Repeat, Some(range.after), range.last)),
            () = self.state.wanted_flush.due() => {
                Some((Kind::Flush, self.known.then_some(self.sent), self.sources.journal.head()))
            }
            () = caught => Some((Kind::CAUGHT, Some(self.sent), self.sent)),
            range = self.state.recalls.due() => Some((Kind::Recalled, Some(range.after), range.last)),
            moved = moved => {
                let last = self.sources.journal.head();
                moved.then_some((Kind::New, self.known.then_some(self.sent), last))
            }
            range = due(settle.map(|settle| RedeliveryRange { due: settle.due.max(ready), ..settle })) => {
                Some((Kind::Settle, Some(range.after), range.last))
            }
        }
    }

    /// Whether a page concerned by these purges is still in flight to the node, or has only just arrived: then it is too
    /// early to repeat them. Purges that come meanwhile wait for their own pages, after these.
    fn waits_for_pages(&mut self, after: Position, last: Position) -> bool {
        let now = Instant::now();
        self.unsure.close();
        let mut fills = self.fills.take().unwrap_or_else(|| {
            let fills = self.pending_fills(after, last, now);
            if self.saw_fills { fills.seen_before() } else { fills }
        });
        let Sources { guard, address, .. } = &self.sources;
        let postponed = fills.look(guard, address.ip(), &self.deliveries.context.fleet.load(), now);
        if let Some(until) = postponed {
            self.unsure.postpone(until);
            if fills.lasts_long(now) {
                let waits =
                    NodeFault::new(FaultKind::PageUnderWay, "a page that purges concern is still in flight to it");
                let logged = self.state.fault.lock().replace(waits.clone());
                if logged.as_ref() != Some(&waits) {
                    tracing::info!(node = %self.node.id(), after, last, "{waits}: they count when it has arrived");
                }
            }
        }
        self.fills = Some(fills);
        postponed.is_some()
    }

    /// The purges of a range for which it matters which pages are in flight: not those that a seal shows, as the edge catches
    /// a page that was stored after their bans.
    fn pending_fills(&self, after: Position, last: Position, now: Instant) -> PendingFills {
        let mut relies = false;
        let is_shown = |position| {
            let is_shown = self.known && self.deliveries.is_shown_by(&self.node.live, position);
            relies |= is_shown;
            is_shown
        };
        let fills = PendingFills::new(&*self.sources.journal, (after, last), is_shown, now);
        if relies {
            self.deliveries.note_told_once(&self.node, &self.state.wanted_flush);
        }
        fills
    }

    /// Whether a page that was on its way to the node when the flush was sent that is wanted of it is so still, or has only just
    /// arrived: then it is too early to send it again. Begins the flush if it was not sent yet.
    fn flush_waits_for_pages(&mut self) -> bool {
        let now = Instant::now();
        let (guard, fleet) = (&self.sources.guard, self.deliveries.context.fleet.load());
        let address = self.sources.address.ip();
        let Some(attempt) = self.flush_attempt.as_mut().filter(|attempt| attempt.is_sent) else {
            let mut fills = PendingFills::of_pages_with_tags(now);
            // What is on its way now may arrive between the flush and the next look.
            _ = fills.look(guard, address, &fleet, now);
            self.flush_attempt = Some(FlushAttempt {
                doubts: self.node.live.seals.doubts(),
                told: self.deliveries.relying.told(&self.node),
                times: self.state.wanted_flush.times(),
                fills,
                is_sent: false,
                stalls: 0,
            });
            return false;
        };
        let again = attempt.fills.look(guard, address, &fleet, now);
        again.inspect(|again| self.state.wanted_flush.postpone(*again)).is_some()
    }

    /// Completes the current work. After a setback it continues where it was.
    async fn go_on(&mut self) -> Result<(), Setback> {
        let Some(mut work) = self.work.take() else { return Ok(()) };
        let result = self.walk(&mut work).await;
        if result.is_err() {
            self.work = Some(work);
            return result;
        }
        match work.kind {
            Kind::New => self.finish_new(work),
            Kind::Flush => self.finish_flush(work),
            Kind::Repeat => self.finish_repeat(&work),
            Kind::Recalled => self.finish_recall(&work),
            Kind::Caught(number) => {
                self.state.caught.done(number);
            }
            Kind::Settle => self.settling.complete_first(Instant::now()),
        }
        Ok(())
    }

    async fn walk(&mut self, work: &mut Work) -> Result<(), Setback> {
        loop {
            let mut batch = match work.batch.take() {
                Some(batch) => batch,
                None => {
                    // Nothing is compiled for an unreachable node.
                    self.dispatch.connect().await.inspect_err(|error| self.count_failed(error))?;
                    let Some(batch) = next_batch(&work.walk, &self.sources).await else { return Ok(()) };
                    // Not rationed: Varnish drops the first of two equal bans (its parameter `ban_dups`).
                    if let Some(budget) = &mut self.budget
                        && !matches!(work.kind, Kind::Repeat | Kind::Recalled)
                    {
                        budget.spend(batch.listed(), Instant::now());
                    }
                    batch
                }
            };
            let sent_before = work.report.sent;
            let began = Instant::now();
            let result = self.dispatch.send(&mut batch, &mut work.report).await;
            let (bans, kind) = (work.report.sent - sent_before, &work.kind);
            self.bans += bans;
            let (node, position) = (self.node.id(), work.walk.last());
            tracing::debug!(%node, position, bans, ?kind, ok = result.is_ok(), "bans were sent");
            self.count(&result, bans);
            self.note_span((work, &batch), began, bans, &result);
            self.record_refusals(work, &mut batch);
            if let Err(error) = result {
                work.batch = Some(batch);
                return Err(error.into());
            }
            if !work.report.covers(batch.owed) {
                if batch.is_flush {
                    work.walk.forget_flush();
                    return Err(Setback::Refused);
                }
                batch.flush_too();
                work.batch = Some(batch);
                continue;
            }
            if batch.gap.is_some_and(|gap| !work.report.flushed_all && self.deliveries.requests_lie_in(gap)) {
                work.walk.forget_flush();
                return Err(Setback::Uncovered);
            }
            if work.report.flushed_in_part && !std::mem::replace(&mut self.flushes_in_part, true) {
                tracing::warn!(
                    node = %self.node.id(),
                    "everything was to be dropped, but the VCL of this node does not know X-Clearcoat-Flush: pages without tags and \
                     pools stay (`clearcoat vcl` has one that does)"
                );
            }
            work.folded += batch.folded;
            work.flushes += u32::from(batch.is_flush);
            work.walk.advance(&batch);
        }
    }

    /// Records a delivery for the traces of its purges, if there are traces. Of one that fails again and again, the first.
    fn note_span(&self, (work, batch): (&Work, &Batch), began: Instant, bans: u64, result: &Result<(), DeliveryError>) {
        let Some(tracer) = &self.deliveries.context.tracer else { return };
        let positions = work.walk.positions(batch);
        // What was caught is of no purge.
        if positions.is_empty() || result.is_err() && self.failures > 0 {
            return;
        }
        let time = DayTime::now();
        tracer.note_delivery(DeliveryNote {
            positions,
            node: self.node.id().clone(),
            kind: work.kind.as_str(),
            bans,
            error: result.as_ref().err().map(|error| error.kind().as_str()),
            began: time.of(began),
            ended: time.of(Instant::now()),
        });
    }

    /// Records the requests that the node refused, so that they are not sent again, and logs bans that had to be widened.
    fn record_refusals(&mut self, work: &mut Work, batch: &mut Batch) {
        if std::mem::take(&mut work.report.widened) {
            tracing::warn!(node = %self.node.id(), "a ban that this node refuses is carried out as one of everything");
            self.varnish_metrics(|varnish| varnish.flushed.inc());
        }
        for (fingerprint, reason) in std::mem::take(&mut work.report.refused) {
            let refused = work.walk.refuses(fingerprint);
            self.varnish_metrics(|varnish| varnish.passed_over.inc());
            match self.deliveries.record_refusal(self.node.id(), refused, &reason) {
                Owed::Nothing => {}
                // Not remembered: a redelivery is replaced by a flush, too.
                owed => {
                    // These purges count already, so they must not keep the node out.
                    let most = if work.kind == Kind::Settle { Owed::Flush } else { Owed::FlushOfAll };
                    batch.owed = batch.owed.max(owed.min(most));
                    continue;
                }
            }
            if self.refused.len() == MAX_REFUSED {
                self.refused.remove(0);
            }
            self.refused.push(refused);
            work.walk.pass_over(refused);
        }
    }

    /// Completes the first delivery of purges.
    fn finish_new(&mut self, work: Work) {
        let Work { kind, walk, began, report, folded, flushes, doubts, .. } = work;
        let last = walk.last();
        self.state.remember(last, report.invalidated, self.deliveries.expected());
        let repeat = self.repeats_at(last, began, report.stood_still);
        self.deliveries.context.metrics.purge.tags_folded.inc_by(folded);
        if flushes > 0 {
            let node = self.node.id();
            if kind == Kind::Flush {
                tracing::info!(%node, last, "the cache of this node is dropped");
            } else if self.known {
                tracing::warn!(%node, after = self.sent, last, "the backlog of this node cannot be replayed: its cache is dropped");
            } else {
                tracing::info!(%node, last, "this node is new here: it gets one ban of everything, in case its cache is not empty");
            }
            self.varnish_metrics(|varnish| varnish.flushed.inc());
        }
        if let Some(due) = repeat {
            self.unsure.push(self.sent, last, due);
        }
        let is_flush = report.flushed_all || report.flushed_in_part || self.is_flushed_by_a_purge(last);
        if is_flush && kind != Kind::Flush {
            self.emptied_at = Some((last, doubts));
        }
        self.gathered_at = None;
        (self.known, self.sent) = (true, last);
        if repeat.is_none() {
            self.acknowledge(last);
        }
    }

    /// Completes a flush that was wanted, with the purges that went with it. It counts if no page was on its way to the node when it
    /// was sent first, or else when it was sent again after those have arrived.
    fn finish_flush(&mut self, work: Work) {
        let Some(mut attempt) = self.flush_attempt.take() else { return };
        let (node, now) = (Arc::clone(&self.node), Instant::now());
        let due = if !std::mem::replace(&mut attempt.is_sent, true) {
            self.due_for_pages(&mut attempt.fills, (work.began, now), work.report.stood_still)
        } else if self.stood_still(&work, attempt.stalls) {
            attempt.stalls += 1;
            Some(now + AFTER_STALL)
        } else {
            None
        };
        self.finish_new(work);
        if let Some(due) = due {
            self.state.wanted_flush.postpone(due);
            self.flush_attempt = Some(attempt);
            return;
        }
        self.deliveries.record_emptied(&node, attempt.doubts);
        let wanted = &self.state.wanted_flush;
        if !self.deliveries.settle_flush(&node, wanted, (attempt.times, attempt.told)) {
            // One that is wanted again is sent again; one that says nothing has to wait until somebody changes a VCL.
            wanted.postpone(if wanted.times() == attempt.times { now + PAUSE_REFUSED } else { now });
        }
    }

    /// When the bans that were just sent, up to `last`, are due once more before they count; `None` if they count already.
    /// Sending them `began` then; `stood_still`: the node was stopped meanwhile.
    fn repeats_at(&mut self, last: Position, began: Instant, stood_still: bool) -> Option<Instant> {
        let now = Instant::now();
        // Positions are acknowledged in order: while an earlier range awaits redelivery, later ones cannot be acknowledged,
        // so they are repeated with it.
        let behind_others = self.unsure.first().map(|_| now);
        if self.is_sealed_after_sent() {
            if last > self.sent {
                self.deliveries.note_told_once(&self.node, &self.state.wanted_flush);
            }
            return behind_others;
        }
        let mut fills = self.pending_fills(self.sent, last, now);
        let due = self.due_for_pages(&mut fills, (began, now), stood_still);
        self.saw_fills |= fills.are_under_way();
        due.or(behind_others)
    }

    /// When what was sent since `began`, until `now`, is due once more, for pages that may have been on their way to the node;
    /// `None` if there were none. `stood_still`: the node was stopped while it was sent.
    fn due_for_pages(
        &self,
        fills: &mut PendingFills,
        (began, now): (Instant, Instant),
        stood_still: bool,
    ) -> Option<Instant> {
        let DeliveryContext { fleet, started, .. } = &self.deliveries.context;
        let Sources { guard, address, .. } = &self.sources;
        let under_way = fills.look(guard, address.ip(), &fleet.load(), now);
        if stood_still || self.failures > 0 || self.state.late.is_late() {
            return Some(now + AFTER_STALL);
        }
        // Pages that passed before this process started are unknown, so its start counts as such a time.
        let passed = fills.passed.map_or(Duration::ZERO, |at| at.saturating_duration_since(*started));
        // What arrived while bans were sent may have come behind the first of them, whatever the node has taken in since.
        let had_landed = self.node.live.life_signs.taken_in().min(began.saturating_duration_since(*started));
        if passed >= had_landed {
            return Some(now + FILL_LATENCY);
        }
        under_way
    }

    /// Whether one of the purges that were just sent, up to `last`, drops all pages with tags, of a cache that is not known to
    /// be a sealed one. A block without tags is dropped by no purge of tags, so it need not be.
    fn is_flushed_by_a_purge(&self, last: Position) -> bool {
        if !self.deliveries.are_answers_sealed() || self.node.live.seals.cache_is_sealed() {
            return false;
        }
        let Missed::Entries(entries) = self.sources.journal.since(self.sent) else { return false };
        let is_flush = |target: &Target| matches!(target, Target::Everything | Target::All);
        let sent = entries.iter().filter(|entry| entry.position <= last && !entry.purge.soft);
        sent.flat_map(|entry| &entry.purge.targets).any(is_flush)
    }

    /// Whether a seal shows all purges that are sent next, and this node returns seals.
    fn is_sealed_after_sent(&self) -> bool {
        let sealed = self.deliveries.context.sealed.as_ref();
        self.known
            && self.node.live.seals.is_sealing()
            && sealed.is_some_and(|sealed| sealed.all_sealed_after(self.sent))
    }

    fn finish_repeat(&mut self, work: &Work) {
        if self.stood_still(work, self.stalls) {
            self.stalls += 1;
            self.unsure.postpone(Instant::now() + AFTER_STALL);
            return;
        }
        (self.stalls, self.fills) = (0, None);
        self.unsure.complete_first(Instant::now());
        self.saw_fills &= self.unsure.first().is_some();
        self.acknowledge(work.walk.last());
    }

    /// Completes the redelivery of purges that another replica could not deliver.
    fn finish_recall(&mut self, work: &Work) {
        if self.stood_still(work, self.recall_stalls) {
            self.recall_stalls += 1;
            self.state.recalls.postpone(Instant::now() + AFTER_STALL);
            return;
        }
        self.recall_stalls = 0;
        self.state.recalls.complete();
        self.deliveries.notify_progress();
    }

    /// Whether a repetition must be repeated because the node was stopped meanwhile, `stalls` repetitions before it having
    /// been in vain.
    fn stood_still(&self, work: &Work, stalls: u32) -> bool {
        let stood_still = self.failures > 0 || work.report.stood_still;
        if stood_still && stalls >= MAX_STALLS {
            tracing::info!(node = %self.node.id(), "the node answers purges slowly again and again: its answers count all the same");
        }
        stood_still && stalls < MAX_STALLS
    }

    /// Moves the cursor: the node has every purge up to `position`.
    fn acknowledge(&mut self, position: Position) {
        let DeliveryContext { fence, slow_start, .. } = &self.deliveries.context;
        let (before, required) = (self.node.live.acknowledged(), fence.required_of(&self.node.live));
        if before < required && required <= position {
            slow_start.begin(&self.node);
        }
        self.node.live.set_cursor(position);
        let bans = std::mem::take(&mut self.bans);
        if before < position {
            self.state.steps.record(CursorStep { after: before, last: position, at_ms: clock::now_ms(), bans });
        }
        // Every purge behind `after`, up to `position`.
        tracing::debug!(node = %self.node.id(), after = before, position, "purges are applied");
        if let Some((_, doubts)) = self.emptied_at.take_if(|(emptied, _)| *emptied <= position) {
            self.deliveries.record_emptied(&self.node, doubts);
        }
        self.state.known.store(true, Ordering::SeqCst);
        let was_late = self.state.late.mark_on_time();
        self.deliveries.notify_progress();
        if let Some(settle) = self.deliveries.context.pace.redelivery_delay {
            self.settling.push(before, position, Instant::now() + settle);
        }
        if was_late {
            tracing::info!(node = %self.node.id(), position, "node is up to date again");
        }
    }

    fn count(&self, result: &Result<(), DeliveryError>, sent: u64) {
        self.varnish_metrics(|varnish| varnish.bans_sent.inc_by(sent));
        match result {
            Ok(()) => self.varnish_metrics(|varnish| varnish.delivered.inc()),
            Err(error) => self.count_failed(error),
        }
    }

    fn count_failed(&self, error: &DeliveryError) {
        self.varnish_metrics(|varnish| match error {
            DeliveryError::Refused { .. } => varnish.refused.inc(),
            _ => varnish.failed.inc(),
        });
    }

    fn varnish_metrics(&self, count: impl Fn(&VarnishMetrics)) {
        if let Some(varnish) = &self.metrics.varnish {
            count(varnish);
        }
    }

    /// Pauses before the next attempt. A change of the node's health ends the pause.
    async fn back_off(&mut self, setback: &Setback) {
        let fault = NodeFault::new(setback.kind(), causes(setback).to_string());
        let logged = self.state.fault.lock().replace(fault.clone());
        if logged.as_ref() != Some(&fault) {
            let NodeFault { kind, text } = fault;
            tracing::warn!(node = %self.node.id(), fault = %kind, error = &*text, "purges do not reach a node");
        }
        self.failures = self.failures.saturating_add(1);
        let pause = match setback {
            Setback::Uncovered | Setback::Refused | Setback::Delivery(DeliveryError::Refused { .. }) => PAUSE_REFUSED,
            Setback::Delivery(_) => BACKOFF.pause(self.failures, fastrand::f64()).max(SHORTEST_PAUSE),
        };
        _ = tokio::time::timeout(pause, self.state.wake.notified()).await;
    }
}

/// Compiles the next step, on a thread of its own if it is long, so that neither probes nor other nodes wait for it.
async fn next_batch(walk: &Walk, sources: &Sources) -> Option<Batch> {
    if walk.is_short(sources) {
        return walk.next(sources);
    }
    let (walk, sources) = (walk.clone(), sources.clone());
    on_a_thread(move || walk.next(&sources)).await
}

/// Waits until the range is due; for ever without one.
async fn due(range: Option<RedeliveryRange>) -> RedeliveryRange {
    match range {
        Some(range) => {
            tokio::time::sleep_until(range.due.into()).await;
            range
        }
        None => std::future::pending().await,
    }
}
