//! What it takes to get at an etcd, however it is written down: as keys of the configuration, or as an agent's flags.

use super::is_host_port;
use crate::config::Etcd;

impl Etcd {
    /// What is wrong with these settings: which one, as `named` calls it, and what is allowed. `named` is given the name of
    /// a field, with the index in a list.
    pub fn violations(&self, named: impl Fn(&str) -> String) -> Vec<(String, String)> {
        let mut found = Vec::new();
        let mut require = |holds: bool, name: &str, reason: String| {
            if !holds {
                found.push((named(name), reason));
            }
        };
        require(!self.endpoints.is_empty(), "endpoints", "must hold at least one URL".to_owned());
        let encrypted = self.endpoints.iter().any(|endpoint| endpoint.starts_with("https://"));
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let name = format!("endpoints[{index}]");
            let authority = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://"));
            let is_url = authority.is_some_and(|authority| is_host_port(authority.trim_end_matches('/')));
            let reason = "wanted http://HOST:PORT or https://HOST:PORT such as http://203.0.113.1:2379";
            require(is_url, &name, reason.to_owned());
            let is_like_the_others = endpoint.starts_with("https://") == encrypted;
            require(!is_url || is_like_the_others, &name, "either all are https or none is".to_owned());
        }
        let is_prefix = self.prefix.ends_with('/') && self.prefix.bytes().all(|b| b.is_ascii_graphic());
        require(is_prefix, "prefix", "must end in / and hold no blank, such as /clearcoat/v1/".to_owned());
        let has_password = self.username.is_none() || self.password_file.is_some();
        require(has_password, "password_file", format!("must name a file when {} is set", named("username")));
        let has_user = self.password_file.is_none() || self.username.is_some();
        require(has_user, "username", format!("must be set when {} is", named("password_file")));
        require(!encrypted || self.ca.is_some(), "ca", "must name a file, certificates in PEM, for https".to_owned());
        for (name, file, other) in [("cert", &self.cert, &self.key), ("key", &self.key, &self.cert)] {
            require(file.is_some() || other.is_none(), name, "cert and key go together".to_owned());
            require(file.is_none() || encrypted, name, "only for https endpoints".to_owned());
        }
        found
    }
}
