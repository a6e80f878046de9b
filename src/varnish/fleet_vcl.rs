//! The VCL for the fleet of a moment, and its name.
//!
//! The name is made of the content: `clearcoat-` and the first 16 hexadecimal digits of its SHA-256. So whoever has the same content
//! finds it by its name in a varnishd, whoever loaded it: a clearcoat that restarts, or another one before the same fleet, has
//! nothing to do. And a varnishd that says that a VCL of this name is loaded has this content.
//!
//! Everything that the content depends on is therefore said by all clearcoats alike: nodes are in the order of their ids, addresses
//! in their own order, and neither health nor load is in it. A web node that is down is noticed by Varnish's own probe.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;

use aws_lc_rs::digest;
use ipnet::IpNet;

use super::own_template::OwnTemplate;
use super::vcl::{
    InvalidHost, OriginAddress, VarnishVersion, in_turns, render, repeated, stripping, template_with, with_allowed,
};
use crate::config::{VclDirector, WebChecks};
use crate::fleet::{NodeId, PurgeDialect};

const WEB: &str = include_str!("../../vcl/web.vcl");

/// What stands between these lines of `vcl/web.vcl` is written once for every web node.
const EACH: (&str, &str) = ("# For each web node.", "# End of for each.");

/// What the names of these VCLs in a varnishd start with. (`clearcoat agent --vcl` has names that start with `clearcoat_`.)
pub const PREFIX: &str = "clearcoat-";

/// The first line of each.
const HEAD: &str = "# Pushed by clearcoat, which puts it back in the place of any other VCL (docs/vcl-push.md).\n";

/// The most checks that a window of Varnish's probes has (vcl-probe(7)).
const MAX_WINDOW: u32 = 64;

/// A VCL, and the name that it has in every varnishd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetVcl {
    /// [`PREFIX`], and a hash of the text.
    pub name: String,
    /// The VCL.
    pub text: String,
}

/// What it is made of, beside its backends.
#[derive(Clone, Debug)]
pub struct VclParts<'a> {
    /// A VCL of the shop's own in place of the built-in one.
    pub template: Option<&'a OwnTemplate>,
    /// The built-in one for this version.
    pub version: VarnishVersion,
    /// The form of purges that the built-in one takes.
    pub delivery: PurgeDialect,
    /// Who may purge; if empty, the addresses of the origins.
    pub allow: &'a [IpNet],
    /// The query parameters that the built-in one strips.
    pub ignored_query: &'a [String],
}

/// Its backends.
#[derive(Clone, Copy, Debug)]
pub enum FleetBackends<'a> {
    /// The origin listeners of the clearcoats.
    Origins(&'a BTreeSet<SocketAddr>),
    /// The web nodes, in the order of their ids.
    Web {
        /// Those with a weight.
        nodes: &'a [WebBackend],
        /// How they are checked.
        checks: &'a WebChecks,
        /// How Varnish chooses among them.
        director: VclDirector,
    },
}

/// A web node as a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebBackend {
    /// Its name in the VCL ([`backend_names`]).
    pub name: String,
    /// Its address.
    pub address: SocketAddr,
    /// Its share of the traffic, above 0.
    pub weight: u32,
}

/// Why there is no VCL.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoFleetVcl {
    /// Nobody to fetch from.
    #[error("there is no backend for it")]
    NoBackend,
    /// See [`InvalidHost`].
    #[error(transparent)]
    Host(#[from] InvalidHost),
}

impl FleetVcl {
    /// The VCL for these backends.
    ///
    /// # Errors
    /// [`NoFleetVcl::NoBackend`] if there is none.
    pub fn render(parts: &VclParts, backends: FleetBackends) -> Result<Self, NoFleetVcl> {
        let own_addresses: Vec<IpNet> = match backends {
            FleetBackends::Origins(origins) => {
                origins.iter().map(SocketAddr::ip).collect::<BTreeSet<_>>().into_iter().map(Into::into).collect()
            }
            FleetBackends::Web { .. } => Vec::new(),
        };
        let allow = if parts.allow.is_empty() { &own_addresses } else { parts.allow };
        let text = match (parts.template, backends) {
            (_, FleetBackends::Origins(origins)) if origins.is_empty() => return Err(NoFleetVcl::NoBackend),
            (_, FleetBackends::Web { nodes: [], .. }) => return Err(NoFleetVcl::NoBackend),
            (Some(own), FleetBackends::Origins(origins)) => own.filled_in(&in_turns(&addresses(origins))?, allow),
            (Some(own), FleetBackends::Web { nodes, checks, director }) => {
                own.filled_in(&of_web_nodes(nodes, checks, director), allow)
            }
            (None, FleetBackends::Origins(origins)) => {
                let text = render(parts.version, parts.delivery, &addresses(origins), allow)?;
                stripping(&text, parts.ignored_query)
            }
            (None, FleetBackends::Web { nodes, checks, director }) => {
                let backends = of_web_nodes(nodes, checks, director);
                let text = with_allowed(&template_with(parts.version, parts.delivery, &backends), allow);
                stripping(&text, parts.ignored_query)
            }
        };
        Ok(FleetVcl::named(format!("{HEAD}{text}")))
    }

