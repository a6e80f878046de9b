//! `clearcoat agent`: registers the node that it runs next to.
//!
//! Every flag can also be set by a variable, so that an image can be configured by its environment. The names have no
//! double underscore, because `serve` reads variables with one as its configuration and ignores the others.

mod values;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ipnet::IpNet;

use crate::agent::{self, Address, AgentSettings, CheckSettings, CheckUrl, Epoch, Facts, Signal, VclSettings};
use crate::config::{self, Log, LogFilter, LogFormat, MARKETING_PARAMETERS, MAX_WEIGHT};
use crate::fleet::{NodeId, PurgeDialect, Role, SendProxy};
use crate::varnish::vcl::OriginAddress;

use super::vcl::{Varnish, network, origin_address};
use values::{duration, header_limit, host_port, interval, label, node_id, stop_signal, text, timeout, ttl};

/// Register the node beside it in etcd, and run it
#[derive(Debug, clap::Args)]
// The last of a repeated flag wins, so that the flags of an image can be overridden.
#[command(args_override_self = true)]
#[command(after_help = "Examples:\n  \
        clearcoat agent --role web --port 80 --etcd http://203.0.113.1:2379 --check http://127.0.0.1/health_check.php -- apache2ctl -DFOREGROUND\n  \
        clearcoat agent --role varnish --port 6081 --interface eth1 --etcd http://203.0.113.1:2379 -- varnishd -F -a :6081 -f /etc/varnish/default.vcl\n  \
        clearcoat agent --role varnish --address 192.0.2.11:6081 --pid-file /run/varnish/varnishd.pid\n  \
        clearcoat agent --role varnish --port 6081 --vcl /etc/varnish/clearcoat.vcl --origin clearcoat:8081 -- \\\n    \
            varnishd -F -a :6081 -f /etc/varnish/clearcoat.vcl -T 127.0.0.1:6082 -S /etc/varnish/secret\n\n\
    Every flag FLAG is also the variable CLEARCOAT_AGENT_FLAG, with lists between commas.")]
