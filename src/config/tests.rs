//! The corpus in `tests/config` and what needs an environment.

use super::*;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/config");

fn corpus(kind: &str) -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(Path::new(CORPUS).join(kind)).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

fn with(file: &str, env: &[(&str, &str)]) -> Result<Config, String> {
    let env = env.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    Config::assemble(Some(("clearcoat.toml".to_owned(), file)), env).map_err(|errors| errors.to_string())
}

fn from_env(env: &[(&str, &str)]) -> Result<Config, String> {
    with("", env)
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
        let config = with(&text, &[]).unwrap_or_else(|errors| panic!("{}: {errors}", path.display()));
        assert_eq!(with(&config.to_toml().unwrap(), &[]).unwrap(), config, "{}", path.display());
    }
}

#[test]
fn the_documented_example_names_every_key() {
    let text = std::fs::read_to_string(Path::new(CORPUS).join("valid/full.toml")).unwrap();
    let written: toml::Table = text.parse().unwrap();
    let effective: toml::Table = with(&text, &[]).unwrap().to_toml().unwrap().parse().unwrap();
    for (section, value) in effective {
        let Some(keys) = value.as_table() else { continue };
        for key in keys.keys() {
            assert!(written[&section].get(key).is_some(), "{section}.{key}");
        }
    }
}

#[test]
fn every_default_passes_every_check() {
    assert_eq!(from_env(&[]).unwrap(), Config::default());
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
    ]);
    let config = config.unwrap();
    assert_eq!(config.edge.listen, ["[::]:8080".parse().unwrap(), "127.0.0.1:0".parse().unwrap()]);
    assert_eq!(config.edge.policy, crate::balance::Policy::RoundRobin);
    assert_eq!(config.edge.bounded_load, 2.0);
    assert_eq!(config.purge.allow, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(config.health.web.interval.as_secs(), 7);
    assert_eq!(config.health.web.host, "8080");
    assert_eq!(config.health.web.expect, [200, 204]);
    assert!(config.edge.trusted_proxies.is_empty());
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
fn a_wrong_variable_is_named_with_its_key_and_value() {
    for (variable, value, error) in [
        ("CLEARCOAT_EDGE__POLCY", "random", "unknown key; allowed: listen, policy, "),
        ("CLEARCOAT_EGDE__LISTEN", "x", "egde: unknown key; allowed: edge, origin, "),
        ("CLEARCOAT_RUNTIME__WORKERS", "many", "runtime.workers = \"many\": wanted a whole number from 0 to "),
        ("CLEARCOAT_HEALTH__WEB__EXPECT", "200,6000", "health.web.expect[1] = \"6000\": must be 100 to 599"),
        ("CLEARCOAT_NODE", "web", "node[0] = \"web\": wanted a TOML array of inline tables"),
        ("CLEARCOAT_NODE", "[{role = 'web', id = 'a'}]", "node[0].address: wanted, but missing"),
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
    assert_eq!(Config::load(Some(&argument), env()).unwrap().log.level, LogLevel::Warn);
    assert_eq!(Config::load(None, env()).unwrap().log.level, LogLevel::Debug);
    let missing = dir.path().join("none.toml");
    let errors = Config::load(Some(&missing), std::iter::empty()).unwrap_err().to_string();
    assert!(errors.starts_with(&format!("{}: ", missing.display())), "{errors}");
}
