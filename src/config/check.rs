//! The rules that a type cannot hold: ranges, and keys that must go together.
//!
//! Rules are stated over the finished configuration, so that they hold for the file, the environment and any mixture
//! of both. Whether a default or a person wrote the value at fault is found out later, for the message.

mod edge_rules;
mod etcd;
mod kubernetes;
mod timeouts;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use super::headers::{self, Carrier};
use super::node::{NodeFacts, is_host_port};
use super::{
    Config, Dns, Edge, Etcd, FirstStart, JournalKind, Kubernetes, Limits, Log, ProxyProtocol, RegistryKind,
    RequestTerms, ServerUrl, StaticNode, Token, Traces, WebChecks,
};
use crate::fleet::Role;
use crate::purge::may_purge;
use crate::seal::MAX_NAMES;

const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);
const LONGEST_ACK_TIMEOUT: Duration = Duration::from_secs(60);
const HEAD: RangeInclusive<usize> = 1024..=1 << 20;
const FIELDS: RangeInclusive<usize> = 16..=256;
const HIGHEST_LIMIT: usize = 1_000_000;
const LONGEST_QUEUE: usize = 1_000_000;
const LONGEST_QUEUE_TIMEOUT: Duration = Duration::from_secs(600);
const MAX_REQUEST: RangeInclusive<usize> = 1024..=16 << 20;
const MAX_WORKERS: usize = 1024;
const LONGEST_SLOW_START: Duration = Duration::from_secs(3600);
const LONGEST_EXPECTED: usize = 1024;
const EJECTION: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
const LONGEST_EJECTION: Duration = Duration::from_secs(24 * 3600);
const LONGEST_RETAIN: Duration = Duration::from_secs(24 * 3600);
const LONGEST_LEAVE: Duration = Duration::from_secs(600);
const LONGEST_DRAIN: Duration = Duration::from_secs(3600);
const LONGEST_SPIN: Duration = Duration::from_millis(10);

/// Header fields that say how a message is framed and where it goes, or that the edge writes anew for each request: a
/// second meaning for one of them would break the first.
const TAKEN_FIELDS: [&str; 16] = [
    "Connection",
    "Content-Length",
    "Expect",
    "Host",
    "HTTP2-Settings",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
];

/// A rule that a configuration breaks.
pub(super) struct Violation {
    /// The key at fault, such as `node[2].address`.
    pub(super) key: String,
    /// What is wrong and what is allowed.
    pub(super) reason: String,
}

/// The violations found so far.
#[derive(Default)]
struct RuleCheck(Vec<Violation>);

impl RuleCheck {
    fn require(&mut self, holds: bool, key: impl Into<String>, reason: impl Into<String>) {
        if !holds {
            self.0.push(Violation { key: key.into(), reason: reason.into() });
        }
    }
}

impl Config {
    /// The files that are wanted at the start and cannot be read. Those of header fields are read with their values, and
    /// tokens with theirs.
    pub(super) fn unreadable_files(&self) -> Vec<Violation> {
        let mut rules = RuleCheck::default();
        let mut wants = |key: String, file: &Path| {
            // An empty path is said elsewhere to be wrong.
            let unreadable = (file != Path::new("")).then(|| read_a_byte(file).err()).flatten();
            let reason = unreadable.map(|error| format!("cannot be read: {error}"));
            rules.require(reason.is_none(), key, reason.unwrap_or_default());
        };
        for (index, table) in self.edge.tls.iter().enumerate() {
            wants(format!("edge.tls[{index}].cert"), &table.cert);
            wants(format!("edge.tls[{index}].key"), &table.key);
        }
        for (status, file) in self.edge.error_pages.files() {
            wants(format!("edge.error_pages.{status}"), file);
        }
        if let Some(page) = &self.edge.maintenance.page {
            wants("edge.maintenance.page".to_owned(), page);
        }
        let Etcd { ca, cert, key, password_file, .. } = &self.registry.etcd;
        let of_etcd = [("ca", ca), ("cert", cert), ("key", key), ("password_file", password_file)];
        let named = of_etcd.into_iter().filter(|_| self.uses_etcd());
        let named = named.filter_map(|(name, file)| Some((name, file.as_deref()?)));
        named.for_each(|(name, file)| wants(format!("registry.etcd.{name}"), file));
        let Kubernetes { token_file, ca, .. } = &self.registry.kubernetes;
        let of_kubernetes = [("token_file", token_file), ("ca", ca)].into_iter();
        let named = of_kubernetes.filter(|_| self.registry.kind == RegistryKind::Kubernetes);
        let named = named.filter_map(|(name, file)| Some((name, file.as_deref()?)));
        named.for_each(|(name, file)| wants(format!("registry.kubernetes.{name}"), file));
        if let Some(ca) = &self.traces.ca {
            wants("traces.ca".to_owned(), ca);
        }
        if let Some(template) = &self.vcl.template {
            wants("vcl.template".to_owned(), template);
        }
        rules.0
    }

