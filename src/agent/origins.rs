//! The VCL of the varnishd beside us, which follows the addresses of the clearcoats.
//!
//! A varnishd resolves the name of a backend once, when it loads a VCL. A clearcoat that comes back with another address, as
//! containers do, would be lost to it, and each miss a 503. So the agent, which is beside it anyway, resolves the names
//! itself, writes the VCL with what it finds, and has varnishd load that at its management port when it has changed. The
//! cache, its bans and the requests under way stay. (A director that resolves by itself would do as well, but it is a vmod
//! that Varnish does not come with, built for one version of it.)
//!
//! What is on disk always comes first: a varnishd that starts meanwhile, or is restarted by somebody else, reads it there.
//! One that we did not start may have read what was there before, so it is told to load it at once.
//!
//! Names that resolve to nothing change nothing, as long as none does: a resolver that is away must not cost the fleet its
//! origins. One name of several that has no address any more is a clearcoat that is gone, and its address may be
//! somebody else's tomorrow, so it is left out.
//!
//! A file that somebody else wrote is neither overwritten nor started with: it may be the work of weeks, or the one of the
//! package, whose backend is no clearcoat.

use std::collections::BTreeSet;
use std::error::Error;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::atomic_file;
use crate::backoff::Backoff;
use crate::clock::now_ms;
use crate::fleet::PurgeDialect;
use crate::telemetry::causes;
use crate::varnish::cli_text::{ListedVcl, parse_vcls};
use crate::varnish::management::{ManagementError, ManagementPort};
use crate::varnish::origin_names::OriginNames;
use crate::varnish::vcl::{InvalidHost, OriginAddress, VarnishVersion, render, stripping};

/// Time between two looks at the names. A lookup in a container is answered by the engine itself.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long varnishd may take for a step: it compiles the VCL in one of them.
const STEP: Duration = Duration::from_secs(30);
/// The pauses between two tries to load a VCL.
const BACKOFF: Backoff = Backoff { min: Duration::from_millis(250), max: Duration::from_secs(30) };
/// What the names of our VCLs in varnishd start with.
const PREFIX: &str = "clearcoat_";
/// What a file that we wrote starts with.
const OURS: &str = "# Written by `clearcoat agent --vcl`, and again when a clearcoat has another address.\n";

/// The VCL of the varnishd beside us, and where that takes another one.
#[derive(Clone, Debug)]
pub struct VclSettings {
    /// The file that varnishd starts with (`-f`).
    pub file: PathBuf,
    /// The origin listeners of the clearcoats. A name may have several addresses, of one clearcoat each.
    pub origins: Vec<OriginAddress>,
    /// The networks from which clearcoat purges; if empty, the addresses of the origins.
    pub allow: Vec<IpNet>,
    /// What the VCL is written for.
    pub version: VarnishVersion,
    /// How clearcoat tells this Varnish to drop pages.
    pub delivery: PurgeDialect,
    /// The query parameters that the VCL strips: `edge.hash_ignore_query` of the clearcoats.
    pub ignored_query: Vec<String>,
    /// `HOST:PORT` of the management port (`-T`).
    pub management: String,
    /// The file that varnishd checks who manages it with (`-S`).
    pub secret_file: PathBuf,
}

