//! What must go together in `[registry.kubernetes]`.

use std::collections::HashSet;

use crate::config::kubernetes::is_label;
use crate::config::{Kubernetes, ServerUrl};

impl Kubernetes {
    /// What is wrong: the rest of the key, with its dot, and what is allowed. `is_used`: nodes come from here.
    pub(super) fn violations(&self, is_used: bool) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut require = |holds: bool, name: &str, reason: &str| {
            if !holds {
                found.push((name.to_owned(), reason.to_owned()));
            }
        };
        let has_services = !(self.web.is_empty() && self.varnish.is_empty());
        let reason = "web or varnish must hold a service when registry.kind is kubernetes";
        require(has_services || !is_used, "", reason);
        let is_namespace = self.namespace.as_deref().is_none_or(is_label);
        require(
            is_namespace,
            ".namespace",
            "must be empty or a namespace: lower case letters, digits and - such as shop",
        );
        for (role, services) in [("web", &self.web), ("varnish", &self.varnish)] {
            let mut named = HashSet::new();
            for (index, service) in services.iter().enumerate() {
                let key = format!(".{role}[{index}]");
                let is_new = named.insert((service.namespace.as_ref().or(self.namespace.as_ref()), &service.name));
                require(is_new, &key, "is named twice: a pod is one node");
                let is_known = service.namespace.is_some() || self.namespace.is_some() || self.url.is_none();
                require(is_known, &key, "wanted NAMESPACE/SERVICE, or registry.kubernetes.namespace, where url is set");
            }
        }
        let is_encrypted = self.url.as_ref().is_none_or(ServerUrl::is_encrypted);
        require(self.ca.is_none() || is_encrypted, ".ca", "only for an https url (registry.kubernetes.url)");
        found
    }
}
