//! What differs between two configurations, by the names of their keys.
//!
//! Found by comparing what both would be written as, so that no key can be forgotten here.

use toml::{Table, Value};

use super::Config;

/// The table and the key that are applied while the process runs, and so are not a difference.
const NODES: &str = "node";
const LOG_LEVEL: &str = "log.level";

impl Config {
    /// The keys whose values differ, but for the nodes and `log.level`, in the order of the alphabet. A list counts as one value.
    ///
    /// # Errors
    /// What cannot be written as TOML, such as a path that is not UTF-8.
    pub fn keys_that_differ(&self, other: &Config) -> Result<Vec<String>, toml::ser::Error> {
        let (mut mine, mut others) = (Table::try_from(self)?, Table::try_from(other)?);
        mine.remove(NODES);
        others.remove(NODES);
        let mut keys = Vec::new();
        compare("", &mine, &others, &mut keys);
        keys.retain(|key| key != LOG_LEVEL);
        // A secret is not written, and its file is the same.
        for (file, mine, others) in [
            ("purge.token_file", &self.purge.token, &other.purge.token),
            ("admin.token_file", &self.admin.token, &other.admin.token),
        ] {
            if mine != others && !keys.iter().any(|key| key == file) {
                keys.push(file.to_owned());
            }
        }
        let headers = "purge.headers";
        if self.purge.headers != other.purge.headers && !keys.iter().any(|key| key.starts_with(headers)) {
            keys.push(headers.to_owned());
        }
        keys.sort();
        Ok(keys)
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

    #[test]
    fn nodes_are_no_difference() {
        let nodes = "[{ role = \"web\", id = \"a\", address = \"10.0.0.1:80\" }]";
        assert!(differ(&config(&[]), &config(&[("CLEARCOAT_NODE", nodes)])).is_empty());
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
