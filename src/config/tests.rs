//! The corpus in `tests/config` and what needs an environment.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::raw::FILE_VARIABLE;
use super::*;

mod schema;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/config");

fn corpus(kind: &str) -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(Path::new(CORPUS).join(kind)).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

fn with(file: &str, env: &[(&str, &str)]) -> Result<Config, String> {
    assembled(file, env, NamedFiles::Here)
}

/// Without the files that are named.
fn of_elsewhere(file: &str, env: &[(&str, &str)]) -> Result<Config, String> {
    assembled(file, env, NamedFiles::Elsewhere)
}

fn assembled(file: &str, env: &[(&str, &str)], files: NamedFiles) -> Result<Config, String> {
    let env = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    Config::assemble(Some(("clearcoat.toml".to_owned(), file)), env, files).map_err(|errors| errors.to_string())
}

fn from_env(env: &[(&str, &str)]) -> Result<Config, String> {
    with("", env)
}

#[test]
fn the_variables_of_an_agent_are_not_ours() {
    for name in ["CLEARCOAT_AGENT_ROLE", "CLEARCOAT_AGENT_CHECK_INTERVAL", "CLEARCOAT_AGENT_PORT"] {
        assert_eq!(from_env(&[(name, "x")]), from_env(&[]), "{name}");
    }
}

#[test]
fn each_invalid_file_is_refused_with_the_errors_in_its_first_comment() {
    for (path, text) in corpus("invalid") {
        let expected: Vec<&str> = text.lines().map_while(|line| line.strip_prefix("# ")).collect();
        assert_eq!(with(&text, &[]).unwrap_err(), expected.join("\n"), "{}", path.display());
    }
}

#[test]
fn each_valid_file_is_read_and_its_effective_form_reads_the_same() {
    for (path, text) in corpus("valid") {
        let config = of_elsewhere(&text, &[]).unwrap_or_else(|errors| panic!("{}: {errors}", path.display()));
        assert_eq!(of_elsewhere(&config.to_toml().unwrap(), &[]).unwrap(), config, "{}", path.display());
    }
}

#[test]
fn the_documented_example_names_every_key() {
    let text = std::fs::read_to_string(Path::new(CORPUS).join("valid/full.toml")).unwrap();
    let written = keys(&text);
    for key in keys(&of_elsewhere(&text, &[]).unwrap().to_toml().unwrap()) {
        assert!(written.contains(&key), "{key}");
    }
}

/// The keys of a document, without the places of list items: `edge.tls.listen`.
fn keys(text: &str) -> BTreeSet<String> {
    fn walk(value: &toml::Value, path: &str, keys: &mut BTreeSet<String>) {
        match value {
            toml::Value::Table(entries) => {
                for (name, value) in entries {
                    let path = format!("{path}.{name}");
                    walk(value, &path, keys);
                    keys.insert(path);
                }
            }
            toml::Value::Array(items) => items.iter().for_each(|item| walk(item, path, keys)),
            _ => {}
        }
    }
    let mut keys = BTreeSet::new();
    walk(&toml::Value::Table(text.parse().unwrap()), "", &mut keys);
    keys
}

#[test]
fn every_default_passes_every_check() {
    let mut default = Config::default();
    default.fill_in(&Raw::empty());
    assert_eq!(from_env(&[]).unwrap(), default);
}

#[test]
fn the_journal_is_where_the_registry_is_unless_somebody_says_otherwise() {
    let kind = |file: &str, env: &[(&str, &str)]| with(file, env).unwrap().journal.kind;
    assert_eq!(kind("", &[]), JournalKind::Disk);
    assert_eq!(kind("registry.kind = 'etcd'", &[]), JournalKind::Etcd);
    assert_eq!(kind("registry.kind = 'etcd'\njournal.kind = 'disk'", &[]), JournalKind::Disk);
    assert_eq!(kind("registry.kind = 'etcd'", &[("CLEARCOAT_JOURNAL__KIND", "disk")]), JournalKind::Disk);
    assert_eq!(kind("journal.kind = 'etcd'", &[("CLEARCOAT_REGISTRY__KIND", "static")]), JournalKind::Etcd);
}