    fn named(text: String) -> Self {
        let hash = digest::digest(&digest::SHA256, text.as_bytes());
        let hash: String = hash.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        FleetVcl { name: format!("{PREFIX}{hash}"), text }
    }
}

/// A name in a VCL for each of these ids: `web_` and the id, in which what no name may have is an underscore. Of ids that would have
/// one name, each has a hash of its own behind it, so that names depend on ids alone: the director `shard` places pages by them.
pub fn backend_names(ids: &[&NodeId]) -> Vec<String> {
    let plain = |id: &NodeId| -> String {
        let safe = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        format!("web_{}", id.as_str().chars().map(safe).collect::<String>())
    };
    let all: Vec<String> = ids.iter().map(|id| plain(id)).collect();
    let mut shared: HashMap<&str, usize> = HashMap::new();
    all.iter().for_each(|name| *shared.entry(name).or_default() += 1);
    let name = |(id, name): (&&NodeId, &String)| match shared[name.as_str()] {
        1 => name.clone(),
        _ => format!("{name}_{:08x}", xxhash_rust::xxh3::xxh3_64(id.as_str().as_bytes()) >> 32),
    };
    ids.iter().zip(&all).map(name).collect()
}

fn addresses(origins: &BTreeSet<SocketAddr>) -> Vec<OriginAddress> {
    origins.iter().copied().map(Into::into).collect()
}

/// `vcl/web.vcl` for these nodes.
fn of_web_nodes(nodes: &[WebBackend], checks: &WebChecks, director: VclDirector) -> String {
    let (kind, by, ready) = match director {
        VclDirector::Random => ("random", "", ""),
        VclDirector::RoundRobin => ("round_robin", "", ""),
        VclDirector::Shard => ("shard", "by=URL", "webs.reconfigure();"),
    };
    let values = |(index, node): (usize, &WebBackend)| {
        let added = match director {
            VclDirector::Random => format!("{}, {}", node.name, node.weight),
            VclDirector::RoundRobin | VclDirector::Shard => node.name.clone(),
        };
        vec![
            ("@NAME@", node.name.clone()),
            ("@NEXT@", nodes[(index + 1) % nodes.len()].name.clone()),
            ("@HOST@", node.address.ip().to_string()),
            ("@PORT@", node.address.port().to_string()),
            ("@ADDED@", added),
        ]
    };
    let each: Vec<_> = nodes.iter().enumerate().map(values).collect();
    let seconds = |time: std::time::Duration| format!("{:.3}", time.as_secs_f64().max(0.001));
    // In a row, as with clearcoat: so many passes bring a node up, and as many failures take it down, but for a mixture of both.
    let threshold = checks.rise.min(MAX_WINDOW);
    let window = threshold.saturating_add(checks.fall.saturating_sub(1)).min(MAX_WINDOW);
    let expect = checks.expect.first().copied().unwrap_or(200);
    repeated(WEB, EACH, &each)
        .replace("@OTHERS@", &(nodes.len() - 1).to_string())
        .replace("@DIRECTOR@", kind)
        .replace("@BY@", by)
        .replace("@READY@", ready)
        .replace("@EXPECT@", &expect.to_string())
        .replace("@INTERVAL@", &seconds(checks.interval))
        .replace("@TIMEOUT@", &seconds(checks.timeout))
        .replace("@WINDOW@", &window.to_string())
        .replace("@THRESHOLD@", &threshold.to_string())
        // Last: a path is free text, and may have one of these words in it.
        .replacen("@REQUEST@", &request(checks), 1)
}

