//! Holds the imports to the layers: they go downwards only. A module is the first name behind `crate::`. Within a module
//! no two siblings use each other, however deep they are. Names are held to two rules, too.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed, which is what it is for")]

#[path = "layers/circles.rs"]
mod circles;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use circles::{Circle, Modules};

/// The layers from the bottom up, and the modules of each.
const LAYERS: [(&str, &[&str]); 6] = [
    (
        "pure",
        &["fleet", "balance", "purge", "seal", "attribution", "http1", "esi", "proxy_protocol", "backoff", "mutants"],
    ),
    (
        "base",
        &[
            "atomic_file",
            "awaited",
            "config",
            "telemetry",
            "shutdown",
            "service_manager",
            "inherited",
            "files",
            "clock",
        ],
    ),
    (
        "edges to the world",
        &["registry", "journal", "etcd", "varnish", "upstream", "probe", "http_client", "otlp", "tls"],
    ),
    (
        "services",
        &[
            "edge",
            "origin",
            "proxy",
            "purge_api",
            "admin",
            "delivery",
            "replicas",
            "fleet_keeper",
            "slow_start",
            "trial",
            "http_server",
            "agent",
            "vcl_push",
        ],
    ),
    ("wiring", &["app"]),
    ("commands", &["cli"]),
];

/// The arrows within a layer that are allowed, each for its reason.
const NEIGHBOURS: [(&str, &str, &str); 33] = [
    ("files", "telemetry", "it counts what there is too little of"),
    ("service_manager", "telemetry", "an error is logged with its causes"),
    ("inherited", "telemetry", "an error is logged with its causes"),
    ("balance", "fleet", "it chooses among the members of a fleet"),
    ("attribution", "purge", "it counts what a purge names"),
    ("seal", "purge", "it notes what a purge names"),
    ("purge", "mutants", "broken on purpose in a build for tests"),
    ("seal", "mutants", "broken on purpose in a build for tests"),
    ("attribution", "fleet", "it remembers which nodes were fenced"),
    ("purge", "fleet", "a batch is written in the form in which its node is told"),
    ("registry", "etcd", "one way to talk to etcd"),
    ("registry", "http_client", "one client for what is not traffic"),
    ("journal", "etcd", "one way to talk to etcd"),
    ("probe", "http_client", "one client for what is not traffic"),
    ("otlp", "http_client", "one client for what is not traffic"),
    ("edge", "proxy", "the data path that both listeners share"),
    ("origin", "proxy", "the data path that both listeners share"),
    ("purge_api", "delivery", "a purge waits for its deliveries"),
    ("purge_api", "http_server", "the listener"),
    ("purge_api", "replicas", "a purge waits for the other replicas, and comes from them"),
    ("replicas", "delivery", "what another replica tells of is acknowledged by our own deliveries"),
    ("admin", "replicas", "it shows them"),
    ("admin", "purge_api", "an operator purges as Magento does"),
    ("admin", "delivery", "it shows why a delivery fails"),
    ("admin", "http_server", "the listener"),
    ("delivery", "slow_start", "a node that was behind the fence starts slowly"),
    ("fleet_keeper", "delivery", "a node that joins gets a delivery"),
    ("fleet_keeper", "trial", "a Varnish that comes up is tried"),
    ("edge", "trial", "who failed gets no traffic"),
    ("origin", "trial", "it answers the page that is tried"),
    ("admin", "trial", "it shows what came of it"),
    ("fleet_keeper", "slow_start", "a node that comes into traffic starts slowly"),
    ("admin", "vcl_push", "it shows which VCL a Varnish uses"),
];

/// What the pure layer must not touch: it would not be pure any more.
const IMPURE: [&str; 9] = [
    "tokio",
    "hyper::",
    "hyper_util",
    "tracing::",
    "prometheus",
    "fastrand",
    "Instant::now",
    "SystemTime::now",
    "std::fs",
];

fn layer_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|(_, modules)| modules.contains(&module))
}

/// The Rust files of a folder of the package, and of those below it.
fn rust_files(folder: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut files);
    files
}

/// Every source file, with its top-level module. The crate root and the program belong to none.
fn sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = rust_files("src");
    let module_of = |file: &Path| {
        let inside = file.strip_prefix(&root).unwrap().with_extension("");
        inside.components().next().unwrap().as_os_str().to_str().unwrap().to_owned()
    };
    let read = |file: PathBuf| (module_of(&file), file.clone(), product_code(&fs::read_to_string(&file).unwrap()));
    files.into_iter().map(read).filter(|(module, ..)| module != "lib" && module != "main").collect()
}

/// The product's modules as they stand in the tree, without those that are compiled for tests only.
fn modules() -> Modules {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let path_of = |file: &Path| -> circles::Path {
        let inside = file.strip_prefix(&root).unwrap().with_extension("");
        inside.iter().map(|name| name.to_str().unwrap().to_owned()).collect()
    };
    let files: Vec<_> = sources().into_iter().map(|(_, file, text)| (path_of(&file), text)).collect();
    let declared = |(path, text): &(circles::Path, String)| -> Vec<circles::Path> {
        let names = text.split("#[cfg(test)]\nmod ").skip(1).filter_map(|rest| rest.split_once(';'));
        names.map(|(name, _)| [path.as_slice(), &[name.to_owned()]].concat()).collect()
    };
    let tests: Vec<_> = files.iter().flat_map(declared).collect();
    Modules::new(files.into_iter().filter(|(path, _)| !tests.iter().any(|test| path.starts_with(test))))
}

