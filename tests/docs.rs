//! Holds the documents to the code: what they list is what there is.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed, which is what it is for")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use clearcoat::config::{Section, sections};
use clearcoat::fleet::{NodeId, Role};
use clearcoat::telemetry::{FileShare, Metrics, PurgeResult, RetryReason};

fn document(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn every_metric_is_documented_and_every_documented_one_exists() {
    let metrics = Metrics::new().unwrap();
    for role in [Role::Web, Role::Varnish] {
        metrics.node(role, &NodeId::try_from("a").unwrap()).vcl();
    }
    metrics.count_retry(Role::Web, RetryReason::Connect);
    metrics.purge.requested("tags", PurgeResult::Applied);
    metrics.purge.named("cat_p", 1);
    metrics.purge.sent_by("10.0.0.5");
    metrics.purge.wide("cat_p");
    metrics.journal.began_anew("lost", true);
    metrics.tls_certificate("a.pem", 0);
    metrics.files.share(FileShare::EdgeNodes);
    let text = String::from_utf8(metrics.render().unwrap()).unwrap();
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let exported: BTreeSet<&str> = names.map(|name| name.strip_prefix("clearcoat_").unwrap_or(name)).collect();
    let table = document("docs/metrics.md");
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<&str> = rows.filter_map(|row| row.split('`').next()).collect();
    assert_eq!(documented, exported);
}

/// Text for a cell of a table, in which a page of the documents is a link.
fn cell(text: &str) -> String {
    let text = text.replace('|', "\\|");
    let mut linked = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("docs/") {
        let (page, behind) = after.split_once(".md").unwrap();
        linked += &format!("{before}[{page}.md]({page}.md)");
        rest = behind;
    }
    linked + rest
}

/// A section as a table: the key, its default, what is allowed, what it is and when to change it.
fn section_table(section: &Section) -> String {
    /// A list that is longer stands in the example alone.
    const LONGEST: usize = 120;
    let mut page = format!("\n## `{}`\n\n", section.heading());
    if !section.about.is_empty() {
        page += &format!("{}.\n\n", cell(&section.about));
    }
    page += "| key | default | allowed | what it is, and when to change it |\n| --- | --- | --- | --- |\n";
    for setting in &section.settings {
        let name = setting.key.strip_prefix(&format!("{}.", section.name)).unwrap();
        let default = match setting.default.as_str() {
            word @ ("none" | "required") => word.to_owned(),
            long if long.len() > LONGEST => "a long list: [clearcoat.toml](clearcoat.toml)".to_owned(),
            value => format!("`{value}`"),
        };
        let meaning = if setting.meaning.is_empty() { String::new() } else { format!("{}.", cell(&setting.meaning)) };
        let said =
            [meaning, cell(&setting.when)].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("<br>");
        page += &format!("| `{name}` | {default} | {} | {said} |\n", cell(&setting.allowed));
    }
    page
}

#[test]
fn the_page_of_settings_is_what_the_program_says() {
    const INTRODUCTION: &str = "# Settings\n\n\
        <!-- Made by a test: UPDATE=1 cargo test --test docs settings. Its words come from clearcoat.toml and when-to-change.toml. -->\n\n\
        Every key, by its section. [clearcoat.toml](clearcoat.toml) is the same as a file, and `man clearcoat.toml` as a manual page. Each key\n\
        is an environment variable as well: `edge.listen` is `CLEARCOAT_EDGE__LISTEN`. `clearcoat check` names what is wrong with a file, with\n\
        line and column; `clearcoat check --show` prints every key with its value. What can change without a restart:\n\
        [operations.md](operations.md), Reloading the configuration.\n";
    let sections = sections();
    let page = INTRODUCTION.to_owned() + &sections.iter().map(section_table).collect::<String>();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(format!("{}/docs/settings.md", env!("CARGO_MANIFEST_DIR")), &page).unwrap();
    }
    assert!(
        document("docs/settings.md") == page,
        "docs/settings.md is another: UPDATE=1 cargo test --test docs settings writes it"
    );
}

