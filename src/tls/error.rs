//! What can be wrong with certificate files.

use std::io;
use std::path::PathBuf;

use rustls::pki_types::pem;

/// Why certificates cannot be used. Never repeats the content of a file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A listener without a certificate.
    #[error("no certificate is configured")]
    NoFiles,
    /// A file that cannot be read.
    #[error("{}: cannot be read: {cause}", file.display())]
    Unreadable {
        /// As configured.
        file: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
    /// A file that is too large for a certificate or a key.
    #[error("{}: is larger than {limit} bytes, so it is no certificate or key", file.display())]
    TooLarge {
        /// As configured.
        file: PathBuf,
        /// In bytes.
        limit: u64,
    },
    /// A PEM section that does not end or is not base64 (RFC 7468).
    #[error("{}: is not well-formed PEM: {cause}", file.display())]
    Pem {
        /// As configured.
        file: PathBuf,
        /// What the parser says.
        cause: pem::Error,
    },
    /// A certificate file without a certificate.
    #[error("{}: holds no certificate in PEM form (BEGIN CERTIFICATE)", file.display())]
    NoCertificate {
        /// As configured.
        file: PathBuf,
    },
    /// A certificate that is not valid X.509 v3 (RFC 5280).
    #[error("{}: holds a certificate that is malformed: {reason}", file.display())]
    BadCertificate {
        /// As configured.
        file: PathBuf,
        /// What the parser says.
        reason: String,
    },
    /// A key file without an unencrypted private key.
    #[error("{}: holds no private key in PEM form (PKCS#8, PKCS#1 or SEC1, not encrypted)", file.display())]
    NoPrivateKey {
        /// As configured.
        file: PathBuf,
    },
    /// A private key of a kind or size that is not supported, or malformed.
    #[error("{}: holds a private key that cannot be used: {cause}", file.display())]
    BadPrivateKey {
        /// As configured.
        file: PathBuf,
        /// What the library says.
        cause: rustls::Error,
    },
    /// The private key belongs to another certificate.
    #[error("{}: the private key does not belong to the first certificate in {}", key.display(), cert.display())]
    KeyMismatch {
        /// The certificate file, as configured.
        cert: PathBuf,
        /// The key file, as configured.
        key: PathBuf,
    },
    /// Cipher suites of which none fits the key of any certificate: nobody could connect.
    #[error("{}: no suite of `ciphers` fits its {key:?} key, nor that of another certificate of the address", cert.display())]
    NoSuite {
        /// The first certificate file, as configured.
        cert: PathBuf,
        /// The kind of its key.
        key: rustls::SignatureAlgorithm,
    },
    /// The library cannot be set up, whatever the files.
    #[error("TLS cannot be set up: {0}")]
    Setup(rustls::Error),
}
