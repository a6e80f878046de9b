//! The VCL for this fleet: the files of `vcl/` with the origin listener and the addresses of clearcoat filled in.
//!
//! A Varnish knows of the fleet only these two things, whatever comes and goes, so its VCL is rendered once and never
//! again. The templates are plain VCL with three placeholders that `sed` can fill in as well, one addition for a
//! Varnish that purges by key, and one for several clearcoats.

use std::net::SocketAddr;

use ipnet::IpNet;

use crate::fleet::PurgeDialect;

const VARNISH_SIX: &str = include_str!("../../vcl/varnish6.vcl");
const VARNISH_SEVEN: &str = include_str!("../../vcl/varnish7.vcl");
const XKEY: &str = include_str!("../../vcl/xkey.vcl");
const ORIGINS: &str = include_str!("../../vcl/origins.vcl");

/// The line of both templates behind which an addition stands: its subroutines run before those of the template.
const ADDITION_BEHIND: &str = "\nimport std;\n";

/// The one backend of both templates begins and ends so. Several clearcoats are put in its place, and not added to it:
/// Varnish 6.0 wants to have read of a backend before it is named.
const ONE_BACKEND: (&str, &str) = ("\nbackend origin {\n", "\n}\n");

/// What stands between these lines of `vcl/origins.vcl`, at whatever depth, is written once for every clearcoat.
const EACH: (&str, &str) = ("# For each clearcoat.", "# End of for each.");

/// What stands before and behind the parameters that both templates strip.
const STRIPPED: (&str, &str) = ("regsuball(req.url, \"&(", ")(=[^&]*)?(?=&|$)\", \"\");");

/// Which Varnish the VCL is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VarnishVersion {
    /// Varnish 6.0 LTS: a ban that does not compile goes unnoticed.
    Six,
    /// Varnish 7.x: such a ban is answered 400.
    #[default]
    Seven,
}

/// Why a host cannot be written into a VCL.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a host for a VCL: an IP address or a name of A-Z a-z 0-9 . _ - is allowed")]
pub struct InvalidHost(String);

/// Where the origin listener of a clearcoat is, as a Varnish reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OriginAddress {
    /// An address, an IPv6 one with or without brackets, or a name.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl From<SocketAddr> for OriginAddress {
    fn from(address: SocketAddr) -> Self {
        OriginAddress { host: address.ip().to_string(), port: address.port() }
    }
}

/// The VCL for Varnish nodes that fetch from these origin listeners, one for each clearcoat, and obey purges from the
/// networks in `allow` (clearcoat's own addresses), in the form of `delivery`.
///
/// # Errors
/// [`InvalidHost`] if a host would not be one string in the VCL, or there is none.
pub fn render(
    version: VarnishVersion,
    delivery: PurgeDialect,
    origins: &[OriginAddress],
    allow: &[IpNet],
) -> Result<String, InvalidHost> {
    let text = match origins {
        [] => return Err(InvalidHost(String::new())),
        [OriginAddress { host, port }] => with_addition(version, delivery)
            .replace("@ORIGIN_HOST@", checked(host)?)
            .replace("@ORIGIN_PORT@", &port.to_string()),
        several => template_with(version, delivery, &in_turns(several)?),
    };
    Ok(with_allowed(&text, allow))
}

/// A template with these networks in its list of who may purge.
pub(super) fn with_allowed(text: &str, allow: &[IpNet]) -> String {
    text.replace("@PURGE_ALLOW@", &acl(allow))
}

/// `vcl/origins.vcl` for these clearcoats.
pub(super) fn in_turns(origins: &[OriginAddress]) -> Result<String, InvalidHost> {
    let values = |(number, OriginAddress { host, port }): (usize, &OriginAddress)| {
        Ok(vec![
            ("@NUMBER@", number.to_string()),
            ("@NEXT@", (number % origins.len() + 1).to_string()),
            ("@HOST@", checked(host)?.to_owned()),
            ("@PORT@", port.to_string()),
        ])
    };
    let each: Vec<_> = (1..).zip(origins).map(values).collect::<Result<_, _>>()?;
    Ok(repeated(ORIGINS, EACH, &each).replace("@OTHERS@", &(origins.len() - 1).to_string()))
}

/// The text, with what stands between these two lines written once for each of these lists of placeholders and values.
pub(super) fn repeated(text: &str, (begin, end): (&str, &str), each: &[Vec<(&str, String)>]) -> String {
    let mut written = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != begin {
            written += &format!("{line}\n");
            continue;
        }
        let block: String =
            lines.by_ref().take_while(|line| line.trim() != end).map(|line| format!("{line}\n")).collect();
        for values in each {
            written += &values.iter().fold(block.clone(), |block, (name, value)| block.replace(name, value));
        }
    }
    written
}

/// A built-in template with this text in the place of its one backend, and with what the form of delivery wants.
pub(super) fn template_with(version: VarnishVersion, delivery: PurgeDialect, backends: &str) -> String {
    let text = with_addition(version, delivery);
    let (before, one) = text.split_once(ONE_BACKEND.0).expect("both templates have a backend");
    let (_, after) = one.split_once(ONE_BACKEND.1).expect("which ends");
    format!("{before}\n{backends}{after}")
}

