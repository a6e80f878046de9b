//! One certificate with its key, from its files.
//!
//! rustls checks that key and certificate belong together. It does not return the names and the validity; `x509-parser`
//! does (`rustls-webpki`, a dependency in any case, returns only the names).

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use xxhash_rust::xxh3::xxh3_128;

use super::TlsError;
use crate::clock;

/// The maximum size of a file in bytes. A long chain with its key takes 20 KiB; a far larger file is the wrong one, or
/// endless.
const MAX_FILE: u64 = 1024 * 1024;

/// Where a certificate is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// PEM: the certificate first, then those of its chain.
    pub cert: PathBuf,
    /// PEM: the private key, in PKCS#8, PKCS#1 or SEC1. May be the file of the certificate (HAProxy's combined form).
    pub key: PathBuf,
}

/// The content of the files of one certificate.
pub(super) struct Contents {
    cert: Vec<u8>,
    /// `None` if the key is in the file of the certificate.
    key: Option<Vec<u8>>,
}

/// Detects changed contents without keeping a copy of the key. The hash need not resist collisions: whoever could cause
/// one can write the files anyway.
pub(super) type Fingerprint = (u128, Option<u128>);

impl Contents {
    pub(super) fn read(files: &CertificateFiles) -> Result<Self, TlsError> {
        let cert = read(&files.cert)?;
        // A combined file is read once: certificate and key must be of the same version.
        let key = if files.key == files.cert { None } else { Some(read(&files.key)?) };
        Ok(Contents { cert, key })
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        (xxh3_128(&self.cert), self.key.as_deref().map(xxh3_128))
    }
}

fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|opened| opened.take(MAX_FILE + 1).read_to_end(&mut bytes));
    match read {
        Ok(len) if len as u64 > MAX_FILE => Err(TlsError::TooLarge { file: file.to_owned(), limit: MAX_FILE }),
        Ok(_) => Ok(bytes),
        Err(cause) => Err(TlsError::Unreadable { file: file.to_owned(), cause }),
    }
}

/// A certificate that can be served.
pub(super) struct Certificate {
    /// Its file as configured, for the log.
    file: PathBuf,
    pub(super) key: Arc<CertifiedKey>,
    /// The DNS names of its SANs, in lower case. The common name is not a host name (RFC 9525 section 2).
    pub(super) names: Vec<String>,
    /// In Unix seconds.
    not_before: i64,
    /// In Unix seconds.
    pub(super) not_after: i64,
}

impl Certificate {
    pub(super) fn parse(
        files: &CertificateFiles,
        contents: &Contents,
        provider: &CryptoProvider,
    ) -> Result<Self, TlsError> {
        let file = &files.cert;
        let chain = CertificateDer::pem_slice_iter(&contents.cert).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|cause| TlsError::Pem { file: file.clone(), cause })?;
        let malformed = |reason: String| TlsError::BadCertificate { file: file.clone(), reason };
        // The whole chain is parsed: a malformed certificate after the first would otherwise fail only at the clients.
        let parsed = chain.iter().map(|der| X509Certificate::from_der(der).map(|(_, parsed)| parsed));
        let parsed = parsed.collect::<Result<Vec<_>, _>>().map_err(|error| malformed(error.to_string()))?;
        let Some(first) = parsed.first() else { return Err(TlsError::NoCertificate { file: file.clone() }) };
        let names = dns_names(first).map_err(&malformed)?;
        let (not_before, not_after) = (first.validity().not_before.timestamp(), first.validity().not_after.timestamp());
        drop(parsed);

        let key_pem = contents.key.as_deref().unwrap_or(&contents.cert);
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|cause| match cause {
            pem::Error::NoItemsFound => TlsError::NoPrivateKey { file: files.key.clone() },
            cause => TlsError::Pem { file: files.key.clone(), cause },
        })?;
        let key = provider.key_provider.load_private_key(key);
        let key = key.map_err(|cause| TlsError::BadPrivateKey { file: files.key.clone(), cause })?;
        let key = Arc::new(CertifiedKey::new(chain, key));
        key.keys_match().map_err(|error| match error {
            Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                TlsError::KeyMismatch { cert: file.clone(), key: files.key.clone() }
            }
            error => malformed(error.to_string()),
        })?;
        Ok(Certificate { file: file.clone(), key, names, not_before, not_after })
    }

    /// Logs problems that do not prevent serving but make clients refuse the certificate.
    pub(super) fn warn(&self) {
        let file = self.file.display();
        // A clock before 1970 finds every certificate not yet valid.
        let now = i64::try_from(clock::now_ms() / 1000).unwrap_or(i64::MAX);
        if self.not_after < now {
            tracing::warn!(cert = %file, not_after = self.not_after, "the certificate has expired");
        }
        if self.not_before > now {
            tracing::warn!(cert = %file, not_before = self.not_before, "the certificate is not valid yet");
        }
        if self.names.is_empty() {
            tracing::warn!(cert = %file, "the certificate has no DNS names (SANs), so only a first one is ever served");
        }
    }
}

fn dns_names(certificate: &X509Certificate<'_>) -> Result<Vec<String>, String> {
    let names = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
    let names = names.iter().flat_map(|extension| &extension.value.general_names);
    Ok(names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect())
}
