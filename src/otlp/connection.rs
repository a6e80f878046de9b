//! The connection to the collector, by TLS where its endpoint says `https`.
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

use crate::config::OtlpEndpoint;
use crate::http_client::HttpConnection;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("no connection: {0}")]
    Tcp(io::Error),
    #[error("traces.ca = {}: {cause}", file.display())]
    Ca { file: PathBuf, cause: pem::Error },
    #[error("traces.ca = {}: no certificate in it can be used", .0.display())]
    EmptyCa(PathBuf),
    #[error("this system has no CAs: name those of the collector in traces.ca{}", .0.as_ref().map(|cause| format!(" ({cause})")).unwrap_or_default())]
    NoSystemCas(Option<rustls_native_certs::Error>),
    #[error("its certificate is of no CA in traces.ca = {}", .0.display())]
    OfAnotherCa(PathBuf),
    #[error("its certificate is of no CA that this system trusts: name its CA in traces.ca")]
    OfNoSystemCa,
    #[error("its certificate is not for {0}, the host of traces.endpoint")]
    OfAnotherName(String),
    #[error("its certificate has expired")]
    Expired,
    #[error("its certificate is not accepted: {0}")]
    Refused(CertificateError),
    #[error("what answers there speaks no TLS, and traces.endpoint says https")]
    NoTls,
    #[error("no TLS: {0}")]
    Tls(io::Error),
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
    #[error("no connection: {0}")]
    Http(#[from] hyper::Error),
}

/// Connects to this collector.
pub(super) async fn connect(endpoint: &OtlpEndpoint, ca: Option<&Path>) -> Result<HttpConnection, ConnectError> {
    let tls = if endpoint.is_encrypted() { Some(client_config(ca)?) } else { None };
    let stream = TcpStream::connect(endpoint.host_port()).await.map_err(ConnectError::Tcp)?;
    let Some(tls) = tls else { return Ok(HttpConnection::over(stream).await?) };
    let name = ServerName::try_from(endpoint.host().to_owned())
        .map_err(|_| ConnectError::OfAnotherName(endpoint.host().to_owned()))?;
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, stream).await;
    Ok(HttpConnection::over(stream.map_err(|error| refused(error, endpoint, ca))?).await?)
}

fn client_config(ca: Option<&Path>) -> Result<ClientConfig, ConnectError> {
    let roots = match ca {
        Some(ca) => roots_of(ca)?,
        None => roots_of_system()?,
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let builder = builder.with_protocol_versions(&[&TLS13, &TLS12])?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn roots_of(ca: &Path) -> Result<RootCertStore, ConnectError> {
    let unreadable = |cause| ConnectError::Ca { file: ca.to_owned(), cause };
    let certificates = CertificateDer::pem_file_iter(ca).map_err(unreadable)?;
    let certificates: Vec<_> = certificates.collect::<Result<_, _>>().map_err(unreadable)?;
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 { Err(ConnectError::EmptyCa(ca.to_owned())) } else { Ok(roots) }
}

fn roots_of_system() -> Result<RootCertStore, ConnectError> {
    let mut found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 { Err(ConnectError::NoSystemCas(found.errors.pop())) } else { Ok(roots) }
}

/// Why a handshake failed.
fn refused(error: io::Error, endpoint: &OtlpEndpoint, ca: Option<&Path>) -> ConnectError {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        // Its issuer has the name of one of these CAs, but not its key.
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            ca.map_or(ConnectError::OfNoSystemCa, |ca| ConnectError::OfAnotherCa(ca.to_owned()))
        }
        Some(rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => ConnectError::OfAnotherName(endpoint.host().to_owned()),
        Some(rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => ConnectError::Expired,
        Some(rustls::Error::InvalidCertificate(other)) => ConnectError::Refused(other.clone()),
        Some(rustls::Error::InvalidMessage(_)) => ConnectError::NoTls,
        _ => ConnectError::Tls(error),
    }
}