fn with_addition(version: VarnishVersion, delivery: PurgeDialect) -> String {
    let template = match version {
        VarnishVersion::Six => VARNISH_SIX,
        VarnishVersion::Seven => VARNISH_SEVEN,
    };
    let by_key = match delivery {
        // Both are patterns for a ban.
        PurgeDialect::Magento | PurgeDialect::MagentoPlain => "",
        PurgeDialect::Xkey => XKEY,
    };
    template.replacen(ADDITION_BEHIND, &format!("{ADDITION_BEHIND}{by_key}"), 1)
}

/// The same VCL with another list of query parameters that it strips from a URL: `edge.hash_ignore_query`.
pub fn stripping(vcl: &str, parameters: &[String]) -> String {
    let (before, rest) = vcl.split_once(STRIPPED.0).expect("every template strips parameters");
    let (_, after) = rest.split_once(STRIPPED.1).expect("in one pattern");
    format!("{before}{}{}{}{after}", STRIPPED.0, stripped(parameters.iter().map(String::as_str)), STRIPPED.1)
}

/// The parameters as alternatives of a regular expression, which stands between quotes in the VCL.
fn stripped<'p>(parameters: impl Iterator<Item = &'p str>) -> String {
    let escaped = |name: &str| -> String {
        let escaped = name.bytes().map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => char::from(byte).to_string(),
            other => format!("\\x{other:02x}"),
        });
        escaped.collect()
    };
    let alternative = |pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => escaped(prefix) + "[^=&]*",
        None => escaped(pattern),
    };
    let alternatives: Vec<_> = parameters.map(alternative).collect();
    // No name at all: nothing matches.
    if alternatives.is_empty() { "(?!)".to_owned() } else { alternatives.join("|") }
}

fn checked(host: &str) -> Result<&str, InvalidHost> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let is_address = bare.parse::<std::net::IpAddr>().is_ok();
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if is_address || (!host.is_empty() && host.bytes().all(in_name)) {
        return Ok(bare);
    }
    Err(InvalidHost(host.to_owned()))
}

