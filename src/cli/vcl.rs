//! `clearcoat vcl`: the VCL for the Varnish nodes of this fleet.

use std::net::IpAddr;

use anyhow::{Context as _, anyhow, bail};
use clap::ValueEnum;
use ipnet::IpNet;

use super::ConfigFile;
use crate::config::is_host_port;
use crate::fleet::PurgeDialect;
use crate::varnish::vcl::{OriginAddress, VarnishVersion, render, stripping};

/// Print the VCL for the Varnish nodes of this fleet.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  clearcoat vcl --origin 192.0.2.5:8081 > /etc/varnish/default.vcl\n  \
    clearcoat vcl --origin 192.0.2.5:8081 --origin 192.0.2.6:8081   (two replicas)")]
pub(super) struct Vcl {
    #[command(flatten)]
    config: ConfigFile,
    /// How a Varnish reaches the origin listener; once for each clearcoat before the fleet [default: the first of
    /// origin.listen]
    #[arg(long, value_name = "HOST:PORT", value_parser = origin_address)]
    origin: Vec<OriginAddress>,
    /// Addresses from which clearcoat purges, as a Varnish sees them; repeatable [default: the hosts of the origins]
    #[arg(long, value_name = "CIDR", value_parser = network)]
    allow: Vec<IpNet>,
    /// Which Varnish it is for
    #[arg(long, value_enum, default_value_t = Varnish::Seven)]
    varnish: Varnish,
    /// How clearcoat tells it to drop pages: the `delivery` of its `[[node]]`. `xkey` needs vmod_xkey (varnish-modules)
    #[arg(long, value_enum, default_value_t = Form::Magento)]
    delivery: Form,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Form {
    Magento,
    Xkey,
}

/// A Varnish, by the digit that its VCL depends on.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Varnish {
    #[value(name = "6")]
    Six,
    #[value(name = "7")]
    Seven,
}

impl From<Varnish> for VarnishVersion {
    fn from(varnish: Varnish) -> Self {
        match varnish {
            Varnish::Six => VarnishVersion::Six,
            Varnish::Seven => VarnishVersion::Seven,
        }
    }
}

impl Vcl {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let config = self.config.source().load_for_elsewhere()?;
        let origins = match &*self.origin {
            [] => {
                let listen = config.origin.listen.first().context("origin.listen is empty")?;
                if listen.ip().is_unspecified() || listen.port() == 0 {
                    bail!("origin.listen is {listen}: say with --origin HOST:PORT how a Varnish reaches it");
                }
                vec![OriginAddress::from(*listen)]
            }
            origins => origins.to_vec(),
        };
        let delivery = match self.delivery {
            Form::Magento => PurgeDialect::Magento,
            Form::Xkey => PurgeDialect::Xkey,
        };
        let vcl = render(self.varnish.into(), delivery, &origins, &self.allowed(&origins)?)?;
        print!("{}", stripping(&vcl, &config.edge.hash_ignore_query));
        Ok(())
    }

    fn allowed(&self, origins: &[OriginAddress]) -> anyhow::Result<Vec<IpNet>> {
        if self.allow.is_empty() {
            let address = |OriginAddress { host, .. }: &OriginAddress| {
                let host = host.trim_matches(['[', ']']);
                let address = host.parse::<IpAddr>().map(IpNet::from);
                address.map_err(|_| anyhow!("{host} is a name: say with --allow from which addresses clearcoat purges"))
            };
            return origins.iter().map(address).collect();
        }
        Ok(self.allow.clone())
    }
}

/// An origin listener, as `HOST:PORT`.
pub(super) fn origin_address(text: &str) -> Result<OriginAddress, String> {
    if text.contains("://") {
        return Err("HOST:PORT is wanted, without http:// or a path".to_owned());
    }
    let wanted = || "HOST:PORT is wanted, such as 192.0.2.5:8081 or [2001:db8::5]:8081".to_owned();
    let (host, port) = text.rsplit_once(':').filter(|_| is_host_port(text)).ok_or_else(wanted)?;
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    if address.is_ok_and(|address| address.is_unspecified() || address.is_multicast()) {
        return Err(format!(
            "{host} is no address that a Varnish can reach: an address of clearcoat's machine is wanted"
        ));
    }
    Ok(OriginAddress { host: host.to_owned(), port: port.parse().map_err(|_| wanted())? })
}

/// A network, or an address alone.
pub(super) fn network(text: &str) -> Result<IpNet, &'static str> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| "an address or a network is wanted, such as 192.0.2.5 or 192.0.2.0/24")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct VclLine {
        #[command(flatten)]
        vcl: Vcl,
    }

    fn allowed(arguments: &str, host: &str) -> anyhow::Result<Vec<String>> {
        let line = VclLine::try_parse_from(format!("vcl {arguments}").split_whitespace()).unwrap();
        Ok(line
            .vcl
            .allowed(&[OriginAddress { host: host.to_owned(), port: 8081 }])?
            .iter()
            .map(ToString::to_string)
            .collect())
    }

    #[test]
    fn purges_are_allowed_from_the_origins_address_unless_said_otherwise() {
        assert_eq!(allowed("", "10.0.0.5").unwrap(), ["10.0.0.5/32"]);
        assert_eq!(allowed("", "[::1]").unwrap(), ["::1/128"]);
        assert_eq!(
            allowed("--allow 10.0.0.0/8 --allow 192.0.2.1", "clearcoat").unwrap(),
            ["10.0.0.0/8", "192.0.2.1/32"]
        );
    }

    #[test]
    fn a_name_says_nothing_about_addresses() {
        let error = allowed("", "clearcoat").unwrap_err().to_string();
        assert_eq!(error, "clearcoat is a name: say with --allow from which addresses clearcoat purges");
    }

    #[test]
    fn an_origin_is_what_a_varnish_can_connect_to() {
        for good in ["192.0.2.5:8081", "[2001:db8::5]:8081", "clearcoat.example:8081"] {
            assert!(origin_address(good).is_ok(), "{good}");
        }
        for (bad, named) in [
            ("http://192.0.2.5:8081", "without http://"),
            ("192.0.2.5", "HOST:PORT is wanted"),
            ("192.0.2.5:0", "HOST:PORT is wanted"),
            ("2001:db8::5:8081", "HOST:PORT is wanted"),
            ("0.0.0.0:8081", "no address that a Varnish can reach"),
            ("[::]:8081", "no address that a Varnish can reach"),
            ("224.0.0.1:8081", "no address that a Varnish can reach"),
        ] {
            let error = origin_address(bad).unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
        assert!(network("here").is_err());
    }
}