    /// Every rule that this configuration breaks.
    pub(super) fn check(&self) -> Vec<Violation> {
        let mut rules = RuleCheck::default();
        self.check_listeners(&mut rules);
        check_edge(&self.edge, &mut rules);
        let of_edge = self.edge.max_requests_per_node;
        check_terms("edge", of_edge, &self.edge.request_terms(), &mut rules);
        let of_origin = self.origin.max_requests_per_node;
        check_terms("origin", of_origin, &self.origin.request_terms(), &mut rules);
        check_limits(&self.limits, &mut rules);
        for (key, reason) in self.timeouts.faults() {
            rules.require(false, format!("timeouts.{key}"), reason);
        }
        let ack_timeout = self.purge.ack_timeout;
        let in_bounds = !ack_timeout.is_zero() && ack_timeout <= LONGEST_ACK_TIMEOUT;
        rules.require(in_bounds, "purge.ack_timeout", "must be above 0s and at most 60s");
        rules.require(self.purge.settle <= self.journal.retention, "purge.settle", {
            let shown = humantime::format_duration(self.journal.retention);
            format!("must be at most journal.retention, which is {shown}: what is told again must still be known")
        });
        rules.require(self.purge.gather <= LONGEST_ACK_TIMEOUT, "purge.gather", "must be at most 60s");
        let (least, most) = MAX_REQUEST.into_inner();
        let in_bounds = MAX_REQUEST.contains(&self.purge.max_request);
        rules.require(in_bounds, "purge.max_request", format!("must be {least} to {most} bytes"));
        check_methods(&self.purge.methods, &mut rules);
        for (name, reason) in headers::faults(&self.purge.headers, Carrier::Purges) {
            rules.require(false, format!("purge.headers.{name}"), reason);
        }
        check_nodes(&self.nodes, &mut rules);
        self.check_registry(&mut rules);
        let has_path = self.journal.kind == JournalKind::Memory || self.journal.path != Path::new("");
        rules.require(has_path, "journal.path", "must name a directory when journal.kind is disk or etcd");
        let may_trust = self.journal.kind != JournalKind::Memory || self.journal.first_start == FirstStart::Flush;
        rules.require(may_trust, "journal.first_start", {
            "must be \"flush\" when journal.kind is memory: each of its starts would trust what it cannot know; \"trust\" \
             goes with disk or etcd"
        });
        rules.require(!self.journal.retention.is_zero(), "journal.retention", "must be above 0s");
        let are_possible = (1_000..=MAX_NAMES).contains(&self.journal.names);
        rules.require(are_possible, "journal.names", {
            format!("must be 1000 to {MAX_NAMES}: with so many, 1 GiB of memory is taken at the start")
        });
        self.check_health(&mut rules);
        for (key, reason) in self.vcl.violations(self) {
            rules.require(false, format!("vcl.{key}"), reason);
        }
        let enough = self.runtime.workers.is_none_or(|workers| workers.get() <= MAX_WORKERS);
        rules.require(enough, "runtime.workers", format!("must be at most {MAX_WORKERS}; 0 is one for each core"));
        rules.require(self.runtime.spin <= LONGEST_SPIN, "runtime.spin", "must be at most 10ms; 0us sleeps at once");
        rules.require(
            self.shutdown.leave <= LONGEST_LEAVE,
            "shutdown.leave",
            "must be at most 10min; 0s drains at once",
        );
        rules.require(self.shutdown.drain <= LONGEST_DRAIN, "shutdown.drain", "must be at most 1h; 0s cuts at once");
        check_hosts(&self.admin.hosts, &mut rules);
        check_log(&self.log, &mut rules);
        check_traces(&self.traces, &mut rules);
        rules.0
    }