pub(super) struct Agent {
    /// What the node does
    #[arg(long, env = "CLEARCOAT_AGENT_ROLE", value_enum)]
    role: Role,
    /// Its stable name, unique within its role [default: the name of this host]
    #[arg(long, env = "CLEARCOAT_AGENT_ID", value_parser = node_id)]
    id: Option<NodeId>,
    /// Where clearcoat reaches it
    #[arg(long, value_name = "HOST:PORT", env = "CLEARCOAT_AGENT_ADDRESS", value_parser = host_port)]
    #[arg(required_unless_present = "port", conflicts_with = "port")]
    address: Option<String>,
    /// Its port, at the address of this host on the way to etcd
    #[arg(long, env = "CLEARCOAT_AGENT_PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// With --port: at the address of this interface
    #[arg(long, value_name = "NAME", env = "CLEARCOAT_AGENT_INTERFACE")]
    #[arg(requires = "port", conflicts_with = "address")]
    interface: Option<String>,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    check: CheckArgs,
    #[command(flatten)]
    facts: FactsArgs,
    #[command(flatten)]
    vcl: VclArgs,
    /// Names the life of the cache, where neither the command nor --pid-file can (varnish only)
    #[arg(long, value_name = "TEXT", env = "CLEARCOAT_AGENT_EPOCH", value_parser = text)]
    epoch: Option<String>,
    /// The pid file of a varnishd that somebody else runs, in the same namespace of processes (varnish only)
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_AGENT_PID_FILE", conflicts_with = "command")]
    pid_file: Option<PathBuf>,
    /// How long the node goes on without new requests before it is ended
    #[arg(long, value_name = "TIME", env = "CLEARCOAT_AGENT_DRAIN", default_value = "5s", value_parser = duration)]
    drain: Duration,
    /// How long the command has to end before it is killed
    #[arg(long, value_name = "TIME", env = "CLEARCOAT_AGENT_KILL_AFTER", default_value = "30s", value_parser = duration)]
    kill_after: Duration,
    /// The signal that ends the command: nginx and php-fpm finish their requests with QUIT, Apache with WINCH
    #[arg(long, value_name = "NAME", env = "CLEARCOAT_AGENT_STOP_SIGNAL", default_value = "TERM", value_parser = stop_signal())]
    stop_signal: Signal,
    /// The least important lines that are logged, with those of a library if it is named: debug,h2=debug
    #[arg(long, value_name = "LEVEL", env = "CLEARCOAT_AGENT_LOG_LEVEL", default_value = "info")]
    log_level: LogFilter,
    /// How a line of the log looks
    #[arg(long, value_name = "FORMAT", env = "CLEARCOAT_AGENT_LOG_FORMAT", default_value = "text", value_enum)]
    log_format: LogFormat,
    /// What to run; it gets the agent's signals, and the agent ends with its status
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
struct EtcdArgs {
    /// A member of etcd; may be repeated
    #[arg(long, value_name = "URL", env = "CLEARCOAT_AGENT_ETCD", value_delimiter = ',')]
    #[arg(default_value = "http://127.0.0.1:2379")]
    etcd: Vec<String>,
    /// What every key of the fleet starts with
    #[arg(long, env = "CLEARCOAT_AGENT_PREFIX", default_value = "/clearcoat/v1/")]
    prefix: String,
    /// The user, where etcd wants one
    #[arg(long, value_name = "NAME", env = "CLEARCOAT_AGENT_USERNAME")]
    username: Option<String>,
    /// A file with its password
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_AGENT_PASSWORD_FILE")]
    password_file: Option<PathBuf>,
    /// A file with the certificates that sign those of etcd, in PEM, for https
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_AGENT_CA")]
    ca: Option<PathBuf>,
    /// A file with our own certificate, in PEM, where etcd wants one
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_AGENT_CERT")]
    cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_AGENT_KEY")]
    key: Option<PathBuf>,
    /// How long the node's key stays without a sign of life, 2s to 1h
    #[arg(long, value_name = "TIME", env = "CLEARCOAT_AGENT_TTL", default_value = "30s", value_parser = ttl)]
    ttl: Duration,
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// A page that says that the node is well [default: it takes a connection at its address]
    #[arg(long, value_name = "URL", env = "CLEARCOAT_AGENT_CHECK")]
    check: Option<CheckUrl>,
    /// Time between two checks, at least 10ms
    #[arg(long, value_name = "TIME", env = "CLEARCOAT_AGENT_CHECK_INTERVAL", default_value = "2s", value_parser = interval)]
    check_interval: Duration,
    /// Time after which a check has failed
    #[arg(long, value_name = "TIME", env = "CLEARCOAT_AGENT_CHECK_TIMEOUT", default_value = "1s", value_parser = timeout)]
    check_timeout: Duration,
    /// Passes in a row that bring the node up
    #[arg(long, value_name = "N", env = "CLEARCOAT_AGENT_RISE", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    rise: u32,
    /// Failures in a row that take it out of the traffic
    #[arg(long, value_name = "N", env = "CLEARCOAT_AGENT_FALL", default_value_t = 3)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    fall: u32,
    /// A status that passes; may be repeated
    #[arg(long, value_name = "STATUS", env = "CLEARCOAT_AGENT_EXPECT", value_delimiter = ',', default_value = "200")]
    #[arg(value_parser = clap::value_parser!(u16).range(100..=599))]
    expect: Vec<u16>,
}

#[derive(Debug, clap::Args)]
struct FactsArgs {
    /// Its share of the traffic next to its peers, 0 (no new traffic) to 65535 [default: 1]
    #[arg(long, value_name = "N", env = "CLEARCOAT_AGENT_WEIGHT")]
    #[arg(value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_WEIGHT)))]
    weight: Option<u32>,
    /// Where it stands
    #[arg(long, value_name = "TEXT", env = "CLEARCOAT_AGENT_ZONE", value_parser = text)]
    zone: Option<String>,
    /// What else there is to say of it; may be repeated
    #[arg(long, value_name = "NAME=TEXT", env = "CLEARCOAT_AGENT_LABEL", value_delimiter = ',', value_parser = label)]
    label: Vec<(String, String)>,
    /// How it is told to drop pages (varnish only) [default: magento]
    #[arg(long, value_name = "FORM", env = "CLEARCOAT_AGENT_DELIVERY", value_enum)]
    delivery: Option<PurgeDialect>,
    /// The longest value of one request header that it takes, 512 to 65536 bytes (varnish only) [default: 7680]
    #[arg(long, value_name = "BYTES", env = "CLEARCOAT_AGENT_HEADER_LIMIT", value_parser = header_limit)]
    header_limit: Option<usize>,
    /// Whether connections to it start with a PROXY header (varnish only) [default: off]
    #[arg(long, value_name = "VERSION", env = "CLEARCOAT_AGENT_SEND_PROXY", value_enum)]
    send_proxy: Option<SendProxy>,
}

#[derive(Debug, clap::Args)]
struct VclArgs {
    /// Writes the VCL of this Varnish there, with the addresses that the origins have, and has varnishd load it when they
    /// change (varnish only)
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_AGENT_VCL", requires = "origin")]
    vcl: Option<PathBuf>,
    /// The origin listener of the clearcoats, by name; a name may have an address for each of them, or be repeated
    #[arg(long, value_name = "HOST:PORT", env = "CLEARCOAT_AGENT_ORIGIN", value_delimiter = ',', requires = "vcl")]
    #[arg(value_parser = origin_address)]
    origin: Vec<OriginAddress>,
    /// With --vcl: the networks from which clearcoat purges [default: the addresses of the origins]
    #[arg(long, value_name = "CIDR", env = "CLEARCOAT_AGENT_ALLOW", value_delimiter = ',', requires = "vcl")]
    #[arg(value_parser = network)]
    allow: Vec<IpNet>,
    /// With --vcl: which Varnish this is
    #[arg(long, env = "CLEARCOAT_AGENT_VARNISH", value_enum, default_value_t = Varnish::Seven)]
    varnish: Varnish,
    /// With --vcl: the query parameters that it strips, as edge.hash_ignore_query has them
    #[arg(long, value_name = "NAME", env = "CLEARCOAT_AGENT_IGNORE_QUERY", value_delimiter = ',')]
    #[arg(default_values_t = MARKETING_PARAMETERS.map(str::to_owned), hide_default_value = true)]
    ignore_query: Vec<String>,
    /// With --vcl: where varnishd is managed (its -T)
    #[arg(long, value_name = "HOST:PORT", env = "CLEARCOAT_AGENT_MANAGEMENT", default_value = "127.0.0.1:6082")]
    #[arg(value_parser = host_port)]
    management: String,
    /// With --vcl: the file that shows that we may manage it (its -S)
    #[arg(long, value_name = "FILE", env = "CLEARCOAT_AGENT_SECRET_FILE", default_value = "/etc/varnish/secret")]
    secret_file: PathBuf,
}

/// The variables that an agent reads.
fn variables() -> Vec<String> {
    let flags = <Agent as clap::Args>::augment_args(clap::Command::new("agent"));
    let variables = flags.get_arguments().filter_map(clap::Arg::get_env);
    variables.map(|name| name.to_string_lossy().into_owned()).collect()
}

impl Agent {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let log = Log { level: self.log_level.clone(), format: self.log_format, ..Log::default() };
        let settings = match self.settings() {
            Ok(settings) => settings,
            Err(problem) => {
                eprintln!("error: {problem}\n\nFor more information, try 'clearcoat agent --help'.");
                return Ok(ExitCode::from(2));
            }
        };
        super::serve::start_logging(&log);
        let set = std::env::vars_os().map(|(name, _)| name.to_string_lossy().into_owned());
        for remark in config::stray_agent_variables(set, &variables()) {
            tracing::warn!("{remark}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let status = runtime.block_on(agent::run(settings))?;
        // Dropping the runtime would wait for a DNS lookup that is under way.
        runtime.shutdown_background();
        Ok(ExitCode::from(status))
    }

    /// Checks the combinations of flags, which clap cannot.
    fn settings(self) -> Result<AgentSettings, String> {
        let etcd = self.etcd.config()?;
        let Agent { role, facts, .. } = self;
        if role == Role::Web {
            let of_varnish = [
                ("--delivery", facts.delivery.is_some()),
                ("--header-limit", facts.header_limit.is_some()),
                ("--send-proxy", facts.send_proxy.is_some()),
                ("--epoch", self.epoch.is_some()),
                ("--pid-file", self.pid_file.is_some()),
                ("--vcl", self.vcl.vcl.is_some()),
            ];
            if let Some((flag, _)) = of_varnish.iter().find(|(_, given)| *given) {
                return Err(format!("{flag}: only for --role varnish"));
            }
        }
        if self.check.check_timeout > self.check.check_interval {
            let interval = humantime::format_duration(self.check.check_interval);
            return Err(format!("--check-timeout: must be at most --check-interval, which is {interval}"));
        }
        let address = match (self.address, self.port, self.interface) {
            (Some(address), ..) => Address::Given(address),
            (None, Some(port), Some(interface)) => Address::Of(interface, port),
            (None, Some(port), None) => Address::Towards(etcd.endpoints.clone(), port),
            (None, None, _) => return Err("wanted --address or --port".to_owned()),
        };
        let epoch = match (role, self.epoch, self.pid_file) {
            (Role::Web, ..) => Epoch::None,
            (Role::Varnish, Some(epoch), _) => Epoch::Fixed(epoch),
            (Role::Varnish, None, Some(file)) => Epoch::OfPidFile(file),
            (Role::Varnish, None, None) => Epoch::OfChild,
        };
        Ok(AgentSettings {
            role,
            id: self.id.map_or_else(id_of_host, Ok)?,
            address,
            etcd,
            ttl: self.etcd.ttl,
            check: self.check.check(),
            vcl: self.vcl.settings(facts.delivery.unwrap_or_default())?,
            facts: facts.facts(),
            epoch,
            command: self.command,
            stop_signal: self.stop_signal,
            drain: self.drain,
            kill_after: self.kill_after,
        })
    }
}

impl EtcdArgs {
    fn config(&self) -> Result<config::Etcd, String> {
        let etcd = config::Etcd {
            endpoints: self.etcd.clone(),
            prefix: self.prefix.clone(),
            // An empty variable counts as unset.
            username: self.username.clone().filter(|name| !name.is_empty()),
            password_file: self.password_file.clone(),
            ca: self.ca.clone(),
            cert: self.cert.clone(),
            key: self.key.clone(),
        };
        let flag = |name: &str| match name.split('[').next() {
            Some("endpoints") => "--etcd".to_owned(),
            _ => format!("--{}", name.replace('_', "-")),
        };
        match etcd.violations(flag).into_iter().next() {
            Some((flag, reason)) => Err(format!("{flag}: {reason}")),
            None => Ok(etcd),
        }
    }
}

impl CheckArgs {
    fn check(self) -> CheckSettings {
        let CheckArgs { check: page, check_interval: interval, check_timeout: timeout, rise, fall, expect } = self;
        CheckSettings { page, expect, interval, timeout, rise, fall }
    }
}

impl VclArgs {
    fn settings(self, delivery: PurgeDialect) -> Result<Option<VclSettings>, String> {
        let VclArgs { vcl, origin: origins, allow, varnish, ignore_query, management, secret_file } = self;
        let Some(file) = vcl else { return Ok(None) };
        // varnishd looks for a relative one somewhere else.
        let file = std::path::absolute(file).map_err(|error| format!("--vcl: {error}"))?;
        let version = varnish.into();
        Ok(Some(VclSettings {
            file,
            origins,
            allow,
            version,
            delivery,
            ignored_query: ignore_query,
            management,
            secret_file,
        }))
    }
}

impl FactsArgs {
    fn facts(self) -> Facts {
        let FactsArgs { weight, zone, label, delivery, header_limit, send_proxy } = self;
        let labels = label.into_iter().collect::<BTreeMap<_, _>>();
        Facts { weight, zone, labels, delivery, header_limit, send_proxy }
    }
}

fn id_of_host() -> Result<NodeId, String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    NodeId::try_from(name).map_err(|error| format!("--id: the name of this host is of no use: {error}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct AgentLine {
        #[command(flatten)]
        agent: Agent,
    }

    fn settings(arguments: &str) -> Result<AgentSettings, String> {
        let line = AgentLine::try_parse_from(format!("agent {arguments}").split_whitespace());
        line.map_err(|error| error.to_string())?.agent.settings()
    }

    #[test]
    fn a_variable_that_no_flag_has_is_remarked() {
        let remarks = |name: &str| config::stray_agent_variables(std::iter::once(name.to_owned()), &variables());
        for read in ["CLEARCOAT_AGENT_ROLE", "CLEARCOAT_AGENT_LOG_FORMAT", "CLEARCOAT_EDGE__LISTEN"] {
            assert_eq!(remarks(read), Vec::<String>::new());
        }
        let expected = "CLEARCOAT_AGENT_ADRESS: this variable means nothing; did you mean CLEARCOAT_AGENT_ADDRESS?";
        assert_eq!(remarks("CLEARCOAT_AGENT_ADRESS"), [expected]);
    }

    #[test]
    fn a_node_is_what_it_is_told_to_be() {
        let settings = settings(
            "--role varnish --id v-1 --address 10.0.1.5:6081 --etcd http://a:2379,http://b:2379 --etcd http://c:2379 \
             --label rack=7 --label os=x --delivery magento-plain --expect 200,204 --stop-signal QUIT -- varnishd -F",
        );
        let settings = settings.unwrap();
        assert_eq!(settings.etcd.endpoints, ["http://a:2379", "http://b:2379", "http://c:2379"]);
        assert_eq!(settings.facts.labels.len(), 2);
        assert_eq!(settings.facts.delivery, Some(PurgeDialect::MagentoPlain));
        assert_eq!(settings.check.expect, [200, 204]);
        assert_eq!(settings.stop_signal, Signal::QUIT);
        assert!(matches!(settings.epoch, Epoch::OfChild));
        assert_eq!(settings.command, ["varnishd", "-F"]);
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        for (arguments, hint) in [
            ("--role web --port 80 --delivery xkey", "--delivery: only for --role varnish"),
            ("--role web --port 80 --pid-file x", "--pid-file: only for --role varnish"),
            ("--role web --port 80 --vcl x --origin a:1", "--vcl: only for --role varnish"),
            ("--role varnish --port 80 --vcl x", "--origin"),
            ("--role varnish --port 80 --origin a:1", "--vcl"),
            ("--role varnish --port 80 --vcl x --origin a", "HOST:PORT"),
            ("--role varnish --port 80 --vcl x --origin a:1 --allow b", "such as 192.0.2.5 or 192.0.2.0/24"),
            ("--role web --port 80 --username u", "--password-file: must name a file when --username is set"),
            ("--role web --port 80 --etcd 10.0.0.1:2379", "--etcd: wanted http://HOST:PORT"),
            ("--role web --port 80 --etcd https://a:2379", "--ca: must name a file"),
            ("--role web --port 80 --prefix /a", "--prefix: must end in /"),
            ("--role web --port 80 --check-timeout 3s", "--check-interval, which is 2s"),
            ("--role web", "--address"),
            ("--role web --port 80 --address a:80", "cannot be used with"),
            ("--role web --address a:80 --interface lo", "cannot be used with"),
            ("--role varnish --port 80 --pid-file x -- varnishd", "cannot be used with"),
            ("--role cache --port 80", "[possible values: web, varnish]"),
            ("--role web --port 0", "is not in"),
            ("--role web --port 80 --id a/b", "is not a node id"),
            ("--role web --port 80 --weight 65536", "is not in"),
            ("--role web --port 80 --check https://a/", "wanted http://HOST:PORT/PATH"),
        ] {
            let problem = settings(arguments).err().unwrap_or_else(|| panic!("accepted: {arguments}"));
            assert!(problem.contains(hint), "{arguments}: {problem}");
        }
    }
}
