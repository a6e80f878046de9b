//! The sockets of the listeners, and the certificates of those with TLS.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio::net::TcpListener;

use super::Addresses;
use crate::config;
use crate::inherited::InheritedSockets;
use crate::proxy;
use crate::tls::{CertificateFiles, Resumption, Tls, TlsPolicy};

/// Loads the certificates of every address in `edge.tls`. Those of tables with the same address are combined, in the
/// order of the tables.
///
/// # Errors
/// If a certificate file cannot be used; the error names the file.
pub fn load_certificates(edge: &config::Edge) -> anyhow::Result<Vec<(SocketAddr, Arc<Tls>)>> {
    let by_address = certificates_by_address(edge);
    if by_address.is_empty() {
        return Ok(Vec::new());
    }
    let resumption = Resumption::new().context("edge.tls")?;
    let load = |(address, TlsAddress { files, policy }): (SocketAddr, TlsAddress)| {
        let tls = Tls::load_sharing(&files, edge.http2, &policy, &resumption).context("edge.tls")?;
        Ok((address, Arc::new(tls)))
    };
    by_address.into_iter().map(load).collect()
}

/// What the tables of `edge.tls` say of one address.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct TlsAddress {
    /// In the order of the tables.
    pub(super) files: Vec<CertificateFiles>,
    /// All of them have the same: the configuration is refused otherwise.
    pub(super) policy: TlsPolicy,
}

/// The certificates of every address in `edge.tls`, in the order of the tables.
pub(super) fn certificates_by_address(edge: &config::Edge) -> Vec<(SocketAddr, TlsAddress)> {
    let mut by_address: Vec<(SocketAddr, TlsAddress)> = Vec::new();
    for table in &edge.tls {
        for address in &table.listen {
            let files = CertificateFiles { cert: table.cert.clone(), key: table.key.clone() };
            match by_address.iter_mut().find(|(known, _)| known == address) {
                Some((_, shared)) => shared.files.push(files),
                None => {
                    let policy = TlsPolicy { min_version: table.min_version, ciphers: table.ciphers.clone() };
                    by_address.push((*address, TlsAddress { files: vec![files], policy }));
                }
            }
        }
    }
    by_address
}

/// The sockets of all listeners.
pub(super) struct BoundSockets {
    /// Of each worker. They do not listen yet.
    pub(super) edge: Vec<Vec<proxy::Listener>>,
    /// The same for Varnish.
    pub(super) origin: Vec<Vec<proxy::Listener>>,
    pub(super) purge: Vec<TcpListener>,
    pub(super) admin: Vec<TcpListener>,
}

impl BoundSockets {
    /// Binds what was not inherited. Also returns the addresses.
    pub(super) async fn bind(
        config: &config::Config,
        certificates: &[(SocketAddr, Arc<Tls>)],
        inherited: InheritedSockets,
        workers: usize,
    ) -> anyhow::Result<(Self, Addresses)> {
        let (mut setup, mut bound) = (ListenerSetup { inherited, workers }, Addresses::default());
        let mut edge = setup.of_workers(&config.edge.listen, "edge", None, &mut bound.edge)?;
        for (address, tls) in certificates {
            let sockets = setup.of_workers(&[*address], "edge.tls", Some(&tls.config()), &mut bound.edge_tls)?;
            edge.iter_mut().zip(sockets).for_each(|(worker, sockets)| worker.extend(sockets));
        }
        let origin = setup.of_workers(&config.origin.listen, "origin", None, &mut bound.origin)?;
        let purge = setup.control(&config.purge.listen, "purge", &mut bound.purge).await?;
        let admin = setup.control(&config.admin.listen, "admin", &mut bound.admin).await?;
        setup.finish()?;
        Ok((BoundSockets { edge, origin, purge, admin }, bound))
    }
}

/// Makes the sockets of the listeners: takes those that were there before this process, and binds the others.
struct ListenerSetup {
    inherited: InheritedSockets,
    workers: usize,
}

impl ListenerSetup {
    /// Binds each address once for every worker. Returns the sockets of each worker, which do not listen yet.
    fn of_workers(
        &mut self,
        addresses: &[SocketAddr],
        listener: &str,
        tls: Option<&Arc<ArcSwap<ServerConfig>>>,
        bound: &mut Vec<SocketAddr>,
    ) -> anyhow::Result<Vec<Vec<proxy::Listener>>> {
        let mut sockets: Vec<Vec<proxy::Listener>> = (0..self.workers).map(|_| Vec::new()).collect();
        for address in addresses {
            let failed = || format!("{listener}.listen: {address}");
            let given = self.inherited.take(*address);
            let is_inherited = !given.is_empty();
            let shares = if is_inherited {
                proxy::adopt(&given, self.workers).with_context(failed)?
            } else {
                proxy::bind(*address, self.workers)
                    .with_context(failed)?
                    .into_iter()
                    .map(|socket| vec![socket])
                    .collect()
            };
            if let Some(socket) = shares.first().and_then(|share| share.first()) {
                bound.push(proxy::local_address(socket).with_context(failed)?);
            }
            for (worker, share) in sockets.iter_mut().zip(shares) {
                let of_share = |socket| proxy::Listener { socket, is_inherited, tls: tls.cloned() };
                worker.extend(share.into_iter().map(of_share));
            }
        }
        Ok(sockets)
    }

    /// Binds the addresses of a listener of the control plane, and listens there: no other process can at the same time, so no
    /// connection of another one is taken.
    async fn control(
        &mut self,
        addresses: &[SocketAddr],
        listener: &str,
        bound: &mut Vec<SocketAddr>,
    ) -> anyhow::Result<Vec<TcpListener>> {
        let mut sockets = Vec::with_capacity(addresses.len());
        for address in addresses {
            let failed = || format!("{listener}.listen: {address}");
            let mut of_address = Vec::new();
            for given in self.inherited.take(*address) {
                given.set_nonblocking(true).with_context(failed)?;
                of_address.push(TcpListener::from_std(given).with_context(failed)?);
            }
            if of_address.is_empty() {
                of_address.push(TcpListener::bind(address).await.with_context(failed)?);
            }
            bound.push(of_address[0].local_addr().with_context(failed)?);
            sockets.extend(of_address);
        }
        Ok(sockets)
    }

    /// All listeners have their sockets.
    ///
    /// # Errors
    /// If there is an inherited socket for which there is no listener: its clients would wait for ever.
    fn finish(self) -> anyhow::Result<()> {
        let left = self.inherited.left();
        anyhow::ensure!(
            left.is_empty(),
            "LISTEN_FDS: nothing listens at {}: a socket that is passed on must have an address that stands in edge.listen, \
             edge.tls.listen, origin.listen, purge.listen or admin.listen, as it is written there",
            left.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        );
        Ok(())
    }
}

/// From now on connections arrive, at all sockets of all workers.
///
/// # Errors
/// The system's error.
pub(super) fn listen<'s>(
    workers: impl Iterator<Item = &'s Vec<proxy::Listener>>,
    bound: &Addresses,
) -> anyhow::Result<()> {
    for listener in workers.flatten() {
        listener.listen().context("a bound address takes no connections")?;
    }
    let Addresses { edge, edge_tls, origin, purge, admin } = bound;
    for (listener, addresses) in
        [("edge", edge), ("edge.tls", edge_tls), ("origin", origin), ("purge", purge), ("admin", admin)]
    {
        addresses.iter().for_each(|address| tracing::info!(listener, %address, "listening"));
    }
    Ok(())
}