/// The request of a probe. Without a host of its own, each node is asked by its address, as clearcoat does.
fn request(checks: &WebChecks) -> String {
    // It would end the string. No path needs one (RFC 3986 section 2).
    let path = checks.path.replace('"', "%22");
    match &checks.host {
        None => format!(".url = \"{path}\";"),
        Some(host) => {
            let lines = [format!("GET {path} HTTP/1.1"), format!("Host: {host}"), "Connection: close".to_owned()];
            let lines: Vec<String> = lines.iter().map(|line| format!("\n        \"{line}\"")).collect();
            format!(".request ={};", lines.concat())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(template: Option<&OwnTemplate>) -> VclParts<'_> {
        VclParts {
            template,
            version: VarnishVersion::Seven,
            delivery: PurgeDialect::Magento,
            allow: &[],
            ignored_query: &[],
        }
    }

    fn ids(ids: &[&str]) -> Vec<NodeId> {
        ids.iter().map(|id| NodeId::try_from(*id).unwrap()).collect()
    }

    fn web(nodes: &[(&str, u32)], director: VclDirector) -> FleetVcl {
        let backend = |(index, (name, weight)): (usize, &(&str, u32))| WebBackend {
            name: (*name).to_owned(),
            address: SocketAddr::from(([10, 0, 0, u8::try_from(index).unwrap()], 80)),
            weight: *weight,
        };
        let nodes: Vec<WebBackend> = nodes.iter().enumerate().map(backend).collect();
        let checks = WebChecks::default();
        FleetVcl::render(&parts(None), FleetBackends::Web { nodes: &nodes, checks: &checks, director }).unwrap()
    }

    #[test]
    fn the_same_fleet_has_the_same_name_and_another_one_has_another() {
        let (one, again) = (web(&[("web_a", 1)], VclDirector::Random), web(&[("web_a", 1)], VclDirector::Random));
        assert_eq!(one, again);
        let hash = one.name.strip_prefix(PREFIX).unwrap();
        assert!(hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{}", one.name);
        let others =
            [web(&[("web_a", 2)], VclDirector::Random), web(&[("web_a", 1), ("web_b", 1)], VclDirector::Random)];
        assert!(others.iter().all(|other| other.name != one.name));
    }

    #[test]
    fn what_is_pushed_for_origins_is_what_clearcoat_vcl_prints() {
        let origins: BTreeSet<SocketAddr> = ["10.0.0.2:8081", "10.0.0.1:8081"].map(|at| at.parse().unwrap()).into();
        let pushed = FleetVcl::render(&parts(None), FleetBackends::Origins(&origins)).unwrap();
        let allow: Vec<IpNet> = ["10.0.0.1/32", "10.0.0.2/32"].map(|net| net.parse().unwrap()).to_vec();
        let printed = render(VarnishVersion::Seven, PurgeDialect::Magento, &addresses(&origins), &allow).unwrap();
        assert_eq!(pushed.text, format!("{HEAD}{}", stripping(&printed, &[])));
    }

    #[test]
    fn web_nodes_are_backends_with_weights_and_the_checks_of_clearcoat() {
        let vcl = web(&[("web_a", 3), ("web_b", 1)], VclDirector::Random).text;
        for part in [
            "backend web_a {\n    .host = \"10.0.0.0\";\n    .port = \"80\";\n",
            "    webs.add_backend(web_a, 3);\n    webs.add_backend(web_b, 1);\n",
            "        if (beresp.backend == web_b) {\n            set bereq.backend = web_a;\n",
            "bereq.retries < 1)",
            "    .url = \"/health_check.php\";\n    .expected_response = 200;\n    .interval = 5.000s;\n    .timeout = 2.000s;\n    \
             .window = 4;\n    .threshold = 2;\n",
        ] {
            assert!(vcl.contains(part), "{part}\n{vcl}");
        }
        assert!(!vcl.contains("backend origin") && !vcl.contains("_HOST@"), "{vcl}");
        assert!(
            web(&[("web_a", 3)], VclDirector::Shard).text.contains("webs.add_backend(web_a);\n    webs.reconfigure();")
        );
    }

    #[test]
    fn nothing_in_a_check_ends_the_string_that_it_stands_in() {
        let checks =
            WebChecks { path: "/a\"b@NAME@".to_owned(), host: Some("shop".to_owned()), ..WebChecks::default() };
        let request = request(&checks);
        assert_eq!(
            request,
            ".request =\n        \"GET /a%22b@NAME@ HTTP/1.1\"\n        \"Host: shop\"\n        \"Connection: close\";"
        );
    }

    #[test]
    fn a_fleet_without_backends_has_no_vcl() {
        let none = FleetVcl::render(&parts(None), FleetBackends::Origins(&BTreeSet::new()));
        assert_eq!(none, Err(NoFleetVcl::NoBackend));
        let checks = WebChecks::default();
        let none = FleetBackends::Web { nodes: &[], checks: &checks, director: VclDirector::Random };
        assert_eq!(FleetVcl::render(&parts(None), none), Err(NoFleetVcl::NoBackend));
    }

    #[test]
    fn each_web_node_has_a_name_of_its_own_that_depends_on_ids_alone() {
        let several = ids(&["10.0.0.5:80", "a.b", "a_b", "web-1"]);
        let names = backend_names(&several.iter().collect::<Vec<_>>());
        assert_eq!((names[0].as_str(), names[3].as_str()), ("web_10_0_0_5_80", "web_web-1"));
        assert!(names[1] != names[2] && names[1].starts_with("web_a_b_"), "{names:?}");
        let turned = backend_names(&several.iter().rev().collect::<Vec<_>>());
        assert_eq!(turned.into_iter().rev().collect::<Vec<_>>(), names);
    }

    #[test]
    fn a_template_of_the_shop_is_filled_in_for_either_kind() {
        let own = OwnTemplate::parse("vcl 4.1;\n# clearcoat: backends\n# clearcoat: end\n").unwrap();
        let origins: BTreeSet<SocketAddr> = ["10.0.0.1:8081".parse().unwrap()].into();
        let vcl = FleetVcl::render(&parts(Some(&own)), FleetBackends::Origins(&origins)).unwrap().text;
        assert!(vcl.contains("backend origin_1 {") && vcl.contains("bereq.retries < 0)"), "{vcl}");
    }
}
