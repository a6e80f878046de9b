//! Certificates generated on the spot, and a TLS client that reports what it saw.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, HandshakeKind, SignatureScheme, StreamOwned,
    SupportedProtocolVersion,
};

use super::PATIENCE;
use super::client::{Answer, Connection, Ending};

/// A self-signed certificate and its key.
pub struct Issued {
    pub der: CertificateDer<'static>,
    pub pem: String,
    pub key: String,
}

impl Issued {
    pub fn for_names(names: &[&str]) -> Self {
        Self::ended_in(names, None)
    }

    /// One whose time is over since the end of this year.
    pub fn ended_in(names: &[&str], year: Option<i32>) -> Self {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(names).expect("names");
        if let Some(year) = year {
            parameters.not_after = rcgen::date_time_ymd(year, 12, 31);
        }
        let certificate = parameters.self_signed(&key).expect("a certificate");
        Issued { der: certificate.der().clone(), pem: certificate.pem(), key: key.serialize_pem() }
    }

    /// Writes both files, or replaces them.
    pub fn write(&self, folder: &Path, name: &str) -> Files {
        let files = Files { cert: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
        std::fs::write(&files.key, &self.key).expect("a file");
        std::fs::write(&files.cert, &self.pem).expect("a file");
        files
    }
}

/// The files of a certificate and its key.
#[derive(Clone, Debug)]
pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Files {
    /// One table of the configuration. `listen` is an address whose port may be 0.
    pub fn toml(&self, listen: &str) -> String {
        let (cert, key) = (self.cert.display(), self.key.display());
        format!("[[edge.tls]]\nlisten = [\"{listen}\"]\ncert = \"{cert}\"\nkey = \"{key}\"\n")
    }
}

/// A client with a session cache that accepts any certificate: the test checks which one it got.
#[derive(Clone)]
pub struct Client(Arc<ClientConfig>);

impl Client {
    /// Uses one TLS version, and offers these protocols (ALPN).
    pub fn of(version: &'static SupportedProtocolVersion, protocols: &[&[u8]]) -> Self {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = AnyCertificate(provider.signature_verification_algorithms);
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]);
        let builder = builder.expect("a version").dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = builder.with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Client(Arc::new(config))
    }

    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0)
    }

    /// Connects and performs the handshake. A name that is an address is not sent (SNI has no addresses).
    pub fn connect(&self, address: SocketAddr, name: &str) -> io::Result<Session> {
        Session::over(Connection::open(address)?.stream, self.config(), name)
    }
}

/// A TLS connection that is kept between requests.
pub struct Session {
    pub tls: StreamOwned<ClientConnection, TcpStream>,
    input: Vec<u8>,
}

impl Session {
    /// Performs the handshake on this socket.
    pub fn over(socket: TcpStream, config: Arc<ClientConfig>, name: &str) -> io::Result<Self> {
        let name = ServerName::try_from(name.to_owned()).expect("a server name");
        let connection = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let mut tls = StreamOwned::new(connection, socket);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        Ok(Session { tls, input: Vec::new() })
    }

    /// The server's certificate.
    pub fn served(&self) -> CertificateDer<'static> {
        self.tls.conn.peer_certificates().expect("a certificate")[0].clone().into_owned()
    }

    /// Whether an earlier session was resumed.
    pub fn resumed(&self) -> bool {
        self.tls.conn.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.tls.write_all(bytes.as_ref())?;
        self.tls.flush()
    }

    /// Reads the head of an answer.
    pub fn head(&mut self) -> io::Result<Answer> {
        let end = self.find(b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&self.input[..end - 4]).into_owned();
        self.input.drain(..end);
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        Ok(Answer { status, head, body: Vec::new(), trailers: String::new() })
    }

    /// Reads an answer whose end follows from its head.
    pub fn answer(&mut self) -> io::Result<Answer> {
        let mut answer = self.head()?;
        if let Some(length) = answer.header("Content-Length") {
            answer.body = self.exactly(length.parse().expect("a length"))?;
            return Ok(answer);
        }
        assert!(answer.header("Transfer-Encoding").is_some(), "an answer without an end: {answer:?}");
        loop {
            let end = self.find(b"\r\n")?;
            let line = String::from_utf8_lossy(&self.input[..end - 2]).into_owned();
            self.input.drain(..end);
            let size = usize::from_str_radix(&line, 16).expect("a chunk size");
            answer.body.append(&mut self.exactly(size)?);
            assert_eq!(self.exactly(2)?, b"\r\n", "the end of a chunk");
            if size == 0 {
                return Ok(answer);
            }
        }
    }

    /// Sends a GET and reads its answer.
    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: shop.test\r\n\r\n"))?;
        self.answer()
    }

    /// The rest of the bytes, and the end: [`Ending::Clean`] is an end that TLS itself announced (`close_notify`),
    /// which no intermediary can forge.
    pub fn rest(&mut self) -> (Vec<u8>, Ending) {
        let ending = loop {
            match self.read_more() {
                Ok(0) => break Ending::Clean,
                Ok(_) => {}
                Err(error) => {
                    use io::ErrorKind::{TimedOut, WouldBlock};
                    break if matches!(error.kind(), TimedOut | WouldBlock) { Ending::Open } else { Ending::Reset };
                }
            }
        };
        (std::mem::take(&mut self.input), ending)
    }

    /// The number of bytes up to and including this mark.
    fn find(&mut self, mark: &[u8]) -> io::Result<usize> {
        loop {
            if let Some(at) = self.input.windows(mark.len()).position(|window| window == mark) {
                return Ok(at + mark.len());
            }
            self.more()?;
        }
    }

    /// Reads this many bytes.
    pub fn exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        self.input.reserve(length.saturating_sub(self.input.len()));
        while self.input.len() < length {
            self.more()?;
        }
        let rest = self.input.split_off(length);
        Ok(std::mem::replace(&mut self.input, rest))
    }

    fn more(&mut self) -> io::Result<()> {
        if self.read_more()? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn read_more(&mut self) -> io::Result<usize> {
        let mut piece = [0; 64 * 1024];
        let read = self.tls.read(&mut piece)?;
        self.input.extend_from_slice(&piece[..read]);
        Ok(read)
    }
}

/// A client socket without a TLS handshake.
pub fn socket(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).expect("the edge accepts");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    stream.set_nodelay(true).expect("a socket option");
    stream
}

/// Accepts every certificate, whatever its name, but checks that the server has its key.
#[derive(Debug)]
struct AnyCertificate(WebPkiSupportedAlgorithms);

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
        verify_tls12_signature(message, cert, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