/// The text without comments and without the tests at its end, which may use what they like.
fn product_code(text: &str) -> String {
    let product = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    product.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The top-level modules that a text names.
fn imports(text: &str) -> Vec<String> {
    let names = text.split("crate::").skip(1);
    names.map(|rest| rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()).collect()
}

#[test]
fn every_module_has_a_layer() {
    let unknown: Vec<_> = sources().into_iter().filter(|(module, ..)| layer_of(module).is_none()).collect();
    assert!(unknown.is_empty(), "give these modules a layer, here and in lib.rs: {unknown:?}");
}

#[test]
fn imports_go_downwards() {
    let mut wrong = BTreeMap::new();
    let is_test = |file: &Path| file.iter().any(|part| part == "tests" || part == "tests.rs");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (module, file, text) in sources() {
        if is_test(file.strip_prefix(root).unwrap()) {
            continue;
        }
        for import in imports(&text) {
            assert!(!import.is_empty(), "{}: write one `use crate::…` a module", file.display());
            let (Some(from), Some(to)) = (layer_of(&module), layer_of(&import)) else {
                panic!("{}: crate::{import} has no layer", file.display());
            };
            let neighbour = NEIGHBOURS.iter().any(|&(a, b, _)| a == module && b == import);
            if module != import && to >= from && !neighbour {
                wrong.insert(file.clone(), format!("{module} ({}) uses {import} ({})", LAYERS[from].0, LAYERS[to].0));
            }
        }
    }
    assert!(wrong.is_empty(), "imports that go upwards or sideways: {wrong:#?}");
}

#[test]
fn no_two_siblings_use_each_other() {
    let circles = modules().circles();
    let shown = |circle: &Circle| format!("in {}: {:#?}", circle.parent, circle.imports);
    assert!(circles.is_empty(), "siblings that use each other {}", circles.iter().map(shown).collect::<String>());
}

/// The sections of the configuration may have the name of what they configure: they are written `config::Edge`.
#[test]
fn the_name_of_a_type_means_one_thing() {
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, text) in modules().files().filter(|(path, _)| path[0] != "config") {
        for name in text.lines().filter_map(type_defined) {
            files.entry(name.to_owned()).or_default().insert(path.join("::"));
        }
    }
    files.retain(|_, paths| paths.len() > 1);
    assert!(files.is_empty(), "one of each needs another name: {files:#?}");
}

/// The type that a line defines, other than one inside of something else.
fn type_defined(line: &str) -> Option<&str> {
    let line = if let Some(rest) = line.strip_prefix("pub") {
        let rest = rest.strip_prefix('(').map_or(rest, |inside| inside.split_once(')').map_or("", |(_, rest)| rest));
        rest.strip_prefix(' ')?
    } else {
        line
    };
    let (keyword, rest) = line.split_once(' ')?;
    let is_type = ["struct", "enum", "trait", "type"].contains(&keyword);
    is_type.then(|| rest.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default())
}

/// Tests have the longest names: each says what must hold, and is read in a list.
#[test]
fn names_of_functions_have_at_most_70_characters() {
    for file in ["src", "tests", "benches"].into_iter().flat_map(rust_files) {
        let text = fs::read_to_string(&file).unwrap();
        let names = text.split("fn ").skip(1).filter_map(|rest| rest.split(['(', '<']).next());
        let too_long: Vec<_> = names.filter(|name| name.len() > 70 && !name.contains(char::is_whitespace)).collect();
        assert!(too_long.is_empty(), "{}: {too_long:?}", file.display());
    }
}

#[test]
fn the_pure_layer_is_pure() {
    for (module, file, text) in sources() {
        if LAYERS[0].1.contains(&module.as_str()) {
            for word in IMPURE {
                assert!(!text.contains(word), "{}: {word}", file.display());
            }
        }
    }
}

#[test]
fn a_forbidden_import_would_be_seen() {
    assert_eq!(
        imports(&product_code("use crate::app::App;\n// use crate::cli;\nlet x = crate::edge::x();")),
        ["app", "edge"]
    );
    assert_eq!(imports(&product_code("a\n#[cfg(test)]\nmod tests {\nuse crate::app::App;")), Vec::<String>::new());
}

#[test]
fn a_circle_of_siblings_would_be_seen() {
    let circles = |files: &[(&str, &str)]| {
        let path = |path: &str| path.split("::").map(str::to_owned).collect();
        let modules = Modules::new(files.iter().map(|(name, text)| (path(name), String::from(*text))));
        modules.circles().into_iter().map(|circle| (circle.parent, circle.members)).collect::<Vec<_>>()
    };
    let of_m = |members: &[&str]| vec![("m".to_owned(), members.iter().copied().map(str::to_owned).collect())];
    let parent = ("m", "mod a;\nmod b;\nmod c;\npub use a::A;\nuse b::{B as Other, deep::D};");
    // A parent and its child may use each other, and siblings may in one direction.
    assert_eq!(circles(&[parent, ("m::a", "use super::T;"), ("m::b", "use super::a::A;"), ("m::c", "x")]), []);
    // In a `use`, in braces, within a path, from below, and by way of the parent.
    for use_of_b in ["use super::b::B;", "use super::{T, b::B};", "fn f() { crate::m::b::f() }", "use super::Other;"] {
        let files = [parent, ("m::a", use_of_b), ("m::b", "x"), ("m::b::deep", "use super::super::A;"), ("m::c", "x")];
        assert_eq!(circles(&files), of_m(&["a", "b"]), "{use_of_b}");
    }
    let longer = [("m::a", "use super::b::B;"), ("m::b", "use super::c::C;"), ("m::c", "use super::A;")];
    assert_eq!(circles(&[&[parent][..], &longer].concat()), of_m(&["a", "b", "c"]));
}