#[test]
fn a_variable_is_read_as_what_its_key_wants() {
    let config = from_env(&[
        ("CLEARCOAT_EDGE__LISTEN", "[::]:8080, 127.0.0.1:0"),
        ("CLEARCOAT_edge__Policy", "round_robin"),
        ("CLEARCOAT_EDGE__BOUNDED_LOAD", "2"),
        ("CLEARCOAT_PURGE__ALLOW", r#"["10.0.0.0/8"]"#),
        ("CLEARCOAT_HEALTH__WEB__INTERVAL", "7s"),
        ("CLEARCOAT_HEALTH__WEB__HOST", "8080"),
        ("CLEARCOAT_HEALTH__WEB__EXPECT", "200,204"),
        ("CLEARCOAT_EDGE__TRUSTED_PROXIES", ""),
        ("CLEARCOAT_EDGE__HTTP2", "false"),
        ("CLEARCOAT_LIMITS__MAX_BODY", "5000000000"),
        ("CLEARCOAT_RUNTIME__SPIN", "50us"),
    ]);
    let config = config.unwrap();
    assert_eq!(config.edge.listen, ["[::]:8080".parse().unwrap(), "127.0.0.1:0".parse().unwrap()]);
    assert_eq!(config.edge.policy, crate::balance::Policy::RoundRobin);
    assert_eq!(config.edge.bounded_load, Some(2.0));
    assert_eq!(config.purge.allow, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(config.health.web.interval.as_secs(), 7);
    assert_eq!(config.health.web.host.as_deref(), Some("8080"));
    assert_eq!(config.health.web.expect, [200, 204]);
    assert!(config.edge.trusted_proxies.is_empty());
    assert!(!config.edge.http2);
    assert_eq!(config.limits.longest_body(), 5_000_000_000);
    assert_eq!(config.runtime.spin.as_micros(), 50);
}

#[test]
fn variables_win_over_the_file_and_nodes_are_replaced_as_a_whole() {
    let file = "edge.policy = 'random'\n[[node]]\nrole = 'web'\nid = 'a'\naddress = 'a:80'\n";
    let nodes = r#"[{role = "varnish", id = "v", address = "v:6081"}]"#;
    let config = with(file, &[("CLEARCOAT_EDGE__POLICY", "rendezvous"), ("CLEARCOAT_NODE", nodes)]).unwrap();
    assert_eq!(config.edge.policy, crate::balance::Policy::Rendezvous);
    assert_eq!(config.nodes.len(), 1);
    assert_eq!(config.nodes[0].id.as_str(), "v");
}

#[test]
fn one_variable_holds_all_certificates() {
    let file = "[[edge.tls]]\nlisten = ['0.0.0.0:443']\ncert = 'old.pem'\nkey = 'old.key'\n";
    let tables = r#"[{listen = ["0.0.0.0:8443"], cert = "a.pem", key = "a.key"},
        {listen = ["0.0.0.0:8443", "[::]:8443"], cert = "b.pem", key = "b.key"}]"#;
    let tls = of_elsewhere(file, &[("CLEARCOAT_EDGE__TLS", tables)]).unwrap().edge.tls;
    assert_eq!(tls.iter().map(|table| table.cert.to_str().unwrap()).collect::<Vec<_>>(), ["a.pem", "b.pem"]);
    assert_eq!(tls[1].listen, ["0.0.0.0:8443".parse().unwrap(), "[::]:8443".parse().unwrap()]);
    assert!(with(file, &[("CLEARCOAT_EDGE__TLS", "")]).unwrap().edge.tls.is_empty());
}

#[test]
fn the_header_that_is_always_written_is_no_other_header() {
    let header = |name: &str| with(&format!("edge.offload_header = '{name}'"), &[]).unwrap().edge.offload_header;
    assert_eq!(header("x-forwarded-proto"), None);
    assert_eq!(header("SSL-OFFLOADED").as_deref(), Some("SSL-OFFLOADED"));
}

#[test]
fn no_time_at_all_reads_as_it_prints() {
    let config = with("runtime.spin = '0us'", &[]).unwrap();
    assert!(config.runtime.spin.is_zero());
    assert!(config.to_toml().unwrap().contains("spin = \"0s\""));
}

#[test]
fn a_wrong_variable_is_named_with_its_key_and_value() {
    for (variable, value, error) in [
        ("CLEARCOAT_EDGE__POLCY", "random", "unknown key; did you mean edge.policy? allowed: listen, policy, "),
        ("CLEARCOAT_EGDE__LISTEN", "x", "egde: unknown key; did you mean edge? allowed: edge, origin, "),
        ("CLEARCOAT_EDGE__MAX_BODY", "1", "unknown key; did you mean limits.max_body? allowed: listen, "),
        ("CLEARCOAT_LIMITS__HEADER_TIMEOUT", "5s", "limits.header_timeout: is CLEARCOAT_TIMEOUTS__CLIENT_HEADER now"),
        ("CLEARCOAT_EDGE__POLICY", "randon", "unknown value; did you mean random? allowed: "),
        ("CLEARCOAT_RUNTIME__WORKERS", "many", "runtime.workers = \"many\": wanted a whole number from 0 to "),
        ("CLEARCOAT_HEALTH__WEB__EXPECT", "200,6000", "health.web.expect[1] = \"6000\": must be 100 to 599"),
        ("CLEARCOAT_NODE", "web", "node[0] = \"web\": wanted a TOML array of inline tables"),
        ("CLEARCOAT_NODE", "[{role = 'web', id = 'a'}]", "node[0].address: wanted, but missing"),
        ("CLEARCOAT_NODE", "[{role = 'web', id = a, address = 'a:80'}]", "node[0] = \"[{role = "),
        (
            "CLEARCOAT_EDGE__TLS",
            "a.pem",
            "edge.tls[0] = \"a.pem\": wanted a TOML array of inline tables such as [{listen",
        ),
        ("CLEARCOAT_EDGE__TLS", "{cert = 'a.pem', key = 'a.key'}", "edge.tls[0] = \"{cert = "),
        ("CLEARCOAT_EDGE__TLS", "[{cert = 'a.pem', key = 'a.key'}]", "edge.tls[0].listen: wanted, but missing"),
        ("CLEARCOAT_EDGE__TLS__CERT", "a.pem", "edge.tls: wanted a list"),
        ("CLEARCOAT_EDGE__HTTP2", "on", "edge.http2 = \"on\": wanted true or false"),
        ("CLEARCOAT_HEALTH__WEB", "/", "health.web = \"/\": wanted a table; set each of its keys by a variable"),
        ("CLEARCOAT_EDGE__LISTEN__X", "1", "edge.listen: wanted a list"),
    ] {
        let errors = from_env(&[(variable, value)]).unwrap_err();
        assert!(errors.starts_with(&format!("{variable}: ")) && errors.contains(error), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn variables_that_set_one_key_twice_are_refused() {
    let errors = from_env(&[("CLEARCOAT_EDGE__POLICY", "random"), ("CLEARCOAT_edge__policy", "random")]);
    assert_eq!(errors.unwrap_err(), "CLEARCOAT_edge__policy: sets the same key as CLEARCOAT_EDGE__POLICY");
}

#[test]
fn variables_of_kubernetes_and_of_the_command_line_are_left_alone() {
    let foreign = ["CLEARCOAT_PORT", "CLEARCOAT_SERVICE_HOST", "CLEARCOAT_ADMIN", "CLEARCOAT_LOG", "PATH"];
    assert!(from_env(&foreign.map(|name| (name, "tcp://10.0.0.1:6081"))).is_ok());
}

#[test]
fn a_default_that_does_not_go_with_what_was_set_is_named_as_a_default() {
    let errors = from_env(&[("CLEARCOAT_HEALTH__WEB__INTERVAL", "1s")]).unwrap_err();
    let expected =
        "default: health.web.timeout = \"2s\": must be above 0s and at most health.web.interval, which is 1s";
    assert_eq!(errors, expected);
}

#[test]
fn the_token_is_read_at_load_and_never_printed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "s3cret\n").unwrap();
    let config = from_env(&[("CLEARCOAT_PURGE__TOKEN_FILE", file.to_str().unwrap())]).unwrap();
    assert!(config.purge.token.as_ref().unwrap().matches(b"s3cret"));
    let shown = format!("{config:?}{}", config.to_toml().unwrap());
    assert!(shown.contains(file.to_str().unwrap()) && !shown.contains("s3cret"));
    std::fs::write(&file, "\n").unwrap();
    let errors = from_env(&[("CLEARCOAT_PURGE__TOKEN_FILE", file.to_str().unwrap())]).unwrap_err();
    assert!(errors.ends_with("the file is empty; it must hold a token"), "{errors}");
}

#[test]
fn the_file_is_the_argument_or_else_what_the_variable_names() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, level: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("log.level = '{level}'")).unwrap();
        path
    };
    let (argument, named) = (file("a.toml", "warn"), file("b.toml", "debug"));
    let env = || std::iter::once((FILE_VARIABLE.to_owned(), named.to_str().unwrap().to_owned()));
    assert_eq!(Config::load(Some(&argument), env()).unwrap().log.level.to_string(), "warn");
    assert_eq!(Config::load(None, env()).unwrap().log.level.to_string(), "debug");
    let missing = dir.path().join("none.toml");
    let errors = Config::load(Some(&missing), std::iter::empty()).unwrap_err().to_string();
    assert!(errors.starts_with(&format!("{}: ", missing.display())), "{errors}");
}

