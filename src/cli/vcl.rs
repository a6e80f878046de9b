//! `clearcoat vcl`: the VCL for the Varnish nodes of this fleet.

use std::net::IpAddr;

use anyhow::{Context as _, anyhow, bail};
use clap::ValueEnum;
use ipnet::IpNet;

use super::ConfigFile;
use crate::fleet::PurgeDialect;
use crate::varnish::vcl::{OriginAddress, VarnishVersion, render, stripping};

/// Print the VCL for the Varnish nodes of this fleet.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  clearcoat vcl --origin 10.0.0.5:8081 > /etc/varnish/default.vcl\n  \
    clearcoat vcl --origin 10.0.0.5:8081 --origin 10.0.0.6:8081   (two replicas)")]
pub(super) struct Vcl {
    #[command(flatten)]
    config: ConfigFile,
    /// How a Varnish reaches the origin listener; once for each clearcoat before the fleet [default: the first of
    /// origin.listen]
    #[arg(long, value_name = "HOST:PORT")]
    origin: Vec<String>,
    /// Addresses from which clearcoat purges, as a Varnish sees them; repeatable [default: the hosts of the origins]
    #[arg(long, value_name = "CIDR")]
    allow: Vec<String>,
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
        let config = self.config.load()?;
        let origins = match &*self.origin {
            [] => {
                let listen = config.origin.listen.first().context("origin.listen is empty")?;
                if listen.ip().is_unspecified() || listen.port() == 0 {
                    bail!("origin.listen is {listen}: say with --origin HOST:PORT how a Varnish reaches it");
                }
                vec![OriginAddress::from(*listen)]
            }
            origins => origins.iter().map(|text| origin(text)).collect::<anyhow::Result<_>>()?,
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
                let address: IpAddr =
                    host.parse().with_context(|| format!("{host} is a name: give --allow with addresses"))?;
                Ok(address.into())
            };
            return origins.iter().map(address).collect();
        }
        self.allow.iter().map(|text| network(text).map_err(|wanted| anyhow!("--allow {text}: {wanted}"))).collect()
    }
}

/// A network, or an address alone.
pub(super) fn network(text: &str) -> Result<IpNet, &'static str> {
    let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| "an address or a network such as 10.0.0.0/8 is wanted")
}

/// An origin listener, as `HOST:PORT`.
pub(super) fn origin(text: &str) -> anyhow::Result<OriginAddress> {
    let (host, port) = text.rsplit_once(':').with_context(|| format!("{text}: HOST:PORT is wanted"))?;
    let port = port.parse().with_context(|| format!("{text}: {port} is not a port"))?;
    Ok(OriginAddress { host: host.to_owned(), port })
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
        assert!(allowed("", "clearcoat").unwrap_err().to_string().contains("--allow"));
        assert!(allowed("--allow here", "10.0.0.5").is_err());
    }
}
