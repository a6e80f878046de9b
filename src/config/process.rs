//! `[admin]`, `[runtime]`, `[shutdown]` and `[log]`: the process itself.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::log_filter::LogFilter;
use super::optional::{empty_is_none, zero_is_none};
use super::{Token, text};

/// `[admin]`: metrics, status page and API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Where operators and Prometheus connect; port 0 takes any free port. Default `["127.0.0.1:9180"]`: it asks
    /// nobody who they are.
    #[serde(deserialize_with = "text::list")]
    pub listen: Vec<SocketAddr>,
    /// A file with the bearer token of those who may purge from the status page and drain nodes; empty (the default): nobody may.
    #[serde(with = "empty_is_none")]
    pub token_file: Option<PathBuf>,
    /// What stands in `token_file`, read at load.
    #[serde(skip)]
    pub token: Option<Token>,
    /// The names by which the page and the API are reached, beside addresses and names without a dot. Default none.
    pub hosts: Vec<String>,
}

impl Default for Admin {
    fn default() -> Self {
        Admin {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 9180))],
            token_file: None,
            token: None,
            hosts: Vec::new(),
        }
    }
}

/// `[runtime]`: threads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// Worker threads, at most 1024; 0 (the default) is one for each core.
    #[serde(with = "zero_is_none")]
    pub workers: Option<NonZeroUsize>,
    /// How long a worker that has nothing to do polls before it sleeps: less latency for a whole core. At most 10ms;
    /// 0us (the default) sleeps at once.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub spin: Duration,
}

/// `[shutdown]`: how long the process takes to end after SIGTERM or SIGINT. Together both must be shorter than the time after which
/// its supervisor kills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownTimes {
    /// How long connections are still accepted after `/readyz` began to fail, so that a load balancer in front stops using this
    /// process first: longer than it takes to notice. At most 10min; 0s drains at once. Default 1s.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub leave: Duration,
    /// How long requests under way may take to finish after that; what is left is cut. At most 1h; 0s cuts at once. Default 8s:
    /// with `leave` less than the 10 s after which `docker stop` kills.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub drain: Duration,
}

impl Default for ShutdownTimes {
    fn default() -> Self {
        ShutdownTimes { leave: Duration::from_secs(1), drain: Duration::from_secs(8) }
    }
}

/// Query parameters that carry secrets: of Magento (`SID`, `token` of a password reset), of OAuth, and of links that are
/// signed.
const SECRET_PARAMETERS: [&str; 20] = [
    "access_token",
    "api_key",
    "apikey",
    "auth",
    "authorization",
    "client_secret",
    "code",
    "form_key",
    "id_token",
    "key",
    "oauth_*",
    "passwd",
    "password",
    "pwd",
    "refresh_token",
    "secret",
    "SID",
    "sig",
    "signature",
    "token",
];

/// `[log]`: what is logged and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// The least important level that is written: `error`, `warn`, `info`, `debug`, `trace` or `off`. Lines of a library
    /// are written if it is named: `debug,h2=debug`. Default `info`. Applied while the process runs.
    pub level: LogFilter,
    /// Default `text`.
    pub format: LogFormat,
    /// Whether there is a line for each request, and how it looks. Default `off`.
    pub access: AccessFormat,
    /// Where these lines go. Default empty: standard output. A file is opened again on SIGUSR1.
    #[serde(with = "empty_is_none")]
    pub access_file: Option<PathBuf>,
    /// The share of requests that get a line, 0 to 1; those that failed always do. Default 1.
    pub access_sample: f64,
    /// Query parameters whose values no line has: a name in any case, or a name with one trailing `*`. Default
    /// [`SECRET_PARAMETERS`].
    pub redact_query: Vec<String>,
}

impl Default for Log {
    fn default() -> Self {
        Log {
            level: LogFilter::default(),
            format: LogFormat::default(),
            access: AccessFormat::default(),
            access_file: None,
            access_sample: 1.0,
            redact_query: SECRET_PARAMETERS.map(str::to_owned).to_vec(),
        }
    }
}

/// How a line of the access log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccessFormat {
    /// There is none.
    #[default]
    Off,
    /// One JSON object a line.
    Json,
    /// The Common Log Format of NCSA httpd.
    Common,
}

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}
