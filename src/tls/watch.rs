//! Reloads renewed certificates automatically.
//!
//! Compares the contents of the files, not their times: Kubernetes renews a secret by swapping a symbolic link, certbot
//! and `cp -p` keep times, and inotify sees neither a link in a parent folder nor a network file system. A read of a
//! few kilobytes every few seconds costs nothing.
//!
//! Two files cannot be replaced atomically. A check between the two replacements finds a certificate and a key that do
//! not match: that is a failure like any other, the old pair stays in use, and the next check finds the new one.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::telemetry::{IncidentKind, Metrics, causes};

use super::{Tls, TlsError};

/// The longest time until a renewed certificate is used.
pub const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Checks the files of `tls` at once and then at the interval `every`, and reloads changed ones. Logs and counts every
/// success, and a failure once until it changes. Publishes the ends of validity in `metrics`, and removes them when it
/// is dropped. Never returns. For the control plane; reads on a blocking thread.
pub async fn watch(tls: Arc<Tls>, metrics: Arc<Metrics>, every: Duration) {
    let mut watcher = Watcher::new(tls, metrics);
    let mut looks = tokio::time::interval(every);
    // After the machine was suspended one check is enough.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        watcher.look().await;
    }
}

pub(super) struct Watcher {
    tls: Arc<Tls>,
    metrics: Arc<Metrics>,
    /// The text of the ongoing failure, as logged.
    failure: Option<String>,
    /// The files whose ends of validity are in the metrics.
    published: BTreeSet<PathBuf>,
}

impl Watcher {
    pub(super) fn new(tls: Arc<Tls>, metrics: Arc<Metrics>) -> Self {
        Watcher { tls, metrics, failure: None, published: BTreeSet::new() }
    }

    pub(super) async fn look(&mut self) {
        let tls = Arc::clone(&self.tls);
        match tokio::task::spawn_blocking(move || tls.reload()).await {
            Ok(outcome) => self.report(outcome),
            // A panic, or the end of the runtime, which drops this task too.
            Err(error) => tracing::error!(error = %causes(&error), "certificates could not be looked at"),
        }
        let mut published = BTreeSet::new();
        for (cert, not_after) in self.tls.expiries() {
            self.metrics.tls_certificate(&cert.to_string_lossy(), not_after);
            published.insert(cert);
        }
        // A reload of the configuration may have brought others.
        self.forget(&published);
        self.published = published;
    }

    /// Removes the ends of those that are not served any more.
    fn forget(&self, served: &BTreeSet<PathBuf>) {
        for cert in self.published.difference(served) {
            self.metrics.forget_tls_certificate(&cert.to_string_lossy());
        }
    }

    fn report(&mut self, outcome: Result<bool, TlsError>) {
        match outcome {
            Ok(true) => {
                tracing::info!("renewed certificates are in use");
                self.metrics.count_tls_reload(true);
                self.recover();
            }
            Ok(false) => {
                if self.recover() {
                    tracing::info!("the certificate files are again those that are in use");
                }
            }
            Err(error) => {
                let text = error.to_string();
                if self.failure.as_ref() != Some(&text) {
                    tracing::error!(error = %causes(&error), "renewed certificates cannot be used; those in use stay");
                    self.metrics.count_tls_reload(false);
                    self.metrics.incidents.note(IncidentKind::CertificateRefused, &text);
                    self.failure = Some(text);
                }
            }
        }
    }

    /// The files are good now. Returns whether they were not.
    fn recover(&mut self) -> bool {
        let had_failed = self.failure.take().is_some();
        if had_failed {
            self.metrics.incidents.end(IncidentKind::CertificateRefused);
        }
        had_failed
    }
}

impl Drop for Watcher {
    /// The expiry of a certificate that is not served any more must not trigger alerts. If another listener serves it,
    /// its next check publishes it again.
    fn drop(&mut self) {
        self.forget(&BTreeSet::new());
    }
}
