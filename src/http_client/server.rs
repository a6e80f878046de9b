//! A connection to a server that a URL of the configuration names, by TLS where that says `https`.
//!
//! The files with CAs are read again for each connection, which is kept as long as it goes, so a new CA is found without a
//! restart. A certificate that is not accepted is named with the setting that decides it: what rustls says ("UnknownIssuer")
//! names no key of ours.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, pem};
use rustls::version::{TLS12, TLS13};
use rustls::{CertificateError, ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::HttpConnection;
use crate::config::ServerUrl;

/// The keys of the configuration that say where a server is and who signs its certificate, for messages.
#[derive(Clone, Copy, Debug)]
pub struct ServerKeys {
    /// The key of the URL, such as `traces.endpoint`.
    pub url: &'static str,
    /// The key of the file with CAs, such as `traces.ca`.
    pub ca: &'static str,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there, or the name does not resolve.
    #[error("no connection: {0}")]
    Tcp(io::Error),
    /// The file with CAs cannot be read.
    #[error("{key} = {}: {cause}", file.display())]
    Ca {
        /// The key of the file.
        key: &'static str,
        /// The file.
        file: PathBuf,
        /// Why.
        cause: pem::Error,
    },
    /// It has none.
    #[error("{key} = {}: no certificate in it can be used", file.display())]
    EmptyCa {
        /// The key of the file.
        key: &'static str,
        /// The file.
        file: PathBuf,
    },
    /// No file is named, and the system has no CAs.
    #[error("this system has no CAs: name those of the server in {key}{}", cause.as_ref().map(|cause| format!(" ({cause})")).unwrap_or_default())]
    NoSystemCas {
        /// The key of the file.
        key: &'static str,
        /// What the system says.
        cause: Option<rustls_native_certs::Error>,
    },
    /// Its certificate was signed by somebody else.
    #[error("its certificate is of no CA in {key} = {}", file.display())]
    OfAnotherCa {
        /// The key of the file.
        key: &'static str,
        /// The file.
        file: PathBuf,
    },
    /// The same without a file.
    #[error("its certificate is of no CA that this system trusts: name its CA in {key}")]
    OfNoSystemCa {
        /// The key of the file.
        key: &'static str,
    },
    /// Its certificate is for another name.
    #[error("its certificate is not for {host}, the host of {key}")]
    OfAnotherName {
        /// The key of the URL.
        key: &'static str,
        /// The host.
        host: String,
    },
    /// Its certificate is not valid any more.
    #[error("its certificate has expired")]
    Expired,
    /// Its certificate is not accepted for another reason.
    #[error("its certificate is not accepted: {0}")]
    Refused(CertificateError),
    /// It does not answer as TLS does.
    #[error("what answers there speaks no TLS, and {key} says https")]
    NoTls {
        /// The key of the URL.
        key: &'static str,
    },
    /// The handshake failed.
    #[error("no TLS: {0}")]
    Tls(io::Error),
    /// What is configured cannot be used.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
    /// hyper's.
    #[error("no connection: {0}")]
    Http(#[from] hyper::Error),
}

/// Connects to this server, without a limit of time. `ca` is the file with the CAs of its certificate; `None`: those that
/// this system trusts.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(url: &ServerUrl, ca: Option<&Path>, keys: ServerKeys) -> Result<HttpConnection, ConnectError> {
    let tls = if url.is_encrypted() { Some(client_config(ca, keys)?) } else { None };
    let stream = TcpStream::connect(url.host_port()).await.map_err(ConnectError::Tcp)?;
    let Some(tls) = tls else { return Ok(HttpConnection::over(stream).await?) };
    let of_another_name = || ConnectError::OfAnotherName { key: keys.url, host: url.host().to_owned() };
    let name = ServerName::try_from(url.host().to_owned()).map_err(|_| of_another_name())?;
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await;
    Ok(HttpConnection::over(stream.map_err(|error| refused(error, url, ca, keys))?).await?)
}

fn client_config(ca: Option<&Path>, keys: ServerKeys) -> Result<ClientConfig, ConnectError> {
    let roots = match ca {
        Some(ca) => roots_of(ca, keys.ca)?,
        None => roots_of_system(keys.ca)?,
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let builder = builder.with_protocol_versions(&[&TLS13, &TLS12])?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn roots_of(ca: &Path, key: &'static str) -> Result<RootCertStore, ConnectError> {
    let unreadable = |cause| ConnectError::Ca { key, file: ca.to_owned(), cause };
    let certificates = CertificateDer::pem_file_iter(ca).map_err(unreadable)?;
    let certificates: Vec<_> = certificates.collect::<Result<_, _>>().map_err(unreadable)?;
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 { Err(ConnectError::EmptyCa { key, file: ca.to_owned() }) } else { Ok(roots) }
}

fn roots_of_system(key: &'static str) -> Result<RootCertStore, ConnectError> {
    let mut found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 { Err(ConnectError::NoSystemCas { key, cause: found.errors.pop() }) } else { Ok(roots) }
}

/// Why a handshake failed.
fn refused(error: io::Error, url: &ServerUrl, ca: Option<&Path>, keys: ServerKeys) -> ConnectError {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        // Its issuer has the name of one of these CAs, but not its key.
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            match ca {
                Some(ca) => ConnectError::OfAnotherCa { key: keys.ca, file: ca.to_owned() },
                None => ConnectError::OfNoSystemCa { key: keys.ca },
            }
        }
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => ConnectError::OfAnotherName { key: keys.url, host: url.host().to_owned() },
        Some(rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => ConnectError::Expired,
        Some(rustls::Error::InvalidCertificate(other)) => ConnectError::Refused(other.clone()),
        Some(rustls::Error::InvalidMessage(_)) => ConnectError::NoTls { key: keys.url },
        _ => ConnectError::Tls(error),
    }
}