/// Every Markdown file that users read, from the root of the repository.
fn pages() -> Vec<String> {
    let docs = std::fs::read_dir(format!("{}/docs", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let names = docs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pages = names.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}"));
    pages.chain(["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"].map(str::to_owned)).collect()
}

#[test]
fn what_a_page_links_to_is_there() {
    for page in pages() {
        let text = document(&page);
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(&page).parent().unwrap().to_owned();
        for link in links(&text) {
            if link.starts_with("http") {
                continue;
            }
            let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
            assert!(path.is_empty() || folder.join(path).exists(), "{page}: {link}");
            if let Some(anchor) = anchor {
                let linked =
                    if path.is_empty() { text.clone() } else { std::fs::read_to_string(folder.join(path)).unwrap() };
                assert!(anchors(&linked).any(|there| there == anchor), "{page}: {link} leads to no heading");
            }
        }
    }
}

/// The anchors of the headings of a page, which have no links in them, as mdBook and GitHub make them.
fn anchors(text: &str) -> impl Iterator<Item = String> {
    let headings = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    headings.map(|heading| {
        let kept = heading.chars().filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
    })
}

#[test]
fn a_heading_has_the_anchor_that_books_give_it() {
    let text = "# `clearcoat doctor`, and a port\ntext\n## What is *not* done: 2 things\n";
    assert_eq!(anchors(text).collect::<Vec<_>>(), ["clearcoat-doctor-and-a-port", "what-is-not-done-2-things"]);
}

#[test]
fn each_alert_has_its_paragraph_in_the_runbook() {
    let (rules, mut alerts) = (document("deploy/prometheus/rules.yml"), 0);
    for runbook in rules.lines().filter_map(|line| line.trim().strip_prefix("runbook: ")) {
        let (page, anchor) = runbook.split_once('#').unwrap();
        assert!(anchors(&document(page)).any(|there| there == anchor), "{runbook} leads to no heading");
        alerts += 1;
    }
    assert_eq!(alerts, rules.matches("- alert: ").count());
}

/// Where a page says that something else stands.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// A page that nothing leads to is read by nobody, and in the book there is nothing but its own folder.
#[test]
fn the_book_has_every_page_once_and_leads_out_of_nowhere() {
    let summary = document("docs/SUMMARY.md");
    let mut listed: Vec<String> = links(&summary).map(|page| format!("docs/{page}")).collect();
    listed.sort();
    let is_a_page = |page: &String| page.starts_with("docs/") && page != "docs/SUMMARY.md" && page != "docs/plan.md";
    let mut there: Vec<String> = pages().into_iter().filter(is_a_page).collect();
    there.sort();
    assert_eq!(listed, there, "what docs/SUMMARY.md lists, and what is in docs");
    for page in there {
        let text = document(&page);
        let outside = links(&text).find(|link| link.starts_with("../") || link.starts_with("plan.md"));
        assert_eq!(outside, None, "{page} leads out of the book");
    }
}

/// Those that begin with the name of the file: they can be pasted as they stand.
#[test]
fn a_configuration_in_a_page_is_a_good_one() {
    let mut found = 0;
    for page in pages() {
        let text = document(&page);
        for block in text.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            if !block.starts_with("# clearcoat.toml") {
                continue;
            }
            found += 1;
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("clearcoat.toml");
            std::fs::write(&file, block).unwrap();
            let config = clearcoat::config::Config::load(Some(&file), std::iter::empty());
            assert!(config.is_ok(), "{page}: {}\n{block}", config.unwrap_err());
        }
    }
    assert!(found >= 5, "{found} configurations");
}

#[test]
fn the_code_map_names_files_that_exist() {
    let text = document("ARCHITECTURE.md");
    let map = text.split("## Code map").nth(1).unwrap().split("\n## ").next().unwrap();
    for name in map.split('`').skip(1).step_by(2).filter(|name| name.contains('/') || name.ends_with(".rs")) {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(root.join(name).exists() || root.join("src").join(name).exists(), "{name}");
    }
}

/// `cargo test` is content with a filter that matches nothing.
#[test]
fn the_soak_runs_a_test_that_is_there() {
    let makefile = document("Makefile");
    let filters: Vec<&str> = makefile.lines().filter_map(|line| Some(line.split_once(" consistency::")?.1)).collect();
    assert_eq!(filters.len(), 1);
    let prefix = filters[0].split(' ').next().unwrap();
    let tests = document("tests/it/consistency.rs");
    assert_eq!(tests.matches(&format!("#[test]\nfn {prefix}")).count(), 5, "{prefix}");
}

/// A release is seldom made: what it calls must be there on that day, and be what it was.
#[test]
fn the_release_calls_what_there_is_and_what_nobody_can_change() {
    let (workflow, makefile) = (document(".github/workflows/release.yml"), document("Makefile"));
    let mut called = 0;
    for command in workflow.lines().filter_map(|line| line.trim().strip_prefix("- run: make ")) {
        for target in command.split(' ').filter(|word| !word.contains('=')) {
            called += 1;
            assert!(makefile.lines().any(|line| line.starts_with(&format!("{target}:"))), "make {target}");
        }
    }
    assert!(called >= 3, "{called} targets");
    let actions: Vec<&str> = workflow.lines().filter_map(|line| line.trim().strip_prefix("- uses: ")).collect();
    for action in &actions {
        let revision =
            action.strip_prefix("actions/").and_then(|action| action.split_once('@')).map(|(_, revision)| revision);
        let revision = revision.unwrap_or_else(|| panic!("not one of GitHub's own: {action}"));
        let is_pinned = revision.bytes().take_while(u8::is_ascii_hexdigit).count() == 40;
        assert!(is_pinned && revision[40..].starts_with(" # v"), "{action}: a tag can be moved, a commit cannot");
    }
    assert_eq!(actions.len(), workflow.matches("uses:").count(), "an action in another form");
}

