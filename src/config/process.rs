//! `[admin]`, `[runtime]` and `[log]`: the process itself.

use std::net::SocketAddr;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::text;

/// `[admin]`: metrics, status page and API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admin {
    /// Where operators and Prometheus connect; port 0 takes any free port. Default `["127.0.0.1:9180"]`: it asks
    /// nobody who they are.
    #[serde(deserialize_with = "text::list")]
    pub listen: Vec<SocketAddr>,
}

impl Default for Admin {
    fn default() -> Self {
        Admin { listen: vec![SocketAddr::from(([127, 0, 0, 1], 9180))] }
    }
}

/// `[runtime]`: threads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// Worker threads, at most 1024; 0 (the default) is one for each core.
    pub workers: usize,
    /// How long a worker that has nothing to do polls before it sleeps: less latency for a whole core. At most 10ms;
    /// 0us (the default) sleeps at once.
    #[serde(deserialize_with = "text::one", serialize_with = "text::write_duration")]
    pub spin: Duration,
}

/// `[log]`: what is logged and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// The least important level that is written. Default `info`.
    pub level: LogLevel,
    /// Default `text`.
    pub format: LogFormat,
}

/// How important a line is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    /// Something was lost or refused that should not be.
    Error,
    /// Somebody should look at it.
    Warn,
    /// What an operator wants to know.
    #[default]
    Info,
    /// What a developer wants to know.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The name in configuration, which tracing understands as well.
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
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