    fn check_listeners(&self, rules: &mut RuleCheck) {
        let mut taken: HashMap<SocketAddr, String> = HashMap::new();
        for (section, addresses) in [
            ("edge", &self.edge.listen),
            ("origin", &self.origin.listen),
            ("purge", &self.purge.listen),
            ("admin", &self.admin.listen),
        ] {
            rules.require(!addresses.is_empty(), format!("{section}.listen"), "must hold at least one ADDRESS:PORT");
            claim(&mut taken, &format!("{section}.listen"), addresses, rules);
        }
        for (index, table) in self.edge.tls.iter().enumerate() {
            let key = |name: &str| format!("edge.tls[{index}].{name}");
            rules.require(!table.listen.is_empty(), key("listen"), "must hold at least one ADDRESS:PORT");
            // What another of these tables has is not taken: they share the socket.
            claim(&mut taken.clone(), &key("listen"), &table.listen, rules);
            rules.require(table.cert != Path::new(""), key("cert"), "must name a file, a certificate chain in PEM");
            rules.require(table.key != Path::new(""), key("key"), "must name a file, a private key in PEM");
        }
    }

    fn check_registry(&self, rules: &mut RuleCheck) {
        let registry = &self.registry;
        rules.require(registry.retain <= LONGEST_RETAIN, "registry.retain", "must be at most 24h; 0s keeps nobody");
        for (key, reason) in registry.etcd.violations(|key| format!("registry.etcd.{key}")) {
            rules.require(false, key, reason);
        }
        check_dns(&registry.dns, rules);
        let has_names =
            registry.kind != RegistryKind::Dns || !(registry.dns.web.is_empty() && registry.dns.varnish.is_empty());
        rules.require(has_names, "registry.dns", "web or varnish must hold a name when registry.kind is dns");
        for (key, reason) in registry.kubernetes.violations(registry.kind == RegistryKind::Kubernetes) {
            rules.require(false, format!("registry.kubernetes{key}"), reason);
        }
        let is_reachable = self.replica.address.as_deref().is_none_or(is_host_port);
        rules.require(is_reachable, "replica.address", "must be empty or HOST:PORT such as 192.0.2.2:6081");
        let by_one_way = self.replica.peers.is_empty() || self.journal.kind != JournalKind::Etcd;
        let reason = "must be empty when journal.kind is etcd, which is used then: replicas find each other and each other's \
                      purges there; set journal.kind to disk or memory to use the peers";
        rules.require(by_one_way, "replica.peers", reason);
        let mut named = HashSet::new();
        for (index, peer) in self.replica.peers.iter().enumerate() {
            let is_new = named.insert(peer.host_port());
            rules.require(is_new, format!("replica.peers[{index}]"), "is named twice: each address once");
        }
    }

    fn check_health(&self, rules: &mut RuleCheck) {
        let (web, varnish) = (&self.health.web, &self.health.varnish);
        check_web(web, rules);
        for (key, slow_start) in
            [("health.web.slow_start", web.slow_start), ("health.varnish.slow_start", varnish.slow_start)]
        {
            rules.require(slow_start <= LONGEST_SLOW_START, key, "must be at most 1h; 0s is off");
        }
        check_ejection("health.web", (web.eject_for, web.eject_for_max), web.max_ejected, &web.eject_statuses, rules);
        check_ejection(
            "health.varnish",
            (varnish.eject_for, varnish.eject_for_max),
            varnish.max_ejected,
            &varnish.eject_statuses,
            rules,
        );
        for (key, interval) in
            [("health.web.interval_down", web.interval_down), ("health.varnish.interval_down", varnish.interval_down)]
        {
            let is_allowed = interval.is_zero() || interval >= SHORTEST_INTERVAL;
            rules.require(is_allowed, key, "must be at least 10ms; 0s is as interval");
        }
        for (section, interval, timeout, counts, jitter) in [
            ("health.web", web.interval, web.timeout, [web.rise, web.fall], web.jitter),
            ("health.varnish", varnish.interval, varnish.timeout, [varnish.rise, varnish.fall], varnish.jitter),
        ] {
            let key = |name: &str| format!("{section}.{name}");
            rules.require(interval >= SHORTEST_INTERVAL, key("interval"), "must be at least 10ms");
            let shown = humantime::format_duration(interval);
            rules.require(
                !timeout.is_zero() && timeout <= interval,
                key("timeout"),
                format!("must be above 0s and at most {section}.interval, which is {shown}"),
            );
            for (name, count) in ["rise", "fall"].into_iter().zip(counts) {
                rules.require(count >= 1, key(name), "must be at least 1");
            }
            rules.require((0.0..=0.5).contains(&jitter), key("jitter"), "must be 0 to 0.5");
        }
    }
}

