//! A certificate authority for one etcd and its clients, generated on the spot.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use etcd_client::{Certificate, Identity, TlsOptions};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::super::tls::Files;

/// The certificate files of an etcd and its clients, of one authority.
pub struct Certificates {
    pub ca: PathBuf,
    pub server: Files,
    pub client: Files,
}

impl Certificates {
    /// Makes an authority, a server certificate for this address, and a client certificate, as files in this folder.
    pub fn make(folder: &Path, ip: Ipv4Addr) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "authority of a test");
        let authority = CertifiedIssuer::self_signed(params, key()).expect("a certificate");
        let ca = folder.join("ca.pem");
        std::fs::write(&ca, authority.pem()).expect("a file in our folder");
        let issue = |name: &str, subjects: Vec<String>| {
            let mut params = CertificateParams::new(subjects).expect("names");
            params.distinguished_name.push(DnType::CommonName, name);
            let key = key();
            let certificate = params.signed_by(&key, &authority).expect("a certificate");
            let files = Files { cert: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
            std::fs::write(&files.cert, certificate.pem()).expect("a file in our folder");
            std::fs::write(&files.key, key.serialize_pem()).expect("a file in our folder");
            files
        };
        Certificates { ca, server: issue("server", vec![ip.to_string()]), client: issue("client", vec![]) }
    }

    /// The options of a client that trusts the server and has a certificate.
    pub fn for_client(&self) -> TlsOptions {
        self.without_client().identity(Identity::from_pem(read(&self.client.cert), read(&self.client.key)))
    }

    /// The options of a client that trusts the server, but has no certificate.
    pub fn without_client(&self) -> TlsOptions {
        TlsOptions::new().ca_certificate(Certificate::from_pem(read(&self.ca)))
    }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

fn read(file: &Path) -> Vec<u8> {
    std::fs::read(file).expect("our file")
}
