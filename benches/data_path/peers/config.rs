//! The peers' configurations: tuned by an engineer for the same task.
//!
//! All balance by URL, check the health of the same server, keep connections alive on both sides, set the client's
//! address, scheme and host, and have no access log. clearcoat runs with its defaults: it also has the fence, the purge
//! listener, metrics and health checks of both roles, and writes `Via` in both directions, which the others do not.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;

use super::{Kind, Peer, Setup};
use crate::messages::HOST;

/// Writes the configuration of a peer into a folder. Returns the arguments to run the peer in the foreground.
///
/// # Errors
/// If it cannot be written.
pub(super) fn write(peer: &Peer, folder: &Path, port: u16, setup: &Setup<'_>) -> std::io::Result<Vec<OsString>> {
    let file = folder.join(match peer.kind {
        Kind::Haproxy { .. } => "haproxy.cfg",
        Kind::Nginx => "nginx.conf",
        Kind::Clearcoat(_) => "clearcoat.toml",
    });
    let (text, arguments) = match peer.kind {
        Kind::Haproxy { splice } => {
            (haproxy(port, setup, splice), vec!["-db".into(), "-f".into(), file.clone().into()])
        }
        Kind::Nginx => {
            let mut arguments: Vec<OsString> = vec!["-e".into(), "stderr".into(), "-p".into(), folder.into()];
            arguments.extend(["-c".into(), file.clone().into()]);
            (nginx(port, setup), arguments)
        }
        Kind::Clearcoat(_) => {
            (clearcoat(folder, port, setup), vec!["serve".into(), "--config".into(), file.clone().into()])
        }
    };
    std::fs::write(file, text)?;
    Ok(arguments)
}

/// The address of the origin as this node.
fn node(origin: SocketAddr, number: u16) -> SocketAddr {
    let [high, low] = number.to_be_bytes();
    SocketAddr::from(([127, 0, high, low], origin.port()))
}

/// The admin address of a clearcoat with this client address.
pub(super) fn admin(clients: SocketAddr) -> SocketAddr {
    SocketAddr::new(clients.ip(), clients.port() + 3)
}

fn haproxy(port: u16, setup: &Setup<'_>, splice: bool) -> String {
    let (pipes, option) =
        if splice { ("    tune.pipesize 1048576\n", "    option splice-response\n") } else { ("", "") };
    let (bind, proto) = match setup.tls {
        None => (String::new(), "http"),
        Some(tls) => (format!(" ssl crt {} alpn h2,http/1.1 ssl-min-ver TLSv1.3", tls.combined.display()), "https"),
    };
    // Each connection takes two descriptors, and HAProxy refuses to start if they do not suffice.
    let maxconn = if setup.connections > 3_000 { setup.connections + 200 } else { 4_000 };
    let server = |number| format!("    server varnish-{number} {} check inter 1s\n", node(setup.origin, number));
    let (threads, servers) = (setup.cores.len(), (1..=setup.nodes).map(server).collect::<String>());
    format!(
        "global
    nbthread {threads}
    maxconn {maxconn}
{pipes}
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout http-keep-alive 60s
    http-reuse always

frontend edge
    bind 127.0.0.1:{port}{bind}
    option forwardfor
    http-request set-header X-Forwarded-Proto {proto}
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    default_backend varnish

backend varnish
    balance uri whole
    hash-type consistent
    option httpchk
    http-check send meth GET uri /health_check.php ver HTTP/1.1 hdr Host {HOST}
{option}{servers}"
    )
}

fn nginx(port: u16, setup: &Setup<'_>) -> String {
    let (listen, tls) = match setup.tls {
        None => (String::new(), String::new()),
        Some(tls) => {
            let (chain, key) = (tls.chain.display(), tls.key.display());
            let lines = format!(
                "        ssl_certificate {chain};\n        ssl_certificate_key {key};\n        ssl_protocols TLSv1.3;\n"
            );
            (" ssl http2".to_owned(), lines)
        }
    };
    let (workers, connections) = (setup.cores.len(), 2 * setup.connections + 1_000);
    let server = |number| format!("        server {};\n", node(setup.origin, number));
    let servers: String = (1..=setup.nodes).map(server).collect();
    // A limit on requests per connection would be a scenario of its own.
    format!(
        "daemon off;
user root;
pid nginx.pid;
error_log stderr error;
worker_processes {workers};
worker_rlimit_nofile {connections};
events {{ worker_connections {connections}; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    upstream varnish {{
        hash $host$request_uri consistent;
{servers}        keepalive 128;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port}{listen};
{tls}        location / {{
            proxy_pass http://varnish;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header X-Forwarded-Host $http_host;
        }}
    }}
}}
"
    )
}

fn clearcoat(folder: &Path, port: u16, setup: &Setup<'_>) -> String {
    let listener = |offset: u16| format!("listen = [\"127.0.0.1:{}\"]", port + offset);
    let (workers, origin) = (setup.cores.len(), setup.origin);
    let varnish = |number| {
        let address = node(origin, number);
        format!("[[node]]\nrole = \"varnish\"\nid = \"varnish-{number}\"\naddress = \"{address}\"\n")
    };
    let varnish: String = (1..=setup.nodes).map(varnish).collect();
    // A TLS scenario uses the address that is plain HTTP in the others.
    let (edge, tls) = match setup.tls {
        None => (listener(0), String::new()),
        Some(tls) => {
            let (chain, key) = (tls.chain.display(), tls.key.display());
            (listener(4), format!("[[edge.tls]]\n{}\ncert = \"{chain}\"\nkey = \"{key}\"\n", listener(0)))
        }
    };
    let (behind, purge, admin) = (listener(1), listener(2), listener(3));
    let journal = folder.join("journal");
    format!(
        "[edge]
{edge}
{tls}
[origin]
{behind}
[purge]
{purge}
[admin]
{admin}
[journal]
path = {journal:?}
first_start = \"trust\"
[health.varnish]
trial = false
[log]
level = \"warn\"
[runtime]
workers = {workers}
{varnish}[[node]]
role = \"web\"
id = \"web-1\"
address = \"{origin}\"
"
    )
}
