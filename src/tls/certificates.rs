//! Which certificate a client gets.
//!
//! 1. One that has the name of the SNI among its SANs.
//! 2. One that has it by a wildcard: `*.example.com` stands for one label (RFC 9525 section 6.3), so it is
//!    `shop.example.com`, but neither `example.com` nor `a.shop.example.com`. Other places for a `*` match nothing.
//! 3. The first of the configuration. If it is not valid for the name, the client refuses it with a clearer error than
//!    a TLS alert. Clients without SNI get it too: health checks and scripts that know only an address.
//!
//! If several certificates have the name, such as RSA next to ECDSA for old clients, the first whose signature the
//! client can verify is served.
//!
//! The common name is ignored: current clients ignore it too (RFC 9525 section 2), so they would refuse a certificate
//! that was chosen by it.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::certificate::Certificate;

type ByName = HashMap<String, Vec<Arc<CertifiedKey>>>;

/// The certificates of a listener, in the order of the configuration; never empty.
pub(super) struct Certificates {
    all: Vec<Certificate>,
    default: Arc<CertifiedKey>,
    exact: ByName,
    /// By the domain after `*.`.
    wildcard: ByName,
}

impl Certificates {
    pub(super) fn new(all: Vec<Certificate>) -> Option<Self> {
        let default = Arc::clone(&all.first()?.key);
        let (mut exact, mut wildcard) = (ByName::new(), ByName::new());
        for certificate in &all {
            for name in &certificate.names {
                let (map, name) = match name.strip_prefix("*.") {
                    Some(domain) => (&mut wildcard, domain),
                    None => (&mut exact, name.as_str()),
                };
                map.entry(name.to_owned()).or_default().push(Arc::clone(&certificate.key));
            }
        }
        Some(Certificates { all, default, exact, wildcard })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Certificate> {
        self.all.iter()
    }

    pub(super) fn warn(&self) {
        self.all.iter().for_each(Certificate::warn);
    }

    /// The certificates for a name, the first configured first.
    fn named(&self, name: &str) -> &[Arc<CertifiedKey>] {
        let name = name.to_ascii_lowercase();
        let by_wildcard = || self.wildcard.get(name.split_once('.')?.1);
        let found = self.exact.get(&name).or_else(by_wildcard);
        found.map_or(std::slice::from_ref(&self.default), Vec::as_slice)
    }

    /// The certificate for a client that sent this SNI, of those that satisfy `can_check` if there are any.
    fn choose(&self, name: Option<&str>, can_check: impl Fn(&CertifiedKey) -> bool) -> Arc<CertifiedKey> {
        let candidates = name.map_or(std::slice::from_ref(&self.default), |name| self.named(name));
        let chosen = match candidates {
            [only] => Some(only),
            several => several.iter().find(|key| can_check(key)).or(several.first()),
        };
        Arc::clone(chosen.unwrap_or(&self.default))
    }
}

/// Chooses the certificate of a handshake, from those in use at that moment.
pub(super) struct Resolver(ArcSwap<Certificates>);

impl Resolver {
    pub(super) fn new(certificates: Certificates) -> Self {
        Resolver(ArcSwap::from_pointee(certificates))
    }

    pub(super) fn replace(&self, certificates: Certificates) {
        self.0.store(Arc::new(certificates));
    }

    pub(super) fn current(&self) -> Arc<Certificates> {
        self.0.load_full()
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let can_check = |key: &CertifiedKey| key.key.choose_scheme(hello.signature_schemes()).is_some();
        Some(self.0.load().choose(hello.server_name(), can_check))
    }
}

impl fmt::Debug for Resolver {
    /// Without the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let current = self.0.load();
        f.debug_list().entries(current.iter().map(|certificate| &certificate.names)).finish()
    }
}
