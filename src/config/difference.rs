//! What differs between two configurations, by the names of their keys; and what of a new one a running process can take.
//!
//! Differences are found by comparing what both would be written as, so that no key can be forgotten here. What can be taken is
//! a configuration again ([`Config::adopting`]): the new one, but for what belongs to the start of a process. It is all that the parts
//! get to see, so what is not taken cannot take effect by halves, and what needs a restart is simply where it still differs from
//! the new one.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use toml::{Table, Value};

use super::{Admin, Config, Edge, Log, Origin, PurgeListener};

impl Config {
    /// This configuration of a running process, with all of `new` that can change without a restart and without cutting a connection.
    ///
    /// What cannot: sockets (every `listen`, `edge.http2`), threads, the journal, the registry and the replicas, and what a promise
    /// between them rests on (`edge.seal`, `purge.wait_for`, `purge.ack_timeout`, `purge.settle`).
    ///
    /// # Errors
    /// What is wrong with the mixture: a value that only goes with one that needs a restart. Names the key and what is allowed.
    pub fn adopting(&self, new: &Config) -> Result<Config, String> {
        let Config { edge, origin, limits, timeouts, purge, admin, nodes, health, vcl, shutdown, log, .. } =
            new.clone();
        let mut health = health;
        health.varnish.trial = self.health.varnish.trial;
        let adopted = Config {
            edge: Edge {
                listen: self.edge.listen.clone(),
                http2: self.edge.http2,
                seal: self.edge.seal,
                tls: if edge.tls_addresses() == self.edge.tls_addresses() { edge.tls } else { self.edge.tls.clone() },
                ..edge
            },
            origin: Origin { listen: self.origin.listen.clone(), ..origin },
            limits,
            timeouts,
            purge: PurgeListener {
                allow: purge.allow,
                methods: purge.methods,
                token_file: purge.token_file,
                token: purge.token,
                max_bans_per_second: purge.max_bans_per_second,
                gather: purge.gather,
                ..self.purge.clone()
            },
            admin: self.adopted_admin(admin),
            nodes,
            health,
            vcl,
            shutdown,
            log: Log { format: self.log.format, ..log },
            ..self.clone()
        };
        match adopted.check().into_iter().next() {
            Some(violation) => Err(format!("{}: {}", violation.key, violation.reason)),
            None => Ok(adopted),
        }
    }

    /// Whether there is a token at all decides what replicas without etcd tell each other, from their start.
    fn adopted_admin(&self, new: Admin) -> Admin {
        let is_fixed = !self.replica.peers.is_empty() && self.admin.token.is_some() != new.token.is_some();
        let token_of = if is_fixed { self.admin.clone() } else { new.clone() };
        Admin { listen: self.admin.listen.clone(), hosts: new.hosts, ..token_of }
    }

    /// The keys whose values differ, in the order of the alphabet. A list counts as one value.
    ///
    /// # Errors
    /// What cannot be written as TOML, such as a path that is not UTF-8.
    pub fn keys_that_differ(&self, other: &Config) -> Result<Vec<String>, toml::ser::Error> {
        let (mine, others) = (Table::try_from(self)?, Table::try_from(other)?);
        let mut keys = Vec::new();
        compare("", &mine, &others, &mut keys);
        // A secret is not written, and its file is the same.
        for (file, mine, others) in [
            ("purge.token_file", &self.purge.token, &other.purge.token),
            ("admin.token_file", &self.admin.token, &other.admin.token),
        ] {
            if mine != others && !keys.iter().any(|key| key == file) {
                keys.push(file.to_owned());
            }
        }
        for (headers, mine, others) in [
            ("purge.headers", &self.purge.headers, &other.purge.headers),
            ("traces.headers", &self.traces.headers, &other.traces.headers),
        ] {
            if mine != others && !keys.iter().any(|key| key.starts_with(headers)) {
                keys.push(headers.to_owned());
            }
        }
        if self.nodes != other.nodes && !keys.iter().any(|key| key == "node") {
            keys.push("node".to_owned());
        }
        keys.sort();
        Ok(keys)
    }
}

impl Edge {
    /// The addresses with TLS.
    fn tls_addresses(&self) -> BTreeSet<SocketAddr> {
        self.tls.iter().flat_map(|table| table.listen.iter().copied()).collect()
    }
}

