//! The sockets of the listeners, and the certificates of those with TLS.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::ServerConfig;
use tokio::net::TcpListener;

use super::Addresses;
use crate::config;
use crate::proxy;
use crate::tls::{CertificateFiles, Resumption, Tls};

/// Loads the certificates of every address in `edge.tls`. Those of tables with the same address are combined, in the
/// order of the tables.
///
/// # Errors
/// If a certificate file cannot be used; the error names the file.
pub fn load_certificates(edge: &config::Edge) -> anyhow::Result<Vec<(SocketAddr, Tls)>> {
    let mut by_address: Vec<(SocketAddr, Vec<CertificateFiles>)> = Vec::new();
    for table in &edge.tls {
        for address in &table.listen {
            let files = CertificateFiles { cert: table.cert.clone(), key: table.key.clone() };
            match by_address.iter_mut().find(|(known, _)| known == address) {
                Some((_, shared)) => shared.push(files),
                None => by_address.push((*address, vec![files])),
            }
        }
    }
    if by_address.is_empty() {
        return Ok(Vec::new());
    }
    let resumption = Resumption::new().context("edge.tls")?;
    let load = |(address, files): (SocketAddr, Vec<CertificateFiles>)| {
        let tls = Tls::load_sharing(&files, edge.http2, &resumption).context("edge.tls")?;
        Ok((address, tls))
    };
    by_address.into_iter().map(load).collect()
}

/// Binds the addresses for clients, plain and TLS. Returns the sockets of each worker.
pub(super) fn bind_edge(
    plain: &[SocketAddr],
    encrypted: &[(SocketAddr, Tls)],
    workers: usize,
    bound: &mut Addresses,
) -> anyhow::Result<Vec<Vec<proxy::Listener>>> {
    let mut edge = bind_workers(plain, workers, "edge", None, &mut bound.edge)?;
    for (address, tls) in encrypted {
        let sockets = bind_workers(&[*address], workers, "edge.tls", Some(&tls.config()), &mut bound.edge_tls)?;
        edge.iter_mut().zip(sockets).for_each(|(worker, sockets)| worker.extend(sockets));
    }
    Ok(edge)
}

/// Binds each address once for every worker. Returns the sockets of each worker.
pub(super) fn bind_workers(
    addresses: &[SocketAddr],
    workers: usize,
    listener: &str,
    tls: Option<&Arc<ServerConfig>>,
    bound: &mut Vec<SocketAddr>,
) -> anyhow::Result<Vec<Vec<proxy::Listener>>> {
    let mut sockets: Vec<Vec<proxy::Listener>> = (0..workers).map(|_| Vec::new()).collect();
    for address in addresses {
        let failed = || format!("{listener}.listen: {address}");
        let of_address = proxy::bind(*address, workers).with_context(failed)?;
        let local = of_address[0].local_addr().with_context(failed)?;
        tracing::info!(listener, address = %local, "listening");
        bound.push(local);
        let of_address = of_address.into_iter().map(|socket| proxy::Listener { socket, tls: tls.cloned() });
        sockets.iter_mut().zip(of_address).for_each(|(worker, socket)| worker.push(socket));
    }
    Ok(sockets)
}

/// Binds the addresses of a listener of the control plane.
pub(super) async fn bind_control(
    addresses: &[SocketAddr],
    listener: &str,
    bound: &mut Vec<SocketAddr>,
) -> anyhow::Result<Vec<TcpListener>> {
    let mut sockets = Vec::with_capacity(addresses.len());
    for address in addresses {
        let failed = || format!("{listener}.listen: {address}");
        let socket = TcpListener::bind(address).await.with_context(failed)?;
        let local = socket.local_addr().with_context(failed)?;
        tracing::info!(listener, address = %local, "listening");
        bound.push(local);
        sockets.push(socket);
    }
    Ok(sockets)
}