fn check_dns(dns: &Dns, rules: &mut RuleCheck) {
    for (role, names) in [("web", &dns.web), ("varnish", &dns.varnish)] {
        for (index, name) in names.iter().enumerate() {
            let is_service =
                name.starts_with('_') && name.split('.').nth(1).is_some_and(|proto| proto.starts_with('_'));
            let is_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b));
            let key = format!("registry.dns.{role}[{index}]");
            let reason =
                "wanted NAME:PORT such as web.shop.example:80, or _SERVICE._PROTO.NAME such as _http._tcp.shop.example";
            rules.require((is_service && is_name) || is_host_port(name), key, reason);
        }
    }
}

/// Takes each address for its listener, and blames those that another has. Port 0 is another port each time.
fn claim(taken: &mut HashMap<SocketAddr, String>, listen: &str, addresses: &[SocketAddr], rules: &mut RuleCheck) {
    for (index, address) in addresses.iter().enumerate().filter(|(_, address)| address.port() != 0) {
        let key = format!("{listen}[{index}]");
        if let Some(other) = taken.get(address) {
            rules.require(false, key, format!("{address} is already taken by {other}"));
        } else {
            taken.insert(*address, key);
        }
    }
}

fn check_edge(edge: &Edge, rules: &mut RuleCheck) {
    let is_factor = edge.bounded_load.is_none_or(|factor| factor >= 1.0);
    rules.require(is_factor, "edge.bounded_load", "must be 0 (off) or at least 1.0");
    let reason = "must be at least 1; set edge.bounded_load to 0 for no bound";
    rules.require(edge.bounded_load_from >= 1, "edge.bounded_load_from", reason);
    check_parameters("edge.hash_ignore_query", &edge.hash_ignore_query, rules);
    let reason = "must be at least 1; set edge.when_all_behind to serve or refuse for no bypass";
    rules.require(edge.bypass_max_requests_per_node >= 1, "edge.bypass_max_requests_per_node", reason);
    let has_senders = edge.proxy_protocol == ProxyProtocol::Off || !edge.trusted_proxies.is_empty();
    let reason =
        "must hold who sends the PROXY header when edge.proxy_protocol is accept, such as [\"198.51.100.0/24\"]";
    rules.require(has_senders, "edge.trusted_proxies", reason);
    let reason = format!(
        "must be empty or a header name of letters, digits and !#$%&'*+-.^`|~ such as SSL-OFFLOADED, but none of {}",
        TAKEN_FIELDS.join(", ")
    );
    rules.require(edge.offload_header.as_deref().is_none_or(is_offload_header), "edge.offload_header", reason);
    edge_rules::check(edge, rules);
}

fn check_terms(section: &str, limit: Option<NonZeroUsize>, terms: &RequestTerms, rules: &mut RuleCheck) {
    let key = |name: &str| format!("{section}.{name}");
    let in_bounds = limit.is_none_or(|limit| limit.get() <= HIGHEST_LIMIT);
    let reason = format!("must be at most {HIGHEST_LIMIT}; 0 is no limit");
    rules.require(in_bounds, key("max_requests_per_node"), reason);
    let reason = format!("must be at most {LONGEST_QUEUE}; 0: nobody waits");
    rules.require(terms.max_queue <= LONGEST_QUEUE, key("max_queue"), reason);
    let in_bounds = !terms.queue_timeout.is_zero() && terms.queue_timeout <= LONGEST_QUEUE_TIMEOUT;
    rules.require(
        in_bounds,
        key("queue_timeout"),
        "must be above 0s and at most 600s; set max_queue to 0 where nobody is to wait",
    );
    rules.require((0.0..=1.0).contains(&terms.retry_budget), key("retry_budget"), "must be 0 to 1");
}