#[test]
fn a_named_file_that_cannot_be_read_is_an_error_of_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let none = dir.path().join("none");
    let (none, folder) = (none.to_str().unwrap(), dir.path().to_str().unwrap());
    for key in ["edge.tls[0].cert", "edge.tls[0].key", "purge.token_file", "admin.token_file"].into_iter().chain([
        "registry.etcd.ca",
        "registry.etcd.cert",
        "registry.etcd.key",
        "registry.etcd.password_file",
        "traces.ca",
    ]) {
        let readable = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let file = |file: &str| {
            let at = |other: &str| if key == other { file } else { readable };
            format!(
                "purge.token_file = '{}'\nadmin.token_file = '{}'\ntraces.endpoint = 'https://otlp.example'\ntraces.ca = '{}'\n\
                 [[edge.tls]]\nlisten = ['127.0.0.1:8443']\ncert = '{}'\nkey = '{}'\n[registry.etcd]\n\
                 endpoints = ['https://etcd.example:2379']\nca = '{}'\ncert = '{}'\nkey = '{}'\nusername = 'a'\n\
                 password_file = '{}'\n",
                at("purge.token_file"),
                at("admin.token_file"),
                at("traces.ca"),
                at("edge.tls[0].cert"),
                at("edge.tls[0].key"),
                at("registry.etcd.ca"),
                at("registry.etcd.cert"),
                at("registry.etcd.key"),
                at("registry.etcd.password_file"),
            )
        };
        // Cargo.toml is no token.
        let about = |text: &str| {
            let errors = with(&file(text), &[("CLEARCOAT_REGISTRY__KIND", "etcd")]).unwrap_err();
            errors.lines().find(|line| line.contains(&format!(": {key} = "))).map(str::to_owned)
        };
        for text in [none, folder] {
            let error = about(text).unwrap_or_else(|| panic!("{key} = {text}: not named"));
            assert!(error.contains(text) && error.contains("(os error ") && error.contains(':'), "{error}");
            assert_eq!(error.matches("os error").count(), 1, "{error}");
        }
        assert!(key.ends_with("token_file") || about(readable).is_none(), "{key}");
        assert!(of_elsewhere(&file(none), &[]).is_ok(), "{key}");
    }
}

