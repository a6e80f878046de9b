//! Where the API server is, and how to get in: what the configuration says, or what a pod is given.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::config::{Kubernetes, ServerUrl};

/// Where a pod finds its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The variables that every pod has.
const HOST: &str = "KUBERNETES_SERVICE_HOST";
const PORT: &str = "KUBERNETES_SERVICE_PORT";

/// An API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiServerSettings {
    pub(super) url: ServerUrl,
    /// The file with the token; `None`: requests carry none.
    pub(super) token_file: Option<PathBuf>,
    /// The file with the CAs of its certificate; `None`: those that this system trusts.
    pub(super) ca: Option<PathBuf>,
}

/// The API server, and the namespace of services that are named without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiAccess {
    server: ApiServerSettings,
    namespace: String,
}

/// Why nobody can be asked.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Not in a pod.
    #[error(
        "registry.kubernetes.url is empty, and this is no pod of a cluster ({HOST} is not set): set it, with token_file \
         and ca"
    )]
    NoPod,
    /// The variables of the pod cannot be used.
    #[error("{HOST}={host} and {PORT}={port} are no address of an API server: set registry.kubernetes.url")]
    NoAddress {
        /// The host.
        host: String,
        /// The port.
        port: String,
    },
    /// The namespace is not known.
    #[error("{}: {cause}: set registry.kubernetes.namespace, or name services as NAMESPACE/SERVICE", file.display())]
    NoNamespace {
        /// The file of the pod that should say it.
        file: PathBuf,
        /// Why it does not.
        cause: io::Error,
    },
}

impl ApiAccess {
    /// What the configuration says; what it leaves out is what a pod is given, whose variables are these.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn find(kubernetes: &Kubernetes, variable: impl Fn(&str) -> Option<String>) -> Result<Self, AccessError> {
        Self::find_in(Path::new(ACCOUNT), kubernetes, variable)
    }

    fn find_in(
        account: &Path,
        kubernetes: &Kubernetes,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, AccessError> {
        let Kubernetes { url, token_file, ca, namespace, web, varnish, .. } = kubernetes;
        let server = match url {
            Some(url) => ApiServerSettings { url: url.clone(), token_file: token_file.clone(), ca: ca.clone() },
            None => {
                let given = |file: &Option<PathBuf>, name| file.clone().unwrap_or_else(|| account.join(name));
                ApiServerSettings {
                    url: url_of_cluster(variable)?,
                    token_file: Some(given(token_file, "token")),
                    ca: Some(given(ca, "ca.crt")),
                }
            }
        };
        let is_needed = web.iter().chain(varnish).any(|service| service.namespace.is_none());
        let namespace = match namespace {
            Some(namespace) => namespace.clone(),
            None if is_needed => {
                let file = account.join("namespace");
                let read = fs::read_to_string(&file);
                read.map_err(|cause| AccessError::NoNamespace { file, cause })?.trim().to_owned()
            }
            None => String::new(),
        };
        Ok(ApiAccess { server, namespace })
    }

    pub(super) fn server(&self) -> &ApiServerSettings {
        &self.server
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }
}

fn url_of_cluster(variable: impl Fn(&str) -> Option<String>) -> Result<ServerUrl, AccessError> {
    let host = variable(HOST).filter(|host| !host.is_empty()).ok_or(AccessError::NoPod)?;
    let port = variable(PORT).unwrap_or_else(|| "443".to_owned());
    let authority = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    ServerUrl::parse(&format!("https://{authority}")).ok_or(AccessError::NoAddress { host, port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ServicePort, ServiceRef};

    fn service(namespace: Option<&str>) -> ServiceRef {
        let namespace = namespace.map(str::to_owned);
        ServiceRef { namespace, name: "varnish".to_owned(), port: ServicePort::Only }
    }

    #[test]
    fn a_pod_finds_everything_by_itself() {
        let folder = tempfile::tempdir().unwrap();
        let kubernetes = Kubernetes { varnish: vec![service(None)], ..Kubernetes::default() };
        let find = |host: &str| {
            let variable = |name: &str| match name {
                HOST if !host.is_empty() => Some(host.to_owned()),
                PORT => Some("6443".to_owned()),
                _ => None,
            };
            ApiAccess::find_in(folder.path(), &kubernetes, variable)
        };
        let error = find("192.0.2.1").unwrap_err().to_string();
        assert!(error.contains("namespace: No such file"), "{error}");
        fs::write(folder.path().join("namespace"), "shop\n").unwrap();
        let access = find("192.0.2.1").unwrap();
        assert_eq!((access.server.url.to_string().as_str(), access.namespace()), ("https://192.0.2.1:6443", "shop"));
        assert_eq!(access.server.token_file, Some(folder.path().join("token")));
        assert_eq!(access.server.ca, Some(folder.path().join("ca.crt")));
        assert_eq!(find("2001:db8::1").unwrap().server.url.host_port(), "[2001:db8::1]:6443");
        assert!(matches!(find("").unwrap_err(), AccessError::NoPod));
        assert!(matches!(find("a b").unwrap_err(), AccessError::NoAddress { .. }));
    }

    #[test]
    fn outside_only_what_is_configured_is_used() {
        let url = ServerUrl::parse("http://127.0.0.1:8001");
        let kubernetes = Kubernetes { web: vec![service(Some("shop"))], url, ..Kubernetes::default() };
        let access = ApiAccess::find(&kubernetes, |_| None).unwrap();
        assert_eq!((&access.server.token_file, &access.server.ca, access.namespace()), (&None, &None, ""));
    }
}