/// Names of query parameters, some with a wildcard at the end.
fn check_parameters(key: &str, names: &[String], rules: &mut RuleCheck) {
    for (index, pattern) in names.iter().enumerate() {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && !b"*&=#?".contains(&b));
        let reason = "wanted a parameter name, or the start of names and one trailing *";
        rules.require(is_name, format!("{key}[{index}]"), reason);
    }
}

fn check_hosts(hosts: &[String], rules: &mut RuleCheck) {
    for (index, host) in hosts.iter().enumerate() {
        let is_name = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        let reason = "wanted a host name such as clearcoat.shop.example, without a port";
        rules.require(is_name && !host.ends_with('.'), format!("admin.hosts[{index}]"), reason);
    }
}

fn check_log(log: &Log, rules: &mut RuleCheck) {
    let reason = "must be 0 to 1, the share of requests; requests that failed always have a line";
    rules.require((0.0..=1.0).contains(&log.access_sample), "log.access_sample", reason);
    check_parameters("log.redact_query", &log.redact_query, rules);
}

fn check_traces(traces: &Traces, rules: &mut RuleCheck) {
    let reason = "must be 0 to 1, the share of requests and purges";
    rules.require((0.0..=1.0).contains(&traces.sample), "traces.sample", reason);
    let is_named = !traces.service_name.trim().is_empty();
    rules.require(is_named, "traces.service_name", "must be a name such as clearcoat");
    let is_encrypted = traces.endpoint.as_ref().is_some_and(ServerUrl::is_encrypted);
    let reason = "only for an https endpoint (traces.endpoint)";
    rules.require(traces.ca.is_none() || is_encrypted, "traces.ca", reason);
    for (name, reason) in headers::faults(&traces.headers, Carrier::Spans) {
        rules.require(false, format!("traces.headers.{name}"), reason);
    }
}

fn check_limits(limits: &Limits, rules: &mut RuleCheck) {
    for (key, bytes) in [("limits.max_head", limits.max_head), ("limits.max_answer_head", limits.max_answer_head)] {
        let (least, most) = HEAD.into_inner();
        rules.require(HEAD.contains(&bytes), key, format!("must be {least} to {most} bytes"));
    }
    let (least, most) = FIELDS.into_inner();
    let in_bounds = FIELDS.contains(&limits.max_fields);
    rules.require(in_bounds, "limits.max_fields", format!("must be {least} to {most}"));
}

fn check_methods(methods: &[String], rules: &mut RuleCheck) {
    // Magento sends it, and so do we to every Varnish.
    rules.require(methods.iter().any(|method| method == "PURGE"), "purge.methods", "must hold PURGE");
    for (index, method) in methods.iter().enumerate() {
        let reason = "wanted a method of at most 32 letters, digits and !#$%&'*+-.^_`|~ such as PURGEKEYS, and none \
                      that asks for pages (GET, POST and the like)";
        rules.require(may_purge(method), format!("purge.methods[{index}]"), reason);
    }
}

fn check_nodes(nodes: &[StaticNode], rules: &mut RuleCheck) {
    let mut ids = HashMap::new();
    let mut addresses = HashMap::new();
    for (index, node) in nodes.iter().enumerate() {
        let key = |name: &str| format!("node[{index}].{name}");
        let role = node.role;
        let facts = NodeFacts {
            role,
            address: &node.address,
            weight: node.weight,
            has_delivery: node.delivery.is_some(),
            header_limit: node.header_limit,
            send_proxy: node.send_proxy,
        };
        facts.faults().into_iter().for_each(|(name, reason)| rules.require(false, key(name), reason));
        for (name, reason) in headers::faults(&node.headers, Carrier::Purges) {
            rules.require(false, key(&format!("headers.{name}")), reason);
        }
        let is_known = role == Role::Varnish || node.headers.is_empty();
        rules.require(is_known, key("headers"), "only for nodes of role varnish");
        let named = [
            ("management", node.management.is_some()),
            ("management_secret_file", node.management_secret_file.is_some()),
        ];
        for (name, is_set) in named {
            rules.require(!is_set || role == Role::Varnish, key(name), "only for nodes of role varnish");
        }
        let is_reachable = node.management.as_deref().is_none_or(is_host_port);
        rules.require(is_reachable, key("management"), "wanted HOST:PORT such as 192.0.2.11:6082");
        let twin = ids.insert((role, node.id.as_str()), index);
        rules.require(twin.is_none(), key("id"), format!("another {role} node has this id"));
        let twin = addresses.insert((role, node.address.to_ascii_lowercase()), node.id.as_str());
        let reason = format!("{role} node {} has this address", twin.unwrap_or_default());
        rules.require(twin.is_none(), key("address"), reason);
    }
}