/// One line an entry. The bits after the prefix are cleared: Varnish warns about them, or refuses them.
pub(super) fn acl(allow: &[IpNet]) -> String {
    let entry = |net: &IpNet| {
        let net = net.trunc();
        format!("\"{}\"/{};", net.network(), net.prefix_len())
    };
    allow.iter().map(entry).collect::<Vec<_>>().join("\n    ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MARKETING_PARAMETERS;

    fn nets(nets: &[&str]) -> Vec<IpNet> {
        nets.iter().map(|net| net.parse().unwrap()).collect()
    }

    fn at(hosts: &[&str]) -> Vec<OriginAddress> {
        hosts.iter().map(|host| OriginAddress { host: (*host).to_owned(), port: 8081 }).collect()
    }

    #[test]
    fn several_clearcoats_are_backends_that_take_turns() {
        let three = at(&["10.0.0.1", "10.0.0.2", "[fd00::3]"]);
        for version in [VarnishVersion::Six, VarnishVersion::Seven] {
            let vcl = render(version, PurgeDialect::Xkey, &three, &[]).unwrap();
            assert!(vcl.contains("backend origin_3 {\n    .host = \"fd00::3\";\n    .port = \"8081\";\n"), "{vcl}");
            assert!(
                vcl.contains("if (beresp.backend == origin_3) {\n            set bereq.backend = origin_1;"),
                "{vcl}"
            );
            assert!(vcl.contains("bereq.retries < 2)"), "{vcl}");
            assert_eq!(vcl.matches("\nbackend ").count(), 3, "{vcl}");
            assert_eq!(placeholder_in(&vcl), None);
            // Nothing else is another text than before one clearcoat.
            let one = render(version, PurgeDialect::Xkey, &three[..1], &[]).unwrap();
            let (before, after) = (vcl.find("\n# Several").unwrap(), vcl.find("\n# The addresses").unwrap());
            assert!(one.starts_with(&vcl[..before]), "{vcl}");
            assert!(one.ends_with(&vcl[after..]), "{vcl}");
            assert!(render(version, PurgeDialect::Magento, &at(&["10.0.0.1", "a b"]), &[]).is_err());
            assert!(render(version, PurgeDialect::Magento, &[], &[]).is_err());
        }
    }

    #[test]
    fn what_varnishtest_reads_is_what_we_print() {
        for (version, file) in [(VarnishVersion::Six, "varnish6.vcl"), (VarnishVersion::Seven, "varnish7.vcl")] {
            for hosts in [&["10.0.0.1"][..], &["10.0.0.1", "10.0.0.2", "fd00::3"]] {
                let others: Vec<String> = hosts[1..].iter().map(|host| format!("{host}:8081")).collect();
                let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
                let output = std::process::Command::new("sh")
                    .arg(root.join("tests/vtc/render.sh"))
                    .arg(root.join("vcl").join(file))
                    .args([hosts[0], "8081"])
                    .env("OTHERS", others.join(" "))
                    .env("ADDITION", root.join("vcl/xkey.vcl"))
                    .output()
                    .expect("a shell");
                let ours = render(version, PurgeDialect::Xkey, &at(hosts), &[]).unwrap();
                assert_eq!(String::from_utf8(output.stdout).unwrap(), ours);
            }
        }
    }

    fn placeholder_in(vcl: &str) -> Option<&str> {
        vcl.split(|c: char| c.is_whitespace() || "\"_".contains(c)).find(|word| word.starts_with('@'))
    }

    #[test]
    fn every_placeholder_is_filled_in() {
        for version in [VarnishVersion::Six, VarnishVersion::Seven] {
            let vcl = render(version, PurgeDialect::Xkey, &at(&["10.0.0.1"]), &nets(&["10.0.0.1/32"])).unwrap();
            assert!(vcl.contains("    .host = \"10.0.0.1\";\n    .port = \"8081\";\n"), "{vcl}");
            assert!(vcl.contains("acl purge {\n    \"10.0.0.1\"/32;\n}"), "{vcl}");
            assert_eq!(placeholder_in(&vcl), None);
        }
    }

    #[test]
    fn only_delivery_by_key_has_the_addition_and_has_it_first() {
        for version in [VarnishVersion::Six, VarnishVersion::Seven] {
            let vcl = |delivery| render(version, delivery, &at(&["10.0.0.1"]), &[]).unwrap();
            assert!(!vcl(PurgeDialect::Magento).contains("xkey"));
            assert_eq!(vcl(PurgeDialect::MagentoPlain), vcl(PurgeDialect::Magento));
            let with = vcl(PurgeDialect::Xkey);
            assert_eq!(with.replacen(XKEY, "", 1), vcl(PurgeDialect::Magento));
            assert!(with.find("call purge_keys;").unwrap() < with.find("call take_purge;").unwrap());
        }
    }

    #[test]
    fn each_placeholder_stands_once() {
        // A second one in a comment would get several lines, of which only the first is still a comment.
        for template in [VARNISH_SIX, VARNISH_SEVEN] {
            assert_eq!(template.matches(ADDITION_BEHIND).count(), 1);
            assert_eq!(template.matches(ONE_BACKEND.0).count(), 1);
            for placeholder in ["@ORIGIN_HOST@", "@ORIGIN_PORT@", "@PURGE_ALLOW@"] {
                assert_eq!(template.matches(placeholder).count(), 1, "{placeholder}");
            }
        }
    }

    #[test]
    fn an_acl_entry_has_its_mask_outside_the_quotes_and_no_host_bits() {
        let entries = acl(&nets(&["10.1.2.3/8", "fc00::1/7", "::1/128"]));
        assert_eq!(entries, "\"10.0.0.0\"/8;\n    \"fc00::\"/7;\n    \"::1\"/128;");
        assert_eq!(acl(&[]), "");
    }

    #[test]
    fn a_host_is_an_address_or_a_name() {
        assert_eq!(checked("10.0.0.1"), Ok("10.0.0.1"));
        assert_eq!(checked("::1"), Ok("::1"));
        assert_eq!(checked("[2001:db8::1]"), Ok("2001:db8::1"));
        assert_eq!(checked("clear-coat.shop_1.internal"), Ok("clear-coat.shop_1.internal"));
        for bad in ["", "[]", "a b", "a\";", "clearcoat:8081", "[clearcoat]", "a\n"] {
            assert_eq!(checked(bad), Err(InvalidHost(bad.to_owned())));
        }
    }

    #[test]
    fn what_the_files_strip_is_the_default_of_the_configuration() {
        let parameters = MARKETING_PARAMETERS.map(str::to_owned);
        for template in [VARNISH_SIX, VARNISH_SEVEN] {
            assert_eq!(template.matches(STRIPPED.0).count(), 1);
            assert_eq!(stripping(template, &parameters), template);
            let other = stripping(template, &["a.b*".to_owned(), "c\"".to_owned()]);
            assert!(other.contains(r#""&(a\x2eb[^=&]*|c\x22)(=[^&]*)?(?=&|$)""#), "{other}");
            assert!(stripping(template, &[]).contains("\"&((?!))("));
        }
    }

    #[test]
    fn both_files_are_the_same_text_outside_the_marked_parts() {
        assert_eq!(shared(VARNISH_SIX), shared(VARNISH_SEVEN));
    }

    /// The text without the marked parts and without the first lines, which name the version.
    fn shared(template: &str) -> Vec<&str> {
        let mut inside = false;
        let from_imports = template.lines().skip_while(|line| *line != "import std;");
        from_imports
            .filter(|line| {
                let starts = line.trim().starts_with("# Only here");
                let ends = line.trim() == "# End of only here.";
                inside = (inside || starts) && !ends;
                !inside
            })
            .collect()
    }
}
