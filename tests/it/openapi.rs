//! Holds `docs/openapi.json` to the answers of the running program: each path that it names is there, and no answer has a
//! field that it does not name, or lacks one that it wants.

use serde_json::{Value, json};

use crate::support::client::{Connection, exchange, get};
use crate::support::eventually;
use crate::support::fleet::{Fleet, Plan};

const DOCUMENT: &str = include_str!("../../docs/openapi.json");

/// What is wrong with a value by a schema of the document, each with its place. As much of JSON Schema as the document uses.
fn faults(document: &Value, schema: &Value, value: &Value, place: &str) -> Vec<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(reference.trim_start_matches('#')).unwrap_or_else(|| panic!("no {reference}"));
        return faults(document, target, value, place);
    }
    let kinds = match &schema["type"] {
        Value::Array(kinds) => kinds.clone(),
        kind => vec![kind.clone()],
    };
    let is_of = |kind: &Value| match kind.as_str() {
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        other => panic!("{place}: the document says {other:?}"),
    };
    if !kinds.iter().any(is_of) {
        return vec![format!("{place}: {value} is not of {kinds:?}")];
    }
    let mut found = Vec::new();
    if schema["enum"].as_array().is_some_and(|values| !values.contains(value)) {
        found.push(format!("{place}: {value} is none of {}", schema["enum"]));
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        found.extend(faults(document, &schema["items"], item, &format!("{place}[{index}]")));
    }
    let Some(entries) = value.as_object() else { return found };
    for wanted in schema["required"].as_array().into_iter().flatten() {
        if !entries.contains_key(wanted.as_str().expect("a name")) {
            found.push(format!("{place}: no {wanted}"));
        }
    }
    for (name, entry) in entries {
        let known = schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
        match known.filter(|known| known.is_object()) {
            Some(known) => found.extend(faults(document, known, entry, &format!("{place}.{name}"))),
            None => found.push(format!("{place}: {name} is not documented")),
        }
    }
    found
}

#[test]
fn the_description_of_the_api_is_what_the_program_answers() {
    let document: Value = serde_json::from_str(DOCUMENT).expect("JSON");
    // A VCL that nobody takes, for what is said of it.
    let config = "[vcl]\nmode = \"push\"\norigins = [\"127.0.0.1:9\"]\n[health.varnish]\nmanagement_port = 1\n";
    let fleet = Fleet::start(&Plan { varnish: 2, web: 1, replicas: 2, config, ..Plan::default() });
    let admin = fleet.clearcoat.admin;
    fleet.get("/p/1");
    eventually("something is said of the VCL", || fleet.clearcoat.node("varnish-1")["vcl"].is_object().then_some(()));
    let position = fleet.purge_tag("cat_p_1").json()["position"].to_string();
    eventually("every node has the purge", || {
        let detail = get(admin, &format!("/api/v1/purges/{position}")).expect("an answer").json();
        detail["nodes"].as_array()?.iter().all(|node| node["at"].is_string()).then_some(())
    });
    let mut checked = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        let real = path.replace("{position}", &position).replace("{role}/{id}", "web/web-1");
        if let Some(operation) = operations.get("get") {
            let mut connection = Connection::open(admin).expect("a connection");
            connection.send(format!("GET {real} HTTP/1.1\r\nHost: a\r\n\r\n")).expect("sent");
            let head = connection.head().expect("an answer");
            assert_eq!(head.status, 200, "{path}");
            let content = operation["responses"]["200"]["content"].as_object().expect("a kind");
            let kind = content.keys().next().expect("one kind");
            assert_eq!(head.header("Content-Type"), Some(kind.as_str()), "{path}");
            if kind == "application/json" {
                let value = get(admin, &real).expect("an answer").json();
                let wrong = faults(&document, &content[kind]["schema"], &value, path);
                assert!(wrong.is_empty(), "{wrong:#?}");
            }
        }
        if let Some(operation) = operations.get("post") {
            // Without a token it is off, and a byte more than there may be is too much.
            let head = |length: usize| format!("POST {real} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n");
            let longest = 64 * 1024 - head(10_000).len();
            for (length, status) in [(0, 403), (longest + 1, 413)] {
                let answer = exchange(admin, head(length) + &"x".repeat(length)).expect("an answer");
                assert_eq!(answer.status, status, "{path}");
                let schema = &operation["responses"][status.to_string()]["content"]["application/json"]["schema"];
                assert_eq!(faults(&document, schema, &answer.json(), path), Vec::<String>::new());
            }
        }
        checked += 1;
    }
    assert_eq!(checked, 11);
}

#[test]
fn an_order_about_a_node_is_answered_and_shown_as_described() {
    let document: Value = serde_json::from_str(DOCUMENT).expect("JSON");
    let config = "[admin]\nlisten = [\"127.0.0.1:0\"]\ntoken_file = \"tests/it/data/operator-token\"\n";
    let mut fleet = Fleet::start(&Plan { varnish: 2, web: 1, replicas: 2, config, ..Plan::default() });
    fleet.replica(1).kill();
    let admin = fleet.clearcoat.admin;
    let path = "/api/v1/nodes/{role}/{id}";
    let order = |id: &str, body: &str| {
        let token = "Authorization: Bearer s3cret-of-the-tests\r\nContent-Type: application/json";
        let length = body.len();
        exchange(
            admin,
            format!("POST /api/v1/nodes/varnish/{id} HTTP/1.1\r\nHost: a\r\n{token}\r\nContent-Length: {length}\r\n\r\n{body}"),
        )
        .expect("an answer")
    };
    for (id, body, status) in [
        ("varnish-1", r#"{"state":"drain","weight":3}"#, 200),
        ("varnish-2", r#"{"state":"drain"}"#, 409),
        ("varnish-2", r#"{"weight":0}"#, 400),
        ("varnish-3", r#"{"state":"drain"}"#, 404),
        ("varnish-2", r#"{"weight":null}"#, 200),
    ] {
        let answer = order(id, body);
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        let operation = &document["paths"][path]["post"]["responses"][status.to_string()];
        let schema = &operation["content"]["application/json"]["schema"];
        assert_eq!(faults(&document, schema, &answer.json(), path), Vec::<String>::new());
    }
    let without_it = fleet.clearcoat.config().replace("varnish-1", "varnish-9");
    fleet.clearcoat.configure(&without_it);
    fleet.clearcoat.reload();
    let shown = eventually("it has left", || {
        Some(fleet.clearcoat.fleet()).filter(|shown| shown["absent"][0]["id"] == "varnish-1")
    });
    assert_eq!(
        faults(&document, &json!({"$ref": "#/components/schemas/Fleet"}), &shown, "fleet"),
        Vec::<String>::new()
    );
}

#[test]
fn a_field_that_is_not_documented_would_be_seen() {
    let document = json!({});
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["a"],
        "properties": {"a": {"type": ["integer", "null"]}, "b": {"type": "array", "items": {"type": "string"}}}});
    let found = |value: Value| faults(&document, &schema, &value, "it").len();
    assert_eq!([json!({"a": 1}), json!({"a": null, "b": ["x"]})].map(found), [0, 0]);
    assert_eq!([json!({}), json!({"a": "x"}), json!({"a": 1, "c": 1}), json!({"a": 1, "b": [1]})].map(found), [1; 4]);
}
