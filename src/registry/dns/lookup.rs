//! The look-up of one configured name.
//!
//! The search list is applied here and not by the resolver, because the resolver returns the result of the last name: a
//! server that fails for the first name and denies the last would mean "there is no such name". Here the result is
//! empty only if every name was denied; otherwise the first name with records is used.
//!
//! A referral to other servers is a failure, not a denial.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::ProtoError;
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::{TokioResolver, system_conf};
use tokio::task::JoinSet;

use super::question::{DnsQuestion, QuestionKind, Search};

/// The time limit of a whole look-up. When it is over, every question was answered or has failed once.
const PATIENCE: Duration = Duration::from_secs(3);

/// The time limit of one query to one server. The query is repeated once.
const ONE_ANSWER: Duration = Duration::from_secs(1);

/// The number of targets of services that are looked up concurrently.
const TARGETS_AT_ONCE: usize = 16;

/// The TTL of an address that is not from a record.
const FOR_EVER: Duration = Duration::MAX;

/// The nodes that a name stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DnsAnswer {
    /// Each once, in order.
    pub(super) nodes: Vec<DnsNode>,
    /// How long the answer is valid.
    pub(super) ttl: Duration,
}

/// One node.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DnsNode {
    /// Its id: the address or the target, with the port.
    pub(super) id: String,
    pub(super) address: SocketAddr,
    pub(super) weight: u32,
}

