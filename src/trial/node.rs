//! The trial of one node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use super::page::{RenderedPage, TrialPage};
use super::{Trials, UnsealedCache, Whose};
use crate::backoff::Backoff;
use crate::fleet::{Node, PurgeDialect, ReturnsSeals, SealsShown, TrialState, VarnishSettings};
use crate::purge::{Ban, compile};
use crate::telemetry::causes;
use crate::varnish::http::{Answer, DeliveryError, OwnPage, PurgeClient};

/// The timeout of one step.
const STEP: Duration = Duration::from_secs(2);

/// The pause before each attempt while trials prove nothing, and its host: with several clearcoats, the Varnish may
/// have asked another one for the page; and a VCL may not know the host that a client has sent.
const ATTEMPTS: [(Duration, Whose); 4] = [
    (Duration::ZERO, Whose::Client),
    (Duration::from_millis(300), Whose::Configured),
    (Duration::from_secs(1), Whose::Client),
    (Duration::from_secs(1), Whose::Configured),
];

/// How often a page is requested until the same one comes twice.
const ASKED: usize = 5;

/// The pause before each purge while the page is still there.
const PURGED: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(250)];

/// The interval after a trial, unless the node comes up before: short if an operator has to change something.
const AGAIN_PASSED: Duration = Duration::from_secs(600);
const AGAIN_INCONCLUSIVE: Duration = Duration::from_secs(60);
const AGAIN_FAILED: Duration = Duration::from_secs(5);

/// The same after trials in a row that said nothing of seals, until which purges wait for the node: a clearcoat that began at the
/// same moment may have kept them from it.
const AGAIN_UNSAID: Backoff = Backoff { min: AGAIN_FAILED, max: AGAIN_PASSED };

/// The number of trials in a row that say nothing of seals, after which none is expected to.
const UNSAID: u32 = 3;

/// The time between a trial and one that only the node's answers ask for, which grows while such trials show that it returns seals:
/// it writes pages itself, and whoever asks for those must not keep it busy with trials.
const AFTER_QUESTION: Backoff = Backoff { min: AGAIN_FAILED, max: AGAIN_PASSED };

/// What calls for a trial.
pub(super) struct TrialCalls {
    /// The node has come up.
    pub(super) wake: Arc<Notify>,
    /// Its answers leave in doubt whether it returns seals.
    pub(super) question: Arc<Notify>,
}

/// Tries a node whenever it is woken, when its answers ask for that, and now and then.
pub(super) async fn run(trials: Arc<Trials>, node: Arc<Node>, settings: VarnishSettings, calls: TrialCalls) {
    let TrialCalls { wake, question } = calls;
    wake.notified().await;
    let (mut unsaid, mut questions) = (0_u32, 0_u32);
    loop {
        node.live.trial_begins();
        let TrialVerdict { state, finding, seals } = try_node(&trials, &node, &settings).await;
        // Of one that is down nothing is said either way.
        unsaid = if seals.is_some() || node.live.is_down() { 0 } else { unsaid.saturating_add(1) };
        // First: a flush of a node that carries no purges out proves nothing.
        let state = trials.publish(&node, state, &finding);
        match seals.or_else(|| after_silence(unsaid, node.live.seals.returned())) {
            Some(seals) => trials.record_seals(&node, seals),
            None if unsaid >= UNSAID => trials.treat(node.id(), UnsealedCache::GiveUp),
            None => {}
        }
        let pause = match state {
            TrialState::Failed | TrialState::WithoutTags => AGAIN_FAILED,
            TrialState::Inconclusive => AGAIN_INCONCLUSIVE,
            TrialState::Passed | TrialState::Untried if unsaid > 0 => AGAIN_UNSAID.bound(unsaid),
            TrialState::Passed | TrialState::Untried => AGAIN_PASSED,
        };
        let ended = Instant::now();
        let is_asked = AtomicBool::new(false);
        let questioned = async {
            question.notified().await;
            is_asked.store(true, Ordering::Relaxed);
            let pause = if questions == 0 { Duration::ZERO } else { AFTER_QUESTION.bound(questions) };
            sleep_until(ended + pause).await;
        };
        questions = tokio::select! {
            () = wake.notified() => 0,
            () = questioned => questions.saturating_add(1),
            // The trial answers the question, if there is one.
            () = sleep(pause.mul_f64(0.9 + 0.2 * fastrand::f64())) => if is_asked.load(Ordering::Relaxed) { questions } else { 0 },
        };
    }
}

/// What so many trials in a row show that said nothing of seals: a node that `returned` them has ceased to, whatever becomes of our
/// page there.
fn after_silence(unsaid: u32, returned: ReturnsSeals) -> Option<SealsShown> {
    (unsaid >= UNSAID && returned == ReturnsSeals::Yes).then_some(SealsShown::NotReturned)
}

/// What a trial says of a node.
struct TrialVerdict {
    state: TrialState,
    /// That in words; empty if all is well.
    finding: String,
    /// Whether the node keeps seals with its pages. `None` if nothing was seen of that.
    seals: Option<SealsShown>,
}

