//! What `deploy/` gives to Prometheus and Grafana, with the real Prometheus.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::client::{exchange, get};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};
use crate::support::prometheus::Prometheus;

const RULES: &str = include_str!("../../deploy/prometheus/rules.yml");
const DASHBOARD: &str = include_str!("../../deploy/grafana/clearcoat.json");
const RUNBOOK: &str = include_str!("../../docs/operations.md");
const METRICS: &str = include_str!("../../docs/metrics.md");

fn promtool(arguments: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus");
    let output = Command::new("promtool").args(arguments).current_dir(folder).output();
    let output = output.expect("Debian's package prometheus");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn the_alerts_fire_when_they_should_and_each_has_its_paragraph() {
    promtool(&["check", "rules", "rules.yml"]);
    promtool(&["check", "config", "prometheus.yml"]);
    promtool(&["test", "rules", "rules_test.yml"]);
    let alerts: BTreeSet<&str> = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let paragraphs: BTreeSet<&str> = RUNBOOK
        .lines()
        .filter_map(|line| line.strip_prefix("## "))
        .filter(|line| line.starts_with("Clearcoat"))
        .collect();
    assert_eq!(alerts, paragraphs);
    let anchors: BTreeSet<&str> =
        RULES.lines().filter_map(|line| line.trim().strip_prefix("runbook: docs/operations.md#")).collect();
    assert_eq!(
        anchors,
        alerts.iter().map(|alert| alert.to_lowercase()).collect::<BTreeSet<_>>().iter().map(|alert| &**alert).collect()
    );
}

/// The names of clearcoat's metrics in a text, as documented.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let names = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names = names.filter_map(|name| name.strip_prefix("clearcoat_"));
    names.map(|name| name.trim_end_matches("_bucket").to_owned()).collect()
}

#[test]
fn alerts_and_dashboard_name_metrics_that_are_documented() {
    let names: BTreeSet<String> = metrics_in(RULES).union(&metrics_in(DASHBOARD)).cloned().collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        assert!(METRICS.contains(&format!("`{name}`")), "{name}");
    }
}

/// The queries of the dashboard, with what Grafana would put in place of its variables.
fn queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().expect("queries"));
    let queries = targets.map(|target| target["expr"].as_str().expect("a query"));
    queries
        .map(|query| query.replace("$__rate_interval", "30s").replace("$instance", ".+").replace("$job", ".+"))
        .collect()
}

#[test]
fn prometheus_finds_every_node_and_each_query_of_the_dashboard_has_data() {
    let fleet = Fleet::start(&Plan { varnish: 4, web: 2, replicas: 2, ..Plan::default() });
    let admin = fleet.clearcoat.admin;
    let refused = get(admin, "/sd/prometheus?role=cache").expect("an answer");
    assert_eq!(
        (refused.status, refused.text()),
        (400, "role=cache: there are role=web, role=varnish and port=NUMBER\n")
    );
    assert_eq!(get(admin, "/sd/prometheus").expect("an answer").json(), serde_json::json!([]), "no port is known");
    let clearcoats: Vec<String> = fleet.clearcoats().map(|each| format!("'{}'", each.admin)).collect();
    let config = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: clearcoat\n  static_configs: [{{targets: [{}]}}]\n\
         - job_name: nodes\n  http_sd_configs: [{{url: 'http://{admin}/sd/prometheus?port=1'}}]\n",
        clearcoats.join(", ")
    );
    let folder = tempfile::tempdir().expect("a folder");
    let prometheus = Prometheus::start(folder.path(), &config);
    eventually("every node is found", || {
        let targets = prometheus.targets();
        let of =
            |role: &str| targets.iter().filter(|labels| labels["role"] == role && labels["id"].is_string()).count();
        (of("varnish") == 4 && of("web") == 2 && targets.len() == 8).then_some(())
    });
    let queries = queries();
    assert!(queries.len() > 20);
    let mut silent: Vec<&String> = queries.iter().collect();
    let mut page = 0;
    eventually("each query has data", || {
        // Of everything that a query is about: pages that are cached, fetched and purged.
        for _ in 0..3 {
            page += 1;
            fleet.clearcoats().for_each(|each| _ = get(each.edge, &format!("/p/{}", page % 9)).expect("an answer"));
        }
        fleet.purge_tag(&format!("cat_p_{}", page % 9));
        _ = exchange(fleet.clearcoat.edge, "POST /p/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
        silent.retain(|query| {
            let result = prometheus.query(query);
            let is_number = |value: &Value| value["value"][1].as_str().is_some_and(|number| number != "NaN");
            !result.iter().any(is_number)
        });
        silent.is_empty().then_some(())
    });
}