/// Why a look-up failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookupError {
    #[error("no answer within {PATIENCE:?}")]
    Patience,
    #[error(transparent)]
    Server(#[from] NetError),
    #[error("the name server refers to others")]
    Referral,
    #[error("not a name")]
    Name(#[from] ProtoError),
    #[error("a look-up ended early")]
    Panic(#[from] tokio::task::JoinError),
}

/// The records of a type; may be empty.
struct RecordSet {
    data: Vec<RData>,
    ttl: Duration,
}

/// The kind of records to look up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RecordKind {
    Addresses,
    Services,
}

/// Asks the name servers.
#[derive(Clone)]
pub(super) struct Lookup {
    resolver: TokioResolver,
    search: Search,
}

impl Lookup {
    /// Asks these servers, or those of the system if the list is empty. Configured servers get names without a search
    /// list.
    pub(super) fn new(servers: &[SocketAddr]) -> Result<Self, LookupError> {
        let (config, mut options, search) = if servers.is_empty() {
            let (config, options) = system_conf::read_system_conf()?;
            let local = config.domain().filter(|_| config.search().is_empty());
            let domains = config.search().iter().chain(local).map(Name::to_ascii).collect();
            let search = Search { domains, dots: options.ndots };
            (config, options, search)
        } else {
            let servers = servers.iter().map(server).collect();
            (ResolverConfig::from_parts(None, Vec::new(), servers), ResolverOpts::default(), Search::default())
        };
        options.timeout = ONE_ANSWER;
        options.attempts = 1;
        // The caller honours the TTLs, and asks for records: the hosts file has none.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        let mut builder = TokioResolver::builder_with_config(config, Default::default());
        *builder.options_mut() = options;
        Ok(Lookup { resolver: builder.build()?, search })
    }

    pub(super) async fn answer(&self, question: &DnsQuestion) -> Result<DnsAnswer, LookupError> {
        let answer = async {
            match &question.what {
                QuestionKind::Addresses { name, port } => self.addresses(name, *port).await,
                QuestionKind::Services { name } => self.services(name).await,
                QuestionKind::Nothing(address) => {
                    Ok(DnsAnswer { nodes: vec![found(address.ip(), address.port())], ttl: FOR_EVER })
                }
            }
        };
        tokio::time::timeout(PATIENCE, answer).await.unwrap_or(Err(LookupError::Patience))
    }

    async fn addresses(&self, name: &str, port: u16) -> Result<DnsAnswer, LookupError> {
        let records = self.find(name, RecordKind::Addresses).await?;
        Ok(DnsAnswer { nodes: ips(&records).into_iter().map(|ip| found(ip, port)).collect(), ttl: records.ttl })
    }

    async fn services(&self, name: &str) -> Result<DnsAnswer, LookupError> {
        let records = self.find(name, RecordKind::Services).await?;
        let mut ttl = records.ttl;
        let targets = targets(&records.data);
        let mut addresses = BTreeMap::new();
        let names: Vec<&Name> = targets.keys().map(|(name, _)| name).collect();
        for some in names.chunks(TARGETS_AT_ONCE) {
            let mut lookups = JoinSet::new();
            for &name in some {
                let (this, name) = (self.clone(), name.clone());
                lookups.spawn(async move { (this.records(&name, RecordKind::Addresses).await, name) });
            }
            while let Some(ended) = lookups.join_next().await {
                let (records, name) = ended?;
                let records = records?;
                ttl = ttl.min(records.ttl);
                // A target without an address is skipped until it has one; the others are not affected.
                addresses.extend(ips(&records).first().map(|&ip| (name, ip)));
            }
        }
        let node = |((target, port), weight): (&(Name, u16), &u32)| {
            let ip = *addresses.get(target)?;
            let id = format!("{}:{port}", target.to_ascii().trim_end_matches('.').to_ascii_lowercase());
            Some(DnsNode { id, address: SocketAddr::new(ip, *port), weight: *weight })
        };
        Ok(DnsAnswer { nodes: targets.iter().filter_map(node).collect(), ttl })
    }

    /// The records of the first fully qualified name of `name` that has any.
    async fn find(&self, name: &str, kind: RecordKind) -> Result<RecordSet, LookupError> {
        let mut none = RecordSet { data: Vec::new(), ttl: FOR_EVER };
        let mut failure = None;
        for name in self.search.complete(name) {
            match self.records(&Name::from_ascii(name)?, kind).await {
                Ok(records) if !records.data.is_empty() => return Ok(records),
                Ok(records) => none.ttl = none.ttl.min(records.ttl),
                Err(error) => _ = failure.get_or_insert(error),
            }
        }
        failure.map_or(Ok(none), Err)
    }

    /// The records of a fully qualified name. AAAA records only if there are no A records: see `dns.rs`.
    async fn records(&self, name: &Name, kind: RecordKind) -> Result<RecordSet, LookupError> {
        let types: &[RecordType] = match kind {
            RecordKind::Addresses => &[RecordType::A, RecordType::AAAA],
            RecordKind::Services => &[RecordType::SRV],
        };
        let mut ttl = FOR_EVER;
        for &wanted in types {
            let lookup = match self.resolver.lookup(name.clone(), wanted).await {
                Ok(lookup) => lookup,
                Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
                    if none.soa.is_none() && none.ns.is_some() {
                        return Err(LookupError::Referral);
                    }
                    // An answer without a TTL is repeated soon.
                    ttl = ttl.min(Duration::from_secs(none.negative_ttl.unwrap_or(0).into()));
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            // Aliases count for the TTL, but are not records of the type.
            let lives = lookup.answers().iter().map(|record| Duration::from_secs(record.ttl.into()));
            ttl = lives.fold(ttl, Duration::min);
            let of_type = lookup.answers().iter().filter(|record| record.record_type() == wanted);
            let data: Vec<RData> = of_type.map(|record| record.data.clone()).collect();
            if !data.is_empty() {
                return Ok(RecordSet { data, ttl });
            }
        }
        Ok(RecordSet { data: Vec::new(), ttl })
    }
}

fn server(address: &SocketAddr) -> NameServerConfig {
    let mut server = NameServerConfig::udp_and_tcp(address.ip());
    server.connections.iter_mut().for_each(|connection| connection.port = address.port());
    server
}

fn found(ip: IpAddr, port: u16) -> DnsNode {
    DnsNode { id: format!("{ip}:{port}"), address: SocketAddr::new(ip, port), weight: 1 }
}

/// The addresses, each once, in order: a name server shuffles them.
fn ips(records: &RecordSet) -> Vec<IpAddr> {
    let ip = |data: &RData| match data {
        RData::A(v4) => Some(IpAddr::V4(v4.0)),
        RData::AAAA(v6) => Some(IpAddr::V6(v6.0)),
        _ => None,
    };
    let mut ips: Vec<IpAddr> = records.data.iter().filter_map(ip).collect();
    ips.sort_unstable();
    ips.dedup();
    ips
}

/// The targets of the lowest priority, each with its weight: see `dns.rs`. If the target is the root, the service does
/// not exist (RFC 2782).
fn targets(records: &[RData]) -> BTreeMap<(Name, u16), u32> {
    let service = |data: &RData| match data {
        RData::SRV(service) if !service.target.is_root() => Some(service.clone()),
        _ => None,
    };
    let services: Vec<SRV> = records.iter().filter_map(service).collect();
    let first = services.iter().map(|service| service.priority).min();
    let chosen: Vec<SRV> = services.into_iter().filter(|service| Some(service.priority) == first).collect();
    let are_alike = chosen.iter().all(|service| service.weight == chosen[0].weight);
    let weight = |service: &SRV| if are_alike { 1 } else { service.weight.into() };
    chosen.into_iter().map(|service| ((service.target.clone(), service.port), weight(&service))).collect()
}