/// One trial.
async fn try_node(trials: &Trials, node: &Node, settings: &VarnishSettings) -> TrialVerdict {
    let mut why = String::new();
    for (number, (pause, whose)) in ATTEMPTS.into_iter().enumerate() {
        sleep(pause).await;
        // A node may take no page with such a long field: then it is tried without. Of seals that says nothing: what kept the
        // pages before it away may have been a moment's trouble, for which no cache is dropped.
        let (page, host) = (TrialPage::new(number < 2), trials.host(whose));
        let link = PurgeClient::to(node.spec.address, settings, STEP);
        let trial = Trial { settings, page, host, link };
        match trial.run().await {
            Ok(conclusion) => return conclusion,
            Err(reason) => why = reason,
        }
    }
    let finding = format!("whether purges take pages out of this Varnish could not be tried: {why}");
    TrialVerdict { state: TrialState::Inconclusive, finding, seals: None }
}

/// A page as a node has answered it.
struct NodeAnswer {
    page: RenderedPage,
    seal: Option<Vec<u8>>,
}

/// A page under trial on a node.
struct Trial<'t> {
    settings: &'t VarnishSettings,
    page: TrialPage,
    host: String,
    link: PurgeClient,
}

impl Trial<'_> {
    /// The result, or why the trial proves nothing.
    async fn run(mut self) -> Result<TrialVerdict, String> {
        let (name, seals) = self.stored().await?;
        let verdict = |state, finding| TrialVerdict { state, finding, seals };
        let configured = self.settings.delivery;
        if self.is_gone(&name, configured).await? {
            return Ok(verdict(TrialState::Passed, String::new()));
        }
        let unpurged =
            if seals == Some(SealsShown::NotReturned) { SealsShown::NotReturned } else { SealsShown::NotPurged };
        for other in [PurgeDialect::Magento, PurgeDialect::MagentoPlain, PurgeDialect::Xkey] {
            if other != configured && self.is_gone(&name, other).await? {
                let finding = format!(
                    "purges do not take pages out of this Varnish: its VCL does not carry out delivery = \"{configured}\", but \
                     \"{other}\"; set that for the node. It gets no traffic"
                );
                return Ok(TrialVerdict { seals: Some(unpurged), ..verdict(TrialState::Failed, finding) });
            }
        }
        let finding = "no purge by tags takes pages out of this Varnish, in no form of delivery: once tags are purged, it \
                       gets no traffic. Its VCL must ban by X-Magento-Tags-Pattern, or purge by xkey-purge (`clearcoat vcl`)";
        Ok(TrialVerdict { seals: Some(unpurged), ..verdict(TrialState::WithoutTags, finding.to_owned()) })
    }

    /// The name of the page once the node caches it, and whether it has kept the seal with it, if the page had one.
    async fn stored(&mut self) -> Result<(String, Option<SealsShown>), String> {
        let mut before = None;
        for _ in 0..ASKED {
            let now = self.ask().await?;
            match now {
                Ok(NodeAnswer { page, seal }) if before.as_ref() == Some(&page.name) => {
                    let is_sealed = self.page.has_seal(&page, seal.as_deref());
                    let shown = |is_sealed| if is_sealed { SealsShown::Returned } else { SealsShown::NotReturned };
                    return Ok((page.name, is_sealed.map(shown)));
                }
                Ok(NodeAnswer { page, .. }) => before = Some(page.name),
                // The node may have asked a clearcoat of an older version.
                Err(404) => {}
                Err(status) => return Err(format!("it answers {status} for our page")),
            }
        }
        Err(match before {
            Some(_) => "it does not keep our page".to_owned(),
            None => {
                "it does not fetch our page from our origin listener, or its VCL answers the path itself".to_owned()
            }
        })
    }

    /// Whether a purge in this form drops the page.
    async fn is_gone(&mut self, name: &str, delivery: PurgeDialect) -> Result<bool, String> {
        let bans = compile([&self.page.purge()], delivery, self.settings.header_limit).bans;
        let (bans, mut answers): (Vec<&Ban>, _) = (bans.iter().collect(), Vec::new());
        for pause in PURGED {
            sleep(pause).await;
            self.link.round_trip(&bans, STEP, &mut answers).await.map_err(|error| causes(&error).to_string())?;
            for answer in &answers {
                match *answer {
                    Answer::Done { .. } => {}
                    // The node understood the purge, but refused it.
                    Answer::Failed { status: ..500 } => return Ok(false),
                    Answer::Failed { status } => return Err(DeliveryError::of_status(status).to_string()),
                }
            }
            // Twice: a softly purged page is served once more.
            for _ in 0..2 {
                match self.ask().await? {
                    Ok(now) if now.page.name == name => {}
                    Ok(_) | Err(404) => return Ok(true),
                    Err(status) => return Err(format!("it answers {status} for our page")),
                }
            }
        }
        Ok(false)
    }

    /// Requests the page. The status of an answer without one is an error of the inner kind.
    async fn ask(&mut self) -> Result<Result<NodeAnswer, u16>, String> {
        let request = self.page.request(&self.host);
        let asked = self.link.ask(request.as_bytes()).await.map_err(|error| causes(&error).to_string())?;
        let OwnPage { status, seal, body } = asked;
        let page = RenderedPage::read(&body).filter(|_| status == 200);
        Ok(page.map(|page| NodeAnswer { page, seal }).ok_or(status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_shows_no_seals_for_three_trials_has_ceased_to() {
        for (unsaid, returned, shown) in [
            (UNSAID - 1, ReturnsSeals::Yes, None),
            (UNSAID, ReturnsSeals::Yes, Some(SealsShown::NotReturned)),
            (UNSAID, ReturnsSeals::Unknown, None),
            (UNSAID, ReturnsSeals::No, None),
        ] {
            assert_eq!(after_silence(unsaid, returned), shown, "{unsaid} {returned:?}");
        }
    }
}