#[test]
fn what_is_hardly_meant_is_remarked_and_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("clearcoat.toml");
    let remarks = |text: &str, env: &[(&str, &str)]| {
        std::fs::write(&file, text).unwrap();
        let env = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        let source = ConfigSource::new(Some(file.clone()), env);
        source.remarks(&source.load().unwrap()).join("; ")
    };
    assert!(remarks("", &[]).starts_with("no node is configured"));
    let node = |role: &str| format!("[[node]]\nrole = '{role}'\nid = 'a'\naddress = '192.0.2.1:80'\n");
    assert!(remarks(&node("web"), &[]).starts_with("no Varnish is configured"));
    assert!(remarks(&node("varnish"), &[]).starts_with("no web node is configured"));
    let both = node("web") + &node("varnish");
    assert_eq!(remarks(&both, &[("CLEARCOAT_CONFIG", "x"), ("CLEARCOAT_PORT", "tcp://192.0.2.1:80")]), "");
    assert_eq!(remarks("registry.kind = 'etcd'", &[]), "");
    let https =
        "[edge]\ntrusted_proxies = ['192.0.2.1']\nhttps = { redirect = true, port = 8443, hsts_max_age = 300 }\n";
    assert!(remarks(&(https.to_owned() + &both), &[]).starts_with("edge.https.port: 8443, while hsts_max_age"));
    let stray = remarks(&both, &[("CLEARCOAT_LOG_FORMAT", "json")]);
    assert_eq!(stray, "CLEARCOAT_LOG_FORMAT: this variable means nothing; did you mean CLEARCOAT_LOG__FORMAT?");
}