fn check_ejection(
    section: &str,
    (lasts, longest): (Duration, Duration),
    most: f64,
    statuses: &[u16],
    rules: &mut RuleCheck,
) {
    let key = |name: &str| format!("{section}.{name}");
    rules.require(EJECTION.contains(&lasts), key("eject_for"), "must be 1s to 1h");
    let reason = format!("must be at least {section}.eject_for, and at most 24h");
    rules.require(longest >= lasts && longest <= LONGEST_EJECTION, key("eject_for_max"), reason);
    rules.require((0.0..=1.0).contains(&most), key("max_ejected"), "must be 0 to 1");
    for (index, status) in statuses.iter().enumerate() {
        let reason = "must be 500 to 599: an answer below 500 shows that the node works";
        rules.require((500..=599).contains(status), key(&format!("eject_statuses[{index}]")), reason);
    }
}

fn check_web(web: &WebChecks, rules: &mut RuleCheck) {
    let is_path = web.path.starts_with('/') && web.path.bytes().all(|b| b.is_ascii_graphic());
    rules.require(is_path, "health.web.path", "must start with / and hold no blank; write %20 for one");
    let is_host = |host: &str| host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b));
    let is_host = web.host.as_deref().is_none_or(is_host);
    rules.require(is_host, "health.web.host", "wanted a host name, with or without a port");
    rules.require(!web.expect.is_empty(), "health.web.expect", "must hold at least one status code");
    for (index, status) in web.expect.iter().enumerate() {
        let key = format!("health.web.expect[{index}]");
        rules.require((100..=599).contains(status), key, "must be 100 to 599");
    }
    let is_short = web.expect_body.as_deref().is_none_or(|text| text.len() <= LONGEST_EXPECTED);
    rules.require(is_short, "health.web.expect_body", "must be at most 1024 bytes");
    rules.require((0.0..=1.0).contains(&web.panic_threshold), "health.web.panic_threshold", "must be 0 to 1");
}

/// Fails if this is no file that can be read; a directory can be opened.
fn read_a_byte(file: &Path) -> io::Result<()> {
    File::open(file)?.read(&mut [0]).map(drop)
}

/// The token in the file that this key names, if it names one.
pub(super) fn read_token(key: &str, file: Option<&Path>) -> Result<Option<Token>, Violation> {
    let refused = |error: super::TokenError| Violation { key: key.to_owned(), reason: error.to_string() };
    file.map(Token::read).transpose().map_err(refused)
}

/// Whether a header may say that the client came by TLS: a token (RFC 9110 section 5.6.2) that has no other meaning.
/// An underscore is refused, though a token may have one: the origin listener drops such names from every request.
/// Magento's `SSL_OFFLOADED` is set by `SSL-OFFLOADED`, since PHP reads both as the same.
fn is_offload_header(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^`|~".contains(&byte);
    name.bytes().all(is_allowed) && !TAKEN_FIELDS.iter().any(|taken| taken.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_tells_of_tls_is_a_token_with_no_other_meaning() {
        for good in ["X-Forwarded-Proto", "SSL-OFFLOADED", "x.tls~1"] {
            assert!(is_offload_header(good), "{good}");
        }
        for bad in ["SSL_OFFLOADED", "a b", "a:", "a\r\nb", "ü", "Host", "host", "te", "X-FORWARDED-FOR"] {
            assert!(!is_offload_header(bad), "{bad}");
        }
    }
}