/// Why there is no VCL to load.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoVcl {
    #[error("no origin has an address: {}", .0.join("; "))]
    Unresolved(Vec<String>),
    #[error(transparent)]
    Host(#[from] InvalidHost),
    #[error("{} is somebody else's VCL, which --vcl does not overwrite: take it away, or name another file", .0.display())]
    Foreign(PathBuf),
    #[error("{} cannot be read or written", .file.display())]
    File {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Why varnishd did not take it.
#[derive(Debug, thiserror::Error)]
enum NotLoaded {
    #[error("the secret file {} cannot be read", .file.display())]
    Secret {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the management port {address}")]
    Management {
        address: String,
        #[source]
        source: ManagementError,
    },
}

/// Keeps the VCL of one varnishd current.
pub(super) struct OriginFollower {
    settings: VclSettings,
    /// What is on disk; empty if nothing of ours is.
    written: String,
    names: OriginNames,
    /// The names without an address.
    missing: Complaint,
    unwritten: Complaint,
    unloaded: Complaint,
}

/// Something that goes on being wrong, logged once as long as its words are the same.
#[derive(Default)]
struct Complaint(String);

impl Complaint {
    fn warn(&mut self, what: &str, words: String) {
        if words != self.0 {
            tracing::warn!(error = words, "{what}");
            self.0 = words;
        }
    }

    fn is_over(&mut self) {
        self.0.clear();
    }
}

impl OriginFollower {
    /// Returns when there is a VCL to start varnishd with. Without any address, that is the one of the last start.
    ///
    /// # Errors
    /// If there will be none: the file is not ours, or cannot be written.
    pub(super) async fn begin(settings: &VclSettings) -> Result<Self, NoVcl> {
        let written = written_before(&settings.file)?.unwrap_or_default();
        let (missing, unwritten, unloaded) = Default::default();
        let names = OriginNames::new(settings.origins.clone());
        let mut this = OriginFollower { settings: settings.clone(), written, names, missing, unwritten, unloaded };
        loop {
            match this.write().await {
                Ok(()) => return Ok(this),
                Err(error) if !this.written.is_empty() => {
                    let file = this.settings.file.display();
                    tracing::warn!(%file, error = %causes(&error), "varnishd starts with the VCL that it had");
                    return Ok(this);
                }
                Err(error @ NoVcl::Unresolved(_)) => this.unwritten.warn("varnishd waits for its VCL", words(&error)),
                Err(error) => return Err(error),
            }
            sleep(INTERVAL).await;
        }
    }

    /// Follows the addresses for as long as the agent runs. `starts_now` says that varnishd reads what is on disk now.
    pub(super) async fn follow(mut self, starts_now: bool) {
        let mut loaded = if starts_now { self.written.clone() } else { String::new() };
        let (mut failures, mut next_try) = (0, Instant::now());
        loop {
            if self.written != loaded && Instant::now() >= next_try {
                match self.load().await {
                    Ok(name) => {
                        tracing::info!(vcl = name, "varnishd has loaded the VCL with the addresses of now");
                        loaded.clone_from(&self.written);
                        self.unloaded.is_over();
                        failures = 0;
                    }
                    Err(error) => {
                        failures += 1;
                        next_try = Instant::now() + BACKOFF.pause(failures, 0.5 + fastrand::f64() / 2.0);
                        self.unloaded.warn("varnishd does not load the VCL with the addresses of now", words(&error));
                    }
                }
            }
            sleep(INTERVAL).await;
            match self.write().await {
                Ok(()) => self.unwritten.is_over(),
                Err(error) => self.unwritten.warn("the VCL stays as it is", words(&error)),
            }
        }
    }

    /// Writes the VCL if it has changed.
    async fn write(&mut self) -> Result<(), NoVcl> {
        let (origins, without) = self.names.resolve().await;
        if origins.is_empty() {
            return Err(NoVcl::Unresolved(without));
        }
        if without.is_empty() {
            self.missing.is_over();
        } else {
            self.missing.warn("the VCL is without the origins that have no address", without.join("; "));
        }
        let text = self.render(&origins)?;
        if text == self.written {
            return Ok(());
        }
        // On another thread: this one also renews the lease of the node, whatever the disk does.
        let (file, content) = (self.settings.file.clone(), text.clone());
        let replaced = spawn_blocking(move || atomic_file::replace(&file, content.as_bytes())).await;
        let file = &self.settings.file;
        let replaced = replaced.map_err(io::Error::other).flatten();
        replaced.map_err(|source| NoVcl::File { file: file.clone(), source })?;
        let origins: Vec<String> = origins.iter().map(ToString::to_string).collect();
        tracing::info!(file = %file.display(), origins = origins.join(" "), "the VCL is written");
        self.written = text;
        Ok(())
    }

    /// The same text for the same addresses.
    fn render(&self, origins: &BTreeSet<SocketAddr>) -> Result<String, InvalidHost> {
        let VclSettings { version, delivery, allow, ignored_query, .. } = &self.settings;
        let allow = match allow.as_slice() {
            [] => {
                origins.iter().map(SocketAddr::ip).collect::<BTreeSet<IpAddr>>().into_iter().map(Into::into).collect()
            }
            given => given.to_vec(),
        };
        let origins: Vec<OriginAddress> = origins.iter().copied().map(Into::into).collect();
        Ok(format!("{OURS}{}", stripping(&render(*version, *delivery, &origins, &allow)?, ignored_query)))
    }

    /// Has varnishd use what is on disk. Gives the name that it has there.
    async fn load(&self) -> Result<String, NotLoaded> {
        let file = &self.settings.secret_file;
        let path = file.clone();
        let secret = spawn_blocking(move || std::fs::read(path)).await.map_err(io::Error::other).flatten();
        let secret = secret.map_err(|source| NotLoaded::Secret { file: file.clone(), source })?;
        let address = &self.settings.management;
        let name = format!("{PREFIX}{}", now_ms());
        let loaded = async {
            let mut port = ManagementPort::connect(address.as_str(), Some(&secret), STEP).await?;
            port.command(&["vcl.load", &name, &self.settings.file.to_string_lossy()]).await?;
            port.command(&["vcl.use", &name]).await?;
            for before in ours(&port.command(&["vcl.list"]).await?.text) {
                // The next one that is loaded tries again.
                if let Err(error) = port.command(&["vcl.discard", &before]).await {
                    tracing::warn!(vcl = %before, error = %causes(&error), "varnishd does not discard a VCL of before");
                }
            }
            Ok(())
        };
        let refused = |source| NotLoaded::Management { address: address.clone(), source };
        loaded.await.map(|()| name).map_err(refused)
    }
}

/// What we wrote into this file before, if there is one.
fn written_before(file: &Path) -> Result<Option<String>, NoVcl> {
    match std::fs::read_to_string(file) {
        Ok(text) if text.starts_with(OURS) => Ok(Some(text)),
        Ok(text) if text.is_empty() => Ok(None),
        Ok(_) => Err(NoVcl::Foreign(file.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(NoVcl::Foreign(file.to_owned())),
        Err(source) => Err(NoVcl::File { file: file.to_owned(), source }),
    }
}

fn words(error: &(dyn Error + 'static)) -> String {
    causes(error).to_string()
}

/// The VCLs of ours that are loaded and not in use, in the answer to `vcl.list`: lines of a status, a few words that are not the same
/// in all versions, and a name.
fn ours(list: &str) -> Vec<String> {
    let is_ours = |vcl: &ListedVcl| vcl.status == "available" && vcl.label.is_none() && vcl.name.starts_with(PREFIX);
    parse_vcls(list).into_iter().filter(is_ours).map(|vcl| vcl.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_use_any_more_is_found_in_every_versions_list() {
        let six = "active      auto/warm          0 clearcoat_2\navailable   auto/warm          0 boot\n\
                   available   auto/cold          0 clearcoat_1\n\n";
        assert_eq!(ours(six), ["clearcoat_1"]);
        let seven = "available   auto    warm         0    boot\navailable   auto    cold         0    clearcoat_1\n\
                     discarded   auto    busy         1    clearcoat_0\nactive      auto    warm         0    clearcoat_2\n";
        assert_eq!(ours(seven), ["clearcoat_1"]);
        assert!(ours("").is_empty());
    }

    #[test]
    fn somebody_elses_vcl_is_told_from_ours() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("default.vcl");
        assert!(matches!(written_before(&file), Ok(None)));
        for foreign in [&b"vcl 4.1;\nbackend default { .host = \"127.0.0.1\"; }\n"[..], b"\xff\xfe"] {
            std::fs::write(&file, foreign).unwrap();
            assert!(matches!(written_before(&file), Err(NoVcl::Foreign(_))), "{}", foreign.escape_ascii());
        }
        std::fs::write(&file, format!("{OURS}vcl 4.1;\n")).unwrap();
        assert!(written_before(&file).unwrap().is_some_and(|text| text.ends_with("vcl 4.1;\n")));
        assert!(matches!(written_before(folder.path()), Err(NoVcl::File { .. })));
    }
}
