//! Certificates, an echo server, and clients that accept any certificate and report it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{CertificateParams, DnType, KeyPair, PKCS_RSA_SHA256, date_time_ymd};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, Tls12Resumption};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ProducesTickets;
use rustls::{ClientConfig, DigitallySignedStruct, Error, HandshakeKind, SignatureScheme, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::der_parser::parse_der;

use super::{CertificateFiles, Tls};

/// A self-signed certificate and its key, as PEM and as DER.
pub(super) struct Issued {
    pub(super) cert: String,
    pub(super) der: CertificateDer<'static>,
    /// PKCS#8
    pub(super) key: String,
    key_der: Vec<u8>,
}

impl Issued {
    pub(super) fn for_names(names: &[&str]) -> Self {
        Self::new(&params(names), &KeyPair::generate().unwrap())
    }

    pub(super) fn rsa(names: &[&str]) -> Self {
        Self::new(&params(names), &KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap())
    }

    pub(super) fn with_common_name(name: &str) -> Self {
        let mut params = params(&[]);
        params.distinguished_name.push(DnType::CommonName, name);
        Self::new(&params, &KeyPair::generate().unwrap())
    }

    /// Valid until the first moment of a year.
    pub(super) fn ending(names: &[&str], year: i32) -> Self {
        let mut params = params(names);
        params.not_after = date_time_ymd(year, 1, 1);
        Self::new(&params, &KeyPair::generate().unwrap())
    }

    fn new(params: &CertificateParams, key: &KeyPair) -> Self {
        let cert = params.self_signed(key).unwrap();
        let (pem, der) = (cert.pem(), cert.der().clone());
        Issued { cert: pem, der, key: key.serialize_pem(), key_der: key.serialize_der() }
    }

    /// The key in the form that PKCS#8 wraps (RFC 5958: the octet string behind version and algorithm).
    pub(super) fn inner_key(&self, label: &str) -> String {
        let (_, wrapped) = parse_der(&self.key_der).unwrap();
        let inner = wrapped.as_sequence().unwrap()[2].as_slice().unwrap();
        pem::encode(&pem::Pem::new(label, inner))
    }
}

fn params(names: &[&str]) -> CertificateParams {
    CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap()
}

/// A folder of certificate files that is removed after the test.
pub(super) struct Folder(tempfile::TempDir);

impl Folder {
    pub(super) fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn write(&self, name: &str, issued: &Issued) -> CertificateFiles {
        let files =
            CertificateFiles { cert: self.path(&format!("{name}.pem")), key: self.path(&format!("{name}.key")) };
        fs::write(&files.cert, &issued.cert).unwrap();
        fs::write(&files.key, &issued.key).unwrap();
        files
    }
}

/// Echoes what it gets, until it is dropped.
pub(super) struct EchoServer {
    address: SocketAddr,
    task: AbortHandle,
}

impl EchoServer {
    pub(super) async fn start(tls: &Tls) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(tls.config().load_full());
        let task = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    // Some tests abort the handshake on purpose.
                    let Ok(stream) = acceptor.accept(socket).await else { return };
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        EchoServer { address, task: task.abort_handle() }
    }

    /// Sends bytes that need not be TLS, and returns everything received until the connection ends.
    pub(super) async fn answer_to(&self, bytes: &[u8]) -> Vec<u8> {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        answer
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A client with a session cache.
pub(super) struct TlsClient(ClientConfig);

impl TlsClient {
    pub(super) fn of(version: &'static SupportedProtocolVersion) -> Self {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = AnyCertificate {
            algorithms: provider.signature_verification_algorithms,
            schemes: provider.signature_verification_algorithms.supported_schemes(),
        };
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        TlsClient(builder.with_no_client_auth())
    }

    /// Checks signatures of this kind only.
    pub(super) fn checking(mut self, scheme: SignatureScheme) -> Self {
        let algorithms = self.0.crypto_provider().signature_verification_algorithms;
        let verifier = AnyCertificate { algorithms, schemes: vec![scheme] };
        self.0.dangerous().set_certificate_verifier(Arc::new(verifier));
        self
    }

    pub(super) fn offering(mut self, protocols: &[&[u8]]) -> Self {
        self.0.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        self
    }

    pub(super) fn resuming_by(mut self, way: Tls12Resumption) -> Self {
        self.0.resumption = Resumption::in_memory_sessions(8).tls12_resumption(way);
        self
    }

    pub(super) fn wishing_for_early_data(mut self) -> Self {
        self.0.enable_early_data = true;
        self
    }

    pub(super) fn config(&self) -> Arc<ClientConfig> {
        Arc::new(self.0.clone())
    }

    /// Connects. An IP address is not sent as SNI.
    pub(super) async fn connect(&self, server: &EchoServer, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let socket = TcpStream::connect(server.address).await?;
        TlsConnector::from(self.config()).connect(name, socket).await
    }
}

/// Sends and gets back a few bytes.
pub(super) async fn echo(stream: &mut TlsStream<TcpStream>) {
    stream.write_all(b"ping").await.unwrap();
    let mut back = [0; 4];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"ping");
}

/// The certificate that the server has sent.
pub(super) fn served(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

pub(super) fn kind(stream: &TlsStream<TcpStream>) -> HandshakeKind {
    stream.get_ref().1.handshake_kind().unwrap()
}

/// Leaves all resumption to the stored sessions.
#[derive(Debug)]
pub(super) struct NoTickets;

impl ProducesTickets for NoTickets {
    fn enabled(&self) -> bool {
        false
    }

    fn lifetime(&self) -> u32 {
        0
    }

    fn encrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn decrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

/// Accepts every certificate, whatever its name, but verifies that the server has its key.
#[derive(Debug)]
struct AnyCertificate {
    algorithms: WebPkiSupportedAlgorithms,
    schemes: Vec<SignatureScheme>,
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}
