//! The check of a peer before it is measured: one request whose answer shows what the origin received.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::certificate::Certificate;
use crate::messages::{ECHO, HOST};

const TIMEOUT: Duration = Duration::from_secs(2);

/// Whether requests reach the origin through this proxy, with the fields that every peer has to set.
///
/// # Errors
/// The missing field.
pub(super) fn does_the_work(proxy: SocketAddr, tls: Option<&Certificate>) -> anyhow::Result<()> {
    let seen = get(proxy, HOST, ECHO, tls)?;
    let seen = String::from_utf8_lossy(&seen).to_ascii_lowercase();
    let proto = if tls.is_some() { "https" } else { "http" };
    for field in [
        "x-forwarded-for: 127.0.0.1".to_owned(),
        format!("x-forwarded-proto: {proto}"),
        format!("x-forwarded-host: {HOST}"),
        format!("host: {HOST}"),
    ] {
        ensure!(seen.lines().any(|line| line == field), "the origin did not get \"{field}\" but:\n{seen}");
    }
    Ok(())
}

/// Whether clearcoat's Varnish nodes are up and current: until then its edge goes past it, to the web nodes.
///
/// # Errors
/// The state of its fleet.
pub(super) fn fleet_is_well(admin: SocketAddr, varnish: u16) -> anyhow::Result<()> {
    let body = get(admin, &admin.to_string(), "/api/v1/fleet", None)?;
    let fleet: serde_json::Value = serde_json::from_slice(&body).context("the fleet")?;
    let nodes = fleet["nodes"].as_array().context("no nodes in the fleet")?;
    let is_well =
        |node: &serde_json::Value| node["health"] == "up" && (node["role"] != "varnish" || node["current"] == true);
    ensure!(nodes.len() == usize::from(varnish) + 1 && nodes.iter().all(is_well), "the fleet is not well: {fleet}");
    Ok(())
}

/// The body of a page of this host, on a new connection.
fn get(server: SocketAddr, host: &str, path: &str, tls: Option<&Certificate>) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&server, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    match tls {
        None => exchange(&mut stream, host, path),
        Some(tls) => {
            let session = ClientConnection::new(Arc::clone(&tls.client), ServerName::try_from(HOST)?)?;
            exchange(&mut StreamOwned::new(session, stream), host, path)
        }
    }
}

fn exchange(stream: &mut (impl Read + Write), host: &str, path: &str) -> anyhow::Result<Vec<u8>> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = memchr::memmem::find(&answer, b"\r\n\r\n").context("no answer")?;
    ensure!(answer.starts_with(b"HTTP/1.1 200 "), "{path}: {}", String::from_utf8_lossy(&answer[..end]));
    Ok(answer.split_off(end + 4))
}
