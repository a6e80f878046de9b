//! What a client must be able to do.
//!
//! rustls has no version and no suite that is known to be weak, so there is nothing to be turned off for safety: this is for who
//! has to fulfil a standard that asks for less than that.

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::version::{TLS12, TLS13};
use rustls::{SignatureAlgorithm, SupportedProtocolVersion};

use crate::config::TlsVersion;

/// The versions and cipher suites of a listener.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsPolicy {
    /// The least version.
    pub min_version: TlsVersion,
    /// IANA names; none: all that there are.
    pub ciphers: Vec<String>,
}

impl TlsPolicy {
    pub(super) fn versions(&self) -> &'static [&'static SupportedProtocolVersion] {
        static FROM_TLS12: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
        static FROM_TLS13: [&SupportedProtocolVersion; 1] = [&TLS13];
        match self.min_version {
            TlsVersion::V12 => &FROM_TLS12,
            TlsVersion::V13 => &FROM_TLS13,
        }
    }

    /// Whether anybody can reach a certificate with such a key.
    pub(super) fn serves(&self, key: SignatureAlgorithm) -> bool {
        let provider = self.provider();
        let suites = provider.cipher_suites.iter().filter(|suite| self.versions().contains(&suite.version()));
        suites.into_iter().any(|suite| suite.usable_for_signature_algorithm(key))
    }

    /// The algorithms, without the suites that are not wanted.
    pub(super) fn provider(&self) -> Arc<CryptoProvider> {
        let mut provider = aws_lc_rs::default_provider();
        if !self.ciphers.is_empty() {
            provider.cipher_suites.retain(|suite| self.ciphers.iter().any(|name| *name == iana_name(*suite)));
        }
        Arc::new(provider)
    }
}

/// The name of a suite in the registry of IANA. rustls writes those of TLS 1.3 as `TLS13_...`.
fn iana_name(suite: rustls::SupportedCipherSuite) -> String {
    format!("{:?}", suite.suite()).replacen("TLS13_", "TLS_", 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CIPHER_SUITES, CIPHER_SUITES_OF_TLS13};

    #[test]
    fn every_suite_that_there_is_has_its_name() {
        let suites = TlsPolicy::default().provider().cipher_suites.clone();
        let names: Vec<String> = suites.iter().map(|suite| iana_name(*suite)).collect();
        let mut known = CIPHER_SUITES.map(str::to_owned).to_vec();
        assert!(known[..CIPHER_SUITES_OF_TLS13].iter().all(|name| !name.contains("_WITH_")), "{known:?}");
        let mut names = names;
        names.sort();
        known.sort();
        assert_eq!(names, known);
    }

    #[test]
    fn only_the_suites_that_are_named_are_left() {
        let ciphers = vec!["TLS_AES_128_GCM_SHA256".to_owned(), "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256".to_owned()];
        let policy = TlsPolicy { min_version: TlsVersion::V12, ciphers };
        let left: Vec<String> = policy.provider().cipher_suites.iter().map(|suite| iana_name(*suite)).collect();
        assert_eq!(left, policy.ciphers);
        assert!(policy.serves(SignatureAlgorithm::ECDSA), "by TLS 1.3");
        let of_rsa = TlsPolicy { ciphers: policy.ciphers[1..].to_vec(), ..policy };
        assert!(of_rsa.serves(SignatureAlgorithm::RSA) && !of_rsa.serves(SignatureAlgorithm::ECDSA));
        let strict = TlsPolicy { min_version: TlsVersion::V13, ..TlsPolicy::default() };
        assert_eq!(strict.versions(), [&TLS13]);
    }
}
