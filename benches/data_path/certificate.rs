//! The certificate of all peers, and the client that trusts it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};

use crate::messages::HOST;

/// A certificate with an ECDSA key on P-256, as in most shops, in files.
#[derive(Debug)]
pub(crate) struct Certificate {
    pub(crate) chain: PathBuf,
    pub(crate) key: PathBuf,
    /// Both in one file, for HAProxy.
    pub(crate) combined: PathBuf,
    /// Uses TLS 1.3 only, and trusts only this certificate.
    pub(crate) client: Arc<ClientConfig>,
}

impl Certificate {
    /// Generates one in this folder.
    ///
    /// # Errors
    /// If it cannot be generated or written.
    pub(crate) fn create(folder: &Path) -> anyhow::Result<Self> {
        let made = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone())?;
        let client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let certificate = Certificate {
            chain: folder.join("shop.pem"),
            key: folder.join("shop.key"),
            combined: folder.join("shop.combined.pem"),
            client: Arc::new(client),
        };
        std::fs::write(&certificate.chain, &chain)?;
        std::fs::write(&certificate.key, &key)?;
        std::fs::write(&certificate.combined, chain + &key)?;
        Ok(certificate)
    }
}