/// What a reader may paste: the documents, the examples, and what is deployed.
fn pasted() -> Vec<(String, String)> {
    fn walk(folder: &std::path::Path, found: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("README.md")];
    ["docs", "examples", "deploy"].iter().for_each(|folder| walk(&root.join(folder), &mut files));
    let named = |path: &std::path::Path| path.strip_prefix(root).unwrap().display().to_string();
    // A picture is no text.
    files.iter().filter_map(|path| Some((named(path), std::fs::read_to_string(path).ok()?))).collect()
}

/// The networks whose addresses stand for others (RFC 5737, RFC 3849), of this machine, and of the default of `purge.allow`.
fn is_an_example(address: IpAddr, is_network: bool) -> bool {
    let defaults = ["10.0.0.0", "172.16.0.0", "192.168.0.0", "fc00::"];
    let is_default = is_network && defaults.iter().any(|default| default.parse() == Ok(address));
    let documented = match address {
        IpAddr::V4(address) => address.is_documentation(),
        IpAddr::V6(address) => address.segments()[..2] == [0x2001, 0xdb8],
    };
    address.is_loopback() || address.is_unspecified() || is_default || documented
}

/// The words of a text that are made of these characters, each with what stands before and after it.
fn words(text: &str, is_of_word: fn(char) -> bool) -> Vec<(&str, &str, &str)> {
    let mut words = Vec::new();
    let mut at = 0;
    while let Some(start) = text[at..].find(is_of_word).map(|start| at + start) {
        let end = text[start..].find(|c| !is_of_word(c)).map_or(text.len(), |length| start + length);
        words.push((&text[..start], &text[start..end], &text[end..]));
        at = end;
    }
    words
}

/// Whoever pastes an example must not reach somebody's network.
#[test]
fn example_addresses_are_of_the_networks_that_are_kept_for_examples() {
    let mut seen = 0;
    for (file, text) in pasted() {
        for (before, word, after) in words(&text, |c| c.is_ascii_hexdigit() || c == '.' || c == ':') {
            // The port goes, and the dot at the end of a sentence.
            let v4 = word.split(':').next().unwrap().trim_end_matches('.');
            let v6 = word.trim_end_matches('.');
            let address =
                v4.parse::<Ipv4Addr>().map(IpAddr::from).or_else(|_| v6.parse::<Ipv6Addr>().map(IpAddr::from));
            let Ok(address) = address else { continue };
            // Such as the end of a longer word.
            if before.ends_with(|c: char| c.is_alphanumeric() || c == '-') {
                continue;
            }
            seen += 1;
            assert!(is_an_example(address, after.starts_with('/')), "{file}: {word}");
        }
    }
    assert!(seen > 50, "{seen} addresses");
}

/// The same for names: those below `.example` (RFC 2606) are nobody's.
#[test]
fn example_names_are_below_example() {
    /// Endings of names that are somebody's, or that somebody uses inside.
    const TAKEN: [&str; 15] = [
        "com",
        "net",
        "org",
        "io",
        "dev",
        "de",
        "eu",
        "info",
        "cloud",
        "internal",
        "local",
        "lan",
        "test",
        "corp",
        "localdomain",
    ];
    let mut seen = 0;
    for (file, text) in pasted() {
        for (before, word, _) in words(&text, |c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
            let word = word.trim_end_matches('.');
            let Some((_, ending)) = word.rsplit_once('.') else { continue };
            seen += usize::from(ending == "example");
            let is_link = before.ends_with("://") && !word.contains("example") && !word.contains("shop");
            // Of every cluster of Kubernetes, and of its API; and a firm that is spoken of.
            let of_kubernetes = [".svc.cluster.local", "kubernetes.io", ".k8s.io"];
            let is_known = of_kubernetes.iter().any(|known| word.ends_with(known)) || word == "amazee.io";
            assert!(!TAKEN.contains(&ending) || is_link || is_known, "{file}: {word}");
        }
    }
    assert!(seen > 5, "{seen} names");
}