fn compare(path: &str, mine: &Table, others: &Table, keys: &mut Vec<String>) {
    let only_others = others.keys().filter(|key| !mine.contains_key(*key));
    for key in mine.keys().chain(only_others) {
        let dot = if path.is_empty() { "" } else { "." };
        let path = format!("{path}{dot}{key}");
        match (mine.get(key), others.get(key)) {
            (Some(Value::Table(mine)), Some(Value::Table(others))) => compare(&path, mine, others, keys),
            (mine, others) if mine != others => keys.push(path),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigSource;

    fn config(variables: &[(&str, &str)]) -> Config {
        let variables = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        // No file: the name of one that is not there would be an error.
        ConfigSource::new(None, variables).load().unwrap()
    }

    fn differ(a: &Config, b: &Config) -> Vec<String> {
        let keys = a.keys_that_differ(b).unwrap();
        assert_eq!(b.keys_that_differ(a).unwrap(), keys, "both ways");
        keys
    }

    #[test]
    fn the_keys_that_differ_are_named_at_any_depth() {
        let before = config(&[]);
        assert!(differ(&before, &config(&[])).is_empty());
        let after = config(&[
            ("CLEARCOAT_PURGE__ALLOW", "10.0.0.0/8"),
            ("CLEARCOAT_EDGE__POLICY", "round_robin"),
            ("CLEARCOAT_REGISTRY__ETCD__PREFIX", "/shop/"),
            ("CLEARCOAT_REPLICA__ID", "a"),
        ]);
        // `replica.id` is in one of them only.
        assert_eq!(differ(&before, &after), ["edge.policy", "purge.allow", "registry.etcd.prefix", "replica.id"]);
    }

    /// An error page is read with the configuration.
    const A_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/page.png");

    /// The keys that take effect at once, and those that need a restart.
    fn adopted(before: &Config, new: &Config) -> (Vec<String>, Vec<String>) {
        let adopted = before.adopting(new).unwrap();
        assert_eq!(before.adopting(before).unwrap(), *before);
        assert_eq!(adopted.adopting(new).unwrap(), adopted, "what was taken is not taken again");
        (before.keys_that_differ(&adopted).unwrap(), adopted.keys_that_differ(new).unwrap())
    }

    #[test]
    fn every_key_is_taken_at_once_or_needs_a_restart_and_is_named() {
        let before = config(&[]);
        let nodes = "[{ role = \"web\", id = \"a\", address = \"10.0.0.1:80\" }]";
        let at_once = [
            ("node", "CLEARCOAT_NODE", nodes),
            ("edge.policy", "CLEARCOAT_EDGE__POLICY", "random"),
            ("edge.trusted_proxies", "CLEARCOAT_EDGE__TRUSTED_PROXIES", "10.0.0.0/8"),
            ("edge.when_all_behind", "CLEARCOAT_EDGE__WHEN_ALL_BEHIND", "refuse"),
            ("edge.hosts", "CLEARCOAT_EDGE__HOSTS", "a.test,*.b.test"),
            ("edge.blocked", "CLEARCOAT_EDGE__BLOCKED", "192.0.2.0/24"),
            ("edge.https.hsts_max_age", "CLEARCOAT_EDGE__HTTPS__HSTS_MAX_AGE", "300"),
            ("edge.rate_limit.client_rate", "CLEARCOAT_EDGE__RATE_LIMIT__CLIENT_RATE", "9"),
            ("edge.maintenance.on", "CLEARCOAT_EDGE__MAINTENANCE__ON", "true"),
            ("edge.error_pages.503", "CLEARCOAT_EDGE__ERROR_PAGES__503", A_FILE),
            ("edge.max_requests_per_node", "CLEARCOAT_EDGE__MAX_REQUESTS_PER_NODE", "100"),
            ("origin.max_requests_per_node", "CLEARCOAT_ORIGIN__MAX_REQUESTS_PER_NODE", "20"),
            ("origin.max_queue", "CLEARCOAT_ORIGIN__MAX_QUEUE", "5"),
            ("origin.queue_timeout", "CLEARCOAT_ORIGIN__QUEUE_TIMEOUT", "2s"),
            ("origin.retry_budget", "CLEARCOAT_ORIGIN__RETRY_BUDGET", "0.5"),
            ("origin.guard", "CLEARCOAT_ORIGIN__GUARD", "false"),
            ("limits.max_body", "CLEARCOAT_LIMITS__MAX_BODY", "5"),
            ("limits.max_connections", "CLEARCOAT_LIMITS__MAX_CONNECTIONS", "5"),
            ("timeouts.first_byte", "CLEARCOAT_TIMEOUTS__FIRST_BYTE", "5s"),
            ("timeouts.tunnel", "CLEARCOAT_TIMEOUTS__TUNNEL", "0s"),
            ("purge.allow", "CLEARCOAT_PURGE__ALLOW", "10.0.0.0/8"),
            ("purge.max_bans_per_second", "CLEARCOAT_PURGE__MAX_BANS_PER_SECOND", "1"),
            ("purge.gather", "CLEARCOAT_PURGE__GATHER", "2s"),
            ("health.web.path", "CLEARCOAT_HEALTH__WEB__PATH", "/other"),
            ("health.varnish.fall", "CLEARCOAT_HEALTH__VARNISH__FALL", "9"),
            ("vcl.director", "CLEARCOAT_VCL__DIRECTOR", "shard"),
            ("shutdown.drain", "CLEARCOAT_SHUTDOWN__DRAIN", "1m"),
            ("log.level", "CLEARCOAT_LOG__LEVEL", "debug"),
            ("log.access", "CLEARCOAT_LOG__ACCESS", "json"),
            ("admin.hosts", "CLEARCOAT_ADMIN__HOSTS", "a.test"),
        ];
        for (key, variable, value) in at_once {
            assert_eq!(adopted(&before, &config(&[(variable, value)])), (vec![key.to_owned()], vec![]), "{key}");
        }
        let at_a_restart = [
            ("edge.listen", "CLEARCOAT_EDGE__LISTEN", "127.0.0.1:1"),
            ("edge.http2", "CLEARCOAT_EDGE__HTTP2", "false"),
            ("edge.seal", "CLEARCOAT_EDGE__SEAL", "false"),
            ("origin.listen", "CLEARCOAT_ORIGIN__LISTEN", "127.0.0.1:1"),
            ("purge.listen", "CLEARCOAT_PURGE__LISTEN", "127.0.0.1:1"),
            ("purge.ack_timeout", "CLEARCOAT_PURGE__ACK_TIMEOUT", "2s"),
            ("purge.max_request", "CLEARCOAT_PURGE__MAX_REQUEST", "2000"),
            ("purge.settle", "CLEARCOAT_PURGE__SETTLE", "2s"),
            ("purge.wait_for", "CLEARCOAT_PURGE__WAIT_FOR", "varnish"),
            ("admin.listen", "CLEARCOAT_ADMIN__LISTEN", "127.0.0.1:1"),
            ("registry.retain", "CLEARCOAT_REGISTRY__RETAIN", "1s"),
            ("replica.id", "CLEARCOAT_REPLICA__ID", "a"),
            ("journal.path", "CLEARCOAT_JOURNAL__PATH", "/other"),
            ("health.varnish.trial", "CLEARCOAT_HEALTH__VARNISH__TRIAL", "false"),
            ("runtime.workers", "CLEARCOAT_RUNTIME__WORKERS", "3"),
            ("log.format", "CLEARCOAT_LOG__FORMAT", "json"),
            ("traces.sample", "CLEARCOAT_TRACES__SAMPLE", "0"),
        ];
        for (key, variable, value) in at_a_restart {
            assert_eq!(adopted(&before, &config(&[(variable, value)])), (vec![], vec![key.to_owned()]), "{key}");
        }
    }

    #[test]
    fn other_certificates_are_taken_at_the_same_addresses_only() {
        // What is in them is looked at later.
        let folder = tempfile::tempdir().unwrap();
        for file in ["a", "b", "k"] {
            std::fs::write(folder.path().join(file), "").unwrap();
        }
        let with = |listen: &str, cert: &str| {
            let [cert, key] = [cert, "k"].map(|file| folder.path().join(file));
            let table = format!("[{{ listen = [\"{listen}\"], cert = {cert:?}, key = {key:?} }}]");
            config(&[("CLEARCOAT_EDGE__TLS", &table)])
        };
        let before = with("127.0.0.1:8443", "a");
        let tls = || vec!["edge.tls".to_owned()];
        assert_eq!(adopted(&before, &with("127.0.0.1:8443", "b")), (tls(), vec![]));
        assert_eq!(adopted(&before, &with("127.0.0.1:8444", "b")), (vec![], tls()));
        assert_eq!(adopted(&before, &config(&[])), (vec![], tls()));
    }

    #[test]
    fn a_value_that_only_goes_with_one_that_needs_a_restart_is_refused() {
        let before = config(&[("CLEARCOAT_HEALTH__VARNISH__TRIAL", "true")]);
        assert!(before.adopting(&config(&[("CLEARCOAT_PURGE__GATHER", "60s")])).is_ok());
        // Taken alone the new port of the edge is free; the old one of the admin listener is not given up.
        let mut mixed = before.clone();
        mixed.edge.bypass_max_requests_per_node = 0;
        let error = before.adopting(&mixed).unwrap_err();
        assert!(error.starts_with("edge.bypass_max_requests_per_node: must be at least 1"), "{error}");
    }

    #[test]
    fn another_token_in_the_same_file_is_a_difference() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let with = |token| {
            std::fs::write(path, token).unwrap();
            config(&[("CLEARCOAT_PURGE__TOKEN_FILE", path)])
        };
        let (before, after) = (with("one"), with("two"));
        assert_eq!(differ(&before, &after), ["purge.token_file"]);
        assert!(differ(&before, &with("one")).is_empty());
    }
}
