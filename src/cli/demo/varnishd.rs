//! One real varnishd, for as long as the demo runs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::process::{Child, Command};

use crate::telemetry::causes;

/// How long varnishd may take to start: it first compiles its VCL with a C compiler.
const START: Duration = Duration::from_secs(60);

/// How long varnishd may take to end before it is killed.
const END: Duration = Duration::from_secs(5);

/// A running varnishd.
pub(super) struct Varnishd {
    child: Child,
    folder: PathBuf,
    address: SocketAddr,
}

impl Varnishd {
    /// Starts one on a free port with this VCL. `folder` is for its own files.
    pub(super) fn start(folder: &Path, vcl: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new("varnishd");
        // In the foreground, so that it is our child; without a jail, so that it needs no user of its own.
        command
            .args(["-F", "-j", "none", "-a", "127.0.0.1:0", "-T", "127.0.0.1:0", "-s", "malloc,32m", "-n"])
            .arg(folder);
        // Magento's tag headers are longer than Varnish's defaults allow.
        command.args(["-p", "http_resp_hdr_len=64k", "-p", "http_resp_size=96k", "-p", "workspace_backend=256k", "-f"]);
        command.arg(vcl).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        // A process group of its own: Ctrl-C in the terminal is for the demo, which then ends its fleet in order.
        command.process_group(0);
        let child = command.spawn().context("varnishd could not be started (Debian: apt-get install varnish)")?;
        Ok(Varnishd { child, folder: folder.to_owned(), address: SocketAddr::from(([127, 0, 0, 1], 0)) })
    }

    /// Waits until it serves, and asks for its address.
    pub(super) async fn ready(&mut self) -> anyhow::Result<()> {
        let folder = self.folder.clone();
        let address = async move {
            loop {
                if let Some(address) = listen_address(&folder).await? {
                    return anyhow::Ok(address);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        self.address = tokio::select! {
            address = tokio::time::timeout(START, address) => address.context("varnishd did not start in time")?,
            status = self.child.wait() => bail!("varnishd ended at once: {}", status?),
        }?;
        Ok(())
    }

    /// Its process group: the manager, and the worker that serves. `None` once it has ended.
    pub(super) fn group(&self) -> Option<u32> {
        self.child.id()
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it by SIGTERM, on which varnishd also ends its worker process.
    pub(super) async fn stop(mut self) {
        let pid = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
        if let Some(pid) = pid
            && let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::TERM)
        {
            tracing::warn!(error = %causes(&error), "varnishd could not be told to end");
        }
        if tokio::time::timeout(END, self.child.wait()).await.is_err() {
            tracing::warn!("varnishd does not end and is killed");
            if let Err(error) = self.child.kill().await {
                tracing::warn!(error = %causes(&error), "varnishd could not be killed");
            }
        }
    }
}

/// Asks the varnishd of this folder for its address; `None` while it is not serving yet.
async fn listen_address(folder: &Path) -> anyhow::Result<Option<SocketAddr>> {
    let mut command = Command::new("varnishadm");
    command.arg("-n").arg(folder).args(["-t", "1", "debug.listen_address"]).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.context("varnishadm could not be started")?;
    // One line: "a0 127.0.0.1 41267". Port 0 while the worker process has not bound it.
    let text = String::from_utf8_lossy(&output.stdout);
    let mut words = text.split_whitespace().skip(1);
    let (Some(ip), Some(port)) = (words.next(), words.next()) else { return Ok(None) };
    let (Ok(ip), Ok(port)) = (ip.parse::<std::net::IpAddr>(), port.parse::<u16>()) else { return Ok(None) };
    Ok((output.status.success() && port != 0).then(|| SocketAddr::new(ip, port)))
}
