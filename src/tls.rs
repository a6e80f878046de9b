//! TLS at the edge: from certificate files to a [`ServerConfig`], and their renewal while it is in use.
//!
//! # One configuration, certificates behind it
//!
//! A listener has one [`ServerConfig`] for as long as its [`TlsPolicy`] stays the same. What changes otherwise is behind its
//! certificate resolver. Both are an `ArcSwap` that a handshake loads once, so a reload is one store of each. Open connections keep the keys of their handshake,
//! and none is closed, delayed or refused: new certificates are read and checked in full before the old ones are
//! replaced, and if one of them is invalid all old ones stay.
//!
//! Which certificate a client gets is decided in `tls/certificates.rs`: the names of the SANs against SNI.
//!
//! # Resumption
//!
//! A full handshake costs a signature and a key exchange, a resumed one (TLS 1.3) only the exchange. Tickets are sealed
//! with keys of [`Resumption`], not of a certificate, and all listeners share them: a client that comes back after a
//! renewal, or to another listener, resumes. rustls resumes only under the same SNI (RFC 6066 section 3), so a ticket
//! of one shop is of no use at another. The keys are random, never written to disk, and change every six hours; tickets
//! are valid for twelve hours at most. For TLS 1.2 clients without tickets there is a bounded cache of sessions. Both
//! are behind locks that only handshakes take, never a request on an open connection.
//!
//! # What is off
//!
//! 0-RTT: a recorded first flight of a client can be replayed (RFC 8446 section 8), and neither Varnish nor PHP could
//! detect that. Half-RTT data, which is sent before the client has finished its handshake: an HTTP server has nothing
//! to send first. TLS 1.0 and 1.1 (RFC 8996), which rustls does not have. Client certificates.

mod certificate;
mod certificates;
mod error;
mod policy;
#[cfg(test)]
mod tests;
mod watch;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ProducesTickets, ServerSessionMemoryCache, StoresServerSessions};

use certificate::{Certificate, Contents, Fingerprint};
use certificates::{Certificates, Resolver};

pub use certificate::CertificateFiles;
pub use error::TlsError;
pub use policy::TlsPolicy;
pub use watch::{LOOK_EVERY, watch};

/// The number of sessions that can be resumed without a ticket, at about 300 bytes each. Every full TLS 1.2 handshake
/// adds one, and the oldest is evicted. Nearly all clients use tickets, so few need it.
const MAX_SESSIONS: usize = 4096;

/// The ticket keys and the session cache for resumption. One for all listeners of the process, kept over a reload of
/// the configuration.
#[derive(Clone)]
pub struct Resumption {
    ticketer: Arc<dyn ProducesTickets>,
    sessions: Arc<dyn StoresServerSessions>,
}

impl Resumption {
    /// With new random keys: sessions of another process or of an earlier value cannot be resumed.
    ///
    /// # Errors
    /// [`TlsError::Setup`] if the system gives no random bytes.
    pub fn new() -> Result<Self, TlsError> {
        let ticketer = aws_lc_rs::Ticketer::new().map_err(TlsError::Setup)?;
        Ok(Resumption { ticketer, sessions: ServerSessionMemoryCache::new(MAX_SESSIONS) })
    }
}

/// The TLS side of one listener.
pub struct Tls {
    resolver: Arc<Resolver>,
    resumption: Resumption,
    http2: bool,
    config: Arc<ArcSwap<ServerConfig>>,
    /// Locked during a reload, so that two reloads do not interleave.
    loaded: Mutex<LoadedFiles>,
}

/// The certificates in use: their files, what was in them, and for whom they are.
struct LoadedFiles {
    files: Vec<CertificateFiles>,
    fingerprints: Vec<Fingerprint>,
    policy: TlsPolicy,
}

/// Certificates that were read and found good, and are not in use yet.
pub struct PreparedCertificates {
    loaded: LoadedFiles,
    certificates: Certificates,
    config: Arc<ServerConfig>,
}

impl Tls {
    /// Loads certificates for the only listener of a process. With several, use [`Tls::load_sharing`].
    ///
    /// # Errors
    /// As [`Tls::load_sharing`].
    pub fn load(files: &[CertificateFiles], http2: bool) -> Result<Self, TlsError> {
        Self::load_sharing(files, http2, &TlsPolicy::default(), &Resumption::new()?)
    }

    /// Loads certificates for a listener that shares its resumption with others. The first certificate is the default,
    /// for clients without SNI and for names that no certificate has. `http2` offers `h2` beside `http/1.1` (ALPN).
    ///
    /// Reads files, and blocks meanwhile. An expired certificate is only logged as a warning: a shop whose visitors see
    /// a browser warning is better than one that is down.
    ///
    /// # Errors
    /// The first file that cannot be used, and why.
    pub fn load_sharing(
        files: &[CertificateFiles],
        http2: bool,
        policy: &TlsPolicy,
        resumption: &Resumption,
    ) -> Result<Self, TlsError> {
        let contents = read(files)?;
        let resolver = Arc::new(Resolver::new(parse(files, &contents, policy)?));
        let config = server_config(&resolver, http2, policy, resumption)?;
        let fingerprints = fingerprints(&contents);
        let loaded = LoadedFiles { files: files.to_vec(), fingerprints, policy: policy.clone() };
        Ok(Tls {
            resolver,
            resumption: resumption.clone(),
            http2,
            config: Arc::new(ArcSwap::new(config)),
            loaded: Mutex::new(loaded),
        })
    }

    /// The configuration for a `tokio_rustls::TlsAcceptor`: each handshake loads it, as another policy makes another one.
    pub fn config(&self) -> Arc<ArcSwap<ServerConfig>> {
        Arc::clone(&self.config)
    }

    /// Reads the files again, and uses changed ones for new connections. Returns whether any changed.
    ///
    /// Reads files, and blocks meanwhile: must not be called on a worker. [`mod@watch`] counts and logs its own calls;
    /// any other caller counts with `Metrics::count_tls_reload`.
    ///
    /// # Errors
    /// The first file that cannot be used, and why. All certificates stay as they were then.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let mut loaded = self.loaded.lock();
        let contents = read(&loaded.files)?;
        let fingerprints = fingerprints(&contents);
        if loaded.fingerprints == fingerprints {
            return Ok(false);
        }
        self.resolver.replace(parse(&loaded.files, &contents, &loaded.policy)?);
        loaded.fingerprints = fingerprints;
        Ok(true)
    }

    /// Reads certificates that are to take the place of those in use: other files, or the same; and makes what goes with this
    /// policy.
    ///
    /// Reads files, and blocks meanwhile.
    ///
    /// # Errors
    /// The first file that cannot be used, and why.
    pub fn prepare(&self, files: &[CertificateFiles], policy: &TlsPolicy) -> Result<PreparedCertificates, TlsError> {
        let contents = read(files)?;
        let certificates = parse(files, &contents, policy)?;
        let config = server_config(&self.resolver, self.http2, policy, &self.resumption)?;
        let fingerprints = fingerprints(&contents);
        let loaded = LoadedFiles { files: files.to_vec(), fingerprints, policy: policy.clone() };
        Ok(PreparedCertificates { loaded, certificates, config })
    }

    /// Uses these certificates, and this policy, for new connections. Returns whether the certificates are others than before.
    pub fn replace(&self, PreparedCertificates { loaded: new, certificates, config }: PreparedCertificates) -> bool {
        let mut loaded = self.loaded.lock();
        let are_others = (&loaded.files, &loaded.fingerprints) != (&new.files, &new.fingerprints);
        self.resolver.replace(certificates);
        if loaded.policy != new.policy {
            self.config.store(config);
        }
        *loaded = new;
        are_others
    }

    /// The end of validity of every certificate in use (`notAfter`, in Unix seconds), by its file as configured.
    pub fn expiries(&self) -> Vec<(PathBuf, i64)> {
        let loaded = self.loaded.lock();
        let current = self.resolver.current();
        let files = loaded.files.iter().map(|files| files.cert.clone());
        files.zip(current.iter().map(|certificate| certificate.not_after)).collect()
    }
}

impl fmt::Debug for Tls {
    /// Without the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.loaded.lock().files).finish_non_exhaustive()
    }
}

/// What handshakes go by.
fn server_config(
    resolver: &Arc<Resolver>,
    http2: bool,
    policy: &TlsPolicy,
    resumption: &Resumption,
) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(policy.provider())
        .with_protocol_versions(policy.versions())
        .map_err(TlsError::Setup)?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::clone(resolver) as _);
    let protocols: &[&[u8]] = if http2 { &[b"h2", b"http/1.1"] } else { &[b"http/1.1"] };
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    config.ticketer = Arc::clone(&resumption.ticketer);
    config.session_storage = Arc::clone(&resumption.sessions);
    // The defaults of rustls, written down because the module's promise depends on them.
    config.max_early_data_size = 0;
    config.send_half_rtt_data = false;
    Ok(Arc::new(config))
}

fn read(files: &[CertificateFiles]) -> Result<Vec<Contents>, TlsError> {
    files.iter().map(Contents::read).collect()
}

fn parse(files: &[CertificateFiles], contents: &[Contents], policy: &TlsPolicy) -> Result<Certificates, TlsError> {
    let provider = policy.provider();
    let each = files.iter().zip(contents).map(|(files, contents)| Certificate::parse(files, contents, &provider));
    let certificates = Certificates::new(each.collect::<Result<_, _>>()?).ok_or(TlsError::NoFiles)?;
    certificates.warn();
    let keys = || files.iter().zip(certificates.iter().map(|certificate| certificate.key.key.algorithm()));
    if !keys().any(|(_, key)| policy.serves(key)) {
        let (files, key) = keys().next().ok_or(TlsError::NoFiles)?;
        return Err(TlsError::NoSuite { cert: files.cert.clone(), key });
    }
    for (files, key) in keys().filter(|(_, key)| !policy.serves(*key)) {
        tracing::warn!(certificate = %files.cert.display(), ?key, "no suite of `ciphers` fits the key of this certificate: nobody gets it");
    }
    Ok(certificates)
}

fn fingerprints(contents: &[Contents]) -> Vec<Fingerprint> {
    contents.iter().map(Contents::fingerprint).collect()
}
